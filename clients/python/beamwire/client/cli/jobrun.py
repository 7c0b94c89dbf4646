"""`beamwire job run` and `beamwire job submit`: have a program run, with its files, and be there while it does."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from beamwire.client.aiojobs import failure_of, file_sha256, has_ended, state_word
from beamwire.client.cli.context import Cli, Command, pass_cli
from beamwire.client.cli.estimate import length_of
from beamwire.client.cli.failures import FAILED
from beamwire.client.cli.get import parse_labels
from beamwire.client.cli.jobtext import ran, show_logs
from beamwire.client.cli.sizes import Size
from beamwire.client.client import Client
from beamwire.client.transfers import full_name, short_name
from beamwire.job.v1.job_service_pb2 import Dependency, InputFile, Job, JobSpec
from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.names import new_id

MOST_STDIN_BYTES = 8 * 1024 * 1024
_BEFORE = (Job.STATE_NEW, Job.STATE_HELD, Job.STATE_QUEUED)
# What follows the program's name is the program's; what is before it is ours, mistakes too.
_CONTEXT = {"allow_interspersed_args": False}


@dataclass
class Plan:
    """What the command line asks for: a job, the files that go to it and those that come from it."""

    spec: JobSpec
    labels: dict[str, str]
    uploads: dict[str, Path] = field(default_factory=dict)
    downloads: dict[str, Path] = field(default_factory=dict)


def _options(function: Callable[..., None]) -> Callable[..., None]:
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    count = click.IntRange(min=1)
    options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.option("--name", metavar="WORD", default="", help="A word for people."),
        click.option("--id", "job_id", metavar="ID", default="", help="The id it shall have; made up without it."),
        click.option("--script", type=path, help="A script in place of PROGRAM; its arguments follow, after --."),
        click.option("--mpi", is_flag=True, help="PROGRAM is a Python module, run under MPI."),
        click.option("-n", "--processes", type=count, help="How many processes; MPI ranks with --mpi."),
        click.option("--nodes", type=count, help="How many nodes."),
        click.option("--per-node", type=count, help="How many processes on each node."),
        click.option("--cores", type=count, help="Cores of each process."),
        click.option("--gpus", type=count, help="GPUs of each process."),
        click.option("--memory", type=Size(), help="Memory on each node: 4G, 500Mi."),
        click.option("--time", "length", metavar="TIME", help="The time it may run: 90s, 30m, 2h, 1d."),
        click.option("--grace", metavar="TIME", help="The time between SIGTERM and SIGKILL; 5s without it."),
        click.option("--exclusive", is_flag=True, help="No other job on its nodes."),
        click.option("--backend", metavar="NAME", default="", help="Where: see `beamwire job backends`."),
        click.option("--queue", metavar="NAME", default="", help="The queue, or partition."),
        click.option("--account", metavar="NAME", default="", help="The account that pays."),
        click.option("--reservation", metavar="NAME", default="", help="A reservation to run in."),
        click.option(
            "--attribute", "attributes", multiple=True, metavar="KEY=VALUE", help="For the backend; repeatable."
        ),
        click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="A variable; without a value, yours."),
        click.option("--inherit-env", is_flag=True, help="Add the service's environment, but for what may be secret."),
        click.option(
            "--stdin",
            type=click.Path(exists=True, dir_okay=False, allow_dash=True),
            help="What it reads; - for what this command reads.",
        ),
        click.option(
            "-u", "--upload", multiple=True, metavar="LOCAL[:PATH]", help="A file or directory it needs; repeatable."
        ),
        click.option("--bundle", type=path, help="A tar archive, unpacked first, whose bin/ comes first in PATH."),
        click.option("--after", multiple=True, metavar="JOB[:ended|:active]", help="A job to come first; repeatable."),
        click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; repeatable."),
        click.option("--enroll", is_flag=True, help="Let it enrol as job/ID, and call the facility."),
        click.option("--callback", metavar="URL", default="", help="Whom to tell of each state; docs/webhooks.md."),
        click.option("--callback-secret", type=path, help="The file with the secret that events are signed with."),
        click.option("--hold", is_flag=True, help="Hold it until `beamwire job start`."),
        click.option("--dry-run", is_flag=True, help="Have it checked, and stop."),
        click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[PROGRAM] [ARGS]..."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command(cls=Command, context_settings=_CONTEXT)
@click.option(
    "-d", "--download", multiple=True, metavar="PATH[:LOCAL]", help="A file to get when it has ended; repeatable."
)
@click.option("--detach", is_flag=True, help="Print the job's name and go on, as `submit` does.")
@_options
@pass_cli
def run(cli: Cli, /, download: tuple[str, ...], detach: bool, **options: Any) -> None:
    """Run PROGRAM at the facility and show what it prints; ends with its exit code.

    Ctrl-C cancels it, and so does the end of whoever reads what it prints, as `head` does.

    \b
    beamwire job run hostname
    beamwire job run --backend slurm --mpi -n 32 --time 2h mypackage.index run7
    beamwire job run -u index.py -u data.h5 -d result.stream python3 index.py data.h5
    """
    plan = _plan(options)
    plan.downloads = dict(_pair(text) for text in download)
    if detach and plan.downloads:
        raise invalid_field("--download", "needs somebody who waits for the end; leave out --detach")
    with cli.client() as client:
        job = _create(cli, client, plan, options)
        if job is None:
            return
        if detach:
            _say_created(cli, job)
            return
        try:
            job = _follow(cli, client, job)
        except KeyboardInterrupt:
            _cancel(cli, client, job.name, f"cancelling {job.name}")
            raise
        except BrokenPipeError:
            _cancel(cli, client, job.name, f"cancelling {job.name}: nobody takes what it prints any more")
            raise
        _download(cli, client, job, plan.downloads)
    if cli.json:
        cli.answer("", job)
    _exit(cli, job)


@click.command(cls=Command, context_settings=_CONTEXT)
@_options
@pass_cli
def submit(cli: Cli, /, **options: Any) -> None:
    """Have PROGRAM run at the facility, and print the job's name. Takes what `run` takes."""
    plan = _plan(options)
    with cli.client() as client:
        job = _create(cli, client, plan, options)
    if job is not None:
        _say_created(cli, job)


