"""A facility that is served: who is revoked is cut everywhere, and the services renew themselves."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.buffer.v1.buffer_service_pb2_grpc import BufferServiceStub
from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.client.aio import AsyncClient
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.renewal import renew
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE

STREAMS = 50
# Seconds that a cut may take on a busy machine. How long it takes on a quiet one is printed, and in the bench report.
CUT = 5.0


def operator(live_facility) -> Credentials:
    return Credentials.load(next((live_facility.directory / "members" / "operator").iterdir()))


@pytest.fixture
async def mallory(live_facility, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    config = await asyncio.to_thread(live_facility.enroll, "user/mallory", tmp_path / "mallory")
    async with AsyncClient(config_dir=config) as client:
        yield client


async def ready_buffer(client: AsyncClient) -> buffer_pb.Buffer:
    spec = buffer_pb.BufferSpec(producer_count=1, transport=buffer_pb.TRANSPORT_TLS_TCP)
    created = await client.create_buffer(spec)
    async for buffer in client.watch_buffer(created.name):
        if buffer.state == buffer_pb.Buffer.STATE_READY:
            return buffer
    raise AssertionError("it ended before it was ready")


async def test_a_member_that_is_revoked_is_cut_everywhere(live_facility, mallory: AsyncClient) -> None:
    """Fifty live streams, a producer and a consumer that are connected, and the next call."""
    buffer = await ready_buffer(mallory)
    to = ConnectString.parse(buffer.connect_string)
    cut: list[tuple[float, BeamwireError]] = []
    ended: dict[str, tuple[float, BeamwireError]] = {}

    async def watch() -> None:
        try:
            async for _ in mallory._certificates.WatchTrustBundles(pb.WatchTrustBundlesRequest()):
                pass
        except BeamwireError as error:
            cut.append((time.monotonic(), error))

    produce_ticket = mallory.tickets(to, LINK_ROLE_PRODUCE)
    consume_ticket = mallory.tickets(to, LINK_ROLE_CONSUME)

    def produce() -> None:
        try:
            with Producer(to, mallory.credentials, StreamHeader(), tickets=produce_ticket) as producer:
                for number in range(100_000):
                    producer.send({"x": np.zeros((1, 100), np.uint8)}, np.array([number], np.uint64))
                    time.sleep(0.005)
        except BeamwireError as error:
            ended["producer"] = time.monotonic(), error

    def consume() -> None:
        try:
            with Consumer(to, mallory.credentials, tickets=consume_ticket) as consumer:
                list(consumer)
        except BeamwireError as error:
            ended["consumer"] = time.monotonic(), error

    threads = [threading.Thread(target=produce), threading.Thread(target=consume)]
    for thread in threads:
        thread.start()
    watches = [asyncio.create_task(watch()) for _ in range(STREAMS)]
    async for seen in mallory.watch_buffer(buffer.name):
        if seen.counters.sent_frame_count > 10:
            break
    identity = str(mallory.credentials.identity)
    async with connect(live_facility.address, operator(live_facility)) as channel:
        stub = pb_grpc.CertificateServiceStub(channel)
        began = time.monotonic()
        revoked = await stub.RevokeMember(pb.RevokeMemberRequest(identity=identity, reason="a test"))
        answered = time.monotonic()
        assert revoked.certificates
        await asyncio.wait(watches, timeout=10)
        with pytest.raises(BeamwireError) as caught:
            await mallory.get_buffer(buffer.name)
        assert caught.value.reason is Reason.CERTIFICATE_REVOKED
        for thread in threads:
            await asyncio.to_thread(thread.join, 10)
        assert len(cut) == STREAMS
        assert {error.reason for _, error in cut} == {Reason.CERTIFICATE_REVOKED}
        delays = sorted(moment - began for moment, _ in cut)
        print(f"RevokeMember answered after {1000 * (answered - began):.0f} ms")
        print(f"live streams cut: p50 {1000 * statistics.median(delays):.0f} ms, p99 {1000 * delays[-1]:.0f} ms")
        assert delays[-1] - (answered - began) < CUT
        for name, (moment, error) in sorted(ended.items()):
            print(f"{name} cut: {1000 * (moment - began):.0f} ms")
            assert error.reason is Reason.CERTIFICATE_REVOKED, error
            assert moment - began < CUT
        assert set(ended) == {"producer", "consumer"}
        buffers = BufferServiceStub(channel)
        await buffers.DeleteBuffer(buffer_pb.DeleteBufferRequest(name=buffer.name))


def serials(live_facility) -> set[int]:
    members = live_facility.directory / "members" / "service"
    return {
        x509.load_pem_x509_certificates((members / name / "chain.pem").read_bytes())[0].serial_number
        for name in ("facility", "buffer", "job", "request", "certificate")
    }


async def test_the_services_renew_themselves(own_facility) -> None:
    """All five members that one process has, with lives of some seconds; calls go on."""
    own_facility.stop()
    path = own_facility.directory / "facility.toml"
    path.write_text(path.read_text() + '\n[certificates]\nservice = "PT16S"\n')
    own_facility.start()
    for member in (own_facility.directory / "members" / "service").iterdir():
        credentials = Credentials.load(member)
        async with connect(own_facility.address, credentials) as channel:
            assert await renew(credentials, channel)
    before = serials(own_facility)
    end, calls = time.monotonic() + 20, 0
    async with AsyncClient(config_dir=own_facility.config_dir) as client:
        while time.monotonic() < end:
            async for _ in client.list_transfers():
                pass
            calls += 1
            await asyncio.sleep(0.05)
    assert calls > 100
    after = serials(own_facility)
    assert not before & after
    shown = json.loads(own_facility.beamwire("cert", "explain", "--json").stdout)
    assert shown["accepted"] is True
