"""Delegation tokens: made for members who hand a part of their rights over, remembered, and ended early."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Self

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.biscuits import TokenKey, create, inspect
from beamwire.mesh.identity.ids import Clock, SpiffeId, utcnow
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.policy import PolicySource
from beamwire.mesh.rpc.access import check_owner, current_caller
from beamwire.mesh.rpc.convert import from_duration, to_timestamp
from beamwire.mesh.store import Record, Store
from beamwire.services.certificate.audit import Action, Audit
from beamwire.services.certificate.board import TrustBoard

DEFAULT_TTL: Final = timedelta(hours=1)
ACTIVE: Final = "ACTIVE"
REVOKED: Final = "REVOKED"
_REVOCATION_ID: Final = re.compile("[0-9a-f]{128}")
_PAGE: Final = 1000
# Of one owner, at one time.
MOST_TOKENS: Final = 250


class DelegationRecord(Record):
    """A token that was made, by the revocation id of its first block; the token itself is not kept.

    The owner is whose rights it hands over.
    """

    holder: str
    resource: str
    read_only: bool
    expire_time: datetime

    @property
    def revocation_id(self) -> str:
        """Of the first block: it ends the token and all that were narrowed from it."""
        return self.name.partition("/")[2]


class Delegations:
    """Makes the tokens of a facility and keeps those that were ended. Make it with `open`."""

    def __init__(
        self,
        key: TokenKey,
        store: Store[DelegationRecord],
        board: TrustBoard,
        policy: PolicySource,
        audit: Audit,
        clock: Clock,
    ) -> None:
        self._key = key
        self._store = store
        self._board = board
        self._policy = policy
        self._audit = audit
        self._clock = clock

    @classmethod
    async def open(
        cls,
        key: TokenKey,
        store: Store[DelegationRecord],
        board: TrustBoard,
        policy: PolicySource,
        audit: Audit,
        *,
        clock: Clock = utcnow,
    ) -> Self:
        """Publish the key, and the tokens that were ended before their time; forget those whose time is over."""
        delegations = cls(key, store, board, policy, audit, clock)
        await delegations._publish()
        return delegations

    async def create(self, request: pb.CreateDelegationTokenRequest, context: Any) -> pb.DelegationToken:
        """Make a token that hands over a part of the caller's rights."""
        caller = current_caller()
        assert caller.id is not None, "the access table lets no anonymous caller this far"
        expire = (self._clock() + self._ttl(request)).replace(microsecond=0)
        text = create(
            self._key,
            owner=caller.id,
            holder=self._holder(request.holder),
            resource=request.resource,
            read_only=request.read_only,
            expire=expire,
        )
        async with self._store.db.exclusive(f"tokens of {self._counted(caller.id)}"):
            await self._check_room(caller.id)
            record = await self._remember(text)
        mode = "to read" if record.read_only else "to read and change"
        detail = f"{record.resource or 'everything'} {mode} until {expire.isoformat()}, id {record.revocation_id[:16]}…"
        await self._audit.note(str(caller), Action.DELEGATION_CREATED, record.holder, detail)
        return pb.DelegationToken(
            token=text, revocation_ids=[record.revocation_id], expire_time=to_timestamp(record.expire_time)
        )

    async def revoke(self, request: pb.RevokeDelegationTokenRequest, context: Any) -> pb.RevokeDelegationTokenResponse:
        """End a token."""
        revocation_id = request.revocation_id
        if not _REVOCATION_ID.fullmatch(revocation_id):
            raise invalid_field("revocation_id", "must be 128 hexadecimal digits, as `beamwire token inspect` shows it")
        name = _name(revocation_id)
        record = await self._store.get(name)
        if record is None and current_caller().unlimited:
            record = await self._enter_unknown(revocation_id)
        check_owner(record.owner if record else None, "delegation token", f"{revocation_id[:16]}…")
        assert record is not None, "check_owner raises for what does not exist"
        await self._end([record])
        return pb.RevokeDelegationTokenResponse()

    async def end_all_of(self, identity: str) -> None:
        """End every token by which somebody's rights were handed over: of a member that was revoked as a whole."""
        await self._end([record for record in await self._all() if record.owner == identity])

    async def _end(self, records: Iterable[DelegationRecord]) -> None:
        ending = [record for record in records if record.state != REVOKED]
        for record in ending:
            await self._store.change(record.name, lambda _: {"state": REVOKED})
        if ending:
            await self._publish()
        for record in ending:
            await self._audit.note(
                str(current_caller()),
                Action.DELEGATION_REVOKED,
                record.holder,
                f"by the right of {record.owner}, id {record.revocation_id[:16]}…",
            )

    async def _publish(self) -> None:
        for record in await self._all():
            if record.expire_time <= self._clock():
                await self._store.delete(record.name)
        await self._board.remake_own(self._published)

    async def _published(self, own: DomainTrust) -> DomainTrust:
        """What is to be published in place of this; the tokens are read after it was."""
        now = self._clock()
        revoked = (r.revocation_id for r in await self._all() if r.state == REVOKED and r.expire_time > now)
        return replace(own, token_root=self._key.public, revoked_tokens=frozenset(revoked))

    async def _all(self) -> list[DelegationRecord]:
        found: list[DelegationRecord] = []
        page = await self._store.list(limit=_PAGE)
        while page:
            found += page
            page = await self._store.list(limit=_PAGE, after=page[-1].cursor) if len(page) == _PAGE else []
        return found

    async def _remember(self, text: str) -> DelegationRecord:
        said = inspect(text)
        now = self._clock()
        record = DelegationRecord(
            name=_name(said.ids[0]),
            owner=said.owner,
            state=ACTIVE,
            create_time=now,
            update_time=now,
            holder=said.holder,
            resource=said.resource,
            read_only=said.read_only,
            expire_time=said.expire,
        )
        return await self._store.insert(record)

    async def _enter_unknown(self, revocation_id: str) -> DelegationRecord:
        """Note an id that an operator names: of a token that somebody narrowed, say, which nobody told us of."""
        now = self._clock()
        record = DelegationRecord(
            name=_name(revocation_id),
            owner=str(current_caller()),
            state=ACTIVE,
            create_time=now,
            update_time=now,
            holder="unknown",
            resource="",
            read_only=False,
            expire_time=now + self._policy.current.longest_delegation,
        )
        # Somebody else may have named it in this moment.
        return await self._store.add(record, lambda kept: kept.name)

    async def _check_room(self, owner: SpiffeId) -> None:
        """LIMIT_REACHED if somebody has too many tokens, ended ones too: every member is told of those.

        The members of another facility count together.
        """
        own = self._is_own(owner)
        records = await self._store.list(owner=str(owner), limit=_PAGE) if own else await self._all()
        prefix, now = f"spiffe://{owner.trust_domain}/", self._clock()
        count = sum(record.owner.startswith(prefix) and record.expire_time > now for record in records)
        if count >= MOST_TOKENS:
            raise BeamwireError(
                Reason.LIMIT_REACHED,
                f"{self._counted(owner)} has {MOST_TOKENS} delegation tokens whose time is not over; "
                "wait for the first to end, and give the next ones less time",
                quota="delegation_tokens",
                retry_after=60.0,
            )

    def _is_own(self, owner: SpiffeId) -> bool:
        return owner.trust_domain == self._board.trust.own.trust_domain

    def _counted(self, owner: SpiffeId) -> str:
        """Whose tokens count together with somebody's."""
        return str(owner) if self._is_own(owner) else owner.trust_domain

    def _ttl(self, request: pb.CreateDelegationTokenRequest) -> timedelta:
        longest = self._policy.current.longest_delegation
        ttl = from_duration(request.ttl) if request.HasField("ttl") else min(DEFAULT_TTL, longest)
        if not timedelta(seconds=1) <= ttl <= longest:
            raise invalid_field(
                "ttl",
                f"must be at least 1 s and at most the {longest / timedelta(hours=1):g} h that the policy of the "
                "facility allows",
            )
        return ttl

    def _holder(self, text: str) -> SpiffeId:
        try:
            holder = SpiffeId.parse(text)
            _ = holder.role  # raises if nobody can be called that
        except BeamwireError as error:
            raise invalid_field("holder", error.message) from error
        if holder.trust_domain not in self._board.trust:
            raise invalid_field(
                "holder",
                f"{holder} is of the trust domain {holder.trust_domain}, which is not believed here; "
                f"believed: {', '.join(self._board.trust)}",
            )
        return holder


def _name(revocation_id: str) -> str:
    return f"delegationTokens/{revocation_id}"
