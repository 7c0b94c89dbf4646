"""What one watcher of a record is sent, and when: every state in order, counters at a bounded rate."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Generic, Protocol, Self, TypeVar

PUBLISH_INTERVAL = 0.1
"""Seconds between two versions that are sent only because their counters changed."""


class Version(Protocol):
    """The part of a record that decides what is sent."""

    @property
    def state(self) -> str:
        """Where the resource is in its life."""
        ...

    @property
    def revision(self) -> int:
        """Grows with every durable change."""
        ...


V = TypeVar("V", bound=Version)


class Watcher(Generic[V]):
    """What one watch has still to send: one version for each state that was entered, the newest."""

    def __init__(self) -> None:
        self._pending: deque[V] = deque()
        self._urgent = asyncio.Event()
        self._some = asyncio.Event()
        self._ended = False
        self._sent_at = float("-inf")
        self._latest: V | None = None
        self.newest = 0
        """The revision of the newest version that it has, to send or sent; 0 before it has begun."""

    def begin(self, current: V) -> None:
        """Takes the version that was read first, which tells all that was pushed up to its revision."""
        if current.revision >= self.newest:
            self.newest, self._latest = current.revision, current
        while self._pending and self._pending[0].revision <= current.revision:
            self._pending.popleft()
        self._sent()

    def push(self, record: V, *, urgent: bool) -> None:
        """Adds a newer version; an urgent one, of a new revision, makes all that is pending due at once."""
        if record.revision < self.newest + urgent or record == self._latest:
            return
        self.newest, self._latest = record.revision, record
        if self._pending and self._pending[-1].state == record.state:
            self._pending.pop()
        self._pending.append(record)
        self._some.set()
        if urgent:
            self._urgent.set()

    def end(self) -> None:
        """Ends the iteration once what is pending was sent."""
        self._ended = True
        self._some.set()
        self._urgent.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> V:
        await self._some.wait()
        await self._not_too_soon()
        if not self._pending:
            raise StopAsyncIteration
        record = self._pending.popleft()
        self._sent()
        return record

    def _sent(self) -> None:
        self._sent_at = time.monotonic()
        if not self._pending and not self._ended:
            self._some.clear()
            self._urgent.clear()

    async def _not_too_soon(self) -> None:
        remaining = self._sent_at + PUBLISH_INTERVAL - time.monotonic()
        if remaining > 0 and not self._urgent.is_set():
            # Not `wait_for`: in Python 3.11 it forgets that it was cancelled if the change comes at the same time.
            with suppress(TimeoutError):
                async with asyncio.timeout(remaining):
                    await self._urgent.wait()


class Watchers(Generic[V]):
    """Who watches which record."""

    def __init__(self) -> None:
        self._of: dict[str, set[Watcher[V]]] = {}

    @contextmanager
    def watcher(self, name: str) -> Iterator[Watcher[V]]:
        """A watcher of one record, for as long as the block lasts."""
        watcher: Watcher[V] = Watcher()
        watchers = self._of.setdefault(name, set())
        watchers.add(watcher)
        try:
            yield watcher
        finally:
            watchers.discard(watcher)
            if not watchers and self._of.get(name) is watchers:
                del self._of[name]

    def names(self) -> list[str]:
        """The records that somebody watches."""
        return list(self._of)

    def of(self, name: str) -> tuple[Watcher[V], ...]:
        """The watchers of one record."""
        return tuple(self._of.get(name, ()))

    def tell(self, record: V, name: str, *, urgent: bool) -> None:
        """Gives a version to all who watch."""
        for watcher in self._of.get(name, ()):
            watcher.push(record, urgent=urgent)

    def end(self, name: str) -> None:
        """Ends all watches of a record, which is gone."""
        for watcher in self._of.pop(name, set()):
            watcher.end()
