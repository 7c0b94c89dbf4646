"""Where the services of a facility are: one address for all or one for each, and of replicas each one's own."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field

_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT: Final = re.compile(r"[0-9]{1,5}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of a facility's services: `host:port`, or those of a service's replicas, `host:port,host:port`.

    Args:
        default: where a service is that has no address of its own.
        services: the services that have one, by name: `request`, `job`, `buffer`, `certificate`.
    """

    default: str
    services: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Addresses:
        """Return the addresses that `str` wrote, `host:port[,host:port…][,service=host:port…]`; or INVALID_FIELD."""
        default: list[str] = []
        services: dict[str, list[str]] = {}
        replicas = default
        for part in text.split(","):
            name, named, address = part.rpartition("=")
            if named:
                replicas = services.setdefault(name, [])
            replicas.append(check_address(address))
        if not default:
            raise invalid_field("address", f"{text[:300]!r} names no address that is for all services")
        return cls(",".join(default), {name: ",".join(found) for name, found in services.items()})

    def __str__(self) -> str:
        return ",".join([self.default, *(f"{name}={value}" for name, value in sorted(self.services.items()))])

    def of(self, service: str) -> str:
        """Return the address of a service."""
        return self.services.get(service, self.default)


def check_address(address: str) -> str:
    """Return an address, or several of replicas, if it is that; INVALID_FIELD if not."""
    for one in replicas(address):
        host, _, port = one.rpartition(":")
        # Nothing that gRPC takes for a scheme: an address can come from another facility.
        if not _HOST.fullmatch(host) or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
            raise invalid_field("address", f"{address[:300]!r} is not host:port, as in 127.0.0.1:7443")
    return address


def replicas(address: str) -> tuple[str, ...]:
    """Return each `host:port` of an address."""
    return tuple(address.split(","))


def target(address: str) -> str:
    """Return what gRPC dials to reach a service, any of its replicas.

    One name is left to gRPC, which dials all that it stands for and asks again when they are gone. Of several, each is
    looked up here and now, for gRPC takes no more than one. SERVICE_UNAVAILABLE if none of them can be found.
    """
    if len(replicas(address)) == 1:
        return address
    found = [place for one in replicas(address) for place in _look_up(one)]
    if not found:
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"none of the names in {address} can be found; check them")
    if all(isinstance(host, ipaddress.IPv4Address) for host, _ in found):
        return "ipv4:" + ",".join(f"{host}:{port}" for host, port in found)
    # gRPC takes one kind of them only; the other has a spelling in this one.
    return "ipv6:" + ",".join(f"[{'::ffff:' if host.version == 4 else ''}{host}]:{port}" for host, port in found)


def _look_up(address: str) -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    host, _, port = address.rpartition(":")
    try:
        # Of what is no name, nothing is asked.
        answers = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        _log.warning("%s cannot be found: %s", address, error)
        return
    for *_, place in answers:
        yield ipaddress.ip_address(str(place[0]).partition("%")[0]), int(port)
