"""What a member may do, explained: who it is here, and whether something would be allowed."""

from __future__ import annotations

import difflib
import posixpath
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from beamwire.buffer.v1 import buffer_service_pb2
from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.common.v1 import access_pb2
from beamwire.job.v1 import job_service_pb2
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.delegation import describe
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.patterns import ANYTHING
from beamwire.mesh.placements import ANYWHERE, Place
from beamwire.mesh.policy import FILE_NAME, Grant, PolicySource, short_name
from beamwire.mesh.policy_file import DATASET_KINDS
from beamwire.mesh.rpc.access import (
    Caller,
    certificate_end,
    check_delegated,
    check_role,
    check_rule,
    current_caller,
    declared_access,
)
from beamwire.mesh.rpc.convert import to_timestamp
from beamwire.request.v1 import request_service_pb2

_CONTRACTS: Final = (request_service_pb2, job_service_pb2, buffer_service_pb2, pb)
CREATE_JOB: Final = "JobService/CreateJob"
_PLACE: Final = ("backend", "queue", "account", "reservation")


@dataclass
class _Verdict:
    """The answer as it grows: each reason in the order in which it counts."""

    allowed: bool = True
    reasons: list[str] = field(default_factory=list[str])
    rule: str = ""

    def refuse(self, why: str) -> None:
        self.allowed = False
        self.reasons.append(why)


