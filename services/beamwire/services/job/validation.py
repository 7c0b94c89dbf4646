"""What a job must be like before it is stored, whoever asks and wherever it is to run."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final
from urllib.parse import urlsplit

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.mesh.names import parse_name
from beamwire.mesh.placements import Place
from beamwire.mesh.policy import Policy, check_place
from beamwire.services.job.files import check_path, check_sha256
from beamwire.services.job.model import Callback, JobSpec, Resources
from beamwire.services.job.receivers import Receivers

MAX_SCRIPT_BYTES: Final = 1024 * 1024
MAX_INPUT_FILES: Final = 1024
MAX_DEPENDENCIES: Final = 64
MAX_LABELS: Final = 64
MAX_GRACE: Final = 3600.0
"""Seconds between SIGTERM and SIGKILL."""
MIN_SECRET_BYTES: Final = 16
MAX_SECRET_BYTES: Final = 1024
MAX_OUTPUTS: Final = 16
MAX_OUTPUT_BYTES: Final = 1024
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")

_PLACE_FIELDS: Final = {"place": "job.spec.placement", "processes": "job.spec.resources.process_count"}

Problems = Iterator[tuple[str, str]]


def check_spec(spec: JobSpec, receivers: Receivers, name: str = "") -> None:
    """Raise INVALID_FIELD naming each field of a specification that cannot be; `name` is the job's.

    `receivers` says where its events may go.
    """
    violations = [FieldViolation(f"job.spec.{field}", text) for field, text in _problems(spec, receivers, name)]
    if violations:
        story = "; ".join(f"{v.field}: {v.description}" for v in violations)
        raise BeamwireError(Reason.INVALID_FIELD, story, violations=violations)


def check_policy(spec: JobSpec, owner: str, policy: Policy) -> None:
    """Raise POLICY_REFUSED for a job that its owner may not have run there, or not with so many processes."""
    place = Place(**spec.placement.model_dump(), processes=spec.resources.process_count)
    check_place(policy, owner, place, _PLACE_FIELDS)


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise INVALID_FIELD for labels that are too many, too long or no words."""
    if len(labels) > MAX_LABELS:
        raise invalid_field("job.labels", f"there may be {MAX_LABELS} at the most")
    for key, value in labels.items():
        if not _LABEL.fullmatch(key):
            raise invalid_field("job.labels", f"{key[:100]!r} must be 1 to 63 of letters, digits, _ and -")
        if len(value) > 256 or not value.isprintable():
            raise invalid_field("job.labels", f"the value of {key!r} must be printable, of 256 characters at the most")


def _problems(spec: JobSpec, receivers: Receivers, name: str) -> Problems:
    yield from _program(spec)
    yield from _numbers(spec.resources)
    yield from _environment(spec.environment)
    if not 0 < spec.grace <= MAX_GRACE:
        yield "grace", f"must be positive, and at most {MAX_GRACE:g} s"
    if spec.directory and not spec.directory.startswith("/"):
        yield "directory", "must be an absolute path"
    yield from _inputs(spec)
    yield from _dependencies(spec, name)
    if spec.callback is not None:
        yield from _callback(spec.callback, receivers)
    if (spec.identity_path or spec.server_names) and not spec.enroll:
        yield "enroll", "must be true for a job that has an identity_path or server_names"


def _program(spec: JobSpec) -> Problems:
    if not spec.executable and not spec.script:
        yield "executable", "say what to run: this or script"
    if spec.executable and spec.script:
        yield "script", "cannot be beside executable: a job runs one of them"
    if spec.script and spec.mpi:
        yield "script", "cannot be run with mpi, which takes a module's name; call mpiexec in the script"
    if len(spec.script.encode()) > MAX_SCRIPT_BYTES:
        yield "script", f"must have at most {MAX_SCRIPT_BYTES} bytes; upload a longer one as a file"
    for field in ("executable", "script", "directory", "display_name"):
        if "\0" in getattr(spec, field):
            yield field, "must not have a character of code 0"
    if any("\0" in argument for argument in spec.arguments):
        yield "arguments", "must not have a character of code 0"


