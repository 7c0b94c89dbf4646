"""Where events may go: to public addresses, and to those besides that the facility's file names."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from concurrent.futures import Executor
from functools import partial
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

KEY: Final = "private_receivers"
LOCALHOST: Final = "localhost"
_LOOPBACK: Final = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))
# What translates to IPv4 behind it holds the address in its last 32 bits.
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


class Receivers:
    """Tells the addresses to which events may go from those behind which a facility's own things are.

    Args:
        private: networks that are not public and may receive events all the same, as `10.1.2.0/24`.
    """

    def __init__(self, private: Iterable[str] = ()) -> None:
        self._private = tuple(map(ipaddress.ip_network, private))

    def allows(self, address: Address) -> bool:
        """Whether events may go to an address."""
        within = _within(address)
        public = within.is_global and not within.is_multicast
        return public or any(within in network for network in self._private)

    def problem(self, host: str) -> str:
        """What keeps events from the host of a URL; empty if nothing does, or only its addresses will tell."""
        named = host.rstrip(".").lower()
        local = named == LOCALHOST or named.endswith(f".{LOCALHOST}")
        addresses = _LOOPBACK if local else tuple(_literals(host))
        return _refused(host, addresses) if addresses and not any(map(self.allows, addresses)) else ""

    async def addresses(self, host: str, port: int, threads: Executor) -> list[str]:
        """Ask for the addresses of a host; events may go to these, and are sent to no others.

        Raises:
            BeamwireError: POLICY_REFUSED if events may go to none of them.
            OSError: nobody knows the host.
        """
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        known = await asyncio.get_running_loop().run_in_executor(threads, ask)
        found = tuple(dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in known))
        allowed = [str(address) for address in found if self.allows(address)]
        if not allowed:
            raise BeamwireError(Reason.POLICY_REFUSED, _refused(host, found))
        return allowed


def _literals(host: str) -> Iterable[Address]:
    try:
        yield ipaddress.ip_address(host)
    except ValueError:
        return


def _within(address: Address) -> Address:
    """The address that is reached by another which only wraps it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        return inner or address
    return address


def _refused(host: str, addresses: Iterable[Address]) -> str:
    where = ", ".join(sorted({str(address) for address in addresses}))
    return (
        f"{host} is at {where}, which is not public, and events go there only if the operator allows it: "
        f"{KEY} in [webhooks] of facility.toml"
    )
