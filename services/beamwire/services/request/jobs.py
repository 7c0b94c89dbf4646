"""Consumer jobs as a request names them: what may be asked for, and the names that they get."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import json_format

from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.mesh.identity.ids import Role, SpiffeId, is_trust_domain
from beamwire.mesh.names import new_id
from beamwire.mesh.policy import FILE_NAME
from beamwire.mesh.rpc.access import Caller, current_caller
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.services.request.model import ConsumerJob

MOST_CONSUMER_JOBS = 16
# Seconds between the word that a job is to end and its end.
MOST_GRACE = 60
# Variables that Beamwire sets itself.
RESERVED = "BEAMWIRE_"
# What of a job only the facility's own services may say, and what changes what a program that is named does.
_SERVICES_ONLY = ("identity_path", "server_names")
_BROUGHT = ("script", "bundle", "inherit_environment", "callback", "input_files", "dependencies", "hold")
# How the policy writes a program that MPI runs.
MODULE = "module:"


def to_consumer_jobs(messages: Sequence[pb.ConsumerJob], own: str) -> tuple[ConsumerJob, ...]:
    """Return the consumer jobs that a request asks for, with their names, if the caller may have such programs run.

    Raises:
        BeamwireError: INVALID_FIELD, or POLICY_REFUSED naming the program.
    """
    if len(messages) > MOST_CONSUMER_JOBS:
        raise invalid_field("transfer.consumer_jobs", f"there may be {MOST_CONSUMER_JOBS} at the most")
    caller = current_caller()
    return tuple(_to_consumer_job(f"transfer.consumer_jobs[{n}]", m, own, caller) for n, m in enumerate(messages))


def from_consumer_job(consumer: ConsumerJob) -> pb.ConsumerJob:
    """Return a consumer job as the API shows it; its names once it is placed."""
    message = pb.ConsumerJob(
        trust_domain=consumer.trust_domain, spec=json_format.ParseDict(consumer.spec, job_pb.JobSpec())
    )
    if consumer.placed:
        message.job, message.identity = consumer.job, consumer.identity
    return message


def _to_consumer_job(field: str, message: pb.ConsumerJob, own: str, caller: Caller) -> ConsumerJob:
    trust_domain = "" if message.trust_domain == own else message.trust_domain
    if trust_domain and not is_trust_domain(trust_domain):
        raise invalid_field(f"{field}.trust_domain", f"{trust_domain[:100]!r} is no trust domain")
    _check_program(field, message.spec, caller, elsewhere=bool(trust_domain))
    # Nobody can guess it: at its facility, somebody else could otherwise be first with a job of that name, and consume.
    job_id = new_id()
    return ConsumerJob(
        trust_domain=trust_domain,
        facility=trust_domain or own,
        spec=json_format.MessageToDict(message.spec, preserving_proto_field_name=True),
        job=f"jobs/{job_id}",
        identity=str(SpiffeId(trust_domain or own, f"{Role.JOB}/{job_id}")),
    )


def _check_program(field: str, spec: job_pb.JobSpec, caller: Caller, *, elsewhere: bool) -> None:
    """Refuse what the caller may not have run: a job is a program under the account of a facility.

    Operators may have anything run, others what their rule names. Elsewhere, that facility looks at the rest too.
    """
    if any(name.startswith(RESERVED) for name in spec.environment):
        raise invalid_field(f"{field}.spec.environment", f"{RESERVED}… is not the caller's to set")
    _check_absent(field, spec, _SERVICES_ONLY)
    if caller.role in (Role.OPERATOR, Role.SERVICE):
        return
    _check_absent(field, spec, _BROUGHT)
    if spec.placement.attributes:
        raise invalid_field(f"{field}.spec.placement.attributes", "is not for consumer jobs; leave it out")
    if spec.grace.seconds > MOST_GRACE:
        raise invalid_field(f"{field}.spec.grace", f"must be at most {MOST_GRACE} s")
    if spec.directory:
        raise invalid_field(f"{field}.spec.directory", "a consumer job runs in its own directory; leave it out")
    if spec.environment and not elsewhere:
        raise invalid_field(
            f"{field}.spec.environment", "could change what the program does; only operators may set it; leave it out"
        )
    grant = caller.grant
    program = MODULE + spec.executable if spec.mpi else spec.executable
    if grant is None or not grant.runs(spec.executable, module=spec.mpi):
        rule = grant.rule if grant is not None else ""
        why = (
            f"the rule {rule!r} of the policy here does not let {caller} have {program[:200]!r} run, only: "
            f"{grant.executables if grant is not None else 'none'}; an operator of this facility can change that in "
            f"{FILE_NAME}"
        )
        violations = [FieldViolation(f"{field}.spec.executable", why)]
        raise BeamwireError(
            Reason.POLICY_REFUSED, why, metadata={"rule": rule, "check": "policy"}, violations=violations
        )


def _check_absent(field: str, spec: job_pb.JobSpec, names: Sequence[str]) -> None:
    present = {descriptor.name for descriptor, _ in spec.ListFields()}
    for name in names:
        if name in present:
            raise invalid_field(f"{field}.spec.{name}", "is not for consumer jobs; leave it out")
