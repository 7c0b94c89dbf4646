"""One process's part of a run: events in, messages out, and an account of every event that was selected."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from beamwire.common.v1 import account_pb2
from beamwire.mesh import contracts
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import (
    Batch,
    FieldSpec,
    Handler,
    Message,
    Serializer,
    SourceContext,
    Stage,
    StreamInfo,
)
from beamwire.services.streamer.config import ROOT, HandlerPart, StreamerConfig, located
from beamwire.services.streamer.handlers.buffer import to_messages
from beamwire.services.streamer.handlers.lanes import Handlers
from beamwire.services.streamer.parallel import Ranks
from beamwire.services.streamer.reading import Reader, Reading, Shaper
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.stopping import CancelledError, Stop

if TYPE_CHECKING:
    from beamwire.mesh.identity.credentials import Credentials

PROGRESS_PERIOD = 2.0
"""Seconds between two lines of progress, at least."""


@dataclass(slots=True)
class Account:
    """Events of this process: selected = sent + incomplete + vetoed + not_read, when it has ended."""

    expected: int = 0
    read: int = 0
    sent: int = 0
    incomplete: int = 0
    vetoed: int = 0

    @property
    def unaccounted(self) -> int:
        """Selected events that nothing is known of yet."""
        return max(self.expected, self.read) - self.sent - self.incomplete - self.vetoed


class Pipeline:
    """Source, stages, serializer and handlers of one process."""

    def __init__(
        self, config: StreamerConfig, ranks: Ranks, stop: Stop, credentials: Callable[[], Credentials]
    ) -> None:
        """Opens the source, agrees with the other ranks on the fields, and opens the handlers."""
        self._config = config
        self._stop = stop
        self._share = ranks.share
        self._reader = Reader(
            config, SourceContext(config.source_identifier, ranks.share, config.max_events, stop.pause)
        )
        fields = _agreed(ranks.gather(self._reader.fields()))
        if not fields:
            self._reader.check_known()
        self._shaper = Shaper(fields, config.optional)
        self._stages, self._serializer, fields = prepare(config, fields)
        expected = self._reader.source.expected_event_count
        self.account = Account(expected=len(ranks.share.of(expected)))
        self._info = StreamInfo(ranks.share, fields, expected, self._attributes(), config.data_serializer.type)
        self._handlers = Handlers(
            [
                (_handler(part, credentials), part.pace, f"{part.path} ({part.type})")
                for part in without_replaced(config.data_handlers)
            ]
        )
        self._progress = Progress(expected if ranks.share.rank == 0 else None, ranks.share.size)

    def run(self) -> Account:
        """Streams everything, and ends the stream whatever happens.

        Raises CancelledError if told to end; what a component raises, after END(FAILED) was sent where it can be.
        """
        with self._ending():
            self._handlers.open(self._info)
            self._hand(self._serializer.begin(self._info))
            for reading in self._reader:
                self._stop_if_told()
                self._take(reading)
            self._stop_if_told()
            self._send(flushed(self._stages))
            self._hand(self._serializer.end())
            self._veto()
        return replace(self.account)

    def _take(self, reading: Reading) -> None:
        self.account.read += 1
        if reading.missing:
            if not self._config.skip_incomplete_events:
                raise BeamwireError(
                    Reason.PRODUCER_FAILED,
                    f"event {reading.event.id} has no {', '.join(reading.missing)}; set skip_incomplete_events: true "
                    "to leave such events out, or required: false to send them without",
                )
            self.account.incomplete += 1
            self._handlers.skip(account_pb2.LOSS_CAUSE_INCOMPLETE, 1)
        else:
            self._send(through(self._stages, self._shaper.shape(reading)))
            self._veto()
        self._progress.show(self.account)

    def _send(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._hand(self._serializer.serialize(batch))

    def _hand(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._handlers.send(message)
            self.account.sent += len(message.event_ids)

    def _veto(self) -> None:
        """Stages count what they drop; handlers are told the difference."""
        if fresh := sum(stage.vetoed for stage in self._stages) - self.account.vetoed:
            self.account.vetoed += fresh
            self._handlers.skip(account_pb2.LOSS_CAUSE_VETOED, fresh)

    def _stop_if_told(self) -> None:
        if self._stop.requested:
            raise CancelledError

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
            self._check_account()
            self._handlers.end(account_pb2.END_CAUSE_DONE)
            for name, count in self._handlers.dropped.items():
                say(f"rank {self._share.rank}: {name} did not keep up and lost {count} events")
        except CancelledError:
            self._end_badly(account_pb2.END_CAUSE_CANCELLED, "the streamer was told to end")
            raise
        except Exception as error:
            self._end_badly(account_pb2.END_CAUSE_FAILED, f"rank {self._share.rank}: {one_line(error)}")
            raise
        finally:
            self._reader.close()

    def _check_account(self) -> None:
        if self.account.unaccounted:
            raise BeamwireError(
                Reason.PRODUCER_FAILED,
                f"nobody knows what became of {self.account.unaccounted} of the events of this process",
            )

    def _end_badly(self, cause: account_pb2.EndCause.ValueType, detail: str) -> None:
        """The error that ended the run is the one to report, so others that follow from it are only shown."""
        with suppress(Exception):
            # A handler that has failed takes nothing; it is told of the end all the same.
            self._veto()
            self._handlers.skip(account_pb2.LOSS_CAUSE_NOT_READ, self.account.unaccounted)
        try:
            self._handlers.end(cause, detail)
        except Exception as error:
            say(f"rank {self._share.rank}: the end of the stream could not be sent: {one_line(error)}")

    def _attributes(self) -> dict[str, str]:
        attributes = {
            "source_identifier": self._config.source_identifier,
            "event_source": self._config.event_source.type,
        }
        return attributes | dict(self._reader.source.attributes)


def prepare(
    config: StreamerConfig, fields: tuple[FieldSpec, ...]
) -> tuple[list[Stage], Serializer, tuple[FieldSpec, ...]]:
    """The stages and the serializer for events that look like this, and what the batches look like behind them.

    Raises BeamwireError INVALID_FIELD, naming the component, if they do not fit together or not to the consumer.
    """
    stages: list[Stage] = []
    for part in config.processing_pipeline:
        with located(part.path):
            stages.append(part.component(part.parameters))
            fields = tuple(stages[-1].fields(fields))
    part = config.data_serializer
    with located(part.path):
        for name in getattr(part.parameters, "fields", None) or {}:
            known = [spec.name for spec in fields]
            if name not in known:
                raise invalid_field(f"fields.{name}", f"there is no array of this name; {nearest(name, known)}")
        serializer: Serializer = part.component(part.parameters)
        serializer.check(fields)
    if config.consumer and (problems := contracts.problems(config.consumer, to_messages(fields))):
        raise invalid_field(f"{ROOT}.consumer", f"{config.consumer} cannot use this: {'; '.join(problems)}")
    return stages, serializer, fields


def _handler(part: HandlerPart, credentials: Callable[[], Credentials]) -> Handler:
    with located(part.path):
        handler: Handler = part.component(part.parameters, credentials)
        return handler


class Progress:
    """Lines for a person, of one rank."""

    def __init__(self, expected: int | None, size: int) -> None:
        self._expected = expected
        self._size = size
        self._start = self._last = time.monotonic()

    def show(self, account: Account) -> None:
        """Says how far it is, once in a while."""
        now = time.monotonic()
        if self._expected is None or now - self._last < PROGRESS_PERIOD:
            return
        self._last = now
        total = f" of {account.expected}" if self._expected else ""
        ranks = f" (rank 0 of {self._size})" if self._size > 1 else ""
        rate = account.read / (now - self._start)
        say(f"{account.read}{total} events read{ranks}, {account.incomplete} incomplete, {rate:.0f} events/s")


def say(text: str) -> None:
    """One line to standard error; nothing if there is no room for it, which is no reason to stop."""
    with suppress(OSError):
        sys.stderr.write(f"beamwire-streamer: {text}\n")
        sys.stderr.flush()


def one_line(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, BeamwireError) else f"{type(error).__name__}: {text}"


def through(stages: Sequence[Stage], batch: Batch) -> Iterator[Batch]:
    """What comes out behind the stages when a batch goes in; one without events goes no further."""
    if not len(batch.event_ids):
        return
    if not stages:
        yield batch
        return
    for out in stages[0].push(batch):
        yield from through(stages[1:], out)


def flushed(stages: Sequence[Stage]) -> Iterator[Batch]:
    """What the stages still hold, through those behind them."""
    for place, stage in enumerate(stages):
        for batch in stage.flush():
            yield from through(stages[place + 1 :], batch)


def without_replaced(parts: Sequence[HandlerPart]) -> list[HandlerPart]:
    """A handler may name another that takes its place where both are asked for."""
    types = {part.type for part in parts}
    return [part for part in parts if getattr(part.component, "replaced_by", "") not in types]


def _agreed(found: Sequence[tuple[FieldSpec, ...]]) -> tuple[FieldSpec, ...]:
    """The fields that all ranks found; a rank without a complete event takes those of the others."""
    known = [(rank, fields) for rank, fields in enumerate(found) if fields]
    for rank, fields in known[1:]:
        if fields != known[0][1]:
            raise BeamwireError(
                Reason.PRODUCER_FAILED,
                f"the ranks disagree on what an event looks like: rank {known[0][0]} found {known[0][1]}, "
                f"rank {rank} found {fields}",
            )
    return known[0][1] if known else ()
