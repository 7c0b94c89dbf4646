"""Making a facility: its authority, its members, its file."""

from __future__ import annotations

import getpass
import os
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from beamwire.mesh.authority import Authority
from beamwire.mesh.credentials import Credentials, new_key_and_csr
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity import Role, SpiffeId
from beamwire.mesh.store import Store
from beamwire.services.certificate.domain import CertificateRecord, Lifetimes, Registrar, TokenRecord
from beamwire.services.config import SERVICE_NAMES, FacilitySettings, Layout

# The identity that all four services share as a server when they run in one process.
TOGETHER = "service/facility"


async def make_facility(directory: Path, settings: FacilitySettings) -> Layout:
    """Make the authority, the services' credentials, one operator and `facility.toml` below a directory.

    Raises:
        BeamwireError: RESOURCE_EXISTS if there is a facility already.
    """
    layout = Layout(directory)
    if layout.file.exists():
        raise BeamwireError(Reason.RESOURCE_EXISTS, f"{layout.file} exists; choose another directory or use that one")
    layout.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = Authority.create(settings.trust_domain)
    authority.save(layout.authority)
    for path in (layout.state, layout.jobs, layout.buffers, layout.traces):
        path.mkdir(mode=0o700)
    _write_private(layout.page_key, secrets.token_bytes(32))
    database = await Database.open(layout.database("certificate"))
    try:
        registrar = Registrar(
            authority,
            Store(database, TokenRecord),
            Store(database, CertificateRecord),
            Lifetimes(settings.certificates.by_role()),
        )
        for name in (*SERVICE_NAMES, TOGETHER.removeprefix("service/")):
            await _issue(registrar, layout, f"service/{name}", settings.server_names)
        await _issue(registrar, layout, operator_path(), ())
    finally:
        await database.close()
    written = settings.model_dump(
        mode="json", include={"trust_domain", "address", "enroll_address", "server_names", "data"}
    )
    _write_private(layout.file, tomli_w.dumps(written).encode())
    return layout


async def renew_services(layout: Layout, registrar: Registrar, settings: FacilitySettings) -> None:
    """Issue new certificates to the services' members whose certificates are past half of their lives."""
    half = settings.certificates.service / 2
    for name in (*SERVICE_NAMES, TOGETHER.removeprefix("service/")):
        path = f"service/{name}"
        if Credentials.load(layout.member(path)).not_after - datetime.now(UTC) < half:
            await _issue(registrar, layout, path, settings.server_names)


def operator_path() -> str:
    """Return the path of the operator's identity: the person who runs this process."""
    name = re.sub(r"[^a-z0-9._-]", "-", getpass.getuser().lower())
    return f"{Role.OPERATOR}/{name}"


def find_operator(layout: Layout) -> Credentials:
    """Return the credentials of an operator of the facility: of this person, else of the first there is."""
    own = layout.member(operator_path())
    others = sorted(layout.member(Role.OPERATOR).glob("*"))
    for directory in (own, *others):
        if directory.exists():
            return Credentials.load(directory)
    raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"there are no operator's credentials in {layout.directory}/members")


async def _issue(registrar: Registrar, layout: Layout, path: str, server_names: tuple[str, ...]) -> None:
    identity = SpiffeId(registrar.trust_domain, path)
    key_pem, csr_pem = new_key_and_csr(str(identity))
    record = await registrar.bootstrap(csr_pem, identity, server_names)
    Credentials.save(layout.member(path), key_pem, record.chain_pem.encode(), registrar.roots_pem)


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
