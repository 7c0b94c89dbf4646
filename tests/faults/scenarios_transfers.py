"""What users do with transfers."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration

from beamwire.common.v1 import account_pb2
from beamwire.mesh.processes import Process
from beamwire.request.v1 import request_service_pb2 as pb
from tests.faults.control import EVENTS
from tests.faults.scenario import Get, Scenarios
from tests.faults.served import Holds
from tests.faults.user import User

TRANSFERS = Scenarios("Transfer")
# Long enough to get to a state on a busy machine, and one that ends while a move is held up.
LEASE, SHORT_LEASE = Duration(seconds=12), Duration(seconds=6)
HOUR = Duration(seconds=3600)


@TRANSFERS.add("PENDING PROVISIONING STREAMING DRAINING SUCCEEDED")
async def transfer_succeeds(user: User, name: str) -> None:
    get = await user.transfer(name, events_per_second=40)
    await _taken(user, name, get)


@TRANSFERS.add("PENDING PROVISIONING STREAMING CANCELLING CANCELLED")
async def transfer_is_cancelled(user: User, name: str) -> None:
    get = await user.transfer(name, events_per_second=1)
    streaming = await user.until(get, "STREAMING")
    await _streamer(user, streaming)
    await _cancel(user, name)
    cancelled = await user.until(get, "CANCELLED")
    assert cancelled.receipt.end_cause == account_pb2.END_CAUSE_CANCELLED


@TRANSFERS.add("PENDING PROVISIONING STREAMING DRAINING CANCELLING CANCELLED")
async def transfer_without_readers_is_cancelled(user: User, name: str) -> None:
    get = await user.transfer(name)
    await user.until(get, "DRAINING")
    await _cancel(user, name)
    await user.until(get, "CANCELLED")


@TRANSFERS.add("PENDING PROVISIONING STREAMING FAILED")
async def transfer_loses_its_streamer(user: User, name: str) -> None:
    get = await user.transfer(name, events_per_second=1)
    streaming = await user.until(get, "STREAMING")
    os.kill((await _streamer(user, streaming)).pid, signal.SIGKILL)
    failed = await user.until(get, "FAILED")
    assert failed.error.message


@TRANSFERS.add("PENDING PROVISIONING STREAMING EXPIRED")
async def transfer_outlives_its_lease(user: User, name: str) -> None:
    get = await user.transfer(name, events_per_second=1, lease=LEASE)
    expired = await user.until(get, "EXPIRED")
    assert expired.receipt.end_cause == account_pb2.END_CAUSE_EXPIRED


@TRANSFERS.add("PENDING PROVISIONING STREAMING DRAINING EXPIRED")
async def transfer_without_readers_outlives_its_lease(user: User, name: str) -> None:
    get = await user.transfer(name, lease=LEASE)
    expired = await user.until(get, "EXPIRED")
    assert expired.receipt.end_cause == account_pb2.END_CAUSE_EXPIRED


@TRANSFERS.add("PENDING PROVISIONING STREAMING DRAINING FAILED")
async def transfer_loses_its_cache_again_and_again(user: User, name: str) -> None:
    get = await user.transfer(name)
    draining = await user.until(get, "DRAINING")
    buffer = draining.buffer.removeprefix("buffers/")
    await user.kill_cache_for_good(buffer, user.buffer_of(draining))
    failed = await user.until(get, "FAILED")
    assert failed.error.message


@TRANSFERS.add(
    "PENDING PROVISIONING STREAMING DRAINING SUCCEEDED",
    also=[("PROVISIONING", "STREAMING"), ("STREAMING", "DRAINING"), ("DRAINING", "SUCCEEDED")],
    scripted=True,
)
async def transfer_is_served_from_what_was_kept(user: User, name: str) -> None:
    # The services are to die in the middle of the second.
    with user.survivor.unarmed():
        get = await user.transfer(f"{name}-kept", keep=HOUR)
        kept = await _taken(user, f"{name}-kept", get)
    get = await user.transfer(name, reuse=True)
    served = await _taken(user, name, get)
    assert (served.served_from, served.buffer) == (kept.name, kept.buffer)
    await user.seal(kept.buffer.removeprefix("buffers/"), account_pb2.END_CAUSE_CANCELLED)


@TRANSFERS.add("PENDING CANCELLING CANCELLED", scripted=True)
async def transfer_is_cancelled_as_soon_as_it_is_there(user: User, name: str) -> None:
    await _cancelled_before(user, name, "TransferRecord PENDING PROVISIONING")


@TRANSFERS.add("PENDING PROVISIONING CANCELLING CANCELLED", scripted=True)
async def transfer_is_cancelled_before_it_streams(user: User, name: str) -> None:
    await _cancelled_before(user, name, "TransferRecord PROVISIONING STREAMING")


@TRANSFERS.add("PENDING EXPIRED", scripted=True)
async def transfer_outlives_its_lease_before_it_is_taken_up(user: User, name: str) -> None:
    move = "TransferRecord PENDING PROVISIONING"
    async with user.stalling(move, f"transfers/{name}") as stalled:
        get = await user.transfer(name, events_per_second=1, lease=SHORT_LEASE)
        await stalled()
        await user.until(get, "EXPIRED")


@TRANSFERS.add("PENDING PROVISIONING EXPIRED", scripted=True)
async def transfer_outlives_its_lease_before_it_streams(user: User, name: str) -> None:
    async with user.stalling("BufferRecord STARTING READY", f"buffers/of-{name}"):
        get = await user.transfer(name, events_per_second=1, lease=SHORT_LEASE)
        left = (await get()).expire_time.ToDatetime(UTC) - datetime.now(UTC)
        await asyncio.sleep(max(0.0, left.total_seconds()) + 0.5)
    await user.until(get, "EXPIRED")


@TRANSFERS.add("PENDING PROVISIONING FAILED", scripted=True)
async def transfer_loses_its_cache_before_it_streams(user: User, name: str) -> None:
    async with user.stalling("BufferRecord STARTING READY", f"buffers/of-{name}") as stalled:
        get = await user.transfer(name)
        await stalled()
        await user.without_cache(f"of-{name}")
    failed = await user.until(get, "FAILED")
    assert failed.error.message


@TRANSFERS.add("PENDING FAILED", scripted=True)
async def transfer_meets_a_fault_of_ours(user: User, name: str) -> None:
    Holds(broken=("TransferRecord PENDING PROVISIONING",)).write(user.survivor.fault)
    failed = await user.until(await user.transfer(name), "FAILED")
    assert failed.error.message


async def _taken(user: User, name: str, get: Get) -> pb.Transfer:
    """All events of a transfer are taken, and it has succeeded."""
    await user.consume(name)
    done: pb.Transfer = await user.until(get, "SUCCEEDED")
    assert done.receipt.balanced
    assert done.receipt.delivered_event_count == EVENTS
    return done


async def _streamer(user: User, transfer: pb.Transfer) -> Process:
    """The streamer of a transfer, once it runs."""
    return await user.process(user.survivor.layout.jobs / transfer.job.partition("/")[2] / "steps" / "1")


async def _cancel(user: User, name: str) -> None:
    await user.call(user.transfers.CancelTransfer, pb.CancelTransferRequest(name=f"transfers/{name}"))


async def _cancelled_before(user: User, name: str, move: str) -> None:
    async with user.stalling(move, f"transfers/{name}") as stalled:
        get = await user.transfer(name, events_per_second=1)
        await stalled()
        await _cancel(user, name)
        # Whatever is held up.
        cancelled = await user.until(get, "CANCELLED")
    assert not cancelled.error.message
