"""The schema of a service's database, as the queries know it; `beamwire.mesh.migrations` makes it and changes it."""

from sqlalchemy import JSON, Column, Float, Integer, LargeBinary, MetaData, Table, Text

metadata = MetaData()

resources = Table(
    "resources",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("create_time", Text, nullable=False),
    Column("update_time", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("document", JSON, nullable=False),
    # The tokens of the newest changes, the older ones are in `tokens`: who lost a connection in the middle finds out
    # whether a change came about.
    Column("trail", Text, nullable=False),
    # Only replicas on this host may drive the record; empty: all may.
    Column("host", Text, nullable=False),
    # The replica that drives the record, and until when nobody else may, in seconds since 1970 by the database.
    Column("holder", Text),
    Column("held_until", Float),
)

labels = Table(
    "labels",
    metadata,
    # Kept by triggers, from the field `labels` of the documents.
    Column("name", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("create_time", Text, nullable=False),
)

passed = Table(
    "passed",
    metadata,
    # The last version of each state that a record has left, kept by triggers for those who watch from elsewhere.
    Column("name", Text, primary_key=True),
    Column("create_time", Text, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("document", JSON, nullable=False),
    Column("left_at", Float, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    # What no longer fits into the trail of a record, for an hour; moved here by a trigger.
    Column("token", Text, primary_key=True),
    Column("left_at", Float, nullable=False),
)

published = Table(
    "published",
    metadata,
    # Versions with newer volatile parts, which a crash may lose; only where there are several replicas.
    Column("name", Text, primary_key=True),
    Column("create_time", Text, nullable=False),
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
    Column("begun", Float, nullable=False),
    Column("answer", LargeBinary),
    # Who carries the request out, and until when it is believed to live.
    Column("holder", Text),
    Column("held_until", Float),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Text, primary_key=True),
    Column("resource", Text, nullable=False),
    Column("event_id", Text, nullable=False),
    Column("payload", Text, nullable=False),
    # Whom it is told; empty: nobody knows.
    Column("receiver", Text, nullable=False),
    # All times in seconds since 1970.
    Column("created", Float, nullable=False),
    Column("not_before", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("last_error", Text, nullable=False),
    Column("holder", Text),
    Column("held_until", Float),
)
