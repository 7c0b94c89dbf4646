"""What changes in the record of a buffer, worked out from what is said of it; nothing here stores anything."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.buffer.control import CacheStatus, Counters, GroupStatus
from beamwire.services.buffer.model import BUFFER_STATES, BufferRecord, BufferState, Seal, Shard
from beamwire.services.buffer.placement import TRANSPORTS

LIVES = (BufferState.STARTING, BufferState.READY, BufferState.DRAINING, BufferState.KEPT, BufferState.ENDED)


def supersedes(seal: Seal, record: BufferRecord) -> bool:
    """Whether a seal is to be stored: the first one, or one that does not say DONE after one that does."""
    if BUFFER_STATES.is_terminal(BufferState(record.state)) or record.error is not None:
        return False
    return record.seal is None or (record.seal.cause == "DONE" and seal.cause != "DONE")


def sealed_groups(record: BufferRecord, names: set[str], seal: Seal) -> dict[str, object]:
    """Return the change of a buffer that seals some of the groups that were added, unless they are."""
    added = tuple(
        group.model_copy(update={"seal": seal}) if group.name in names and group.seal is None else group
        for group in record.added
    )
    return {"added": added} if added != record.added else {}


def with_added(counters: Counters, record: BufferRecord) -> Counters:
    """Return the account of a buffer with all groups that were added, also those that no cache had heard of."""
    known = {group.group for group in counters.groups}
    unheard = tuple(GroupStatus(group=added.name, added=True) for added in record.added if added.name not in known)
    return counters.model_copy(update={"groups": counters.groups + unheard})


def further(record: BufferRecord, whole: CacheStatus) -> str:
    """Return the state of a buffer, which never goes back: a cache that died begins with READY again."""
    state = BufferState(whole.state)
    if state in LIVES and LIVES.index(state) <= LIVES.index(BufferState(record.state)):
        return record.state
    BUFFER_STATES.check(BufferState(record.state), state, story=record.name)
    return state


def times(record: BufferRecord, state: BufferState) -> dict[str, object]:
    """Return the times that a buffer gets by entering a state."""
    now = datetime.now(UTC)
    if state is BufferState.KEPT:
        return {"keep_expire_time": now + timedelta(seconds=record.spec.keep)}
    return {"end_time": now} if BUFFER_STATES.is_terminal(state) else {}


def connect_string(record: BufferRecord, shards: tuple[Shard, ...], epoch: int, trust_domain: str) -> ConnectString:
    """Return all that a peer needs to dial the caches."""
    local = record.spec.transport == "IPC"
    addresses = [shard.address for shard in shards]
    places = [] if local else [address.rpartition(":") for address in addresses]
    return ConnectString(
        hosts=tuple((host, int(port)) for host, _, port in places),
        paths=tuple(addresses) if local else (),
        buffer=record.name.removeprefix("buffers/"),
        epoch=epoch,
        transport=TRANSPORTS[record.spec.transport],
        delivery="acked" if record.spec.acked else "push",
        # Only TLS asks whose cache it is.
        facility=trust_domain if record.spec.transport == "TLS_TCP" else "",
    )


def of_shard(record: BufferRecord, number: int, **changes: object) -> dict[str, object]:
    """Return the change of a buffer that changes one of its shards."""
    shards = list(record.shards)
    shards[number] = shards[number].model_copy(update=changes)
    return {"shards": tuple(shards)}


def seen_shard(shard: Shard, status: CacheStatus | None) -> Shard:
    """Return a shard as its cache says that it is."""
    if status is None:
        return shard
    return shard.model_copy(update={"address": status.address, "last": status if status.state == "ENDED" else None})


def moment(seconds: float) -> datetime | None:
    """Return a time; None for 0."""
    return datetime.fromtimestamp(seconds, UTC) if seconds else None
