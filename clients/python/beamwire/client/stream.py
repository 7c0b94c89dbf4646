"""The synchronous stream: batches of a transfer, read by the thread that iterates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from beamwire.client.batch import Batch
from beamwire.client.portal import Portal
from beamwire.client.session import Counters, Reader, Reading, Session
from beamwire.client.source import Source
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.deliveries import Held
from beamwire.request.v1.request_service_pb2 import Receipt, Transfer
from beamwire.stream.v1.frame_pb2 import Field, StreamHeader

if TYPE_CHECKING:
    from beamwire.client.aio import AsyncClient


class Stream:
    """Batches of one stream: `with client.stream(request) as s: for batch in s`.

    The iteration ends when every event that was selected has come or is accounted for, and raises BeamwireError if the
    transfer did not succeed. Leaving early (break, an exception, Ctrl-C) cancels the transfer if this stream created
    it.
    """

    def __init__(
        self,
        portal: Portal,
        client: AsyncClient,
        source: Source,
        *,
        consumers: int = 1,
        reading: Reading | None = None,
        transfer_id: str = "",
    ) -> None:
        self._portal = portal
        self._consumers = consumers
        self._session = Session(client, source, reading, transfer_id=transfer_id)
        self._parts: list[Part] | None = None
        self._entered = False

    def __enter__(self) -> Self:
        try:
            self._portal.call(self._session.open())
        except BaseException as error:
            self._portal.call(self._session.close(error))
            raise
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(self._session.close(error))

    def __iter__(self) -> Iterator[Batch]:
        """Yield every batch; all connections feed this one iterator."""
        self._check_open()
        if self._parts is None:
            self._parts = self._dial([self._consumers])
        for part in self._parts:
            yield from part
        self.wait()

    def split(self) -> list[Part]:
        """Return one iterator per connection, each for a thread of its own; call `wait` when all have ended."""
        self._check_open()
        if self._parts is not None:
            raise BeamwireError(Reason.ILLEGAL_STATE, "the stream is being read already; split it before")
        self._parts = self._dial([1] * self._consumers)
        return self._parts

    def wait(self, timeout: float | None = None) -> Receipt | None:
        """Wait for the end of the transfer after every batch was read; iterating does so by itself.

        Returns the receipt; None for a bare buffer. Raises BeamwireError if the transfer did not succeed, TimeoutError
        if it has not ended within `timeout` seconds; it may be waited for again then.
        """
        self._portal.call(self._concluded(timeout))
        return self._session.receipt

    async def _concluded(self, timeout: float | None) -> None:
        async with asyncio.timeout(timeout):
            await self._session.conclude(None)

    @property
    def transfer(self) -> Transfer | None:
        """The transfer as the service last told; None for a connect string."""
        return self._session.transfer

    @property
    def receipt(self) -> Receipt | None:
        """The account of the transfer, after the end."""
        return self._session.receipt

    @property
    def header(self) -> StreamHeader | None:
        """What the stream says that it is; None until the first batch or the end has come."""
        return self._session.header

    @property
    def fields(self) -> tuple[Field, ...]:
        """What each batch holds: names, types, shapes, units; empty until the first batch or the end has come."""
        return tuple(self.header.fields) if self.header is not None else ()

    @property
    def counters(self) -> Counters:
        """What this program has read so far."""
        return self._session.counters

    def _check_open(self) -> None:
        if not self._entered:
            raise BeamwireError(Reason.ILLEGAL_STATE, "the stream is not open; use `with client.stream(…) as s`")

    def _dial(self, connections: list[int]) -> list[Part]:
        readers = [self._portal.call(self._session.dial(count)) for count in connections]
        return [Part(self._portal, self._session, reader) for reader in readers if reader is not None]


class Part:
    """The batches of one consumer; an iterator for one thread."""

    def __init__(self, portal: Portal, session: Session, reader: Reader) -> None:
        self._portal = portal
        self._session = session
        self._reader = reader

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            frame = self._reader.next_frame()
        except BeamwireError as error:
            self._portal.call(self._session.conclude(error))
            raise StopIteration from None
        if frame is None:
            raise StopIteration
        return Batch(frame)

    def hold(self) -> Held | None:
        """The frames of the next message, which stay unacknowledged until its `done` is called, in whatever order.

        None at the end. One that was kept for longer than the buffer's frame lease may come once more, as the same
        object. Raises as iterating does.
        """
        try:
            return self._reader.hold()
        except BeamwireError as error:
            self._portal.call(self._session.conclude(error))
            return None

    @property
    def settled(self) -> bool:
        """After the stream was left: whether the caches have heard of all that was done with."""
        return self._reader.settled

    @property
    def header(self) -> StreamHeader | None:
        """What the stream says that it is; None until the first batch or the end has come."""
        return self._reader.header

    @property
    def counters(self) -> Counters:
        """What this consumer has read so far."""
        return self._reader.counters
