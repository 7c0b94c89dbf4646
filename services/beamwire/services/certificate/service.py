"""The Certificate service on the wire: messages in, the answers of those who decide out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.enrollment import JoinToken
from beamwire.mesh.identity.explanation import explain
from beamwire.mesh.identity.generations import Phase
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.listing import list_page, visible
from beamwire.mesh.pages import Pager, page_size, parse_filter
from beamwire.mesh.policy import PolicySource
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.convert import from_duration, to_timestamp
from beamwire.mesh.store import Store
from beamwire.services.certificate.access import AccessAdviser
from beamwire.services.certificate.audit import Action, Audit
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.delegation import Delegations
from beamwire.services.certificate.domain import Registrar
from beamwire.services.certificate.federation import Federation
from beamwire.services.certificate.messages import to_audit_record, to_bundle, to_certificate
from beamwire.services.certificate.model import AuditRecord, CertificateRecord, bundle_name
from beamwire.services.certificate.rates import Rates, Seats
from beamwire.services.certificate.rotation import Rotation

# What the API calls the parts of a certificate and of an audit record, and what each is called in the store.
FILTER_KEYS: Final = {"identity": "owner", "state": "state", "grant": "grant", "granted_by": "granted_by"}
AUDIT_FILTER_KEYS: Final = {"action": "state", "actor": "owner", "subject": "subject"}
_BUNDLES: Final = "trustBundles/"


@dataclass(frozen=True, slots=True)
class Desks:
    """Those who answer.

    Args:
        registrar: issues and revokes.
        rotation: looks after the authority.
        board: holds the trust that is published.
        audit: writes down what was done.
        rates: how often something may be asked.
        policy: what the facility allows.
        federation: knows other facilities.
        access: says who may do what.
        delegations: makes tokens.
    """

    registrar: Registrar
    rotation: Rotation
    board: TrustBoard
    audit: Audit
    rates: Rates
    policy: PolicySource
    federation: Federation
    access: AccessAdviser
    delegations: Delegations


class CertificateService(pb_grpc.CertificateServiceServicer):
    """Answers for one facility.

    Args:
        desks: those who decide.
        ledger: what was issued.
        audit_records: what was done.
        pager: makes page tokens.
        addresses: where the facility's services are called; goes into join tokens.
        enroll_address: where members without a certificate enrol; likewise.
    """

    def __init__(
        self,
        desks: Desks,
        ledger: Store[CertificateRecord],
        audit_records: Store[AuditRecord],
        pager: Pager,
        addresses: Addresses,
        enroll_address: str,
    ) -> None:
        self._desks = desks
        self._registrar = desks.registrar
        self._board = desks.board
        self._ledger = ledger
        self._audit_records = audit_records
        self._pager = pager
        self._addresses = addresses
        self._enroll_address = enroll_address
        self._seats = Seats()

    async def CreateJoinToken(self, request: pb.CreateJoinTokenRequest, context: Any) -> pb.JoinToken:
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

    async def EnrollMember(self, request: pb.EnrollMemberRequest, context: Any) -> pb.Certificate:
        """Exchange a join token, or membership of another facility, for a certificate."""
        peer, actor = _host(context.peer()), str(current_caller())
        try:
            csr_pem = request.csr_pem.encode()
            if request.secret:
                return to_certificate(await self._registrar.enroll(request.secret, csr_pem))
            return to_certificate(
                await self._registrar.enroll_introduced(
                    csr_pem, caller=current_caller().id, present_pem=_shown_chain(context)
                )
            )
        except BeamwireError as error:
            if error.reason is not Reason.SERVICE_UNAVAILABLE:
                self._desks.rates.count_failed_enrollment(peer)
            await self._desks.audit.note(
                actor, Action.ENROLLMENT_REFUSED, peer, f"{error.reason.name}: {error.message}"
            )
            raise

    async def RenewCertificate(self, request: pb.RenewCertificateRequest, context: Any) -> pb.Certificate:
        """Issue the caller's next certificate, with the names of the one before."""
        caller = _member()
        self._desks.rates.count_renewal(str(caller))
        present = _shown_chain(context)
        return to_certificate(await self._registrar.renew(request.csr_pem.encode(), caller=caller, present_pem=present))

    async def GetTrustBundle(self, request: pb.GetTrustBundleRequest, context: Any) -> pb.TrustBundle:
        """Read what is believed of one domain."""
        await self._board.look()
        return self._bundle(self._readable_domain(request.name))

    async def ListTrustBundles(self, request: pb.ListTrustBundlesRequest, context: Any) -> pb.ListTrustBundlesResponse:
        """List what is believed of every domain, the own one first."""
        parse_filter(request.filter, ())
        caller, limit = str(current_caller()), page_size(request.page_size)
        after = self._pager.cursor(request.page_token, "", caller) if request.page_token else ""
        trust = await self._board.look()
        names = [trust.own.trust_domain, *(sorted(trust.others) if self._is_own_member() else ())]
        rest = names if not after else [n for n in names[1:] if after == names[0] or n > after]
        page = rest[:limit]
        token = self._pager.token(page[-1], "", caller) if len(rest) > limit else ""
        return pb.ListTrustBundlesResponse(trust_bundles=map(self._bundle, page), next_page_token=token)

    async def WatchTrustBundles(
        self, request: pb.WatchTrustBundlesRequest, context: Any
    ) -> AsyncGenerator[pb.WatchTrustBundlesResponse, None]:
        """Tell of every domain at once and after every change."""
        own = self._board.trust.own.trust_domain
        sees_all = self._is_own_member()
        seat = nullcontext() if current_caller().id else self._seats.taken(_host(context.peer()))
        with seat:
            async with aclosing(self._board.watch()) as changes:
                async for change in changes:
                    if change.synchronized:
                        yield pb.WatchTrustBundlesResponse(synchronized=True)
                    elif change.trust_domain == own or sees_all:
                        yield self._told(change.trust_domain, removed=change.domain is None)

    async def IntroduceFacility(
        self, request: pb.IntroduceFacilityRequest, context: Any
    ) -> pb.IntroduceFacilityResponse:
        """Make the introduction of this facility."""
        return await self._desks.federation.introduce(request)

    async def AcceptIntroduction(self, request: pb.AcceptIntroductionRequest, context: Any) -> pb.TrustBundle:
        """Begin to believe another facility."""
        return self._bundle(await self._desks.federation.accept(request))

    async def RefreshTrustBundle(self, request: pb.RefreshTrustBundleRequest, context: Any) -> pb.TrustBundle:
        """Ask another facility for its bundle now."""
        await self._board.look()
        name = self._readable_domain(request.name)
        if name != self._board.trust.own.trust_domain:
            await self._desks.federation.refresh(name)
        return self._bundle(name)

    async def DeleteTrustBundle(
        self, request: pb.DeleteTrustBundleRequest, context: Any
    ) -> pb.DeleteTrustBundleResponse:
        """Believe another facility no more."""
        await self._board.look()
        trust_domain = self._readable_domain(request.name)
        await self._desks.federation.remove(trust_domain)
        await self._registrar.end_introduced(trust_domain, caller=_member())
        return pb.DeleteTrustBundleResponse()

    async def GetCertificate(self, request: pb.GetCertificateRequest, context: Any) -> pb.Certificate:
        """Read one entry of the ledger."""
        return to_certificate(await visible(self._ledger, "certificates", request.name))

    async def ListCertificates(self, request: pb.ListCertificatesRequest, context: Any) -> pb.ListCertificatesResponse:
        """List the ledger."""
        records, token = await list_page(self._ledger, self._pager, request, FILTER_KEYS)
        return pb.ListCertificatesResponse(certificates=map(to_certificate, records), next_page_token=token)

    async def RevokeMember(self, request: pb.RevokeMemberRequest, context: Any) -> pb.RevokeMemberResponse:
        """End the certificates of a member, or one of them."""
        caller = _member()
        if bool(request.identity) == bool(request.certificate):
            raise invalid_field("identity", "name an identity or a certificate, and not both")
        if request.identity:
            ended = await self._registrar.revoke_member(request.identity, request.reason, caller=caller)
            await self._desks.delegations.end_all_of(request.identity)
        else:
            ended = await self._registrar.revoke_certificate(request.certificate, request.reason, caller=caller)
        return pb.RevokeMemberResponse(certificates=map(to_certificate, ended))

    async def ReinstateMember(self, request: pb.ReinstateMemberRequest, context: Any) -> pb.ReinstateMemberResponse:
        """Let a member enrol again."""
        await self._registrar.reinstate(request.identity, caller=_member())
        return pb.ReinstateMemberResponse()

    async def ExplainCertificate(
        self, request: pb.ExplainCertificateRequest, context: Any
    ) -> pb.ExplainCertificateResponse:
        """Say whether a certificate would be believed here."""
        chain_pem = request.chain_pem.encode() or _shown_chain(context)
        explained = explain(chain_pem, await self._board.look(), self._desks.policy.current)
        checks = [
            pb.ExplainCertificateResponse.Check(check=c.check, passed=c.passed, detail=c.detail)
            for c in explained.checks
        ]
        return pb.ExplainCertificateResponse(accepted=explained.accepted, identity=explained.identity, checks=checks)

    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:
        """Say who the caller is."""
        return await self._desks.access.who_am_i(request, context)

    async def CheckAccess(self, request: pb.CheckAccessRequest, context: Any) -> pb.CheckAccessResponse:
        """Say whether something would be allowed."""
        return await self._desks.access.check_access(request, context)

    async def CreateDelegationToken(self, request: pb.CreateDelegationTokenRequest, context: Any) -> pb.DelegationToken:
        """Make a token that hands over a part of the caller's rights."""
        return await self._desks.delegations.create(request, context)

    async def RevokeDelegationToken(
        self, request: pb.RevokeDelegationTokenRequest, context: Any
    ) -> pb.RevokeDelegationTokenResponse:
        """End a token."""
        return await self._desks.delegations.revoke(request, context)

    async def DescribeAuthority(
        self, request: pb.DescribeAuthorityRequest, context: Any
    ) -> pb.DescribeAuthorityResponse:
        """Say which authority signs."""
        return pb.DescribeAuthorityResponse(authority=await self._authority())

    async def RotateAuthority(self, request: pb.RotateAuthorityRequest, context: Any) -> pb.RotateAuthorityResponse:
        """Take the rotation of the authority one step further."""
        phase = _phase(request.phase)
        await self._desks.rotation.move(phase, force=request.force, caller=_member(), request_id=request.request_id)
        return pb.RotateAuthorityResponse(authority=await self._authority())

    async def ListAuditRecords(self, request: pb.ListAuditRecordsRequest, context: Any) -> pb.ListAuditRecordsResponse:
        """List what was done."""
        records, token = await list_page(self._audit_records, self._pager, request, AUDIT_FILTER_KEYS)
        return pb.ListAuditRecordsResponse(audit_records=map(to_audit_record, records), next_page_token=token)

    async def _authority(self) -> pb.AuthorityStatus:
        status = await self._desks.rotation.status()
        return pb.AuthorityStatus(
            phase=pb.AuthorityStatus.Phase.Value(f"PHASE_{status.phase.name}"),
            generation=status.generation,
            root_fingerprints=status.root_fingerprints,
            expire_time=to_timestamp(status.expire_time),
            outstanding_certificate_count=status.outstanding,
        )

    def _is_own_member(self) -> bool:
        caller = current_caller().id
        return caller is not None and caller.trust_domain == self._board.trust.own.trust_domain

    def _readable_domain(self, name: str) -> str:
        """The trust domain that a resource name names, if the caller may read it; RESOURCE_NOT_FOUND else."""
        trust: Trust = self._board.trust
        domain = name.removeprefix(_BUNDLES)
        readable = domain == trust.own.trust_domain or (domain in trust.others and self._is_own_member())
        if not name.startswith(_BUNDLES) or not readable:
            raise BeamwireError(
                Reason.RESOURCE_NOT_FOUND,
                f"there is no {name[:300]!r} at {trust.own.trust_domain}; `beamwire trust list` shows which there are",
            )
        return domain

    def _bundle(self, trust_domain: str) -> pb.TrustBundle:
        trust = self._board.trust
        is_own = trust_domain == trust.own.trust_domain
        bundle = to_bundle(
            trust[trust_domain],
            self._board.records.get(trust_domain),
            with_tokens=is_own and self._is_own_member(),
        )
        if is_own:
            bundle.refresh_time.GetCurrentTime()
        return bundle

    def _told(self, trust_domain: str, *, removed: bool) -> pb.WatchTrustBundlesResponse:
        if removed or trust_domain not in self._board.trust:
            gone = pb.TrustBundle(name=bundle_name(trust_domain))
            return pb.WatchTrustBundlesResponse(trust_bundle=gone, removed=True)
        return pb.WatchTrustBundlesResponse(trust_bundle=self._bundle(trust_domain))


def _phase(phase: pb.AuthorityStatus.Phase.ValueType) -> Phase:
    try:
        return Phase[pb.AuthorityStatus.Phase.Name(phase).removeprefix("PHASE_")]
    except (KeyError, ValueError):
        raise invalid_field("phase", f"must be ANNOUNCED, ACTIVATED or STABLE, not {phase}") from None


def _member() -> SpiffeId:
    caller = current_caller().id
    assert caller is not None, "the access table lets no anonymous caller this far"
    return caller


def _host(peer: str) -> str:
    """`127.0.0.1` of `ipv4:127.0.0.1:4711`: a peer has one port for each of its connections."""
    return peer.partition(":")[2].rpartition(":")[0] or peer


def _shown_chain(context: Any) -> bytes:
    """The chain that the caller of this call showed, as PEM; empty if none."""
    shown = context.auth_context()
    leaf = next(iter(shown.get("x509_pem_cert", ())), b"")
    chain = next(iter(shown.get("x509_pem_cert_chain", ())), b"")
    # gRPC leaves the leaf out of the chain at servers, and does not at clients.
    return bytes(chain if chain.startswith(leaf) else leaf + chain)
