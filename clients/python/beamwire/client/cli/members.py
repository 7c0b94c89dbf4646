"""The subcommands about membership: enroll, whoami, facilities."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from beamwire.client.cli.context import Cli, Command, pass_cli
from beamwire.client.cli.text import aligned, columns, duration
from beamwire.client.config import choose_facility, enrolled_facilities, facility_directory
from beamwire.common.v1.access_pb2 import Role
from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.identity.enrollment import JoinToken
from beamwire.mesh.identity.enrollment import enroll as enroll_member


@click.command(cls=Command)
@click.argument("name", metavar="[FACILITY]", required=False)
@click.option("--token", help="The join token. Others on this host can see it; prefer --token-file.")
@click.option(
    "--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file that holds it."
)
@pass_cli
def enroll(cli: Cli, name: str | None, token: str | None, token_file: Path | None) -> None:
    """Become a member of a facility with the join token that it gave you.

    The token comes from --token-file, --token, BEAMWIRE_JOIN_TOKEN, or is asked for.
    """
    parsed = JoinToken.parse(_read_token(token, token_file))
    expected = name or cli.facility
    if expected and expected != parsed.trust_domain:
        raise invalid_field("facility", f"the token is for {parsed.trust_domain} and not for {expected}")
    directory = facility_directory(cli.config, parsed.trust_domain)
    credentials = enroll_member(parsed, directory)
    cli.answer(
        f"enrolled as {credentials.identity} until {credentials.not_after:%Y-%m-%d %H:%M} UTC",
        {
            "identity": str(credentials.identity),
            "expire_time": credentials.not_after.isoformat(),
            "directory": str(directory),
        },
    )


def _read_token(token: str | None, token_file: Path | None) -> str:
    if token and token_file:
        raise click.UsageError("give --token or --token-file, not both")
    if token_file:
        return token_file.read_text(encoding="utf-8").strip()
    found = token or os.environ.get("BEAMWIRE_JOIN_TOKEN")
    if found:
        return found.strip()
    if not sys.stdin.isatty():
        raise click.UsageError("no join token; give --token-file, --token or BEAMWIRE_JOIN_TOKEN")
    return str(click.prompt("join token", hide_input=True, err=True)).strip()


@click.command(cls=Command)
@pass_cli
def whoami(cli: Cli) -> None:
    """Print who you are at the facility, what the policy there gives you, and until when."""
    facility = choose_facility(cli.config, cli.facility)
    credentials = facility.credentials()
    there = _ask(cli)
    left = (credentials.not_after - datetime.now(UTC)).total_seconds()
    until = f"{credentials.not_after:%Y-%m-%d %H:%M:%S} UTC"
    document = {
        "identity": str(credentials.identity),
        "facility": facility.trust_domain,
        "address": str(facility.addresses),
        "expire_time": credentials.not_after.isoformat(),
        "directory": str(facility.directory),
        **there,
    }
    rows = [
        ("identity", str(credentials.identity)),
        ("facility", f"{facility.trust_domain} at {facility.addresses}"),
        ("valid", f"until {until}, {duration(left)} left" if left > 0 else f"EXPIRED on {until}; enrol again"),
        ("files", str(facility.directory)),
        *(_row(name, value) for name, value in there.items()),
    ]
    cli.answer(aligned(rows), document)


def _ask(cli: Cli) -> dict[str, Any]:
    """What the facility says; why it is not known, if the facility does not answer or does not know us."""
    try:
        with cli.client() as client:
            there = client.who_am_i()
    except BeamwireError as error:
        return {"remark": error.message}
    role = Role.Name(there.role).removeprefix("ROLE_").lower()
    handed = {"delegated_by": there.delegated_by, "delegation": list(there.delegation)} if there.delegated_by else {}
    return {"role": role, "rule": there.rule, "datasets": list(there.datasets), **handed}


def _row(name: str, value: Any) -> tuple[str, str]:
    text = ", ".join(value) if isinstance(value, list) else str(value)
    empty = "the facility's own default" if name == "rule" else "none"
    return name.replace("_", " "), text or empty


@click.command(cls=Command)
@pass_cli
def facilities(cli: Cli) -> None:
    """List the facilities you are enrolled in."""
    rows: list[list[str]] = []
    documents: list[dict[str, str]] = []
    for facility in enrolled_facilities(cli.config):
        try:
            identity = str(facility.credentials().identity)
        except BeamwireError as error:
            identity = f"({error.message})"
        rows.append([facility.trust_domain, identity, str(facility.addresses)])
        documents.append({"facility": facility.trust_domain, "identity": identity, "address": str(facility.addresses)})
    if not rows:
        cli.say(f"no facility is enrolled in {cli.config}; `beamwire enroll` does it")
    cli.answer(columns(("FACILITY", "IDENTITY", "ADDRESS"), rows), {"facilities": documents})
