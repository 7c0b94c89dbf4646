"""The schedulers of psij-python, as far as this service leans on them: submit, list, cancel.

psij-python's own watching is not used: it takes a scheduler that does not answer, and one that lists a reason with a
space in it, for the failure of all jobs, and looks every 30 seconds. Its executors still know how each scheduler is
spoken to: what is submitted, what its answers mean.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import threading
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.backends.interface import Step
from beamwire.services.job.model import JobSpec

# Seconds between the polls of psij-python, whose threads must not wake up: longer than any service runs.
NEVER: Final = 10**8
# Seconds that a command of a scheduler may take.
COMMAND_TIMEOUT: Final = 60.0

QUEUED: Final = "QUEUED"
ACTIVE: Final = "ACTIVE"
ENDED: Final = "ENDED"
_STATES: Final = {"NEW": QUEUED, "QUEUED": QUEUED, "HELD": QUEUED, "STAGE_IN": QUEUED, "ACTIVE": ACTIVE}


class PsijQueue:
    """One executor of psij-python. Its methods block: call them in a thread.

    Args:
        executor: psij-python's name for the scheduler.
        directory: for what psij-python writes.
    """

    def __init__(self, executor: str, directory: Path) -> None:
        self.name = executor
        self._directory = directory
        self._lock = threading.Lock()
        self._executor: Any = None
        # Those that only this process can tell the state of.
        self._jobs: dict[str, Any] = {}

    def load(self) -> Any:
        """Return psij-python's executor; UNSUPPORTED if it, or what it needs, is not installed."""
        with self._lock:
            if self._executor is None:
                self._executor = self._load()
            return self._executor

    def _load(self) -> Any:
        try:
            psij = importlib.import_module("psij")
            executor = psij.JobExecutor.get_instance(self.name, config=self._config())
        except (ImportError, ValueError) as error:
            message = f"psij-python cannot speak to {self.name!r}: {error}; pip install 'beamwire[psij]'"
            raise BeamwireError(Reason.UNSUPPORTED, message) from error
        return executor

    def _config(self) -> Any:
        batch = importlib.import_module("psij.executors.batch.batch_scheduler_executor")
        return batch.BatchSchedulerExecutorConfig(
            work_directory=self._directory, queue_polling_interval=NEVER, initial_queue_polling_delay=NEVER
        )

    @property
    def is_batch(self) -> bool:
        """Whether it is a batch system, whose jobs anybody can list by their ids."""
        return hasattr(self.load(), "get_status_command")

    def submit(self, step: Step, script: Path, queue: str, account: str) -> str:
        """Submit a script that runs a step; return the scheduler's id.

        LAUNCH_FAILED with the scheduler's words; whether the step is there in spite of it, nobody knows.
        """
        executor = self.load()
        psij = importlib.import_module("psij")
        job = psij.Job(_spec(psij, step.spec, script, self.name, queue, account))
        try:
            executor.submit(job)
        except (psij.SubmitException, psij.InvalidJobException, OSError) as error:
            words = " ".join(str(error).split())
            raise BeamwireError(Reason.LAUNCH_FAILED, f"{self.name} did not take the job: {words}") from error
        native_id = str(job.native_id)
        if not self.is_batch:
            self._jobs[native_id] = job
        return native_id

    def states(self, native_ids: Collection[str]) -> Mapping[str, str] | None:
        """Return the states of jobs, ENDED for one that the scheduler does not know; None if nobody can say now."""
        executor = self.load()
        if not self.is_batch:
            return {native_id: self._state_of(native_id) for native_id in native_ids}
        try:
            done = _run(executor.get_status_command(list(native_ids)))
            found = executor.parse_status_output(done.returncode, done.stdout)
        except Exception:
            return None
        return {native: _state(found[native].state) if native in found else ENDED for native in native_ids}

    def _state_of(self, native_id: str) -> str:
        if native_id not in self._jobs:
            psij = importlib.import_module("psij")
            job = psij.Job()
            try:
                self.load().attach(job, native_id)
            except Exception:
                return ENDED
            self._jobs[native_id] = job
        return _state(self._jobs[native_id].status.state)

    def cancel(self, native_id: str) -> None:
        """Have the scheduler end a job; what it says to that is seen in the job's state."""
        executor = self.load()
        if self.is_batch:
            _run(executor.get_cancel_command(native_id))
        elif self._state_of(native_id) != ENDED:
            executor.cancel(self._jobs[native_id])

    def forget(self, native_id: str) -> None:
        """Remove what psij-python has left of a job that has ended."""
        self._jobs.pop(native_id, None)
        directory = getattr(self.load(), "work_directory", None)
        for path in Path(directory).glob(f"{native_id}.*") if directory else ():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def check(self) -> None:
        """Raise BeamwireError SERVICE_UNAVAILABLE if the scheduler does not list its jobs."""
        executor = self.load()
        if not self.is_batch:
            return
        try:
            done = _run(executor.get_list_command())
        except (OSError, subprocess.SubprocessError) as error:
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"{self.name} cannot be asked: {error}") from error
        if done.returncode != 0:
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"{self.name} does not answer: {done.stdout.strip()}")


def _state(state: Any) -> str:
    return _STATES.get(state.name, ENDED)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_TIMEOUT, check=False
    )


def _spec(psij: Any, spec: JobSpec, script: Path, executor: str, queue: str, account: str) -> Any:
    resources, placement = spec.resources, spec.placement
    return psij.JobSpec(
        executable="/bin/sh",
        arguments=[str(script)],
        directory=script.parent,
        inherit_environment=False,
        environment={},
        launcher="single",
        resources=psij.ResourceSpecV1(
            node_count=resources.node_count or None,
            process_count=resources.process_count,
            processes_per_node=resources.processes_per_node or None,
            cpu_cores_per_process=resources.cores_per_process or None,
            gpu_cores_per_process=resources.gpus_per_process or None,
            exclusive_node_use=resources.exclusive,
            memory=resources.memory_bytes or None,
        ),
        attributes=_attributes(psij, spec, executor, placement.queue or queue, placement.account or account),
    )


def _attributes(psij: Any, spec: JobSpec, executor: str, queue: str, account: str) -> Any:
    more: dict[str, Any] = {}
    if spec.resources.duration is not None:
        more["duration"] = timedelta(seconds=max(60.0, spec.resources.duration))
    return psij.JobAttributes(
        queue_name=queue or None,
        account=account or None,
        reservation_id=spec.placement.reservation or None,
        custom_attributes={f"{executor}.{name}": value for name, value in spec.placement.attributes.items()},
        **more,
    )
