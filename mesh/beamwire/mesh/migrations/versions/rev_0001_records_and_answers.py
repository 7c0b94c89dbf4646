"""Records and the answers given, one file per service.

Files from before there were revisions have this schema, and are taken for it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "resources",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("create_time", sa.Text, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
    )
    for column in ("kind", "owner", "state", "create_time"):
        op.create_index(f"ix_resources_{column}", "resources", [column])
    op.create_table(
        "answers",
        sa.Column("caller", sa.Text, primary_key=True),
        sa.Column("method", sa.Text, primary_key=True),
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("body_sha256", sa.LargeBinary, nullable=False),
        sa.Column("begun", sa.Float, nullable=False),
        sa.Column("answer", sa.LargeBinary),
    )
    op.create_index("ix_answers_begun", "answers", ["begun"])


def downgrade() -> None:
    """Drop both: all that the service knew is lost."""
    op.drop_table("answers")
    op.drop_table("resources")
