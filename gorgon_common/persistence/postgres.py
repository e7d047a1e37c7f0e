"""Connections to PostgreSQL on which no wait lasts forever.

A connection may die silently: a NAT gateway forgets it, a standby takes over, a machine disappears.  Three measures
together bound every wait:

* TCP keep-alive probes, and `tcp_user_timeout` on both sides, detect a peer that is gone, on idle connections too.
* The server ends long statements, waits for locks, and transactions abandoned by their client, so that a worker that
  vanished keeps no row locked.
* The client abandons a connection that has not answered for longer than the server lets any statement run.  This is
  the only measure that helps if something in between (a proxy, a pooler) keeps the connection open.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import URL

from gorgon_common.errors import StorageFault

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 12.0
"""How long the server lets a statement run."""
LOCK_SECONDS = 10.0
REPLY_SECONDS = 15.0
"""How long the client waits for a reply: longer than any statement may take, and short enough to recover within 30 s.
"""
PING_SECONDS = 5.0
FRESH_SECONDS = 1.0
"""A connection that answered this recently is used without a check."""
REPORT_SECONDS = 120.0
"""How long reports may take; they read whole tables."""
MIGRATION_LOCK_SECONDS = 60.0

STORAGE_FAULTS = (psycopg.errors.DiskFull, psycopg.errors.IoError, psycopg.errors.ReadOnlySqlTransaction)
_WRITABLE = "Make it writable again; what waits goes on by itself."
_KEEP_ALIVE = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
_SERVER = (
    " -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
    f" -c tcp_user_timeout=15000 -c idle_in_transaction_session_timeout={round(STATEMENT_SECONDS * 1000)}"
)


def fault(error: BaseException) -> StorageFault | None:
    """Return what to tell people of a server that cannot store anything, None where the error is another one."""
    cause = getattr(error, "orig", error)
    if isinstance(cause, psycopg.errors.DiskFull):
        hint = "Free some space on the server; what waits goes on by itself."
        return StorageFault("The disk of the database server is full.", hint=hint)
    if isinstance(cause, psycopg.errors.ReadOnlySqlTransaction):
        return StorageFault("The database server is read-only; it may have become a standby.", hint=_WRITABLE)
    if isinstance(cause, psycopg.errors.IoError):
        return StorageFault("The disk of the database server reports an error; its log says which.", hint=_WRITABLE)
    return None


class Connection(psycopg.Connection[Any]):
    """A connection that is closed if the server has not answered for `reply_seconds` (None: never)."""

    reply_seconds: float | None = REPLY_SECONDS
    last_reply = float("-inf")
    """The time of its last answer, on the monotonic clock."""
    silence: ClassVar[float] = float("-inf")
    """When a connection of this process was last abandoned."""

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait for a reply.  If none arrives in time, closes the connection and raises OperationalError."""
        try:
            found = super().wait(gen, interval, self.reply_seconds if timeout is None else timeout)
        except psycopg.OperationalError as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise  # the server's own answer, or a broken connection
            self.pgconn.finish()
            Connection.silence = time.monotonic()
            raise psycopg.OperationalError(f"the server has not answered for {self.reply_seconds:g} s") from error
        self.last_reply = time.monotonic()
        return found

    def ping(self) -> None:
        """Check that the server answers, unless it has answered very recently.  Must not be called within a
        transaction.

        If another connection was abandoned since this one last answered, this one counts as dead too, and is not waited
        for.  Raises psycopg.OperationalError.
        """
        if self.last_reply < self.silence:
            raise psycopg.OperationalError("another connection to the server has died")
        if time.monotonic() - self.last_reply < FRESH_SECONDS:
            return
        patience, mode = self.reply_seconds, self.autocommit
        self.reply_seconds, self.autocommit = PING_SECONDS, True
        self.execute("")
        self.reply_seconds, self.autocommit = patience, mode


def connect_arguments(url: URL, *, migrates: bool = False, options: str = "") -> dict[str, Any]:
    """Return the arguments for connecting to `url`; settings in the URL itself take precedence.

    `migrates`: statements have no time limit.  `options`: further options of the session (`-c name=value`).
    """
    statement, lock = (0.0, MIGRATION_LOCK_SECONDS) if migrates else (STATEMENT_SECONDS, LOCK_SECONDS)
    limits = f"-c statement_timeout={round(statement * 1000)} -c lock_timeout={round(lock * 1000)}"
    wanted = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": round(REPLY_SECONDS * 1000), **_KEEP_ALIVE}
    own = url.query.get("options", "")
    session = f"{limits}{_SERVER} {options} {own if isinstance(own, str) else ' '.join(own)}"
    return {**{name: value for name, value in wanted.items() if name not in url.query}, "options": session.strip()}


def connect(url: URL, *, options: str) -> Connection:
    """Return a separate connection, on which every statement is its own transaction."""
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    made = Connection.connect(plain, autocommit=True, **connect_arguments(url, options=options))
    made.last_reply = time.monotonic()
    return made
