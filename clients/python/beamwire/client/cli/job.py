"""`beamwire job`: programs that the facility runs for you."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from beamwire.client.aiojobs import state_word
from beamwire.client.cli.context import Cli, Command, Group, as_dict, pass_cli
from beamwire.client.cli.get import parse_labels
from beamwire.client.cli.jobrun import run, submit
from beamwire.client.cli.jobtext import (
    BACKEND_HEADER,
    FILE_HEADER,
    JOB_HEADER,
    backend_row,
    file_row,
    job_row,
    job_text,
    show_logs,
)
from beamwire.client.cli.text import columns, size
from beamwire.client.client import connect
from beamwire.client.transfers import short_name
from beamwire.job.v1.job_service_pb2 import (
    LOG_STREAM_STDERR,
    LOG_STREAM_STDOUT,
    LOG_STREAM_UNSPECIFIED,
    Job,
)
from beamwire.mesh.errors import BeamwireError, invalid_field

_STATES = [name.removeprefix("STATE_") for name, number in Job.State.items() if number]
_EXIT_CODES = """Exit codes: 0 done; 1 it failed; 2 the command or the request is wrong;
3 the facility cannot be reached or does not permit it; 130 interrupted (143 by SIGTERM).
`run` ends with the job's own exit code, if it has one."""
_STREAMS = {"both": LOG_STREAM_UNSPECIFIED, "stdout": LOG_STREAM_STDOUT, "stderr": LOG_STREAM_STDERR}
# While somebody waits for the shell to complete a word.
_COMPLETION_SECONDS = 2.0


class _JobName(click.ParamType[str]):
    """The id of a job, which the shell completes."""

    name = "job"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the newest jobs; nothing if the facility does not answer soon."""
        pool = ThreadPoolExecutor(1)
        try:
            return pool.submit(_names, incomplete).result(_COMPLETION_SECONDS)
        except (BeamwireError, OSError, TooLate):
            return []
        finally:
            pool.shutdown(wait=False)


def _names(incomplete: str) -> list[CompletionItem]:
    with connect() as client:
        newest = list(itertools.islice(client.jobs.list(page_size=100), 100))
    found = [(short_name(each.name), each) for each in newest]
    return [CompletionItem(name, help=state_word(each)) for name, each in found if name.startswith(incomplete)]


_job = click.argument("job", type=_JobName())


@click.group(cls=Group)
def job() -> None:
    """Have programs run at the facility: on its host, or through its batch system.

    \b
    beamwire job run hostname                        run it, see what it prints, get its exit code
    beamwire job submit --script index.sh -u run7.h5 have it run, and go on
    beamwire job logs -f JOB
    beamwire job files get JOB result.stream
    """


job.add_command(run)
job.add_command(submit)


@job.command(name="ls", cls=Command)
@click.option("--state", type=click.Choice(_STATES, case_sensitive=False), help="Only jobs in this state.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only those with this label; repeatable.")
@click.option("--owner", metavar="SPIFFE_ID", help="Only those of this member, for operators.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The most to list.")
@pass_cli
def ls(cli: Cli, state: str | None, labels: tuple[str, ...], owner: str | None, limit: int) -> None:
    """List your jobs, newest first."""
    terms = [f"state={state.upper()}"] if state else []
    terms += [f'owner="{owner}"'] if owner else []
    terms += [f'labels.{key}="{value}"' for key, value in parse_labels(labels).items()]
    with cli.client() as client:
        found = client.jobs.list(" AND ".join(terms), page_size=min(limit, 1000))
        jobs = list(itertools.islice(found, limit))
    cli.answer(columns(JOB_HEADER, [job_row(each) for each in jobs]), {"jobs": [as_dict(each) for each in jobs]})


@job.command(cls=Command)
@_job
@pass_cli
def show(cli: Cli, job: str) -> None:
    """Print everything about JOB."""
    with cli.client() as client:
        found = client.jobs.get(job)
    cli.answer(job_text(found), found)


@job.command(cls=Command)
@_job
@click.option("-f", "--follow", is_flag=True, help="Go on until it has ended.")
@click.option("--step", type=click.IntRange(min=1), default=None, help="Of which of its runs; the newest without it.")
@click.option("--stream", type=click.Choice(list(_STREAMS)), default="both", help="Which of its outputs.")
@click.option("--tail", "last_bytes", type=click.IntRange(min=1), metavar="BYTES", help="Only the last so many bytes.")
@pass_cli
def logs(cli: Cli, job: str, follow: bool, step: int | None, stream: str, last_bytes: int | None) -> None:
    """Print what JOB printed."""
    with cli.client() as client:
        show_logs(
            client.jobs.logs(job, follow=follow, step=step or 0, stream=_STREAMS[stream], last_bytes=last_bytes or 0)
        )


@job.command(cls=Command)
@click.argument("jobs", nargs=-1, required=True, type=_JobName(), metavar="JOB...")
@pass_cli
def cancel(cli: Cli, jobs: tuple[str, ...]) -> None:
    """End jobs with all their processes; those that have ended stay as they are."""
    with cli.client() as client:
        for name in jobs:
            found = client.jobs.cancel(name)
            ending = "" if found.end_time.seconds else ", and is being cancelled"
            cli.answer(f"{found.name} {state_word(found)}{ending}", found)


@job.command(cls=Command)
@click.argument("jobs", nargs=-1, required=True, type=_JobName(), metavar="JOB...")
@pass_cli
def start(cli: Cli, jobs: tuple[str, ...]) -> None:
    """Let jobs go that were held."""
    with cli.client() as client:
        for name in jobs:
            found = client.jobs.start(name)
            going = ", and is let go" if found.state == Job.STATE_HELD else ""
            cli.answer(f"{found.name} {state_word(found)}{going}", found)


@job.command(cls=Command)
@_job
@pass_cli
def restart(cli: Cli, job: str) -> None:
    """Run JOB, which has ended, once more in the directory that it has left."""
    with cli.client() as client:
        found = client.jobs.restart(job)
    cli.answer(f"{found.name} {state_word(found)}, step {len(found.steps)}", found)


@job.command(cls=Command)
@click.argument("jobs", nargs=-1, required=True, type=_JobName(), metavar="JOB...")
@pass_cli
def rm(cli: Cli, jobs: tuple[str, ...]) -> None:
    """Forget jobs with their files; those that run are cancelled first."""
    with cli.client() as client:
        for name in jobs:
            client.jobs.delete(name)
            cli.answer(f"{name} is gone", {"deleted": name})


@job.command(cls=Command)
@pass_cli
def backends(cli: Cli) -> None:
    """Say where jobs can run."""
    with cli.client() as client:
        found = client.jobs.backends()
    rows = [backend_row(each) for each in found]
    cli.answer(columns(BACKEND_HEADER, rows), {"backends": [as_dict(each) for each in found]})


@job.group(cls=Group)
def files() -> None:
    """The files of a job's directory."""


