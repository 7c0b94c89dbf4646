"""Several replicas over one database, an outbox, and pages of long lists.

Claims on records and requests, what watchers elsewhere are shown, indices for every kind of list, labels in a table of
their own.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_OLD_INDICES = ("kind", "owner", "state", "create_time")
# Each ends with what a list is ordered by, so that a page is read from the index and nothing is sorted.
_INDICES = {
    "all": ("kind", "create_time", "name"),
    "by_owner": ("kind", "owner", "create_time", "name"),
    "by_state": ("kind", "state", "create_time", "name"),
    "by_owner_state": ("kind", "owner", "state", "create_time", "name"),
    "by_update": ("kind", "state", "update_time"),
}


def upgrade() -> None:
    """Add columns, tables, indices and triggers, and fill them from what is there."""
    _add_columns()
    for column in _OLD_INDICES:
        op.drop_index(f"ix_resources_{column}", "resources")
    for name, columns in _INDICES.items():
        op.create_index(f"ix_resources_{name}", "resources", list(columns))
    held = sa.text("holder IS NOT NULL")
    op.create_index("ix_resources_held", "resources", ["holder"], sqlite_where=held, postgresql_where=held)
    _add_tables()
    if op.get_bind().dialect.name == "sqlite":
        _fill(_SQLITE_UPDATE_TIME, _SQLITE_LABELS)
        # Only files hold what an earlier release wrote.
        op.execute(_SQLITE_JOBS)
        for name, statement in _SQLITE_TRIGGERS.items():
            op.execute(f"CREATE TRIGGER {name} {statement}")
    else:
        _fill(_POSTGRES_UPDATE_TIME, _POSTGRES_LABELS)
        for statement in _POSTGRES_TRIGGERS:
            op.execute(statement)


def downgrade() -> None:
    """Take all that back; claims, what the outbox still holds and the hosts of records are lost."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    if sqlite:
        for name in _SQLITE_TRIGGERS:
            op.execute(f"DROP TRIGGER {name}")
        op.execute("UPDATE resources SET document = json_remove(document, '$.host')")
    else:
        op.execute("DROP FUNCTION resources_changed() CASCADE")
        op.execute("DROP FUNCTION resources_labelled() CASCADE")
        op.execute("UPDATE resources SET document = (document::jsonb - 'host')::json")
    for table in ("outbox", "published", "passed", "labels"):
        op.drop_table(table)
    op.drop_index("ix_resources_held", "resources")
    for name in _INDICES:
        op.drop_index(f"ix_resources_{name}", "resources")
    for column in _OLD_INDICES:
        op.create_index(f"ix_resources_{column}", "resources", [column])
    for table, columns in _new_columns().items():
        for added in columns:
            op.drop_column(table, added.name)


def _new_columns() -> dict[str, list[sa.Column[Any]]]:
    return {
        "resources": [
            sa.Column("update_time", sa.Text, nullable=False, server_default=""),
            sa.Column("trail", sa.Text, nullable=False, server_default=""),
            sa.Column("host", sa.Text, nullable=False, server_default=""),
            sa.Column("holder", sa.Text),
            sa.Column("held_until", sa.Float),
        ],
        "answers": [sa.Column("holder", sa.Text), sa.Column("held_until", sa.Float)],
    }


def _add_columns() -> None:
    for table, columns in _new_columns().items():
        for column in columns:
            op.add_column(table, column)


def _add_tables() -> None:
    op.create_table(
        "labels",
        sa.Column("name", sa.Text, sa.ForeignKey("resources.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("create_time", sa.Text, nullable=False),
    )
    op.create_index("ix_labels_list", "labels", ["kind", "key", "value", "create_time", "name"])
    op.create_table(
        "passed",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("create_time", sa.Text, primary_key=True),
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("document", sa.JSON, nullable=False),
        sa.Column("left_at", sa.Float, nullable=False),
    )
    op.create_index("ix_passed_left_at", "passed", ["left_at"])
    op.create_table(
        "published",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("create_time", sa.Text, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
        prefixes=["UNLOGGED"] if op.get_bind().dialect.name == "postgresql" else [],
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("resource", sa.Text, nullable=False),
        sa.Column("event_id", sa.Text, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("not_before", sa.Float, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("last_error", sa.Text, nullable=False),
        sa.Column("holder", sa.Text),
        sa.Column("held_until", sa.Float),
    )
    op.create_index("ix_outbox_not_before", "outbox", ["not_before"])
    op.create_index("ix_outbox_resource", "outbox", ["resource", "created"])


def _fill(update_time: str, labels: str) -> None:
    op.execute(f"UPDATE resources SET update_time = {update_time}")
    op.execute(f"INSERT INTO labels (name, key, value, kind, create_time) {labels}")


# The documents have their times with six, three or no digits of seconds; the column has six, so that it sorts as text.
_SQLITE_UPDATE_TIME = """
    substr(json_extract(document, '$.update_time'), 1, 19) || '.' || substr(
        CASE WHEN substr(json_extract(document, '$.update_time'), 20, 1) = '.'
             THEN rtrim(substr(json_extract(document, '$.update_time'), 21), 'Z') ELSE '' END || '000000', 1, 6) || 'Z'
"""
_POSTGRES_UPDATE_TIME = """
    to_char((document->>'update_time')::timestamptz AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
"""
_SQLITE_LABELS = """
    SELECT r.name, l.key, l.value, r.kind, r.create_time
    FROM resources AS r, json_each(r.document, '$.labels') AS l WHERE json_type(r.document, '$.labels') = 'object'
"""
_POSTGRES_LABELS = """
    SELECT r.name, l.key, l.value, r.kind, r.create_time FROM resources AS r,
    json_each_text(CASE WHEN json_typeof(r.document->'labels') = 'object' THEN r.document->'labels' ELSE '{}' END) AS l
"""

# Jobs had one run and one place; what was said of them is now said of a step, of resources and of a placement.
_SQLITE_JOBS = """
    UPDATE resources SET document = json_remove(
        json_set(
            document,
            '$.spec.resources', json_object(
                'process_count', json_extract(document, '$.spec.process_count'),
                'duration', json_extract(document, '$.spec.duration')),
            '$.spec.placement', json_object('backend', json_extract(document, '$.spec.backend')),
            '$.steps', json_array(json_object(
                'number', 1,
                'native_id', json_extract(document, '$.native_id'),
                'exit_code', json_extract(document, '$.exit_code'),
                'start_time', (
                    SELECT json_extract(t.value, '$.time') FROM json_each(document, '$.transitions') AS t
                    WHERE json_extract(t.value, '$.state') = 'ACTIVE'),
                'end_time', (
                    SELECT json_extract(t.value, '$.time') FROM json_each(document, '$.transitions') AS t
                    WHERE json_extract(t.value, '$.state') IN ('COMPLETED', 'FAILED', 'CANCELED')))),
            '$.end_time', (
                SELECT json_extract(t.value, '$.time') FROM json_each(document, '$.transitions') AS t
                WHERE json_extract(t.value, '$.state') IN ('COMPLETED', 'FAILED', 'CANCELED'))),
        '$.spec.process_count', '$.spec.duration', '$.spec.backend', '$.native_id', '$.exit_code')
    WHERE kind = 'JobRecord' AND json_type(document, '$.steps') IS NULL
"""

_SQLITE_LABEL_NEW = """
    INSERT INTO labels (name, key, value, kind, create_time)
    SELECT NEW.name, key, value, NEW.kind, NEW.create_time FROM json_each(NEW.document, '$.labels')
    WHERE json_type(NEW.document, '$.labels') = 'object';
"""
_SQLITE_KEEP = """
    INSERT OR REPLACE INTO passed (name, create_time, revision, document, left_at)
    VALUES (OLD.name, OLD.create_time, OLD.revision, OLD.document, (julianday('now') - 2440587.5) * 86400.0);
    DELETE FROM passed WHERE left_at < (julianday('now') - 2440587.5) * 86400.0 - 3600;
"""
_SQLITE_TRIGGERS = {
    "resources_labelled": f"""
        AFTER INSERT ON resources WHEN json_extract(NEW.document, '$.labels') IS NOT NULL
        BEGIN {_SQLITE_LABEL_NEW} END""",
    "resources_relabelled": f"""
        AFTER UPDATE OF document ON resources
        WHEN json_extract(NEW.document, '$.labels') IS NOT json_extract(OLD.document, '$.labels')
        BEGIN DELETE FROM labels WHERE name = NEW.name; {_SQLITE_LABEL_NEW} END""",
    "resources_passed": f"""
        AFTER UPDATE OF state ON resources WHEN NEW.state IS NOT OLD.state BEGIN {_SQLITE_KEEP} END""",
    "resources_gone": f"AFTER DELETE ON resources BEGIN {_SQLITE_KEEP} END",
}

_POSTGRES_TRIGGERS = (
    """
    CREATE FUNCTION resources_labelled() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            DELETE FROM labels WHERE name = NEW.name;
        END IF;
        IF json_typeof(NEW.document->'labels') = 'object' THEN
            INSERT INTO labels (name, key, value, kind, create_time)
            SELECT NEW.name, key, value, NEW.kind, NEW.create_time FROM json_each_text(NEW.document->'labels');
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER resources_labelled AFTER INSERT ON resources FOR EACH ROW
    WHEN (json_typeof(NEW.document->'labels') = 'object') EXECUTE FUNCTION resources_labelled()
    """,
    """
    CREATE TRIGGER resources_relabelled AFTER UPDATE OF document ON resources FOR EACH ROW
    WHEN ((OLD.document->'labels')::text IS DISTINCT FROM (NEW.document->'labels')::text)
    EXECUTE FUNCTION resources_labelled()
    """,
    # Told in the transaction of the change: it is heard if the change came about, and after it can be read.
    """
    CREATE FUNCTION resources_changed() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        IF TG_OP = 'DELETE' OR NEW.state IS DISTINCT FROM OLD.state THEN
            INSERT INTO passed (name, create_time, revision, document, left_at)
            VALUES (OLD.name, OLD.create_time, OLD.revision, OLD.document, extract(epoch FROM clock_timestamp()))
            ON CONFLICT DO NOTHING;
        END IF;
        PERFORM pg_notify('beamwire_' || TG_TABLE_SCHEMA, OLD.kind || ' ' || OLD.name);
        IF TG_OP = 'DELETE' THEN
            DELETE FROM published WHERE name = OLD.name;
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER resources_changed AFTER UPDATE ON resources FOR EACH ROW
    WHEN (OLD.revision IS DISTINCT FROM NEW.revision) EXECUTE FUNCTION resources_changed()
    """,
    """
    CREATE TRIGGER resources_gone AFTER DELETE ON resources FOR EACH ROW EXECUTE FUNCTION resources_changed()
    """,
)
