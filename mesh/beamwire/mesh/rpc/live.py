"""The calls that are being answered: who makes them is asked again while they last, and who may no more is cut off."""

from __future__ import annotations

import asyncio
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


class LiveCall:
    """A call while it lasts; entered by the task that answers it. `check` raises if it may not go on."""

    __slots__ = ("_calls", "_check", "_failure", "_task")

    def __init__(self, calls: set[LiveCall], check: Callable[[], object]) -> None:
        self._calls = calls
        self._check = check
        self._failure: BeamwireError | None = None
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._calls.add(self)

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None) -> None:
        self._calls.discard(self)
        if self._failure is not None and kind is asyncio.CancelledError:
            assert self._task is not None
            self._task.uncancel()
            raise self._failure from None

    def check(self) -> None:
        """Cut it off if it may not go on: what answers it is cancelled, and its caller is told why."""
        if self._failure is not None:
            return
        try:
            self._check()
        except BeamwireError as error:
            self._failure = error
        except Exception as error:
            # Whom we cannot judge we do not serve.
            _log.exception("a live call cannot be checked")
            self._failure = BeamwireError(Reason.INTERNAL, f"the caller cannot be identified again: {error!r}")
        if self._failure is not None and self._task is not None:
            self._task.cancel()


class LiveCalls:
    """The live calls of one server."""

    def __init__(self) -> None:
        self._calls: set[LiveCall] = set()

    def __len__(self) -> int:
        return len(self._calls)

    def entered(self, check: Callable[[], object]) -> LiveCall:
        """A call that begins, to be entered by its task."""
        return LiveCall(self._calls, check)

    def check(self) -> None:
        """Check all of them."""
        for call in list(self._calls):
            call.check()

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
