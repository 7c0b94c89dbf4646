"""What the end of a step means: the state it leaves the job in, and the error with the reason of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.failure import Failure
from beamwire.services.job.backends.interface import Ending, Outcome
from beamwire.services.job.logs import log_tail
from beamwire.services.job.model import JobRecord, JobState

# The program whose end is that of a transfer's stream.
STREAMER = "beamwire.services.streamer"


@dataclass(frozen=True)
class Verdict:
    """The state that a step ends in, why, and the error if it failed."""

    state: JobState
    reason: str
    error: Failure | None = None


def verdict(record: JobRecord, outcome: Outcome, directory: Path, secrets: Iterable[bytes] = ()) -> Verdict:
    """Say what the end of a job's newest step means.

    Args:
        record: the job, as it is before.
        outcome: how it ended.
        directory: the step's own, with what it printed.
        secrets: what must not stand in the error.
    """
    if record.cancel_requested:
        return Verdict(JobState.CANCELED, "cancelled")
    if outcome.ending is Ending.CANCELLED:
        return Verdict(JobState.CANCELED, outcome.reason or "cancelled at the backend")
    if outcome.ending is Ending.EXITED and outcome.exit_code == 0:
        return Verdict(JobState.COMPLETED, outcome.reason)
    reason, message = _why(record, outcome)
    tail = log_tail(directory, secrets)
    if tail:
        message = f"{message}; it printed:\n{tail}"
    error = BeamwireError(reason, message, metadata={"job": record.name, "step": str(record.step.number)})
    return Verdict(JobState.FAILED, outcome.reason or message, Failure.of(error))


def cancelled(record: JobRecord, *, gone: bool) -> Verdict:
    """Say what becomes of a job that is cancelled, and of which no backend has anything.

    Args:
        record: the job, as it is before.
        gone: whether the facility has its backend no more.
    """
    if gone:
        return Verdict(JobState.CANCELED, f"cancelled; {left_at(record)}")
    if record.state == JobState.ACTIVE:
        return Verdict(JobState.CANCELED, "cancelled; its backend has nothing of it any more")
    return Verdict(JobState.CANCELED, "cancelled before it was started")


def left_at(record: JobRecord) -> str:
    """Say what may still be at a backend that the facility has no more."""
    backend = record.spec.placement.backend
    words = f"facility.toml has no backend {backend} any more"
    if record.state in (JobState.NEW, JobState.HELD):
        return f"{words}, and it was not given to it"
    known = f"job {record.step.native_id}" if record.step.native_id else f"a job with {record.id} in its name"
    return f"{words}, where {known} may be left; look there, and end it there"


def lost(record: JobRecord) -> BeamwireError:
    """Return the error of a job that was seen to run, and of which nothing is found."""
    return BeamwireError(
        Reason.JOB_FAILED,
        f"{record.name} is lost: it ran, and what says so was removed; it is not run twice",
        metadata={"job": record.name, "step": str(record.step.number)},
    )


def _why(record: JobRecord, outcome: Outcome) -> tuple[Reason, str]:
    who = record.spec.display_name or record.name
    match outcome.ending:
        case Ending.TIMED_OUT:
            limit = record.spec.resources.duration
            exceeded = "its time limit" + (f" of {limit:g} s" if limit is not None else "")
            return Reason.TIMED_OUT, f"{who} exceeded {exceeded}; ask for a longer duration"
        case Ending.OUT_OF_MEMORY:
            limit = record.spec.resources.memory_bytes
            allowed = f", which are {limit} bytes" if limit else ""
            return (
                Reason.OUT_OF_MEMORY,
                f"{who} needed more memory than it may have{allowed}; ask for more memory_bytes",
            )
        case Ending.NODE_FAILED:
            return Reason.NODE_FAILED, f"{who} lost its node: {outcome.reason or 'it failed'}; run it again"
        case Ending.NOT_STARTED:
            return Reason.LAUNCH_FAILED, f"{who}: {outcome.reason or 'it could not be started'}"
        case Ending.LOST:
            return Reason.JOB_FAILED, f"{who} is lost: {outcome.reason or 'the backend does not know how it ended'}"
        case _:
            # What a transfer is told of its streamer; see the reason in the contract.
            streamer = record.is_part and record.spec.executable == STREAMER
            failed = Reason.PRODUCER_FAILED if streamer else Reason.JOB_FAILED
            return failed, f"{who} failed: {outcome.reason}"
