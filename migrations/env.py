"""Alembic's entry: runs the revisions over a connection or URL that the caller puts into config.attributes."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from kvtally.agent.ledger.schema import metadata


def run() -> None:
    """Run online; a ledger has no offline mode."""
    # NullPool: the engine must hold no connection that outlives the upgrade
    engine = create_engine(context.config.attributes["url"], poolclass=NullPool)
    with engine.begin() as connection:
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


run()
