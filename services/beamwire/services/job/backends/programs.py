"""What a step of a job comes down to, wherever it runs: a command line, an environment, a script, a bundle."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.backends.interface import Step
from beamwire.services.job.files import open_file
from beamwire.services.job.model import JobSpec

# What every job gets of the environment: where programs and libraries are, and nothing that could be a secret.
INHERITED: Final = (
    "PATH",
    "LD_LIBRARY_PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "USER",
    "VIRTUAL_ENV",
    "PYTHONPATH",
)
# What a job does not get even if it asks for all: what could be a secret, and what is the service's own process's.
WITHHELD: Final = re.compile(
    r"""
    BEAMWIRE_.* | OTEL_.* | TRACEPARENT | .*(TOKEN|SECRET|PASS(WORD|WD|PHRASE|FILE)?|CREDENTIAL|AUTH|COOKIE).*
    | (.*_)?(API)?KEYS?(_.*)? | .*_DSN | PG.* | AWS_.* | AZURE_.* | GOOGLE_.* | SSH_.* | GPG_.* | KRB5CCNAME | X509_.*
    | NOTIFY_SOCKET | LISTEN_.* | INVOCATION_ID | JOURNAL_STREAM | WATCHDOG_.* | DBUS_.* | XDG_RUNTIME_DIR
    | .*_CREDS?
    """,
    re.VERBOSE | re.IGNORECASE,
)
# A URL that carries a user's password.
_WITH_PASSWORD: Final = re.compile(r"://[^/\s@]*:[^/\s@]+@")
# Where a bundle is unpacked, in the job's directory.
BUNDLE_DIRECTORY: Final = "env"
MAX_BUNDLE_BYTES: Final = 64 * 1024**3
"""What a bundle may unpack to: more is a bomb."""


def inherited(spec: JobSpec, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what a job gets of an environment, that of this process unless another is named."""
    source = os.environ if environment is None else environment
    if not spec.inherit_environment:
        return {name: source[name] for name in INHERITED if name in source}
    return {
        name: value
        for name, value in source.items()
        if not WITHHELD.fullmatch(name) and not _WITH_PASSWORD.search(value)
    }


def variables(step: Step, base: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of a step: the base, what the specification adds, and what the service does."""
    found = {
        **base,
        # A launcher that is killed leaves its temporary files: here they go with the job.
        "TMPDIR": str(step.directory),
        # A module comes from where it is installed, not from what somebody has put into the job's directory. What it
        # prints is there at once; and if there is no room for it, nothing is left to be written at its end.
        **({"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} if step.spec.mpi else {}),
        **step.spec.environment,
        **step.environment,
    }
    if step.spec.bundle:
        brought = step.files / BUNDLE_DIRECTORY / "bin"
        found["PATH"] = os.pathsep.join(filter(None, (str(brought), found.get("PATH", os.defpath))))
    return found


def script_path(step: Step) -> Path:
    """Return where the script of a step is written."""
    return step.directory / "script"


def write_script(step: Step) -> None:
    """Put the script of a step, if it has one, where it can be run."""
    if not step.spec.script:
        return
    path = script_path(step)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o700), "w") as file:
        file.write(step.spec.script)


def command(step: Step, *, python: str = sys.executable) -> list[str]:
    """Return the command line of a step. With MPI, `executable` is a module, and one process needs no MPI.

    `python -m mpi4py` makes one failing rank abort the whole job, where plain Python would leave the others waiting.
    A job that brings a bundle is run by the Python in it.
    """
    spec = step.spec
    if spec.script:
        path = str(script_path(step))
        shell = [] if spec.script.startswith("#!") else ["/bin/sh"]
        return [*shell, path, *spec.arguments]
    if not spec.mpi:
        return [spec.executable, *spec.arguments]
    interpreter = "python3" if spec.bundle else python
    if spec.resources.process_count == 1:
        return [interpreter, "-m", spec.executable, *spec.arguments]
    launcher = "mpiexec" if spec.bundle else mpiexec()
    assert launcher is not None, "check() refuses MPI without mpiexec"
    ranks = str(spec.resources.process_count)
    return [launcher, "-n", ranks, interpreter, "-m", "mpi4py", "-m", spec.executable, *spec.arguments]


def mpiexec() -> str | None:
    """Return the path of mpiexec: the one installed beside Python (the mpich wheel), else the one on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def unpack_bundle(step: Step) -> None:
    """Unpack the bundle of a step, if it has one, in place of what an earlier step has left there.

    Raises:
        BeamwireError: LAUNCH_FAILED for what is no tar archive, or would write outside of its directory.
    """
    if not step.spec.bundle:
        return
    target = step.files / BUNDLE_DIRECTORY
    fresh = step.directory / BUNDLE_DIRECTORY
    for old in (fresh, target):
        if old.is_symlink() or old.is_file():
            old.unlink()
        else:
            shutil.rmtree(old, ignore_errors=True)
    try:
        # What the step before may have put in its place is not waited for.
        with (
            os.fdopen(open_file(step.files, step.spec.bundle), "rb") as file,
            tarfile.open(fileobj=file) as archive,
        ):
            _check_size(archive)
            archive.extractall(fresh, filter="data")
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, BeamwireError) as error:
        raise BeamwireError(
            Reason.LAUNCH_FAILED, f"the bundle {step.spec.bundle} cannot be unpacked: {error}"
        ) from error
    fresh.rename(target)


def _check_size(archive: tarfile.TarFile) -> None:
    if sum(member.size for member in archive if member.isreg()) > MAX_BUNDLE_BYTES:
        raise tarfile.TarError(f"it holds more than {MAX_BUNDLE_BYTES} bytes")
