"""What changes in the record of a buffer, worked out from what is said of it; nothing here stores anything."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.buffer.control import CacheStatus, Counters, GroupStatus
from beamwire.services.buffer.model import BUFFER_STATES, AddedGroup, BufferRecord, BufferState, Seal, Shard
from beamwire.services.buffer.placement import TRANSPORTS

LIVES = (BufferState.STARTING, BufferState.READY, BufferState.DRAINING, BufferState.KEPT, BufferState.ENDED)
MOST_ADDED = 8


def ended(record: BufferRecord) -> bool:
    """Whether a buffer has come to its end, whichever."""
    return BUFFER_STATES.is_terminal(BufferState(record.state))


def supersedes(seal: Seal, record: BufferRecord) -> bool:
    """Whether a seal is to be stored: the first one, or one that does not say DONE after one that does."""
    if ended(record) or record.error is not None:
        return False
    return record.seal is None or (record.seal.cause == "DONE" and seal.cause != "DONE")


def sealed_groups(record: BufferRecord, names: set[str], seal: Seal) -> dict[str, object]:
    """Return the change of a buffer that seals some of the groups that were added, unless they are."""
    added = tuple(
        group.model_copy(update={"seal": seal}) if group.name in names and group.seal is None else group
        for group in record.added
    )
    return {"added": added} if added != record.added else {}


def sealed(record: BufferRecord, seal: Seal) -> dict[str, object]:
    """Return the change of a buffer that seals it; of one that is only kept, its groups that still read."""
    if record.state != BufferState.KEPT:
        return {"seal": seal} if supersedes(seal, record) else {}
    if seal.cause == "DONE":
        return {}
    over = {"keep_expire_time": min(datetime.now(UTC), record.keep_expire_time or datetime.now(UTC))}
    return over | sealed_groups(record, {group.name for group in record.unfinished()}, seal)


def group_sealed(record: BufferRecord, group: str, seal: Seal) -> dict[str, object]:
    """Return the change of a buffer that seals one group that was added; BeamwireError if it cannot be."""
    if group not in {added.name for added in record.added}:
        raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"no group {group[:40]!r} was added to {record.name}")
    if seal.cause == "DONE":
        raise invalid_field("cause", "is DONE, which a group is once it has END; say why it ends before")
    return sealed_groups(record, {group}, seal) if not ended(record) else {}


def with_group(record: BufferRecord, added: AddedGroup) -> dict[str, object]:
    """Return the change of a buffer that adds a group; BeamwireError if it cannot be read from the beginning."""
    for group in record.added:
        if (group.name, group.consumers) == (added.name, added.consumers):
            return {}
    if added.name in record.spec.groups or added.name in {group.name for group in record.added}:
        raise BeamwireError(Reason.RESOURCE_EXISTS, f"{record.name} has another group {added.name} already")
    if not record.spec.keep:
        why = "it was not made to keep what it delivered"
    elif record.delete_requested or record.state not in (BufferState.DRAINING, BufferState.KEPT):
        why = f"it is {record.state}: groups are added once no more frames come, and until it ends"
    elif not record.whole:
        why = "the first of its frames are gone: the stream did not fit"
    elif record.seal is not None and record.seal.cause != "DONE":
        why = f"it was sealed as {record.seal.cause}"
    elif len(record.added) >= MOST_ADDED:
        raise BeamwireError(Reason.LIMIT_REACHED, f"{MOST_ADDED} groups were added to {record.name}, the limit")
    else:
        return {"added": (*record.added, added)}
    raise BeamwireError(
        Reason.ILLEGAL_STATE, f"{record.name} cannot be read again: {why}; make another transfer of the same request"
    )


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
