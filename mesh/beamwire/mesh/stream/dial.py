"""How a producer or a consumer reaches a cache: sockets, TLS, the cache's identity, greetings, what refusals mean."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.stream.connect import ConnectString, Place, spell
from beamwire.mesh.stream.local import peer_process, short
from beamwire.mesh.stream.sockets import (
    PAIR,
    PULL,
    PUSH,
    Connection,
    PeerClosedError,
    PlainConnection,
    tune,
)
from beamwire.mesh.stream.tls import TlsConnection, secure

_FIRST_DELAY: Final = 0.05
_LONGEST_DELAY: Final = 0.5
_ATTEMPT: Final = 10.0
# So long for TCP alone: a kernel asks again after 1, 3 and 7 s, but a link that was cut is dialed again at once.
_CONNECT_ATTEMPT: Final = 1.5
# The other alerts say that bytes were changed on the way.
_CERTIFICATE_ALERTS: Final = ("CERTIFICATE", "ALERT_UNKNOWN_CA", "ALERT_ACCESS_DENIED")
_ROLES: Final = {PUSH: "produce", PULL: "consume"}
_ANSWERS: Final = {PUSH: PULL, PULL: PUSH, PAIR: PAIR}


def dial(
    connect: ConnectString,
    host: Place,
    credentials: Credentials | None,
    protocol: int,
    *,
    timeout: float,
    role: str = "",
    stop: threading.Event | None = None,
    opened: Callable[[socket.socket], None] | None = None,
) -> Connection:
    """A connection to one host of a buffer, greetings exchanged. Tries again while nobody listens, `timeout` seconds.

    BeamwireError CACHE_FAILED if the cache cannot be reached, CERTIFICATE_INVALID or CERTIFICATE_EXPIRED if either side
    does not believe the other, ROLE_NOT_ALLOWED if the cache does not let this member in, or is, at a path, not that of
    this user; UNSUPPORTED if something else than PAIR is to be spoken at a path. `role` is what a PAIR will do
    there, `produce` say. `stop` ends the waiting between attempts; `opened` is given each socket before it is used, so
    that another thread can interrupt it.
    """
    if connect.transport == "tls+tcp" and credentials is None:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{_name(host)} wants a client certificate; enrol first")
    if isinstance(host, str) and protocol != PAIR:
        raise BeamwireError(Reason.UNSUPPORTED, f"{_name(host)} has delivery=acked only; use tcp or tls+tcp to push")
    if connect.transport != "tls+tcp":
        credentials = None
    opened = opened or _ignore
    sock = _reach(host, timeout, stop or threading.Event(), opened)
    try:
        sock.settimeout(_ATTEMPT)
        if credentials is None:
            connection: Connection = PlainConnection(sock)
        else:
            connection = TlsConnection(_secure(sock, host, credentials, connect, opened))
    except BaseException:
        sock.close()
        raise
    try:
        connection.set_deadline(_ATTEMPT)
        _greet(connection, host, credentials, protocol, role or _ROLES.get(protocol, "take part"))
    except BaseException:
        connection.close()
        raise
    connection.set_timeout(None)
    return connection


def _name(host: Place) -> str:
    return f"the cache at {spell(host)}"


def _ignore(sock: socket.socket) -> None:
    """Nobody wants to interrupt this socket."""


def _reach(
    host: Place, timeout: float, stop: threading.Event, opened: Callable[[socket.socket], None]
) -> socket.socket:
    deadline = time.monotonic() + timeout
    delay = _FIRST_DELAY
    while True:
        remaining = deadline - time.monotonic()
        try:
            sock = _connect(host, max(min(remaining, _CONNECT_ATTEMPT), _FIRST_DELAY), opened)
        except OSError as error:
            barred = isinstance(host, str) and isinstance(error, PermissionError)
            if barred or remaining < delay or stop.wait(delay):
                story = f"{_name(host)} cannot be reached ({error})" + ("" if barred else f"; tried for {timeout:g} s")
                raise BeamwireError(Reason.CACHE_FAILED, story + _remedy(host)) from error
            delay = min(2 * delay, _LONGEST_DELAY)
        else:
            tune(sock)
            return sock


def _connect(host: Place, timeout: float, opened: Callable[[socket.socket], None]) -> socket.socket:
    if isinstance(host, str):
        return _connect_local(Path(host), timeout, opened)
    failure = OSError("it has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(*host, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            opened(sock)
            sock.settimeout(timeout)
            sock.connect(address)
            if sock.getsockname() == sock.getpeername():
                # On one host, one who dials a free port may be given that very port, and reach himself.
                raise ConnectionRefusedError("nobody listens there")  # noqa: TRY301
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


def _connect_local(path: Path, timeout: float, opened: Callable[[socket.socket], None]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened(sock)
        sock.settimeout(timeout)
        with short(path) as address:
            sock.connect(address)
        _check_user(sock, str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def _check_user(sock: socket.socket, path: str) -> None:
    _, user = peer_process(sock)
    if user != os.geteuid():
        story = f"{_name(path)} runs as user {user} and not as this one, {os.geteuid()}"
        raise BeamwireError(Reason.ROLE_NOT_ALLOWED, story + _remedy(path))


def _remedy(host: Place) -> str:
    if not isinstance(host, str):
        return ""
    return "; transport=ipc is for processes of the same user on the host of the cache: use tls+tcp from elsewhere"


def _secure(
    sock: socket.socket,
    host: Place,
    credentials: Credentials,
    connect: ConnectString,
    opened: Callable[[socket.socket], None],
) -> ssl.SSLSocket:
    try:
        secured = secure(credentials.client_context(connect.facility), sock, server_hostname=host[0])
    except OSError as error:
        raise _refusal(host, error) from error
    try:
        opened(secured)
        secured.do_handshake()
        _check_identity(secured, host, credentials, connect)
    except OSError as error:
        secured.close()
        raise _refusal(host, error) from error
    except BaseException:
        secured.close()
        raise
    return secured


def _check_identity(secured: ssl.SSLSocket, host: Place, credentials: Credentials, connect: ConnectString) -> None:
    """The peer must be the buffer's cache, of the buffer's own facility: no other one's word counts for it."""
    identity = credentials.peer_identity(secured)
    expected = SpiffeId(connect.facility or credentials.identity.trust_domain, f"cache/{connect.buffer}")
    if identity != expected:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID,
            f"{_name(host)} is {identity} and not {expected}, the cache of buffers/{connect.buffer}",
        )


