"""The doors that the corpora are shown to: a gRPC server and two caches of one facility, and who knocks at them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.database import Database
from beamwire.mesh.identity.biscuits import TokenChecker, TokenKey
from beamwire.mesh.identity.ids import services_name
from beamwire.mesh.rpc.access import Gate, certificate_end, current_caller
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.rpc.status import error_from_rpc
from beamwire.mesh.store import Store
from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.sockets import PAIR
from beamwire.mesh.stream.tls import TlsConnection
from beamwire.services.buffer.consume import Consumptions
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.services.buffer.model import BufferRecord, BufferSpec
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Hello, Signal, TicketClaims
from beamwire.testing.corpus import OWN, POLICY, POSSESSION, Case, Corpus

CORPUS = Corpus()
KEY = "5a" * 32
TIMEOUT = 20.0
ACCEPTED = "accepted"
IN_HANDSHAKE = "refused in the handshake"
# What a cache notes of a peer that it turned away, by the check that failed.
WORDS = {
    "name": "SPIFFE id|URI|role",
    "domain": "not believed",
    "chain": "does not lead to a root|not valid|handshake failed",
    "time": "ended|begins|expired|not yet valid",
    "usage": "neither P-256 nor P-384|does not lead to a root|not valid|handshake failed",
    "revocation": "was revoked",
    POSSESSION: "handshake failed",
    POLICY: "may not consume here|is for .*, not for",
}


class Servicer(pb_grpc.CertificateServiceServicer):
    """Who calls, told once and again and again."""

    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:  # noqa: N802
        return pb.WhoAmIResponse(identity=str(current_caller()))

    async def WatchTrustBundles(self, request: object, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield pb.WatchTrustBundlesResponse(trust_bundle=pb.TrustBundle(name=str(current_caller())))
        await asyncio.Event().wait()


class BufferServicer(buffer_service_pb2_grpc.BufferServiceServicer):
    def __init__(self, consumptions: Consumptions) -> None:
        self.consumptions = consumptions

    def Consume(self, requests, context):  # noqa: N802
        return self.consumptions.consume(requests, current_caller(), certificate_end(context.auth_context()))


class Cache:
    """A cache process that lets in everybody whom the corpus speaks of."""

    def __init__(self, directory: Path, buffer: str, delivery: str) -> None:
        credentials = CORPUS.member(directory.parent / f"members-{buffer}", f"cache/{buffer}")
        directory.mkdir()
        config = {
            "buffer": buffer,
            "consumers": sorted(CORPUS.identities),
            "credentials": str(credentials.directory),
            "delivery": delivery,
            "ticket_key": KEY,
        }
        (directory / "cache.json").write_text(json.dumps(config))
        self.buffer, self.directory = buffer, directory
        command = [sys.executable, "-m", "beamwire.services.buffer.cache", str(directory)]
        with (directory / "stderr").open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log)

    async def ready(self) -> None:
        self.control = await CacheControl.connect(self.directory, TIMEOUT)
        self.address = (await self.control.status()).address

    @property
    def place(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host, int(port)

    async def wait(self, condition) -> CacheStatus:
        async with asyncio.timeout(TIMEOUT):
            async for status in self.control.watch():
                if condition(status):
                    return status
        pytest.fail("the cache has ended")

    async def verdict(self, case: Case, before: CacheStatus) -> object:
        """What the cache made of the one peer that has come since."""
        count = before.counters.refused_peer_count
        known = {c.consumer for c in before.counters.consumers}

        def news(status: CacheStatus) -> bool:
            # One of before may leave meanwhile.
            come = {c.consumer for c in status.counters.consumers} - known
            return status.counters.refused_peer_count > count or bool(come)

        counters = (await self.wait(news)).counters
        came = [c.identity for c in counters.consumers if c.consumer not in known]
        if came:
            assert came == [case.identity]
            return ACCEPTED
        if case.in_handshake and re.search("not valid|handshake failed", counters.last_refusal):
            return IN_HANDSHAKE
        assert re.search(WORDS[case.check], counters.last_refusal), counters.last_refusal
        return case.reason, case.check

    def close(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)


class World:
    """One facility, served: a gRPC server and two caches."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.service = CORPUS.member(directory / "service", "service/all")
        self.acked = Cache(directory / "acked", "acked", "ACKED")
        self.pushed = Cache(directory / "pushed", "pushed", "PUSH")

    async def open(self) -> None:
        self.database = await Database.open(self.directory / "db")
        store = Store(self.database, BufferRecord)
        for cache in (self.acked, self.pushed):
            await cache.ready()
        now = datetime.now(UTC)
        record = BufferRecord(
            name="buffers/acked", owner=f"spiffe://{OWN}/user/olga", create_time=now, update_time=now,
            expire_time=now + timedelta(hours=1), ticket_key=KEY, state="READY",
            spec=BufferSpec(consumers=tuple(sorted(CORPUS.identities))),
            connect_string=f"beamwire://{self.acked.address}/buffers/acked?epoch=1",
        )  # fmt: skip
        await store.insert(record)
        consumptions = Consumptions(store, self.service, timedelta(minutes=5))
        services = [
            Service(
                "beamwire.certificate.v1.CertificateService",
                pb_grpc.add_CertificateServiceServicer_to_server,
                Servicer(),  # type: ignore[abstract]
            ),
            Service(
                "beamwire.buffer.v1.BufferService",
                buffer_service_pb2_grpc.add_BufferServiceServicer_to_server,
                BufferServicer(consumptions),  # type: ignore[abstract]
            ),
        ]
        self.token_key = TokenKey.create()
        trust = self.service.trust
        self.service.save_trust(trust.believe(replace(trust.own, token_root=self.token_key.public)))
        gate = Gate(self.service, CORPUS.policy, TokenChecker(lambda: self.service.trust))
        self.server = Server(self.service, services=services, gate=gate)
        self.port = await self.server.start()

    async def close(self) -> None:
        await self.server.stop(0)
        await self.database.close()

    def channel(self, case: Case, *more: tuple[str, Any]) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(CORPUS.own.roots_pem, case.key_pem, case.chain_pem)
        options = [("grpc.ssl_target_name_override", services_name(OWN)), ("grpc.enable_retries", 0), *more]
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials, options)


