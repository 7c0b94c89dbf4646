"""Slurm's commands, run with a bound on their time, and what they print as values."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError, Reason

# Seconds: a controller that is away costs the commands about nine before they say so.
COMMAND_TIMEOUT: Final = 60.0
# In one list of them.
MOST_HOSTS: Final = 100_000
# What the commands say when nobody can tell whether the controller did what they asked.
_UNREACHABLE: Final = re.compile(
    r"unable to contact slurm controller|socket timed out|zero bytes were transmitted"
    r"|connection (refused|timed out|reset)|slurm backup controller|unable to contact slurmdbd"
    r"|temporarily unable|controller .*standby"
    r"|could not establish a configuration source|unspecified error|protocol authentication error",
    re.IGNORECASE,
)
_UNKNOWN_JOB: Final = re.compile(r"invalid job id", re.IGNORECASE)
_NO_JSON: Final = re.compile(r"unrecognized option|invalid option|serializer|plugin|data_parser", re.IGNORECASE)
_NO_ACCOUNTING: Final = re.compile(r"accounting storage is disabled", re.IGNORECASE)
_START: Final = re.compile(r"to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)")
_COLUMNS: Final = ("JobID", "Name", "State", "Reason", "NodeList", "exit_code", "RestartCnt")


@dataclass(frozen=True)
class Listed:
    """A job as Slurm lists it. `exit_code` is 128 + n if signal n ended its script, None if Slurm does not say."""

    id: int
    name: str
    state: str
    reason: str = ""
    nodes: tuple[str, ...] = ()
    exit_code: int | None = None
    restarts: int = 0


class SlurmCommands:
    """Runs Slurm's commands as this process's user.

    Args:
        path: the directory of the commands; empty: they are on PATH.
        conf: the file for SLURM_CONF; empty: as this host has it.
    """

    def __init__(self, path: str = "", conf: str = "") -> None:
        self._path = path or os.environ.get("PATH", os.defpath)
        self._environment = _environment(self._path, conf)
        self._json = True
        self._accounting = True

    def program(self, name: str) -> str:
        """Return where a command is: its path here, or its name if it is not here, but may be on a node."""
        return shutil.which(name, path=self._path) or name

    async def run(self, name: str, *arguments: str, stdin: bytes = b"") -> str:
        """Run a command; return what it printed.

        Raises:
            BeamwireError: SERVICE_UNAVAILABLE if it may or may not have come through, LAUNCH_FAILED with its own words
                if it was refused.
        """
        return (await self._run(name, *arguments, stdin=stdin))[0]

    async def _run(self, name: str, *arguments: str, stdin: bytes) -> tuple[str, str]:
        """Run a command; return what it printed, and what it said besides."""
        try:
            process = await asyncio.create_subprocess_exec(
                self.program(name),
                *arguments,
                env=self._environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            message = f"{name} cannot be run: {error}; install Slurm's commands, or set `path` of the backend"
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, message) from error
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                out, err = await process.communicate(stdin)
        except TimeoutError as error:
            message = f"{name} did not answer within {COMMAND_TIMEOUT:g} s"
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, message) from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        said = err.decode(errors="replace").strip()
        if process.returncode != 0:
            raise _failure(name, said or out.decode(errors="replace").strip() or f"exit code {process.returncode}")
        return out.decode(errors="replace"), said

    async def jobs(self) -> list[Listed]:
        """Return all jobs of this user that the controller knows, those that ended a short while ago included."""
        common = ("--states=all", f"--user={_user()}")
        if self._json:
            try:
                return _readable(parse_json, await self.run("squeue", "--json", *common))
            except BeamwireError as error:
                if error.reason is not Reason.LAUNCH_FAILED or not _NO_JSON.search(error.message):
                    raise
                self._json = False
        columns = ",".join(f"{column}:|" for column in _COLUMNS)
        return _readable(parse_columns, await self.run("squeue", *common, "--noheader", "-O", columns))

    async def accounted(self, name: str) -> list[Listed]:
        """Return the jobs of a name that the accounting knows; none where there is no accounting."""
        if not self._accounting:
            return []
        columns = "--format=JobIDRaw,JobName,State,NodeList,ExitCode,Reason"
        try:
            # From the epoch on: its own default is this day's midnight.
            found = await self.run(
                "sacct", "-X", "-n", "-P", "--starttime=1970-01-02", f"--name={name}", f"--user={_user()}", columns
            )
        except BeamwireError as error:
            if not _NO_ACCOUNTING.search(error.message):
                raise
            self._accounting = False
            return []
        return _readable(parse_accounted, found)

    async def submit(self, options: Iterable[str], script: str) -> int:
        """Give a batch script to sbatch; return the job's id."""
        answer = await self.run("sbatch", "--parsable", *options, stdin=script.encode())
        # With the cluster's name behind a semicolon, at a site that has several.
        return int(answer.split(";")[0])

    async def start_time(self, options: Iterable[str], script: str) -> datetime:
        """Return when a batch script would begin to run, if it were given to sbatch now; it is not.

        LAUNCH_FAILED if it would be refused, UNSUPPORTED if this Slurm does not say.
        """
        _, said = await self._run("sbatch", "--test-only", *options, stdin=script.encode())
        found = _START.search(said)
        if found is None:
            raise BeamwireError(Reason.UNSUPPORTED, f"sbatch --test-only does not say when, but: {said[:200]!r}")
        # In the time zone of this host.
        return datetime.fromisoformat(found[1]).astimezone()

    async def signal(self, name: str, *options: str) -> None:
        """Have scancel do something to the jobs of a name; one that has ended meanwhile is no failure."""
        try:
            await self.run("scancel", "--quiet", f"--user={_user()}", f"--name={name}", *options)
        except BeamwireError as error:
            if not _UNKNOWN_JOB.search(error.message) and error.reason is not Reason.LAUNCH_FAILED:
                raise

    async def partitions(self) -> list[str]:
        """Return the names of the partitions that are up."""
        rows = (line.split("|") for line in (await self.run("sinfo", "--noheader", "-o", "%R|%a")).splitlines())
        return list(dict.fromkeys(row[0] for row in rows if row[1:] == ["up"]))

    async def version(self) -> str:
        """Return the version of the commands."""
        return (await self.run("sinfo", "--version")).strip()


