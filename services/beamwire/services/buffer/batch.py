"""Caches on other hosts: each is a job of the Job service, told by a file and spoken to over TLS."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.names import RESERVED, new_id
from beamwire.services.buffer.cache.config import CONFIG_FILE
from beamwire.services.buffer.clients import CacheJob, CacheJobs, JobView
from beamwire.services.buffer.control import CacheControl, CacheStatus, Counters
from beamwire.services.buffer.doors import TlsDoor
from beamwire.services.buffer.model import BufferRecord, BufferSpec
from beamwire.services.buffer.placement import Placement, Rings, configuration
from beamwire.services.buffer.remains import write_off
from beamwire.services.buffer.sites import STOP_GRACE, Life, Site

log = logging.getLogger(__name__)

# What a cache needs besides its ring, in bytes.
OWN_MEMORY: Final = 512 * 1024 * 1024
# From the moment its job runs until it has told where it listens, in seconds: Python starts, and it enrols.
REPORT_TIMEOUT: Final = 60.0
# A cache whose job runs is dialed again for so long, in seconds.
DIAL_TIMEOUT: Final = 10.0
UNREACHABLE: Final = 120.0
# The output in which a cache tells where it is spoken to.
CONTROL_OUTPUT: Final = "control"
SPILL_RING: Final = "ring"


class BatchSystems:
    """The backends of the Job service.

    Args:
        jobs: the Job service.
        credentials: of the Buffer service, which the caches know.
        placement: what the facility says of caches.
        rings: how rings are called.
    """

    def __init__(self, jobs: CacheJobs, credentials: Credentials, placement: Placement, rings: Rings) -> None:
        self._jobs = jobs
        self._credentials = credentials
        self._placement = placement
        self._rings = rings

    async def check(self, spec: BufferSpec) -> None:
        """Raise INVALID_FIELD if the Job service would not run caches there."""
        probe = CacheJob("", "probe", spec.place, self._placement.nodes, (), CONFIG_FILE, _memory(spec), STOP_GRACE, "")
        try:
            await self._jobs.check(probe)
        except BeamwireError as error:
            raise _of_buffer(error) from error

    def site(self, record: BufferRecord, number: int) -> Site:
        """Return where one cache of a buffer runs."""
        return JobSite(
            record.name,
            number,
            job_id(record, number),
            self._jobs,
            self._credentials,
            self._placement,
            self._rings,
        )

    async def jobs(self) -> dict[str, str]:
        """Return the jobs of caches that have not ended, and the ids of their buffers."""
        return await self._jobs.going_on()

    async def discard(self, job: str, buffer_id: str) -> None:
        """End the job of a cache; one that answers removes its ring."""
        view = await self._jobs.get(job)
        if view is None or view.ended:
            return
        if CONTROL_OUTPUT in view.outputs:
            door = TlsDoor(view.outputs[CONTROL_OUTPUT], _cache(self._credentials, buffer_id), self._credentials)
            try:
                await CacheControl(door).discard()
            except BeamwireError as error:
                log.info("the cache of buffers/%s, %s, cannot be told to remove its ring: %s", buffer_id, job, error)
        await self._jobs.cancel(job)


def job_id(record: BufferRecord, number: int) -> str:
    """Return the id of the job of a cache: always the same one for the same cache of the same buffer."""
    return f"{RESERVED}cache-{new_id(f'{record.name} {record.create_time.isoformat()} {number}')}"


@dataclass(frozen=True)
class JobSite:
    """A job of the Job service.

    Args:
        name: of the buffer.
        number: of the cache among those of the buffer.
        job_id: of the job.
        jobs: the Job service.
        credentials: of the Buffer service.
        placement: what the facility says of caches.
        rings: how rings are called.
    """

    name: str
    number: int
    job_id: str
    jobs: CacheJobs
    credentials: Credentials
    placement: Placement
    rings: Rings
    distant: bool = True

    @property
    def job(self) -> str:
        """The name of its job."""
        return f"jobs/{self.job_id}"

    @property
    def _buffer_id(self) -> str:
        return self.name.removeprefix("buffers/")

    def ring(self, record: BufferRecord) -> str:
        """Return a name in the shared memory of whichever node, or in the job's directory if the frames are to last."""
        if not record.spec.acked or record.spec.overflow_policy == "SPILL":
            return SPILL_RING if record.spec.acked else ""
        return str(self.rings.in_memory(self._buffer_id, self.number))

    async def find(self) -> Life | None:
        """Return the job, unless it is not there or was not told what to do."""
        view = await self.jobs.get(self.job)
        return None if view is None or view.state in ("NEW", "HELD") else self._life(view)

    def _life(self, view: JobView) -> JobLife:
        return JobLife(self.jobs, view, _cache(self.credentials, self._buffer_id), self.credentials)

    async def start(self, record: BufferRecord) -> Life:
        """Create the job, or have it run once more where it has ended."""
        view = await self.jobs.get(self.job) or await self.jobs.create(self._job(record.spec))
        distant = {"nodes": self.placement.nodes, "otlp_endpoint": self.placement.otlp_endpoint}
        content = json.dumps(configuration(record, self.number) | distant, indent=1).encode()
        await self.jobs.upload(self.job, CONFIG_FILE, content)
        if view.ended:
            view = await self.jobs.restart(self.job, view.step)
        return self._life(view)

    def _job(self, spec: BufferSpec) -> CacheJob:
        return CacheJob(
            job_id=self.job_id,
            buffer_id=self._buffer_id,
            place=spec.place,
            server_names=self.placement.nodes,
            # Its directory is where it begins.
            arguments=(".",),
            input_file=CONFIG_FILE,
            memory_bytes=_memory(spec),
            grace=STOP_GRACE,
            display_name=f"cache {self.number} of {self.name}",
        )

    def death(self, how: str) -> BeamwireError:
        """Tell how its job ended."""
        metadata = {"buffer": self.name, "job": self.job}
        return BeamwireError(
            Reason.CACHE_FAILED, f"the cache of {self.name}, {self.job}, died: {how}", metadata=metadata
        )

    async def remains(self, seen: CacheStatus | None) -> CacheStatus:
        """Return what was seen last: its ring is out of reach."""
        status = seen or CacheStatus(state="FAILED", address="", counters=Counters())
        changes = {"state": "FAILED", "flow": "", "end_cause": "FAILED", "counters": write_off(status.counters)}
        return status.model_copy(update=changes)