def _say_created(cli: Cli, job: Job) -> None:
    cli.answer(job.name, job)
    cli.say(f"follow it with: beamwire job logs -f {short_name(job.name)}")


def _create(cli: Cli, client: Client, plan: Plan, options: dict[str, Any]) -> Job | None:
    if options["dry_run"]:
        checked = client.jobs.create(plan.spec, job_id=options["job_id"], labels=plan.labels, validate_only=True)
        cli.answer("the job can be run", checked)
        return None
    # Chosen here: whoever is interrupted in the call still knows what to cancel.
    job_id = options["job_id"] or new_id()
    try:
        job = client.jobs.create(plan.spec, job_id=job_id, labels=plan.labels)
        for path, local in plan.uploads.items():
            client.jobs.upload(job.name, local, path)
            cli.say(f"{local} is at {path}")
    except (KeyboardInterrupt, BeamwireError, OSError):
        with suppress(BeamwireError):
            _cancel(cli, client, job_id)
        raise
    return job


def _follow(cli: Cli, client: Client, job: Job) -> Job:
    """Show how the job is until it runs, and then what it prints."""
    said = ""
    for seen in client.jobs.watch(job.name):
        if seen.state not in _BEFORE:
            break
        word = f"{seen.name} {state_word(seen)}" + (f": {seen.state_reason}" if seen.state_reason else "")
        if word != said:
            cli.say(word)
            said = word
    if not cli.json:
        show_logs(client.jobs.logs(job.name, follow=True))
    return client.jobs.wait(job.name)


def _cancel(cli: Cli, client: Client, name: str, words: str = "") -> None:
    """Cancel a job whose command is about to end, whether or not anybody can be told."""
    # People press twice, and `timeout` sends twice: the second must not end the call.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        # The Ctrl-C that came here has ended what follows in the pipe too.
        with suppress(OSError):
            if words:
                cli.say(words)
        client.jobs.cancel(name)
    finally:
        _leave_broken_pipes()


