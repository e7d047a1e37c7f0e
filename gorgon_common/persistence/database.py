"""One engine a process, for SQLite and for PostgreSQL, and how a transaction begins on each."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from gorgon_common.errors import ConfigurationError, Unavailable
from gorgon_common.masking import redact
from gorgon_common.persistence import sqlite_file
from gorgon_common.persistence.tables import SQLITE_TIME

BUSY_SECONDS = 10


class Database:
    """Connections and transactions.

    `clock_offset` moves the database's clock on SQLite, in seconds: tests let leases run out with it.
    """

    def __init__(self, url: str, *, pool_size: int = 8) -> None:
        parsed = _parsed(url)
        self.sqlite = parsed.get_backend_name() == "sqlite"
        self.clock_offset = 0.0
        self.path: str | None = None
        """The file of a SQLite database."""
        self._one = threading.Lock()
        if self.sqlite:
            self.path = parsed.database or ""
            sqlite_file.prepare(self.path)
            self.engine = _sqlite(parsed, self, pool_size)
            self._reader: Engine = self.engine.execution_options(sqlite_begin="DEFERRED")
        else:
            self.engine = create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_pre_ping=True,
            )
            self._reader = self.engine

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that writes.  On SQLite writers of this process queue on a lock, others on BEGIN IMMEDIATE.

        Raises Unavailable where the database cannot be reached.
        """
        alone = self._one if self.sqlite else contextlib.nullcontext()
        with translated(self.path), alone, self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that reads.  Keep it short: an open reader lets SQLite's WAL grow."""
        with translated(self.path), self._reader.begin() as connection:
            yield connection

    def now(self) -> datetime:
        """Return this process' clock plus the offset: what SQLite's `gorgon_now` says."""
        return datetime.now(UTC) + timedelta(seconds=self.clock_offset)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


@contextlib.contextmanager
def translated(path: str | None = None) -> Iterator[None]:
    """Turn a database that cannot be reached into Unavailable, one that is damaged into ConfigurationError.

    `path`: the file of a SQLite database.
    """
    try:
        yield
    except (DBAPIError, sqlite3.DatabaseError, psycopg.OperationalError) as error:
        # The drivers' own come from the statements that go past SQLAlchemy (`tick`, COPY).
        known = sqlite_file.fault(error, path)
        if known is not None:
            raise known from error
        if isinstance(error, (OperationalError, psycopg.OperationalError, sqlite3.OperationalError)):
            cause = str(getattr(error, "orig", error)).strip() or type(error).__name__
            raise Unavailable(
                f"The database cannot be used: {redact(cause.splitlines()[0])}",
                hint="Check GORGON_DATABASE_URL, and that the database is running and migrated (gorgon db upgrade).",
            ) from error
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise Unavailable("The connection to the database broke.") from error
        raise


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(
            f"GORGON_DATABASE_URL cannot be read: {redact(str(error))}",
            hint="Write it like postgresql://user:password@host:5432/name; percent-encode what is special.",
        ) from None


def _sqlite(url: URL, database: Database, pool_size: int) -> Engine:
    # isolation_level=None: sqlite3 never begins by itself.  autocommit=True would make commit() a no-op, and Python's
    # default lost updates: "deferred" transactions that read first fail to upgrade.
    arguments: dict[str, Any] = {"isolation_level": None, "timeout": BUSY_SECONDS, "check_same_thread": False}
    if hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"):
        arguments["autocommit"] = sqlite3.LEGACY_TRANSACTION_CONTROL
    engine = create_engine(url, connect_args=arguments, pool_size=pool_size, max_overflow=64, pool_timeout=60)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            f"busy_timeout={BUSY_SECONDS * 1000}",
            "cache_size=-16000",
            "temp_store=MEMORY",
            "journal_size_limit=67108864",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.create_function(
            "gorgon_now", 1, lambda seconds: (database.now() + timedelta(seconds=seconds)).strftime(SQLITE_TIME)
        )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get("sqlite_begin", "IMMEDIATE")
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine
