"""Which of the hosts that a facility names for caches this one is."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from beamwire.mesh.errors import BeamwireError, Reason


def own_name(names: Sequence[str]) -> str:
    """Return the first name whose address is this host's, one that others can dial if there is such a one.

    BeamwireError CACHE_FAILED if there is none.
    """
    own = [(name, address) for name in names for address in _addresses(name) if _is_ours(address)]
    if not own:
        raise BeamwireError(
            Reason.CACHE_FAILED,
            f"this node, {socket.gethostname()}, has none of the names or addresses on which caches may run: "
            f"{', '.join(names)}; add it to `nodes` in [data] of facility.toml, or choose other nodes",
        )
    return min(own, key=lambda found: ipaddress.ip_address(found[1].partition("%")[0]).is_loopback)[0]


def _addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
