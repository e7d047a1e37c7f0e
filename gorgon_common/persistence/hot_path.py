"""`claim_and_finish` on PostgreSQL: one round trip, on a connection of its own, with a prepared statement."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import psycopg

from gorgon_common.engine.records import ClaimCapacity, Finish, TransitionResult
from gorgon_common.errors import Unavailable
from gorgon_common.persistence import postgres
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.transitions import (
    CLAIM_AND_FINISH,
    SETTLE_CLAIM_AND_FINISH,
    arguments,
    decoded,
    settlements,
)
from gorgon_common.persistence.workers import Worker

# With array and JSON parameters, custom plans bring no benefit and are expensive to make.  A generic plan made while
# `steps` is small is kept, and must still look rows up by key once the table is large.  The cost settings therefore
# make a scan of the whole index look expensive.
_OPTIONS = (
    "-c plan_cache_mode=force_generic_plan -c enable_hashjoin=off -c enable_mergejoin=off -c enable_seqscan=off"
    " -c enable_bitmapscan=off -c cpu_index_tuple_cost=1 -c jit=off"
)
RETRIED = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
TRIES = 5


class HotPath:
    """A connection for `claim_and_finish`, opened when it is needed.  Thread-safe."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._connection: postgres.Connection | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def claim_and_finish(
        self,
        worker: Worker,
        keep: ClaimCapacity,
        *,
        claims: Sequence[int],
        finishes: Sequence[Finish],
        suspects: bool,
    ) -> TransitionResult:
        """See `Store.claim_and_finish`."""
        given = arguments(worker, keep, claims=claims, finishes=finishes, suspects=suspects)
        statement = CLAIM_AND_FINISH
        settled = settlements(finishes)
        if settled:
            statement, given = SETTLE_CLAIM_AND_FINISH, (json.dumps(settled), *given)
        doubtful = False
        with self._lock:
            for attempt in range(TRIES):
                try:
                    if self._connection is None or self._connection.closed:
                        self._connection = self._connect()
                    self._connection.ping()
                    rows = self._connection.execute(statement, given, prepare=True, binary=True).fetchall()
                    advance = decoded(rows)
                    advance.doubtful = doubtful
                    return advance
                except RETRIED:
                    continue
                except psycopg.OperationalError as error:
                    broken, self._connection = self._connection, None
                    if broken is not None:
                        broken.close()
                    doubtful = True
                    if attempt:
                        raise Unavailable(f"The database cannot be used: {error}") from error
        raise Unavailable("The database refused a transaction five times in a row (deadlock).")

    def _connect(self) -> postgres.Connection:
        return self.database.connect(options=_OPTIONS)
