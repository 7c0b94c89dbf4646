"""Making a facility: its authority, its members, its file."""

from __future__ import annotations

import getpass
import logging
import os
import re
import secrets
from functools import partial
from pathlib import Path

import tomli_w

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.generations import Generations
from beamwire.mesh.identity.ids import Role, SpiffeId, utcnow
from beamwire.mesh.identity.keys import KeyHolder, key_holder
from beamwire.mesh.identity.renewal import is_due
from beamwire.mesh.identity.signing import Signer, check_authority
from beamwire.mesh.policy import Policy, PolicySource
from beamwire.services.certificate.domain import Lifetimes, Registrar
from beamwire.services.certificate.office import Office
from beamwire.services.config import SERVICE_NAMES, FacilitySettings, Layout
from beamwire.services.config import Authority as AuthoritySettings
from beamwire.services.policy import TEMPLATE

# The identity that all four services share as a server when they run in one process.
TOGETHER = "service/facility"

_log = logging.getLogger(__name__)


async def make_facility(directory: Path, settings: FacilitySettings, *, parent: Signer | None = None) -> Layout:
    """Make the authority, the services' credentials, one operator and `facility.toml` below a directory.

    The root of the authority is signed by `parent`, if there is one; it is trusted, and the parent is not.

    Raises:
        BeamwireError: RESOURCE_EXISTS if there is a facility already, CERTIFICATE_INVALID for a parent that may not
            vouch for an authority.
    """
    layout = Layout(directory)
    if layout.file.exists():
        raise BeamwireError(Reason.RESOURCE_EXISTS, f"{layout.file} exists; choose another directory or use that one")
    if parent is not None:
        check_authority(parent.certificate, 2, utcnow())
    keys = authority_keys(layout, settings)
    layout.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    Generations.create(layout.authority, settings.trust_domain, keys=keys, parent=parent)
    for path in (layout.state, layout.jobs, layout.buffers, layout.traces):
        path.mkdir(mode=0o700)
    _write_private(layout.page_key, secrets.token_bytes(32))
    database = await Database.open(layout.database_target(settings, "certificate"), "certificate")
    try:
        registrar = (await open_office(layout, settings, database, Policy(settings.trust_domain))).registrar
        for member in (*_service_paths(), operator_path()):
            await _issue(registrar, layout, settings, member)
    finally:
        await database.close()
    if not layout.policy.exists():
        _write_private(layout.policy, TEMPLATE.encode())
    written = settings.model_dump(
        mode="json",
        include={"trust_domain", "address", "enroll_address", "server_names", "data"}
        | ({"authority"} if settings.authority != AuthoritySettings() else set()),
    )
    _write_private(layout.file, tomli_w.dumps(written).encode())
    return layout


def authority_keys(layout: Layout, settings: FacilitySettings) -> KeyHolder:
    """Return who holds the keys of the authority; the file of the passphrase may be named from the facility on."""
    name = settings.authority.passphrase_file
    return key_holder(settings.authority.key_holder, layout.directory / name if name else None)


def load_authorities(layout: Layout, settings: FacilitySettings) -> Generations:
    """Return the authorities of a facility; CERTIFICATE_INVALID names the file that is missing or broken."""
    return Generations.load(layout.authority, keys=authority_keys(layout, settings))


async def open_office(layout: Layout, settings: FacilitySettings, database: Database, policy: PolicySource) -> Office:
    """Open what decides about certificates, as each replica of the Certificate service has it."""
    return await Office.open(
        database,
        partial(load_authorities, layout, settings),
        policy,
        Lifetimes(settings.certificates.by_role()),
        address=str(settings.addresses()),
        enroll_address=settings.enroll_address,
    )


async def renew_services(
    layout: Layout, registrar: Registrar, settings: FacilitySettings, database: Database, *, late: float = 0.0
) -> None:
    """Issue new certificates to the facility's own members: past half life, by a new authority, after a revocation.

    `late` is the part of the half life that is waited in addition, for processes that renew their own.

    These are its services, and the operators whose credentials are kept in its directory. Who was revoked as a whole is
    left as it is until it is reinstated. One replica does it at a time, so that the others find it done.
    """
    async with database.exclusive("services"):
        await _renew_services(layout, registrar, settings, late)


async def _renew_services(layout: Layout, registrar: Registrar, settings: FacilitySettings, late: float) -> None:
    operators = (f"{Role.OPERATOR}/{path.name}" for path in sorted(layout.member(Role.OPERATOR).glob("*")))
    for path in (*_service_paths(), *operators):
        credentials = Credentials.load(layout.member(path))
        if is_due(credentials, late) or not await registrar.is_current(credentials.chain_pem):
            try:
                await _issue(registrar, layout, settings, path)
            except BeamwireError as error:
                if error.reason is not Reason.CERTIFICATE_REVOKED:
                    raise
                _log.warning("%s is not renewed: %s", path, error)


def _service_paths() -> list[str]:
    return [*(f"{Role.SERVICE}/{name}" for name in SERVICE_NAMES), TOGETHER]


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


async def _issue(registrar: Registrar, layout: Layout, settings: FacilitySettings, path: str) -> None:
    identity = SpiffeId(registrar.trust_domain, path)
    directory = layout.member(path)
    key_pem, csr_pem = new_key_and_csr(str(identity))
    names = settings.server_names if identity.role is Role.SERVICE else ()
    present_pem = Credentials.load(directory).chain_pem if directory.exists() else b""
    record = await registrar.bootstrap(csr_pem, identity, names, present_pem=present_pem)
    Credentials.save(directory, key_pem, record.chain_pem.encode(), registrar.roots_pem)


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
