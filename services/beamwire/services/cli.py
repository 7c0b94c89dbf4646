"""The `beamwired` command: make a facility, check it, serve it, let members in, clean up."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from beamwire.mesh import telemetry
from beamwire.mesh.database import is_open
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity import SpiffeId
from beamwire.services.config import (
    FILE_NAME,
    SERVICE_NAMES,
    FacilitySettings,
    Layout,
    ServiceName,
    load_facility,
    make_settings,
)

EXIT_FAILED, EXIT_USAGE = 1, 2
DEFAULT_DIRECTORY = "facility"

directory_option = click.option(
    "-d",
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="BEAMWIRE_FACILITY_DIR",
    default=DEFAULT_DIRECTORY,
    show_default=True,
    show_envvar=True,
    help=f"The directory that holds {FILE_NAME} and everything of the facility.",
)


class _Commands(click.Group):
    """Shows an error as one or a few lines, with the remedy, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BeamwireError as error:
            click.echo(f"beamwired: {error.message}", err=True)
            for violation in error.violations:
                line = f"  {violation.field}: {violation.description}"
                if violation.description not in error.message:
                    click.echo(line, err=True)
            ctx.exit(EXIT_USAGE if error.violations else EXIT_FAILED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="beamwire", prog_name="beamwired")
def main() -> None:
    """Run a Beamwire facility: the Request, Job, Buffer and Certificate services.

    \b
    First steps:
      beamwired facility init         make one in ./facility
      beamwired serve                 serve it
      beamwired token user/alice      let alice in: she runs `beamwire enroll`
    """


@main.group()
def facility() -> None:
    """Make a facility."""


@facility.command("init")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_DIRECTORY)
@click.option("--trust-domain", default="facility.test", show_default=True, help="The facility's name, a DNS name.")
@click.option(
    "--address", default="127.0.0.1:7443", show_default=True, help="Where the services listen and are called."
)
@click.option("--enroll-address", default="127.0.0.1:7444", show_default=True, help="Where new members enrol.")
@click.option(
    "--server-name",
    "server_names",
    multiple=True,
    help="A DNS name or address for the services' certificates; may be repeated.  [default: localhost, 127.0.0.1]",
)
@click.option("--data-host", default="127.0.0.1", show_default=True, help="The address that caches listen on.")
@click.option("--data-advertise", default="127.0.0.1", show_default=True, help="The name that peers dial caches by.")
def facility_init(
    directory: Path,
    trust_domain: str,
    address: str,
    enroll_address: str,
    server_names: tuple[str, ...],
    data_host: str,
    data_advertise: str,
) -> None:
    """Make the authority, the services' credentials, an operator and facility.toml in DIRECTORY."""
    from beamwire.services.facility import make_facility, operator_path

    given: dict[str, Any] = {"server_names": server_names} if server_names else {}
    settings = make_settings(
        trust_domain=trust_domain,
        address=address,
        enroll_address=enroll_address,
        data={"host": data_host, "advertise": data_advertise},
        **given,
    )
    layout = asyncio.run(make_facility(directory, settings))
    click.echo(f"made facility {trust_domain} in {layout.directory}")
    click.echo(f"you are its operator, spiffe://{trust_domain}/{operator_path()}")
    click.echo(f"serve it with: beamwired serve --dir {directory}")


@main.command()
@click.argument("services", nargs=-1, type=click.Choice(SERVICE_NAMES))
@directory_option
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help=f"The facility's {FILE_NAME}.")
def serve(services: tuple[ServiceName, ...], directory: Path, config: Path | None) -> None:
    """Serve the facility's SERVICES until SIGTERM or Ctrl-C; all four if none is named.

    Jobs and caches go on when the services stop, and are taken up again when they start. `beamwired clean` ends them.
    """
    from beamwire.services.app import serve as serve_services

    layout, settings = load_facility(config.parent if config else directory)
    names: Sequence[ServiceName] = services or SERVICE_NAMES
    telemetry.setup_logging("facility" if len(names) > 1 else "".join(names))

    def ready(address: str) -> None:
        click.echo(f"beamwired: {', '.join(names)} of {settings.trust_domain} at {address}", err=True)

    def stopping() -> None:
        click.echo("beamwired: stopping", err=True)

    asyncio.run(serve_services(layout, settings, names, ready=ready, stopping=stopping))
    still = sum(_running(layout))
    if still:
        click.echo(f"beamwired: still running: {_count(still)}; `beamwired clean` would end them", err=True)


