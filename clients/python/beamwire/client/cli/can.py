"""`beamwire can`: whether you may do something, and why, asked of the facility as its services would decide it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import click

from beamwire.client.cli.context import Cli, Command, pass_cli
from beamwire.client.cli.failures import FAILED
from beamwire.client.client import Client
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE

# What people say for what the contract calls a method: by the kind of resource, by the word.
ACTIONS: Final[dict[str, dict[str, str]]] = {
    "transfer": {
        "create": "RequestService/CreateTransfer",
        "read": "RequestService/GetTransfer",
        "list": "RequestService/ListTransfers",
        "watch": "RequestService/WatchTransfer",
        "cancel": "RequestService/CancelTransfer",
    },
    "buffer": {
        "create": "BufferService/CreateBuffer",
        "read": "BufferService/GetBuffer",
        "list": "BufferService/ListBuffers",
        "watch": "BufferService/WatchBuffer",
        "consume": "BufferService/IssueTicket",
        "produce": "BufferService/IssueTicket",
        "seal": "BufferService/SealBuffer",
        "revoke": "BufferService/RevokeAccess",
        "delete": "BufferService/DeleteBuffer",
    },
    "job": {
        "create": "JobService/CreateJob",
        "read": "JobService/GetJob",
        "list": "JobService/ListJobs",
        "watch": "JobService/WatchJob",
        "tail": "JobService/TailLogs",
        "cancel": "JobService/CancelJob",
        "delete": "JobService/DeleteJob",
    },
    "certificate": {
        "renew": "CertificateService/RenewCertificate",
        "read": "CertificateService/GetCertificate",
        "list": "CertificateService/ListCertificates",
    },
    "member": {
        "invite": "CertificateService/CreateJoinToken",
        "revoke": "CertificateService/RevokeMember",
        "reinstate": "CertificateService/ReinstateMember",
    },
    "token": {
        "create": "CertificateService/CreateDelegationToken",
        "revoke": "CertificateService/RevokeDelegationToken",
    },
    "facility": {
        "introduce": "CertificateService/IntroduceFacility",
        "accept": "CertificateService/AcceptIntroduction",
        "remove": "CertificateService/DeleteTrustBundle",
    },
    "authority": {
        "read": "CertificateService/DescribeAuthority",
        "rotate": "CertificateService/RotateAuthority",
    },
    "audit": {"list": "CertificateService/ListAuditRecords", "read": "CertificateService/ListAuditRecords"},
}
_DATASETS: Final = ("exp:", "path:", "shmem:", "component:")
_ROLES: Final = {"consume": LINK_ROLE_CONSUME, "produce": LINK_ROLE_PRODUCE}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for: a method, a dataset, a placement, and the one resource that it is about, if there is one."""

    method: str = ""
    dataset: str = ""
    resource: str = ""
    placement: str = ""


@dataclass
class Answer:
    """Whether it would be allowed, and why, in the order in which it is decided."""

    allowed: bool
    reasons: list[str] = field(default_factory=list[str])
    rule: str = ""


@click.command(cls=Command)
@click.argument("action")
@click.argument("resource")
@click.option("--as", "identity", metavar="ID", default="", help="Ask about somebody else, as an operator.")
@pass_cli
def can(cli: Cli, action: str, resource: str, identity: str) -> None:
    """Say whether you may do ACTION with RESOURCE, and why. Exit code 0 if you may, 1 if not.

    \b
    beamwire can create transfer
    beamwire can cancel transfers/abc123
    beamwire can consume buffers/abc123
    beamwire can read exp:tmoc00118
    beamwire can read /data/run7/scan.h5
    beamwire can use slurm/main/mfx      (backend/queue/account, or less of it)
    beamwire can call RequestService/CreateTransfer
    """
    question = understand(action, resource)
    with cli.client() as client:
        if identity and "://" not in identity:
            identity = str(SpiffeId(client.facility.trust_domain, identity))
        answer = ask(client, action, question, identity)
    document = {"allowed": answer.allowed, "reasons": answer.reasons, "rule": answer.rule}
    cli.answer("\n".join(["yes" if answer.allowed else "no", *(f"  {each}" for each in answer.reasons)]), document)
    if not answer.allowed:
        click.get_current_context().exit(FAILED)


def understand(action: str, resource: str) -> Question:
    """What some words ask for; INVALID_FIELD with the words that are known."""
    if action == "call":
        return Question(method=resource)
    if action == "use":
        return Question(placement=resource)
    if resource.startswith("/"):
        resource = f"path:{resource}"
    if resource.startswith(_DATASETS):
        if action not in ("read", "stream"):
            raise invalid_field("action", f"a dataset can be read, not {action!r}")
        return Question(dataset=resource)
    kind, _, name = resource.partition("/")
    kind = kind if kind in ACTIONS else kind.removesuffix("s")
    if kind not in ACTIONS:
        raise invalid_field(
            "resource", f"{resource!r} is no {_nearest(resource, ACTIONS)}, and no dataset such as exp:tmoc00118"
        )
    if action not in ACTIONS[kind]:
        raise invalid_field("action", f"with a {kind} nobody can {action!r}, but {_nearest(action, ACTIONS[kind])}")
    return Question(ACTIONS[kind][action], resource=f"{kind}s/{name}" if name else "")


def _nearest(word: str, known: dict[str, object] | dict[str, str] | dict[str, dict[str, str]]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return near[0] if near else ", ".join(known)


def ask(client: Client, action: str, question: Question, identity: str) -> Answer:
    """Ask the policy, and then the service that has the resource."""
    found = client.check_access(question.method, question.dataset, identity, question.placement)
    answer = Answer(found.allowed, list(found.reasons), found.rule)
    if answer.allowed and question.resource:
        _ask_owner(client, action, question.resource, identity, answer)
    return answer


def _ask_owner(client: Client, action: str, resource: str, identity: str, answer: Answer) -> None:
    """For oneself by what the service lets one do; for somebody else an operator sees whose it is."""
    collection = resource.partition("/")[0]
    readers: dict[str, Callable[[str], object]] = {
        "transfers": client.get_transfer,
        "buffers": client.get_buffer,
        "jobs": client.jobs.get,
    }
    if collection not in readers:
        return
    try:
        if action in _ROLES and not identity:
            client.issue_ticket(resource, _ROLES[action])
            answer.reasons.append(f"{resource} has you among its {action}rs")
            return
        found = readers[collection](resource)
    except BeamwireError as error:
        if error.reason not in (Reason.NOT_OWNER, Reason.RESOURCE_NOT_FOUND, Reason.TOKEN_REFUSED):
            raise
        answer.allowed = False
        answer.reasons.append(error.message)
        return
    _judge(found, action, resource, identity, answer)


def _judge(found: object, action: str, resource: str, identity: str, answer: Answer) -> None:
    owner: str = getattr(found, "owner", "")
    if not identity:
        answer.reasons.append(f"{resource} is of {owner}, and you reach it")
        return
    members = list(getattr(getattr(found, "spec", None), f"{action}rs", ())) if action in _ROLES else [owner]
    above = SpiffeId.parse(identity).role in ("service", "operator") and action not in _ROLES
    answer.allowed = identity in members or above
    whose = f"has as its {action}rs: {', '.join(members) or 'nobody'}" if action in _ROLES else f"is of {owner}"
    answer.reasons.append(f"{resource} {whose}")
