"""Accepts peers: TLS, greeting, identity, and then a thread that serves the role that the greeting asks for."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.local import listen_local, peer_process
from beamwire.mesh.stream.sockets import (
    PAIR,
    PULL,
    PUSH,
    Connection,
    PlainConnection,
    listen,
    tune,
)
from beamwire.mesh.stream.tls import TlsConnection, secure
from beamwire.services.buffer.cache.admission import Admission, Certificate, Pass, read_certificate
from beamwire.services.buffer.cache.config import DATA_SOCKET
from beamwire.services.buffer.cache.egress import AckedEgress, PushEgress
from beamwire.services.buffer.cache.hangups import Hangups
from beamwire.services.buffer.cache.ingest import AckedIngest, PushIngest
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.cache.relay import Relay
from beamwire.services.buffer.cache.strangers import Strangers
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE, Hello, Refusal, Signal

MOST_PEERS: Final = 1024
# So many may be on their way in. Members need milliseconds; of a crowd that says nothing the oldest make room.
MOST_STRANGERS: Final = 256
_HANDSHAKE_TIMEOUT: Final = 10.0
_PARTING_TIMEOUT: Final = 1.0
_ACCEPT_PAUSE: Final = 0.2
_VERSION: Final = 1
_INSTANCE: Final = re.compile("[0-9a-f]{32}")
# To each protocol that a peer may speak, the one that is answered, and the role it means.
_ANSWERS: Final = {PUSH: PULL, PULL: PUSH, PAIR: PAIR}
_ROLES: Final = {PUSH: LINK_ROLE_PRODUCE, PULL: LINK_ROLE_CONSUME}

_log = logging.getLogger(__name__)


class Listener:
    """The one port of a cache, or its Unix socket in `directory`, for producers and consumers.

    `address` is what peers dial: host:port, or a path; `port` is 0 then.
    """

    def __init__(self, relay: Relay, credentials: Credentials | None, admission: Admission, directory: Path) -> None:
        self._relay = relay
        self._admission = admission
        self._credentials = credentials
        self._hangups = Hangups(relay)
        self._places = threading.BoundedSemaphore(MOST_PEERS)
        self._strangers = Strangers(MOST_STRANGERS)
        self._closed = threading.Event()
        config = relay.config
        self._path = directory / DATA_SOCKET if config.transport == "ipc" else None
        if self._path is not None:
            self._socket = listen_local(self._path)
            self.port, self.address = 0, str(self._path)
            return
        self._socket = listen(config.host, config.port)
        self.port = self._socket.getsockname()[1]
        self.address = f"{config.advertise}:{self.port}"
        if config.congestion:
            # Every connection that is accepted inherits it.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, config.congestion.encode())

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
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                # Too many open files, or a peer that left meanwhile: the next one may come through.
                if not self._closed.wait(_ACCEPT_PAUSE):
                    _log.warning("a peer could not be accepted: %s", error)
                continue
            name = f"process {peer_process(sock)[0]}" if self._path is not None else f"{address[0]}:{address[1]}"
            if not self._places.acquire(blocking=False):
                self._relay.refuse(f"{name}: {MOST_PEERS} peers are connected already")
                sock.close()
                continue
            thread = threading.Thread(target=self._serve, args=(sock, name), name=name, daemon=True)
            self._strangers.add(thread, sock)
            try:
                thread.start()
            except RuntimeError as error:
                self._strangers.remove(thread)
                self._places.release()
                sock.close()
                self._relay.refuse(f"{name}: no thread can be started for it: {error}")

    def _serve(self, sock: socket.socket, address: str) -> None:
        who = address
        try:
            with sock:
                tune(sock)
                sock.settimeout(_HANDSHAKE_TIMEOUT)
                connection, certificate = self._secure(sock)
                who = f"{certificate.identity or 'a peer without a certificate'} at {address}"
                try:
                    self._greet(connection, certificate, address, who)
                finally:
                    connection.close()
        except RefusedError as error:
            _log.warning("refused %s: %s", who, error)
            self._relay.refuse(f"{who}: {error}")
        except (OSError, ValueError) as error:
            _log.info("lost %s: %s", who, error)
        finally:
            self._strangers.remove(threading.current_thread())
            self._places.release()

    def _secure(self, sock: socket.socket) -> tuple[Connection, Certificate]:
        if self._path is not None:
            _, user = peer_process(sock)
            if user != os.geteuid():
                raise RefusedError(f"it runs as user {user}, and this cache as {os.geteuid()}")
            return PlainConnection(sock), Certificate(may_speak_for_others=True)
        if self._credentials is None:
            return PlainConnection(sock), Certificate()
        secured = secure(self._credentials.server_context(), sock)
        try:
            self._strangers.replace(threading.current_thread(), secured)
            secured.do_handshake()
        except OSError as error:
            _part(secured)
            raise RefusedError(_reason(error)) from error
        connection = TlsConnection(secured)
        try:
            return connection, read_certificate(secured, self._credentials)
        except BeamwireError as error:
            _turn_away(connection, Refusal(reason=error.reason.value, message=error.message))  # type: ignore[arg-type]
            raise RefusedError(f"its certificate is not valid: {error}", error.reason) from error

    def _greet(self, connection: Connection, certificate: Certificate, address: str, who: str) -> None:
        """Exchange greetings, and serve the role that the peer's asks for."""
        connection.set_deadline(_HANDSHAKE_TIMEOUT)
        try:
            protocol = connection.receive_greeting()
        except (OSError, ValueError) as error:
            raise RefusedError(f"no greeting: {error}") from error
        if self._path is not None and protocol != PAIR:
            raise RefusedError(f"it speaks protocol {protocol:#x}, and here only PAIR is spoken")
        if protocol not in _ANSWERS:
            raise RefusedError(f"it speaks protocol {protocol:#x}, neither PUSH nor PULL nor PAIR")
        if protocol == PAIR:
            connection.send_greeting(PAIR)
            self._serve_link(Link(connection), connection, certificate, address, who)
            return
        granted = self._admission.admit(certificate, _ROLES[protocol], None, connection.interrupt)
        self._strangers.remove(threading.current_thread())
        try:
            connection.send_greeting(_ANSWERS[protocol])
            _log.info("%s %s", who, "produces" if protocol == PUSH else "consumes")
            if protocol == PUSH:
                PushIngest(self._relay, connection, granted).run()
            else:
                connection.set_timeout(None)
                PushEgress(self._relay, connection, self._hangups).run(granted.identity, address)
        finally:
            self._admission.release(granted)

    def _serve_link(self, link: Link, connection: Connection, certificate: Certificate, address: str, who: str) -> None:
        try:
            hello = _receive_hello(link)
            self._check_delivery()
            granted = self._admission.admit(certificate, hello.role, hello.ticket, link.interrupt, link.wake)
            self._strangers.remove(threading.current_thread())
            try:
                _log.info("%s %s", who, "produces" if hello.role == LINK_ROLE_PRODUCE else "consumes")
                self._serve_role(link, hello, granted, address, verify=isinstance(connection, PlainConnection))
            finally:
                self._admission.release(granted)
            link.finish()
        except RefusedError as error:
            refusal = Refusal(reason=error.reason.value, message=str(error), retry=error.retry)  # type: ignore[arg-type]
            with suppress(OSError):
                link.send_signal(Signal(refusal=refusal))
                link.finish()
            raise
        finally:
            link.close()

    def _check_delivery(self) -> None:
        if self._relay.config.delivery == "PUSH":
            raise RefusedError("frames are pushed here; dial with delivery=push", Reason.UNSUPPORTED)

    def _serve_role(self, link: Link, hello: Hello, granted: Pass, address: str, *, verify: bool) -> None:
        if hello.role == LINK_ROLE_CONSUME:
            local = self._path is not None
            AckedEgress(self._relay, link, granted, self._admission, local=local).run(hello, address)
            return
        # TLS vouches for every byte, and so does the kernel for what does not leave the host.
        verify = verify and self._path is None and not ip_address(address.rpartition(":")[0]).is_loopback
        AckedIngest(self._relay, link, granted, self._admission, verify=verify).run(hello)


