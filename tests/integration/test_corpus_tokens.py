"""Hostile delegation tokens at the doors of gRPC, hostile tickets at that of a cache: all refused, each with why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import Reason
from beamwire.mesh.identity.delegation import METADATA_KEY
from beamwire.mesh.identity.ids import SpiffeId, utcnow
from beamwire.mesh.stream import ticket
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE, TicketClaims
from beamwire.testing.corpus import OWN
from beamwire.testing.hostile_tokens import TokenMint, hostile_tokens
from tests.integration.corpus_doors import (
    CORPUS,
    KEY,
    TIMEOUT,
    World,
    claims_of,
    client_context,
    consume,
    grpc_verdict,
    say_hello,
)

HOLDER = CORPUS.cases["good"]
# As long as the whole of a refused call may take on a busy machine; the check itself is measured elsewhere.
LONGEST = 10.0

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("tokens"))
    yield world
    for cache in (world.acked, world.pushed):
        cache.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(processes: World) -> AsyncIterator[World]:
    await processes.open()
    yield processes
    await processes.close()


async def unary(channel: grpc.aio.Channel, metadata: Any) -> None:
    await pb_grpc.CertificateServiceStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=TIMEOUT, metadata=metadata)


async def stream(channel: grpc.aio.Channel, metadata: Any) -> None:
    request = pb.WatchTrustBundlesRequest()
    call = pb_grpc.CertificateServiceStub(channel).WatchTrustBundles(request, timeout=TIMEOUT, metadata=metadata)
    await anext(aiter(call))
    call.cancel()


@pytest.mark.parametrize("door", [unary, stream, consume])
async def test_hostile_delegation_tokens(world: World, door: Callable[..., Any]) -> None:
    owner = SpiffeId(OWN, "user/olga")
    mint = TokenMint(world.token_key, owner, SpiffeId.parse(HOLDER.identity), utcnow().replace(microsecond=0))
    wrong = {}
    async with world.channel(HOLDER) as channel:
        for name, (text, check) in hostile_tokens(mint).items():
            # gRPC itself lets nothing into metadata that is not printable ASCII, and what is empty is no token.
            if not text.strip() or not text.isascii() or check == "resource":
                continue
            begin = time.monotonic()
            try:
                await door(channel, ((METADATA_KEY, text),))
                wrong[name] = "accepted"
            except grpc.aio.AioRpcError as error:
                if grpc_verdict(error) != (Reason.TOKEN_REFUSED, check):
                    wrong[name] = str(grpc_verdict(error))
            if time.monotonic() - begin > LONGEST:
                wrong[name] = "took long"
    assert not wrong


async def test_a_good_delegation_token_is_read(world: World) -> None:
    """Without this the refusals above would prove nothing."""
    mint = TokenMint(world.token_key, SpiffeId(OWN, "user/olga"), SpiffeId.parse(HOLDER.identity), utcnow())
    async with world.channel(HOLDER) as channel:
        await unary(channel, ((METADATA_KEY, mint.good()),))


def mutated(**changes: Any) -> TicketClaims:
    claims = claims_of(HOLDER)
    for name, value in changes.items():
        if name == "expire_time":
            claims.expire_time.FromDatetime(value)
        else:
            setattr(claims, name, value)
    return claims


def tickets() -> dict[str, tuple[str, Reason]]:
    key, invalid = bytes.fromhex(KEY), Reason.TICKET_INVALID
    good = ticket.mint(key, claims_of(HOLDER))
    past = datetime.now(UTC) - timedelta(seconds=1)
    head, _, mac = good.rpartition(".")
    return {
        "none": ("", invalid),
        "of another key": (ticket.mint(bytes(32), claims_of(HOLDER)), invalid),
        "for another buffer": (ticket.mint(key, mutated(buffer="buffers/other")), invalid),
        "for the other role": (ticket.mint(key, mutated(role=LINK_ROLE_PRODUCE)), invalid),
        "for somebody else": (ticket.mint(key, mutated(identity=f"spiffe://{OWN}/operator/olivia")), invalid),
        "for another certificate": (ticket.mint(key, claims_of(CORPUS.cases["renewed"])), invalid),
        "bound to nothing": (ticket.mint(key, mutated(certificate_sha256=b"")), invalid),
        "that has ended": (ticket.mint(key, mutated(expire_time=past)), Reason.TICKET_EXPIRED),
        "by the right of one who may not": (
            ticket.mint(key, mutated(delegated_by=f"spiffe://{OWN}/user/nobody")),
            Reason.ROLE_NOT_ALLOWED,
        ),
        "that was changed": (f"{head[:-2]}AA.{mac}", invalid),
        "that was cut": (good[:-4], invalid),
        "without its mac": (f"{head}.", invalid),
        "that is too long": (good + "A" * 4096, invalid),
        "not ASCII": (good[:-1] + "ä", invalid),
    }


@pytest.mark.parametrize("name", tickets())
async def test_hostile_tickets(world: World, name: str, tmp_path: Path) -> None:
    text, reason = tickets()[name]
    context = client_context(HOLDER, tmp_path)
    assert context is not None
    answer = await asyncio.to_thread(say_hello, world.acked.place, context, text)
    assert answer is not None
    assert answer.HasField("refusal")
    assert Reason(answer.refusal.reason) is reason
    assert text[-20:] not in answer.refusal.message or not text


async def test_a_good_ticket_is_taken(world: World, tmp_path: Path) -> None:
    context = client_context(HOLDER, tmp_path)
    assert context is not None
    text = ticket.mint(bytes.fromhex(KEY), claims_of(HOLDER))
    answer = await asyncio.to_thread(say_hello, world.acked.place, context, text)
    assert answer is not None
    assert answer.HasField("welcome")
