"""The Certificate service on the wire: messages in, the registrar's answers out."""

from __future__ import annotations

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.addresses import Addresses
from beamwire.mesh.enrollment import JoinToken
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity import SpiffeId
from beamwire.mesh.listing import list_page, visible
from beamwire.mesh.pages import Pager
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.convert import from_duration, to_timestamp
from beamwire.mesh.store import Store
from beamwire.services.certificate.domain import CertificateRecord, Registrar

# What the API calls the owner of a certificate.
FILTER_KEYS = {"identity": "owner"}


class CertificateService(pb_grpc.CertificateServiceServicer):
    """Answers for one registrar.

    Args:
        registrar: decides and issues.
        ledger: what was issued.
        pager: makes page tokens.
        addresses: where the facility's services are called; goes into join tokens.
        enroll_address: where members without a certificate enrol; likewise.
    """

    def __init__(
        self,
        registrar: Registrar,
        ledger: Store[CertificateRecord],
        pager: Pager,
        addresses: Addresses,
        enroll_address: str,
    ) -> None:
        self._registrar = registrar
        self._ledger = ledger
        self._pager = pager
        self._addresses = addresses
        self._enroll_address = enroll_address

    async def CreateJoinToken(self, request: pb.CreateJoinTokenRequest, context: object) -> pb.JoinToken:
        """Mint a one-time right to enrol."""
        ttl = from_duration(request.ttl) if request.HasField("ttl") else None
        secret, record = await self._registrar.create_token(
            request.identity, ttl, request.server_names, caller=_member()
        )
        token = JoinToken(
            trust_domain=self._registrar.trust_domain,
            enroll_address=self._enroll_address,
            address=str(self._addresses),
            root_der=self._registrar.root_der,
            secret=secret,
        )
        return pb.JoinToken(token=token.encode(), identity=record.owner, expire_time=to_timestamp(record.expire_time))

    async def EnrollMember(self, request: pb.EnrollMemberRequest, context: object) -> pb.Certificate:
        """Exchange a join token for a certificate."""
        return _to_message(await self._registrar.enroll(request.secret, request.csr_pem.encode()))

    async def RenewCertificate(self, request: pb.RenewCertificateRequest, context: object) -> pb.Certificate:
        """Issue the caller's next certificate, with the names of the one before."""
        caller = _member()
        latest = await self._ledger.list(owner=str(caller), limit=1)
        names = latest[0].server_names if latest else ()
        return _to_message(await self._registrar.renew(request.csr_pem.encode(), caller=caller, server_names=names))

    async def GetTrustBundle(self, request: pb.GetTrustBundleRequest, context: object) -> pb.TrustBundle:
        """Read the roots of this facility."""
        collection, _, domain = request.name.partition("/")
        if collection != "trustBundles" or domain != self._registrar.trust_domain:
            raise BeamwireError(
                Reason.RESOURCE_NOT_FOUND,
                f"there is no {request.name!r} here; this facility is trustBundles/{self._registrar.trust_domain}",
            )
        return pb.TrustBundle(name=request.name, roots_pem=self._registrar.roots_pem.decode(), sequence=1)

    async def GetCertificate(self, request: pb.GetCertificateRequest, context: object) -> pb.Certificate:
        """Read one entry of the ledger."""
        return _to_message(await visible(self._ledger, "certificates", request.name))

    async def ListCertificates(
        self, request: pb.ListCertificatesRequest, context: object
    ) -> pb.ListCertificatesResponse:
        """List the ledger."""
        records, token = await list_page(self._ledger, self._pager, request, FILTER_KEYS)
        return pb.ListCertificatesResponse(certificates=map(_to_message, records), next_page_token=token)


def _member() -> SpiffeId:
    caller = current_caller().id
    assert caller is not None, "the access table lets no anonymous caller this far"
    return caller


def _to_message(record: CertificateRecord) -> pb.Certificate:
    return pb.Certificate(
        name=record.name,
        identity=record.owner,
        server_names=record.server_names,
        chain_pem=record.chain_pem,
        grant=pb.Certificate.Grant.Value(f"GRANT_{record.grant}"),
        granted_by=record.granted_by,
        create_time=to_timestamp(record.create_time),
        expire_time=to_timestamp(record.expire_time),
    )
