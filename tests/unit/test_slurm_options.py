"""What sbatch is told of a step, and what a user may not have it told."""

from __future__ import annotations

from pathlib import Path

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.backends import slurm_options
from beamwire.services.job.backends.interface import Step
from beamwire.services.job.backends.psij import PsijBackend
from beamwire.services.job.model import JobSpec, Placement, Resources

FACILITY = "facility.test /state"
# The last three are other ways to say one that is refused.
REFUSED = """job-name output error wrap parsable chdir export export-file comment requeue no-requeue signal open-mode
input array clusters get-user-env uid gid wait test-only time partition nodes hold job-nam J Constraint"""


def options(tmp_path: Path, **spec: object) -> list[str]:
    step = Step("j1", 2, tmp_path / "100%j", JobSpec(executable="x", **spec), {"SECRET": "s3cr3t"})
    return slurm_options.options(step, "bw-x-j1-2", queue="main", account="lab")


def test_a_plain_job(tmp_path: Path) -> None:
    directory = tmp_path / "100%j" / "steps" / "2"
    assert options(tmp_path) == [
        "--no-requeue",
        "--job-name=bw-x-j1-2",
        "--comment=beamwire:j1",
        f"--chdir={directory}",
        f"--output={tmp_path}/100%%j/steps/2/stdout",
        f"--error={tmp_path}/100%%j/steps/2/stderr",
        "--open-mode=append",
        "--export=NONE",
        "--ntasks=1",
        "--partition=main",
        "--account=lab",
    ]


def test_all_that_can_be_asked_for(tmp_path: Path) -> None:
    resources = Resources(
        process_count=8, node_count=2, processes_per_node=4, cores_per_process=3, gpus_per_process=1,
        memory_bytes=2**20 + 1, duration=61, exclusive=True,
    )  # fmt: skip
    place = Placement(queue="fast", account="me", reservation="beam", attributes={"qos": "high", "contiguous": ""})
    found = set(options(tmp_path, resources=resources, placement=place, grace=60, environment={"A": "s3cr3t"}))
    wanted = """--ntasks=8 --nodes=2 --ntasks-per-node=4 --cpus-per-task=3 --gpus-per-task=1 --mem=2M --time=2
    --exclusive --partition=fast --account=me --reservation=beam --qos=high --contiguous --signal=B:USR1@60"""
    assert set(wanted.split()) <= found
    assert "s3cr3t" not in " ".join(found)


@pytest.mark.parametrize("name", REFUSED.split())
def test_attributes_that_would_change_what_is_relied_on(name: str) -> None:
    with pytest.raises(BeamwireError) as refused:
        slurm_options.check(JobSpec(executable="x", placement=Placement(attributes={name: "x"})))
    assert refused.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in refused.value.violations] == ["job.spec.placement.attributes"]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"placement": Placement(attributes={"qos": "a\nb"})}, "placement.attributes"),
        ({"placement": Placement(attributes={"qos": "$(x)`y`"})}, "placement.attributes"),
        ({"placement": Placement(queue="--wrap=x")}, "placement.queue"),
        ({"placement": Placement(account="a b")}, "placement.account"),
        ({"placement": Placement(reservation="a\0")}, "placement.reservation"),
        ({"resources": Resources(node_count=2)}, "resources.node_count"),
        ({"resources": Resources(node_count=2, process_count=5, processes_per_node=2)}, "resources.processes_per_node"),
        ({"resources": Resources(memory_bytes=-1)}, "resources.memory_bytes"),
        ({"directory": "/a\nb"}, "directory"),
    ],
)
def test_what_can_never_run(spec: dict[str, object], field: str) -> None:
    with pytest.raises(BeamwireError) as refused:
        slurm_options.check(JobSpec(executable="x", **spec))
    assert [v.field for v in refused.value.violations] == [f"job.spec.{field}"]


def test_names_tell_job_and_step() -> None:
    name = slurm_options.job_name(FACILITY, "of-a-1", 12)
    assert slurm_options.parse_name(FACILITY, name) == ("of-a-1", 12)
    assert slurm_options.parse_name("other.test /state", name) is None
    assert slurm_options.parse_name(FACILITY, slurm_options.prefix(FACILITY) + "x") is None
    assert slurm_options.parse_name(FACILITY, "wrap") is None


@pytest.mark.parametrize(
    ("executor", "name", "value"),
    [
        ("lsf", "E", "touch /tmp/here"),
        ("lsf", "oo", "/home/beamwire/.ssh/authorized_keys"),
        ("pbs", "W", "stageout=/home/beamwire/key@elsewhere:/key"),
        # The beginning of --output.
        ("slurm", "outp", "x"),
        ("cobalt", "debuglog", "/home/beamwire/key"),
        ("flux", "anything", "x"),
    ],
)
def test_other_schedulers_are_told_no_option_that_runs_or_writes_something(
    tmp_path: Path, executor: str, name: str, value: str
) -> None:
    backend = PsijBackend(executor, tmp_path)
    with pytest.raises(BeamwireError) as refused:
        backend.check(JobSpec(executable="x", placement=Placement(attributes={name: value})))
    assert [v.field for v in refused.value.violations] == ["job.spec.placement.attributes"]


def test_other_schedulers_are_told_what_resources_a_job_needs(tmp_path: Path) -> None:
    for executor, name in (("lsf", "R"), ("pbs", "l"), ("slurm", "qos")):
        PsijBackend(executor, tmp_path).check(JobSpec(executable="x", placement=Placement(attributes={name: "x"})))
