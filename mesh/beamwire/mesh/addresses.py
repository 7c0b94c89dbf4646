"""Where the services of a facility are: one address for all, or one for each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from beamwire.mesh.errors import invalid_field

_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT: Final = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses (`host:port`) of a facility's services.

    Args:
        default: where a service is that has no address of its own.
        services: the services that have one, by name: `request`, `job`, `buffer`, `certificate`.
    """

    default: str
    services: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Addresses:
        """Return the addresses that `str` wrote: `host:port[,service=host:port…]`; INVALID_FIELD if it is not that."""
        default, *named = text.split(",")
        pairs = [pair.partition("=") for pair in named]
        for address in (default, *(value for _, _, value in pairs)):
            check_address(address)
        return cls(default, {name: value for name, _, value in pairs})

    def __str__(self) -> str:
        return ",".join([self.default, *(f"{name}={value}" for name, value in sorted(self.services.items()))])

    def of(self, service: str) -> str:
        """Return the address of a service."""
        return self.services.get(service, self.default)


def check_address(address: str) -> str:
    """Return an address if it is one; INVALID_FIELD if not."""
    host, _, port = address.rpartition(":")
    # Nothing that gRPC takes for a scheme: an address can come from another facility.
    if not _HOST.fullmatch(host) or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise invalid_field("address", f"{address[:300]!r} is not host:port, as in 127.0.0.1:7443")
    return address
