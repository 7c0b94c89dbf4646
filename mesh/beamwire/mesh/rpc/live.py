"""The calls that are being answered: who makes them is asked again while they last, and who may no more is cut off."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials

# How often the files are looked at, which another process may have changed, in seconds.
LOOK_PERIOD: Final = 0.25
# Every so many looks all calls are checked in any case: certificates end, and policies change.
_LOOKS_PER_CHECK: Final = 4

_log = logging.getLogger(__name__)


class Kind(enum.Enum):
    """What becomes of a call when the service is to end."""

    ANSWERED_ONCE = enum.auto()
    """It has time to be answered."""
    LASTING = enum.auto()
    """A stream of answers, which may have no end: it is cut off at once, and goes on elsewhere."""
    WATCHING = enum.auto()
    """It watches just that, and lasts to the end; nobody waits for it."""


class LiveCall:
    """A call while it lasts; entered by the task that answers it. `check` raises if it may not go on."""

    __slots__ = ("_calls", "_check", "_failure", "_task", "kind")

    def __init__(self, calls: LiveCalls, check: Callable[[], object], kind: Kind = Kind.ANSWERED_ONCE) -> None:
        self._calls = calls
        self._check = check
        self._failure: BeamwireError | None = None
        self._task: asyncio.Task[Any] | None = None
        self.kind = kind

    def __enter__(self) -> None:
        calls = self._calls
        calls.all.add(self)
        if calls.loop is None:
            calls.loop = asyncio.get_running_loop()
        # To find the running loop would cost more than all the rest of this.
        self._task = asyncio.current_task(calls.loop)

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None) -> None:
        calls = self._calls
        calls.all.discard(self)
        if calls.fewer is not None:
            calls.fewer.set()
        if self._failure is not None and kind is asyncio.CancelledError:
            assert self._task is not None
            self._task.uncancel()
            raise self._failure from None

    def check(self) -> None:
        """Cut it off if it may not go on."""
        try:
            self._check()
        except BeamwireError as error:
            self.cut(error)
        except Exception as error:
            # Whom we cannot judge we do not serve.
            _log.exception("a live call cannot be checked")
            self.cut(BeamwireError(Reason.INTERNAL, f"the caller cannot be identified again: {error!r}"))

    def cut(self, failure: BeamwireError) -> None:
        """Cancel what answers it, and tell its caller why."""
        if self._failure is None and self._task is not None:
            self._failure = failure
            self._task.cancel()


class LiveCalls:
    """The live calls of one server: `LiveCall(these, check, kind)` is one that begins, to be entered by its task."""

    def __init__(self) -> None:
        self.all: set[LiveCall] = set()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.fewer: asyncio.Event | None = None

    def __len__(self) -> int:
        return len(self.all)

    def check(self) -> None:
        """Check all of them."""
        for call in list(self.all):
            call.check()

    def cut(self, failure: BeamwireError, kind: Kind) -> None:
        """Cut off all of one kind."""
        for call in list(self.all):
            if call.kind is kind:
                call.cut(failure)

    async def answered(self, patience: float) -> None:
        """Wait until none is left but those that watch the end, some seconds at most."""
        self.fewer = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while any(call.kind is not Kind.WATCHING for call in self.all):
                    self.fewer.clear()
                    await self.fewer.wait()

    async def watch(self, credentials: Credentials) -> None:
        """Check them when the server's trust changes, at once, and each second; until it is cancelled."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        end = credentials.listen(lambda: _set(loop, changed))
        try:
            looks = 0
            while True:
                # Not `wait_for`: in Python 3.11 it forgets that it was cancelled if the change comes at the same time.
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_PERIOD):
                        await changed.wait()
                credentials.refresh()
                looks += 1
                if changed.is_set() or looks % _LOOKS_PER_CHECK == 0:
                    changed.clear()
                    self.check()
        finally:
            end()


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    # The thread that noticed may do so when the loop has ended.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)
