"""Migrates a database to this version's tables with Alembic; a new SQLite file takes a shortcut."""

from __future__ import annotations

from importlib import resources
from typing import Any

from sqlalchemy import func, inspect, select, text
from sqlalchemy.sql import column, table

from gorgon_common.errors import ConfigurationError
from gorgon_common.lazy import load
from gorgon_common.persistence import functions
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.tables import metadata

HEAD = "0013"
"""The newest migration; a test compares it with the files."""
_LOCK = 0x676F7267

_version = table("alembic_version", column("version_num"))


def current(database: Database) -> str | None:
    """Return the current migration of the database; None if it is empty."""
    with database.read() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.scalar(select(_version.c.version_num))


def upgrade(url: str) -> str:
    """Migrate to HEAD; returns the previous migration (`` for an empty database).  Idempotent."""
    database = Database(url, pool_size=1, migrates=True)
    try:
        before = current(database)
        if before == HEAD and _functions_fit(database):
            return before
        if before is None and database.sqlite:
            _create(database)
            return ""
        _alembic(database, "upgrade")
        return before or ""
    finally:
        database.close()


def check(database: Database) -> None:
    """Raise ConfigurationError if the database is not at this version."""
    found = current(database)
    if found != HEAD:
        raise ConfigurationError(
            f"The database is at version {found or 'none'}, this Gorgon needs {HEAD}.",
            hint="Run: gorgon db upgrade",
        )
    if not _functions_fit(database):
        raise ConfigurationError(
            "The SQL functions of the database are those of another version of Gorgon.", hint="Run: gorgon db upgrade"
        )


def _functions_fit(database: Database) -> bool:
    if database.sqlite:
        return True
    with database.read() as connection:
        return functions.installed(connection) == functions.digest()


def _create(database: Database) -> None:
    """Create the current tables in a new SQLite file: importing Alembic takes longer than the rest of a start."""
    with database.write() as connection:
        if inspect(connection).has_table("alembic_version"):
            return  # another process was faster
        metadata.create_all(connection)
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
        connection.execute(_version.insert().values(version_num=HEAD))


def _alembic(database: Database, verb: str, target: str = "head") -> None:
    command: Any = load("alembic.command")
    config = load("alembic.config:Config")()
    config.set_main_option("script_location", str(resources.files("gorgon_common.persistence").joinpath("migrations")))
    with database.write() as connection:
        if not database.sqlite:  # on SQLite, BEGIN IMMEDIATE serializes upgrades; the second finds nothing to do
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        config.attributes["connection"] = connection
        if database.sqlite:
            getattr(command, verb)(config, target)
            return
        functions.remove(connection)
        getattr(command, verb)(config, target)
        if target == "head":
            functions.install(connection)
