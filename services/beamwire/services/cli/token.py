"""`beamwired token`: let a member in."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from beamwire.services.cli.common import call_certificate_service, directory_option, whole_identity
from beamwire.services.config import FacilitySettings, Layout, load_facility


@click.command()
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

    \b
    beamwired token user/alice -o alice.token
    beamwired token operator/carol -o carol.token --ttl 3600
    """
    layout, settings = load_facility(directory)
    whole = whole_identity(settings, identity)
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


async def _mint(
    layout: Layout, settings: FacilitySettings, identity: str, ttl: timedelta, server_names: tuple[str, ...]
) -> str:
    from beamwire.certificate.v1 import certificate_service_pb2
    from beamwire.mesh.rpc.convert import to_duration

    request = certificate_service_pb2.CreateJoinTokenRequest(
        identity=identity, ttl=to_duration(ttl), server_names=server_names
    )

    async def call(stub: Any) -> str:
        minted: certificate_service_pb2.JoinToken = await stub.CreateJoinToken(request)
        return minted.token

    return await call_certificate_service(layout, settings, call)
