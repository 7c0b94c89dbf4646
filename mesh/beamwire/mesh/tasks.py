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
STOP_PATIENCE = 5.0
"""Seconds that cancelled tasks have to end what they are at."""
STOP_MARGIN = 1.0
"""Seconds that those have then which are cancelled once more."""

T = TypeVar("T")


class TaskRunner:
    """Runs the tasks of one process. Leaving its block cancels all that still run and awaits them, within a bound.

    A task given to `start` belongs to the process, one given to `keep` to one resource. The failure of either is
    logged, harms nobody else, and the work is begun again: no fault in the background ends a service. What a task does
    when it is cancelled is cut off too if it takes long: it is taken up by the next who serves.
    """

    def __init__(self) -> None:
        self._started: set[asyncio.Task[None]] = set()
        self._kept: dict[str, asyncio.Task[None]] = {}
        self._draining = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draining = True
        tasks = {*self._started, *self._kept.values()}
        for patience in (STOP_PATIENCE, STOP_MARGIN):
            for task in tasks:
                task.cancel()
            if tasks:
                _, tasks = await asyncio.wait(tasks, timeout=patience)
            for task in tasks:
                log.warning("%s has not ended %g s after it was cancelled; it is %s", *_hanging(task, patience))

    def start(self, name: str, coro_fn: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs `coro_fn()` until it returns, begun again after a pause as often as it fails."""
        task = asyncio.create_task(_until_done(name, coro_fn), name=name)
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
            task = asyncio.create_task(_until_done(name, work), name=name)
            self._kept[name] = task
            task.add_done_callback(lambda _: self._kept.pop(name, None))

    async def wait(self, name: str) -> None:
        """Waits for the end of a kept task; nothing if there is none."""
        task = self._kept.get(name)
        if task is not None:
            await asyncio.wait([task])

    def keeps(self, name: str) -> bool:
        """Whether a kept task of this name runs."""
        return name in self._kept

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
        """Waits for SIGTERM or SIGINT, then awaits `drain()`, and refuses new kept tasks.

        Not before: what was asked for until then is still taken up.
        """
        with stop_on_signals() as stop:
            await stop.wait()
            if drain is not None:
                await drain()
            self._draining = True


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


def _hanging(task: asyncio.Task[None], seconds: float) -> tuple[str, float, str]:
    """Return the name of a task, for how long it hangs, and where."""
    frames = task.get_stack()
    where = f"in {frames[-1].f_code.co_qualname}, line {frames[-1].f_lineno}" if frames else "ending"
    return task.get_name(), seconds, where


async def _until_done(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    pause = FIRST_PAUSE
    while True:
        began = loop.time()
        try:
            await work()
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            # Of something that it awaited, which somebody else cancelled: no word that this shall end.
            log.exception("%s was cut off; it is begun again in %g s", name, pause)
        except Exception:
            if task.cancelling():
                log.exception("%s failed as it was ended", name)
                return
            log.exception("%s failed; it is tried again in %g s", name, pause)
        else:
            return
        if loop.time() - began > LONGEST_PAUSE:
            pause = FIRST_PAUSE
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
