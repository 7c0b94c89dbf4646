"""What may stand for a PostgreSQL database: nothing of a password in it is ever shown."""

from __future__ import annotations

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.postgres import PostgresDatabase, describe


@pytest.mark.parametrize(
    "url",
    [
        "beamwire:s3cr3t@db/beamwire",
        "postgresql+asyncpg://beamwire:s3cr3t/more@db/beamwire",
        "postgresql+asyncpg://beamwire:s3cr3t#more@db/beamwire",
        "postgresql+asyncpg://beamwire:s3cr3t?more@db/beamwire",
        "postgresql+asyncpg://beamwire:s3cr3t[@db/beamwire",
        "postgresql+asyncpg://beamwire:s3cr3t\u2100@db/beamwire",
    ],
)
async def test_a_password_that_ends_the_host_early_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(BeamwireError) as refused:
        await PostgresDatabase.make(url, "job", bring_up=False)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert "s3cr3t" not in str(refused.value)
    assert "s3cr3t" not in repr(refused.value.__cause__)


def test_a_database_is_described_without_its_password() -> None:
    assert describe("postgresql+asyncpg://beamwire:s3cr3t%2F@db:5433/beamwire") == (
        "PostgreSQL at db:5433, database beamwire"
    )
