"""New credentials for a listener that serves: handed to gRPC only while what they replace cannot be freed.

gRPC frees what made a handshake as soon as it is replaced, although another thread may be about to use it
(grpc/grpc#36693): about one replacement in a thousand under many handshakes ended the process. A handshake that has
begun and is not finished keeps it. So before each replacement a connection of our own is begun at the listener and
left there for a while.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import suppress
from typing import Final

from beamwire.mesh.identity.credentials import Credentials

# Seconds that a handshake is left unfinished after the replacement; gRPC itself gives it up after 120.
HELD: Final = 30.0
PATIENCE: Final = 5.0
RETRY_PAUSE: Final = 1.0
# Credentials that are never replaced end too: after so many attempts they are replaced without.
ATTEMPTS: Final = 5
_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}

_log = logging.getLogger(__name__)


class Handover:
    """Lets the credentials of one listener be replaced, each time that a connection holds the old ones.

    Make it in the event loop in which it runs.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wanted = asyncio.Event()
        self._allowed = False

    def allowed(self) -> bool:
        """Whether gRPC may be given new credentials, which are there; asked by its threads, one at a time."""
        allowed, self._allowed = self._allowed, False
        if not allowed:
            self._want()
        return allowed

    async def run(self, credentials: Credentials, host: str, port: int) -> None:
        """Bring each change of the credentials to a listener, until cancelled."""
        silence = credentials.listen(self._want)
        held: set[asyncio.StreamWriter] = set()
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                holder = await self._replace(_ANY_ADDRESS.get(host, host), port)
                if holder is not None:
                    held.add(holder)
                    self._loop.call_later(HELD, _let_go, held, holder)
        finally:
            silence()
            for holder in held:
                holder.close()

    def _want(self) -> None:
        # The thread that noticed it may do so when the loop has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wanted.set)

    async def _replace(self, host: str, port: int) -> asyncio.StreamWriter | None:
        """Begin a handshake, then another one of ours, for which the credentials are replaced; returns the first."""
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(PATIENCE):
                    return await self._replace_once(host, port)
            except (OSError, EOFError) as error:
                _log.warning("the listener at %s:%d cannot be told of its new credentials: %s", host, port, error)
                await asyncio.sleep(RETRY_PAUSE if attempt + 1 < ATTEMPTS else 0)
        # The next connection of anybody brings the change.
        self._allowed = True
        return None

    async def _replace_once(self, host: str, port: int) -> asyncio.StreamWriter:
        holder = await _begin_handshake(host, port)
        try:
            # Whoever connected meanwhile asked in vain.
            self._wanted.clear()
            self._allowed = True
            (await _begin_handshake(host, port)).close()
        except BaseException:
            holder.close()
            raise
        finally:
            # It counts only while the other is held.
            self._allowed = False
        return holder


def _let_go(held: set[asyncio.StreamWriter], holder: asyncio.StreamWriter) -> None:
    held.discard(holder)
    holder.close()


async def _begin_handshake(host: str, port: int) -> asyncio.StreamWriter:
    """Connect, greet, and wait for the answer to begin: from then on the server holds what it answers with."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # nothing is said on this connection
        context.set_alpn_protocols(["h2"])
        greeting = ssl.MemoryBIO()
        with suppress(ssl.SSLWantReadError):
            context.wrap_bio(ssl.MemoryBIO(), greeting).do_handshake()
        writer.write(greeting.read())
        await reader.readexactly(1)
    except BaseException:
        writer.close()
        raise
    return writer
