"""Budgets in the database: reservations for calls, and the limits that operators set.

`Budgets` makes reservations (on PostgreSQL with one round trip, on a connection of its own).  `settling` does the part
that belongs to the transactions of the store.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy import Connection, Row, and_, case, exists, func, insert, literal_column, or_, select, true, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common import metrics
from gorgon_common.costs.budgets import (
    MICRO,
    Account,
    Balance,
    Budget,
    Shortage,
    micro_dollars,
    parse_period,
    parse_scope,
    token_count,
)
from gorgon_common.costs.ledger import Kind, Posting
from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.budget_store import Held
from gorgon_common.engine.context import Cache
from gorgon_common.engine.records import ROW_BITS, Claimed, RunInfo
from gorgon_common.errors import InputInvalid, Unavailable
from gorgon_common.logs import get_logger
from gorgon_common.persistence import budgets_sqlite, encoding, postgres
from gorgon_common.persistence.budget_commit import Ask, BudgetCommit, Facts
from gorgon_common.persistence.budgets_sqlite import OPEN, UNKNOWN, Key
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.lost_calls import store_calls
from gorgon_common.persistence.settling import balance_of, driver, set_limits, settle, tell
from gorgon_common.persistence.tables import (
    budget_periods,
    budgets,
    conversations,
    db_now,
    ledger,
    postings,
    reservations,
    runs,
)
from gorgon_common.persistence.untracked_calls import LOOK_SECONDS, Call, InFlight
from gorgon_common.scope import FIRST_ORG, SYSTEM, Scope

log = get_logger(__name__)

STANDING_SECONDS = 1.0
"""A new budget applies to calls that begin this long after it was set; a changed limit applies immediately."""
UNCHANGED: Any = object()
EXCHANGE = (
    "SELECT what, state, max_tokens, usd, tokens, period_id, usd_limit, usd_spent, usd_reserved, token_limit,"
    " token_spent, token_reserved, usd_claimed, token_claimed"
    " FROM gorgon_exchange(%b::jsonb, %b::jsonb, %b::float8) ORDER BY place"
)
_HELD, _KNOWN, _SHORT, _STALE = 1, 2, 3, 4
_TRIES = 5
_OPTIONS = "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off"
_ACCOUNTS_CACHED = 4096


class Budgets:
    """Makes reservations on accounts.  Thread-safe.

    `offset` shifts PostgreSQL's clock for periods, in seconds, so that tests can move into another period
    (`database.clock_offset` does this on SQLite).
    """

    def __init__(self, database: Database, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.database = database
        self._sleep = sleep
        self.offset = 0.0
        self._connection: postgres.Connection | None = None
        self._lock = threading.Lock()
        self._standing: tuple[Budget, ...] = ()
        self._read_at = -STANDING_SECONDS
        self._accounts: Cache[str, tuple[int, int | None, int | None]] = Cache(_ACCOUNTS_CACHED)
        self._skew = timedelta(0)
        self._used = False
        self._commit = BudgetCommit(self._exchange)
        self._in_flight = InFlight(self._hold)
        metrics.watch(self.measure)

    def close(self) -> None:
        """Report the budget alerts that have not been reported yet, and close the connection."""
        self._in_flight.close()
        metrics.unwatch(self.measure)
        if self._used:
            with contextlib.suppress(Unavailable), self.database.write() as connection:
                tell(connection)
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # Reservations

    def applying(self, info: RunInfo) -> Sequence[Budget]:
        """Return the budgets that count the calls of a run.  The list is at most a second old."""
        if time.monotonic() - self._read_at >= STANDING_SECONDS:
            self._standing = tuple(self._all())
            self._read_at = time.monotonic()
        return (
            [
                budget
                for budget in self._standing
                if budget.applies(org=info.org, team=info.team, workflow=info.workflow)
            ]
            if self._standing
            else ()
        )

    def reserve(
        self, key: Key, info: RunInfo, own: Sequence[Account], *, usd: int, tokens: int, max_tokens: int
    ) -> Held | Shortage:
        """Reserve an amount on every account of a call, leaf to root, or on none.

        `key`: (step, token, ordinal) of the call.  A second call with the same key returns the first reservation.
        `own`: the accounts of the run's file.  Raises Unavailable.
        """
        self._used = True
        for attempt in range(_TRIES):
            now = self.now()
            accounts = [*own, *(budget.account(target=info.target, root=info.root, now=now)
                                for budget in self.applying(info))]  # fmt: skip
            path = self._path(info.org, accounts)
            row = self._reserve(key, [period for period, _ in path], usd, tokens, max_tokens)
            if row[0] in (_HELD, _KNOWN):
                return Held(key, int(row[2]), int(row[3]), int(row[4]), is_open=row[1] == OPEN)
            if row[0] == _STALE:
                self._set_clock()
                continue
            account = next(account for period, account in path if period == row[5])
            balance = _balance_of_row(row)
            if balance.fits(usd, tokens) and attempt < _TRIES - 1:
                continue  # room was freed after the refusal
            return Shortage(account, balance, int(row[5]))
        raise Unavailable(
            "The database's clock gives a different day each time it is read.", hint="Check the clock of its machine."
        )

    def look(self, info: RunInfo, own: Sequence[Account]) -> list[Shortage]:
        """Return every account of a run's call with its balance, in the form of a shortage."""
        now = self.now()
        accounts = [*own, *(budget.account(target=info.target, root=info.root, now=now)
                            for budget in self.applying(info))]  # fmt: skip
        path = self._path(info.org, accounts)
        with self.database.read() as connection:
            rows = {
                row.id: row
                for row in connection.execute(
                    select(budget_periods).where(budget_periods.c.id.in_([period for period, _ in path]))
                )
            }
        return [Shortage(account, balance_of(rows[period]), period) for period, account in path]

    def settle(self, facts: Sequence[Mapping[str, Any]]) -> None:
        """Post the outcomes of calls in a separate transaction; see `encoding.settlements`.  Raises Unavailable."""
        if not self.database.sqlite:
            self._commit.do(None, facts)
            return
        with self.database.write() as connection:
            settle(connection, facts)

    # Calls that no budget counts

    def note(self, key: Key, info: RunInfo, bound: Callable[[], tuple[int, int, int]]) -> None:
        """Record that a call begins which no budget counts.

        If a budget that counts it is set before the call ends, `bound()` is reserved on that budget: (micro-dollars,
        tokens, longest reply).
        """
        self._in_flight.note(Call(key, info, bound))

    def over(self, key: Key) -> bool:
        """Record that a noted call has ended; return whether an amount was reserved for it meanwhile."""
        return self._in_flight.over(key)

    def unknown(self, key: Key, bound: tuple[int, int, int]) -> None:
        """Record a finished call that no budget counted and whose cost is unknown; later budgets count its bound.

        `bound`: (micro-dollars, tokens, longest reply).  Idempotent.  Raises Unavailable.
        """
        dialect = sqlite if self.database.sqlite else postgresql
        (step, token, ordinal), (usd, tokens, longest) = key, bound
        with self.database.write() as connection:
            connection.execute(
                dialect.insert(reservations)
                .values(
                    step_id=step,
                    token=token,
                    ordinal=ordinal,
                    at=db_now(0 if self.database.sqlite else self.offset),
                    state=UNKNOWN,
                    usd=usd,
                    tokens=tokens,
                    max_tokens=longest,
                    usd_posted=usd,
                    tokens_posted=tokens,
                    accounts=[],
                )
                .on_conflict_do_nothing()
            )

    def _hold(self, call: Call) -> bool:
        """Reserve for a call in flight on the budgets that count it now, whether or not they have room."""
        if time.monotonic() - self._read_at >= LOOK_SECONDS:
            self._read_at = -STANDING_SECONDS
        found = self.applying(call.info)
        if not found:
            return False
        now = self.now()
        mine = [budget.account(target=call.info.target, root=call.info.root, now=now) for budget in found]
        path = self._path(call.info.org, mine)
        usd, tokens, longest = call.bound()
        step, token, ordinal = call.key
        with self.database.write() as connection:
            connection.execute(
                insert(reservations).values(
                    step_id=step,
                    token=token,
                    ordinal=ordinal,
                    at=db_now(0 if self.database.sqlite else self.offset),
                    state=OPEN,
                    usd=usd,
                    tokens=tokens,
                    max_tokens=longest,
                    accounts=[period for period, _ in path],
                )
            )
            for period, _ in path:
                self._post(connection, period, Kind.RESERVE, usd, tokens, call.key)
        return True

    # Conversations that are paid for

    def keep(self, step: Claimed, calls: Sequence[CallRecord], body: str) -> None:
        """Store a step's conversation and its cost so far, so that nothing in it is paid for twice.

        `calls` are facts; a finish may name the same calls again.  Raises Unavailable.
        """
        dialect = sqlite if self.database.sqlite else postgresql
        values = {"body": body, "at": db_now()}
        with self.database.write() as connection:
            self._record(connection, step, calls)
            connection.execute(
                dialect.insert(conversations)
                .values(step_id=step.id, **values)
                .on_conflict_do_update(index_elements=["step_id"], set_=values)
            )

    def record(self, step: Claimed, calls: Sequence[CallRecord]) -> None:
        """Store the cost of a claim's calls so far; a finish may name the same calls again.  Raises Unavailable."""
        with self.database.write() as connection:
            self._record(connection, step, calls)

    @staticmethod
    def _record(connection: Connection, step: Claimed, calls: Sequence[CallRecord]) -> None:
        settle(connection, encoding.settlements(step, calls))
        store_calls(connection, encoding.calls(step, calls, step.attempt, datetime.now(UTC)))

    def kept(self, step: Claimed) -> str | None:
        """Return what `keep` has stored for a step.  Raises Unavailable."""
        with self.database.read() as connection:
            return connection.scalar(select(conversations.c.body).where(conversations.c.step_id == step.id))

    def now(self) -> datetime:
        """Return the time that decides when periods begin and end, as estimated here; the database's clock decides."""
        if self.database.sqlite:
            return self.database.now()
        return datetime.now(UTC) + self._skew + timedelta(seconds=self.offset)

    def _set_clock(self) -> None:
        """Measure the offset of the database's clock, which is authoritative."""
        if not self.database.sqlite:
            with self.database.read() as connection:
                now = connection.execute(select(func.clock_timestamp())).scalar_one()
            self._skew = now - datetime.now(UTC)

    def _path(self, org: int, accounts: Sequence[Account]) -> list[tuple[int, Account]]:
        """Return the accounts that have a limit, with their ids, in lock order."""
        wanted = [account for account in accounts if account.usd is not None or account.tokens is not None]
        found: list[tuple[int, Account]] = []
        missing: list[Account] = []
        for account in wanted:
            known = self._accounts.get(account.key)
            if known is not None and (account.budget is not None or known[1:] == (account.usd, account.tokens)):
                found.append((known[0], account))
            else:
                missing.append(account)
        if missing:
            opened = []
            with self.database.write() as connection:
                for account in sorted(missing, key=lambda entry: (-entry.level, entry.key)):
                    opened.append((self._opened(connection, account, org=org), account))
            for period, account in opened:  # committed: other threads may now use the id
                self._accounts.put(account.key, (period, account.usd, account.tokens))
            found += opened
        return sorted(found, key=lambda entry: (-entry[1].level, entry[0]))

    def _opened(self, connection: Connection, account: Account, *, org: int = FIRST_ORG) -> int:
        """Return an account's id with the current limits applied; create the account if it does not exist."""
        usd, tokens = account.usd, account.tokens
        if account.budget is not None:  # the budget may have changed since it was read
            usd, tokens, org = connection.execute(
                select(budgets.c.usd_limit, budgets.c.token_limit, budgets.c.org_id)
                .where(budgets.c.id == account.budget)
                .with_for_update(read=True)
            ).one()
        dialect = sqlite if self.database.sqlite else postgresql
        made = connection.execute(
            dialect.insert(budget_periods)
            .values(
                key=account.key,
                org_id=org,
                budget_id=account.budget,
                level=account.level,
                label=account.label[:400],
                starts_at=account.starts,
                ends_at=account.ends,
                usd_limit=usd,
                usd_wall=usd,
                token_limit=tokens,
                token_wall=tokens,
            )
            .on_conflict_do_nothing(index_elements=["key"])
        )
        row = connection.execute(
            select(budget_periods.c.id, budget_periods.c.usd_limit, budget_periods.c.token_limit).where(
                budget_periods.c.key == account.key
            )
        ).one()
        if made.rowcount and account.budget is not None and account.starts is None:
            self._cover(connection, row.id, int(account.key.rpartition(" ")[2]))
        if account.budget is None and (row.usd_limit, row.token_limit) != (usd, tokens):
            set_limits(connection, [row.id], usd, tokens)
        return int(row.id)

    def _reserve(self, key: Key, path: Sequence[int], usd: int, tokens: int, max_tokens: int) -> tuple[Any, ...]:
        if self.database.sqlite:
            with self.database.write() as connection:
                return budgets_sqlite.reserve(driver(connection), key, path, usd, tokens, max_tokens)
        return self._commit.do((key, path, usd, tokens, max_tokens))

    def _exchange(self, asks: Sequence[Ask], facts: Facts) -> list[tuple[Any, ...]]:
        said = json.dumps(list(facts)) if facts else None
        if not asks:
            self._call("SELECT gorgon_settle(%b::jsonb)", (said,))
            return []
        return self._call(EXCHANGE, (said, asked(asks), self.offset))

    def _call(self, statement: str, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Call a function of PostgreSQL: one transaction and one round trip.  Raises Unavailable."""
        with self._lock:
            for attempt in range(_TRIES):
                try:
                    if self._connection is None or self._connection.closed:
                        self._connection = self.database.connect(options=_OPTIONS)
                    self._connection.ping()
                    return self._connection.execute(statement, arguments, prepare=True, binary=True).fetchall()
                except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                    continue
                except psycopg.OperationalError as error:
                    broken, self._connection = self._connection, None
                    if broken is not None:
                        broken.close()  # the reply may be lost; repeating the call is idempotent
                    if attempt:
                        raise Unavailable(f"The database cannot be used: {error}") from error
        raise Unavailable("The database refused a transaction five times in a row (deadlock).")

    # What operators set

    def change(
        self,
        scope: str,
        *,
        period: str,
        timezone: str | None = None,
        usd: Any = UNCHANGED,
        tokens: Any = UNCHANGED,
        caller: Scope = SYSTEM,
    ) -> dict[str, Any]:
        """Set a budget from a person's input: dollars, tokens, or None for no limit; UNCHANGED keeps a value.

        When this returns (after a second if the budget is new), the budget applies to every call that begins, and the
        possible cost of the calls in flight is reserved on it.  Raises InputInvalid.
        """
        key = (*parse_scope(scope), period)
        known = {(entry.scope, entry.name, entry.period): entry for entry in self._of(caller)}
        before = known.get(key)
        limit, count = (before.usd, before.tokens) if before else (None, None)
        if usd is not UNCHANGED:
            limit = None if usd is None else micro_dollars(usd)
        if tokens is not UNCHANGED:
            count = None if tokens is None else token_count(tokens)
        if before is None and limit is None and count is None:
            raise InputInvalid("A budget needs a limit.", hint="Give it --usd, --tokens or both.")
        zone = timezone or (before.timezone if before else "UTC")
        made = self.set(scope, period=period, timezone=zone, usd=limit, tokens=count, caller=caller)
        if before is None or (before.usd is None and before.tokens is None):
            self._sleep(STANDING_SECONDS)  # by then, every worker has seen the new budget
            self.catch_up(made)
        return _described(made)

    def set(
        self,
        scope: str,
        *,
        period: str = "month",
        timezone: str = "UTC",
        usd: int | None,
        tokens: int | None,
        caller: Scope = SYSTEM,
    ) -> Budget:
        """Set or change a budget.  With both limits None, it limits nothing.  `usd` in micro-dollars.

        `scope`: org, team:NAME or workflow:NAME, of the organisation of `caller`.  A limit for the current day or
        month includes what was already spent in it.  Raises InputInvalid.
        """
        kind, name = parse_scope(scope)
        parse_period(period, timezone)
        values = {"scope": kind, "name": name, "period": period, "timezone": timezone, "updated_at": db_now()}
        limits = {"usd_limit": usd, "token_limit": tokens}
        dialect = sqlite if self.database.sqlite else postgresql
        with self.database.write(caller) as connection:
            row = connection.execute(
                dialect.insert(budgets)
                .values(**values, **limits, org_id=caller.org)
                .on_conflict_do_update(
                    index_elements=["org_id", "scope", "name", "period"],
                    set_={**limits, "timezone": timezone, "updated_at": db_now()},
                )
                .returning(budgets)
            ).one()
            budget = _budget(row)
            if usd is not None or tokens is not None:
                self._catch_up(connection, budget)
            present = connection.scalars(
                select(budget_periods.c.id)
                .where(
                    budget_periods.c.budget_id == budget.id,
                    or_(budget_periods.c.ends_at.is_(None), budget_periods.c.ends_at > self._clause_now()),
                )
                .order_by(budget_periods.c.id)
            ).all()
            set_limits(connection, present, usd, tokens)
        self._read_at = -STANDING_SECONDS
        return budget

    def _clause_now(self) -> Any:
        return db_now(0 if self.database.sqlite else self.offset)

    def catch_up(self, budget: Budget) -> None:
        """Add missing amounts to a budget's current accounts: those of calls that began before the budget was known."""
        with self.database.write() as connection:
            self._catch_up(connection, budget)

    def _catch_up(self, connection: Connection, budget: Budget) -> None:
        if budget.period == "run":  # accounts of other runs are opened by their next call
            flying = select(runs.c.root_id, runs.c.target).distinct().select_from(
                reservations.join(runs, runs.c.id == _run_of(reservations.c.step_id))
            ).where(reservations.c.state == OPEN, *_counted(budget))  # fmt: skip
            for root, target in connection.execute(flying).all():
                opened = self._opened(connection, budget.account(target=target, root=root, now=self.now()))
                self._cover(connection, opened, root)
            return
        for target in ("live", "sandbox"):
            account = budget.account(target=target, root=0, now=self.now())
            dialect = sqlite if self.database.sqlite else postgresql
            connection.execute(
                dialect.insert(budget_periods)
                .values(
                    key=account.key,
                    org_id=budget.org,
                    budget_id=budget.id,
                    level=account.level,
                    label=account.label[:400],
                    starts_at=account.starts,
                    ends_at=account.ends,
                )
                .on_conflict_do_nothing(index_elements=["key"])
            )
            period = connection.scalar(select(budget_periods.c.id).where(budget_periods.c.key == account.key))
            assert period is not None
            counted = [runs.c.target == target, *_counted(budget)]
            self._adopt(connection, period, counted, account.starts)
            self._open(
                connection,
                period,
                [ledger.c.at >= account.starts, ledger.c.at < account.ends, *counted],
                [reservations.c.at >= account.starts, reservations.c.at < account.ends, *counted],
            )

    def _cover(self, connection: Connection, period: int, root: int) -> None:
        """Add to the account of a run what the run spent and reserved before the account existed."""
        counted = [runs.c.id >= root, runs.c.root_id == root]
        first = root << ROW_BITS
        self._adopt(connection, period, counted, datetime.fromtimestamp(0, UTC))
        self._open(
            connection,
            period,
            [ledger.c.step_id >= first, *counted],
            [reservations.c.step_id >= first, *counted],
        )

    def _adopt(self, connection: Connection, period: int, within: Sequence[Any], starts: datetime | None) -> None:
        """Reserve on an account what calls in flight have reserved on other accounts."""
        rows = connection.execute(
            select(reservations)
            .select_from(reservations.join(runs, runs.c.id == _run_of(reservations.c.step_id)))
            .where(reservations.c.state == OPEN, reservations.c.at >= starts, *within)
            .order_by(reservations.c.step_id, reservations.c.token, reservations.c.ordinal)
            .with_for_update(of=reservations)
        ).all()
        for row in rows:
            if period not in row.accounts:
                connection.execute(
                    update(reservations)
                    .where(
                        reservations.c.step_id == row.step_id,
                        reservations.c.token == row.token,
                        reservations.c.ordinal == row.ordinal,
                    )
                    .values(accounts=[*row.accounts, period])
                )
                self._post(connection, period, Kind.RESERVE, row.usd, row.tokens, (row.step_id, row.token, row.ordinal))

    def _open(self, connection: Connection, period: int, within: Sequence[Any], unknown: Sequence[Any]) -> None:
        """Post the cost of calls that have no reservation on this account.

        `within` selects calls of the ledger.  `unknown` selects reservations of calls whose cost is unknown; these are
        posted in full.
        """
        reserved = select(reservations.c.step_id).where(
            reservations.c.step_id == ledger.c.step_id,
            reservations.c.token == ledger.c.token,
            reservations.c.ordinal == ledger.c.ordinal,
            self._has(reservations.c.accounts, period),
        )
        spent = connection.execute(
            select(
                func.coalesce(func.sum(ledger.c.cost_micro), 0),
                func.coalesce(func.sum(ledger.c.input_tokens + ledger.c.output_tokens), 0),
            )
            .select_from(ledger.join(runs, runs.c.id == _run_of(ledger.c.step_id)))
            .where(*within, ~reserved.exists())
        ).one()
        same_call = and_(
            ledger.c.step_id == reservations.c.step_id,
            ledger.c.token == reservations.c.token,
            ledger.c.ordinal == reservations.c.ordinal,
        )
        counted = func.coalesce(ledger.c.input_tokens + ledger.c.output_tokens, 0)
        in_full = connection.execute(
            select(
                func.coalesce(func.sum(case((ledger.c.cost_micro.is_(None), reservations.c.usd_posted), else_=0)), 0),
                func.coalesce(func.sum(case((counted == 0, reservations.c.tokens_posted), else_=0)), 0),
            )
            .select_from(
                reservations.join(runs, runs.c.id == _run_of(reservations.c.step_id)).outerjoin(ledger, same_call)
            )
            .where(reservations.c.state == UNKNOWN, ~self._has(reservations.c.accounts, period), *unknown)
        ).one()
        known = connection.execute(
            select(
                func.coalesce(func.sum(postings.c.usd_spent), 0), func.coalesce(func.sum(postings.c.token_spent), 0)
            ).where(postings.c.period_id == period, postings.c.kind == int(Kind.OPENING))
        ).one()
        usd = int(spent[0]) + int(in_full[0]) - int(known[0])
        tokens = int(spent[1]) + int(in_full[1]) - int(known[1])
        if usd or tokens:
            self._post(connection, period, Kind.OPENING, usd, tokens)

    def _has(self, accounts: Any, period: int) -> Any:
        if self.database.sqlite:
            return exists(select(literal_column("1")).select_from(func.json_each(accounts).table_valued("value")).where(
                literal_column("value") == period))  # fmt: skip
        return accounts.contains([period])

    @staticmethod
    def _post(connection: Connection, period: int, kind: Kind, usd: int, tokens: int, key: Key | None = None) -> None:
        """Change an account without a check for room; raise its wall if necessary."""
        reserved, spent = ((usd, tokens), (0, 0)) if kind is Kind.RESERVE else ((0, 0), (usd, tokens))
        table = budget_periods.c
        connection.execute(
            update(budget_periods)
            .where(table.id == period)
            .values(
                usd_reserved=table.usd_reserved + reserved[0],
                usd_spent=table.usd_spent + spent[0],
                usd_wall=_higher(table.usd_wall, table.usd_spent + table.usd_reserved + usd),
                token_reserved=table.token_reserved + reserved[1],
                token_spent=table.token_spent + spent[1],
                token_wall=_higher(table.token_wall, table.token_spent + table.token_reserved + tokens),
            )
        )
        step, token, ordinal = key or (None, None, None)
        connection.execute(
            insert(postings).values(
                period_id=period,
                step_id=step,
                token=token,
                ordinal=ordinal,
                kind=int(kind),
                usd_reserved=reserved[0],
                usd_spent=spent[0],
                usd_overrun=0,
                token_reserved=reserved[1],
                token_spent=spent[1],
                token_overrun=0,
                at=db_now(),
            )
        )

    def listing(self, scope: Scope | None = SYSTEM) -> list[dict[str, Any]]:
        """Return an organisation's budgets that have a limit, each with its accounts of the current period.

        Without a scope, those of every organisation.

        `{scope, name, period, timezone, usd_limit, token_limit, accounts: [{label, target, starts_at, ends_at,
        usd_spent, usd_reserved, usd_overrun, token_spent, …}]}`; amounts in micro-dollars.
        """
        found = []
        now = self.now()
        with self.database.read(scope or SYSTEM) as connection:
            for row in connection.execute(
                select(budgets)
                .where(true() if scope is None else budgets.c.org_id == scope.org)
                .where(or_(budgets.c.usd_limit.is_not(None), budgets.c.token_limit.is_not(None)))
                .order_by(budgets.c.scope, budgets.c.name, budgets.c.period)
            ).all():
                budget = _budget(row)
                targets = ("live", "sandbox") if budget.period != "run" else ()
                keys = {budget.account(target=target, root=0, now=now).key: target for target in targets}
                periods = connection.execute(
                    select(budget_periods).where(budget_periods.c.key.in_(list(keys))).order_by(budget_periods.c.key)
                ).all()
                found.append(
                    {**_described(budget), "accounts": [_account(entry, keys[entry.key]) for entry in periods]}
                )
        return found

    def measure(self) -> None:
        """Set the gauges of budgets, for `metrics.watch`.  If the database is unreachable, they keep their values."""
        try:
            found = self.listing(None)
        except Unavailable as error:
            log.warning("budgets could not be measured", error=error.message)
            return
        for metric in (metrics.BUDGET_USD, metrics.BUDGET_TOKENS):
            metric.clear()
        for entry in found:
            for account in entry["accounts"]:
                about = {
                    "budget": f"{entry['scope']} {entry['name']}".strip(),
                    "per": entry["period"],
                    "target": account["target"],
                }
                for metric, unit, scale in (
                    (metrics.BUDGET_USD, "usd", MICRO),
                    (metrics.BUDGET_TOKENS, "token", 1),
                ):
                    if entry[f"{unit}_limit"] is not None:
                        amounts = {"limit": entry[f"{unit}_limit"]}
                        amounts |= {name: account[f"{unit}_{name}"] for name in ("spent", "reserved")}
                        for name, amount in amounts.items():
                            metric.set(amount / scale, **about, **{"is": name})

    def _all(self) -> list[Budget]:
        """Return the budgets of every organisation that limit something."""
        limited = or_(budgets.c.usd_limit.is_not(None), budgets.c.token_limit.is_not(None))
        with self.database.read() as connection:
            return [_budget(row) for row in connection.execute(select(budgets).where(limited).order_by(budgets.c.id))]

    def _of(self, caller: Scope) -> list[Budget]:
        """Return the budgets of an organisation, those without a limit included."""
        query = select(budgets).where(budgets.c.org_id == caller.org).order_by(budgets.c.id)
        with self.database.read(caller) as connection:
            return [_budget(row) for row in connection.execute(query)]

    # For tests

    def balances(self) -> dict[int, Balance]:
        """Return the balance of every account."""
        with self.database.read() as connection:
            return {row.id: balance_of(row) for row in connection.execute(select(budget_periods))}

    def postings(self) -> list[Posting]:
        """Return all postings, oldest first."""
        with self.database.read() as connection:
            return [
                Posting(
                    row.period_id,
                    Kind(row.kind),
                    row.usd_reserved,
                    row.usd_spent,
                    row.usd_overrun,
                    row.token_reserved,
                    row.token_spent,
                    row.token_overrun,
                )
                for row in connection.execute(select(postings).order_by(postings.c.seq))
            ]


def asked(asks: Sequence[Ask]) -> str:
    """Return requests for reservations in the form that `gorgon_exchange` takes."""
    return json.dumps(
        [
            {
                "place": place,
                "step_id": step,
                "token": token,
                "ordinal": ordinal,
                "accounts": list(path),
                "usd": usd,
                "tokens": tokens,
                "max_tokens": longest,
            }
            for place, ((step, token, ordinal), path, usd, tokens, longest) in enumerate(asks)
        ]
    )


def _counted(budget: Budget) -> list[Any]:
    """Return the conditions that select the runs that a budget counts."""
    mine = [runs.c.org_id == budget.org]
    if budget.scope == "org":
        return mine
    return [*mine, (runs.c.team if budget.scope == "team" else runs.c.workflow) == budget.name]


def _run_of(step: Any) -> Any:
    return step.op(">>")(literal_column(str(ROW_BITS)))


def _higher(wall: Any, taken: Any) -> Any:
    """Return a wall (NULL: none) that is at least as high as `taken`."""
    return case((wall < taken, taken), else_=wall)


def _budget(row: Row[Any]) -> Budget:
    return Budget(row.id, row.scope, row.name, row.period, row.timezone, row.usd_limit, row.token_limit, row.org_id)


def _balance_of_row(row: Sequence[Any]) -> Balance:
    """Return the balance in a row of `gorgon_exchange`."""
    return Balance(row[6], row[7], row[8], 0, row[9], row[10], row[11], 0, row[12], row[13])


def _described(budget: Budget) -> dict[str, Any]:
    return {
        "scope": budget.scope,
        "name": budget.name,
        "period": budget.period,
        "timezone": budget.timezone,
        "usd_limit": budget.usd,
        "token_limit": budget.tokens,
    }


def _account(row: Row[Any], target: str) -> dict[str, Any]:
    balance = balance_of(row)
    return {
        "label": row.label,
        "target": target,
        "starts_at": _when(row.starts_at),
        "ends_at": _when(row.ends_at),
        "usd_spent": balance.usd_spent,
        "usd_reserved": balance.usd_reserved,
        "usd_overrun": balance.usd_overrun,
        "token_spent": balance.token_spent,
        "token_reserved": balance.token_reserved,
        "token_overrun": balance.token_overrun,
    }


def _when(moment: datetime | None) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
