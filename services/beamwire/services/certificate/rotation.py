"""The rotation of the authority, and what is published of it: roots, revocations, always as the disk and ledger say.

A step is entered before it is taken, and taken by one replica at a time. Whichever of them dies in the middle, another
finds the step, looks on the disk how far it came, and brings it to its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives import hashes, serialization

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.generations import MACHINE, Generations, Phase
from beamwire.mesh.identity.ids import Clock, SpiffeId, utcnow
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.names import new_id
from beamwire.mesh.store import Store
from beamwire.services.certificate.audit import Action, Audit
from beamwire.services.certificate.authorities import Authorities
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.ledger import Ledger
from beamwire.services.certificate.model import BEGUN, DONE, CertificateRecord, StepRecord, step_name

# Other people's programs refuse a revocation list after some days.
RESIGN_AFTER: Final = timedelta(days=1)
# So long a call that is made again finds that its step was taken.
STEPS_KEPT: Final = timedelta(days=1)
_NAMED: Final = 5

_log = logging.getLogger(__name__)

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
        authorities: as they are on disk.
        ledger: what was issued.
        board: where roots and revocations are published.
        audit: where steps are written down.
        steps: those that were begun.
        clock: the present time.
    """

    def __init__(
        self,
        authorities: Authorities,
        ledger: Ledger,
        board: TrustBoard,
        audit: Audit,
        steps: Store[StepRecord],
        *,
        clock: Clock = utcnow,
    ) -> None:
        self._authorities = authorities
        self._ledger = ledger
        self._board = board
        self._audit = audit
        self._steps = steps
        self._clock = clock
        self.renew: Callable[[], Awaitable[None]] | None = None
        """Called when another authority begins to sign: renews the facility's own members."""

    @property
    def authority(self) -> Authority:
        """The authority that signs now."""
        return self._authorities.now.authority

    def _alone(self) -> AbstractAsyncContextManager[None]:
        """A block that one task among all replicas is in at a time: it changes the directory of the authorities."""
        return self._steps.db.exclusive("authority")

    async def open(self) -> None:
        """Bring to an end what was interrupted before this replica was there, and forget keys that are of no use."""
        async with self._alone():
            await self._end_steps()
            self._authorities.now.tidy()
        await self.settle()

    async def settle(self) -> None:
        """Bring to an end what a crash has interrupted: steps, revocations, their publication; forget old steps."""
        async with self._alone():
            await self._end_steps()
            await self._end_untrusted()
        await self._ledger.end_suspended()
        await self._ledger.sweep()
        await self._steps.prune({DONE}, STEPS_KEPT)
        await self.publish()

    async def take_over(self) -> None:
        """Go on with the steps that a replica has begun and not ended, unless it is still at it."""
        if await self._steps.unfinished({DONE}):
            async with self._alone():
                await self._end_steps()

    async def move(self, phase: Phase, *, force: bool, caller: SpiffeId, request_id: str = "") -> None:
        """Take the step to a phase; nothing if the same call has taken it before.

        Raises:
            BeamwireError: ILLEGAL_STATE if it may not follow, or if certificates are good that it would end and it is
                not forced.
        """
        name = step_name(new_id(f"{caller} {request_id}" if request_id else None))
        async with self._alone():
            await self._end_steps()
            if await self._steps.get(name) is not None:
                return
            before = self._authorities.now.state
            MACHINE.check(before.phase, phase, story=f"generation {before.generation} signs")
            action = _ACTIONS[before.phase, phase]
            if action is Action.AUTHORITY_FINISHED and not force:
                self._check_none_left(await self._outstanding())
            now = self._clock()
            step = StepRecord(
                name=name,
                owner=str(caller),
                state=BEGUN,
                create_time=now,
                update_time=now,
                phase=phase.value,
                before=before.to_json(),
                action=action,
            )
            await self._end_step(await self._steps.insert(step))

    async def _end_steps(self) -> None:
        for step in await self._steps.unfinished({DONE}):
            try:
                await self._end_step(step)
            except (BeamwireError, OSError):
                if await self._steps.get(step.name) is not None:
                    raise
                _log.exception("%s cannot be taken, and is given up", step.action)

    async def _end_step(self, step: StepRecord) -> None:
        """Take a step, unless it is taken already, and do what is to be done after it, all of which may be repeated."""
        generations, phase = self._authorities.now, Phase(step.phase)
        if generations.state.to_json() == step.before:
            await self._take(step, generations, phase)
        else:
            # Who died may not have come to it.
            await asyncio.to_thread(generations.tidy)
        await self._end_untrusted()
        await self.publish()
        action = Action(step.action)
        if action is Action.AUTHORITY_ACTIVATED and self.renew is not None:
            await self.renew()
        state = self._authorities.now.state
        detail = f"generation {state.generation} signs; trusted: {', '.join(map(str, state.trusted))}"
        await self._audit.note(step.owner, action, generations.trust_domain, detail, key=step.name)
        await self._steps.change(step.name, lambda _: {"state": DONE})

    async def _take(self, step: StepRecord, generations: Generations, phase: Phase) -> None:
        try:
            await asyncio.to_thread(generations.move, phase)
        except Exception:
            # It cannot be taken now. If it was taken all the same, it is to be brought to its end.
            if self._authorities.now.state.to_json() == step.before:
                await self._steps.delete(step.name)
            raise

    async def status(self) -> Status:
        """The authority as it is."""
        generations = self._authorities.now
        state = generations.state
        return Status(
            phase=state.phase,
            generation=state.generation,
            root_fingerprints=[root.fingerprint(hashes.SHA256()).hex() for root in generations.roots],
            expire_time=generations.authority.issuing.not_valid_after_utc,
            outstanding=len(await self._outstanding()),
        )

    async def publish(self) -> None:
        """Publish the roots and revocations, if they are other than those that are published."""
        await self._board.remake_own(self._published)

    async def _published(self, own: DomainTrust) -> DomainTrust:
        """What is to be published in place of this; the disk and the ledger are read after it was."""
        generations = self._authorities.now
        revoked = [
            Revocation(record.serial, record.revoke_time or record.update_time)
            for record in await self._ledger.all_revoked()
        ]
        current = own.revoked
        if self._is_outdated(current, revoked, generations.authority):
            sign = generations.authority.sign_revocations
            current = await asyncio.to_thread(sign, revoked, current.number + 1)
        return replace(own, roots_pem=generations.roots_pem, revoked=current)

    def _is_outdated(self, current: RevocationList, revoked: Sequence[Revocation], authority: Authority) -> bool:
        if not current.der:
            return bool(revoked)
        issuing = authority.issuing.public_bytes(serialization.Encoding.DER)
        return (
            current.issuer_der != issuing
            or current.time + RESIGN_AFTER < self._clock()
            # Those that have ended meanwhile may stay on it until it is signed the next time.
            or not current.revocations.keys() >= {entry.serial for entry in revoked}
        )

    async def _end_untrusted(self) -> None:
        """Mark the certificates of generations that are trusted no more."""
        trusted = self._authorities.now.state.trusted
        ended = [record for record in await self._ledger.all_good() if record.generation not in trusted]
        await self._ledger.end(ended, "the authority that signed it is trusted no more")

    async def _outstanding(self) -> list[CertificateRecord]:
        signing = self._authorities.now.state.generation
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
