"""Accepts peers: TLS, greeting, identity, and then a thread that serves the role that the greeting asks for."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import Final

from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.sockets import PULL, PUSH, Connection, PlainConnection, TlsConnection, listen, tune
from beamwire.services.buffer.cache.egress import Egress
from beamwire.services.buffer.cache.hangups import Hangups
from beamwire.services.buffer.cache.ingest import Ingest
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.cache.relay import Relay

MOST_PEERS: Final = 1024
_HANDSHAKE_TIMEOUT: Final = 10.0
_PARTING_TIMEOUT: Final = 1.0
_ACCEPT_PAUSE: Final = 0.2

_log = logging.getLogger(__name__)


class Listener:
    """The one port of a cache, for producers and consumers."""

    def __init__(self, relay: Relay, credentials: Credentials | None) -> None:
        self._relay = relay
        self._credentials = credentials
        self._hangups = Hangups(relay)
        self._places = threading.BoundedSemaphore(MOST_PEERS)
        self._socket = listen(relay.config.host, relay.config.port)
        self._closed = threading.Event()
        self.port: int = self._socket.getsockname()[1]

    def start(self) -> None:
        """Begin to accept."""
        self._hangups.start()
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        if not self._closed.is_set():
            self._closed.set()
            # Closing alone would not wake the thread that accepts.
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                # Too many open files, or a peer that left meanwhile: the next one may come through.
                if not self._closed.wait(_ACCEPT_PAUSE):
                    _log.warning("a peer could not be accepted: %s", error)
                continue
            name = f"{address[0]}:{address[1]}"
            if not self._places.acquire(blocking=False):
                self._relay.refuse(f"{name}: {MOST_PEERS} peers are connected already")
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock, name), name=name, daemon=True).start()
            except RuntimeError as error:
                self._places.release()
                sock.close()
                self._relay.refuse(f"{name}: no thread can be started for it: {error}")

    def _serve(self, sock: socket.socket, address: str) -> None:
        who = address
        try:
            with sock:
                tune(sock)
                sock.settimeout(_HANDSHAKE_TIMEOUT)
                connection, identity = self._secure(sock)
                who = f"{identity or 'a peer without a certificate'} at {address}"
                try:
                    self._serve_role(connection, identity, address, who)
                finally:
                    connection.close()
        except RefusedError as error:
            _log.warning("refused %s: %s", who, error)
            self._relay.refuse(f"{who}: {error}")
        except OSError as error:
            _log.info("lost %s: %s", who, error)
        finally:
            self._places.release()

    def _serve_role(self, connection: Connection, identity: str, address: str, who: str) -> None:
        connection.set_deadline(_HANDSHAKE_TIMEOUT)
        protocol = self._greet(connection, identity)
        _log.info("%s %s", who, "produces" if protocol == PUSH else "consumes")
        if protocol == PUSH:
            Ingest(self._relay, connection, identity).run()
        else:
            connection.set_timeout(None)
            Egress(self._relay, connection, self._hangups).run(identity, address)

    def _secure(self, sock: socket.socket) -> tuple[Connection, str]:
        if self._credentials is None:
            return PlainConnection(sock), ""
        secured = self._credentials.server_context().wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        try:
            secured.do_handshake()
            identity = str(self._credentials.peer_identity(secured))
        except (OSError, BeamwireError) as error:
            _part(secured)
            raise RefusedError(_reason(error)) from error
        return TlsConnection(secured), identity

    def _greet(self, connection: Connection, identity: str) -> int:
        config = self._relay.config
        try:
            protocol = connection.receive_greeting()
        except (OSError, ValueError) as error:
            raise RefusedError(f"no greeting: {error}") from error
        if protocol not in (PUSH, PULL):
            raise RefusedError(f"it speaks protocol {protocol:#x}, neither PUSH nor PULL")
        allowed = config.producers if protocol == PUSH else config.consumers
        if identity and identity not in allowed:
            raise RefusedError(f"it may not {'produce' if protocol == PUSH else 'consume'} here")
        connection.send_greeting(PULL if protocol == PUSH else PUSH)
        return protocol


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it showed no certificate"
    return f"the TLS handshake failed: {error}"


def _part(sock: ssl.SSLSocket) -> None:
    """Close so that the alert arrives: with something unread, the kernel would throw it away."""
    raw = socket.socket
    deadline = time.monotonic() + _PARTING_TIMEOUT
    with sock, suppress(OSError):
        raw.shutdown(sock, socket.SHUT_WR)
        while (remaining := deadline - time.monotonic()) > 0:
            sock.settimeout(remaining)
            if not raw.recv(sock, 4096):
                return
