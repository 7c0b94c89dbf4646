"""Talks to a cache process: what it says about itself, and the client of its control socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.buffer.doors import Door, SocketDoor

_ANSWER_TIMEOUT: Final = 10.0
# Between two looks whether a cache answers that is being started.
_SHORTEST_DELAY: Final = 0.002
_LONGEST_DELAY: Final = 0.2
_DELAY_PART: Final = 0.05

CacheState = Literal["READY", "DRAINING", "KEPT", "ENDED", "FAILED"]
# A `beamwire.buffer.v1.Flow` without its prefix; empty while it is not known.
Flow = Literal["", "FLOWING", "NO_PRODUCER", "NO_READER", "FULL", "STARVED"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProducerStatus(_Message):
    """What one producer did: `beamwire.buffer.v1.ProducerCounters`, `skipped` as events by cause."""

    producer: int
    identity: str = ""
    connected: bool = False
    received_frame_count: int = 0
    received_event_count: int = 0
    received_bytes: int = 0
    ended: bool = False
    selected_event_count: int = 0
    sent_event_count: int = 0
    skipped: dict[str, int] = {}
    first_missing_sequence: int = 0


class ConsumerStatus(_Message):
    """What one consumer connection took: `beamwire.buffer.v1.ConsumerCounters`."""

    consumer: int
    identity: str = ""
    connected: bool = False
    sent_frame_count: int = 0
    sent_event_count: int = 0
    sent_bytes: int = 0
    confirmed: bool = False
    address: str = ""
    group: str = ""
    acknowledged_frame_count: int = 0
    acknowledged_event_count: int = 0
    shard: int = 0


class GroupStatus(_Message):
    """What one group of consumers took: `beamwire.buffer.v1.GroupCounters`, `losses` as events by cause."""

    group: str
    declared: bool = False
    consumer_count: int = 0
    acknowledged_frame_count: int = 0
    acknowledged_event_count: int = 0
    acknowledged_bytes: int = 0
    pending_frame_count: int = 0
    in_flight_frame_count: int = 0
    redelivered_frame_count: int = 0
    losses: dict[str, int] = {}
    ended: bool = False
    added: bool = False


class Counters(_Message):
    """What a cache counted: `beamwire.buffer.v1.BufferCounters`, `losses` as events by cause."""

    received_frame_count: int = 0
    received_event_count: int = 0
    received_bytes: int = 0
    sent_frame_count: int = 0
    sent_event_count: int = 0
    sent_bytes: int = 0
    delivered_event_count: int = 0
    held_frame_count: int = 0
    held_bytes: int = 0
    losses: dict[str, int] = {}
    producers: tuple[ProducerStatus, ...] = ()
    consumers: tuple[ConsumerStatus, ...] = ()
    refused_peer_count: int = 0
    last_refusal: str = ""
    groups: tuple[GroupStatus, ...] = ()


class CacheStatus(_Message):
    """One line from a cache. `address` is host:port; times are in seconds since 1970, 0 before the first DATA frame.

    `end_cause` is the name of an EndCause without its prefix, empty while the stream goes on. `epoch` is the one that
    the cache serves: higher than it was told if it found nothing of what it had stored. `restarted` tells that it went
    on with what it found, `whole` that it has every frame that ever came, if it is to keep them.
    """

    state: CacheState
    address: str
    epoch: int = 1
    flow: Flow = ""
    restarted: bool = False
    whole: bool = False
    end_cause: str = ""
    end_detail: str = ""
    counters: Counters = Counters()
    first_frame_time: float = 0.0
    last_frame_time: float = 0.0


class CacheControl:
    """The control connection of a cache, that in a directory unless it is said where. A connection for each call."""

    def __init__(self, door: Path | Door) -> None:
        self._door = SocketDoor(door) if isinstance(door, Path) else door

    @classmethod
    async def connect(cls, door: Path | Door, timeout: float) -> Self:
        """Wait until the cache answers, which it does when it takes peers. BeamwireError TIMED_OUT if it does not."""
        control = cls(door)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        await control.status()
                    except (OSError, BeamwireError):
                        # Nobody tells when a socket begins to listen. A part of what was waited already: whatever a
                        # cache takes to start, not much is added to it.
                        waited = time.monotonic() - begun
                        await asyncio.sleep(min(max(_DELAY_PART * waited, _SHORTEST_DELAY), _LONGEST_DELAY))
                    else:
                        return control
        except TimeoutError as error:
            story = f"the cache in {door} did not answer within {timeout:g} s; its stderr says why"
            raise BeamwireError(Reason.TIMED_OUT, story) from error

    async def status(self) -> CacheStatus:
        """How the cache is now. BeamwireError CACHE_FAILED if it does not answer."""
        return _parse(await self._ask({"op": "status"}))

    async def watch(self) -> AsyncIterator[CacheStatus]:
        """How the cache is now, then after each change; ends when the cache does."""
        reader, writer = await self._open()
        try:
            writer.write(_line({"op": "watch"}))
            while line := await self._read_line(reader):
                yield _parse(line)
        finally:
            writer.close()

    async def seal(self, cause: str, detail: str = "", group: str = "") -> CacheStatus:
        """Say that no more frames will come. `cause` is an EndCause without its prefix. Only the first seal counts.

        With a group, one that was added: end it alone.
        """
        # A cache of an earlier release, which goes on after an upgrade, refuses a word that it does not know.
        more = {"group": group} if group else {}
        return _parse(await self._ask({"op": "seal", "cause": cause, "detail": detail, **more}))

    async def add_group(self, group: str, consumers: Sequence[str]) -> CacheStatus:
        """Have everything that is kept delivered to one more group, of these SPIFFE ids."""
        return _parse(await self._ask({"op": "group", "group": group, "consumers": list(consumers)}))

    async def release(self) -> CacheStatus:
        """Say that what is kept need not be kept any longer."""
        return _parse(await self._ask({"op": "release"}))

    async def revoke(self, identity: str) -> CacheStatus:
        """Cut the connections of a SPIFFE id and let it in no more."""
        return _parse(await self._ask({"op": "revoke", "identity": identity}))

    async def trust(self, domains: Sequence[str]) -> CacheStatus:
        """Say whom to believe: all trust domains, each as `DomainTrust.to_json`."""
        return _parse(await self._ask({"op": "trust", "domains": list(domains)}))

    async def discard(self) -> None:
        """Ask the process to end as `stop` does, and to remove its ring."""
        await self._ask({"op": "discard"})

    async def stop(self) -> None:
        """Ask the process to end: at once after ENDED, else as SIGTERM does."""
        await self._ask({"op": "stop"})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is left open between calls."""

    async def _ask(self, question: dict[str, Any]) -> bytes:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                reader, writer = await self._open()
                try:
                    writer.write(_line(question))
                    answer = await self._read_line(reader)
                finally:
                    writer.close()
        except TimeoutError as error:
            raise self._failed(f"it says nothing for {_ANSWER_TIMEOUT:g} s") from error
        if not answer:
            raise self._failed("it closed the control connection")
        return answer

    async def _read_line(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readline()
        except (OSError, ValueError) as error:
            # ValueError: a line longer than the limit.
            raise self._failed(str(error)) from error

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await self._door.open()
        except (OSError, BeamwireError) as error:
            raise self._failed(str(error)) from error

    def _failed(self, why: str) -> BeamwireError:
        return BeamwireError(Reason.CACHE_FAILED, f"the cache in {self._door} does not answer: {why}")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes) -> CacheStatus:
    try:
        document = json.loads(line)
        if isinstance(document, dict) and "error" in document:
            raise BeamwireError(Reason.INVALID_FIELD, str(document["error"]))
        return CacheStatus.model_validate(document)
    except (ValueError, ValidationError) as error:
        raise BeamwireError(Reason.CACHE_FAILED, f"the cache answered something else: {error}") from error
