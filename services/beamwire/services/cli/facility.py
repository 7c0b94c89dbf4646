"""`beamwired facility`: make one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from beamwire.services.cli.common import DEFAULT_DIRECTORY
from beamwire.services.config import make_settings

if TYPE_CHECKING:
    from beamwire.mesh.identity.signing import Signer


@click.group()
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
@click.option(
    "--parent-certificate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The certificate (PEM) of an authority you have, to sign the facility's root.",
)
@click.option(
    "--parent-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Its key (PEM), which is used once and not kept.",
)
@click.option(
    "--parent-passphrase-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The file with the passphrase of that key.",
)
@click.option(
    "--passphrase-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The file with a passphrase to encrypt the authority's keys with; serving needs it.",
)
@click.option("--key-holder", default="files", show_default=True, help="Who keeps the authority's keys.")
def facility_init(
    directory: Path,
    trust_domain: str,
    address: str,
    enroll_address: str,
    server_names: tuple[str, ...],
    data_host: str,
    data_advertise: str,
    parent_certificate: Path | None,
    parent_key: Path | None,
    parent_passphrase_file: Path | None,
    passphrase_file: Path | None,
    key_holder: str,
) -> None:
    """Make the authority, the services' credentials, an operator and facility.toml in DIRECTORY."""
    from beamwire.services.facility import make_facility, operator_path

    given: dict[str, Any] = {"server_names": server_names} if server_names else {}
    settings = make_settings(
        trust_domain=trust_domain,
        address=address,
        enroll_address=enroll_address,
        data={"host": data_host, "advertise": data_advertise},
        authority={
            "key_holder": key_holder,
            "passphrase_file": str(passphrase_file.absolute()) if passphrase_file else "",
        },
        **given,
    )
    parent = _parent(parent_certificate, parent_key, parent_passphrase_file)
    layout = asyncio.run(make_facility(directory, settings, parent=parent))
    click.echo(f"made facility {trust_domain} in {layout.directory}")
    click.echo(f"you are its operator, spiffe://{trust_domain}/{operator_path()}")
    click.echo(f"serve it with: beamwired serve --dir {directory}")


def _parent(certificate: Path | None, key: Path | None, passphrase_file: Path | None) -> Signer | None:
    from beamwire.mesh.identity.keys import read_passphrase
    from beamwire.mesh.identity.signing import Signer

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise click.UsageError("--parent-certificate and --parent-key belong together")
    return Signer.load(certificate, key, read_passphrase(passphrase_file) if passphrase_file else b"")
