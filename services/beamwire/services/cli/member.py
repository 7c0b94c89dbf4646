"""`beamwired member`: who has certificates, and whose are ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from beamwire.services.cli.common import (
    call_certificate_service,
    directory_option,
    json_option,
    print_json,
    whole_identity,
)
from beamwire.services.cli.ledger import all_certificates, certificate_document
from beamwire.services.config import load_facility

if TYPE_CHECKING:
    from beamwire.certificate.v1 import certificate_service_pb2 as pb


@click.group()
def member() -> None:
    """See who is a member, and end that before its time.

    \b
    beamwired member ls
    beamwired member revoke user/alice --reason "laptop stolen"
    beamwired member reinstate user/alice
    """


@member.command("ls")
@directory_option
@json_option
def ls(directory: Path, as_json: bool) -> None:
    """List the members that have a good certificate."""
    layout, settings = load_facility(directory)

    async def call(stub: Any) -> list[pb.Certificate]:
        return await all_certificates(stub, 'state="ISSUED"')

    certificates = asyncio.run(call_certificate_service(layout, settings, call))
    members = _members(certificates)
    if as_json:
        print_json(members)
        return
    width = max((len(row["identity"]) for row in members), default=0)
    for row in members:
        count = row["certificates"]
        click.echo(f"{row['identity']:{width}}  until {row['expire_time']}  {count} certificate{'s' * (count != 1)}")


@member.command("revoke")
@click.argument("member_or_certificate")
@click.option("--reason", default="", help="Why, for the ledger and for the member.")
@directory_option
@json_option
def revoke(member_or_certificate: str, reason: str, directory: Path, as_json: bool) -> None:
    """End all certificates of a member (user/alice), or one of them (certificates/…); its connections are cut.

    A member that is revoked as a whole gets no certificate until it is reinstated.
    """
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    layout, settings = load_facility(directory)
    request = pb.RevokeMemberRequest(reason=reason)
    if member_or_certificate.startswith("certificates/"):
        request.certificate = member_or_certificate
    else:
        request.identity = whole_identity(settings, member_or_certificate)

    async def call(stub: Any) -> pb.RevokeMemberResponse:
        answer: pb.RevokeMemberResponse = await stub.RevokeMember(request)
        return answer

    ended = asyncio.run(call_certificate_service(layout, settings, call)).certificates
    if as_json:
        print_json([certificate_document(certificate) for certificate in ended])
        return
    click.echo(f"ended {len(ended)} good certificate{'s' * (len(ended) != 1)} of {member_or_certificate}")
    if not ended:
        click.echo("no good certificate was found; is the name right? See: beamwired member ls", err=True)
    if request.identity:
        click.echo(f"it gets no more until: beamwired member reinstate {member_or_certificate}", err=True)


@member.command("reinstate")
@click.argument("identity")
@directory_option
def reinstate(identity: str, directory: Path) -> None:
    """Let a member enrol again that was revoked; its old certificates stay revoked."""
    from beamwire.certificate.v1 import certificate_service_pb2 as pb

    layout, settings = load_facility(directory)
    request = pb.ReinstateMemberRequest(identity=whole_identity(settings, identity))

    async def call(stub: Any) -> pb.ReinstateMemberResponse:
        answer: pb.ReinstateMemberResponse = await stub.ReinstateMember(request)
        return answer

    asyncio.run(call_certificate_service(layout, settings, call))
    # The services of the facility are not let in by tokens: the Certificate service issues them anew by itself.
    is_service = request.identity.partition("://")[2].partition("/")[2].startswith("service/")
    how = "gets a new certificate within minutes" if is_service else f"mint it a token with: beamwired token {identity}"
    click.echo(f"{identity} may enrol again; {how}")


def _members(certificates: Sequence[pb.Certificate]) -> list[dict[str, Any]]:
    """One row for each member, by name: how many good certificates it has, and until when."""
    now = datetime.now(UTC)
    found: dict[str, list[datetime]] = {}
    for certificate in certificates:
        end = certificate.expire_time.ToDatetime(UTC)
        if end > now:
            found.setdefault(certificate.identity, []).append(end)
    return [
        {"identity": identity, "expire_time": f"{max(ends):%Y-%m-%dT%H:%M:%SZ}", "certificates": len(ends)}
        for identity, ends in sorted(found.items())
    ]
