"""Trust between facilities: introductions that are made and accepted, and the facilities that are followed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.identity.introduction import Introduction, check_fingerprint, fingerprint
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.names import parse_name
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.convert import from_duration, to_timestamp
from beamwire.services.certificate.audit import Action, Audit
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.following import Following

DEFAULT_TTL: Final = timedelta(days=1)
LONGEST_TTL: Final = timedelta(days=30)
# What a reader takes for one another, in the letters that a trust domain may have.
# Letters before pairs of them, which they may make: c1 is cl, and that is d.
_ALIKE: Final = (("0", "o"), ("1", "l"), ("i", "l"), ("5", "s"), ("_", "-"), ("rn", "m"), ("vv", "w"), ("cl", "d"))


class Federation:
    """Makes and accepts introductions, and follows the facilities that are believed.

    Args:
        board: the trust that is published.
        authority: the authority that signs now, whose key signs introductions.
        audit: where it is written down.
        credentials: of the service itself.
        clock: the present time.
    """

    def __init__(
        self,
        board: TrustBoard,
        authority: Callable[[], Authority],
        audit: Audit,
        credentials: Credentials,
        *,
        clock: Clock = utcnow,
    ) -> None:
        self._board = board
        self._authority = authority
        self._audit = audit
        self._credentials = credentials
        self._clock = clock
        self._following = Following(board)

    async def introduce(self, request: pb.IntroduceFacilityRequest) -> pb.IntroduceFacilityResponse:
        """Make the introduction of this facility; INVALID_FIELD for a time that is too long."""
        ttl = from_duration(request.ttl) if request.HasField("ttl") else DEFAULT_TTL
        if not timedelta() < ttl <= LONGEST_TTL:
            raise invalid_field("ttl", f"must be more than 0 and at most {LONGEST_TTL.days} days")
        own = (await self._board.look()).own
        introduction = Introduction(
            trust_domain=own.trust_domain,
            address=own.address,
            enroll_address=own.enroll_address,
            roots=_der(own.roots_pem),
            sequence=own.sequence,
            expire_time=(self._clock() + ttl).replace(microsecond=0),
        )
        document = self._authority().sign_introduction(introduction)
        await self._note(Action.INTRODUCED, own.trust_domain, f"until {introduction.expire_time:%Y-%m-%d %H:%M:%S} UTC")
        return pb.IntroduceFacilityResponse(
            document=document,
            trust_domain=own.trust_domain,
            fingerprint=fingerprint(document),
            expire_time=to_timestamp(introduction.expire_time),
        )

    async def accept(self, request: pb.AcceptIntroductionRequest) -> str:
        """Believe another facility from now on; its trust domain.

        It is asked for its revocations at once; whether it answered, its bundle says. INVALID_INTRODUCTION if the
        document is not good, or has another fingerprint than was given; RESOURCE_EXISTS if the facility is believed
        already, by other roots.
        """
        document = request.document.strip()
        introduction = Introduction.read(document, self._clock())
        if request.fingerprint:
            check_fingerprint(document, request.fingerprint)
        domain = introduction.trust_domain
        async with self._board.changing():
            await self._board.look()
            self._check_name(domain)
            await self._board.believe(self._believable(introduction))
        await self._note(Action.TRUST_ACCEPTED, domain, f"fingerprint {fingerprint(document)}")
        with suppress(BeamwireError):  # of which the board was told
            await self._following.read(domain)
        return domain

    async def refresh(self, trust_domain: str) -> None:
        """Ask another facility for its bundle now; the error if it cannot be had."""
        await self._board.look()
        self._other(trust_domain)
        await self._following.read(trust_domain)
        await self._note(Action.TRUST_REFRESHED, trust_domain)

    async def remove(self, trust_domain: str) -> None:
        """Believe another facility no more."""
        await self._board.look()
        self._other(trust_domain)
        async with self._board.changing():
            await self._board.look()
            await self._board.disbelieve(trust_domain)
        await self._note(Action.TRUST_REMOVED, trust_domain)

    async def follow(self) -> None:
        """Keep up with all facilities that are believed, until cancelled."""
        followed: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group, aclosing(self._board.watch()) as changes:
            async for change in changes:
                name = change.trust_domain
                if change.domain is None:
                    task = followed.pop(name, None)
                    if task is not None:
                        task.cancel()
                elif name in self._board.trust.others and (name not in followed or followed[name].done()):
                    followed[name] = group.create_task(self._following.follow(name), name=f"following {name}")

    def _believable(self, introduction: Introduction) -> DomainTrust:
        """What an introduction makes believed: of a facility that is believed already by its roots, the addresses."""
        known = self._board.trust.others.get(introduction.trust_domain)
        address, enroll_address = introduction.address, introduction.enroll_address
        if known is None:
            # One less than it says, so that its bundle, with the revocations, is newer than this.
            sequence = max(introduction.sequence - 1, 0)
            return DomainTrust(
                introduction.trust_domain,
                introduction.roots_pem,
                sequence,
                address=address,
                enroll_address=enroll_address,
            )
        if set(_der(known.roots_pem)) != set(introduction.roots):
            raise BeamwireError(
                Reason.RESOURCE_EXISTS,
                f"{known.trust_domain} is believed already, by other roots. If its authority was rotated, `beamwire "
                f"trust refresh {known.trust_domain}` follows that; if it was made anew, `beamwire trust remove "
                f"{known.trust_domain}` first",
            )
        if introduction.sequence < known.sequence:
            return known
        return replace(known, address=address, enroll_address=enroll_address)

    def _check_name(self, trust_domain: str) -> None:
        own = self._board.trust.own.trust_domain
        if trust_domain == own:
            raise BeamwireError(
                Reason.INVALID_INTRODUCTION, f"that is the introduction of this facility, {own}, itself"
            )
        for known in self._board.trust:
            if known != trust_domain and skeleton(known) == skeleton(trust_domain):
                raise BeamwireError(
                    Reason.INVALID_INTRODUCTION,
                    f"{trust_domain} can be taken for {known}, which is known here; a facility must have a name that "
                    "people can tell from others",
                )

    def _other(self, trust_domain: str) -> None:
        """Raise unless a domain is that of another facility that is believed."""
        parse_name("trustBundles", f"trustBundles/{trust_domain}")
        if trust_domain == self._board.trust.own.trust_domain:
            raise invalid_field("name", f"{trust_domain} is this facility itself")
        if trust_domain not in self._board.trust.others:
            known = ", ".join(self._board.trust.others) or "no other facility"
            raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{trust_domain} is not believed here; {known} is")

    async def _note(self, action: Action, subject: str, detail: str = "") -> None:
        await self._audit.note(str(current_caller()), action, subject, detail)


def skeleton(trust_domain: str) -> str:
    """What a name looks like: names that a reader takes for one another have the same."""
    for seen, taken_for in _ALIKE:
        trust_domain = trust_domain.replace(seen, taken_for)
    return trust_domain


def _der(roots_pem: bytes) -> tuple[bytes, ...]:
    roots = x509.load_pem_x509_certificates(roots_pem)
    return tuple(root.public_bytes(serialization.Encoding.DER) for root in roots)
