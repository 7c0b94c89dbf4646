"""Becoming a member: the token, the listener behind it, and what is left on disk."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.mesh.rpc.server import Server, Service
from beamwire.testing.facility import Facility

SECRET = "hunter2-and-some-more"


class Enrolment:
    """Gives one certificate for the secret."""

    def __init__(self, facility: Facility) -> None:
        self.facility = facility
        self.authority = facility.authority
        self.spent = False
        self.requests: list[pb.EnrollMemberRequest] = []
        self.roots_pem = facility.roots_pem
        self.bundle = ""
        self.silent = False
        self.away = 0

    async def EnrollMember(self, request: pb.EnrollMemberRequest, context: object) -> pb.Certificate:  # noqa: N802
        self.requests.append(request)
        if len(self.requests) <= self.away:
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "the database does not answer")
        if self.spent or request.secret != SECRET:
            raise BeamwireError(Reason.INVALID_JOIN_TOKEN, "the join token is spent or expired; ask for another")
        self.spent = True
        identity = self.facility.id("user/alice")
        issued = self.authority.issue(request.csr_pem.encode(), identity, [], timedelta(hours=1))
        return pb.Certificate(chain_pem=issued.chain_pem.decode())

    async def GetTrustBundle(self, request: pb.GetTrustBundleRequest, context: object) -> pb.TrustBundle:  # noqa: N802
        if self.silent:
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "nobody is here")
        return pb.TrustBundle(name=self.bundle or request.name, roots_pem=self.roots_pem.decode(), sequence=3)

    def __getattr__(self, name: str) -> Any:
        """The methods that no test waits for."""
        return self.EnrollMember


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "facility")


@pytest.fixture
def enrolment(facility: Facility) -> Enrolment:
    return Enrolment(facility)


@pytest.fixture
async def token(facility: Facility, enrolment: Enrolment) -> AsyncIterator[JoinToken]:
    name = "beamwire.certificate.v1.CertificateService"
    service = Service(name, pb_grpc.add_CertificateServiceServicer_to_server, enrolment)
    server = Server(facility.member("service/certificate"), services=[service], anonymous=True)
    port = await server.start()
    yield JoinToken(facility.trust_domain, f"127.0.0.1:{port}", "127.0.0.1:7400", facility.authority.root_der, SECRET)
    await server.stop(0)


async def refusal(token: JoinToken, directory: Path, **options: float) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        await asyncio.to_thread(enroll, token, directory, **options)
    assert not directory.exists(), "nothing is left of an enrolment that failed"
    assert SECRET not in str(caught.value)
    return caught.value


async def test_a_token_becomes_credentials(token: JoinToken, facility: Facility, tmp_path: Path) -> None:
    directory = tmp_path / "alice"
    credentials = await asyncio.to_thread(enroll, JoinToken.parse(token.encode()), directory)
    assert credentials.identity == facility.id("user/alice")
    assert Credentials.load(directory).identity == credentials.identity
    credentials.check()
    assert json.loads((directory / "member.json").read_text()) == {
        "trust_domain": "facility.test",
        "address": "127.0.0.1:7400",
        "enroll_address": token.enroll_address,
    }
    assert sorted(p.name for p in directory.iterdir()) == ["bundle.pem", "chain.pem", "key.pem", "member.json", "trust"]
    assert stat.S_IMODE((directory / "key.pem").stat().st_mode) == 0o600


async def test_the_key_stays_at_home(token: JoinToken, enrolment: Enrolment, tmp_path: Path) -> None:
    await asyncio.to_thread(enroll, token, tmp_path / "alice")
    (request,) = enrolment.requests
    assert "PRIVATE KEY" not in str(request)
    assert "BEGIN CERTIFICATE REQUEST" in request.csr_pem


async def test_a_member_learns_the_next_root_at_once(token: JoinToken, enrolment: Enrolment, tmp_path: Path) -> None:
    """Otherwise the authority that is announced would cut off who enrolled meanwhile."""
    enrolment.roots_pem += Authority.create("facility.test").roots_pem
    credentials = await asyncio.to_thread(enroll, token, tmp_path / "alice")
    assert credentials.trust.own.roots_pem == enrolment.roots_pem
    assert credentials.trust.own.sequence == 3
    assert (tmp_path / "alice" / "bundle.pem").read_bytes() == enrolment.roots_pem
    credentials.check()


@pytest.mark.parametrize(("bundle", "silent"), [("trustBundles/b.test", False), ("", True)], ids=["other", "silent"])
async def test_without_a_bundle_the_root_in_the_token_counts(
    token: JoinToken, enrolment: Enrolment, tmp_path: Path, bundle: str, silent: bool
) -> None:
    enrolment.bundle, enrolment.silent = bundle, silent
    credentials = await asyncio.to_thread(enroll, token, tmp_path / "alice")
    assert credentials.trust.own.roots_pem == token.roots_pem
    assert list(credentials.trust) == ["facility.test"]


async def test_a_token_is_spent_once(token: JoinToken, tmp_path: Path) -> None:
    await asyncio.to_thread(enroll, token, tmp_path / "alice")
    error = await refusal(token, tmp_path / "mallory")
    assert error.reason is Reason.INVALID_JOIN_TOKEN
    assert "ask for another" in error.message


async def test_services_that_are_away_are_asked_again_with_the_same_request(
    token: JoinToken, enrolment: Enrolment, tmp_path: Path
) -> None:
    enrolment.away = 2
    error = await refusal(token, tmp_path / "impatient")
    assert error.reason is Reason.SERVICE_UNAVAILABLE
    enrolment.requests.clear()
    credentials = await asyncio.to_thread(enroll, token, tmp_path / "alice", patience=10)
    assert str(credentials.identity).endswith("user/alice")
    first, *again = enrolment.requests
    assert again == [first, first]


async def test_a_listener_of_another_authority_gets_no_secret(
    token: JoinToken, enrolment: Enrolment, tmp_path: Path
) -> None:
    elsewhere = replace(token, root_der=Authority.create("facility.test").root_der)
    error = await refusal(elsewhere, tmp_path / "alice", timeout=5)
    assert error.reason is Reason.CERTIFICATE_INVALID
    assert enrolment.requests == []


async def test_a_certificate_of_another_authority_is_not_kept(
    token: JoinToken, enrolment: Enrolment, tmp_path: Path
) -> None:
    enrolment.authority = Authority.create("facility.test")
    error = await refusal(token, tmp_path / "alice")
    assert error.reason is Reason.INVALID_JOIN_TOKEN
    assert "another authority than when this join token was minted" in error.message


async def test_a_listener_that_is_not_there_is_named(token: JoinToken, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        error = await refusal(replace(token, enroll_address=address), tmp_path / "alice", timeout=5)
    assert error.reason is Reason.SERVICE_UNAVAILABLE
    assert error.message.startswith(f"{address} cannot be reached")


async def test_a_listener_that_says_nothing_is_not_waited_for_ever(token: JoinToken, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        error = await refusal(replace(token, enroll_address=address), tmp_path / "alice", timeout=0.5)
    assert error.reason is Reason.TIMED_OUT


def test_a_token_survives_being_one_word(facility: Facility) -> None:
    token = JoinToken("facility.test", "[::1]:7401", "beam.facility.test:7400", facility.authority.root_der, SECRET)
    word = token.encode()
    assert word.startswith("bwj1.")
    assert not set(word) & set(" \n\t/+=\"'$")
    assert JoinToken.parse(f"  {word}\n") == token
    assert SECRET not in repr(token)


@pytest.mark.parametrize("damage", ["", "bwj1", "x", "bwj2.a.b.c.d.e", "bwj1.a.b.c.d.e", "bwj1.!.b.c.d.e", "bwj1....."])
def test_a_damaged_token_is_refused(damage: str) -> None:
    with pytest.raises(BeamwireError, match="join token") as caught:
        JoinToken.parse(damage)
    assert caught.value.reason is Reason.INVALID_JOIN_TOKEN


def test_a_token_that_was_cut_is_refused(facility: Facility) -> None:
    word = JoinToken("facility.test", "a:1", "b:2", facility.authority.root_der, SECRET).encode()
    for length in range(0, len(word) - 1, 7):
        with pytest.raises(BeamwireError):
            JoinToken.parse(word[:length])
