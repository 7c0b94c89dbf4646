"""The corpus of certificates at everything that lets peers in: one verdict, whichever door they come to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pynng
import pytest
import pytest_asyncio
from cryptography import x509

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.verifier import Verifier
from beamwire.mesh.stream import ticket
from beamwire.testing.corpus import POLICY, POSSESSION, Case
from tests.integration.corpus_doors import (
    ACCEPTED,
    CORPUS,
    IN_HANDSHAKE,
    KEY,
    TIMEOUT,
    World,
    claims_of,
    client_context,
    consume,
    grpc_verdict,
    say_hello,
)

CASES = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name.replace(" ", "-")) for case in CORPUS.cases.values()]
)
pytestmark = pytest.mark.asyncio(loop_scope="module")


def check(case: Case, verdict: object) -> None:
    """Hold a verdict against the expected one: ACCEPTED, IN_HANDSHAKE, or a reason and a check."""
    if case.accepted:
        assert verdict == ACCEPTED
    elif verdict == IN_HANDSHAKE:
        assert case.in_handshake, "nobody was told why"
    else:
        assert verdict == (case.reason, case.check)


@CASES
async def test_the_verifier(case: Case) -> None:
    chain = x509.load_pem_x509_certificates(case.chain_pem)
    verifier = Verifier(CORPUS.trust())
    if case.accepted or case.check in {POSSESSION, POLICY}:
        assert str(verifier.verify(chain[0], chain[1:])) == case.identity
        return
    with pytest.raises(BeamwireError) as caught:
        verifier.verify(chain[0], chain[1:])
    check(case, (caught.value.reason, caught.value.metadata["check"]))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("corpus"))
    yield world
    for cache in (world.acked, world.pushed):
        cache.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(processes: World) -> AsyncIterator[World]:
    await processes.open()
    yield processes
    await processes.close()


@CASES
async def test_a_unary_call(world: World, case: Case) -> None:
    async with world.channel(case) as channel:
        try:
            answer = await pb_grpc.CertificateServiceStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=TIMEOUT)
        except grpc.aio.AioRpcError as error:
            check(case, grpc_verdict(error))
        else:
            check(case, ACCEPTED)
            assert answer.identity == case.identity


@CASES
async def test_a_server_stream(world: World, case: Case) -> None:
    async with world.channel(case) as channel:
        call = pb_grpc.CertificateServiceStub(channel).WatchTrustBundles(pb.WatchTrustBundlesRequest(), timeout=TIMEOUT)
        try:
            answer = await anext(aiter(call))
        except grpc.aio.AioRpcError as error:
            check(case, grpc_verdict(error))
        else:
            check(case, ACCEPTED)
            assert answer.trust_bundle.name == case.identity
        finally:
            call.cancel()


@CASES
async def test_consuming_through_the_service(world: World, case: Case) -> None:
    async with world.channel(case) as channel:
        try:
            answer = await consume(channel)
        except grpc.aio.AioRpcError as error:
            check(case, grpc_verdict(error))
        else:
            check(case, ACCEPTED)
            assert answer.welcome.epoch == 1


@CASES
async def test_a_cache_with_acknowledgements(world: World, case: Case, tmp_path: Path) -> None:
    context = client_context(case, tmp_path)
    if context is None:
        check(case, IN_HANDSHAKE)
        return
    before = await world.acked.control.status()
    # The ticket is good whatever the certificate is.
    answer = await asyncio.to_thread(
        say_hello, world.acked.place, context, ticket.mint(bytes.fromhex(KEY), claims_of(case))
    )
    welcomed = answer is not None and answer.HasField("welcome")
    check(case, ACCEPTED if welcomed else await world.acked.verdict(case, before))


@CASES
async def test_nng_at_a_cache(world: World, case: Case) -> None:
    before = await world.pushed.control.status()
    try:
        tls = pynng.TLSConfig(
            pynng.TLSConfig.MODE_CLIENT, server_name="localhost", ca_string=CORPUS.own.roots_pem.decode(),
            own_key_string=case.key_pem.decode(), own_cert_string=case.chain_pem.decode(),
            auth_mode=pynng.TLSConfig.AUTH_MODE_REQUIRED,
        )  # fmt: skip
    except pynng.NNGException:
        check(case, IN_HANDSHAKE)
        return
    # It knocks once: a second time could be counted when the next case is looked at.
    with pynng.Pull0(tls_config=tls, reconnect_time_min=600_000, reconnect_time_max=600_000) as pull:
        pull.dial(f"tls+tcp://localhost:{world.pushed.place[1]}", block=False)
        check(case, await world.pushed.verdict(case, before))
