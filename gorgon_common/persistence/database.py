"""One SQLAlchemy engine per process, for SQLite and PostgreSQL, and how a transaction begins on each."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gorgon_common.errors import ConfigurationError, Unavailable
from gorgon_common.masking import redact
from gorgon_common.persistence import postgres, sqlite_file
from gorgon_common.persistence.tables import SQLITE_TIME
from gorgon_common.scope import SYSTEM, Scope

BUSY_SECONDS = 10
POOL_SECONDS = 10.0
"""How long a thread waits for a connection from the pool."""


class Database:
    """Connections and transactions.

    `clock_offset` shifts the database's clock on SQLite, in seconds, so that tests can let leases expire.  `migrates`:
    statements have no time limit.
    """

    def __init__(self, url: str, *, pool_size: int = 8, migrates: bool = False) -> None:
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
            self.engine = _postgres(parsed, pool_size, migrates=migrates)
            self._reader = self.engine
            self._plain = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextlib.contextmanager
    def write(self, scope: Scope = SYSTEM) -> Iterator[Connection]:
        """A write transaction for `scope`; see `scope_of`.

        On SQLite, writers of this process queue on a lock, other processes on BEGIN IMMEDIATE.

        Raises Unavailable if the database cannot be reached.
        """
        alone = self._one if self.sqlite else contextlib.nullcontext()
        with translated(self.path), alone, self.engine.begin() as connection:
            _enter(connection, scope)
            yield connection

    @contextlib.contextmanager
    def read(self, scope: Scope = SYSTEM) -> Iterator[Connection]:
        """A read transaction for `scope`.  Keep it short: an open reader lets SQLite's WAL grow."""
        with translated(self.path), self._reader.begin() as connection:
            _enter(connection, scope)
            yield connection

    @contextlib.contextmanager
    def statements(self) -> Iterator[Connection]:
        """Statements that are each their own transaction.  This avoids BEGIN and COMMIT, which would double the cost.

        Raises Unavailable if the database cannot be reached.
        """
        if self.sqlite:
            with self.write() as connection:
                yield connection
            return
        with translated(), self._plain.connect() as connection:
            _enter(connection, SYSTEM)
            yield connection

    @contextlib.contextmanager
    def report(self, scope: Scope = SYSTEM) -> Iterator[Connection]:
        """A read transaction for reports, which read a lot and may take long."""
        with self.read(scope) as connection:
            if self.sqlite:
                yield connection
                return
            driver = cast(postgres.Connection, connection.connection.driver_connection)
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{postgres.REPORT_SECONDS:g}s'")
            before, driver.reply_seconds = driver.reply_seconds, postgres.REPORT_SECONDS + postgres.PING_SECONDS
            try:
                yield connection
            finally:
                driver.reply_seconds = before

    def connect(self, *, options: str = "") -> postgres.Connection:
        """Return a connection to PostgreSQL outside the pool, on which every statement is its own transaction.

        Raises psycopg.OperationalError.
        """
        return postgres.connect(self.engine.url, options=options)

    def now(self) -> datetime:
        """Return this process's clock plus the offset, like SQLite's `gorgon_now`."""
        return datetime.now(UTC) + timedelta(seconds=self.clock_offset)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _enter(connection: Connection, scope: Scope) -> None:
    """Say for whom a transaction is.  Every transaction passes here: row-level security would be set here."""
    connection.info["scope"] = scope


def scope_of(connection: Connection) -> Scope:
    """Return for whom the present transaction of a connection was opened."""
    return cast(Scope, connection.info["scope"])


@contextlib.contextmanager
def translated(path: str | None = None) -> Iterator[None]:
    """Convert errors: Unavailable if the database cannot be reached, StorageFault if it cannot be written.

    A SQLite file that is damaged becomes ConfigurationError.

    `path`: the file of a SQLite database.
    """
    try:
        yield
    except (DBAPIError, sqlite3.DatabaseError, psycopg.OperationalError, *postgres.STORAGE_FAULTS) as error:
        # Statements that bypass SQLAlchemy (`claim_and_finish`, COPY) raise the drivers' own errors.
        known = sqlite_file.fault(error, path) or postgres.fault(error)
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
    except PoolTimeout as error:
        raise Unavailable(f"No connection to the database became free within {POOL_SECONDS:g} s.") from error


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(
            f"GORGON_DATABASE_URL cannot be read: {redact(str(error))}",
            hint="Write it like postgresql://user:password@host:5432/name; percent-encode what is special.",
        ) from None


def _postgres(url: URL, pool_size: int, *, migrates: bool) -> Engine:
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args=postgres.connect_arguments(url, migrates=migrates),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=POOL_SECONDS,
    )

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> postgres.Connection:
        connection = postgres.Connection.connect(*arguments, **options)
        connection.last_reply = time.monotonic()
        if migrates:
            connection.reply_seconds = None
        return connection

    @event.listens_for(engine, "checkout")
    def _ask(connection: postgres.Connection, _record: Any, _proxy: Any) -> None:
        try:
            connection.ping()
        except psycopg.Error as error:  # the other connections are probably dead too
            raise InvalidatePoolError(str(error)) from error

    return engine


def _sqlite(url: URL, database: Database, pool_size: int) -> Engine:
    # isolation_level=None: sqlite3 never begins a transaction by itself.  autocommit=True would make commit() a no-op.
    # Python's default loses updates: a "deferred" transaction that reads first fails to upgrade to a write.
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
