"""What a delegation token may say, as few sentences as will do, and what they come to for the one who holds it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, NoReturn

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.names import id_of_part

METADATA_KEY: Final = "beamwire-token"
"""The gRPC metadata that a token travels in."""

LARGEST_TOKEN: Final = 2048
"""Characters of a token."""

_TEXT: Final = re.compile(rf"[A-Za-z0-9_=-]{{1,{LARGEST_TOKEN}}}")
_COLLECTION: Final = "transfers/"
# What a transfer's own buffer and job are called after it; no caller may choose such ids.
_PARTS: Final = ("buffers/", "jobs/")
_EVERYTHING: Final = "*"
_TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"

_IDENTITY = r'"(spiffe://[a-z0-9._-]{1,255}/[A-Za-z0-9._/-]{1,1024})"'
_RESOURCE = r"transfers/[a-z][a-z0-9-]{0,59}"
_TIME = r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z)"
_HOLDER_CHECK = rf"check if holder\({_IDENTITY}\);"
_TIME_CHECK = rf"check if time\(\$time\), \$time < {_TIME};"

# The whole of the first block, which the facility makes, and each line of those that holders add.
_FIRST_BLOCK = re.compile(
    rf'owner\({_IDENTITY}\);\nright\("(\*|{_RESOURCE})", "(read|write)"\);\n{_HOLDER_CHECK}\n{_TIME_CHECK}\n'
)
_CHECK = re.compile(
    rf'{_HOLDER_CHECK}|{_TIME_CHECK}|check if resource\("({_RESOURCE})"\);|check if (operation\("read"\));'
)


@dataclass(frozen=True, slots=True)
class Delegation:
    """A part of somebody's rights that somebody else may use.

    `owner` and `holder` are SPIFFE ids; `resource` is `transfers/{transfer}`, empty for all that is the owner's; `ids`
    are the revocation ids of the token (hexadecimal), one for each block.
    """

    owner: str
    holder: str
    resource: str
    read_only: bool
    expire: datetime
    ids: tuple[str, ...] = ()

    def covers(self, name: str) -> bool:
        """Whether it is for a resource, if that is the owner's: the transfer that it names, its buffer, its job."""
        if not self.resource or name == self.resource:
            return True
        part = id_of_part(self.resource.removeprefix(_COLLECTION))
        return name in [f"{collection}{part}" for collection in _PARTS]


@dataclass(frozen=True, slots=True)
class Restriction:
    """What a token is narrowed to; what is left out stays as it was."""

    resource: str = ""
    read_only: bool = False
    until: datetime | None = None
    holder: str = ""


def check_text(text: str) -> str:
    """What may travel in the metadata of a call, without the blanks around it; TOKEN_REFUSED for anything else."""
    text = text.strip()
    if not _TEXT.fullmatch(text):
        refuse("form", f"it is not 1 to {LARGEST_TOKEN} characters of URL-safe base64")
    return text


def first_block(delegation: Delegation) -> str:
    """The source of the block that the facility signs; INVALID_FIELD if the grammar has no words for it."""
    if delegation.resource and not re.fullmatch(_RESOURCE, delegation.resource):
        raise invalid_field("resource", "must be transfers/<id>, or empty for all that is yours")
    source = (
        f'owner("{delegation.owner}");\n'
        f'right("{delegation.resource or _EVERYTHING}", "{"read" if delegation.read_only else "write"}");\n'
        f'check if holder("{delegation.holder}");\n'
        f"check if time($time), $time < {_spell_time(delegation.expire)};\n"
    )
    if not _FIRST_BLOCK.fullmatch(source):
        raise invalid_field("holder", "the token would have names that are too long for one")
    return source


def next_block(restriction: Restriction) -> str:
    """The source of a block that narrows; INVALID_FIELD if it says nothing, or something that cannot be."""
    lines = []
    if restriction.holder:
        lines.append(f'check if holder("{restriction.holder}");')
    if restriction.resource:
        lines.append(f'check if resource("{restriction.resource}");')
    if restriction.read_only:
        lines.append('check if operation("read");')
    if restriction.until is not None:
        lines.append(f"check if time($time), $time < {_spell_time(restriction.until)};")
    if not lines:
        raise invalid_field("restriction", "say what to narrow the token to: a resource, read only, or a time")
    if not all(map(_CHECK.fullmatch, lines)):
        raise invalid_field("restriction", "the resource must be transfers/<id>, and a holder a SPIFFE id")
    return "".join(f"{line}\n" for line in lines)


def read_blocks(sources: Sequence[str], ids: Sequence[str]) -> Delegation:
    """What the blocks of a token come to, each narrowing those before it.

    Raises TOKEN_REFUSED if one says anything that is not in the grammar, or if nothing is left.
    """
    found = _FIRST_BLOCK.fullmatch(sources[0])
    if found is None:
        refuse("grammar", "its first block is not one that a facility of this release makes")
    owner, resource, mode, holder, until = found.groups()
    resource = "" if resource == _EVERYTHING else resource
    delegation = Delegation(owner, holder, resource, mode == "read", _read_time(until), tuple(ids))
    for number, source in enumerate(sources[1:], start=2):
        for line in source.splitlines():
            delegation = narrow(delegation, _read_check(number, line))
    return delegation


def narrow(delegation: Delegation, restriction: Restriction) -> Delegation:
    """The part of a delegation that a restriction leaves; TOKEN_REFUSED if that is nothing."""
    if restriction.holder and restriction.holder != delegation.holder:
        refuse("holder", f"it is narrowed to {restriction.holder}, and was made for {delegation.holder} alone")
    if restriction.resource and delegation.resource not in ("", restriction.resource):
        refuse("resource", f"it is narrowed to {restriction.resource}, and was for {delegation.resource} alone")
    return replace(
        delegation,
        resource=restriction.resource or delegation.resource,
        read_only=delegation.read_only or restriction.read_only,
        expire=delegation.expire if restriction.until is None else min(delegation.expire, restriction.until),
    )


def describe(delegation: Delegation) -> tuple[str, ...]:
    """What it allows, in words."""
    what = delegation.resource or f"everything of {delegation.owner}"
    verb = "look at and consume" if delegation.read_only else "look at, consume, change and end"
    return (
        f"{delegation.holder} may {verb} {what}",
        f"by the right of {delegation.owner}",
        f"until {delegation.expire:%Y-%m-%d %H:%M:%S} UTC",
    )


def refuse(check: str, why: str) -> NoReturn:
    """Raise TOKEN_REFUSED; `check` is what failed: form, grammar, signature, holder, time, revocation or resource."""
    raise BeamwireError(
        Reason.TOKEN_REFUSED,
        f"the delegation token is refused: {why}; ask its owner for another, or call without it",
        metadata={"check": check},
    )


def _read_check(number: int, line: str) -> Restriction:
    found = _CHECK.fullmatch(line)
    if found is None:
        refuse("grammar", f"its block {number} says something else than a token may (docs/delegation.md has the list)")
    holder, until, resource, read = found.groups()
    return Restriction(resource or "", bool(read), _read_time(until) if until else None, holder or "")


def _spell_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime(_TIME_FORMAT)


def _read_time(text: str) -> datetime:
    try:
        return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        refuse("grammar", "it names a time that there is not")
