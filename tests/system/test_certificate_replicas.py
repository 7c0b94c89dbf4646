"""Two processes that serve the Certificate service of a facility: each goes by what the other does, and outlives it."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import signal
import statistics
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceStub
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.mesh.identity.generations import Generations, Phase
from beamwire.mesh.identity.ids import services_name
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.status import error_from_rpc
from beamwire.testing.ports import free_ports
from beamwire.testing.postgres import Postgres
from tests.conftest import BIN, STOP_TIMEOUT, run, wait_until

DOMAIN = "facility.test"
OWN = f"trustBundles/{DOMAIN}"
MOST_AT_ONCE = 128
SOON = 1.0
"""Seconds within which a replica tells what another has done."""
CUT = 5.0
"""Seconds after which a stream of who was revoked has ended, on a busy machine as in test_trust.py."""
RATE = 100
"""Calls a second while a replica is killed."""


class Replicas:
    """A facility of which two processes serve the Certificate service, and nobody the others."""

    def __init__(self, directory: Path, postgres: Postgres, database: str) -> None:
        self.directory = directory
        self._postgres = postgres
        self._database = database
        ports = [f"127.0.0.1:{port}" for port in free_ports(4)]
        self.addresses, self.enrolment = ports[:2], ports[2:]
        self._env = {**os.environ, "BEAMWIRE_DATABASE__URL": postgres.create_database(database)}
        both = ["--address", ",".join(self.addresses), "--enroll-address", ",".join(self.enrolment)]
        self.beamwired("facility", "init", str(directory), *both)
        self.operator = Credentials.load(next((directory / "members" / "operator").iterdir()))
        self.processes = [self._start(address) for address in self.addresses]
        for process, address in zip(self.processes, self.addresses, strict=True):
            self._wait(process, address)

    def beamwired(self, *arguments: str) -> str:
        return run([str(BIN / "beamwired"), *arguments], env=self._env).stdout

    def sql(self, query: str) -> str:
        return self._postgres.sql(query, self._database)

    def _start(self, address: str) -> subprocess.Popen[bytes]:
        command = [str(BIN / "beamwired"), "serve", "certificate", "--dir", str(self.directory), "--listen", address]
        with (self.directory / f"{address}.log").open("ab") as log:
            return subprocess.Popen(command, stderr=log, stdout=log, env=self._env)

    def _wait(self, process: subprocess.Popen[bytes], address: str) -> None:
        log, said = self.directory / f"{address}.log", log_length(self.directory / f"{address}.log.seen")

        def is_served() -> bool:
            assert process.poll() is None, log.read_text()
            return b"beamwired: certificate" in log.read_bytes()[said:]

        wait_until(is_served, 60, f"serving at {address}")
        (self.directory / f"{address}.log.seen").write_text(str(log.stat().st_size))

    def start(self, index: int) -> None:
        self.processes[index] = self._start(self.addresses[index])
        self._wait(self.processes[index], self.addresses[index])

    def kill(self, index: int) -> None:
        self.processes[index].send_signal(signal.SIGKILL)
        self.processes[index].wait()

    def enroll(self, name: str) -> Credentials:
        token = JoinToken.parse(self.beamwired("token", f"user/{name}", "--dir", str(self.directory)))
        return enroll(token, self.directory / "users" / name)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(STOP_TIMEOUT)
        self.beamwired("clean", "--dir", str(self.directory))

    @asynccontextmanager
    async def stubs(self, who: Credentials | None = None) -> AsyncIterator[list[pb_grpc.CertificateServiceAsyncStub]]:
        """Each replica, as a member (the operator if none is named) calls it."""
        member = who or self.operator
        async with connect(self.addresses[0], member) as first, connect(self.addresses[1], member) as second:
            yield [CertificateServiceStub(first), CertificateServiceStub(second)]


def log_length(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


@pytest.fixture
def replicas(tmp_path: Path, postgres: Postgres) -> Iterator[Replicas]:
    database = f"test_{secrets.token_hex(6)}"
    replicas = Replicas(tmp_path / "facility", postgres, database)
    try:
        yield replicas
    finally:
        replicas.close()
        postgres.drop_database(database)


async def enroll_at(address: str, token: JoinToken, csr_pem: bytes) -> pb.Certificate:
    roots = grpc.ssl_channel_credentials(root_certificates=token.roots_pem)
    options = [("grpc.ssl_target_name_override", services_name(DOMAIN))]
    async with grpc.aio.secure_channel(address, roots, options) as channel:
        request = pb.EnrollMemberRequest(secret=token.secret, csr_pem=csr_pem.decode(), request_id=str(uuid.uuid4()))
        try:
            return await CertificateServiceStub(channel).EnrollMember(request, timeout=20)
        except grpc.RpcError as error:
            raise error_from_rpc(error, address=address) from error


async def test_a_token_of_one_is_good_once_at_either(replicas: Replicas) -> None:
    async with replicas.stubs() as stubs:
        for number in range(8):
            identity = f"spiffe://{DOMAIN}/user/u{number}"
            made = await stubs[number % 2].CreateJoinToken(pb.CreateJoinTokenRequest(identity=identity))
            token = JoinToken.parse(made.token)
            csrs = [new_key_and_csr()[1] for _ in range(4)]
            tries = [enroll_at(replicas.enrolment[index % 2], token, csr) for index, csr in enumerate(csrs)]
            results = await asyncio.gather(*tries, return_exceptions=True)
            issued = [result for result in results if isinstance(result, pb.Certificate)]
            refused = [result for result in results if isinstance(result, BeamwireError)]
            assert (len(issued), len(refused)) == (1, 3), results
            assert {error.reason for error in refused} == {Reason.INVALID_JOIN_TOKEN}
            assert issued[0].identity == identity
    assert int(replicas.sql("SELECT count(*) FROM certificate.resources WHERE owner LIKE '%/user/u%' "
                            "AND kind = 'CertificateRecord'")) == 8  # fmt: skip


@pytest.mark.timeout(240)
async def test_a_revocation_at_one_is_told_by_the_other(replicas: Replicas, record_property: Any) -> None:
    """The operator's stream there tells it, the stream of who was revoked ends, and no call of it is answered."""
    names = [f"mallory{number}" for number in range(6)]
    mallories = [await asyncio.to_thread(replicas.enroll, name) for name in names]
    told: list[float] = []
    cut: list[float] = []
    async with replicas.stubs() as operator:
        for number, mallory in enumerate(mallories):
            here, there = number % 2, 1 - number % 2
            async with replicas.stubs(mallory) as stubs:
                watching = await begun(stubs[there].WatchTrustBundles(pb.WatchTrustBundlesRequest()))
                hearing = await begun(operator[there].WatchTrustBundles(pb.WatchTrustBundlesRequest()))
                ending = asyncio.create_task(moment_of_end(watching))
                news = asyncio.create_task(moment_of(hearing, mallory.trust.own.sequence))
                # The answer means that it is published.
                identity = f"spiffe://{DOMAIN}/user/{names[number]}"
                request = pb.RevokeMemberRequest(identity=identity, reason="a test", request_id=str(uuid.uuid4()))
                assert (await operator[here].RevokeMember(request, timeout=20)).certificates
                answered = time.monotonic()
                told.append(await asyncio.wait_for(news, 10) - answered)
                cut.append(await asyncio.wait_for(ending, 10) - answered)
                for stub in stubs:
                    while (refusal := await refusal_of(stub)) is None:
                        assert time.monotonic() <= answered + CUT
                        await asyncio.sleep(0.02)
                    assert refusal is Reason.CERTIFICATE_REVOKED
                hearing.cancel()
    for name, delays in (("told", told), ("cut", cut)):
        figures = f"p50 {1000 * statistics.median(delays):.0f} ms, max {1000 * max(delays):.0f} ms"
        record_property(name, figures)
        print(f"{name} by the other replica after the answer: {figures}")
    assert max(told) <= SOON
    assert max(cut) <= CUT


