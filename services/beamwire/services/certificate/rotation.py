"""The rotation of the authority, and what is published of it: roots, revocations, always as the disk and ledger say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives import hashes, serialization

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.generations import MACHINE, Generations, Phase
from beamwire.mesh.identity.ids import Clock, SpiffeId, utcnow
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.services.certificate.audit import Action, Audit
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.ledger import Ledger
from beamwire.services.certificate.model import CertificateRecord

# Other people's programs refuse a revocation list after some days.
RESIGN_AFTER: Final = timedelta(days=1)
_NAMED: Final = 5

_ACTIONS: Final = {
    (Phase.STABLE, Phase.ANNOUNCED): Action.AUTHORITY_ANNOUNCED,
    (Phase.ANNOUNCED, Phase.ACTIVATED): Action.AUTHORITY_ACTIVATED,
    (Phase.ANNOUNCED, Phase.STABLE): Action.AUTHORITY_WITHDRAWN,
    (Phase.ACTIVATED, Phase.STABLE): Action.AUTHORITY_FINISHED,
}


@dataclass(frozen=True, slots=True)
class Status:
    """The authority as it is.

    `outstanding` counts the good certificates that another generation signed and whose holders have no newer ones.
    """

    phase: Phase
    generation: int
    root_fingerprints: Sequence[str]
    expire_time: datetime
    outstanding: int


class Rotation:
    """Takes the steps of a rotation, and publishes what is to be believed.

    Args:
        generations: the authorities.
        ledger: what was issued.
        board: where roots and revocations are published.
        audit: where steps are written down.
        clock: the present time.
    """

    def __init__(
        self,
        generations: Generations,
        ledger: Ledger,
        board: TrustBoard,
        audit: Audit,
        *,
        clock: Clock = utcnow,
    ) -> None:
        self._generations = generations
        self._ledger = ledger
        self._board = board
        self._audit = audit
        self._clock = clock
        self._lock = asyncio.Lock()
        self._publishing = asyncio.Lock()
        self.renew: Callable[[], Awaitable[None]] | None = None
        """Called when another authority begins to sign: renews the facility's own members."""

    @property
    def authority(self) -> Authority:
        """The authority that signs now."""
        return self._generations.authority

    async def settle(self) -> None:
        """Bring to an end what a crash has interrupted: revocations, the end of a generation, their publication."""
        self._generations.tidy()
        for member in await self._ledger.suspended():
            await self._ledger.end(await self._ledger.good(member.owner), member.reason)
        await self._end_untrusted()
        await self._ledger.sweep()
        await self.publish()

    async def move(self, phase: Phase, *, force: bool, caller: SpiffeId) -> None:
        """Take the step to a phase.

        Raises:
            BeamwireError: ILLEGAL_STATE if it may not follow, or if certificates are good that it would end and it is
                not forced.
        """
        async with self._lock:
            before = self._generations.state
            MACHINE.check(before.phase, phase, story=f"generation {before.generation} signs")
            action = _ACTIONS[before.phase, phase]
            if action is Action.AUTHORITY_FINISHED and not force:
                self._check_none_left(await self._outstanding())
            await asyncio.to_thread(self._generations.move, phase)
            await self._end_untrusted()
            await self.publish()
            if action is Action.AUTHORITY_ACTIVATED and self.renew is not None:
                await self.renew()
            state = self._generations.state
            detail = f"generation {state.generation} signs; trusted: {', '.join(map(str, state.trusted))}"
            await self._audit.note(str(caller), action, self._generations.trust_domain, detail)

    async def status(self) -> Status:
        """The authority as it is."""
        state = self._generations.state
        return Status(
            phase=state.phase,
            generation=state.generation,
            root_fingerprints=[root.fingerprint(hashes.SHA256()).hex() for root in self._generations.roots],
            expire_time=self.authority.issuing.not_valid_after_utc,
            outstanding=len(await self._outstanding()),
        )

    async def publish(self) -> None:
        """Publish the roots and revocations, if they are other than those that are published."""
        async with self._publishing:
            revoked = [
                Revocation(record.serial, record.revoke_time or record.update_time)
                for record in await self._ledger.all_revoked()
            ]
            current = self._board.trust.own.revoked
            if self._is_outdated(current, revoked):
                current = await asyncio.to_thread(self.authority.sign_revocations, revoked, current.number + 1)
            await self._board.publish_own(roots_pem=self._generations.roots_pem, revoked=current)

    def _is_outdated(self, current: RevocationList, revoked: Sequence[Revocation]) -> bool:
        if not current.der:
            return bool(revoked)
        issuing = self.authority.issuing.public_bytes(serialization.Encoding.DER)
        return (
            current.issuer_der != issuing
            or current.time + RESIGN_AFTER < self._clock()
            # Those that have ended meanwhile may stay on it until it is signed the next time.
            or not current.revocations.keys() >= {entry.serial for entry in revoked}
        )

    async def _end_untrusted(self) -> None:
        """Mark the certificates of generations that are trusted no more."""
        trusted = self._generations.state.trusted
        ended = [record for record in await self._ledger.all_good() if record.generation not in trusted]
        await self._ledger.end(ended, "the authority that signed it is trusted no more")

    async def _outstanding(self) -> list[CertificateRecord]:
        signing = self._generations.state.generation
        good = await self._ledger.all_good()
        return [record for record in good if record.generation != signing and not record.renewed]

    def _check_none_left(self, left: Sequence[CertificateRecord]) -> None:
        if not left:
            return
        names = sorted({record.owner for record in left})
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        last = max(record.expire_time for record in left)
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            f"{len(left)} certificates of the generation before are still good, the last until "
            f"{last:%Y-%m-%d %H:%M} UTC: of {shown}. Wait for them, or finish with --force, which ends them",
            metadata={"outstanding": str(len(left))},
        )
