"""What users do with buffers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from google.protobuf.duration_pb2 import Duration

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.buffer.control import CacheControl
from tests.faults.scenario import Get, Scenarios
from tests.faults.user import User

BUFFERS = Scenarios("Buffer")
FRAMES = 20
# Seconds.
PEER_PATIENCE = 30.0
HOUR = Duration(seconds=3600)
# Without certificates, which nobody could issue while nothing is served; and kept.
PLAIN: dict[str, Any] = {"transport": buffer_pb.TRANSPORT_TCP}
KEPT: dict[str, Any] = {"keep": HOUR, "capacity_bytes": 4 << 20, "capacity_frames": 256}


@BUFFERS.add("STARTING READY ENDED")
async def buffer_is_cancelled(user: User, name: str) -> None:
    get = await user.buffer(name)
    await user.until(get, "READY")
    await _cancel(user, name, get)


@BUFFERS.add("STARTING READY DRAINING ENDED")
async def buffer_waits_for_readers_and_is_cancelled(user: User, name: str) -> None:
    get = await user.buffer(name)
    await user.until(get, "READY")
    await user.seal(name, account_pb2.END_CAUSE_DONE)
    await user.until(get, "DRAINING")
    await _cancel(user, name, get)


@BUFFERS.add("STARTING READY FAILED")
async def buffer_loses_its_cache(user: User, name: str) -> None:
    get = await user.buffer(name, delivery=buffer_pb.DELIVERY_PUSH)
    await user.until(get, "READY")
    cache = await user.process(user.shard(name))
    os.kill(cache.pid, signal.SIGKILL)
    failed = await user.until(get, "FAILED")
    assert failed.end_cause == account_pb2.END_CAUSE_FAILED


@BUFFERS.add("STARTING READY DRAINING FAILED")
async def buffer_loses_its_cache_again_and_again(user: User, name: str) -> None:
    get = await user.buffer(name)
    await user.until(get, "READY")
    await user.seal(name, account_pb2.END_CAUSE_DONE)
    await user.until(get, "DRAINING")
    await user.kill_cache_for_good(name, get)
    failed = await user.until(get, "FAILED")
    assert failed.error.message


@BUFFERS.add("STARTING READY DRAINING KEPT ENDED")
async def buffer_is_kept(user: User, name: str) -> None:
    get = await user.buffer(name, **PLAIN, **KEPT)
    ready = await user.until(get, "READY")
    await _peer(user, "produce", ready.connect_string)
    await user.until(get, "DRAINING")
    await _peer(user, "consume", ready.connect_string)
    await user.until(get, "KEPT")
    await user.seal(name, account_pb2.END_CAUSE_CANCELLED)
    ended = await user.until(get, "ENDED")
    assert ended.end_cause == account_pb2.END_CAUSE_DONE
    assert ended.counters.delivered_event_count == FRAMES


@BUFFERS.add("STARTING READY KEPT ENDED", scripted=True)
async def buffer_is_filled_and_read_while_nobody_looks(user: User, name: str) -> None:
    get = await user.buffer(name, **PLAIN, **KEPT)
    ready = await user.until(get, "READY")
    async with user.away():
        await _stream(user, ready.connect_string)
    await _kept_and_ended(user, name, get)


@BUFFERS.add("STARTING KEPT ENDED", scripted=True)
async def buffer_is_over_before_it_was_seen(user: User, name: str) -> None:
    async with user.stalling("BufferRecord STARTING READY", f"buffers/{name}") as stalled:
        get = await user.buffer(name, **PLAIN, **KEPT)
        await stalled()
        async with user.away():
            address = (await CacheControl(user.shard(name)).status()).address
            host, _, port = address.rpartition(":")
            await _stream(user, str(ConnectString(((host, int(port)),), name, 1, "tcp")))
    await _kept_and_ended(user, name, get)


@BUFFERS.add("STARTING DRAINING ENDED", scripted=True)
async def buffer_is_sealed_before_it_was_seen(user: User, name: str) -> None:
    get = await _sealed_unseen(user, name, account_pb2.END_CAUSE_DONE)
    await user.until(get, "DRAINING")
    await _cancel(user, name, get)


@BUFFERS.add("STARTING ENDED", scripted=True)
async def buffer_is_cancelled_before_it_was_seen(user: User, name: str) -> None:
    get = await _sealed_unseen(user, name, account_pb2.END_CAUSE_CANCELLED)
    ended = await user.until(get, "ENDED")
    assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED


@BUFFERS.add("STARTING FAILED", scripted=True)
async def buffer_loses_its_cache_before_it_was_seen(user: User, name: str) -> None:
    async with user.stalling("BufferRecord STARTING READY", f"buffers/{name}") as stalled:
        get = await user.buffer(name)
        await stalled()
        await user.without_cache(name)
    failed = await user.until(get, "FAILED")
    assert "had not yet begun to listen" in failed.error.message


async def _cancel(user: User, name: str, get: Get) -> None:
    await user.seal(name, account_pb2.END_CAUSE_CANCELLED)
    ended = await user.until(get, "ENDED")
    assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED


async def _sealed_unseen(user: User, name: str, cause: account_pb2.EndCause.ValueType) -> Get:
    """Have a buffer sealed whose cache runs and was not seen to, by who dies before that."""
    async with user.stalling("BufferRecord STARTING READY", f"buffers/{name}") as stalled:
        get = await user.buffer(name)
        await stalled()
        await user.seal(name, cause)
        async with user.away():
            pass
    return get


async def _kept_and_ended(user: User, name: str, get: Get) -> None:
    kept = await user.until(get, "KEPT")
    assert kept.counters.delivered_event_count == FRAMES
    await user.seal(name, account_pb2.END_CAUSE_CANCELLED)
    await user.until(get, "ENDED")


async def _stream(user: User, connect_string: str) -> None:
    await asyncio.gather(*(_peer(user, module, connect_string) for module in ("produce", "consume")))


async def _peer(user: User, module: str, connect_string: str) -> None:
    """Have a program send or take the whole stream of a plain buffer."""
    log = user.survivor.facility.directory.parent / f"{module}.log"
    task = {"connect": connect_string, "credentials": "", "patience": PEER_PATIENCE, "size": 64, "log": str(log)}
    task |= {"producer": 0, "producer_count": 1, "frames": FRAMES, "group": ""}
    command = [sys.executable, "-m", f"tests.faults.{module}", json.dumps(task)]
    program = await asyncio.create_subprocess_exec(*command)
    try:
        async with asyncio.timeout(2 * PEER_PATIENCE):
            assert await program.wait() == 0, f"{module} failed"
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