async def test_both_go_by_the_policy_as_it_is_now(replicas: Replicas) -> None:
    alice = await asyncio.to_thread(replicas.enroll, "alice")
    policy = replicas.directory / "policy.toml"
    async with replicas.stubs(alice) as stubs:
        for name in ("one", "another"):
            text = f'[[rule]]\nname = "{name}"\nidentities = ["user/alice"]\n'
            staging = policy.with_suffix(".new")
            staging.write_text(text)
            staging.replace(policy)
            changed = asked = time.monotonic()
            for stub in stubs:
                while (await stub.WhoAmI(pb.WhoAmIRequest(), timeout=20)).rule != name:
                    assert asked - changed <= SOON
                    await asyncio.sleep(0.02)
                    asked = time.monotonic()


async def refusal_of(stub: Any) -> Reason | None:
    """Why a replica answers a member no more; None while it does."""
    try:
        await stub.WhoAmI(pb.WhoAmIRequest(), timeout=20)
    except BeamwireError as error:
        return error.reason
    return None


async def begun(call: Any) -> Any:
    """A watch of trust that has said all there is."""
    while not (await call.read()).synchronized:
        pass
    return call


async def moment_of(call: Any, sequence: int) -> float:
    """When a watch tells of a newer state of the own domain than this one."""
    while (await call.read()).trust_bundle.sequence <= sequence:
        pass
    return time.monotonic()


