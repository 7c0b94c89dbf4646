"""Where a cache on another host is spoken to by its service: a TLS port that nobody else gets into."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.sockets import listen
from beamwire.services.buffer.doors import LINE_LIMIT

# Its own service, also where all services of the facility are one process.
ALLOWED: Final = frozenset({"service/buffer", "service/facility"})
# Strangers say nothing for so long at most, in seconds, and are so many at most: then the oldest makes room.
_HANDSHAKE_TIMEOUT: Final = 10.0
MOST_STRANGERS: Final = 64
_ACCEPT_PAUSE: Final = 0.2

_log = logging.getLogger(__name__)

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ControlPort:
    """Listens at a free port. Each connection is made with the certificate that the cache then has.

    Args:
        host: the address to listen on.
        credentials: of the cache.
        answer: serves one connection of the service.
        refuse: is told who was turned away, and why.
    """

    def __init__(self, host: str, credentials: Credentials, answer: Answer, refuse: Callable[[str], None]) -> None:
        self._credentials = credentials
        self._answer = answer
        self._refuse = refuse
        self._socket = listen(host, 0)
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._peers: set[asyncio.Task[None]] = set()
        # Those of them that have not shown a certificate yet, the oldest first.
        self._strangers: dict[asyncio.Task[None], None] = {}
        self._accepting = asyncio.create_task(self._accept())

    def close(self) -> None:
        """Listen no more; those who are there are told by whoever answers them."""
        self._accepting.cancel()
        self._socket.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._socket)
            except OSError as error:
                _log.warning("a peer at the control port could not be accepted: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if len(self._strangers) >= MOST_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.cancel()
            peer = asyncio.create_task(self._serve(sock, f"{address[0]}:{address[1]}"))
            self._peers.add(peer)
            self._strangers[peer] = None
            peer.add_done_callback(partial(self._gone, sock))

    def _gone(self, sock: socket.socket, peer: asyncio.Task[None]) -> None:
        self._peers.discard(peer)
        self._strangers.pop(peer, None)
        # One that made room may not even have begun.
        sock.close()

    async def _serve(self, sock: socket.socket, address: str) -> None:
        peer = asyncio.current_task()
        assert peer is not None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(LINE_LIMIT)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                sock,
                ssl=self._credentials.server_context(),
                ssl_handshake_timeout=_HANDSHAKE_TIMEOUT,
            )
        except OSError as error:
            self._refuse(f"{address} at the control port: {error}")
            return
        self._strangers.pop(peer, None)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            why = self._objection(writer)
            if why:
                self._refuse(f"{address} at the control port: {why}")
                return
            await self._answer(reader, writer)
        finally:
            writer.close()
            with suppress(OSError, TimeoutError):
                await writer.wait_closed()

    def _objection(self, writer: asyncio.StreamWriter) -> str:
        """Return why a peer is turned away; empty if it is the service."""
        try:
            identity = self._credentials.peer_identity(writer.get_extra_info("ssl_object"))
        except BeamwireError as error:
            return error.message
        own = identity.trust_domain == self._credentials.identity.trust_domain
        return "" if own and identity.path in ALLOWED else f"{identity} is not the service of this cache"
