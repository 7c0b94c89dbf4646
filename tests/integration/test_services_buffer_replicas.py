"""Two replicas of the Buffer service over PostgreSQL: one dies, the other drives on; each heeds all words."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.common.v1 import account_pb2
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.processes import Process
from beamwire.mesh.rpc.channel import connect
from beamwire.testing.ports import free_port
from beamwire.testing.postgres import Postgres
from tests.conftest import LiveFacility, make_live_facility, wait_until
from tests.integration.test_services_buffer import Member, Stub, ready, rings_of, seen, until

DATABASE = "buffers"


@dataclass
class Replicated:
    """A facility with one process for each replica of the Buffer service, and one for the others."""

    facility: LiveFacility
    postgres: Postgres
    addresses: list[str]

    def driver(self, buffer: str) -> subprocess.Popen[bytes]:
        """The replica that drives a buffer."""

        def look() -> subprocess.Popen[bytes] | None:
            query = f"SELECT holder FROM buffer.resources WHERE name = '{buffer}'"
            pids = self.postgres.sql(query, DATABASE).split(":")
            return next((each for each in self.facility.processes if str(each.pid) in pids), None)

        return wait_until(look, what=f"a replica that drives {buffer}")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.facility.processes.remove(process)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def replicated(postgres: Postgres, tmp_path: Path) -> Iterator[Replicated]:
    url = postgres.create_database(DATABASE)
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    file = live.directory / "facility.toml"
    file.write_text(f'{file.read_text()}\n[services]\nbuffer = "{",".join(addresses)}"\n[database]\nurl = "{url}"\n')
    try:
        live.start("certificate", "job", "request")
        for address in addresses:
            live.services["buffer"] = address
            live.start("buffer", "--listen", address)
        live.enroll("user/alice", live.config_dir)
        yield Replicated(live, postgres, addresses)
    finally:
        live.stop()
        postgres.drop_database(DATABASE)


@pytest.fixture
def alice(replicated: Replicated) -> Member:
    directory = replicated.facility.config_dir / "facilities" / "facility.test"
    return Member(",".join(replicated.addresses), Credentials.load(directory))


@pytest.fixture
async def stubs(replicated: Replicated, alice: Member) -> AsyncIterator[list[Stub]]:
    """A stub for each replica alone, and one for both."""
    async with AsyncExitStack() as stack:
        found: list[Any] = []
        for address in (*replicated.addresses, alice.address):
            channel = await stack.enter_async_context(connect(address, alice.credentials))
            found.append(pb_grpc.BufferServiceStub(channel))
        yield found


def pid_of(replicated: Replicated, buffer: str) -> int:
    process = Process.attach(replicated.facility.directory / "state" / buffer / "shard-0")
    assert process is not None
    return process.pid


async def test_a_replica_that_is_killed_costs_no_frame_and_no_cache(replicated: Replicated, stubs, alice: Member):
    *_, both = stubs
    buffer = await ready(both)
    cache, half = pid_of(replicated, buffer.name), threading.Event()
    sending = asyncio.to_thread(alice.send, buffer, 60, 0, half)
    receiving = asyncio.to_thread(alice.receive, buffer)
    streaming = asyncio.gather(sending, receiving)
    await seen(both, buffer.name, lambda b: b.counters.received_event_count >= 90)
    await asyncio.to_thread(replicated.kill, await asyncio.to_thread(replicated.driver, buffer.name))
    half.set()
    _, ids = await streaming
    assert sorted(ids) == list(range(180))
    ended = await until(both, buffer.name, pb.Buffer.STATE_ENDED)
    assert (ended.end_cause, ended.counters.delivered_event_count) == (account_pb2.END_CAUSE_DONE, 180)
    assert (ended.restart_count, len(ended.counters.losses)) == (0, 0)
    assert pid_of_or_none(replicated, buffer.name) in (cache, None)
    await asyncio.to_thread(wait_until, lambda: not rings_of(replicated.facility, buffer.name), what="no ring")


def pid_of_or_none(replicated: Replicated, buffer: str) -> int | None:
    process = Process.attach(replicated.facility.directory / "state" / buffer / "shard-0")
    return None if process is None else process.pid


async def test_a_word_is_acted_upon_whichever_replica_it_reaches(replicated: Replicated, stubs):
    *each, both = stubs
    for stub in each:
        buffer = await ready(both)
        seal = pb.SealBufferRequest(name=buffer.name, cause=account_pb2.END_CAUSE_CANCELLED, detail="enough")
        await stub.SealBuffer(seal)
        for other in each:
            async with asyncio.timeout(20):
                ended = await until(other, buffer.name, pb.Buffer.STATE_ENDED)
            assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED


async def test_a_buffer_is_deleted_by_whoever_drives_it(replicated: Replicated, stubs):
    *each, both = stubs
    for stub in each:
        buffer = await ready(both)
        async with asyncio.timeout(15):
            await stub.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))
        assert not rings_of(replicated.facility, buffer.name)
        assert pid_of_or_none(replicated, buffer.name) is None
        assert not (await both.ListBuffers(pb.ListBuffersRequest())).buffers


async def test_a_cache_that_dies_is_started_once(replicated: Replicated, stubs, alice: Member):
    *_, both = stubs
    buffer = await ready(both)
    await asyncio.to_thread(alice.send, buffer, 20)
    replicated.kill(await asyncio.to_thread(replicated.driver, buffer.name))
    os.kill(pid_of(replicated, buffer.name), signal.SIGKILL)
    assert sorted(await asyncio.to_thread(alice.receive, buffer)) == list(range(60))
    ended = await until(both, buffer.name, pb.Buffer.STATE_ENDED)
    assert (ended.restart_count, ended.counters.delivered_event_count) == (1, 60)
