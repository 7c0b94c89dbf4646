"""The trust that a facility publishes: its own bundle and those of the facilities it believes, told to whoever asks.

Every replica of the service has a board, and all show what is in the database. What one of them changes the others
hear of at once; who asks is answered by what is there now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from beamwire.mesh.database import patience
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.identity.roots import same_name
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.store import Store
from beamwire.services.certificate.model import BELIEVED, TrustRecord, bundle_name

_PAGE: Final = 1000
# Seconds between two looks at the database when nothing is heard: of a change whose replica died before it said so.
LOOK_PERIOD: Final = 30.0
# Seconds for which who asks waits for a database that is away, before it is told what was known last.
LOOK_PATIENCE: Final = 0.5

Remake = Callable[[DomainTrust], Awaitable[DomainTrust]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """What a watcher is told: a domain as it is believed now, None if it is no more; or that this was everything."""

    trust_domain: str
    domain: DomainTrust | None = None
    synchronized: bool = False


SYNCHRONIZED: Final = Change("", synchronized=True)


class _Ear:
    """Hears that some replica has changed what is believed."""

    kind = TrustRecord.__name__

    def __init__(self) -> None:
        self.heard = asyncio.Event()

    def noticed(self, name: str) -> None:
        """Something has changed; all of it is read, and so it does not matter what."""
        del name
        self.heard.set()

    def catch_up(self) -> None:
        """Something may have changed."""
        self.heard.set()

    async def flush(self) -> None:
        """Everything is written down at once."""


class TrustBoard:
    """Holds the trust of a facility, durably, so that a restart goes on with the same sequences.

    Make it with `open`. One board per replica.
    """

    def __init__(self, store: Store[TrustRecord], trust: Trust, clock: Clock) -> None:
        self._store = store
        self._trust = trust
        self._records: dict[str, TrustRecord] = {}
        self._clock = clock
        # What is shown and what is kept of it change together.
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._asked = self._answered = 0
        self._ear = _Ear()
        store.db.follow(self._ear)

    @classmethod
    async def open(cls, store: Store[TrustRecord], own: DomainTrust, *, clock: Clock = utcnow) -> TrustBoard:
        """The board as it was kept. `own` is what is now so of the facility itself, apart from its revocations.

        If that differs from what was published last (roots, addresses), it is published.
        """
        board = cls(store, Trust(replace(own, sequence=0)), clock)
        await board._read()
        await board.publish_own(roots_pem=own.roots_pem, address=own.address, enroll_address=own.enroll_address)
        return board

    @property
    def trust(self) -> Trust:
        """Whom the facility believes, as far as this replica has heard."""
        return self._trust

    @property
    def records(self) -> Mapping[str, TrustRecord]:
        """What is kept of each domain, by its name: since when it is believed, and how fresh that is."""
        return self._records

    def changing(self) -> AbstractAsyncContextManager[None]:
        """A block in which nobody else, at any replica, begins or ends to believe another facility.

        Look before deciding there: what is shown is what is kept only then.
        """
        return self._store.db.exclusive("trust")

    async def look(self) -> Trust:
        """Whom the facility believes now, whichever replica changed that.

        While the database is away it is what was known last: nobody has changed it through there either.
        """
        if not self._store.db.shared:
            return self._trust
        self._asked += 1
        asked, before = self._asked, patience.set(LOOK_PATIENCE)
        try:
            async with self._lock:
                # Of many who ask at once the first one waits, and one more reads for all others.
                if self._answered < asked:
                    upto = self._asked
                    await self._read()
                    self._answered = upto
        except BeamwireError as error:
            _log.warning("whom to believe is told as it was known last: %s", error)
        finally:
            patience.reset(before)
        return self._trust

    async def follow(self) -> None:
        """Show what other replicas change, until cancelled; nothing where there are none."""
        while self._store.db.shared:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_PERIOD):
                    await self._ear.heard.wait()
            self._ear.heard.clear()
            await self.look()

    async def publish_own(self, **changes: Any) -> DomainTrust:
        """Change what is believed of the facility itself, fields of DomainTrust, and count that in its sequence.

        Nothing is written or told if nothing changes.
        """

        async def changed(own: DomainTrust) -> DomainTrust:
            return replace(own, **changes)

        return await self.remake_own(changed)

    async def remake_own(self, remake: Remake) -> DomainTrust:
        """Publish what `remake` makes of what is believed of the facility itself, which is asked again if that changes.

        So what it reads, it must read when it is called: what is published then goes back behind nothing that another
        replica has published, and no number is given to two states.
        """
        async with self._lock:
            while True:
                own = await remake(self._trust.own)
                if own == self._trust.own and self._is_kept(own):
                    return own
                try:
                    await self._write(replace(own, sequence=self._next_sequence()))
                except BeamwireError as error:
                    if error.reason not in (Reason.ETAG_MISMATCH, Reason.RESOURCE_EXISTS):
                        raise
                    await self._read()
                else:
                    return self._trust.own

    def _next_sequence(self) -> int:
        # A facility that was restored from a backup must not count again what others have seen: they would not heed it.
        return max(self._trust.own.sequence + 1, int(self._clock().timestamp()))

    async def believe(self, domain: DomainTrust, *, known: bool = False) -> bool:
        """Believe this of another facility from now on; whether it is other than before.

        To be called in a `changing` block, unless it is `known` with these roots; ETAG_MISMATCH then if another replica
        was faster, RESOURCE_NOT_FOUND if it is believed no more. Raises ILLEGAL_STATE for what is older than what is
        believed, if the domain is the own one, and if a root has a name that the authorities of another facility have.
        """
        if domain.trust_domain == self._trust.own.trust_domain:
            raise BeamwireError(Reason.ILLEGAL_STATE, f"{domain.trust_domain} is this facility itself")
        async with self._lock:
            held = self._trust.others.get(domain.trust_domain)
            if held is None and known:
                raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{domain.trust_domain} is not believed here any more")
            if held is not None and domain.sequence < held.sequence:
                raise BeamwireError(
                    Reason.ILLEGAL_STATE,
                    f"the trust bundle of {domain.trust_domain} went back from {held.sequence} to {domain.sequence}; "
                    "if the facility was restored from a backup, remove it and accept it anew",
                )
            if held is None or held.roots_pem != domain.roots_pem:
                self._check_names(domain)
            await self._write(domain)
            return domain != held

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
            # Not worth a write to the disk: after a restart it is asked again at once, and each replica asks itself.
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
        # Who comes from another replica must not be told less than there.
        await self.look()
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

    def _is_kept(self, domain: DomainTrust) -> bool:
        return domain.trust_domain in self._records

    async def _write(self, domain: DomainTrust) -> None:
        """Keep a domain, then show it: nobody is told what a crash would make undone.

        ETAG_MISMATCH, RESOURCE_EXISTS or RESOURCE_NOT_FOUND if another replica was faster.
        """
        now = self._clock()
        kept = self._records.get(domain.trust_domain)
        news = {"document": domain.to_json(), "refresh_time": now, "refresh_error": ""}
        if kept is not None:
            record = await self._store.update(kept.model_copy(update=news))
        else:
            record = TrustRecord(
                name=bundle_name(domain.trust_domain),
                owner=domain.trust_domain,
                state=BELIEVED,
                create_time=now,
                update_time=now,
                **news,
            )
            record = await self._store.insert(record)
            await self._say(record.name)
        self._records[domain.trust_domain] = record
        if self._trust.get(domain.trust_domain) != domain:
            self._show(self._trust.believe(domain))

    async def _say(self, name: str) -> None:
        """Tell the other replicas of a new record; of changes the database tells them itself."""
        db = self._store.db
        if db.shared:
            await db.change(lambda connection: db.notify(connection, self._store.kind, [name]))

    async def _read(self) -> None:
        """Show what is kept."""
        found = {record.owner: record for record in await self._store.list(limit=_PAGE)}
        trust = self._trust
        for name, record in found.items():
            known = self._records.get(name)
            if known is not None and known.etag == record.etag:
                # With what this replica has seen of it since.
                found[name] = known
                continue
            domain = DomainTrust.from_json(record.document)
            if trust.get(name) != domain:
                trust = trust.believe(domain)
        for name in trust.others.keys() - found.keys():
            trust = trust.without(name)
        self._records = found
        if trust is not self._trust:
            self._show(trust)

    def _show(self, trust: Trust) -> None:
        self._trust = trust
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
