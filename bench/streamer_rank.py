"""One rank of a contestant of the streamer suite: `python -m mpi4py -m bench.streamer_rank JOB`.

Everything is opened before the clock starts: it starts at the first event, when every rank has come so far, and stops
when the last event is written or the buffer has it. Rank 0 prints what all of them found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from beamwire.mesh.identity.credentials import Credentials
from beamwire.services.streamer import config as configuration
from beamwire.services.streamer.components import Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.config import Part
from beamwire.services.streamer.parallel import Ranks, ranks
from beamwire.services.streamer.pipeline import Pipeline
from beamwire.services.streamer.stopping import Stop
from bench.streamer_plain import prepare

RESULT: Final = "streamer_rank result: "
"""What stands before the result: libraries write to stdout too."""


@dataclass(frozen=True)
class Job:
    """What the ranks do: as which contestant, and the configuration of the streamer, which the others do by hand."""

    contestant: str
    config: dict[str, Any]
    files: list[str]

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))


class Took(NamedTuple):
    """What one rank did: when its clock started and stopped, in ns of the monotonic clock, and its events between."""

    begin: int
    end: int
    events: int


class Stopwatch:
    """A stage in front of all others that notes when the first event of all ranks has come. It changes nothing."""

    vetoed = 0

    def __init__(self, all_ranks: Ranks) -> None:
        self._ranks = all_ranks
        self.begin = 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """As they are."""
        return fields

    def push(self, batch: Batch) -> Iterable[Batch]:
        """As it is."""
        if not self.begin:
            self.begin = start(self._ranks)
        return (batch,)

    def flush(self) -> Iterable[Batch]:
        """Nothing is kept."""
        return ()


def start(all_ranks: Ranks) -> int:
    """The time when every rank has come here."""
    all_ranks.gather(None)
    return time.monotonic_ns()


def main() -> None:
    """Does the job of this rank."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    all_ranks = ranks()
    found = all_ranks.gather(_streamed(job, all_ranks) if job.contestant == "ours" else _by_hand(job, all_ranks))
    if all_ranks.share.rank == 0:
        print(RESULT + json.dumps(found))


def _streamed(job: Job, all_ranks: Ranks) -> Took:
    watch = Stopwatch(all_ranks)
    config = configuration.load(job.config)
    part = Part("Stopwatch", lambda _: watch, ComponentParameters(), "bench")
    config = replace(config, processing_pipeline=[part, *config.processing_pipeline])
    account = Pipeline(config, all_ranks, Stop(), _no_credentials).run()
    return Took(watch.begin, time.monotonic_ns(), account.sent)


def _no_credentials() -> Credentials:
    raise ValueError("the caches of this suite are reached without TLS")


def _by_hand(job: Job, all_ranks: Ranks) -> Took:
    task = prepare(job.contestant, job.config, job.files, all_ranks.share)
    begin = start(all_ranks)
    events = task()
    return Took(begin, time.monotonic_ns(), events)


if __name__ == "__main__":
    main()
