"""How an operator calls the facility: with the credentials that lie in the facility's own directory."""

from __future__ import annotations

import getpass
import re
import tomllib
from pathlib import Path

from beamwire.client.config import EnrolledFacility
from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError, Reason

FACILITY_FILE = "facility.toml"
# What `beamwired` takes if none is named.
DEFAULT_DIRECTORY = Path("facility")
_DEFAULT_ADDRESS, _DEFAULT_ENROLL_ADDRESS = "127.0.0.1:7443", "127.0.0.1:7444"


def operated_facility(directory: Path) -> EnrolledFacility:
    """Return the facility whose files are in a directory, to be called by its operator: this person, else the first.

    Raises BeamwireError RESOURCE_NOT_FOUND if no facility or no operator is there, INVALID_FIELD if its file cannot be
    read.
    """
    path = directory / FACILITY_FILE
    if not path.is_file():
        raise BeamwireError(
            Reason.RESOURCE_NOT_FOUND, f"there is no {path}; name the facility's directory with --dir, or enrol in one"
        )
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        address = str(settings.get("address", _DEFAULT_ADDRESS))
        services = {str(name): str(value) for name, value in settings.get("services", {}).items() if value}
        trust_domain = str(settings["trust_domain"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BeamwireError(Reason.INVALID_FIELD, f"{path} cannot be read: {error!r}") from error
    return EnrolledFacility(
        trust_domain,
        Addresses(address, services),
        str(settings.get("enroll_address", _DEFAULT_ENROLL_ADDRESS)),
        _credentials_directory(directory),
        trust_domain,
    )


def _credentials_directory(directory: Path) -> Path:
    operators = directory / "members" / "operator"
    own = operators / re.sub(r"[^a-z0-9._-]", "-", getpass.getuser().lower())
    for found in (own, *sorted(operators.glob("*"))):
        if found.is_dir():
            return found
    raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"there are no operator's credentials in {operators}")
