"""Runs coroutines of a synchronous program on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from beamwire.mesh.errors import BeamwireError, Reason

T = TypeVar("T")


class Portal:
    """An event loop in a daemon thread; `close` ends it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="beamwire client", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it can run something: not after `close`, nor in a forked process."""
        return self._thread.is_alive()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and return its result. If the caller is interrupted, it is cancelled and waited for."""
        if not self._thread.is_alive():
            coroutine.close()
            raise BeamwireError(
                Reason.ILLEGAL_STATE, "the client was closed before, or belongs to the process this one was forked from"
            )
        ended = threading.Event()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            task = self._loop.create_task(coroutine)
            task.add_done_callback(lambda _: ended.set())
            tasks.append(task)

        try:
            self._loop.call_soon_threadsafe(start)
        except RuntimeError:
            coroutine.close()
            raise BeamwireError(Reason.ILLEGAL_STATE, "the client was closed before") from None
        try:
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            ended.wait()
            raise
        if tasks[0].cancelled():
            raise BeamwireError(Reason.CANCELLED, "the client was closed during the call")
        return tasks[0].result()

    def iterate(self, iterator: AsyncIterator[T]) -> Iterator[T]:
        """Iterate over an asynchronous iterator."""
        end = object()
        while (item := self.call(_next(iterator, end))) is not end:
            yield item  # type: ignore[misc]

    def close(self) -> None:
        """Cancel what runs, and end the thread. Closing twice changes nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def _next(iterator: AsyncIterator[T], end: object) -> T | object:
    return await anext(iterator, end)
