"""How jobs look to a person, and how their output reaches the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from beamwire.client.aiojobs import failure_of, has_ended, state_word
from beamwire.client.cli.text import Row, age, aligned, counted, duration, size, time_of
from beamwire.client.transfers import short_name
from beamwire.job.v1.job_service_pb2 import LOG_STREAM_STDERR, Backend, Job, JobFile, JobSpec, TailLogsResponse

JOB_HEADER = ("JOB", "STATE", "AGE", "BACKEND", "PROGRAM", "WHY")
FILE_HEADER = ("PATH", "SIZE", "WRITTEN")
BACKEND_HEADER = ("BACKEND", "KIND", "ANSWERS", "QUEUES", "JOBS", "DETAIL")
_LONGEST_PROGRAM, _LONGEST_WHY = 40, 60


def show_logs(pieces: Iterable[TailLogsResponse]) -> None:
    """Print what a job printed, each stream to its own."""
    for piece in pieces:
        target = sys.stderr if piece.stream == LOG_STREAM_STDERR else sys.stdout
        target.buffer.write(piece.data)
        target.flush()


def program(spec: JobSpec) -> str:
    """Return what a job runs, as one would type it."""
    first = "(script)" if spec.script else spec.executable
    return " ".join([first, *spec.arguments])


def job_row(job: Job) -> list[str]:
    """Return a job as one row of a list."""
    return [
        short_name(job.name),
        state_word(job),
        age(job.create_time),
        job.spec.placement.backend,
        _cell(job.spec.display_name or program(job.spec), _LONGEST_PROGRAM),
        _cell(job.state_reason, _LONGEST_WHY),
    ]


def _cell(text: str, longest: int) -> str:
    """Return the first line of a text, as far as a column shows it; a `…` says that there is more."""
    line = text.partition("\n")[0]
    return line if line == text and len(line) <= longest else line[: longest - 1] + "…"


def file_row(file: JobFile) -> list[str]:
    """Return a file as one row of a list."""
    return [file.path, size(file.size_bytes), time_of(file.update_time)]


def backend_row(backend: Backend) -> list[str]:
    """Return a backend as one row of a list."""
    jobs = ", ".join(f"{count} {state.lower()}" for state, count in sorted(backend.job_counts.items()))
    answers = "yes" if backend.available else "no"
    return [backend.name, backend.kind, answers, ", ".join(backend.queues), jobs, backend.detail]


def job_text(job: Job) -> str:
    """Return everything a person wants to know about a job."""
    parts = [aligned(_head(job)), "what\n" + aligned(_spec(job.spec), "  ")]
    parts.append("history\n" + aligned(_history(job), "  "))
    if job.outputs:
        parts.append("outputs\n" + aligned(sorted(job.outputs.items()), "  "))
    if job.HasField("error"):
        error = failure_of(job)
        parts.append(f"error ({error.reason.name})\n" + "\n".join(f"  {line}" for line in error.message.splitlines()))
    if has_ended(job):
        parts.append(f"See what it printed with: beamwire job logs {short_name(job.name)}")
    return "\n\n".join(parts)


def _head(job: Job) -> list[Row]:
    return [
        ("job", job.name),
        ("state", state_word(job) + (f": {job.state_reason}" if job.state_reason else "")),
        ("exit code", str(job.exit_code) if job.HasField("exit_code") else ""),
        ("owner", job.owner),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))),
        ("created", time_of(job.create_time)),
        ("ended", time_of(job.end_time)),
        ("forgotten", time_of(job.purge_time)),
        ("backend's id", job.native_id),
        ("callback", _callback(job)),
    ]


def _callback(job: Job) -> str:
    if not job.spec.HasField("callback"):
        return ""
    told = job.callback_status
    counts = f"{told.delivered_count} told, {told.pending_count} to tell, {told.abandoned_count} given up"
    return f"{job.spec.callback.url}: {counts}" + (f"; last: {told.last_error}" if told.last_error else "")


def _spec(spec: JobSpec) -> list[Row]:
    resources, placement = spec.resources, spec.placement
    named = {"queue": placement.queue, "account": placement.account, "reservation": placement.reservation}
    where = [placement.backend, *(f"{key} {value}" for key, value in named.items() if value)]
    return [
        ("name", spec.display_name),
        ("program", program(spec) + (" (MPI)" if spec.mpi else "")),
        ("where", ", ".join(where)),
        ("processes", str(resources.process_count)),
        ("nodes", str(resources.node_count or "")),
        ("time limit", duration(resources.duration.ToSeconds()) if resources.HasField("duration") else ""),
        ("memory", size(resources.memory_bytes) if resources.memory_bytes else ""),
        ("input files", ", ".join(file.path for file in spec.input_files)),
        ("after", ", ".join(dependency.job for dependency in spec.dependencies)),
        ("environment", ", ".join(sorted(spec.environment))),
    ]


def _history(job: Job) -> list[Row]:
    several = len(job.steps) > 1
    return [
        (
            time_of(transition.time),
            Job.State.Name(transition.state).removeprefix("STATE_")
            + (f" (step {transition.step})" if several else "")
            + (f": {transition.reason}" if transition.reason else ""),
        )
        for transition in job.transitions
    ]


def ran(job: Job) -> str:
    """Return how a job went, in one line."""
    step = job.steps[-1] if job.steps else Job.Step()
    seconds = (step.end_time.ToNanoseconds() - step.start_time.ToNanoseconds()) / 1e9 if step.start_time.seconds else 0
    took = f" after {duration(seconds)}" if seconds > 0 else ""
    steps = f" in {counted(len(job.steps), 'step')}" if len(job.steps) > 1 else ""
    return f"{job.name} {state_word(job)}{took}{steps}"
