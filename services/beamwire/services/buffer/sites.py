"""Where one cache runs: what a site of caches must be able to do, and the one on the host of the service."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.processes import Process, launch
from beamwire.mesh.spares import ShimSpare, Spares
from beamwire.services.buffer.cache.journal import JOURNAL_FILE
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.services.buffer.model import BufferRecord, BufferSpec
from beamwire.services.buffer.placement import Placement, Rings, write_configuration
from beamwire.services.buffer.remains import final_status, last_words

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0
# The cache drains on SIGTERM for a while before it gives up by itself.
STOP_GRACE = 15.0

# Mints a join token for a cache, for an identity and the names it may serve under.
Minter = Callable[[str, tuple[str, ...]], Awaitable[str]]


class Life(Protocol):
    """One life of a cache, from its start to its death."""

    async def control(self) -> CacheControl:
        """Wait until the cache answers. TIMED_OUT if it should and does not."""
        ...

    async def ended(self) -> str:
        """Wait until nothing of it runs any more; how it ended."""
        ...

    async def alive(self) -> bool:
        """Whether it may still run."""
        ...

    async def stop(self) -> None:
        """End it, and wait for its end."""
        ...


class Site(Protocol):
    """Where one cache of a buffer runs."""

    @property
    def distant(self) -> bool:
        """Whether a connection to it may break while it lives."""
        ...

    @property
    def job(self) -> str:
        """The job that it runs in, `jobs/{job}`; empty on this host."""
        ...

    def ring(self, record: BufferRecord) -> str:
        """Return the file that shall hold its frames and outlive it; empty for memory of its own."""
        ...

    async def find(self) -> Life | None:
        """Return the cache that was started before, whether it still runs or not; None if there is none."""
        ...

    async def start(self, record: BufferRecord) -> Life:
        """Start it as the record says, on what one before it left."""
        ...

    def death(self, how: str) -> BeamwireError:
        """Return the CACHE_FAILED that tells of its end."""
        ...

    async def remains(self, seen: CacheStatus | None) -> CacheStatus:
        """Return the last word about a cache that is gone, which was `seen` so; what it held is lost."""
        ...


@dataclass(frozen=True)
class LocalSite:
    """A directory on this host.

    Args:
        name: of the buffer.
        number: of the cache among those of the buffer.
        directory: the cache's own.
        trust_domain: the domain the cache is a member of.
        placement: what the facility says of caches.
        rings: where frames are.
        mint: mints a join token for the cache.
        spares: interpreters that are kept ready for caches.
    """

    name: str
    number: int
    directory: Path
    trust_domain: str
    placement: Placement
    rings: Rings
    mint: Minter
    spares: Spares[ShimSpare] | None = None
    distant: bool = False
    job: str = ""

    @property
    def _id(self) -> str:
        return self.name.removeprefix("buffers/")

    def ring(self, record: BufferRecord) -> str:
        """Return a place in shared memory, or in the directory if the frames are to last or do not fit there."""
        return self.rings.place(self._id, self.number, record.spec)

    async def find(self) -> Life | None:
        """Attach to the process that was started in the directory."""
        process = Process.attach(self.directory)
        return LocalLife(process, restores=False) if process is not None else None

    async def start(self, record: BufferRecord) -> Life:
        """Start a process."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        ended = Process.attach(self.directory)
        if ended is not None:
            ended.forget()
        token_file = await self._token() if record.spec.transport == "TLS_TCP" else None
        write_configuration(self.directory, record, self.number, self.placement, token_file)
        restores = (self.directory / JOURNAL_FILE).exists()
        process = await launch(
            [sys.executable, "-m", "beamwire.services.buffer.cache", str(self.directory)],
            directory=self.directory,
            env=dict(os.environ),
            cwd=self.directory,
            grace=STOP_GRACE,
            spares=self.spares,
        )
        return LocalLife(process, restores=restores)

    async def _token(self) -> Path:
        token_file = self.directory / "join-token"
        if not (self.directory / "credentials" / "chain.pem").exists():
            identity = f"spiffe://{self.trust_domain}/cache/{self._id}"
            token_file.touch(mode=0o600)
            token_file.write_text(await self.mint(identity, self.placement.server_names))
        return token_file

    def death(self, how: str) -> BeamwireError:
        """Tell what it printed last."""
        words = last_words(self.directory)
        printed = f"; the last that it said: {words[-1]}" if words else ""
        metadata = {"buffer": self.name, **({"log": "\n".join(words)} if words else {})}
        return BeamwireError(Reason.CACHE_FAILED, f"the cache of {self.name} died ({how}){printed}", metadata=metadata)

    async def remains(self, seen: CacheStatus | None) -> CacheStatus:
        """Read ring and journal."""
        return await asyncio.to_thread(final_status, self.directory, seen)


