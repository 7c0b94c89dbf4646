"""Whether the certificate that a connection began with is still that of its member."""

from __future__ import annotations

from typing import Final

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString

# How often a connection looks whether its member's certificate was renewed, in seconds.
LOOK_PERIOD: Final = 1.0


class Shown:
    """The certificate that is shown to a cache now; nothing without TLS. To be made before the connection."""

    def __init__(self, connect: ConnectString, credentials: Credentials | None) -> None:
        self._credentials = credentials if connect.transport == "tls+tcp" else None
        self._chain_pem = b"" if self._credentials is None else self._credentials.chain_pem

    @property
    def matters(self) -> bool:
        """Whether one is shown at all."""
        return self._credentials is not None

    @property
    def is_old(self) -> bool:
        """Whether there is a newer one: the cache ends the connection with the one that it began with."""
        return self._credentials is not None and self._credentials.chain_pem != self._chain_pem