@files.command(name="ls", cls=Command)
@_job
@pass_cli
def list_files(cli: Cli, job: str) -> None:
    """List the files of JOB."""
    with cli.client() as client:
        found = list(client.jobs.files(job))
    cli.answer(columns(FILE_HEADER, [file_row(each) for each in found]), {"files": [as_dict(each) for each in found]})


@files.command(cls=Command)
@_job
@click.argument("path")
@click.argument("local", required=False, type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@pass_cli
def get(cli: Cli, job: str, path: str, local: Path | None, overwrite: bool) -> None:
    """Get the file PATH of JOB, as LOCAL or under its own name."""
    target = local or Path(Path(path).name)
    target = target / Path(path).name if target.is_dir() else target
    if target.exists() and not overwrite:
        raise invalid_field("LOCAL", f"{target} exists; name another file, or add --overwrite")
    with cli.client() as client:
        found = client.jobs.download(job, path, target)
    cli.answer(f"{target} {size(found.size_bytes)} sha256 {found.sha256}", {"local": str(target), **as_dict(found)})


@files.command(cls=Command)
@_job
@click.argument("local", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("path", required=False)
@pass_cli
def put(cli: Cli, job: str, local: Path, path: str | None) -> None:
    """Put LOCAL into the directory of JOB, at PATH or under its own name."""
    with cli.client() as client:
        found = client.jobs.upload(job, local, path or "")
    cli.answer(f"{found.path} {size(found.size_bytes)} sha256 {found.sha256}", found)


for each in (job, *job.commands.values(), *files.commands.values()):
    # Those of the other commands tell of transfers.
    each.epilog = _EXIT_CODES
