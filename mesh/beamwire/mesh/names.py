"""Resource names: `collection/id`, what an id may be, and how one is made up."""

from __future__ import annotations

import hashlib
import re
import secrets
import string

from beamwire.mesh.errors import invalid_field

# Short enough to leave room for what `id_of_part` puts before it.
_ID = re.compile(r"[a-z][a-z0-9-]{0,59}")
_PART_ID = re.compile(r"of-[a-z][a-z0-9-]{0,59}")
# Ids that the facility makes up may also be serial numbers and trust domains.
_NAME_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,253}")
RESERVED = "of-"
_LETTERS = string.ascii_lowercase
_CHARACTERS = string.ascii_lowercase + string.digits


def parse_name(collection: str, name: str) -> str:
    """The id in a resource name; BeamwireError INVALID_FIELD, naming the field "name", if it is not one."""
    prefix, _, identifier = name.partition("/")
    if prefix != collection or not _NAME_ID.fullmatch(identifier):
        raise invalid_field("name", f"must be {collection}/<id>, not {name[:100]!r}")
    return identifier


def check_id(field: str, value: str, *, reserved: bool = False) -> str:
    """The value, if it may be an id; BeamwireError INVALID_FIELD otherwise.

    Only a service may choose one that begins as `id_of_part` does (`reserved`).
    """
    if value.startswith(RESERVED) and not reserved:
        raise invalid_field(field, f"must not begin with {RESERVED!r}, which is kept for what services make")
    if not _ID.fullmatch(value) and not (reserved and _PART_ID.fullmatch(value)):
        raise invalid_field(field, f"must be 1 to 60 of a-z, 0-9 and '-', beginning with a letter, not {value[:100]!r}")
    return value


def id_of_part(owner_id: str) -> str:
    """The id of what a service makes for a resource, its buffer or its job: one that no caller may choose."""
    return f"{RESERVED}{owner_id}"


def new_id(seed: str | None = None) -> str:
    """An id of 12 characters (61 bits): random, or always the same one for the same seed."""
    digest = secrets.token_bytes(32) if seed is None else hashlib.sha256(seed.encode()).digest()
    number = int.from_bytes(digest, "big")
    number, first = divmod(number, len(_LETTERS))
    characters = [_LETTERS[first]]
    for _ in range(11):
        number, index = divmod(number, len(_CHARACTERS))
        characters.append(_CHARACTERS[index])
    return "".join(characters)
