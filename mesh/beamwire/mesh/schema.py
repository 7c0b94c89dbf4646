"""Which revision of the schema a database has, and the ways from one to another."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0004"
"""The revision that this release works with."""
FIRST = "0001"
_VERSION_TABLE = "alembic_version"

# It tells of each of its plugins when it is imported. What it has to say of a way we say ourselves.
logging.getLogger("alembic").setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Step:
    """One revision and what it brought."""

    revision: str
    title: str


def current(connection: Connection) -> str:
    """The revision that the database has; empty for one with nothing in it."""
    inspector = inspect(connection)
    if inspector.has_table(_VERSION_TABLE):
        row = connection.exec_driver_sql(f"SELECT version_num FROM {_VERSION_TABLE}").one_or_none()
        return str(row[0]) if row else ""
    return FIRST if inspector.has_table("resources") else ""


def steps() -> list[Step]:
    """Every revision that this release knows, oldest first."""
    from alembic.script import ScriptDirectory

    walked = ScriptDirectory.from_config(_config(None)).walk_revisions()
    return [Step(script.revision, (script.doc or "").rstrip(".")) for script in walked][::-1]


def upgrade(connection: Connection, revision: str = HEAD) -> None:
    """Bring the schema up to a revision, in the transaction that the connection is in; nothing if it is there.

    Raises:
        BeamwireError: ILLEGAL_STATE if a newer release made the schema, INVALID_FIELD for an unknown revision.
    """
    found = current(connection)
    if found == revision:
        return
    # Slow to import, and seldom needed.
    from alembic import command

    order = _known(found, revision)
    if found and order.index(found) > order.index(revision):
        raise invalid_field("revision", f"{revision} is older than {found}, which the database has; downgrade to it")
    config = _config(connection)
    if found and not inspect(connection).has_table(_VERSION_TABLE):
        command.stamp(config, found)
    command.upgrade(config, revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Take the schema back to a revision, in the transaction that the connection is in; nothing if it is there."""
    found = current(connection)
    if found == revision:
        return
    # Slow to import, and seldom needed.
    from alembic import command

    order = _known(found, revision)
    if not found or order.index(found) < order.index(revision):
        raise invalid_field("revision", f"{revision} is newer than {found or 'nothing'}, which is there; upgrade to it")
    config = _config(connection)
    if not inspect(connection).has_table(_VERSION_TABLE):
        command.stamp(config, found)
    command.downgrade(config, revision)


def _known(found: str, wanted: str) -> list[str]:
    order = [step.revision for step in steps()]
    if found and found not in order:
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            f"the database has the schema {found}, this release knows {', '.join(order)}: a newer release made it. "
            "Serve it with that release, or take it back with that release's `beamwired db downgrade`",
        )
    if wanted not in order:
        raise invalid_field("revision", f"there is no revision {wanted!r}; there are {', '.join(order)}")
    return order


def _config(connection: Connection | None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