async def moment_of_end(call: Any) -> float:
    with suppress(BeamwireError, grpc.RpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    return time.monotonic()


@pytest.mark.timeout(240)
async def test_a_rotation_goes_on_whichever_replica_is_killed_when(replicas: Replicas) -> None:
    """One takes a step and is killed in the middle; the other, asked the same again or not, brings it to its end."""
    delays = itertools.cycle([0.0, 0.01, 0.02, 0.04, 0.08])
    victim = 0
    for turn in range(2):
        for phase in (Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE):
            wanted = pb.AuthorityStatus.Phase.Value(f"PHASE_{phase.value}")
            request = pb.RotateAuthorityRequest(phase=wanted, force=True, request_id=str(uuid.uuid4()))
            async with replicas.stubs() as stubs:
                dying = asyncio.ensure_future(stubs[victim].RotateAuthority(request, timeout=20))
                await asyncio.sleep(next(delays))
                await asyncio.to_thread(replicas.kill, victim)
                await asyncio.gather(dying, return_exceptions=True)
                other = stubs[1 - victim]
                if turn:
                    await asyncio.to_thread(wait_until, lambda: not unfinished(replicas), 30, "the end of the step")
                after = (await other.RotateAuthority(request, timeout=20)).authority
                assert after.phase == wanted
                bundle = await other.GetTrustBundle(pb.GetTrustBundleRequest(name=OWN), timeout=20)
            on_disk = Generations.load(replicas.directory / "authority")
            assert on_disk.state.phase is phase
            assert bundle.roots_pem.encode() == on_disk.roots_pem
            assert not unfinished(replicas)
            # The services have credentials of the authority that signs.
            issuing = on_disk.authority.chain_pem.splitlines()[1]
            for member in (replicas.directory / "members" / "service").iterdir():
                assert issuing in (member / "chain.pem").read_bytes(), member
            await asyncio.to_thread(replicas.start, victim)
            victim = 1 - victim
    noted = replicas.sql("SELECT state FROM certificate.resources WHERE kind = 'AuditRecord' "
                         "AND state LIKE 'AUTHORITY%' ORDER BY create_time").split()  # fmt: skip
    assert noted == ["AUTHORITY_ANNOUNCED", "AUTHORITY_ACTIVATED", "AUTHORITY_FINISHED"] * 2


def unfinished(replicas: Replicas) -> bool:
    return "BEGUN" in replicas.sql("SELECT state FROM certificate.resources WHERE kind = 'StepRecord'")


@pytest.mark.timeout(240)
async def test_a_replica_that_is_killed_under_load_fails_no_idempotent_call(replicas: Replicas) -> None:
    members = [await asyncio.to_thread(replicas.enroll, f"user{number}") for number in range(4)]
    taken: list[float] = []
    async with connect(",".join(replicas.addresses), replicas.operator) as channel:
        stub = CertificateServiceStub(channel)
        doing: asyncio.Task[None]

        # A machine that cannot keep up is not to be overloaded, which would be refused, rightly.
        room = asyncio.Semaphore(MOST_AT_ONCE)

        async def call(number: int) -> None:
            began = time.monotonic()
            async with room:
                match number % 4:
                    case 0:
                        await stub.WhoAmI(pb.WhoAmIRequest(), timeout=30)
                    case 1:
                        await stub.ListCertificates(pb.ListCertificatesRequest(page_size=5), timeout=30)
                    case 2:
                        await stub.GetTrustBundle(pb.GetTrustBundleRequest(name=OWN), timeout=30)
                    case _:
                        await stub.DescribeAuthority(pb.DescribeAuthorityRequest(), timeout=30)
            taken.append(time.monotonic() - began)

        async def renew(member: Credentials) -> None:
            async with connect(",".join(replicas.addresses), member) as own:
                while not doing.done():
                    csr = new_key_and_csr(str(member.identity))[1].decode()
                    request = pb.RenewCertificateRequest(csr_pem=csr, request_id=str(uuid.uuid4()))
                    assert (await CertificateServiceStub(own).RenewCertificate(request, timeout=30)).chain_pem
                    await asyncio.sleep(1)

        async def revoke() -> None:
            for number in itertools.count():
                if doing.done():
                    return
                identity = f"spiffe://{DOMAIN}/user/nobody{number}"
                request = pb.RevokeMemberRequest(identity=identity, request_id=str(uuid.uuid4()))
                await stub.RevokeMember(request, timeout=30)
                await asyncio.sleep(0.2)

        async def kill() -> None:
            for index in (0, 1):
                await asyncio.sleep(2)
                await asyncio.to_thread(replicas.kill, index)
                await asyncio.sleep(2)
                await asyncio.to_thread(replicas.start, index)
            await asyncio.sleep(1)

        async with asyncio.TaskGroup() as group:
            doing = group.create_task(kill())
            group.create_task(revoke())
            for member in members:
                group.create_task(renew(member))
            begin, number = time.monotonic(), 0
            while not doing.done():
                await asyncio.sleep(max(0.0, begin + number / RATE - time.monotonic()))
                group.create_task(call(number))
                number += 1
    print(f"{len(taken)} calls, the longest {max(taken):.2f} s")
    assert len(taken) == number > RATE * 5
