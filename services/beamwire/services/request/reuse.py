"""Serves a transfer from a buffer that still holds every event of an earlier one that asked for the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import islice

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.names import id_of_part, new_id
from beamwire.mesh.store import Store
from beamwire.services.request.life import noted, to
from beamwire.services.request.model import TransferRecord, TransferState
from beamwire.services.request.ports import BufferPort

# Earlier transfers that are looked at, newest first. Most of them may have been served by others themselves.
MOST_CANDIDATES = 200
# Of those that could serve, so many are asked.
MOST_ASKED = 8
# The longest name of a group.
GROUP_LENGTH = 31
# What the Buffer service says of a buffer that holds nothing any more, or as many groups as it may have.
_GONE = frozenset({Reason.RESOURCE_NOT_FOUND, Reason.ILLEGAL_STATE, Reason.UNSUPPORTED, Reason.LIMIT_REACHED})

log = logging.getLogger(__name__)


class Reuse:
    """Finds kept buffers, once for each transfer: what is on its own stays so.

    Args:
        store: where transfers are kept.
        buffers: the Buffer service.
    """

    def __init__(self, store: Store[TransferRecord], buffers: BufferPort) -> None:
        self._store = store
        self._buffers = buffers

    async def find(self, record: TransferRecord) -> TransferRecord | None:
        """Return the transfer whose buffer could serve another one, as far as the records tell."""
        return next(iter(await self._candidates(record)), None)

    async def provide(self, record: TransferRecord) -> TransferRecord | None:
        """Have a kept buffer serve a transfer that asks for it, and return it STREAMING; None if it needs its own."""
        if record.served_from:
            if (served := await self._join(record)) is not None:
                return served
            record = await self._store.change(record.name, _on_its_own)
        if not record.reuse or record.on_its_own:
            return None
        for earlier in await self._candidates(record):
            intent = _served_by(record, earlier)
            # Stored before the buffer is told: who ends the transfer must know of its group there.
            record = await self._store.change(record.name, lambda _, intent=intent: intent)  # type: ignore[misc]
            if (served := await self._join(record)) is not None:
                return served
            record = await self._store.change(record.name, _on_its_own)
        # Stored before anything is made: what would be found later would leave that behind.
        await self._store.change(record.name, lambda _: {"on_its_own": True})
        return None

    async def _join(self, record: TransferRecord) -> TransferRecord | None:
        """Have the buffer give everything to a group of the transfer's own; None if it has nothing any more."""
        try:
            connect_string = await self._buffers.add_group(record)
        except BeamwireError as error:
            if error.reason not in _GONE:
                raise
            log.info("%s is not served from %s: %s", record.name, record.served_from, error)
            return None
        reason = f"served from the buffer of {record.served_from}, which holds the same events"
        found = {"connect_string": connect_string}
        return await self._store.change(record.name, lambda r: {**to(r, TransferState.STREAMING, reason), **found})

    async def _candidates(self, record: TransferRecord) -> list[TransferRecord]:
        if not record.content_sha256 or not may_be_served(record):
            return []
        same = {"content_sha256": record.content_sha256, "state": TransferState.SUCCEEDED.value}
        earlier = await self._store.list(owner=record.owner, equals=same, limit=MOST_CANDIDATES)
        return list(islice(_holding(earlier, record), MOST_ASKED))


def may_be_served(record: TransferRecord) -> bool:
    """Return whether a request leaves it open whose buffer serves it: one group, of its owner, that acknowledges."""
    options = record.buffer_options
    groups = options.get("groups") or []
    return not (
        record.consumer_jobs
        or options.get("delivery") == "DELIVERY_PUSH"
        or (isinstance(groups, list) and len(groups) > 1)
    )


def _holding(earlier: Iterable[TransferRecord], record: TransferRecord) -> Iterable[TransferRecord]:
    now = datetime.now(UTC)
    for each in earlier:
        kept_until = (each.end_time or now) + timedelta(seconds=each.keep)
        # Of a dataset that has grown since, another number of events would come.
        same = each.expected_event_count == record.expected_event_count
        if each.keep and not each.served_from and kept_until > now and same:
            yield each


def _served_by(record: TransferRecord, earlier: TransferRecord) -> dict[str, object]:
    return {
        "served_from": earlier.name,
        "buffer": earlier.buffer,
        "job": "",
        "group": _group_of(record),
        "capacity_bytes": earlier.capacity_bytes,
    }


def _group_of(record: TransferRecord) -> str:
    """Return a name that no other transfer's group has."""
    group = f"t-{record.name.removeprefix('transfers/')}"
    if len(group) <= GROUP_LENGTH:
        return group
    digest = new_id(record.name)
    return f"{group[: GROUP_LENGTH - len(digest) - 1].rstrip('-')}-{digest}"


def _on_its_own(record: TransferRecord) -> dict[str, object]:
    part = id_of_part(record.name.removeprefix("transfers/"))
    reason = f"{record.served_from} holds its events no longer: a buffer and a streamer of its own are needed"
    own = {"served_from": "", "group": "", "buffer": f"buffers/{part}", "job": f"jobs/{part}"}
    return {**own, "capacity_bytes": 0, **noted(record, reason)}