def _greet(connection: Connection, host: Place, credentials: Credentials | None, protocol: int, role: str) -> None:
    try:
        connection.send_greeting(protocol)
        answer = connection.receive_greeting()
    except (PeerClosedError, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError) as error:
        # One who speaks PAIR is always greeted, and told by Refusal if it may not stay.
        refused = credentials is not None and protocol != PAIR
        who = f"{credentials.identity} may not {role} there" if credentials and refused else "it failed, or is no cache"
        raise BeamwireError(
            Reason.ROLE_NOT_ALLOWED if refused else Reason.CACHE_FAILED,
            f"{_name(host)} closed the connection instead of greeting: {who}",
        ) from error
    except OSError as error:
        raise _refusal(host, error) from error
    except ValueError as error:
        raise BeamwireError(Reason.CACHE_FAILED, f"{_name(host)} is no cache: {error}") from error
    if answer != _ANSWERS[protocol]:
        raise BeamwireError(Reason.CACHE_FAILED, f"{_name(host)} answered with protocol {answer:#x}")


def _refusal(host: Place, error: OSError) -> BeamwireError:
    """What a failed handshake means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        expired = "expired" in error.verify_message
        story = f"the certificate of {_name(host)} is not valid: {error.verify_message}"
        return BeamwireError(Reason.CERTIFICATE_EXPIRED if expired else Reason.CERTIFICATE_INVALID, story)
    if isinstance(error, ssl.SSLError) and any(word in (error.reason or "") for word in _CERTIFICATE_ALERTS):
        reason = Reason.CERTIFICATE_EXPIRED if "EXPIRED" in error.reason else Reason.CERTIFICATE_INVALID
        alert = error.reason.partition("ALERT_")[2].replace("_", " ").lower()
        return BeamwireError(reason, f"{_name(host)} refused our certificate: {alert}")
    return BeamwireError(Reason.CACHE_FAILED, f"{_name(host)} failed during the handshake: {error}")
