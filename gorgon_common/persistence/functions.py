"""The SQL functions on PostgreSQL: a repeatable step of every upgrade, identified by the hash of their text.

A migration belongs to a revision and runs once; the functions are replaced whenever their text has changed.  The hash
is kept as the comment of `gorgon_claim_and_finish`.  `gorgon db upgrade` and the check at each start read it to find
out which text is installed.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from sqlalchemy import Connection, text

_FILES = ("claim_and_finish.sql", "budgets.sql")


@cache
def source() -> str:
    """Return the text of all functions."""
    folder = resources.files("gorgon_common.persistence").joinpath("sql")
    return "\n".join(folder.joinpath(name).read_text() for name in _FILES)


@cache
def digest() -> str:
    """Return the hash of the functions of this version, in hex."""
    return hashlib.sha256(source().encode()).hexdigest()


def installed(connection: Connection) -> str | None:
    """Return the hash of the functions installed in the database; None if there are none or they have no hash."""
    query = (
        "SELECT obj_description(oid, 'pg_proc') FROM pg_proc"
        " WHERE proname = 'gorgon_claim_and_finish' AND pronamespace = current_schema()::regnamespace"
    )
    found: str | None = connection.scalar(text(query))
    return found


def install(connection: Connection) -> None:
    """Replace the database's functions with those of this version, whatever their signatures were."""
    remove(connection)
    connection.exec_driver_sql(source().replace("%", "%%"))
    connection.exec_driver_sql(f"COMMENT ON FUNCTION gorgon_claim_and_finish IS '{digest()}'")


def remove(connection: Connection) -> None:
    """Drop the database's functions, so that a migration can change what they depend on."""
    ours = text(
        "SELECT oid::regprocedure::text FROM pg_proc"
        " WHERE proname LIKE 'gorgon\\_%' AND pronamespace = current_schema()::regnamespace"
    )
    for signature in connection.scalars(ours).all():
        connection.exec_driver_sql(f"DROP FUNCTION {signature}")
    connection.exec_driver_sql("DROP TYPE IF EXISTS gorgon_transition")
