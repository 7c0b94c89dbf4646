"""The tokens of changes, for an hour also where many others came after them.

Who lost the connection in the middle of a change asks for its token. The record itself has those of its newest changes
only, and others may make more than that while one is away.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the table, and the trigger that moves there what no longer fits into a record."""
    op.create_table(
        "tokens",
        sa.Column("token", sa.Text, primary_key=True),
        sa.Column("left_at", sa.Float, nullable=False),
    )
    op.create_index("ix_tokens_left_at", "tokens", ["left_at"])
    for statement in [_SQLITE] if op.get_bind().dialect.name == "sqlite" else _POSTGRES:
        op.execute(statement)


def downgrade() -> None:
    """Take it back; a change whose answer was lost just now may be made twice."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER resources_trailed")
    else:
        op.execute("DROP FUNCTION resources_trailed() CASCADE")
    op.drop_table("tokens")


# A token has 12 characters. The newest is in front, and a trail that has not grown by it has lost its last one.
_LOST_ONE = "length(NEW.trail) = length(OLD.trail) AND NEW.trail <> OLD.trail"
_SQLITE = f"""
    CREATE TRIGGER resources_trailed AFTER UPDATE OF trail ON resources WHEN {_LOST_ONE}
    BEGIN
        INSERT OR IGNORE INTO tokens (token, left_at)
        VALUES (substr(OLD.trail, -12), (julianday('now') - 2440587.5) * 86400.0);
        DELETE FROM tokens WHERE left_at < (julianday('now') - 2440587.5) * 86400.0 - 3600;
    END
"""
_POSTGRES = (
    """
    CREATE FUNCTION resources_trailed() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        INSERT INTO tokens (token, left_at)
        VALUES (right(OLD.trail, 12), extract(epoch FROM clock_timestamp())) ON CONFLICT DO NOTHING;
        RETURN NULL;
    END $$
    """,
    f"""
    CREATE TRIGGER resources_trailed AFTER UPDATE OF trail ON resources FOR EACH ROW
    WHEN ({_LOST_ONE}) EXECUTE FUNCTION resources_trailed()
    """,
)