class JobLife:
    """One step of a job."""

    def __init__(self, jobs: CacheJobs, view: JobView, identity: SpiffeId, credentials: Credentials) -> None:
        self._jobs = jobs
        self._view = view
        self._identity = identity
        self._credentials = credentials

    def door(self, address: str) -> TlsDoor:
        """Return where the cache is spoken to."""
        return TlsDoor(address, self._identity, self._credentials)

    async def control(self) -> CacheControl:
        """Wait until the job runs, however long it is queued, and its cache answers."""
        door = self.door(await self._address())
        try:
            async with asyncio.timeout(UNREACHABLE):
                while True:
                    try:
                        return await CacheControl.connect(door, DIAL_TIMEOUT)
                    except BeamwireError as error:
                        if error.reason is not Reason.TIMED_OUT:
                            raise
        except TimeoutError:
            raise BeamwireError(
                Reason.CACHE_FAILED, f"{self._view.name} runs, and its cache cannot be reached at {door}"
            ) from None

    async def _address(self) -> str:
        try:
            async with asyncio.timeout(None) as limit:
                async for view in self._jobs.watch(self._view.name):
                    address = view.outputs.get(CONTROL_OUTPUT, "")
                    if address:
                        return address
                    if view.state == "ACTIVE" and limit.when() is None:
                        limit.reschedule(asyncio.get_running_loop().time() + REPORT_TIMEOUT)
        except TimeoutError:
            raise BeamwireError(
                Reason.TIMED_OUT,
                f"{self._view.name} runs, and its cache has not told within {REPORT_TIMEOUT:g} s where it listens; can "
                "the node reach the services? What it printed is among the logs of the job",
            ) from None
        raise BeamwireError(Reason.CACHE_FAILED, f"{self._view.name} has ended")

    async def ended(self) -> str:
        """Wait for the end of the job."""
        async for view in self._jobs.watch(self._view.name):
            if view.ended or view.step > self._view.step:
                return view.why
        return "it is gone"

    async def alive(self) -> bool:
        """Whether it may still run."""
        view = await self._jobs.get(self._view.name)
        return view is not None and not view.ended

    async def stop(self) -> None:
        """Cancel the job, and wait for its end."""
        if await self.alive():
            await self._jobs.cancel(self._view.name)
            await self.ended()


def _cache(service: Credentials, buffer_id: str) -> SpiffeId:
    """Return whom the service expects where a cache is."""
    return SpiffeId(service.identity.trust_domain, f"{Role.CACHE}/{buffer_id}")


def _memory(spec: BufferSpec) -> int:
    return spec.capacity_bytes + OWN_MEMORY


def _of_buffer(error: BeamwireError) -> BeamwireError:
    """Return the refusal of a job in the words of a buffer."""
    if error.reason is not Reason.INVALID_FIELD or not error.violations:
        return error
    first = error.violations[0]
    return invalid_field(first.field.replace("job.spec.", "buffer.spec.", 1), first.description)
