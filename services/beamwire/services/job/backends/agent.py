"""What a batch system runs on a node: a shell script that starts the agent of a step, with Python or without.

With Python the agent is `beamwire.mesh.shim`, whose text lies beside the specification, so that nothing of Beamwire
need be installed there. Without, it is the script itself, which can do less: it finds the children that left its
process tree only by their environment, and only where there is grep.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from beamwire.mesh import shim
from beamwire.mesh.documents import read_document
from beamwire.mesh.processes import exit_of
from beamwire.services.job.backends import programs
from beamwire.services.job.backends.interface import Step
from beamwire.services.job.backends.slurm_commands import expand
from beamwire.services.job.backends.slurm_states import Told

AGENT: Final = "agent.py"
SPEC: Final = "spec.json"
PROGRAM: Final = "program.sh"
# The environment variable by which the script finds what the program has started.
MARK: Final = "BEAMWIRE_STEP_DIRECTORY"
# What the program gets of the environment that the batch system has made for it, by how the names begin.
TAKEN: Final = (
    "SLURM",
    "PBS_",
    "LSB_",
    "LSF_",
    "FLUX_",
    "COBALT_",
    "CUDA_",
    "ROCR_",
    "HIP_",
    "GPU_DEVICE_",
    "ZE_",
    "PMI",
)
# What the agent tells of it.
TOLD: Final = (
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "COBALT_JOBID", "HOSTNAME",
)  # fmt: skip

# What a batch system calls a job, a host, or several.
_WORD: Final = re.compile(r"[\w.@:,+\[\]-]{1,4096}")

_SCRIPT: Final = """\
#!/bin/sh
# Beamwire: step {number} of job {job}. What it runs and how it ended is in {directory}
umask 077
# What a script gives to its own srun.
export SLURM_EXPORT_ENV=ALL
cd {directory} || exit 1
exec >>agent.log 2>&1 </dev/null
ended() {{
    rm -rf exit.json.$$
    [ ! -d exit.json ] || [ -L exit.json ] || rm -rf exit.json
    printf '{{"exit_code": %d, "signal": %s, "error": "%s", "asked": %s, "timed_out": %s}}' "$@" >exit.json.$$
    mv exit.json.$$ exit.json
}}
{bundle}\
for python in {pythons}; do
    if "$python" -S -E -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        exec "$python" -S -E {agent} {spec}
    fi
done
printf '{{"boot_id": "%s", "shim_pid": %d, "shim_start": 0, "told": {{{told}}}}}' \\
    "$(read -r id </proc/sys/kernel/random/boot_id; echo "$id")" $$ {told_values} >process.json.$$
if ! ln process.json.$$ process.json; then
    rm process.json.$$
    exit 0
