"""The asynchronous stream: batches of a transfer, as they come."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from beamwire.client.batch import Batch
from beamwire.client.session import Counters, Reader, Reading, Session
from beamwire.client.source import Source
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Frame
from beamwire.request.v1.request_service_pb2 import Receipt, Transfer
from beamwire.stream.v1.frame_pb2 import Field

if TYPE_CHECKING:
    from beamwire.client.aio import AsyncClient


class AsyncStream:
    """Batches of one stream: `async with client.stream(request) as s: async for batch in s`.

    The iteration ends when every event that was selected has come or is accounted for, and raises BeamwireError if the
    transfer did not succeed. Leaving early cancels the transfer if this stream created it.
    """

    def __init__(
        self, client: AsyncClient, source: Source, *, consumers: int = 1, reading: Reading | None = None
    ) -> None:
        self._session = Session(client, source, reading)
        self._connections = consumers
        self._reader: Reader | None = None
        self._entered = False
        # A thread of its own: one that waits for a frame must not keep others from the loop's executor.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beamwire stream")
        self._coming: asyncio.Future[Frame | None] | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        try:
            await self._session.open()
        except BaseException as error:
            await self._close(error)
            raise
        self._entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close(error)

    def __aiter__(self) -> Self:
        if not self._entered:
            raise BeamwireError(Reason.ILLEGAL_STATE, "the stream is not open; use `async with client.stream(…) as s`")
        return self

    async def __anext__(self) -> Batch:
        """Return the next batch. Whoever is cancelled while waiting loses nothing: the next call returns it."""
        async with self._turn:
            return await self._next()

    async def _next(self) -> Batch:
        if self._session.concluded:
            raise StopAsyncIteration
        if self._reader is None:
            self._reader = await self._session.dial(self._connections)
        if self._reader is None:
            raise StopAsyncIteration
        try:
            frame = await self._frame(self._reader)
        except BeamwireError as error:
            await self._session.conclude(error)
            raise StopAsyncIteration from None
        if frame is None:
            await self._session.conclude(None)
            raise StopAsyncIteration
        self._coming = None
        return Batch(frame)

    async def _frame(self, reader: Reader) -> Frame | None:
        """Wait for the frame that is coming, or how the stream ended, which stays for the next call."""
        if self._coming is None:
            self._coming = asyncio.get_running_loop().run_in_executor(self._thread, reader.next_frame)
        # Unlike an await of the future itself, this does not cancel it when it is cancelled.
        await asyncio.wait([self._coming])
        return self._coming.result()

    @property
    def transfer(self) -> Transfer | None:
        """The transfer as the service last told; None for a connect string."""
        return self._session.transfer

    @property
    def receipt(self) -> Receipt | None:
        """The account of the transfer, after the end."""
        return self._session.receipt

    @property
    def fields(self) -> tuple[Field, ...]:
        """What each batch holds: names, types, shapes, units; empty until the first batch or the end has come."""
        header = self._session.header
        return tuple(header.fields) if header is not None else ()

    @property
    def counters(self) -> Counters:
        """What this program has read so far."""
        return self._session.counters

    async def _close(self, cause: BaseException | None) -> None:
        try:
            await self._session.close(cause)
        finally:
            self._thread.shutdown()
            if self._coming is not None:
                await asyncio.wait([self._coming])
                # Marked as seen: whoever leaves does not want it.
                self._coming.exception()
