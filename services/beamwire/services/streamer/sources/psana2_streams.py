"""The streams of a run of psana2, each a file with its small data, and the merging of their datagrams by timestamp."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import SourceContext, no_pause
from beamwire.services.streamer.sources import smalldata
from beamwire.services.streamer.sources.smalldata import Datagrams, XtcFile
from beamwire.services.streamer.stopping import CancelledError

BLOCK = 65_536
"""Datagrams of a stream that are looked at before they are merged with those of the others."""

POLL = 0.1
"""Seconds between two looks at a file that is being written."""

ABSENT = -1


class Patience:
    """Waits for a run that is still being written, until it is silent for too long or we are told to end."""

    def __init__(self, context: SourceContext, silence: float) -> None:
        self._pause: Callable[[float], None] = context.pause
        self._silence = silence
        self._since: float | None = None

    def progress(self) -> None:
        """Something came."""
        self._since = None

    def wait(self, what: str) -> None:
        """Waits a moment for something. Raises BeamwireError PRODUCER_FAILED if nothing came for too long."""
        now = time.monotonic()
        # What counts is how long we have been looking, not how long the batch before kept us.
        self._since = self._since or now
        if now - self._since > self._silence:
            raise BeamwireError(
                Reason.PRODUCER_FAILED,
                f"the run was silent for {self._silence:g} s and has not ended: no {what} came; everything that was "
                "complete has been read. Is it still being taken? live_silence says how long to wait",
            )
        if self._pause is no_pause:
            time.sleep(POLL)
            return
        self._pause(now + POLL)
        if time.monotonic() < now + POLL:
            raise CancelledError


class StreamFiles(NamedTuple):
    """The files of one stream: those whose headers are read (small data, or the big ones themselves), and the big one
    that small data speaks of."""

    name: str
    headers: tuple[Path, ...]
    big: Path | None = None


class Stream:
    """One stream: finds its datagrams, and reads them."""

    def __init__(self, files: StreamFiles, patience: Patience | None = None) -> None:
        """Opens the files; with patience they may still be written."""
        self.name = files.name
        self.pending = Datagrams.none()
        self.last = 0
        self.ended = False
        self._run_ended = False
        self._patience = patience
        self._number = 0
        self._headers = [XtcFile(path) for path in files.headers]
        self._big = XtcFile(files.big) if files.big else None
        self._chunk = 0
        self._config: Any = None

    @property
    def config(self) -> Any:
        """The Configure datagram, which the others are read with."""
        if self._config is None:
            self._config = _dgram(view=self._first())
        return self._config

    def grow(self) -> bool:
        """Looks for more datagrams; whether there are. `ended` says that no more will come."""
        found = Datagrams.none()
        while not len(found.services) and not self.ended:
            found = self._headers[self._number].scan(self._number, BLOCK)
            if not len(found.services):
                if self._patience and self._number == len(self._headers) - 1:
                    return False
                self._next_file()
            elif self._number:
                # Each file of a stream begins again with these.
                found = found.part((found.services != smalldata.CONFIGURE) & (found.services != smalldata.BEGIN_RUN))
        if len(found.services):
            self._check(found)
            self.last = int(found.timestamps[-1])
            self.pending = self.pending.followed_by(found)
        return bool(len(found.services))

    def take(self, bound: int) -> Datagrams:
        """The pending datagrams up to and with a timestamp."""
        count = int(np.searchsorted(self.pending.timestamps, np.uint64(bound), side="right"))
        taken, self.pending = self.pending.part(slice(count)), self.pending.part(slice(count, None))
        return taken

    def read(self, place: npt.NDArray[np.int64], timestamp: int) -> Any:
        """The datagram with its data: an event from the big file, if there is small data.

        Raises BeamwireError PRODUCER_FAILED if it is not there.
        """
        number, offset, size = place.tolist()
        found = _dgram(config=self.config, view=self._headers[number].read(offset, size))
        if self._big and found.service() in smalldata.EVENTS:
            info = found.smdinfo[0].offsetAlg
            data = self._whole(info.intOffset, info.intDgramSize, timestamp)
            # psana does not survive to read what is no datagram.
            if smalldata.stamp_and_size(data) != (timestamp, len(data)):
                self._lost(timestamp, "another is in its place; are small data and big file of the same run?")
            found = _dgram(config=self.config, view=data)
        if self._big and found.service() == smalldata.ENABLE:
            self._next_chunk(found)
        return found

    def close(self) -> None:
        """Closes the files."""
        for file in [*self._headers, *([self._big] if self._big else [])]:
            file.close()

    def _first(self) -> bytes:
        while not self.last and not self.grow():
            if not self._patience:
                raise smalldata.not_found(f"{self._headers[0].path} holds no datagram")
            self._patience.wait(f"Configure in {self._headers[0].path}")
        if int(self.pending.services[0]) != smalldata.CONFIGURE:
            raise smalldata.not_found(f"{self._headers[0].path} does not begin with a Configure; is it xtc2?")
        _, offset, size = self.pending.places[0].tolist()
        return self._headers[0].read(offset, size)

    def _next_file(self) -> None:
        if self._headers[self._number].rest:
            raise smalldata.not_found(
                f"{self._headers[self._number].path} ends in the middle of a datagram; is it still being written? "
                "live=True waits for the rest"
            )
        self._number += 1
        self.ended = self._number == len(self._headers)
        self._number = min(self._number, len(self._headers) - 1)

    def _check(self, found: Datagrams) -> None:
        path = self._headers[self._number].path
        known = np.concatenate([np.array([self.last], dtype=np.uint64), found.timestamps])
        if np.any(known[1:] <= known[:-1]):
            raise BeamwireError(Reason.PRODUCER_FAILED, f"the timestamps of {path} do not ascend")
        ends = np.flatnonzero(found.services == smalldata.END_RUN)
        behind = found.services if self._run_ended else found.services[ends[0] :] if len(ends) else ends
        if np.isin(behind, smalldata.EVENTS).any():
            raise smalldata.invalid(f"{path} holds events behind the end of its run", Reason.UNSUPPORTED)
        self._run_ended = self._run_ended or len(ends) > 0
        # Of a file that is complete the rest is looked at, too.
        self.ended = self.ended or (self._run_ended and self._patience is not None)

    def _whole(self, offset: int, size: int, timestamp: int) -> bytes:
        assert self._big is not None
        data = self._big.read(offset, size)
        while len(data) < size:
            if self._patience is None:
                self._lost(timestamp, f"it ends {size - len(data)} bytes too soon")
            self._patience.wait(f"data of the event at {timestamp} in {self._big.path}")
            if more := self._big.read(offset + len(data), size - len(data)):
                self._patience.progress()
                data += more
        return data

    def _next_chunk(self, enable: Any) -> None:
        """The DAQ goes on in another big file where an Enable says so."""
        for segment in getattr(enable, "chunkinfo", {}).values():
            number, name = segment.chunkinfo.chunkid, segment.chunkinfo.filename
            if number > self._chunk:
                assert self._big is not None
                path = self._big.path.with_name(name)
                self._big.close()
                self._big = XtcFile(path)
                self._chunk = number
                return

    def _lost(self, timestamp: int, why: str) -> NoReturn:
        path = self._big.path if self._big else self._headers[0].path
        raise BeamwireError(Reason.PRODUCER_FAILED, f"{path} does not hold the event at timestamp {timestamp}: {why}")


def _dgram(**arguments: Any) -> Any:
    return importlib.import_module("psana.dgram").Dgram(**arguments)


class Group(NamedTuple):
    """What all streams have at one timestamp: rows of places, (streams, 3), a file of ABSENT where one has nothing."""

    timestamp: int
    service: int
    places: npt.NDArray[np.int64]

    @property
    def is_event(self) -> bool:
        """Whether it is an event, not a transition."""
        return self.service in smalldata.EVENTS


def groups(streams: Sequence[Stream], patience: Patience | None = None) -> Iterator[Group]:
    """Everything in these streams by ascending timestamp, each timestamp once.

    A timestamp is given when every stream has gone past it or has ended. Raises what `Stream.grow` raises, and what
    `patience` raises if nothing more comes.
    """
    while True:
        for stream in streams:
            if not stream.ended and not len(stream.pending.services):
                stream.grow()
        going = [stream.last for stream in streams if not stream.ended]
        taken = [stream.take(min(going, default=2**64 - 1)) for stream in streams]
        if any(len(part.services) for part in taken):
            if patience:
                patience.progress()
            yield from _merged(taken)
        elif not going and not any(len(stream.pending.services) for stream in streams):
            return
        elif patience:
            patience.wait("EndRun")


def _merged(parts: Sequence[Datagrams]) -> Iterator[Group]:
    timestamps = np.unique(np.concatenate([part.timestamps for part in parts]))
    services = np.zeros(len(timestamps), dtype=np.uint8)
    places = np.full((len(timestamps), len(parts), 3), ABSENT, dtype=np.int64)
    for number, part in enumerate(parts):
        rows = np.searchsorted(timestamps, part.timestamps)
        services[rows] = part.services
        places[rows, number] = part.places
    for row, (timestamp, service) in enumerate(zip(timestamps.tolist(), services.tolist(), strict=True)):
        yield Group(timestamp, service, places[row])
