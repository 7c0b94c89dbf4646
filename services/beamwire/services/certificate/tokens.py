"""Join tokens: minted once, good for one signing request at whichever replica it comes to, made void, forgotten."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.store import Store
from beamwire.services.certificate.model import UNUSED, USED, TokenRecord, certificate_name, token_name

MAX_TTL: Final = timedelta(days=1)
DEFAULT_TTL: Final = timedelta(minutes=10)
# So long a token is still known for what it was.
KEPT: Final = timedelta(days=1)
_MOST: Final = 100_000


class JoinTokens:
    """The tokens of a facility.

    Args:
        store: where they are, by the hashes of their secrets.
        clock: the present time.
    """

    def __init__(self, store: Store[TokenRecord], *, clock: Clock = utcnow) -> None:
        self._store = store
        self._clock = clock

    async def mint(
        self, owner: str, ttl: timedelta | None, server_names: Sequence[str], *, granted_by: str, grant: str
    ) -> tuple[str, TokenRecord]:
        """Make one for a member; its secret, and what is kept of it. INVALID_FIELD for a lifetime that cannot be."""
        ttl = DEFAULT_TTL if ttl is None else ttl
        if not timedelta() < ttl <= MAX_TTL:
            raise invalid_field("ttl", "must be more than 0 and at most one day")
        secret = secrets.token_urlsafe(24)
        now = self._clock()
        record = TokenRecord(
            name=token_name(secret),
            owner=owner,
            state=UNUSED,
            create_time=now,
            update_time=now,
            server_names=tuple(server_names),
            granted_by=granted_by,
            grant=grant,
            expire_time=now + ttl,
        )
        return secret, await self._store.insert(record)

    async def require(self, secret: str) -> TokenRecord:
        """What is kept of the token of a secret; INVALID_JOIN_TOKEN if there is none."""
        token = await self._store.get(token_name(secret))
        if token is None:
            raise BeamwireError(
                Reason.INVALID_JOIN_TOKEN, "this join token is unknown here; ask the operator for another"
            )
        return token

    def check(self, token: TokenRecord, csr_pem: bytes) -> None:
        """INVALID_JOIN_TOKEN unless it is good for a signing request: unused, or spent by this very one."""
        if token.state != UNUSED and token.csr_sha256 != _sha256(csr_pem):
            raise BeamwireError(
                Reason.INVALID_JOIN_TOKEN, "this join token was used before, or made void; ask for another"
            )
        if self._clock() >= token.expire_time:
            raise BeamwireError(
                Reason.INVALID_JOIN_TOKEN,
                f"this join token expired at {token.expire_time.isoformat()}; ask for another",
            )

    async def spend(self, token: TokenRecord, csr_pem: bytes, serial_hex: str) -> None:
        """Note for which signing request, and which certificate, it is spent."""
        spent = {"state": USED, "csr_sha256": _sha256(csr_pem), "certificate": certificate_name(serial_hex)}
        await self._store.update(token.model_copy(update=spent))

    async def void(self, identity: str) -> None:
        """Make void what would let a member in, and what it meant to let others in by."""
        for equals in ({"owner": identity}, {"granted_by": identity}):
            for token in await self._store.list(equals={"state": UNUSED, **equals}, limit=_MOST):
                await self._void(token)

    async def _void(self, token: TokenRecord) -> None:
        try:
            await self._store.change(token.name, lambda _: {"state": USED})
        except BeamwireError as error:
            # It is so old that another replica has forgotten it in this moment.
            if error.reason is not Reason.RESOURCE_NOT_FOUND:
                raise

    async def forget(self) -> None:
        """Forget those whose time was over long ago."""
        long_ago = self._clock() - KEPT
        for token in await self._store.unfinished(()):
            if token.expire_time < long_ago:
                await self._store.delete(token.name)


def _sha256(csr_pem: bytes) -> str:
    return hashlib.sha256(csr_pem).hexdigest()
