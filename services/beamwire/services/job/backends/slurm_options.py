"""What sbatch is told of a step: its resources, and what a user may add under the names that sbatch has for it."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Final

from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.services.job.backends.interface import Step
from beamwire.services.job.model import JobSpec, Placement, Resources

# Long options of sbatch that change where and when a job runs, and nothing that this service relies on. Whole names
# only: sbatch takes any beginning of a name for it.
_OPTIONS: Final = """
    acctg-freq bb begin cluster-constraint constraint contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu
    deadline delay-boot dependency distribution exclude extra-node-info gpu-bind gpu-freq gpus gpus-per-node
    gpus-per-socket gres gres-flags hint licenses mail-type mail-user mcs-label mem-bind mem-per-cpu mem-per-gpu mincpus
    network nice nodelist ntasks-per-core ntasks-per-gpu ntasks-per-socket overcommit oversubscribe power prefer
    priority profile qos sockets-per-node spread-job switches thread-spec threads-per-core tmp use-min-nodes wckey
"""
ATTRIBUTES: Final = frozenset(_OPTIONS.split())
# What has a field of its own in the specification.
FIELDS: Final = {
    "account": "placement.account",
    "cpus-per-task": "resources.cores_per_process",
    "exclusive": "resources.exclusive",
    "gpus-per-task": "resources.gpus_per_process",
    "mem": "resources.memory_bytes",
    "nodes": "resources.node_count",
    "ntasks": "resources.process_count",
    "ntasks-per-node": "resources.processes_per_node",
    "partition": "placement.queue",
    "reservation": "placement.reservation",
    "time": "resources.duration",
    "chdir": "directory",
    "hold": "hold",
}
VALUE: Final = re.compile(r"[A-Za-z0-9 ._,:;=+*%/@|&!()<>\[\]-]{0,500}")
_WORD: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@+:-]{0,200}")
# The grace that Slurm gives of itself after its limit of time (KillWait), in seconds.
KILL_WAIT: Final = 30.0
# Room for a job's id of 60 characters and a step.
HASH_LENGTH: Final = 10


def prefix(facility: str) -> str:
    """Return how the names of a facility's jobs begin."""
    return f"bw-{hashlib.sha256(facility.encode()).hexdigest()[:HASH_LENGTH]}-"


def job_name(facility: str, job: str, step: int) -> str:
    """Return the name of a step at Slurm: it is found by it again, whatever became of the answer of sbatch."""
    return f"{prefix(facility)}{job}-{step}"


def parse_name(facility: str, name: str) -> tuple[str, int] | None:
    """Return the job and step of a name; None if it is no job of the facility."""
    begin = prefix(facility)
    job, _, step = name.removeprefix(begin).rpartition("-")
    return (job, int(step)) if name.startswith(begin) and job and step.isdecimal() else None


def check(spec: JobSpec) -> None:
    """Raise BeamwireError INVALID_FIELD for what can never run under Slurm, or would break what we rely on."""
    check_resources(spec.resources)
    check_placement(spec.placement)
    for name, value in spec.placement.attributes.items():
        _check_attribute(name, value)
    for field in ("directory", "bundle"):
        if "\n" in getattr(spec, field):
            raise invalid_field(f"job.spec.{field}", "must be one line")


def check_placement(placement: Placement) -> None:
    """Raise BeamwireError INVALID_FIELD for what is no name of a queue, an account or a reservation."""
    for field in ("queue", "account", "reservation"):
        value = getattr(placement, field)
        if value and not _WORD.fullmatch(value):
            raise invalid_field(f"job.spec.placement.{field}", f"{value[:100]!r} is no name of one")


def check_resources(resources: Resources) -> None:
    """Raise BeamwireError INVALID_FIELD for numbers that contradict each other."""

    def wrong(field: str, why: str) -> BeamwireError:
        return invalid_field(f"job.spec.resources.{field}", why)

    for field in ("node_count", "processes_per_node", "cores_per_process", "gpus_per_process", "memory_bytes"):
        if getattr(resources, field) < 0:
            raise wrong(field, "must not be negative")
    nodes, each, processes = resources.node_count, resources.processes_per_node, resources.process_count
    if nodes > processes:
        raise wrong("node_count", f"{processes} processes cannot use {nodes} nodes")
    if nodes and each and nodes * each < processes:
        raise wrong("processes_per_node", f"{nodes} nodes with {each} each are fewer than {processes} processes")


def _check_attribute(name: str, value: str) -> None:
    field = "job.spec.placement.attributes"
    if name in FIELDS:
        raise invalid_field(field, f"say it in {FIELDS[name]}, not as the attribute {name!r}")
    if name not in ATTRIBUTES:
        raise invalid_field(field, f"{name[:100]!r} is none of: {', '.join(sorted(ATTRIBUTES))}")
    if not VALUE.fullmatch(value):
        raise invalid_field(field, f"the value of {name!r} has characters that no option of sbatch needs")


def options(step: Step, name: str, *, queue: str = "", account: str = "") -> list[str]:
    """Return the options of sbatch for a step. None of them tells a secret: everybody can read them with scontrol."""
    spec, resources, placement = step.spec, step.spec.resources, step.spec.placement
    duration, memory = resources.duration, resources.memory_bytes
    wanted: dict[str, object] = {
        "job-name": name,
        "comment": f"beamwire:{step.job}",
        "chdir": step.directory,
        "output": _pattern(step.directory / "stdout"),
        "error": _pattern(step.directory / "stderr"),
        "open-mode": "append",
        "export": "NONE",
        "ntasks": resources.process_count,
        "nodes": resources.node_count,
        "ntasks-per-node": resources.processes_per_node,
        "cpus-per-task": resources.cores_per_process,
        "gpus-per-task": resources.gpus_per_process,
        "mem": f"{math.ceil(memory / 2**20)}M" if memory else "",
        # In whole minutes; the agent has it to the second.
        "time": math.ceil(duration / 60) if duration is not None else "",
        "partition": placement.queue or queue,
        "account": placement.account or account,
        "reservation": placement.reservation,
        # Sent up to a minute too early, and so only where it is needed.
        "signal": f"B:USR1@{math.ceil(spec.grace)}" if spec.grace > KILL_WAIT else "",
    }
    flags = ["--no-requeue", *(["--exclusive"] if resources.exclusive else [])]
    said = [f"--{option}={value}" for option, value in wanted.items() if value not in ("", 0)]
    added = [f"--{option}={value}" if value else f"--{option}" for option, value in placement.attributes.items()]
    return [*flags, *said, *added]


def _pattern(path: Path) -> str:
    # Slurm puts the job's id for %j, and so on.
    return str(path).replace("%", "%%")