@main.command()
@directory_option
@click.option("--json", "as_json", is_flag=True, help="Print the settings as JSON.")
def validate(directory: Path, as_json: bool) -> None:
    """Check the facility's configuration, credentials and directories without serving."""
    from beamwire.mesh.authority import Authority
    from beamwire.mesh.credentials import Credentials

    layout, settings = load_facility(directory)
    Authority.load(layout.authority)
    members = [Credentials.load(layout.member(f"service/{name}")) for name in (*SERVICE_NAMES, "facility")]
    if as_json:
        click.echo(json.dumps(settings.model_dump(mode="json"), indent=2))
        return
    click.echo(f"{layout.file}: ok")
    for member in members:
        click.echo(f"{member.identity}: ok until {member.not_after:%Y-%m-%d %H:%M} UTC")


@main.command()
@click.argument("identity")
@directory_option
@click.option(
    "--ttl", type=click.IntRange(1, 24 * 3600), default=600, show_default=True, help="Seconds it may be used."
)
@click.option("--server-name", "server_names", multiple=True, help="A name the member may serve under; repeatable.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the token to a file (0600)."
)
def token(identity: str, directory: Path, ttl: int, server_names: tuple[str, ...], output: Path | None) -> None:
    """Mint a one-time join token for IDENTITY, `user/alice` or a whole SPIFFE id, at the facility that is served.

    The token is printed once. Whoever has it can enrol as IDENTITY: hand it over on a safe way.
    """
    layout, settings = load_facility(directory)
    whole = identity if identity.startswith("spiffe://") else str(SpiffeId(settings.trust_domain, identity))
    minted = asyncio.run(_mint(layout, settings, whole, timedelta(seconds=ttl), server_names))
    if output is None:
        click.echo(minted)
        click.echo("hand it over; the member runs: beamwire enroll --token-file FILE, with it in FILE", err=True)
        return
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        # The mode counts only for a file that is made here.
        os.fchmod(descriptor, 0o600)
        file.write(minted + "\n")
    click.echo(f"wrote a token for {whole} to {output}; use it with: beamwire enroll --token-file {output}", err=True)


@main.command()
@directory_option
def clean(directory: Path) -> None:
    """End every job and cache that a facility which is no longer served has left running.

    The frames that caches kept in shared memory are lost.
    """
    layout, _ = load_facility(directory)
    for name in ("buffer", "job"):
        if is_open(layout.database(name)):
            raise BeamwireError(
                Reason.ILLEGAL_STATE,
                f"the {name} service of {layout.directory} is being served, and what it runs is in use; stop it first",
            )
    click.echo(f"ended {_count(asyncio.run(_clean(layout)))}")


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL: `eval "$(beamwired completion bash)"`."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "beamwired", "_BEAMWIRED_COMPLETE").source())


async def _mint(
    layout: Layout, settings: FacilitySettings, identity: str, ttl: timedelta, server_names: tuple[str, ...]
) -> str:
    from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
    from beamwire.mesh.rpc.channel import connect
    from beamwire.mesh.rpc.convert import to_duration
    from beamwire.services.facility import find_operator

    async with connect(settings.addresses().of("certificate"), find_operator(layout)) as channel:
        stub = certificate_service_pb2_grpc.CertificateServiceStub(channel)
        request = certificate_service_pb2.CreateJoinTokenRequest(
            identity=identity, ttl=to_duration(ttl), server_names=server_names
        )
        return (await stub.CreateJoinToken(request)).token


async def _clean(layout: Layout) -> int:
    from beamwire.mesh.processes import Process
    from beamwire.services.buffer.placement import Rings

    ended = 0
    for directory in layout.process_directories():
        process = Process.attach(directory)
        if process is not None and process.alive():
            await process.terminate()
            ended += 1
    rings = Rings(layout.buffers)
    for buffer_id in list(rings.buffers()):
        rings.remove(buffer_id)
    return ended


def _count(processes: int) -> str:
    return f"{processes} job or cache" if processes == 1 else f"{processes} jobs and caches"


def _running(layout: Layout) -> list[bool]:
    from beamwire.mesh.processes import Process

    found = [Process.attach(directory) for directory in layout.process_directories()]
    return [process.alive() for process in found if process is not None]