def _leave_broken_pipes() -> None:
    """Lead outputs that nobody reads any more to nowhere: else what is still said fails, and with it the exit code."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _download(cli: Cli, client: Client, job: Job, wanted: dict[str, Path]) -> None:
    for path, local in wanted.items():
        target = local / Path(path).name if local.is_dir() else local
        try:
            client.jobs.download(job.name, path, target)
        except BeamwireError as error:
            # Why there is no such file, the job's own failure says better.
            if job.state != Job.STATE_COMPLETED:
                cli.say(f"{path} could not be got: {error.message}")
                continue
            raise
        cli.say(f"{path} is at {target}")


def _exit(cli: Cli, job: Job) -> None:
    cli.say(ran(job))
    if job.state == Job.STATE_COMPLETED:
        return
    error = failure_of(job)
    # What it printed was shown as it came.
    cli.say(f"error: {error.message.partition('; it printed:')[0]}")
    code = job.exit_code if job.HasField("exit_code") and has_ended(job) else FAILED
    click.get_current_context().exit(code or FAILED)


def _plan(options: dict[str, Any]) -> Plan:
    command: tuple[str, ...] = options["command"]
    spec = JobSpec(
        display_name=options["name"],
        mpi=options["mpi"],
        inherit_environment=options["inherit_env"],
        enroll=options["enroll"],
        hold=options["hold"],
        environment=dict(_variable(text) for text in options["env"]),
        stdin=_stdin(options["stdin"]),
        dependencies=[_dependency(text) for text in options["after"]],
    )
    if options["script"] is not None:
        spec.script = options["script"].read_text(encoding="utf-8")
        spec.arguments.extend(command)
    elif command:
        spec.executable = command[0]
        spec.arguments.extend(command[1:])
    else:
        raise invalid_field("PROGRAM", "is missing: say what to run, or --script FILE")
    _fill_resources(spec, options)
    _fill_placement(spec, options)
    _fill_callback(spec, options)
    uploads = dict(_files(options["upload"]))
    if options["bundle"] is not None:
        spec.bundle = options["bundle"].name
        uploads[spec.bundle] = options["bundle"]
    spec.input_files.extend(InputFile(path=path, sha256=file_sha256(local)) for path, local in sorted(uploads.items()))
    return Plan(spec, parse_labels(options["labels"]), uploads)


def _fill_resources(spec: JobSpec, options: dict[str, Any]) -> None:
    resources = spec.resources
    fields = {
        "process_count": options["processes"],
        "node_count": options["nodes"],
        "processes_per_node": options["per_node"],
        "cores_per_process": options["cores"],
        "gpus_per_process": options["gpus"],
        "memory_bytes": options["memory"],
    }
    for name, value in fields.items():
        if value is not None:
            setattr(resources, name, value)
    resources.exclusive = options["exclusive"]
    if options["length"] is not None:
        resources.duration.FromTimedelta(length_of("--time", options["length"]))
    if options["grace"] is not None:
        spec.grace.FromTimedelta(length_of("--grace", options["grace"]))


def _fill_placement(spec: JobSpec, options: dict[str, Any]) -> None:
    for name in ("backend", "queue", "account", "reservation"):
        setattr(spec.placement, name, options[name])
    spec.placement.attributes.update(_assignment("--attribute", text) for text in options["attributes"])


def _fill_callback(spec: JobSpec, options: dict[str, Any]) -> None:
    url, secret = options["callback"], options["callback_secret"]
    if bool(url) != (secret is not None):
        raise invalid_field("--callback", "goes with --callback-secret FILE: events are signed with what is in it")
    if url:
        spec.callback.url = url
        spec.callback.secret = secret.read_bytes().strip()


def _assignment(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise invalid_field(option, f"must be KEY=VALUE, not {text!r}")
    return key, value


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if equals:
        return name, value
    if name not in os.environ:
        raise invalid_field("--env", f"{name} is not set here; write {name}=VALUE")
    return name, os.environ[name]


def _dependency(text: str) -> Dependency:
    name, _, condition = text.partition(":")
    known = {"": "COMPLETED", "completed": "COMPLETED", "ended": "ENDED", "active": "ACTIVE"}
    if condition not in known:
        raise invalid_field("--after", f"{condition!r} is none of: completed, ended, active")
    wanted = Dependency.Condition.Value(f"CONDITION_{known[condition]}")
    return Dependency(job=full_name("jobs", name), condition=wanted)


def _stdin(source: str | None) -> bytes:
    if source is None:
        return b""
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    if len(data) > MOST_STDIN_BYTES:
        raise invalid_field("--stdin", f"has {len(data)} bytes, and at most {MOST_STDIN_BYTES} may go; use --upload")
    return data


def _pair(text: str) -> tuple[str, Path]:
    path, _, local = text.partition(":")
    return path, Path(local or Path(path).name)


def _files(texts: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yield where each file goes that is to be uploaded, and where it is; of a directory, all that is in it."""
    for text in texts:
        local, _, path = text.rpartition(":") if ":" in text and not Path(text).exists() else (text, "", "")
        source = Path(local)
        if not source.exists():
            raise invalid_field("--upload", f"there is no {local}")
        top = path or source.name
        if source.is_dir():
            for file in sorted(each for each in source.rglob("*") if each.is_file()):
                yield f"{top}/{file.relative_to(source).as_posix()}", file
        else:
            yield top, source
