"""Where the client keeps what it knows: the configuration directory and the facilities enrolled in it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import MEMBER_FILE, Credentials
from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.mesh.identity.trust import Trust


@dataclass(frozen=True, slots=True)
class EnrolledFacility:
    """A facility that this person can call: in `<config>/facilities/<trust domain>/`, or believed by one that is.

    `home` is the facility whose member this person is, with credentials in `directory`; the same one, mostly.
    """

    trust_domain: str
    addresses: Addresses
    enroll_address: str
    directory: Path
    home: str

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
    return [_read(path.parent) for path in sorted((config / "facilities").glob(f"*/{MEMBER_FILE}"))]


Learn = Callable[[EnrolledFacility], Trust]
"""Asks a facility that this person is enrolled in whom to believe."""


def choose_facility(
    config: Path, wanted: str | None = None, home: str | None = None, *, learn: Learn | None = None
) -> EnrolledFacility:
    """Return the facility asked for, or named by $BEAMWIRE_FACILITY, or the only one.

    One that is not enrolled is called as a member of `home` ($BEAMWIRE_HOME, or the only one that believes it), which
    says where it is; `learn` asks that again if nothing is known of it yet.

    Raises BeamwireError CERTIFICATE_INVALID if none is enrolled, INVALID_FIELD if it cannot be told which is meant.
    """
    enrolled = enrolled_facilities(config)
    if not enrolled:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID,
            f"no facility is enrolled in {config}; ask the facility for a join token and run `beamwire enroll`",
        )
    return choose_among(enrolled, str(config), wanted, home, learn=learn)


def choose_among(
    enrolled: Sequence[EnrolledFacility],
    place: str,
    wanted: str | None = None,
    home: str | None = None,
    *,
    learn: Learn | None = None,
) -> EnrolledFacility:
    """Return one of the facilities that are enrolled in a place, or one that they believe; see `choose_facility`."""
    known = {facility.trust_domain: facility for facility in enrolled}
    wanted = wanted or os.environ.get("BEAMWIRE_FACILITY")
    home = home or os.environ.get("BEAMWIRE_HOME")
    if home and home not in known:
        raise invalid_field("home", f"{home!r} is not enrolled in {place}; enrolled: {', '.join(known)}")
    wanted = wanted or home
    if wanted and wanted in known and home in (None, wanted):
        return known[wanted]
    if wanted:
        return _abroad(wanted, [known[home]] if home else enrolled, place, learn)
    if len(known) > 1:
        raise invalid_field(
            "facility",
            f"several facilities are enrolled ({', '.join(known)}); name one with --facility, BEAMWIRE_FACILITY or "
            "connect(facility=…)",
        )
    return next(iter(known.values()))


def job_membership() -> EnrolledFacility | None:
    """Return the facility that runs this program as a job, if one does; the program is enrolled if it was not yet.

    A facility gives a job a token in the file $BEAMWIRE_JOIN_TOKEN_FILE, and $BEAMWIRE_CREDENTIALS_DIR to enrol in.
    """
    named = os.environ.get("BEAMWIRE_CREDENTIALS_DIR")
    if not named:
        return None
    directory, token_file = Path(named), Path(os.environ.get("BEAMWIRE_JOIN_TOKEN_FILE") or "join-token")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Not the directory itself, which is locked to save credentials in it.
    descriptor = os.open(directory / ".enrolling", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # The processes of a job have one token, good for once.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not (directory / MEMBER_FILE).exists():
            _enroll_job(token_file, directory)
    finally:
        os.close(descriptor)
    return _read(directory)


def _enroll_job(token_file: Path, directory: Path) -> None:
    try:
        token = token_file.read_text(encoding="utf-8")
    except OSError as error:
        raise BeamwireError(
            Reason.INVALID_JOIN_TOKEN, f"this job has no join token ({error}); it must be created with enroll = true"
        ) from error
    try:
        enroll(JoinToken.parse(token), directory)
    finally:
        # It is good once, and it is a secret.
        token_file.unlink(missing_ok=True)


def _abroad(wanted: str, homes: Sequence[EnrolledFacility], place: str, learn: Learn | None) -> EnrolledFacility:
    """The facility asked for, as a member of another one that believes it."""
    found = _believing(wanted, homes, _kept_trust)
    if not found and learn is not None:
        found = _believing(wanted, homes, learn)
    if not found:
        raise invalid_field(
            "facility",
            f"{wanted!r} is not enrolled in {place}, nor believed by {', '.join(home.trust_domain for home in homes)}; "
            "enrol there (`beamwire enroll`), or have an operator accept its introduction (`beamwire trust accept`)",
        )
    if len(found) > 1:
        names = ", ".join(facility.home for facility in found)
        raise invalid_field("home", f"{wanted} is believed by several facilities ({names}); name one with --home")
    return found[0]


def _kept_trust(home: EnrolledFacility) -> Trust | None:
    with suppress(BeamwireError):
        return home.credentials().trust
    return None


def _believing(
    wanted: str, homes: Sequence[EnrolledFacility], trust_of: Callable[[EnrolledFacility], Trust | None]
) -> list[EnrolledFacility]:
    """The facility asked for, seen from each home that believes it."""
    told = [(home, trust.others.get(wanted)) for home in homes if (trust := trust_of(home)) is not None]
    return [
        EnrolledFacility(wanted, Addresses.parse(seen.address), seen.enroll_address, home.directory, home.trust_domain)
        for home, seen in told
        if seen is not None
    ]


def _read(directory: Path) -> EnrolledFacility:
    path = directory / MEMBER_FILE
    try:
        member = json.loads(path.read_text(encoding="utf-8"))
        return EnrolledFacility(
            trust_domain=str(member["trust_domain"]),
            addresses=Addresses.parse(str(member["address"])),
            enroll_address=str(member["enroll_address"]),
            directory=directory,
            home=str(member["trust_domain"]),
        )
    except (OSError, ValueError, KeyError, TypeError, BeamwireError) as error:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID, f"{path} cannot be read ({error!r}); enrol again with `beamwire enroll`"
        ) from error


def _base(variable: str, below_home: str) -> Path:
    named = os.environ.get(variable)
    return Path(named) if named else Path.home() / below_home
