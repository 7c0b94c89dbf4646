"""Which groups there are: those that a buffer was made for, and those that come to look."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.names import check_id
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.config import DEFAULT_GROUP, CacheConfig
from beamwire.services.buffer.cache.groups import Group
from beamwire.services.buffer.cache.holdings import Holdings
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.cache.vault import Vault
from beamwire.services.buffer.control import ConsumerStatus
from beamwire.stream.v1.link_pb2 import Hello, Start


class Groups:
    """The groups of one cache, the declared ones first."""

    def __init__(self, config: CacheConfig, holdings: Holdings, vault: Vault) -> None:
        self._config = config
        self._holdings = holdings
        self._vault = vault
        self._groups: dict[str, Group] = {}
        # No more frames will come: who has everything gets END.
        self.ending = False
        for index, name in enumerate(config.groups):
            self._make(name, index, declared=True)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    @property
    def declared(self) -> Iterable[Group]:
        """The groups that are to get everything."""
        return (group for group in self if group.declared)

    def added(self, name: str) -> Group | None:
        """The group of this name that was added, if there is one."""
        group = self._groups.get(name)
        return group if group is not None and group.members is not None else None

    def restore(self) -> list[ConsumerStatus]:
        """Take up the groups of an earlier process, and wait for their consumers; what those had taken in all."""
        facts = self._vault.facts
        for index, (name, begin, first_sequence) in facts.groups.items():
            self._make(name, index, begin, first_sequence=first_sequence)
        deadline = time.monotonic() + self._config.reconnect_grace
        for name, instances in facts.joined.items():
            if name in self._groups:
                self._groups[name].awaited, self._groups[name].awaited_until = set(instances), deadline
        records = (self._taken(group) for group in self)
        return [record for record in records if record.sent_frame_count]

    def find(self, hello: Hello | None, who: str = "") -> tuple[Group, int]:
        """The group that a consumer asks for, and how many frames it asked for that are gone.

        Made if it is new; RefusedError if there are too many, or it is not for this SPIFFE id.
        """
        name = (hello.group if hello is not None else "") or next(iter(self._groups), DEFAULT_GROUP)
        group = self._groups.get(name)
        self._check_member(name, group, who)
        if group is not None:
            return group, 0
        return self._new(name, hello.start if hello is not None else Start())

    def _new(self, name: str, start: Start) -> tuple[Group, int]:
        try:
            check_id("group", name)
        except BeamwireError as error:
            raise RefusedError(error.message, Reason.INVALID_FIELD) from error
        if len(self._groups) == at.MOST_GROUPS:
            self._remove_idle()
        begin, first_sequence, evicted = self._begin(start)
        taken = {group.index for group in self}
        index = next(index for index in range(at.MOST_GROUPS) if index not in taken)
        self._vault.journal.note(fact="group", name=name, index=index, begin=begin, first_sequence=first_sequence)
        return self._make(name, index, begin, first_sequence=first_sequence), evicted

    def _check_member(self, name: str, group: Group | None, who: str) -> None:
        if group is not None and group.members is not None:
            allowed = not who or who in group.members
        else:
            # Those who were let in for a group of their own are no consumers of the stream.
            allowed = not who or not self._config.consumers or who in self._config.consumers
        if not allowed:
            raise RefusedError(f"{who} may not consume in the group {name}", Reason.ROLE_NOT_ALLOWED)

    def add(self, name: str, members: frozenset[str]) -> Group:
        """Make a group that is to have all that is kept, or find it; RefusedError if there are too many."""
        group = self._groups.get(name)
        if group is None:
            group, _ = self._new(name, Start())
        group.members = members
        return group

    def offer_end(self, group: Group) -> None:
        """Wake the consumers of a group that has everything, if no more frames will come."""
        if self.ending and group.drained:
            group.wake_all()

    def note_joined(self, group: Group, instance: str) -> None:
        """A consumer is connected: the next process waits for it to come back."""
        self._vault.journal.note(fact="joined", group=group.name, instance=instance)

    def note_left(self, group: Group, instance: str) -> None:
        """A consumer is not connected any more."""
        # On a full disk: the next process then waits for one who will not come, for no longer than for any other.
        with suppress(OSError):
            self._vault.journal.note(fact="left", group=group.name, instance=instance)

    def confirm(self, group: Group) -> None:
        """One of its consumers has confirmed END."""
        self._holdings.ledger.words[self._record(group) + at.GROUP_CONFIRMATIONS] += 1

    def is_confirmed(self, group: Group) -> bool:
        """Whether one of its consumers has confirmed END."""
        return bool(self._holdings.ledger.words[self._record(group) + at.GROUP_CONFIRMATIONS])

    def _make(self, name: str, index: int, begin: int = 0, *, first_sequence: int = 0, declared: bool = False) -> Group:
        group = self._groups[name] = Group(name, index, declared, begin, first_sequence)
        self._holdings.add_group(group)
        return group

    def _remove_idle(self) -> None:
        for group in self:
            if not group.declared and group.members is None and not group.sinks and not group.flying:
                del self._groups[group.name]
                self._holdings.remove_group(group)
                return
        raise RefusedError(f"there are {at.MOST_GROUPS} groups already", Reason.LIMIT_REACHED, retry=True)

    def _begin(self, start: Start) -> tuple[int, int, int]:
        """Where a new group begins, as a position and as a sequence, and how many frames it asked for that are gone."""
        words = self._holdings.ledger.words
        following = words[at.NEXT_POSITION]
        match start.WhichOneof("point"):
            case "latest":
                return following, 0, 0
            case "sequence":
                return 0, start.sequence, 0
            case "time":
                since = start.time.ToNanoseconds()
                return min((slot.position for slot in self._holdings if slot.time >= since), default=following), 0, 0
        received = sum(
            words[self._holdings.ledger.producer(index) + at.RECEIVED_FRAMES]
            for index in range(len(self._config.expected_producers))
        )
        return 0, 0, received - sum(slot.frames for slot in self._holdings)

    def _taken(self, group: Group) -> ConsumerStatus:
        """What the consumers of an earlier process took, together."""
        words = self._holdings.ledger.words
        record = self._record(group)
        return ConsumerStatus(
            consumer=0,
            group=group.name,
            confirmed=self.is_confirmed(group),
            sent_frame_count=words[record + at.GROUP_FRAMES],
            sent_event_count=words[record + at.GROUP_EVENTS],
            sent_bytes=words[record + at.GROUP_BYTES],
            acknowledged_frame_count=words[record + at.GROUP_FRAMES],
            acknowledged_event_count=words[record + at.GROUP_EVENTS],
        )

    def _record(self, group: Group) -> int:
        return self._holdings.ledger.group(group.index)