def grpc_verdict(error: grpc.aio.AioRpcError) -> object:
    if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
        return IN_HANDSHAKE
    failure = error_from_rpc(error, address="the server")
    return failure.reason, failure.metadata.get("check", "")


async def consume(channel: grpc.aio.Channel, metadata: Any = None) -> Signal:
    """What the service answers first to one who would consume through it; AioRpcError if it refuses."""
    hello = Signal(hello=Hello(version=1, role=LINK_ROLE_CONSUME, instance=uuid.uuid4().hex))
    request = buffer_service_pb2.ConsumeRequest(name="buffers/acked", signal=hello)
    for last in (False, False, False, True):
        asked = asyncio.Event()

        async def requests(asked: asyncio.Event = asked) -> AsyncIterator[Any]:
            yield request
            await asked.wait()

        call = buffer_service_pb2_grpc.BufferServiceStub(channel).Consume(
            requests(), timeout=TIMEOUT, metadata=metadata
        )
        try:
            answer = await anext(aiter(call))
        except grpc.aio.AioRpcError as error:
            # grpcio says this in place of the refusal when that comes while the request is being sent.
            if last or error.details() != "Internal error from Core":
                raise
        else:
            return answer.signal
        finally:
            asked.set()
            call.cancel()
    raise AssertionError


def client_context(case: Case, directory: Path) -> ssl.SSLContext | None:
    """TLS as a hostile client would do it; None if even that client's library does not take the key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.load_verify_locations(cadata=CORPUS.own.roots_pem.decode())
    (directory / "key.pem").write_bytes(case.key_pem)
    (directory / "chain.pem").write_bytes(case.chain_pem)
    try:
        context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
    except ssl.SSLError:
        return None
    return context


def claims_of(case: Case) -> TicketClaims:
    """What a good ticket for somebody claims."""
    der = case.leaf.public_bytes(serialization.Encoding.DER)
    claims = TicketClaims(
        buffer="buffers/acked",
        identity=case.identity,
        role=LINK_ROLE_CONSUME,
        certificate_sha256=hashlib.sha256(der).digest(),
    )
    claims.expire_time.FromDatetime(datetime.now(UTC) + timedelta(minutes=5))
    return claims


def say_hello(place: tuple[str, int], context: ssl.SSLContext, text: str) -> Signal | None:
    """What a cache answers to Hello; None if it hangs up."""
    with socket.create_connection(place, TIMEOUT) as plain, suppress(OSError):
        with context.wrap_socket(plain, server_hostname="localhost") as secured:
            connection = TlsConnection(secured)
            connection.send_greeting(PAIR)
            connection.receive_greeting()
            link = Link(connection)
            try:
                hello = Hello(version=1, role=LINK_ROLE_CONSUME, instance=uuid.uuid4().hex, ticket=text)
                link.send_signal(Signal(hello=hello))
                answer = link.receive(lambda length: memoryview(bytearray(length)))
            finally:
                link.close()
        assert isinstance(answer, Signal)
        return answer
    return None