def _readable(parse: Callable[[str], list[Listed]], text: str) -> list[Listed]:
    try:
        return parse(text)
    except (ValueError, LookupError, TypeError) as error:
        message = f"Slurm's answer cannot be read ({error!r}); it begins: {text[:200]!r}"
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, message) from error


def parse_json(text: str) -> list[Listed]:
    """Read what `squeue --json` prints, in the forms of Slurm 22.05 (plain values) and 23.02 on (values in objects).

    22.05 lists the jobs of all users, whatever it is asked for; and no job, with exit code 0, where the controller is
    away: SERVICE_UNAVAILABLE.
    """
    document = json.loads(text)
    if errors := document.get("errors"):
        words = "; ".join(f"{error.get('description', '')}: {error.get('error', '')}" for error in errors)
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"squeue: {words}; slurmctld may be away")
    user = os.geteuid()
    return [_from_json(job) for job in document["jobs"] if int(job.get("user_id", user)) == user]


def _from_json(job: Mapping[str, Any]) -> Listed:
    states = job["job_state"]
    # A list begins with the state; flags follow, of which COMPLETING and those like it say more.
    state = states if isinstance(states, str) else next((s for s in states[1:] if s in _FLAGS), states[0])
    return Listed(
        id=int(job["job_id"]),
        name=str(job["name"]),
        state=state,
        reason=_word(str(job.get("state_reason", ""))),
        nodes=expand(str(job.get("nodes", ""))),
        exit_code=_exit_code(job.get("exit_code")),
        restarts=_number(job.get("restart_cnt")) or 0,
    )


_FLAGS: Final = frozenset({"COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "STOPPED"})


def _exit_code(value: Any) -> int | None:
    if isinstance(value, Mapping):
        signal = value.get("signal", {})
        number = _number(signal.get("id", signal.get("signal_id"))) if isinstance(signal, Mapping) else None
        return 128 + number if number else _number(value.get("return_code"))
    return None if value is None else _wait_status(int(value))


def _number(value: Any) -> int | None:
    if isinstance(value, Mapping):
        return int(value["number"]) if value.get("set", True) and "number" in value else None
    return None if value is None else int(value)


def _wait_status(status: int) -> int:
    return 128 + (status & 0x7F) if status & 0x7F else (status >> 8) & 0xFF


def parse_columns(text: str) -> list[Listed]:
    """Read what `squeue -O` prints for our columns, whatever the names and reasons hold."""
    found = []
    for line in text.splitlines():
        job, name, state, reason, nodes, code, restarts = line.split("|")[: len(_COLUMNS)]
        exit_code = _wait_status(int(code)) if code.isdigit() else None
        found.append(Listed(int(job), name, state, _word(reason), expand(nodes), exit_code, int(restarts or 0)))
    return found


def parse_accounted(text: str) -> list[Listed]:
    """Read what sacct prints for our columns."""
    found = []
    for line in text.splitlines():
        job, name, state, nodes, code, reason = line.split("|")[:6]
        status, _, signal = code.partition(":")
        exit_code = 128 + int(signal) if signal not in ("", "0") else int(status or 0)
        # `CANCELLED by 1000`
        word, _, detail = state.partition(" ")
        nodes = "" if nodes == "None assigned" else nodes
        found.append(Listed(int(job), name, word, detail or _word(reason), expand(nodes), exit_code))
    return found


def _word(reason: str) -> str:
    return "" if reason in ("None", "(null)", "n/a", "N/A") else reason.strip()


def expand(hosts: str) -> tuple[str, ...]:
    """Return the hosts of a list as Slurm writes it: `node[01-03,7],login1`; ValueError for what is no such list."""
    if hosts in ("", "(null)", "None", "n/a"):
        return ()
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        found += _expand_one(part)
    return tuple(found)


def _expand_one(part: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    ranges, _, tail = rest.partition("]")
    ends = _expand_one(tail)
    found: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if len(found) + len(numbers) * len(ends) > MOST_HOSTS:
            raise ValueError(f"a list of more than {MOST_HOSTS} hosts")
        found += [f"{head}{number:0{len(first)}}{end}" for number in numbers for end in ends]
    return found


def _failure(name: str, said: str) -> BeamwireError:
    unreachable = _UNREACHABLE.search(said)
    reason = Reason.SERVICE_UNAVAILABLE if unreachable else Reason.LAUNCH_FAILED
    # Each line begins with the command's name: `sbatch: error: …`.
    words = "; ".join(re.sub(r"^\w+: (error|fatal): ", "", line) for line in said.splitlines())
    return BeamwireError(reason, f"{name}: {words}")


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _environment(path: str, conf: str) -> dict[str, str]:
    """Nothing of our own but what the commands need: SBATCH_… and SQUEUE_… would change what they do."""
    kept = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME", "TZ", "SLURM_CONF") if name in os.environ}
    return {**kept, "PATH": path, "LC_ALL": "C.UTF-8", **({"SLURM_CONF": conf} if conf else {})}
