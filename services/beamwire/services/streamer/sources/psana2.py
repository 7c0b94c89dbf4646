"""LCLS-II runs through psana2: what a source identifier says, which events there are, and which of them are ours.

Every rank opens the run by itself, finds all events from the headers of the datagrams, and reads its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from beamwire.mesh.errors import Reason
from beamwire.services.streamer.components import ComponentParameters, Event, SourceContext
from beamwire.services.streamer.named import Dataset, directory, experiment, file
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources import psana2_constants, psana2_files
from beamwire.services.streamer.sources.files import FIELD
from beamwire.services.streamer.sources.psana2_run import OpenRun, import_psana
from beamwire.services.streamer.sources.psana2_streams import Patience, Stream, StreamFiles, groups
from beamwire.services.streamer.sources.smalldata import invalid

__all__ = ["Identifier", "Psana2EventSource", "import_psana", "parse_identifier"]

_NOT_HERE = {
    "drp": "reading inside the DAQ (drp=) needs the DAQ's own processes and memory",
    "shmem": "the DAQ's shared memory (shmem=) is on the machines of the DAQ only",
}
_OTHERWISE = "; live=True with exp=, run= and dir= follows the files of a run while it is written"


def _runs(value: str) -> list[int] | str:
    """`1-3` and `1,2` are runs; what is neither is left for pydantic to refuse."""
    found: list[int] = []
    for part in value.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) < int(first):
            return value
        found += range(int(first), int(last or first) + 1)
    return found


class Identifier(BaseModel):
    """What `exp=tmoc00118,run=222,dir=…` or `files=…,…` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    exp: str = ""
    run: Annotated[list[int], BeforeValidator(_runs)] = Field(default_factory=list[int])
    dir: Path | None = None
    files: Annotated[list[Path], BeforeValidator(lambda value: value.split(","))] = Field(default_factory=list[Path])
    live: bool = False
    max_events: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 1000
    """A setting of psana's own readers, accepted and of no effect."""


def parse_identifier(text: str) -> Identifier:
    """Reads a source identifier of psana2: keys and values joined by commas; a part without `=` goes on with the value
    before, so that `run=1,2` and `files=a,b` are lists.

    Raises BeamwireError INVALID_FIELD, or UNSUPPORTED for `drp` and `shmem`.
    """
    values = _pairs(text)
    for key, why in _NOT_HERE.items():
        if values.pop(key, "False").lower() not in ("false", "0"):
            raise invalid(why + _OTHERWISE, Reason.UNSUPPORTED)
    for key in values:
        if key not in Identifier.model_fields:
            raise invalid(f"{key!r} is not a part of it; {nearest(key, Identifier.model_fields)}")
    try:
        identifier = Identifier.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        hint = "; runs are written 3, 1-3 or 1,2" if detail["loc"][0] == "run" else ""
        raise invalid(f"{detail['loc'][0]}: {detail['msg'].lower()} (it is {detail['input']!r}){hint}") from None
    _check(identifier)
    return identifier


def _pairs(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    last = ""
    for part in (part.strip() for part in text.split(",")):
        key, equals, value = part.partition("=")
        if equals:
            last = key.strip()
            if last in values:
                raise invalid(f"{last}= is there twice")
            values[last] = value.strip()
        elif part and last in ("run", "files"):
            values[last] += f",{part}"
        elif part:
            raise invalid(f"{part!r} is no key=value")
    return values


def _check(identifier: Identifier) -> None:
    if bool(identifier.files) == bool(identifier.exp):
        raise invalid("must have either exp= and run=, or files=")
    if identifier.exp and not identifier.run:
        raise invalid("exp= needs run=")
    if len(set(identifier.run)) < len(identifier.run):
        raise invalid("run= names a run twice")
    if identifier.live and len(identifier.run) > 1:
        raise invalid("live=True follows one run")


class Psana2EventSource:
    """Reads the runs that the source identifier names; the id of an event is its timestamp."""

    class Parameters(ComponentParameters):
        """Constants of a file instead of the calibration database, and for how many seconds nothing may come from a
        run that is being written."""

        calibration: Path | None = None
        live_silence: Annotated[float, Field(gt=0)] = 60.0

    @staticmethod
    def datasets(parameters: Psana2EventSource.Parameters, identifier: str) -> Iterator[Dataset]:
        """The experiment, or the files or the directory that the source identifier names instead."""
        del parameters
        named = parse_identifier(identifier)
        for path in named.files:
            yield file(FIELD, path)
        if named.exp:
            runs = [f"{experiment(FIELD, named.exp).named.removeprefix('exp:')}-r{run:04d}-s*" for run in named.run]
            patterns = [*runs, *(f"smalldata/{run}" for run in runs)]
            yield directory(FIELD, named.dir, *patterns) if named.dir else experiment(FIELD, named.exp)

    def __init__(self, parameters: Psana2EventSource.Parameters, context: SourceContext) -> None:
        self.context = context
        self.identifier = parse_identifier(context.source_identifier)
        self._constants = psana2_constants.load(parameters.calibration) if parameters.calibration else None
        import_psana()
        self._patience = Patience(context, parameters.live_silence) if self.identifier.live else None
        self._files = self._find()
        limits = [limit for limit in (context.max_events, self.identifier.max_events) if limit]
        self._limit = min(limits, default=0)
        self.expected_event_count = 0 if self._patience else self._count()
        self.run = self._open(0)
        info = self.run.psana
        runs = ",".join(map(str, self.identifier.run)) or str(info.runnum)
        self.attributes: Mapping[str, str] = {"exp": str(info.expt or ""), "run": runs}

    def events(self) -> Iterator[Event]:
        """The events of this share by ascending timestamp, run by run.

        Raises BeamwireError PRODUCER_FAILED if one of them cannot be read.
        """
        share, count = self.context.share, 0
        for number in range(len(self._files)):
            if number:
                self.run.close()
                self.run = self._open(number)
            for group in self.run.groups():
                if not group.is_event:
                    self.run.replay(group)
                    continue
                if count % share.size == share.rank:
                    yield Event(group.timestamp, self.run.shot(group))
                count += 1
                if count == self._limit:
                    return

    def close(self) -> None:
        """Closes the files."""
        self.run.close()

    def _find(self) -> list[list[StreamFiles]]:
        """The streams of each run."""
        identifier = self.identifier
        if identifier.files:
            return [psana2_files.of_files(identifier.files, self._patience)]
        directory = psana2_files.directory_of(identifier.exp, identifier.dir)
        return [psana2_files.of_run(identifier.exp, run, directory, self._patience) for run in identifier.run]

    def _count(self) -> int:
        """Events of all runs, up to the limit."""
        count = 0
        for files in self._files:
            streams = [Stream(each) for each in files]
            try:
                for group in groups(streams):
                    count += group.is_event
                    if count and count == self._limit:
                        return count
            finally:
                for stream in streams:
                    stream.close()
        return count

    def _open(self, number: int) -> OpenRun:
        # A run that was named by its place is read without the facility's database.
        here = bool(self.identifier.files or self.identifier.dir)
        return OpenRun(
            self._files[number], self._patience, self._constants, ask_database=not here and self._constants is None
        )
