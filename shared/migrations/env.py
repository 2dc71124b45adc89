"""Alembic's entry: runs revisions on the connection that `shared.database.migrate` hands over."""

from alembic import context

from shared.database import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run migrations with: python -m service migrate")

context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
