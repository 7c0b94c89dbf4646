"""`beamwired policy`: whether a policy file is well, and what it gives to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from beamwire.mesh.identity.ids import SpiffeId
from beamwire.services.cli.common import directory_option, json_option, print_json, whole_identity
from beamwire.services.config import load_facility


@click.group()
def policy() -> None:
    """Check the policy: who may do what here."""


@policy.command("check")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--as", "identities", multiple=True, metavar="ID", help="Say what it gives to this member; repeatable.")
@directory_option
@json_option
def check(file: Path | None, identities: tuple[str, ...], directory: Path, as_json: bool) -> None:
    """Say whether FILE, by default policy.toml of the facility, can be used, and what it gives to somebody.

    Nothing is changed. The services use a good file within a second after it was put in place, and keep the last good
    policy otherwise.
    """
    from beamwire.mesh.policy import Policy, read_policy
    from beamwire.services.certificate.access import methods
    from beamwire.services.policy import doubts, explain

    layout, settings = load_facility(directory)
    path = file or layout.policy
    is_default = file is None and not path.exists()
    found = Policy(settings.trust_domain) if is_default else read_policy(path, settings.trust_domain)
    members = [explain(found, SpiffeId.parse(whole_identity(settings, each))) for each in identities]
    remarks = list(doubts(found, methods()))
    if as_json:
        print_json({"file": None if is_default else str(path), "doubts": remarks, "members": members})
        return
    click.echo(f"there is no {path}: the default policy counts" if is_default else f"{path} is well")
    click.echo(f"  {len(found.rules)} rules: {', '.join(rule.name for rule in found.rules)}")
    for remark in remarks:
        click.echo(f"  careful: {remark}")
    for member in members:
        click.echo(_in_words(member))


def _in_words(member: dict[str, Any]) -> str:
    if not member["allowed"]:
        return f"{member['identity']}: nothing\n  {member['reason']}"
    lines = [f"{member['identity']}: {member['role']}, by {member['rule'] or 'the default'}"]
    for key, value in member.items():
        if key in ("identity", "allowed", "role", "rule") or value in ("", []):
            continue
        pairs = [f"{name} {number}" for name, number in value.items()] if isinstance(value, dict) else value
        lines.append(f"  {key.replace('_', ' ')}: {', '.join(pairs) if isinstance(pairs, list) else pairs}")
    return "\n".join(lines)