def _turn_away(connection: Connection, refusal: Refusal) -> None:
    """Tell one who is not let in why, if it speaks a protocol that has words for it, and close."""
    link = Link(connection)
    try:
        connection.set_deadline(_HANDSHAKE_TIMEOUT)
        if connection.receive_greeting() == PAIR:
            connection.send_greeting(PAIR)
            _receive_hello(link)
            link.send_signal(Signal(refusal=refusal))
            link.finish()
    except (OSError, ValueError, RefusedError) as error:
        _log.debug("one who is turned away cannot be told why: %s", error)
    finally:
        link.close()


def _receive_hello(link: Link) -> Hello:
    try:
        first = link.receive(_no_frame)
    except (OSError, ValueError) as error:
        raise RefusedError(f"no Hello: {error}", Reason.INVALID_FIELD) from error
    if not isinstance(first, Signal) or not first.HasField("hello"):
        raise RefusedError("its first message is not Hello", Reason.INVALID_FIELD)
    hello = first.hello
    if hello.version != _VERSION:
        raise RefusedError(f"it speaks version {hello.version} of the protocol; this is {_VERSION}", Reason.UNSUPPORTED)
    if hello.role not in (LINK_ROLE_PRODUCE, LINK_ROLE_CONSUME):
        raise RefusedError("it does not say whether it produces or consumes", Reason.INVALID_FIELD)
    if not _INSTANCE.fullmatch(hello.instance):
        raise RefusedError("its instance is not 32 hexadecimal digits", Reason.INVALID_FIELD)
    return hello


def _no_frame(length: int) -> memoryview:
    raise RefusedError("its first message is a frame and not Hello", Reason.INVALID_FIELD)


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
