"""What Alembic runs for each command: the revisions, on the connection that `beamwire.mesh.schema` has opened."""

from alembic import context

from beamwire.mesh.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # The whole way is one transaction, which the caller began: it is made, or nothing is.
    transactional_ddl=False,
)
context.run_migrations()