class AccessAdviser:
    """Answers by the policy of the facility, as the services apply it."""

    def __init__(self, policy: PolicySource, credentials: Credentials) -> None:
        self._policy = policy
        self._credentials = credentials

    async def who_am_i(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:
        """Say who the caller is here."""
        caller = current_caller()
        assert caller.role is not None, "an anonymous caller does not get here"
        assert caller.grant is not None
        handed = caller.delegation
        return pb.WhoAmIResponse(
            identity=str(caller),
            role=access_pb2.Role.Value(f"ROLE_{caller.role.name}"),
            rule=caller.grant.rule,
            # A token makes no transfers, and so reads no datasets.
            datasets=() if handed else caller.grant.datasets.texts,
            expire_time=to_timestamp(certificate_end(context.auth_context())),
            delegated_by=handed.owner if handed else "",
            delegation=describe(handed) if handed else (),
        )

    async def check_access(self, request: pb.CheckAccessRequest, context: Any) -> pb.CheckAccessResponse:
        """Say whether something would be allowed; of others only to operators, for it tells what they may do."""
        verdict = _Verdict()
        caller = self._subject(request.identity, verdict)
        method = find_method(request.method) if request.method else ""
        dataset = canonical(request.dataset) if request.dataset else ""
        place = place_of(request.placement) if request.placement else None
        if not method and not dataset and place is None:
            raise invalid_field("method", "say what is to be allowed: a method, a dataset, a placement, or all of them")
        if caller is not None and caller.grant is not None:
            verdict.rule = caller.grant.rule
            _judge_method(verdict, caller, method)
            _judge_dataset(verdict, caller.grant, dataset)
            _judge_place(verdict, caller.grant, place)
        return pb.CheckAccessResponse(allowed=verdict.allowed, reasons=verdict.reasons, rule=verdict.rule)

    def _subject(self, identity: str, verdict: _Verdict) -> Caller | None:
        """Who it is about; None if the policy, or trust, gives it nothing."""
        asker = current_caller()
        if not identity or identity == str(asker):
            assert asker.grant is not None, "an anonymous caller does not get here"
            verdict.reasons.append(_who(asker, asker.grant))
            return asker
        if asker.role is not Role.OPERATOR:
            raise BeamwireError(
                Reason.ROLE_NOT_ALLOWED,
                "only operators may ask what somebody else may do; leave the identity out to ask about yourself",
                metadata={"allowed_roles": Role.OPERATOR.value},
            )
        member = SpiffeId.parse(identity)
        if member.trust_domain not in self._credentials.trust:
            verdict.refuse(
                f"the trust domain {member.trust_domain} is not believed here; `beamwire trust accept` would begin it"
            )
            return None
        try:
            grant = self._policy.current.grant(member)
        except BeamwireError as error:
            verdict.refuse(error.message)
            verdict.rule = error.metadata.get("rule", "")
            return None
        found = Caller(member, grant.role, grant=grant)
        verdict.reasons.append(_who(found, grant))
        return found


def find_method(text: str) -> str:
    """The full name of `RequestService/CreateTransfer`, or of a full one; INVALID_FIELD naming the nearest one."""
    known = methods()
    wanted = text.removeprefix("/")
    if wanted in known.values():
        return wanted
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    raise invalid_field("method", f"there is no method {text[:100]!r}" + (f"; did you mean {near[0]}?" if near else ""))


@cache
def methods() -> dict[str, str]:
    """The full names of the contract's methods by their short ones."""
    return {
        f"{service.name}/{method.name}": f"{service.full_name}/{method.name}"
        for contract in _CONTRACTS
        for service in contract.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def canonical(dataset: str) -> str:
    """The name of a dataset as the policy knows it; INVALID_FIELD if it is none."""
    if not dataset.startswith(DATASET_KINDS) or "\0" in dataset:
        raise invalid_field("dataset", f"must be exp:<experiment> or path:<absolute path>, not {dataset[:100]!r}")
    kind, _, name = dataset.partition(":")
    if kind != "path":
        return dataset
    end = "/" if name.endswith("/") and name != "/" else ""
    return f"path:/{posixpath.normpath(name).lstrip('/')}{end}"


def place_of(text: str) -> Place:
    """The place that `backend/queue/account/reservation` names, as many of them as are there; INVALID_FIELD if none."""
    parts = text.split("/")
    if not parts[0] or len(parts) > len(_PLACE):
        raise invalid_field("placement", f"must be {'/'.join(_PLACE)}, or less of it, not {text[:100]!r}")
    backend, queue, account, reservation = [*parts, "", "", ""][: len(_PLACE)]
    return Place(backend, queue, account, reservation)


def _who(caller: Caller, grant: Grant) -> str:
    by = f"the rule {grant.rule!r} of {FILE_NAME}" if grant.rule else "the facility's own default"
    handed = f", with what {caller.delegation.owner} handed over" if caller.delegation else ""
    return f"{caller} is {grant.role} here, by {by}{handed}"


def _judge_method(verdict: _Verdict, caller: Caller, method: str) -> None:
    if not method:
        return
    for check in (check_role, check_rule, check_delegated):
        try:
            check(f"/{method}", caller)
        except BeamwireError as error:
            verdict.refuse(error.message)
            return
    verdict.reasons.append(f"{short_name(method)} is for {caller.role}")
    if short_name(method) == CREATE_JOB and caller.role in (Role.USER, Role.PARTNER) and caller.grant is not None:
        _judge_programs(verdict, caller.grant)
    access = declared_access(method)
    made = short_name(method).partition("/")[2].startswith("Create")
    if access is not None and access.owner_only and not caller.unlimited and not made:
        verdict.reasons.append(
            f"{short_name(method)} reaches only what {caller.acts_for} owns; the service that has it says whose it is"
        )


def _judge_programs(verdict: _Verdict, grant: Grant) -> None:
    by = f"the rule {grant.rule!r}" if grant.rule else "the facility's own default"
    if not grant.executables.all:
        verdict.refuse(
            f"{by} names no program that may be run; an operator of this facility can change that in {FILE_NAME}"
        )
    else:
        verdict.reasons.append(f"{by} lets these programs be run: {grant.executables}")


def _judge_dataset(verdict: _Verdict, grant: Grant, dataset: str) -> None:
    if not dataset:
        return
    found = grant.datasets.match(dataset)
    by = f"the rule {grant.rule!r}" if grant.rule else "the facility's own default"
    if found is None:
        verdict.refuse(
            f"{by} does not allow {dataset}, only: {grant.datasets}; an operator of this facility can change that in "
            f"{FILE_NAME}"
        )
    elif grant.datasets is ANYTHING or found.text == "**":
        verdict.reasons.append(f"{by} allows every dataset, except in places that no request may read")
    else:
        verdict.reasons.append(f"{by} allows {dataset} as {found}; where links lead to is looked at when it is read")


def _judge_place(verdict: _Verdict, grant: Grant, place: Place | None) -> None:
    if place is None:
        return
    by = f"the rule {grant.rule!r}" if grant.rule else "the facility's own default"
    beyond = grant.placements.beyond(place)
    if beyond:
        verdict.refuse(
            f"{by} does not let anything be run on {place}: its {' and '.join(beyond)} must be others; where it may: "
            f"{grant.placements}; an operator of this facility can change that in {FILE_NAME}"
        )
    elif grant.placements is ANYWHERE:
        verdict.reasons.append(f"{by} names no placements: whatever backend there is may be used")
    else:
        verdict.reasons.append(f"{by} allows {place}; where it may: {grant.placements}")
