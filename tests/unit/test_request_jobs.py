"""What a request may say of the jobs that consume it: nothing that makes them somebody else, or another program."""

from __future__ import annotations

import contextvars

import pytest

from beamwire.job.v1.job_service_pb2 import Callback, InputFile, JobSpec, Placement
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.patterns import Patterns
from beamwire.mesh.policy import Grant
from beamwire.mesh.rpc import access
from beamwire.request.v1.request_service_pb2 import ConsumerJob
from beamwire.services.request.jobs import to_consumer_jobs


def asked_by(role: Role, spec: JobSpec) -> None:
    caller = access.Caller(
        SpiffeId("a.test", f"{role}/x"), role, grant=Grant(role, "rule", executables=Patterns.of("/opt/bin/*"))
    )

    def ask() -> None:
        access._caller.set(caller)
        to_consumer_jobs([ConsumerJob(spec=spec)], "a.test")

    contextvars.copy_context().run(ask)


@pytest.mark.parametrize("role", [Role.USER, Role.OPERATOR])
@pytest.mark.parametrize("more", [{"identity_path": "cache/of-another"}, {"server_names": ["a.test"]}])
def test_a_consumer_job_is_itself(role: Role, more: dict):
    with pytest.raises(BeamwireError) as refused:
        asked_by(role, JobSpec(executable="/opt/bin/consume", enroll=True, **more))
    assert refused.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize(
    "more",
    [
        {"script": "id"},
        {"bundle": "env.tar"},
        {"inherit_environment": True},
        {"input_files": [InputFile(path="x")]},
        {"callback": Callback(url="http://127.0.0.1/")},
    ],
)
def test_a_consumer_job_of_a_user_is_the_program_that_is_named(more: dict):
    asked_by(Role.USER, JobSpec(executable="/opt/bin/consume"))
    with pytest.raises(BeamwireError) as refused:
        asked_by(Role.USER, JobSpec(executable="/opt/bin/consume", **more))
    assert [v.field for v in refused.value.violations] == [f"transfer.consumer_jobs[0].spec.{next(iter(more))}"]


def test_a_consumer_job_of_a_user_says_nothing_to_the_scheduler_itself():
    asked_by(Role.USER, JobSpec(executable="/opt/bin/consume", placement=Placement(queue="fast")))
    place = Placement(backend="slurm", attributes={"nice": "0"})
    with pytest.raises(BeamwireError) as refused:
        asked_by(Role.USER, JobSpec(executable="/opt/bin/consume", placement=place))
    assert [v.field for v in refused.value.violations] == ["transfer.consumer_jobs[0].spec.placement.attributes"]
