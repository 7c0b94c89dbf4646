"""The schema of a service's SQLite file: its resources, and the answers it gave."""

from sqlalchemy import JSON, Column, Float, Integer, LargeBinary, MetaData, Table, Text

metadata = MetaData()

resources = Table(
    "resources",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False, index=True),
    Column("owner", Text, nullable=False, index=True),
    Column("state", Text, nullable=False, index=True),
    Column("create_time", Text, nullable=False, index=True),
    Column("revision", Integer, nullable=False),
    Column("document", JSON, nullable=False),
)

answers = Table(
    "answers",
    metadata,
    Column("caller", Text, primary_key=True),
    Column("method", Text, primary_key=True),
    Column("request_id", Text, primary_key=True),
    Column("body_sha256", LargeBinary, nullable=False),
    Column("begun", Float, nullable=False, index=True),
    Column("answer", LargeBinary),
)
