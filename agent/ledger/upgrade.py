"""Bring a ledger's schema up to date; the one place that loads alembic."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL
from sqlalchemy.exc import DatabaseError

from kvtally.agent.ledger.errors import LedgerRevision, explained
from kvtally.agent.ledger.place import connect, file_of, is_current


def upgrade(url: str) -> bool:
    """Create or upgrade the ledger at `url`; True if anything had to be done. LedgerError if it cannot be."""
    path = file_of(url)
    with closing(connect(path)) as connection:
        if is_current(connection, path):
            return False
    config = Config()
    # the parser of its settings would read a % in a path as its own
    config.set_main_option("script_location", str(Path(__file__).parents[2] / "migrations").replace("%", "%%"))
    config.attributes["url"] = URL.create("sqlite", database=path)
    try:
        command.upgrade(config, "head")
    except DatabaseError as error:
        raise explained(path, Exception(str(error.orig))) from error
    except CommandError as error:
        raise LedgerRevision(f"{path}: {error}", "no kvtally wrote this revision; restore a copy") from error
    return True
