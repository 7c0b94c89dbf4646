"""The join tokens of jobs: by one, a job becomes the member that it is for as long as it runs."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

from beamwire.mesh.documents import read_bytes
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.files import remove
from beamwire.services.job.model import JobRecord

TOKEN_TTL: Final = timedelta(hours=24)
"""How long the join token of a job is good that may be queued for long; it is made anew after half of that."""
TOKEN_TTL_HERE: Final = timedelta(minutes=10)
"""That of a job which is started at once."""


class Minter(Protocol):
    """Mints join tokens."""

    async def __call__(self, identity: str, server_names: tuple[str, ...] = (), *, ttl: timedelta = ...) -> str:
        """Return a token for an identity that may serve under some names."""
        ...


class Predecessor(Protocol):
    """Knows of certificates that outlive the jobs which they were for."""

    async def __call__(self, identity: str, before: datetime) -> datetime | None:
        """Return when the last certificate ends that somebody got for an identity before a moment; None if all have."""
        ...


class JoinTokens:
    """Puts join tokens where jobs find them, and takes them away.

    Args:
        directory_of: the directory of a job, by its name.
        mint: mints a token for a job's identity.
        predecessor: tells whether an earlier job of the same identity can still be believed.
    """

    def __init__(
        self, directory_of: Callable[[str], Path], mint: Minter, predecessor: Predecessor | None = None
    ) -> None:
        self._directory_of = directory_of
        self._mint = mint
        self._predecessor = predecessor

    def path(self, name: str) -> Path:
        """Return where the token of a job is."""
        return self._directory_of(name) / "join-token"

    def credentials(self, name: str) -> Path:
        """Return where a job keeps what it gets for its token."""
        return self._directory_of(name) / "credentials"

    async def check_alone(self, record: JobRecord) -> None:
        """Raise RESOURCE_EXISTS while who had a job of that id before, which was deleted, can still be taken for it."""
        # An identity that a service chose is that service's affair: the caches of one buffer share theirs.
        if self._predecessor is None or record.step.number > 1 or record.spec.identity_path:
            return
        until = await self._predecessor(record.identity, record.create_time)
        if until is not None:
            raise BeamwireError(
                Reason.RESOURCE_EXISTS,
                f"a job of the id {record.id} was deleted, and its certificate is good until {until:%Y-%m-%d %H:%M:%S} "
                f"UTC; choose another id, or have an operator revoke {record.identity}",
                metadata={"identity": record.identity},
            )

    async def write(self, record: JobRecord, ttl: timedelta) -> Path:
        """Mint a token and put it there, whole or not at all, in place of whatever a program may have put there."""
        path = self.path(record.name)
        token = await self._mint(record.identity, record.spec.server_names, ttl=ttl)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(token)
        try:
            part.replace(path)
        except IsADirectoryError:
            await asyncio.to_thread(remove, path)
            part.replace(path)
        return path

    def read(self, name: str) -> bytes:
        """Return the token of a job; empty if there is none, or something else in its place."""
        try:
            return (read_bytes(self.path(name)) or b"").strip()
        except FileNotFoundError:
            return b""

    async def take_away(self, name: str) -> None:
        """Remove the token, and what the job got for it: nobody runs under its identity any more."""
        for path in (self.path(name), self.credentials(name)):
            await asyncio.to_thread(remove, path)
