"""How much one owner may have at a time, and what a request may ask for at most."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.request.model import TransferRecord

# What a buffer can hold if the request does not say.
DEFAULT_CAPACITY_BYTES = 256 * 1024**2
# Seconds until it is worth asking again.
RETRY_AFTER = 10.0
MOST_LABELS = 32
MOST_VALUE_BYTES = 256
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Limits:
    """What one owner may have, and what one transfer may.

    Args:
        active_transfers: transfers of one owner that have not ended.
        processes: MPI ranks of one streamer.
        lease: how long a transfer may take altogether.
        owner_processes: MPI ranks of all streamers of one owner.
        buffer_bytes: the rings of all transfers of one owner that have not ended.
    """

    active_transfers: int = 16
    processes: int = 64
    lease: timedelta = timedelta(days=7)
    owner_processes: int = 256
    buffer_bytes: int = 64 * 1024**3


def check_request(record: TransferRecord, limits: Limits) -> None:
    """Raise BeamwireError INVALID_FIELD if a request asks for more than any owner may have."""
    if not 1 <= record.process_count <= limits.processes:
        raise invalid_field("transfer.process_count", f"must be from 1 to {limits.processes}")
    if not 0 < record.lease <= limits.lease.total_seconds():
        raise invalid_field("transfer.lease", f"must be positive and at most {limits.lease}")
    if not 0 <= record.keep <= limits.lease.total_seconds():
        raise invalid_field("transfer.keep", f"must not be negative, and at most {limits.lease}")
    for index, consumer in enumerate(record.consumer_jobs):
        if consumer.process_count > limits.processes:
            raise invalid_field(
                f"transfer.consumer_jobs[{index}].spec.resources.process_count", f"must be at most {limits.processes}"
            )
    check_labels(record.labels)


def check_labels(labels: dict[str, str]) -> None:
    """Raise BeamwireError INVALID_FIELD for labels that no filter could name."""
    if len(labels) > MOST_LABELS:
        raise invalid_field("transfer.labels", f"there may be {MOST_LABELS} at the most")
    for key, value in labels.items():
        if not _LABEL.fullmatch(key):
            raise invalid_field(
                "transfer.labels",
                f"{key[:80]!r} is no key: 1 to 63 letters, digits, - and _, beginning with a letter or digit",
            )
        if len(value.encode()) > MOST_VALUE_BYTES:
            raise invalid_field(f"transfer.labels.{key}", f"has more than {MOST_VALUE_BYTES} bytes")


def check_owner(record: TransferRecord, active: Iterable[TransferRecord], limits: Limits) -> None:
    """Raise BeamwireError LIMIT_REACHED if its owner, with `active` transfers, may not have one more."""
    mine = [each for each in active if each.owner == record.owner]
    if len(mine) >= limits.active_transfers:
        raise _reached(
            "active_transfers",
            f"{record.owner} has {len(mine)} transfers that have not ended, the limit here is "
            f"{limits.active_transfers}; cancel one or wait for one to end",
        )
    processes = sum(each.process_count for each in mine)
    if processes + record.process_count > limits.owner_processes:
        raise _reached(
            "processes",
            f"{record.owner} has {processes} processes in transfers that have not ended, and {record.process_count} "
            f"more would be beyond the limit of {limits.owner_processes}; ask for fewer, or wait for a transfer to end",
        )
    held = sum(map(capacity_bytes, mine))
    if held + capacity_bytes(record) > limits.buffer_bytes:
        raise _reached(
            "buffer_bytes",
            f"the buffers of {record.owner} have {held} bytes, and {capacity_bytes(record)} more would be beyond the "
            f"limit of {limits.buffer_bytes}; ask for a smaller buffer.capacity_bytes, or wait for a transfer to end",
        )


def capacity_bytes(record: TransferRecord) -> int:
    """Return the bytes that the buffer of a transfer can hold, all shards together; 0 if it has none of its own."""
    if record.served_from:
        return 0
    each = int(str(record.buffer_options.get("capacity_bytes") or DEFAULT_CAPACITY_BYTES))
    return each * int(str(record.buffer_options.get("shard_count") or 1))


def _reached(quota: str, message: str) -> BeamwireError:
    return BeamwireError(Reason.LIMIT_REACHED, message, metadata={"quota": quota}, quota=quota, retry_after=RETRY_AFTER)
