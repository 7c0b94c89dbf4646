"""The trust that a facility publishes: its own bundle and those of the facilities it believes, told to whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.identity.roots import same_name
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.store import Store
from beamwire.services.certificate.model import BELIEVED, TrustRecord, bundle_name

_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """What a watcher is told: a domain as it is believed now, None if it is no more; or that this was everything."""

    trust_domain: str
    domain: DomainTrust | None = None
    synchronized: bool = False


SYNCHRONIZED: Final = Change("", synchronized=True)


class TrustBoard:
    """Holds the trust of a facility, durably, so that a restart goes on with the same sequences.

    Make it with `open`. One board per database.
    """

    def __init__(self, store: Store[TrustRecord], trust: Trust, records: dict[str, TrustRecord], clock: Clock) -> None:
        self._store = store
        self._trust = trust
        self._records = records
        self._clock = clock
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()

    @classmethod
    async def open(cls, store: Store[TrustRecord], own: DomainTrust, *, clock: Clock = utcnow) -> TrustBoard:
        """The board as it was kept. `own` is what is now so of the facility itself, apart from its revocations.

        If that differs from what was published last (roots, addresses), it is published.
        """
        records = {record.owner: record for record in await store.list(limit=_PAGE)}
        kept = {name: DomainTrust.from_json(record.document) for name, record in records.items()}
        before = kept.pop(own.trust_domain, None)
        board = cls(store, Trust(before or replace(own, sequence=0), kept), records, clock)
        if before is None:
            await board._write(replace(own, sequence=board._next_sequence()))
        else:
            await board.publish_own(roots_pem=own.roots_pem, address=own.address, enroll_address=own.enroll_address)
        return board

    @property
    def trust(self) -> Trust:
        """Whom the facility believes now."""
        return self._trust

    @property
    def records(self) -> Mapping[str, TrustRecord]:
        """What is kept of each domain, by its name: since when it is believed, and how fresh that is."""
        return self._records

    async def publish_own(self, **changes: Any) -> DomainTrust:
        """Change what is believed of the facility itself, fields of DomainTrust, and count that in its sequence.

        Nothing is written or told if nothing changes.
        """
        async with self._lock:
            own = replace(self._trust.own, **changes)
            if own == self._trust.own:
                return own
            own = replace(own, sequence=self._next_sequence())
            await self._write(own)
            return own

    def _next_sequence(self) -> int:
        # A facility that was restored from a backup must not count again what others have seen: they would not heed it.
        return max(self._trust.own.sequence + 1, int(self._clock().timestamp()))

    async def believe(self, domain: DomainTrust) -> bool:
        """Believe this of another facility from now on; whether it is other than before.

        Raises ILLEGAL_STATE for what is older than what is believed, if the domain is the own one, and if a root has a
        name that the authorities of another facility have.
        """
        if domain.trust_domain == self._trust.own.trust_domain:
            raise BeamwireError(Reason.ILLEGAL_STATE, f"{domain.trust_domain} is this facility itself")
        async with self._lock:
            known = self._trust.others.get(domain.trust_domain)
            if known is not None and domain.sequence < known.sequence:
                raise BeamwireError(
                    Reason.ILLEGAL_STATE,
                    f"the trust bundle of {domain.trust_domain} went back from {known.sequence} to {domain.sequence}; "
                    "if the facility was restored from a backup, remove it and accept it anew",
                )
            if known is None or known.roots_pem != domain.roots_pem:
                self._check_names(domain)
            await self._write(domain)
            return domain != known

    def _check_names(self, domain: DomainTrust) -> None:
        for other in self._trust.values():
            if other.trust_domain == domain.trust_domain:
                continue
            name = same_name(domain, other) or same_name(other, domain)
            if name:
                raise BeamwireError(
                    Reason.ILLEGAL_STATE,
                    f"{domain.trust_domain} and {other.trust_domain} cannot both be believed: an authority of each is "
                    f"called {name}, and TLS knows authorities by their names; one of them needs another name",
                )

    async def refreshed(self, trust_domain: str, error: str = "") -> None:
        """Note that a domain was asked for its bundle now, and nothing was new; or why it could not be asked."""
        async with self._lock:
            record = self._records.get(trust_domain)
            if record is None:
                return
            changes: dict[str, object] = {"refresh_error": error}
            if not error:
                changes["refresh_time"] = self._clock()
            # Not worth a write to the disk: after a restart it is asked again at once.
            self._records[trust_domain] = record.model_copy(update=changes)

    async def disbelieve(self, trust_domain: str) -> bool:
        """Believe a facility no more; False if it was not believed. ILLEGAL_STATE for the own one."""
        if trust_domain == self._trust.own.trust_domain:
            raise BeamwireError(Reason.ILLEGAL_STATE, f"{trust_domain} is this facility itself")
        async with self._lock:
            if trust_domain not in self._trust.others:
                return False
            await self._store.delete(bundle_name(trust_domain))
            del self._records[trust_domain]
            self._show(self._trust.without(trust_domain))
            return True

    async def watch(self) -> AsyncGenerator[Change, None]:
        """Every domain at once, then SYNCHRONIZED, then each again after every change; for ever.

        Who is slow is told the newest of each domain, and not what was between.
        """
        told: dict[str, DomainTrust] = {}
        changed = self._changed
        synchronized = False
        while True:
            changed, trust = self._changed, self._trust
            for name in told.keys() - trust.keys():
                del told[name]
                yield Change(name)
            for name, domain in trust.items():
                if told.get(name) is not domain:
                    told[name] = domain
                    yield Change(name, domain)
            if not synchronized:
                synchronized = True
                yield SYNCHRONIZED
            await changed.wait()

    async def _write(self, domain: DomainTrust) -> None:
        """Keep a domain, then show it: nobody is told what a crash would make undone."""
        now = self._clock()
        name = bundle_name(domain.trust_domain)
        document = domain.to_json()
        if await self._store.get(name) is None:
            record = await self._store.insert(
                TrustRecord(
                    name=name,
                    owner=domain.trust_domain,
                    state=BELIEVED,
                    create_time=now,
                    update_time=now,
                    document=document,
                    refresh_time=now,
                )
            )
        else:
            changes = {"document": document, "refresh_time": now, "refresh_error": ""}
            record = await self._store.change(name, lambda _: changes)
        self._records[domain.trust_domain] = record
        if self._trust.get(domain.trust_domain) != domain:
            self._show(self._trust.believe(domain))

    def _show(self, trust: Trust) -> None:
        self._trust = trust
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
