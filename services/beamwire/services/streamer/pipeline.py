"""One process's part of a run: events in, messages out, and an account of every event that was selected."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from beamwire.common.v1 import account_pb2
from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason
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
from beamwire.services.streamer.config import Part, StreamerConfig
from beamwire.services.streamer.parallel import Ranks
from beamwire.services.streamer.reading import Reader, Reading, Shaper
from beamwire.services.streamer.stopping import Stop

PROGRESS_PERIOD = 2.0
"""Seconds between two lines of progress, at least."""


class CancelledError(Exception):
    """We were told to end."""


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
        self._shaper = Shaper(fields, config.optional)
        self._stages: list[Stage] = [part.component(part.parameters) for part in config.processing_pipeline]
        for stage in self._stages:
            fields = tuple(stage.fields(fields))
        serializer = config.data_serializer
        self._serializer: Serializer = serializer.component(serializer.parameters)
        self._serializer.check(fields)
        expected = self._reader.source.expected_event_count
        self.account = Account(expected=len(ranks.share.of(expected)))
        self._info = StreamInfo(ranks.share, fields, expected, self._attributes(), serializer.type)
        self._handlers: list[Handler] = [
            part.component(part.parameters, credentials) for part in _not_replaced(config.data_handlers)
        ]
        self._progress = Progress(expected if ranks.share.rank == 0 else None, ranks.share.size)

    def run(self) -> Account:
        """Streams everything, and ends the stream whatever happens.

        Raises CancelledError if told to end; what a component raises, after END(FAILED) was sent where it can be.
        """
        with self._ending():
            for handler in self._handlers:
                handler.open(self._info)
            self._hand(self._serializer.begin(self._info))
            for reading in self._reader:
                self._stop_if_told()
                self._take(reading)
            self._stop_if_told()
            self._send(self._flushed())
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
            self._skip(account_pb2.LOSS_CAUSE_INCOMPLETE, 1)
        else:
            self._send(_through(self._stages, self._shaper.shape(reading)))
            self._veto()
        self._progress.show(self.account)

    def _send(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._hand(self._serializer.serialize(batch))

    def _hand(self, messages: Iterable[Message]) -> None:
        for message in messages:
            for handler in self._handlers:
                handler.send(message)
            self.account.sent += len(message.event_ids)

    def _flushed(self) -> Iterator[Batch]:
        for place, stage in enumerate(self._stages):
            for batch in stage.flush():
                yield from _through(self._stages[place + 1 :], batch)

    def _veto(self) -> None:
        """Stages count what they drop; handlers are told the difference."""
        if fresh := sum(stage.vetoed for stage in self._stages) - self.account.vetoed:
            self.account.vetoed += fresh
            self._skip(account_pb2.LOSS_CAUSE_VETOED, fresh)

    def _skip(self, cause: account_pb2.LossCause.ValueType, count: int) -> None:
        for handler in self._handlers:
            handler.skip(cause, count)

    def _stop_if_told(self) -> None:
        if self._stop.requested:
            raise CancelledError

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
            self._check_account()
            self._end(account_pb2.END_CAUSE_DONE)
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

    def _end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        for handler in self._handlers:
            handler.end(cause, detail)

    def _end_badly(self, cause: account_pb2.EndCause.ValueType, detail: str) -> None:
        """The error that ended the run is the one to report, so others that follow from it are only shown."""
        for handler in self._handlers:
            try:
                handler.skip(account_pb2.LOSS_CAUSE_NOT_READ, self.account.unaccounted)
                handler.end(cause, detail)
            except Exception as error:
                say(f"rank {self._share.rank}: the end of the stream could not be sent: {one_line(error)}")

    def _attributes(self) -> dict[str, str]:
        attributes = {
            "source_identifier": self._config.source_identifier,
            "event_source": self._config.event_source.type,
        }
        return attributes | dict(self._reader.source.attributes)


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
    """One line to standard error."""
    sys.stderr.write(f"beamwire-streamer: {text}\n")
    sys.stderr.flush()


def one_line(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, BeamwireError) else f"{type(error).__name__}: {text}"


def _through(stages: Sequence[Stage], batch: Batch) -> Iterator[Batch]:
    if not stages:
        yield batch
        return
    for out in stages[0].push(batch):
        yield from _through(stages[1:], out)


def _not_replaced(parts: Sequence[Part]) -> list[Part]:
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
