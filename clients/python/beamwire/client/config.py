"""Where the client keeps what it knows: the configuration directory and the facilities enrolled in it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from beamwire.mesh.addresses import Addresses
from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field


@dataclass(frozen=True, slots=True)
class EnrolledFacility:
    """A facility this person is a member of: `<config>/facilities/<trust domain>/`."""

    trust_domain: str
    addresses: Addresses
    enroll_address: str
    directory: Path

    def credentials(self) -> Credentials:
        """Load key, chain and roots; raises BeamwireError CERTIFICATE_INVALID if they cannot be used."""
        return Credentials.load(self.directory)


def config_directory(explicit: Path | None = None) -> Path:
    """Return the configuration directory: the one given, $BEAMWIRE_CONFIG_DIR, or the platform's."""
    if explicit is not None:
        return explicit
    if named := os.environ.get("BEAMWIRE_CONFIG_DIR"):
        return Path(named)
    return _base("XDG_CONFIG_HOME", ".config") / "beamwire"


def trace_directory() -> Path:
    """Return where the command line keeps its traces: $BEAMWIRE_TRACE_DIR, or the platform's state directory."""
    if named := os.environ.get("BEAMWIRE_TRACE_DIR"):
        return Path(named)
    return _base("XDG_STATE_HOME", ".local/state") / "beamwire" / "traces"


def facility_directory(config: Path, trust_domain: str) -> Path:
    """Return where the membership of one facility is kept, whether or not it is there."""
    return config / "facilities" / trust_domain


def enrolled_facilities(config: Path) -> list[EnrolledFacility]:
    """Return the facilities enrolled in a configuration directory, by name."""
    return [_read(path.parent) for path in sorted((config / "facilities").glob("*/member.json"))]


def choose_facility(config: Path, wanted: str | None = None) -> EnrolledFacility:
    """Return the facility asked for, or named by $BEAMWIRE_FACILITY, or the only one.

    Raises BeamwireError CERTIFICATE_INVALID if none is enrolled, INVALID_FIELD if it cannot be told which is meant.
    """
    known = {facility.trust_domain: facility for facility in enrolled_facilities(config)}
    wanted = wanted or os.environ.get("BEAMWIRE_FACILITY")
    if not known:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID,
            f"no facility is enrolled in {config}; ask the facility for a join token and run `beamwire enroll`",
        )
    if wanted:
        if wanted not in known:
            raise invalid_field("facility", f"{wanted!r} is not enrolled in {config}; enrolled: {', '.join(known)}")
        return known[wanted]
    if len(known) > 1:
        raise invalid_field(
            "facility",
            f"several facilities are enrolled ({', '.join(known)}); name one with --facility, BEAMWIRE_FACILITY or "
            "connect(facility=…)",
        )
    return next(iter(known.values()))


def _read(directory: Path) -> EnrolledFacility:
    path = directory / "member.json"
    try:
        member = json.loads(path.read_text(encoding="utf-8"))
        return EnrolledFacility(
            trust_domain=str(member["trust_domain"]),
            addresses=Addresses.parse(str(member["address"])),
            enroll_address=str(member["enroll_address"]),
            directory=directory,
        )
    except (OSError, ValueError, KeyError, TypeError, BeamwireError) as error:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID, f"{path} cannot be read ({error!r}); enrol again with `beamwire enroll`"
        ) from error


def _base(variable: str, below_home: str) -> Path:
    named = os.environ.get(variable)
    return Path(named) if named else Path.home() / below_home
