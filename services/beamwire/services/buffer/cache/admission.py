"""Who is let in to a cache, for how long, and how they are put out: names, tickets, certificates, revocation."""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final

from cryptography import x509

from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import ticket
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE, LinkRole, TicketClaims

_SERVICE: Final = "service/"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a peer proved about itself: its SPIFFE id, when that ends (seconds since 1970), its fingerprint.

    `may_speak_for_others` if its tickets need not be bound to its certificate: those of services, and of processes of
    this very user, for which the kernel vouches.
    """

    identity: str = ""
    expires: float = inf
    sha256: bytes = b""
    may_speak_for_others: bool = False


@dataclass(eq=False, slots=True)
class Pass:
    """The right of one connection to be there, until it is `void`."""

    identity: str
    certificate: Certificate
    role: LinkRole.ValueType
    expires: float
    cut: Callable[[], None]
    void: bool = False

    def withdraw(self) -> None:
        """End the connection: what came before and was not looked at yet is not taken either."""
        self.void = True
        self.cut()


def read_certificate(secured: ssl.SSLSocket, credentials: Credentials) -> Certificate:
    """What the peer of a TLS connection proved; BeamwireError CERTIFICATE_INVALID or _EXPIRED if it did not."""
    identity = credentials.peer_identity(secured)
    der = secured.getpeercert(binary_form=True)
    assert der is not None
    ends = x509.load_der_x509_certificate(der).not_valid_after_utc.timestamp()
    is_service = identity.trust_domain == credentials.identity.trust_domain and identity.path.startswith(_SERVICE)
    return Certificate(str(identity), ends, hashlib.sha256(der).digest(), is_service)


class Admission:
    """Decides about peers, and remembers those that are there. Safe to share between threads."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._key = bytes.fromhex(config.ticket_key)
        self._lock = threading.Lock()
        self._revoked = set(config.revoked)
        self._passes: set[Pass] = set()

    def admit(
        self, certificate: Certificate, role: LinkRole.ValueType, text: str | None, cut: Callable[[], None]
    ) -> Pass:
        """Let a peer in; RefusedError says why not. `text` is its ticket, None for those who cannot show one.

        A service of this facility, or a process of this user, may come for somebody else: its ticket says for whom.
        """
        identity, expires = certificate.identity, certificate.expires
        if text is not None and self._key and (identity or certificate.may_speak_for_others):
            claims = self._check(certificate, role, text)
            identity, expires = claims.identity, min(expires, claims.expire_time.ToNanoseconds() / 1e9)
        granted = Pass(identity, certificate, role, expires, cut)
        with self._lock:
            self._check_name(identity, role)
            self._passes.add(granted)
        return granted

    def renew(self, granted: Pass, text: str) -> None:
        """Take a newer ticket; RefusedError if it is not good."""
        if self._key and granted.identity:
            claims = self._check(granted.certificate, granted.role, text)
            if claims.identity != granted.identity:
                raise RefusedError(f"the new ticket is for {claims.identity}", Reason.TICKET_INVALID)
            granted.expires = min(granted.certificate.expires, claims.expire_time.ToNanoseconds() / 1e9)

    def release(self, granted: Pass) -> None:
        """A peer is gone."""
        with self._lock:
            self._passes.discard(granted)

    def revoke(self, identity: str) -> None:
        """Let somebody in no more, and put out who is there."""
        with self._lock:
            self._revoked.add(identity)
            for granted in self._passes:
                if granted.identity == identity or granted.certificate.identity == identity:
                    granted.withdraw()

    def reap(self) -> None:
        """Put out those whose certificate or ticket has ended."""
        now = time.time()
        with self._lock:
            for granted in self._passes:
                if granted.expires <= now:
                    granted.withdraw()

    def _check(self, certificate: Certificate, role: LinkRole.ValueType, text: str) -> TicketClaims:
        """What a ticket claims. One who may speak for others may also come with a ticket of its own."""
        check = partial(
            ticket.check,
            self._key,
            text,
            buffer=f"buffers/{self._config.buffer}",
            identity=certificate.identity,
            role=role,
            certificate_sha256=certificate.sha256,
            now=time.time(),
        )
        try:
            if certificate.may_speak_for_others and certificate.identity:
                with suppress(BeamwireError):
                    return check(via_service=False)
            return check(via_service=certificate.may_speak_for_others)
        except BeamwireError as error:
            raise RefusedError(error.message, error.reason) from error

    def _check_name(self, identity: str, role: LinkRole.ValueType) -> None:
        produces = role == LINK_ROLE_PRODUCE
        allowed = self._config.producers if produces else self._config.consumers
        if identity in self._revoked:
            raise RefusedError("its right to this buffer was revoked", Reason.ROLE_NOT_ALLOWED)
        if identity and identity not in allowed:
            raise RefusedError(f"it may not {'produce' if produces else 'consume'} here", Reason.ROLE_NOT_ALLOWED)
