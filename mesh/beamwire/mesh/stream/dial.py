"""How a producer or a consumer reaches a cache: TCP, TLS, the cache's identity, greetings, and what refusals mean."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final

from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.sockets import PULL, PUSH, Connection, PeerClosedError, PlainConnection, TlsConnection, tune

_FIRST_DELAY: Final = 0.05
_LONGEST_DELAY: Final = 1.0
_ATTEMPT: Final = 10.0
_ROLES: Final = {PUSH: "produce", PULL: "consume"}


def dial(
    connect: ConnectString,
    host: tuple[str, int],
    credentials: Credentials | None,
    protocol: int,
    *,
    timeout: float,
    stop: threading.Event | None = None,
    opened: Callable[[socket.socket], None] | None = None,
) -> Connection:
    """A connection to one host of a buffer, greetings exchanged. Tries again while nobody listens, `timeout` seconds.

    BeamwireError CACHE_FAILED if the cache cannot be reached, CERTIFICATE_INVALID or CERTIFICATE_EXPIRED if either side
    does not believe the other, ROLE_NOT_ALLOWED if the cache does not let this member in. `stop` ends the waiting
    between attempts; `opened` is given each socket before it is used, so that another thread can interrupt it.
    """
    if connect.transport == "tls+tcp" and credentials is None:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{_name(host)} wants a client certificate; enrol first")
    opened = opened or _ignore
    sock = _reach(host, timeout, stop or threading.Event(), opened)
    try:
        sock.settimeout(_ATTEMPT)
        if connect.transport == "tcp" or credentials is None:
            connection: Connection = PlainConnection(sock)
        else:
            connection = TlsConnection(_secure(sock, host, credentials, connect.buffer, opened))
    except BaseException:
        sock.close()
        raise
    try:
        connection.set_deadline(_ATTEMPT)
        _greet(connection, host, credentials, protocol)
    except BaseException:
        connection.close()
        raise
    connection.set_timeout(None)
    return connection


def _name(host: tuple[str, int]) -> str:
    return f"the cache at {host[0]}:{host[1]}"


def _ignore(sock: socket.socket) -> None:
    """Nobody wants to interrupt this socket."""


def _reach(
    host: tuple[str, int], timeout: float, stop: threading.Event, opened: Callable[[socket.socket], None]
) -> socket.socket:
    deadline = time.monotonic() + timeout
    delay = _FIRST_DELAY
    while True:
        remaining = deadline - time.monotonic()
        try:
            sock = _connect(host, max(min(remaining, _ATTEMPT), _FIRST_DELAY), opened)
        except OSError as error:
            if remaining < delay or stop.wait(delay):
                raise BeamwireError(
                    Reason.CACHE_FAILED, f"{_name(host)} cannot be reached ({error}); tried for {timeout:g} s"
                ) from error
            delay = min(2 * delay, _LONGEST_DELAY)
        else:
            tune(sock)
            return sock


def _connect(host: tuple[str, int], timeout: float, opened: Callable[[socket.socket], None]) -> socket.socket:
    failure = OSError("it has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(*host, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            opened(sock)
            sock.settimeout(timeout)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


def _secure(
    sock: socket.socket,
    host: tuple[str, int],
    credentials: Credentials,
    buffer: str,
    opened: Callable[[socket.socket], None],
) -> ssl.SSLSocket:
    try:
        secured = credentials.client_context().wrap_socket(
            sock, server_hostname=host[0], do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
    except OSError as error:
        raise _refusal(host, error) from error
    try:
        opened(secured)
        secured.do_handshake()
        _check_identity(secured, host, credentials, buffer)
    except OSError as error:
        secured.close()
        raise _refusal(host, error) from error
    except BaseException:
        secured.close()
        raise
    return secured


def _check_identity(secured: ssl.SSLSocket, host: tuple[str, int], credentials: Credentials, buffer: str) -> None:
    identity = credentials.peer_identity(secured)
    if identity.path != f"cache/{buffer}":
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID, f"{_name(host)} is {identity} and not the cache of buffers/{buffer}"
        )


def _greet(connection: Connection, host: tuple[str, int], credentials: Credentials | None, protocol: int) -> None:
    try:
        connection.send_greeting(protocol)
        answer = connection.receive_greeting()
    except (PeerClosedError, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError) as error:
        who = (
            f"{credentials.identity} may not {_ROLES[protocol]} there" if credentials else "it does not want this peer"
        )
        raise BeamwireError(
            Reason.ROLE_NOT_ALLOWED if credentials else Reason.CACHE_FAILED,
            f"{_name(host)} closed the connection instead of greeting: {who}",
        ) from error
    except OSError as error:
        raise _refusal(host, error) from error
    except ValueError as error:
        raise BeamwireError(Reason.CACHE_FAILED, f"{_name(host)} is no cache: {error}") from error
    if {protocol, answer} != {PUSH, PULL}:
        raise BeamwireError(Reason.CACHE_FAILED, f"{_name(host)} answered with protocol {answer:#x}")


def _refusal(host: tuple[str, int], error: OSError) -> BeamwireError:
    """What a failed handshake means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        expired = "expired" in error.verify_message
        story = f"the certificate of {_name(host)} is not valid: {error.verify_message}"
        return BeamwireError(Reason.CERTIFICATE_EXPIRED if expired else Reason.CERTIFICATE_INVALID, story)
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
        reason = Reason.CERTIFICATE_EXPIRED if "EXPIRED" in error.reason else Reason.CERTIFICATE_INVALID
        alert = error.reason.partition("ALERT_")[2].replace("_", " ").lower()
        return BeamwireError(reason, f"{_name(host)} refused our certificate: {alert}")
    return BeamwireError(Reason.CACHE_FAILED, f"{_name(host)} failed during the handshake: {error}")
