"""Installs psana, which reads LCLS-II runs, into the environment of the Python that runs this script.

psana needs pykerberos, which is compiled and wants gcc and the headers of Kerberos, and uses it for calls to the
logbook only. Where it cannot be built, psana is installed with everything else it needs, and the streamer's psana
source supplies a stand-in for the module `kerberos` that refuses every call with a clear message.

    python deploy/install_psana.py
"""

from __future__ import annotations

import subprocess
import sys

WITHOUT_DEPENDENCIES = ("psana>=4.3,<5", "lcls-krtc")
DEPENDENCIES = (
    "amityping",
    "pymongo",
    "pyzmq",
    "kafka-python",
    "scipy",
    "numpy",
    "h5py",
    "mpi4py",
    "mpich",
    "psutil",
    "requests",
    "prometheus-client",
)
# `import psana` in a fresh interpreter, with the same stand-in for kerberos that the streamer uses.
PROBE = """
import importlib.util, sys, types
if importlib.util.find_spec("kerberos") is None:
    sys.modules["kerberos"] = types.ModuleType("kerberos")
import psana
from psana import DataSource
from psana.dgramedit import DgramEdit
"""


def pip_error(*arguments: str) -> str:
    """What `pip install` with these arguments complains about; empty if it works."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return ""
    return done.stdout.strip() or f"pip ended with code {done.returncode}"


def psana_error() -> str:
    """The last line of what `import psana` complains about; empty if it works."""
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        return ""
    lines = probe.stderr.strip().splitlines()
    return lines[-1] if lines else f"python ended with code {probe.returncode}"


def main() -> int:
    """Installs, and returns the exit code: 0 if `import psana` works afterwards."""
    if not psana_error():
        print("psana is installed already.")
        return 0
    print("Installing psana, which reads LCLS-II runs, and what it needs; this takes a minute or two.", flush=True)
    if first := pip_error("psana>=4.3,<5"):
        print("psana could not be installed with all it asks for; most likely pykerberos could not be compiled.")
        print(
            "Installing it without pykerberos: reading runs works, calls to the experiment logbook do not.", flush=True
        )
        if second := pip_error(*DEPENDENCIES) or pip_error("--no-deps", *WITHOUT_DEPENDENCIES):
            print(f"{first}\n\nThat failed too:\n{second}\n")
            print("Install by hand, then run this again:")
            print(f"    {sys.executable} -m pip install {' '.join(DEPENDENCIES)}")
            print(f"    {sys.executable} -m pip install --no-deps {' '.join(WITHOUT_DEPENDENCIES)}")
            return 1
    if error := psana_error():
        print(f"psana is installed but cannot be imported: {error}")
        print("Install what is missing there (for pykerberos: gcc and the headers of Kerberos,")
        print("`apt install gcc libkrb5-dev` or `dnf install gcc krb5-devel`), then run this again.")
        return 1
    print("psana is installed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
