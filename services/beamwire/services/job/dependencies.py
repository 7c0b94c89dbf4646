"""What a job waits for before it is given to a backend: to be let go, files, other jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.store import Store
from beamwire.services.job.model import Dependency, JobRecord, JobState

# Names of missing files that a reason lists.
NAMED_FILES = 5


class Obstacles:
    """What still keeps one job from being started."""

    def __init__(self, store: Store[JobRecord], name: str) -> None:
        self._store = store
        self._name = name

    async def watch(self) -> AsyncGenerator[str, None]:
        """Yield what the job waits for, after each change that may change it; ends when that is nothing any more.

        Raises:
            BeamwireError: DEPENDENCY_FAILED if a job that must come first can never come to what it must.
        """
        record = await self._store.require(self._name)
        watched = [self._name, *(dependency.job for dependency in _first(record))]
        async with _changes(self._store, watched) as changed:
            while True:
                changed.clear()
                record = await self._store.require(self._name)
                waits = [*own_obstacles(record), *[text async for text in self._others(record)]]
                if not waits:
                    return
                yield "waits " + ", and ".join(waits)
                await changed.wait()

    async def _others(self, record: JobRecord) -> AsyncIterator[str]:
        for dependency in _first(record):
            other = await self._store.get(dependency.job)
            if other is None:
                raise _never(dependency, "does not exist any more")
            if not _fulfilled(dependency, other):
                if other.ended:
                    raise _never(dependency, f"is {other.state}")
                yield f"for {dependency.job} to be {dependency.condition}"


def own_obstacles(record: JobRecord) -> list[str]:
    """Return what a job waits for besides other jobs."""
    waits = ["to be started"] if record.spec.hold and not record.released else []
    missing = [file.path for file in record.spec.input_files if file.path not in record.uploaded]
    if missing:
        rest = f" and {len(missing) - NAMED_FILES} more" if len(missing) > NAMED_FILES else ""
        waits.append(f"for the upload of {', '.join(missing[:NAMED_FILES])}{rest}")
    return waits


def _first(record: JobRecord) -> tuple[Dependency, ...]:
    """The jobs that must come first: before the job itself, not before it is run once more."""
    return record.spec.dependencies if record.step.number == 1 else ()


def _fulfilled(dependency: Dependency, other: JobRecord) -> bool:
    if dependency.condition == "ACTIVE":
        return other.state == JobState.ACTIVE or other.step.start_time is not None
    return other.ended if dependency.condition == "ENDED" else other.state == JobState.COMPLETED


def _never(dependency: Dependency, why: str) -> BeamwireError:
    return BeamwireError(
        Reason.DEPENDENCY_FAILED,
        f"{dependency.job} {why}, and it had to be {dependency.condition} first",
        metadata={"job": dependency.job},
    )


@asynccontextmanager
async def _changes(store: Store[JobRecord], names: Sequence[str]) -> AsyncIterator[asyncio.Event]:
    """An event that is set when one of some records has changed, or is gone."""
    changed = asyncio.Event()

    async def follow(name: str) -> None:
        async with aclosing(store.watch(name)) as versions:
            async for _ in versions:
                changed.set()
        changed.set()

    tasks = [asyncio.create_task(follow(name), name=f"watching {name}") for name in names]
    try:
        yield changed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