class LocalLife:
    """A process on this host. One that `restores` may take its time to read what it left, as long as it lives."""

    def __init__(self, process: Process, *, restores: bool) -> None:
        self._process = process
        self._restores = restores

    async def control(self) -> CacheControl:
        """Wait until its control socket answers."""
        while True:
            try:
                return await CacheControl.connect(self._process.directory, START_TIMEOUT)
            except BeamwireError as error:
                if error.reason is not Reason.TIMED_OUT or not self._restores:
                    raise
                log.info("%s is still reading what it left", self._process.directory)

    async def ended(self) -> str:
        """Wait for its end."""
        return str(await self._process.wait())

    async def alive(self) -> bool:
        """Whether it may still run."""
        return self._process.alive()

    async def stop(self) -> None:
        """End it."""
        await self._process.terminate()


class Elsewhere(Protocol):
    """The batch systems on which caches can run too."""

    async def check(self, spec: BufferSpec) -> None:
        """Raise BeamwireError if caches cannot run there."""
        ...

    def site(self, record: BufferRecord, number: int) -> Site:
        """Return where one cache of a buffer runs."""
        ...

    async def jobs(self) -> dict[str, str]:
        """Return the jobs of caches that have not ended, and the ids of their buffers."""
        ...

    async def discard(self, job: str, buffer_id: str) -> None:
        """End the job of a cache; one that answers removes its ring."""
        ...


class Sites:
    """Where the caches of buffers run.

    Args:
        directory: holds one directory for each buffer of the facility that has caches on this host.
        trust_domain: the domain the caches are members of.
        placement: what the facility says of caches.
        mint: mints a join token for a cache.
        spares: interpreters that are kept ready for caches.
    """

    def __init__(
        self,
        directory: Path,
        trust_domain: str,
        placement: Placement,
        mint: Minter,
        spares: Spares[ShimSpare] | None = None,
    ) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._placement = placement
        self._mint = mint
        self._spares = spares
        self.rings = Rings(directory)
        self._elsewhere: Elsewhere | None = None

    def add(self, elsewhere: Elsewhere) -> None:
        """Let caches run there too."""
        self._elsewhere = elsewhere

    async def check(self, spec: BufferSpec) -> None:
        """Raise BeamwireError if there is no such place."""
        if spec.local:
            return
        if self._elsewhere is None:
            raise invalid_field("buffer.spec.placement.backend", "is none: caches run on the host of the service here")
        await self._elsewhere.check(spec)

    def of(self, record: BufferRecord) -> list[Site]:
        """Return where the caches of a buffer run, in the order of their numbers."""
        return [self._site(record, number) for number in range(record.spec.shard_count)]

    def _site(self, record: BufferRecord, number: int) -> Site:
        if not record.spec.local and self._elsewhere is not None:
            return self._elsewhere.site(record, number)
        directory = self._directory / record.name.removeprefix("buffers/") / f"shard-{number}"
        return LocalSite(
            record.name,
            number,
            directory,
            self._trust_domain,
            self._placement,
            self.rings,
            self._mint,
            self._spares,
        )

    async def discard(self, record: BufferRecord) -> None:
        """Stop the caches of a buffer, if there are any, and remove their files and rings."""
        await self.discard_jobs(record)
        await self.discard_local(record.name.removeprefix("buffers/"))

    async def discard_jobs(self, record: BufferRecord) -> None:
        """End the jobs of a buffer's caches, if there are any: they are its own, whoever has its name by now."""
        jobs = [site.job for site in self.of(record) if site.job]
        await asyncio.gather(*(self.discard_job(job, record.name.removeprefix("buffers/")) for job in jobs))

    async def discard_local(self, buffer_id: str) -> None:
        """Stop what runs on this host under the id of a buffer, and remove all that there is of it."""
        directory = self._directory / buffer_id
        await asyncio.gather(*(end(part) for part in sorted(directory.glob("shard-*"))))
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        self.rings.remove(buffer_id)

    async def jobs(self) -> dict[str, str]:
        """Return the jobs of caches that have not ended, and the ids of their buffers."""
        return await self._elsewhere.jobs() if self._elsewhere is not None else {}

    async def discard_job(self, job: str, buffer_id: str) -> None:
        """End the job of a cache; one that answers removes its ring."""
        assert self._elsewhere is not None, "its jobs are known from there"
        await self._elsewhere.discard(job, buffer_id)

    def found(self) -> dict[str, bool]:
        """Return the buffers of which there is anything on this host, and whether a cache of theirs runs."""
        ids = {directory.name for directory in self._directory.glob("*")} | set(self.rings.buffers())
        return {buffer_id: self._runs(buffer_id) for buffer_id in sorted(ids)}

    def _runs(self, buffer_id: str) -> bool:
        processes = (Process.attach(part) for part in (self._directory / buffer_id).glob("shard-*"))
        return any(process is not None and process.alive() for process in processes)


async def end(directory: Path) -> None:
    """Stop the cache process of a directory, if there is one."""
    process = Process.attach(directory)
    if process is not None and process.alive():
        await process.terminate()
        await process.wait()
