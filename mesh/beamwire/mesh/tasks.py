"""What a service process runs for long: its tasks, their failures, and the signals that end it."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from beamwire.mesh.errors import BeamwireError, Reason

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before work that failed is begun again."""

T = TypeVar("T")


class TaskRunner:
    """Runs the tasks of one process. Leaving its block cancels all that still run and awaits them.

    The first failure of a task given to `start` cancels the rest and is raised from the block. A task given to
    `keep` belongs to one resource: its failure is logged, and harms nobody else.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._started: set[asyncio.Task[None]] = set()
        self._kept: dict[str, asyncio.Task[None]] = {}
        self._draining = False

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draining = True
        for task in (*self._started, *self._kept.values()):
            task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            # The first is the cause; the group had cancelled the others when they failed too.
            raise group.exceptions[0] from None

    def start(self, name: str, coro_fn: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs `coro_fn()` until it returns; if it fails, everything ends."""
        task = self._group.create_task(coro_fn(), name=name)
        self._started.add(task)
        task.add_done_callback(self._started.discard)

    def keep(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs `work()` in the background, begun again after a pause as often as it fails; nothing if `name` runs.

        For what must be brought to its end whatever happens, and can be taken up where it was. DRAINING while the
        process ends.
        """
        if self._draining:
            raise BeamwireError(Reason.DRAINING, f"{name} cannot be started: this process is ending")
        if name not in self._kept:
            task = self._group.create_task(_until_done(name, work), name=name)
            self._kept[name] = task
            task.add_done_callback(lambda _: self._kept.pop(name, None))

    async def wait(self, name: str) -> None:
        """Waits for the end of a kept task; nothing if there is none."""
        task = self._kept.get(name)
        if task is not None:
            await asyncio.wait([task])

    def kept(self) -> list[str]:
        """The names of the kept tasks that run."""
        return list(self._kept)

    async def cancel(self, name: str) -> None:
        """Cancels a kept task and waits for its end; nothing if there is none."""
        task = self._kept.get(name)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def run_until_signal(self, drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Waits for SIGTERM or SIGINT, then refuses new kept tasks and awaits `drain()`."""
        with stop_on_signals() as stop:
            await stop.wait()
            self._draining = True
            if drain is not None:
                await drain()


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set, instead of what they did before; that is restored at the end."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _until_done(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    pause = FIRST_PAUSE
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed; it is tried again in %g s", name, pause)
        else:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def to_the_end(work: Coroutine[Any, Any, T], patience: float) -> T:
    """Awaits `work`; if cancelled, gives it some seconds to end before the cancellation goes on.

    For an action that may have begun elsewhere: who undoes it must not come before it.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=patience)
        task.cancel()
        raise