def _numbers(resources: Resources) -> Problems:
    if resources.process_count < 1:
        yield "resources.process_count", "must be at least 1"
    counts = ("node_count", "processes_per_node", "cores_per_process", "gpus_per_process", "memory_bytes")
    for field in counts:
        if getattr(resources, field) < 0:
            yield f"resources.{field}", "must not be negative"
    if resources.duration is not None and resources.duration <= 0:
        yield "resources.duration", "must be positive"
    nodes, each, all_ = resources.node_count, resources.processes_per_node, resources.process_count
    if nodes > 0 and nodes > all_ > 0:
        yield "resources.node_count", f"{all_} processes cannot be on {nodes} nodes; ask for more processes"
    elif nodes > 0 and each > 0 and all_ > nodes * each:
        yield (
            "resources.process_count",
            f"{all_} processes do not fit on {nodes} nodes with {each} on each; make the three agree",
        )


def _environment(environment: Mapping[str, str]) -> Problems:
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name):
            yield "environment", f"{name[:100]!r} is no name of a variable"
        elif "\0" in value:
            yield "environment", f"the value of {name} must not have a character of code 0"


def _inputs(spec: JobSpec) -> Problems:
    paths = [file.path for file in spec.input_files]
    if len(paths) > MAX_INPUT_FILES:
        yield "input_files", f"there may be {MAX_INPUT_FILES} at the most; pack them into one archive"
    for index, file in enumerate(spec.input_files):
        field = f"input_files[{index}]"
        yield from _refused(check_path, f"{field}.path", file.path)
        if file.sha256:
            yield from _refused(check_sha256, f"{field}.sha256", file.sha256)
        if file.path in paths[:index]:
            yield f"{field}.path", f"{file.path[:100]!r} is named twice"
    if spec.bundle and spec.bundle not in paths:
        yield "bundle", "must be the path of one of the input_files"


def _refused(check: Callable[[str, str], str], field: str, text: str) -> Problems:
    try:
        check(field, text)
    except BeamwireError as error:
        yield from ((v.field, v.description) for v in error.violations)


def _dependencies(spec: JobSpec, name: str) -> Problems:
    if len(spec.dependencies) > MAX_DEPENDENCIES:
        yield "dependencies", f"there may be {MAX_DEPENDENCIES} at the most"
    for index, dependency in enumerate(spec.dependencies):
        field = f"dependencies[{index}].job"
        try:
            parse_name("jobs", dependency.job)
        except BeamwireError:
            yield field, f"must be jobs/<id>, not {dependency.job[:100]!r}"
        if dependency.job == name:
            yield field, "a job cannot wait for itself"


def _callback(callback: Callback, receivers: Receivers) -> Problems:
    try:
        url = urlsplit(callback.url)
        host, port = url.hostname or "", url.port
    except ValueError:
        yield "callback.url", "is no URL"
        return
    if not callback.url.isascii() or not callback.url.isprintable() or " " in callback.url:
        yield "callback.url", "must be written in printable ASCII, everything else in %XX"
    elif not host or port == 0:
        yield "callback.url", "names no host"
    elif url.scheme != "https" and not (url.scheme == "http" and is_loopback(host)):
        yield "callback.url", "must be https, or http on a loopback address"
    elif url.username is not None or url.password is not None:
        yield "callback.url", "must not carry a user and a password, which others could read; events are signed instead"
    elif url.fragment:
        yield "callback.url", "must not have a fragment, which is sent to nobody"
    elif refused := receivers.problem(host):
        yield "callback.url", refused
    if not MIN_SECRET_BYTES <= len(callback.secret) <= MAX_SECRET_BYTES:
        yield "callback.secret", f"must have {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes"


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this host, and can be no other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_outputs(present: Mapping[str, str], more: Mapping[str, str]) -> None:
    """Raise INVALID_FIELD for more outputs of a job, or longer ones, than it may tell."""
    for name, value in more.items():
        if not _LABEL.fullmatch(name) or len(value.encode()) > MAX_OUTPUT_BYTES:
            raise invalid_field(
                "outputs", f"{name[:100]!r} must be a word of letters, digits, _ and -, with {MAX_OUTPUT_BYTES} bytes"
            )
    if len({*present, *more}) > MAX_OUTPUTS:
        raise invalid_field("outputs", f"a step can tell {MAX_OUTPUTS} of them")
