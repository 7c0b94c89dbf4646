"""What services of other facilities may have run here: the programs that the policy names, started as they are."""

from __future__ import annotations

import re
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.policy import FILE_NAME, Grant
from beamwire.services.job.model import JobSpec

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
    """Let a service of another facility have a program run, or refuse.

    Raises:
        BeamwireError: POLICY_REFUSED for a program that its rule does not name, or an environment that would change
            what runs; INVALID_FIELD for what no partner may say.
    """
    if spec.directory:
        raise invalid_field("job.spec.directory", "a job of another facility runs in its own directory; leave it out")
    if spec.process_count > processes:
        raise invalid_field("job.spec.resources.process_count", f"must be at most {processes}")
    if spec.grace > MOST_GRACE:
        raise invalid_field("job.spec.grace", f"must be at most {MOST_GRACE:g} s")
    _check_executable(spec, identity, grant)
    for name in spec.environment:
        if not _NAME.fullmatch(name):
            raise invalid_field("job.spec.environment", f"{name[:100]!r} is no name of a variable")
        if name not in PASSED and REFUSED.fullmatch(name):
            raise _refused(
                f"{identity} may not set {name} in the environment of a job: it can change what runs; leave it out",
                grant,
                "job.spec.environment",
            )


def _check_executable(spec: JobSpec, identity: str, grant: Grant) -> None:
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
