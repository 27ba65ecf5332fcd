"""Alembic's entry: runs the revisions over the URL that the caller puts into config.attributes."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.pool import NullPool

from kvtally.agent.ledger.schema import metadata


def run() -> None:
    """Run online, whole or not at all; a ledger has no offline mode."""
    # NullPool: the engine must hold no connection that outlives the upgrade
    engine = create_engine(context.config.attributes["url"], poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _leave_transactions_to_us)
        event.listen(engine, "begin", _begin)
    with engine.begin() as connection:
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


def _leave_transactions_to_us(connection: Any, _: object) -> None:
    # Python's driver begins none for CREATE TABLE: a kill in the middle would leave half a schema
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    # at once with the right to write: of two upgrades, the second waits and finds nothing left to do
    connection.exec_driver_sql("BEGIN IMMEDIATE")


run()
