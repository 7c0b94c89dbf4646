"""What users and services of other facilities may have run: the programs that the policy names, started as they are."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.policy import FILE_NAME, Grant
from beamwire.services.job.model import JobSpec

# Who may run what this names may run anything, and bring it along.
EVERYTHING: Final = "**"
# Where to dial, and whom, is what a consumer that was placed here has to be told.
PASSED: Final = frozenset({"BEAMWIRE_CONNECT", "BEAMWIRE_FACILITY"})
# Seconds between the word that a job is to end and its end.
MOST_GRACE: Final = 60.0
# What makes a program load other code, find other programs, libraries or settings, or be somebody else.
REFUSED: Final = re.compile(
    r"""
    BEAMWIRE_.* | OTEL_.* | PATH | HOME | USER | LOGNAME | SHELL | ENV | IFS | PS4 | PROMPT_COMMAND | BASH.*
    | TMPDIR | TMP | TEMP | XDG_.* | EDITOR | VISUAL | PAGER | LESS.*
    | LD_.* | DYLD_.* | GCONV_PATH | LOCPATH | NLSPATH | GLIBC_TUNABLES | MALLOC_.* | GETCONF_DIR
    | HOSTALIASES | RES_OPTIONS | LOCALDOMAIN | .*PRELOAD.* | .*_PLUGIN_PATH | .*_LIBRARY_PATH
    | PYTHON.* | VIRTUAL_ENV | CONDA_.* | PIP_.* | UV_.* | JUPYTER.* | IPYTHON.* | NUMBA_.* | MPLCONFIGDIR
    | PERL.* | RUBY.* | GEM_.* | NODE_.* | NPM_.* | JAVA_.* | _JAVA.* | JDK_.* | CLASSPATH | LUA_.* | R_.* | JULIA_.*
    | PHP.* | TCL.* | GODEBUG | RUST_.* | GIT_.*
    | SSH_.* | SSL_.* | OPENSSL_.* | CURL_.* | .*_PROXY | KRB5.* | X509_.*
    | MPI.* | I_MPI_.* | OMPI_.* | PMI.* | PRTE_.* | HYDRA_.* | UCX_.* | FI_.* | SLURM.* | PBS_.*
    | GRPC_.* | REQUESTS_CA_BUNDLE | AWS_.* | GOOGLE_.* | KUBECONFIG | DOCKER_.* | GNUPGHOME | NETRC
    | TORCH.* | TRITON_.* | XLA_.* | JAX_.* | TF_.* | GTK_.* | GIO_.* | GST_.* | QT_.* | DBUS_.* | TERMINFO.* | TERMCAP
    | .*_MODULES? | .*_HOOKS? | .*_COMMAND | .*_OPTIONS | .*_OPTS | .*_CA_.*
    | CUDA_INJECTION.* | NSYS_.* | HDF5_.* | SIT_.*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check(spec: JobSpec, identity: str, grant: Grant, processes: int) -> None:
    """Let a user, or a service of another facility, have a program run, or refuse.

    Who may run anything (`executables = ["**"]`) may also bring it: a script, a bundle, a program that was uploaded,
    and whatever environment it needs.

    Raises:
        BeamwireError: POLICY_REFUSED for a program that its rule does not name, or an environment that would change
            what runs; INVALID_FIELD for what nobody but services and operators may say.
    """
    _check_place(spec, processes)
    if any(pattern.text == EVERYTHING for pattern in grant.executables.all):
        _check_names(spec, ("BEAMWIRE_", "OTEL_"), identity, grant)
        return
    _check_executable(spec, identity, grant)
    _check_brought(spec, identity, grant)
    for name in spec.environment:
        if name not in PASSED and REFUSED.fullmatch(name):
            raise _refused(
                f"{identity} may not set {name} in the environment of a job: it can change what runs; leave it out",
                grant,
                "job.spec.environment",
            )


def _check_place(spec: JobSpec, processes: int) -> None:
    """What a job of a user or a partner always is: in its own directory, under its own identity, and of some size."""
    services_only = "is for services of this facility only; leave it out"
    if spec.directory:
        raise invalid_field("job.spec.directory", "a job of yours runs in its own directory; leave it out")
    for field in ("identity_path", "server_names"):
        if getattr(spec, field):
            raise invalid_field(f"job.spec.{field}", services_only)
    if spec.resources.process_count > processes:
        raise invalid_field("job.spec.resources.process_count", f"must be at most {processes}")
    if spec.grace > MOST_GRACE:
        raise invalid_field("job.spec.grace", f"must be at most {MOST_GRACE:g} s")
    for name in spec.environment:
        if not _NAME.fullmatch(name):
            raise invalid_field("job.spec.environment", f"{name[:100]!r} is no name of a variable")


def _check_names(spec: JobSpec, prefixes: tuple[str, ...], identity: str, grant: Grant) -> None:
    for name in spec.environment:
        if name.upper().startswith(prefixes) and name not in PASSED:
            raise _refused(
                f"{identity} may not set {name} in the environment of a job: it is this facility's; leave it out",
                grant,
                "job.spec.environment",
            )


def _check_brought(spec: JobSpec, identity: str, grant: Grant) -> None:
    """A program that is named runs as it is here: nothing that was brought along may change what that is."""
    callback = spec.callback is not None and urlsplit(spec.callback.url).scheme != "https"
    brought = {
        "bundle": bool(spec.bundle),
        "inherit_environment": spec.inherit_environment,
        "placement.attributes": bool(spec.placement.attributes),
        "callback.url": callback,
    }
    for field, there in brought.items():
        if there:
            raise _refused(
                f"job.spec.{field} is for those who may run anything here (executables = [{EVERYTHING!r}]), which the "
                f"rule {grant.rule!r} of the policy does not let {identity}; leave it out"
                + (", or use an https URL" if field == "callback.url" else ""),
                grant,
                f"job.spec.{field}",
            )


def _check_executable(spec: JobSpec, identity: str, grant: Grant) -> None:
    if spec.script:
        raise _refused(
            f"a script can do anything, and the rule {grant.rule!r} of the policy here lets {identity} run only: "
            f"{grant.executables}; an operator here can write executables = [{EVERYTHING!r}] in {FILE_NAME}",
            grant,
            "job.spec.script",
        )
    if not grant.runs(spec.executable, module=spec.mpi):
        raise _refused(
            f"the rule {grant.rule!r} of the policy here does not let {identity} run {spec.executable[:200]!r}, "
            f"only: {grant.executables}; an operator of this facility can change that in {FILE_NAME}",
            grant,
            "job.spec.executable",
        )


def _refused(message: str, grant: Grant, field: str) -> BeamwireError:
    return BeamwireError(
        Reason.POLICY_REFUSED, message, metadata={"rule": grant.rule, "field": field, "check": "policy"}
    )
