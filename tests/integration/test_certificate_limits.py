"""What one member, or a stranger, may have of the Certificate service at one time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.biscuits import TokenKey
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.policy import Policy
from beamwire.mesh.rpc import access
from beamwire.mesh.rpc.status import error_from_rpc
from beamwire.mesh.store import Store
from beamwire.services.certificate import delegation, rates
from beamwire.services.certificate.audit import Audit
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.delegation import DelegationRecord, Delegations
from beamwire.services.certificate.model import AuditRecord, TrustRecord
from beamwire.services.certificate.rates import Seats
from beamwire.testing.facility import Facility
from tests.conftest import LiveFacility

CREATE = "/beamwire.certificate.v1.CertificateService/CreateDelegationToken"


class Tokens:
    """Those who make tokens, by a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        self.delegations: Delegations

    async def make(self, identity: str) -> str:
        caller = SpiffeId.parse(identity)
        access.admit(CREATE, access.Caller(caller, Role.USER))
        request = pb.CreateDelegationTokenRequest(holder="spiffe://a.test/user/holder")
        return (await self.delegations.create(request, None)).revocation_ids[0]

    async def end(self, revocation_id: str) -> None:
        await self.delegations.revoke(pb.RevokeDelegationTokenRequest(revocation_id=revocation_id), None)


@pytest.fixture
async def tokens(tmp_path: Path) -> AsyncIterator[Tokens]:
    made = Tokens()
    database = await Database.open(tmp_path / "certificate.sqlite")
    roots_pem = Facility(tmp_path / "a", "a.test").roots_pem
    board = await TrustBoard.open(Store(database, TrustRecord), DomainTrust("a.test", roots_pem))
    audit = Audit(Store(database, AuditRecord))
    made.delegations = await Delegations.open(
        TokenKey.create(), Store(database, DelegationRecord), board, Policy("a.test"), audit, clock=lambda: made.now
    )
    yield made
    await database.close()


async def refused(making: object) -> None:
    with pytest.raises(BeamwireError, match="whose time is not over") as caught:
        await making  # type: ignore[misc]
    assert caught.value.reason is Reason.LIMIT_REACHED


async def test_tokens_of_one_owner_are_bounded_although_they_were_ended(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every member keeps a list of those that were ended."""
    monkeypatch.setattr(delegation, "MOST_TOKENS", 2)
    for _ in range(2):
        await tokens.end(await tokens.make("spiffe://a.test/user/alice"))
    await refused(tokens.make("spiffe://a.test/user/alice"))
    await tokens.make("spiffe://a.test/user/bob")
    tokens.now += timedelta(hours=2)
    await tokens.make("spiffe://a.test/user/alice")


async def test_tokens_of_another_facility_are_bounded_together(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegation, "MOST_TOKENS", 2)
    for name in ("one", "two"):
        await tokens.make(f"spiffe://b.test/user/{name}")
    await refused(tokens.make("spiffe://b.test/user/three"))


def test_seats_are_bounded_and_given_back() -> None:
    seats = Seats(each=1, together=2)
    with seats.taken("a"), seats.taken("b"):
        for address in ("a", "c"):
            with pytest.raises(BeamwireError, match="too many watch"), seats.taken(address):
                pass
    with seats.taken("c"), seats.taken("a"):
        pass


async def test_a_crowd_of_strangers_cannot_watch(live_facility: LiveFacility) -> None:
    member = next((live_facility.config_dir / "facilities").iterdir())
    roots = grpc.ssl_channel_credentials(root_certificates=(member / "bundle.pem").read_bytes())
    options = [("grpc.ssl_target_name_override", f"services.{member.name}")]
    address = json.loads((member / "member.json").read_text())["enroll_address"]
    async with grpc.aio.secure_channel(address, roots, options) as channel:
        stub = pb_grpc.CertificateServiceStub(channel)
        watches = [stub.WatchTrustBundles(pb.WatchTrustBundlesRequest()) for _ in range(rates.STRANGERS_EACH)]
        for watch in watches:
            assert isinstance(await watch.read(), pb.WatchTrustBundlesResponse)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WatchTrustBundles(pb.WatchTrustBundlesRequest()).read()
        assert error_from_rpc(caught.value).reason is Reason.LIMIT_REACHED
        await stub.GetTrustBundle(pb.GetTrustBundleRequest(name=f"trustBundles/{member.name}"))
        for watch in watches:
            watch.cancel()
