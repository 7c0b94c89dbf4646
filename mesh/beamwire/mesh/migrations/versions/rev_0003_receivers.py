"""Whom an item of the outbox is told, and how large the files of a job are.

So that one receiver keeps none of the others waiting, and what an owner has is known without looking.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the receiver; that of the items which are there is not known. Records say their sizes when they change."""
    op.add_column("outbox", sa.Column("receiver", sa.Text, nullable=False, server_default=""))


def downgrade() -> None:
    """Take both back; no item is lost."""
    op.drop_column("outbox", "receiver")
    if op.get_bind().dialect.name == "sqlite":
        op.execute("UPDATE resources SET document = json_remove(document, '$.file_bytes') WHERE kind = 'JobRecord'")
    else:
        op.execute("UPDATE resources SET document = (document::jsonb - 'file_bytes')::json WHERE kind = 'JobRecord'")
