"""The part of a Certificate service that members need while they live, for a throwaway facility."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

from cryptography import x509

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.revocation import Revocation
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.server import Server, Service
from beamwire.testing.facility import LOCAL_NAMES, Facility
from beamwire.testing.ports import free_port

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["CertificateService"]


class Registry:
    """Serves a facility; `lifetime` is that of the certificates it renews. Use it with `async with`.

    `renewals` counts the certificates it gave, `watches` the watches that were begun.
    """

    def __init__(self, facility: Facility, lifetime: timedelta = timedelta(hours=1)) -> None:
        self.facility = facility
        self.lifetime = lifetime
        self.authority = facility.authority
        self.credentials = facility.member("service/certificate")
        self.renewals = 0
        self.watches = 0
        self.own = DomainTrust(facility.trust_domain, facility.roots_pem, sequence=1)
        self.others: dict[str, DomainTrust] = {}
        self.address = f"127.0.0.1:{free_port()}"
        self._revoked: list[Revocation] = []
        self._changed = asyncio.Event()
        self._server: Server | None = None

    async def __aenter__(self) -> Registry:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Serve, at the same address as before if it was stopped."""
        service = Service(_SERVICE.full_name, pb_grpc.add_CertificateServiceServicer_to_server, self)
        self._server = Server(self.credentials, address=self.address, services=[service])
        self.address = f"127.0.0.1:{await self._server.start()}"

    async def stop(self) -> None:
        """Be away."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def revoke(self, *certificates: Credentials) -> None:
        """Revoke the present certificates of members, and tell everybody."""
        leaves = [x509.load_pem_x509_certificates(member.chain_pem)[0] for member in certificates]
        self._revoked += [Revocation(leaf.serial_number, utcnow()) for leaf in leaves]
        self.publish(revoked=self.facility.authority.sign_revocations(self._revoked, self.own.sequence + 1))

    def publish(self, **changes: Any) -> None:
        """Change what is believed of the facility, fields of DomainTrust, and tell everybody."""
        self.own = replace(self.own, **changes, sequence=self.own.sequence + 1)
        self._tell()

    def introduce(self, domain: DomainTrust | None, *, instead_of: str = "") -> None:
        """Believe another facility, or one no more, and tell everybody."""
        self.others.pop(instead_of, None)
        if domain is not None:
            self.others[domain.trust_domain] = domain
        self._tell()

    def __getattr__(self, name: str) -> Any:
        """The methods that it does not have."""
        if name not in _SERVICE.methods_by_name:
            raise AttributeError(name)

        async def unanswered(request: object, context: object) -> None:
            raise BeamwireError(Reason.UNSUPPORTED, f"this registry does not answer {name}")

        return unanswered

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def RenewCertificate(  # noqa: N802
        self, request: pb.RenewCertificateRequest, context: object
    ) -> pb.Certificate:
        """Issue the caller's next certificate."""
        caller = current_caller().id
        assert caller is not None
        issued = self.authority.issue(request.csr_pem.encode(), caller, LOCAL_NAMES, self.lifetime)
        self.renewals += 1
        return pb.Certificate(identity=str(caller), chain_pem=issued.chain_pem.decode())

    async def GetTrustBundle(  # noqa: N802
        self, request: pb.GetTrustBundleRequest, context: object
    ) -> pb.TrustBundle:
        """What is believed of the facility."""
        return bundle_of(self.own)

    async def WatchTrustBundles(  # noqa: N802
        self, request: pb.WatchTrustBundlesRequest, context: object
    ) -> AsyncIterator[pb.WatchTrustBundlesResponse]:
        """Send all bundles, then the changes."""
        self.watches += 1
        told: dict[str, DomainTrust] = {}
        synchronized = False
        while True:
            changed, now = self._changed, {self.own.trust_domain: self.own, **self.others}
            for name in told.keys() - now.keys():
                del told[name]
                yield pb.WatchTrustBundlesResponse(trust_bundle=_named(name), removed=True)
            for name, domain in now.items():
                if told.get(name) != domain:
                    told[name] = domain
                    yield pb.WatchTrustBundlesResponse(trust_bundle=bundle_of(domain))
            if not synchronized:
                synchronized = True
                yield pb.WatchTrustBundlesResponse(synchronized=True)
            await changed.wait()


def bundle_of(domain: DomainTrust) -> pb.TrustBundle:
    """What is believed of a domain as it travels."""
    bundle = _named(domain.trust_domain)
    bundle.roots_pem, bundle.sequence = domain.roots_pem.decode(), domain.sequence
    bundle.revocation_list, bundle.revocation_issuer = domain.revoked.der, domain.revoked.issuer_der
    bundle.address, bundle.enroll_address = domain.address, domain.enroll_address
    bundle.token_root = domain.token_root
    bundle.revoked_tokens.extend(sorted(domain.revoked_tokens))
    return bundle


def _named(trust_domain: str) -> pb.TrustBundle:
    return pb.TrustBundle(name=f"trustBundles/{trust_domain}")
