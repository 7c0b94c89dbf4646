"""A throwaway facility: an authority in memory, and members with real credentials on disk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.ids import SpiffeId, utcnow

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class Facility:
    """A trust domain whose authority lives as long as the test.

    Two facilities with the same trust domain have different keys: a member of one is an impostor in the other.
    """

    def __init__(self, directory: Path, trust_domain: str = "facility.test") -> None:
        self.directory = directory
        self.trust_domain = trust_domain
        self.authority = Authority.create(trust_domain)
        self._numbers = itertools.count(1)

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle of the facility."""
        return self.authority.roots_pem

    def id(self, path: str) -> SpiffeId:
        """The SPIFFE id of a member, of `user/alice` say."""
        return SpiffeId(self.trust_domain, path)

    def member(
        self, path: str, server_names: Sequence[str] = LOCAL_NAMES, lifetime: timedelta = timedelta(hours=1)
    ) -> Credentials:
        """Fresh credentials of a member, in a directory of their own."""
        return self._issue(self.authority, path, server_names, lifetime)

    def expired(self, path: str, server_names: Sequence[str] = LOCAL_NAMES) -> Credentials:
        """Credentials that ended an hour ago."""
        return self.ending(path, -timedelta(hours=1), server_names)

    def ending(self, path: str, left: timedelta, server_names: Sequence[str] = LOCAL_NAMES) -> Credentials:
        """Credentials for an hour, of which so much is left."""
        begin = utcnow() + left - timedelta(hours=1)
        return self._issue(self._at(begin), path, server_names, timedelta(hours=1))

    def renew(self, credentials: Credentials, lifetime: timedelta = timedelta(hours=1)) -> None:
        """Replace a member's files by a new key and certificate, as renewal does."""
        key_pem, csr_pem = new_key_and_csr()
        issued = self.authority.issue(csr_pem, credentials.identity, LOCAL_NAMES, lifetime)
        Credentials.save(credentials.directory, key_pem, issued.chain_pem, self.roots_pem)

    def foreign(self, path: str, server_names: Sequence[str] = LOCAL_NAMES) -> Credentials:
        """Credentials with our trust domain on them, from an authority that is not ours; they trust our roots."""
        return self._issue(Authority.create(self.trust_domain), path, server_names, timedelta(hours=1))

    def _at(self, time: datetime) -> Authority:
        return self.authority.with_clock(lambda: time)

    def _issue(self, authority: Authority, path: str, server_names: Sequence[str], lifetime: timedelta) -> Credentials:
        key_pem, csr_pem = new_key_and_csr(path)
        issued = authority.issue(csr_pem, self.id(path), server_names, lifetime)
        directory = self.directory / f"{path.replace('/', '-')}-{next(self._numbers)}"
        return Credentials.save(directory, key_pem, issued.chain_pem, self.roots_pem)
