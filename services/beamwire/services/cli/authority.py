"""`beamwired authority`: show it, rotate it, put it under an authority of others."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from beamwire.services.cli.common import call_certificate_service, directory_option, json_option, print_json
from beamwire.services.config import load_facility

if TYPE_CHECKING:
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

WHAT_NEXT = {
    "STABLE": "nothing is under way",
    "ANNOUNCED": "members learn the new root; to go on: beamwired authority rotate --to activated",
    "ACTIVATED": "members renew by themselves; when none is left: beamwired authority rotate --to stable",
}
WHAT_HAPPENS = {
    "announced": "A new root is trusted besides the present one. Nothing else changes, and it can be given up.",
    "activated": "The new authority signs from now on, and members renew.",
    "stable": "The other authority is trusted no more, and its keys are deleted.",
}


@click.group()
def authority() -> None:
    """Look after the authority that signs the facility's certificates.

    \b
    A rotation, in which no call fails; look at how far it is in between:
      beamwired authority rotate --to announced
      beamwired authority rotate --to activated
      beamwired authority show
      beamwired authority rotate --to stable

    \b
    One that comes under an authority of others begins with
      beamwired authority request -o request.pem
      beamwired authority import signed.pem
    """


@authority.command("show")
@directory_option
@json_option
def show(directory: Path, as_json: bool) -> None:
    """Show which authority signs, which roots are trusted, and how far a rotation is."""
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    layout, settings = load_facility(directory)

    async def call(stub: Any) -> pb.DescribeAuthorityResponse:
        answer: pb.DescribeAuthorityResponse = await stub.DescribeAuthority(pb.DescribeAuthorityRequest())
        return answer

    _print(asyncio.run(call_certificate_service(layout, settings, call)).authority, as_json)


@authority.command("rotate")
@click.option("--to", "phase", type=click.Choice(["announced", "activated", "stable"]), required=True)
@click.option("--force", is_flag=True, help="Finish although certificates of the other generation are good: they end.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@directory_option
@json_option
def rotate(phase: str, force: bool, yes: bool, directory: Path, as_json: bool) -> None:
    """Take the rotation of the authority one step further.

    \b
    announced   trust a new root besides the present one
    activated   let the new authority sign
    stable      trust the new one alone; or give up what was announced
    """
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    layout, settings = load_facility(directory)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody can be asked here whether to go on; say --yes")
        click.echo(WHAT_HAPPENS[phase], err=True)
        click.confirm("Go on?", abort=True, err=True)
    request = pb.RotateAuthorityRequest(phase=pb.AuthorityStatus.Phase.Value(f"PHASE_{phase.upper()}"), force=force)

    async def call(stub: Any) -> pb.RotateAuthorityResponse:
        answer: pb.RotateAuthorityResponse = await stub.RotateAuthority(request)
        return answer

    _print(asyncio.run(call_certificate_service(layout, settings, call)).authority, as_json)


@authority.command("request")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of the output.")
@directory_option
def request(output: Path | None, directory: Path) -> None:
    """Make the key of the next root, and a signing request for it, to be signed by an authority of others.

    It must be signed as an authority (CA:TRUE) with room for one more below it. Give the answer to
    `beamwired authority import`.
    """
    from beamwire.services.facility import load_authorities

    layout, settings = load_facility(directory)
    pem = load_authorities(layout, settings).request()
    if output is None:
        click.echo(pem.decode(), nl=False)
    else:
        output.write_bytes(pem)
        click.echo(f"wrote {output}; have it signed, then: beamwired authority import CERTIFICATE", err=True)


@authority.command("import")
@click.argument("certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@directory_option
def import_(certificate: Path, directory: Path) -> None:
    """Take the CERTIFICATE (PEM) that another authority has made of `beamwired authority request`.

    It becomes the next root: a rotation announces, activates and finishes it.
    """
    from beamwire.mesh.identity.signing import load_certificate
    from beamwire.services.facility import load_authorities

    layout, settings = load_facility(directory)
    generation = load_authorities(layout, settings).complete(load_certificate(certificate))
    click.echo(f"generation {generation} is ready; announce it with: beamwired authority rotate --to announced")


def _print(status: pb.AuthorityStatus, as_json: bool) -> None:
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    phase = pb.AuthorityStatus.Phase.Name(status.phase).removeprefix("PHASE_")
    expire_time = status.expire_time.ToDatetime()
    if as_json:
        print_json(
            {
                "phase": phase,
                "generation": status.generation,
                "root_fingerprints": list(status.root_fingerprints),
                "expire_time": f"{expire_time.isoformat()}Z",
                "outstanding_certificate_count": status.outstanding_certificate_count,
            }
        )
        return
    click.echo(f"phase        {phase.lower()}: {WHAT_NEXT[phase]}")
    click.echo(f"generation   {status.generation} signs, until {expire_time:%Y-%m-%d}")
    for number, fingerprint in enumerate(status.root_fingerprints):
        click.echo(f"{'trusted' if number == 0 else '':12} {fingerprint}{' (signs)' if number == 0 else ''}")
    if phase == "ACTIVATED":
        count = status.outstanding_certificate_count
        click.echo(f"outstanding  {count} good certificate{'s' * (count != 1)} of before, not renewed yet")
