"""Checks a dataset where the streamer will run, before its buffer and its job are made: on a backend's node."""

from __future__ import annotations

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.names import id_of_part, new_id
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import to_the_end
from beamwire.services.request.contract import hold_to
from beamwire.services.request.datasets import Datasets
from beamwire.services.request.health import Watchman
from beamwire.services.request.life import noted
from beamwire.services.request.model import TransferRecord
from beamwire.services.request.ports import JobPort, JobView, Preflight
from beamwire.services.request.rights import PresentRights, rights_of

CREATE_PATIENCE = 10.0


class RemoteCheck:
    """Has the streamer's check run as a job.

    Args:
        store: where transfers are kept.
        jobs: the Job service.
        preflight: reads what the check printed.
        datasets: decides who may read what.
        rights: says who reads.
    """

    def __init__(
        self,
        store: Store[TransferRecord],
        jobs: JobPort,
        preflight: Preflight,
        datasets: Datasets,
        rights: PresentRights,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._preflight = preflight
        self._datasets = datasets
        self._rights = rights

    async def check(self, record: TransferRecord, watchman: Watchman) -> TransferRecord:
        """Store and return what the dataset holds; raise BeamwireError if it cannot be read there, or does not do."""
        job = f"jobs/{id_of_part(new_id(f'{record.name} check'))}"
        reason = f"the dataset is checked on the backend {record.backend}"
        await self._store.change(record.name, lambda r: {"check_job": job, **noted(r, reason)})
        await to_the_end(self._jobs.create_check(record, job), CREATE_PATIENCE)
        ended = await self._end(job, watchman)
        printed = await self._jobs.printed(job)
        if not printed and ended.error is not None:
            raise ended.error.to_error()
        reader = self._rights.reader(record)
        fitness = self._preflight.conclude(printed, lambda found: self._datasets.check(found, reader))
        hold_to(record.contract, fitness)
        found = {
            "expected_event_count": fitness.expected_event_count,
            "events_per_second": fitness.events_per_second,
            "rights": rights_of(reader),
        }
        return await self._store.change(record.name, lambda _: found)

    async def _end(self, job: str, watchman: Watchman) -> JobView:
        async for view in self._jobs.watch(job):
            watchman.job = view
            if view.ended:
                watchman.job = None
                return view
        raise BeamwireError(Reason.JOB_FAILED, f"{job}, which checks the dataset, went away before it had ended")
