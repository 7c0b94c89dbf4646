"""Who a member is: the SPIFFE id, its trust domain and its role."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from beamwire.mesh.errors import invalid_field

if TYPE_CHECKING:
    from cryptography import x509

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_SCHEME: Final = "spiffe://"
_MAX_LENGTH: Final = 2048
# So long before its issue a certificate begins, for members whose clocks are slow.
BACKDATE: Final = timedelta(minutes=5)

Clock = Callable[[], datetime]


def utcnow() -> datetime:
    """The present time, with its zone."""
    return datetime.now(UTC)


class Role(enum.StrEnum):
    """The kind of member: the first segment of the path of its SPIFFE id.

    PARTNER is a service of another facility, which no path says of itself.
    """

    USER = "user"
    SERVICE = "service"
    JOB = "job"
    CACHE = "cache"
    OPERATOR = "operator"
    PARTNER = "partner"


# The roles that a facility gives to its own members.
OWN_ROLES: Final = tuple(role for role in Role if role is not Role.PARTNER)


def is_trust_domain(text: str) -> bool:
    """Whether a text can be the name of a trust domain."""
    return _TRUST_DOMAIN.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A member of a trust domain: `spiffe://<trust_domain>/<path>`. Always valid once made."""

    trust_domain: str
    path: str

    def __post_init__(self) -> None:
        segments = self.path.split("/")
        if not is_trust_domain(self.trust_domain):
            raise invalid_field("identity", f"{self.trust_domain[:100]!r} is not a trust domain")
        if any(not _SEGMENT.fullmatch(s) or s in {".", ".."} for s in segments):
            raise invalid_field("identity", f"{self.path[:100]!r} is not the path of a SPIFFE id")
        if len(str(self)) > _MAX_LENGTH:
            raise invalid_field("identity", f"a SPIFFE id has at most {_MAX_LENGTH} characters")

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """The id that a text spells; BeamwireError INVALID_FIELD if it spells none."""
        if not text.startswith(_SCHEME):
            raise invalid_field("identity", f"must be spiffe://<trust domain>/<role>/<name>, not {text[:100]!r}")
        trust_domain, _, path = text.removeprefix(_SCHEME).partition("/")
        return cls(trust_domain, path)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}/{self.path}"

    def __hash__(self) -> int:
        # Asked several times for each call; that of a text is kept with it.
        return hash(self.path)

    @property
    def role(self) -> Role:
        """The kind of member; BeamwireError INVALID_FIELD if the path begins with no known role."""
        first = self.path.partition("/")[0]
        if first not in OWN_ROLES:
            known = ", ".join(OWN_ROLES)
            raise invalid_field("identity", f"{self}: {first!r} is no role; the roles are {known}")
        return Role(first)

    @property
    def uri(self) -> x509.UniformResourceIdentifier:
        """The id as it stands in a certificate."""
        # Ids are read by programs that have nothing to do with certificates, and start faster without.
        from cryptography import x509

        return x509.UniformResourceIdentifier(str(self))


@lru_cache(maxsize=1024)
def parse_id(text: str) -> SpiffeId:
    """The id that a text spells, as `SpiffeId.parse`, for texts that come again and again."""
    return SpiffeId.parse(text)


def services_name(trust_domain: str) -> str:
    """The DNS name on the certificates of a facility's services and on no other: by it a client knows a service.

    A host name would not do, because the caches of a facility share the services' hosts.
    """
    return f"services.{trust_domain}"
