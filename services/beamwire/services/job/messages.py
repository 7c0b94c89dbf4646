"""Jobs as the contract has them, and as they are kept."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, get_args

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import invalid_field
from beamwire.mesh.rpc.convert import from_duration, made_once, to_duration, to_timestamp
from beamwire.mesh.rpc.status import to_status
from beamwire.services.job.backends.interface import BackendState
from beamwire.services.job.files import FileEntry
from beamwire.services.job.model import (
    Callback,
    Dependency,
    InputFile,
    JobRecord,
    JobSpec,
    JobState,
    Placement,
    Resources,
    StepRecord,
    Transition,
)

Condition = Literal["COMPLETED", "ENDED", "ACTIVE"]
_CONDITIONS: dict[int, Condition] = {
    pb.Dependency.Condition.Value(f"CONDITION_{word}"): word for word in get_args(Condition)
}


def to_spec(message: pb.JobSpec) -> JobSpec:
    """Return a specification as it is kept, with its defaults."""
    placement = message.placement
    return JobSpec(
        display_name=message.display_name,
        executable=message.executable,
        script=message.script,
        arguments=tuple(message.arguments),
        directory=message.directory,
        environment=dict(message.environment),
        inherit_environment=message.inherit_environment,
        resources=_to_resources(message.resources),
        placement=Placement(
            backend=placement.backend or "local",
            queue=placement.queue,
            account=placement.account,
            reservation=placement.reservation,
            attributes=dict(placement.attributes),
        ),
        mpi=message.mpi,
        stdin=message.stdin,
        enroll=message.enroll,
        identity_path=message.identity_path,
        server_names=tuple(message.server_names),
        grace=from_duration(message.grace).total_seconds() if message.HasField("grace") else 5.0,
        input_files=tuple(InputFile(path=file.path, sha256=file.sha256.lower()) for file in message.input_files),
        bundle=message.bundle,
        dependencies=tuple(
            Dependency(job=d.job, condition=_to_condition(n, d.condition)) for n, d in enumerate(message.dependencies)
        ),
        hold=message.hold,
        callback=Callback(url=message.callback.url, secret=message.callback.secret)
        if message.HasField("callback")
        else None,
    )


def _to_condition(index: int, number: int) -> Condition:
    if number == pb.Dependency.CONDITION_UNSPECIFIED:
        return "COMPLETED"
    if number not in _CONDITIONS:
        raise invalid_field(f"job.spec.dependencies[{index}].condition", f"{number} is no condition that is known here")
    return _CONDITIONS[number]


def _to_resources(message: pb.Resources) -> Resources:
    # The processes follow from the nodes and what each of them runs, if those are all that is said.
    count = message.process_count or (message.node_count * message.processes_per_node) or max(message.node_count, 1)
    return Resources(
        process_count=count,
        duration=from_duration(message.duration).total_seconds() if message.HasField("duration") else None,
        node_count=message.node_count,
        processes_per_node=message.processes_per_node,
        cores_per_process=message.cores_per_process,
        gpus_per_process=message.gpus_per_process,
        memory_bytes=message.memory_bytes,
        exclusive=message.exclusive,
    )


def from_spec(spec: JobSpec) -> pb.JobSpec:
    """Return a specification as it is shown: without the secret of its callback."""
    message = pb.JobSpec(
        display_name=spec.display_name,
        executable=spec.executable,
        script=spec.script,
        arguments=spec.arguments,
        directory=spec.directory,
        environment=spec.environment,
        inherit_environment=spec.inherit_environment,
        resources=_from_resources(spec.resources),
        placement=pb.Placement(**spec.placement.model_dump()),
        mpi=spec.mpi,
        stdin=spec.stdin,
        enroll=spec.enroll,
        identity_path=spec.identity_path,
        server_names=spec.server_names,
        grace=to_duration(timedelta(seconds=spec.grace)),
        input_files=[pb.InputFile(path=file.path, sha256=file.sha256) for file in spec.input_files],
        bundle=spec.bundle,
        dependencies=[
            pb.Dependency(job=d.job, condition=pb.Dependency.Condition.Value(f"CONDITION_{d.condition}"))
            for d in spec.dependencies
        ],
        hold=spec.hold,
    )
    if spec.callback is not None:
        message.callback.url = spec.callback.url
    return message


def _from_resources(resources: Resources) -> pb.Resources:
    values = resources.model_dump(exclude={"duration"})
    seconds = resources.duration
    return pb.Resources(**values, duration=None if seconds is None else to_duration(timedelta(seconds=seconds)))


@made_once
def to_message(record: JobRecord, retention: timedelta) -> pb.Job:
    """Return a job as it is shown; one that has ended is forgotten some time later."""
    message = pb.Job(
        name=record.name,
        spec=from_spec(record.spec),
        owner=record.owner,
        state=_state(record.state),
        transitions=map(_transition, record.transitions),
        exit_code=record.step.exit_code,
        error=to_status(record.error.to_error()) if record.error else None,
        native_id=record.step.native_id,
        identity=record.identity,
        create_time=to_timestamp(record.create_time),
        update_time=to_timestamp(record.update_time),
        etag=record.etag,
        labels=record.labels,
        steps=map(_step, record.steps),
        state_reason=record.state_reason,
        outputs=record.outputs,
        end_time=to_timestamp(record.end_time),
        purge_time=to_timestamp(record.end_time + retention if record.end_time else None),
    )
    if record.spec.callback is not None:
        told = record.deliveries
        message.callback_status.CopyFrom(
            pb.Job.CallbackStatus(
                delivered_count=told.delivered,
                pending_count=max(0, told.events - told.delivered - told.abandoned),
                abandoned_count=told.abandoned,
                last_error=told.last_error,
            )
        )
    return message


def _state(state: str) -> pb.Job.State.ValueType:
    return pb.Job.State.Value(f"STATE_{JobState(state)}")


def _transition(transition: Transition) -> pb.Job.Transition:
    return pb.Job.Transition(
        state=_state(transition.state),
        time=to_timestamp(transition.time),
        reason=transition.reason,
        step=transition.step,
    )


def _step(step: StepRecord) -> pb.Job.Step:
    return pb.Job.Step(
        number=step.number,
        native_id=step.native_id,
        nodes=step.nodes,
        exit_code=step.exit_code,
        start_time=to_timestamp(step.start_time),
        end_time=to_timestamp(step.end_time),
    )


def to_file(entry: FileEntry, sha256: str = "") -> pb.JobFile:
    """Return a file of a job as it is shown."""
    return pb.JobFile(
        path=entry.path,
        size_bytes=entry.size,
        update_time=to_timestamp(entry.update_time),
        sha256=sha256,
        executable=entry.executable,
    )


def to_backend(name: str, state: BackendState, counts: dict[str, int]) -> pb.Backend:
    """Return a backend as it is shown, with the number of our jobs in each state."""
    return pb.Backend(
        name=name,
        kind=state.kind,
        available=state.available,
        detail=state.detail,
        queues=state.queues,
        job_counts=counts,
    )
