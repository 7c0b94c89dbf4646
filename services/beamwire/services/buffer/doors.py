"""How the service reaches a cache's control connection: a Unix socket in its directory, or TLS from another host."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import SpiffeId

CONTROL_SOCKET: Final = "control.sock"
# What is told of trust has a list of revoked certificates in it.
LINE_LIMIT: Final = 16 * 1024 * 1024

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Door(Protocol):
    """Where a cache is spoken to."""

    async def open(self) -> Streams:
        """Connect. OSError, or a BeamwireError if another answers than the cache."""
        ...


@dataclass(frozen=True)
class SocketDoor:
    """The control socket of the cache in a directory."""

    directory: Path

    async def open(self) -> Streams:
        """Connect."""
        # The path of a socket may have 107 characters; through the directory's descriptor it always has few.
        directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{directory}/{CONTROL_SOCKET}")
            return await asyncio.open_unix_connection(sock=sock, limit=LINE_LIMIT)
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(directory)

    def __str__(self) -> str:
        return str(self.directory)


@dataclass(frozen=True)
class TlsDoor:
    """The control port of a cache on another host, which must prove to be that cache.

    Args:
        address: host:port.
        identity: of the cache.
        credentials: of the service.
    """

    address: str
    identity: SpiffeId
    credentials: Credentials

    async def open(self) -> Streams:
        """Connect. CERTIFICATE_INVALID or CERTIFICATE_EXPIRED if it is another than the cache."""
        host, _, port = self.address.rpartition(":")
        context = self.credentials.client_context()
        reader, writer = await asyncio.open_connection(
            host, int(port), ssl=context, server_hostname=host, limit=LINE_LIMIT
        )
        try:
            self._check(self.credentials.peer_identity(writer.get_extra_info("ssl_object")))
        except BaseException:
            writer.close()
            raise
        return reader, writer

    def _check(self, found: SpiffeId) -> None:
        if found != self.identity:
            raise ConnectionRefusedError(f"{self.address} is {found} and not {self.identity}")

    def __str__(self) -> str:
        return self.address
