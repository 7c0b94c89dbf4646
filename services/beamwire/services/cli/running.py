"""`beamwired serve`, `validate` and `clean`: what a facility needs to run, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from beamwire.mesh import telemetry
from beamwire.mesh.addresses import check_address, replicas
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.cli.common import directory_option, no_records
from beamwire.services.cli.database import databases
from beamwire.services.config import FILE_NAME, SERVICE_NAMES, Layout, ServiceName, load_facility

if TYPE_CHECKING:
    from beamwire.mesh.processes import Process


@click.command()
@click.argument("services", nargs=-1, type=click.Choice(SERVICE_NAMES))
@directory_option
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"The {FILE_NAME} of the facility, in place of --dir.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="",
    help="Where this process listens, of several that serve the same, or where that is not what others call.",
)
def serve(services: tuple[ServiceName, ...], directory: Path, config: Path | None, listen: str) -> None:
    """Serve the facility's SERVICES until SIGTERM or Ctrl-C; all four if none is named.

    Jobs and caches go on when the services stop, and are taken up again when they start. `beamwired clean` ends them.
    """
    from beamwire.services.app import serve as serve_services
    from beamwire.services.supervision import end_in_time, notify

    if config is not None and config.name != FILE_NAME:
        raise click.UsageError(f"--config must be a facility's {FILE_NAME}, in the facility's directory; not {config}")
    layout, settings = load_facility(config.parent if config else directory)
    if listen and len(replicas(check_address(listen))) > 1:
        raise click.UsageError(f"--listen takes one address, not {listen}")
    names: Sequence[ServiceName] = services or SERVICE_NAMES
    telemetry.setup_logging("facility" if len(names) > 1 else "".join(names))

    ending = ExitStack()

    def ready(address: str) -> None:
        notify("READY=1")
        click.echo(f"beamwired: {', '.join(names)} of {settings.trust_domain} at {address}", err=True)

    def stopping() -> None:
        notify("STOPPING=1")
        click.echo("beamwired: stopping", err=True)
        ending.callback(end_in_time().cancel)

    with ending:
        asyncio.run(serve_services(layout, settings, names, listen=listen, ready=ready, stopping=stopping))
    still = len(_running(layout))
    if still:
        click.echo(f"beamwired: still running: {_count(still)}; `beamwired clean` would end them", err=True)


@click.command()
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print the settings as JSON.")
def validate(directory: Path, as_json: bool) -> None:
    """Check the facility's configuration, credentials and directories without serving."""
    from beamwire.mesh.identity.credentials import Credentials
    from beamwire.mesh.identity.renewal import issues_of
    from beamwire.mesh.policy import PolicyFile
    from beamwire.services.facility import load_authorities

    layout, settings = load_facility(directory)
    load_authorities(layout, settings)
    PolicyFile(layout.policy, settings.trust_domain)
    members = [Credentials.load(layout.member(f"service/{name}")) for name in (*SERVICE_NAMES, "facility")]
    if as_json:
        click.echo(json.dumps(settings.model_dump(mode="json"), indent=2))
        return
    click.echo(f"{layout.file}: ok")
    click.echo(f"{layout.policy}: {'ok' if layout.policy.exists() else 'not there, the default policy counts'}")
    for member in members:
        issues = issues_of(member)
        if not issues:
            click.echo(f"{member.identity}: ok until {member.not_after:%Y-%m-%d %H:%M} UTC")
        for issue in issues:
            click.echo(f"{member.identity}: {issue}")


@click.command()
@directory_option
def clean(directory: Path) -> None:
    """End every job and cache that a facility which is no longer served has left running.

    The frames that caches kept in shared memory are lost.
    """
    layout, settings = load_facility(directory)
    running = [process.directory for process in _running(layout)]
    tops: dict[ServiceName, Path] = {"buffer": layout.buffers, "job": layout.jobs}
    for each in asyncio.run(databases(layout, settings, tuple(tops))):
        name: ServiceName = each["service"]
        if each["open"]:
            raise BeamwireError(
                Reason.ILLEGAL_STATE,
                f"the {name} service of {layout.directory} is being served ({', '.join(each['open'])}), and what it "
                "runs is in use; stop it first",
            )
        if not each["revision"] and any(tops[name] in directory.parents for directory in running):
            raise no_records(layout, settings, name)
    click.echo(f"ended {_count(asyncio.run(_clean(layout)))}")


async def _clean(layout: Layout) -> int:
    from beamwire.services.buffer.placement import Rings

    running = _running(layout)
    for process in running:
        await process.terminate()
    rings = Rings(layout.buffers)
    for buffer_id in list(rings.buffers()):
        rings.remove(buffer_id)
    return len(running)


def _count(processes: int) -> str:
    return f"{processes} job or cache" if processes == 1 else f"{processes} jobs and caches"


def _running(layout: Layout) -> list[Process]:
    from beamwire.mesh.processes import Process

    found = [Process.attach(directory) for directory in layout.process_directories()]
    return [process for process in found if process is not None and process.alive()]
