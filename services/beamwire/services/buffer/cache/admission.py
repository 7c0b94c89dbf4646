"""Who is let in to a cache, for how long, and how they are put out: names, tickets, certificates, revocation."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.tls import peer_chain
from beamwire.mesh.stream import ticket
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE, LinkRole, TicketClaims

_SERVICE: Final = "service/"
# So long a peer that is put out may be told why, in seconds; then its connection is cut.
_PARTING: Final = 0.3


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a peer proved about itself: its SPIFFE id, when that ends (seconds since 1970), its fingerprint, its chain.

    `may_speak_for_others` if its tickets need not be bound to its certificate: those of services, and of processes of
    this very user, for which the kernel vouches.
    """

    identity: str = ""
    expires: float = inf
    sha256: bytes = b""
    may_speak_for_others: bool = False
    chain: tuple[x509.Certificate, ...] = ()


@dataclass(eq=False, slots=True)
class Pass:
    """The right of one connection to be there, until it is `void`.

    With `delegated_by` it is the right of that member, whose delegation token `identity` holds. `wake` makes the thread
    that serves the connection look whether it is void; without it, `cut` does.
    """

    identity: str
    certificate: Certificate
    role: LinkRole.ValueType
    expires: float
    cut: Callable[[], None]
    delegated_by: str = ""
    delegation_ids: frozenset[str] = frozenset()
    wake: Callable[[], None] | None = None
    void: bool = False
    why: RefusedError | None = None
    cut_time: float = inf

    def withdraw(self, why: RefusedError) -> None:
        """End the connection: what came before and was not looked at yet is not taken either."""
        if self.void:
            return
        self.why, self.void = why, True
        if self.wake is None:
            self.cut()
        else:
            self.cut_time = time.monotonic() + _PARTING
            self.wake()

    def check(self) -> None:
        """Raise the RefusedError for which the connection ends, if it does."""
        if self.why is not None:
            raise self.why


def read_certificate(secured: ssl.SSLSocket, credentials: Credentials) -> Certificate:
    """What the peer of a TLS connection proved; BeamwireError CERTIFICATE_INVALID or _EXPIRED if it did not."""
    leaf, *others = chain = peer_chain(secured)
    identity = credentials.verifier.verify(leaf, others)
    ends = leaf.not_valid_after_utc.timestamp()
    is_service = identity.trust_domain == credentials.identity.trust_domain and identity.path.startswith(_SERVICE)
    return Certificate(str(identity), ends, leaf.fingerprint(hashes.SHA256()), is_service, tuple(chain))


class Admission:
    """Decides about peers, and remembers those that are there. Safe to share between threads.

    `credentials` are those of the cache, which say whose certificates are believed; without them there is no TLS.
    """

    def __init__(self, config: CacheConfig, credentials: Credentials | None = None) -> None:
        self._config = config
        self._credentials = credentials
        self._verifier = credentials.verifier if credentials is not None else None
        self._key = bytes.fromhex(config.ticket_key)
        self._lock = threading.Lock()
        self._revoked = set(config.revoked)
        self._consumers = config.consumers.union(*(group.consumers for group in config.added))
        self._passes: set[Pass] = set()

    def admit(
        self,
        certificate: Certificate,
        role: LinkRole.ValueType,
        text: str | None,
        cut: Callable[[], None],
        wake: Callable[[], None] | None = None,
    ) -> Pass:
        """Let a peer in; RefusedError says why not. `text` is its ticket, None for those who cannot show one.

        A service of this facility, or a process of this user, may come for somebody else: its ticket says for whom.
        """
        granted = Pass(certificate.identity, certificate, role, certificate.expires, cut, wake=wake)
        if text is not None and self._key and (certificate.identity or certificate.may_speak_for_others):
            claims = self._check(certificate, role, text)
            granted.identity, granted.delegated_by = claims.identity, claims.delegated_by
            granted.delegation_ids = frozenset(claims.delegation_ids)
            granted.expires = min(certificate.expires, claims.expire_time.ToNanoseconds() / 1e9)
        with self._lock:
            self._check_name(granted)
            # The trust may have changed since the handshake.
            self._verify(certificate)
            self._passes.add(granted)
        return granted

    def renew(self, granted: Pass, text: str) -> None:
        """Take a newer ticket; RefusedError if it is not good."""
        if self._key and granted.identity:
            claims = self._check(granted.certificate, granted.role, text)
            if (claims.identity, claims.delegated_by) != (granted.identity, granted.delegated_by):
                raise RefusedError(f"the new ticket is for {claims.identity}", Reason.TICKET_INVALID)
            # The token that a holder comes with now counts, and no more the one it came with before.
            granted.delegation_ids = frozenset(claims.delegation_ids)
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
                if identity in (granted.identity, granted.certificate.identity, granted.delegated_by):
                    granted.withdraw(_revoked())

    def admit_consumers(self, identities: Collection[str]) -> None:
        """Let these consume too."""
        with self._lock:
            self._consumers = self._consumers.union(identities)

    def reap(self) -> None:
        """Put out those whose certificate or ticket has ended or is believed no more, or whose token was revoked."""
        if self._credentials is not None:
            self._credentials.refresh()
        now, moment = time.time(), time.monotonic()
        revoked_tokens = self._revoked_tokens()
        with self._lock:
            self._judge_again()
            for granted in self._passes:
                if granted.expires <= now:
                    granted.withdraw(_expired(granted, now))
                if not revoked_tokens.isdisjoint(granted.delegation_ids):
                    granted.withdraw(_token_revoked())
                if granted.cut_time <= moment:
                    granted.cut()

    def _judge_again(self) -> None:
        """Put out those whose certificates are believed no more, if the trust has changed."""
        if self._credentials is None or self._credentials.verifier is self._verifier:
            return
        self._verifier = self._credentials.verifier
        for granted in self._passes:
            try:
                self._verify(granted.certificate)
            except RefusedError as why:
                granted.withdraw(why)

    def _verify(self, certificate: Certificate) -> None:
        if self._verifier is None or not certificate.chain:
            return
        try:
            self._verifier.verify(certificate.chain[0], certificate.chain[1:])
        except BeamwireError as error:
            raise RefusedError(error.message, error.reason) from error

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

    def _revoked_tokens(self) -> frozenset[str]:
        return self._credentials.trust.own.revoked_tokens if self._credentials is not None else frozenset()

    def _check_name(self, granted: Pass) -> None:
        produces = granted.role == LINK_ROLE_PRODUCE
        allowed = self._config.producers if produces else self._consumers
        if not self._revoked.isdisjoint((granted.identity, granted.delegated_by)):
            raise _revoked()
        if not self._revoked_tokens().isdisjoint(granted.delegation_ids):
            raise _token_revoked()
        whose = granted.delegated_by or granted.identity
        if whose and whose not in allowed:
            raise RefusedError(f"it may not {'produce' if produces else 'consume'} here", Reason.ROLE_NOT_ALLOWED)


def _revoked() -> RefusedError:
    return RefusedError("its right to this buffer was revoked", Reason.ROLE_NOT_ALLOWED)


def _token_revoked() -> RefusedError:
    return RefusedError("its delegation token was revoked", Reason.TOKEN_REFUSED)


def _expired(granted: Pass, now: float) -> RefusedError:
    if granted.certificate.expires <= now:
        return RefusedError("the certificate that the connection began with has ended", Reason.CERTIFICATE_EXPIRED)
    return RefusedError("its ticket has ended", Reason.TICKET_EXPIRED)