fi
rm process.json.$$
started() {{
    grep -lzFx {mark}={directory} /proc/[0-9]*/environ 2>/dev/null | while read -r path; do
        pid=${{path#/proc/}}
        echo "${{pid%/environ}}"
    done
}}
asked=false timed_out=false left=-1 limit={limit}
trap 'asked=true' TERM
trap 'timed_out=true' USR1
{mark}={directory} /bin/sh {program} <{stdin} >>stdout 2>>stderr &
child=$!
while kill -0 "$child" 2>/dev/null; do
    if [ "$left" -lt 0 ] && {{ "$asked" || "$timed_out"; }}; then
        left={grace}
        kill -s TERM "$child" $(started) 2>/dev/null
    elif [ "$left" -eq 0 ]; then
        kill -s KILL "$child" $(started) 2>/dev/null
    elif [ "$left" -gt 0 ]; then
        left=$((left - 1))
    fi
    sleep 1 &
    wait $! || :
    limit=$((limit - 1))
    [ "$limit" -ne 0 ] || timed_out=true
done
wait "$child"
code=$?
left=20
while [ -n "$(started)" ] && [ "$left" -gt 0 ]; do
    kill -s KILL $(started) 2>/dev/null
    left=$((left - 1))
done
signal=null
[ "$code" -le 128 ] || [ "$code" -gt 192 ] || signal=$((code - 128))
if "$timed_out"; then asked=false; fi
ended "$code" "$signal" "" "$asked" "$timed_out"
exit "$code"
"""

# Of two starts only one unpacks, and goes on: the other was not meant to be.
_BUNDLE: Final = """\
mkdir unpacked || exit 0
if ! {{ tar -xf {bundle} -C unpacked && rm -rf {target} && mv -T unpacked {target} && mkdir unpacked; }}; then
    ended 126 null 'the bundle cannot be unpacked; agent.log says why' false false
    exit 126
fi
"""


def write_files(step: Step, argv: Sequence[str], *, memory_bytes: int = 0) -> None:
    """Put what the agent reads into the step's directory. Nothing of it comes to the batch system."""
    spec = step.spec
    env = programs.variables(step, programs.inherited(spec))
    cwd = spec.directory or str(step.files)
    document = {
        "argv": list(argv),
        "env": env,
        "cwd": cwd,
        "stdin": "stdin" if spec.stdin else os.devnull,
        "grace": spec.grace,
        "limit": spec.resources.duration,
        "memory_bytes": memory_bytes,
        "take": list(TAKEN),
        "told": list(TOLD),
    }
    programs.write_script(step)
    _write(step.directory / "stdin", spec.stdin)
    _write(step.directory / PROGRAM, _program(argv, env, cwd).encode())
    _write(step.directory / AGENT, Path(shim.__file__).read_bytes())
    shim.write_json(step.directory / SPEC, document)


def batch_script(step: Step, native: str) -> str:
    """Return what the batch system runs; `native` is the environment variable that tells its own id."""
    spec = step.spec
    directory = shlex.quote(str(step.directory))
    target = step.files / programs.BUNDLE_DIRECTORY
    pythons = [sys.executable, "python3"]
    bundle = ""
    if spec.bundle:
        pythons = [str(target / "bin" / "python3"), *pythons]
        archive = shlex.quote(str(step.files / spec.bundle))
        bundle = _BUNDLE.format(target=shlex.quote(str(target)), bundle=archive)
    return _SCRIPT.format(
        number=step.number,
        job=step.job,
        directory=directory,
        bundle=bundle,
        pythons=" ".join(map(shlex.quote, pythons)),
        agent=AGENT,
        spec=SPEC,
        told=", ".join(f'"{name}": "%s"' for name in (native, "SLURM_JOB_NODELIST", "HOSTNAME")),
        told_values=" ".join(f'"${{{name}-}}"' for name in (native, "SLURM_JOB_NODELIST", "HOSTNAME")),
        mark=MARK,
        program=PROGRAM,
        stdin="stdin" if spec.stdin else os.devnull,
        # Below zero from the beginning, it never comes to zero.
        limit=-1 if spec.resources.duration is None else max(1, round(spec.resources.duration)),
        grace=max(1, round(spec.grace)),
    )


def _program(argv: Sequence[str], env: Mapping[str, str], cwd: str) -> str:
    """What the script without Python runs: secrets are in a file that only the user can read, never in argv."""
    names = {name: value for name, value in env.items() if name.isidentifier() and name.isascii()}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in names.items()]
    return "\n".join([*lines, f"cd {shlex.quote(cwd)} || exit 126", f"exec {shlex.join(argv)}", ""])


def _write(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def forestall(directory: Path) -> bool:
    """Take the place of the agent, so that a step which never began cannot begin any more; False if it has begun."""
    part = directory / f"process.json.{uuid.uuid4().hex}"
    shim.write_json(part, {"boot_id": "", "shim_pid": 0, "shim_start": 0, "told": {}, "forestalled": True})
    try:
        os.link(part, directory / "process.json")
    except FileExistsError:
        return (read_document(directory / "process.json") or {}).get("forestalled") is True
    finally:
        part.unlink()
    return True


def read_told(directory: Path, native: str) -> Told:
    """Return what the agent has written so far; `native` as in `batch_script`.

    What the program has put in its place says only that it was started.
    """
    # In this order: how it ended is written last, and what is read first may be older.
    end = read_document(directory / "exit.json")
    process = read_document(directory / "process.json")
    if (process is None and end is None) or (process or {}).get("forestalled") is True:
        return Told()
    said = (process or {}).get("told")
    told = {name: word(said.get(name)) for name in TOLD} if isinstance(said, dict) else {}
    nodes = _nodes(told.get("SLURM_JOB_NODELIST", "")) or tuple(filter(None, [told.get("HOSTNAME", "")]))
    ended = exit_of(end or {})
    if end is None or ended is None:
        return Told(started=True, native_id=told.get(native, ""), nodes=nodes)
    return Told(
        started=process is not None,
        native_id=told.get(native, ""),
        nodes=nodes,
        ended=True,
        exit_code=ended.exit_code,
        signal=ended.signal,
        error=ended.error,
        asked=end.get("asked") is True,
        timed_out=end.get("timed_out") is True,
        out_of_memory=ended.out_of_memory,
    )


def word(value: object) -> str:
    """Return what a batch system calls a job or its hosts, as a file says it; empty if that is no such word."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else ""


def _nodes(text: str) -> tuple[str, ...]:
    try:
        return expand(text)
    except (ValueError, RecursionError):
        return ()
