"""All tables.  Each has `org_id`, the organisation.

It is set, and part of each key that holds a name, where rows belong to no run: plans, runs, concurrency keys, fair
shares, budgets with their accounts and alerts.  What belongs to a run (its steps, events, ledger, …) is identified by
the run's number, and the run's row says whose it is.

`steps` is narrow and has no index except its key, so that every update can stay on its page (HOT): a step is updated
three times in its life.  The result of a finished step is written once, to `checkpoints`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import TypeDecorator

SQLITE_TIME = "%Y-%m-%d %H:%M:%S.%f"
"""How times are stored on SQLite: UTC text that sorts chronologically."""


class UtcTime(TypeDecorator[datetime]):
    """`timestamptz` on PostgreSQL, text in UTC on SQLite; always an aware datetime in Python."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; SQLite stores no time zone."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return an aware datetime."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class db_now(ColumnElement[datetime]):
    """The database's clock, plus `seconds`.  Leases and due times are only ever compared with this clock."""

    inherit_cache = True
    type = UtcTime()
    _traverse_internals = [("seconds", InternalTraversal.dp_clauseelement)]  # noqa: RUF012

    def __init__(self, seconds: float = 0.0) -> None:
        # A bound parameter: as a literal, each duration would be a different statement to compile, prepare and keep.
        self.seconds = literal(float(seconds))


@compiles(db_now, "postgresql")
def _now_postgresql(element: db_now, compiler: Any, **options: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.seconds, **options)}))"


@compiles(db_now, "sqlite")
def _now_sqlite(element: db_now, compiler: Any, **options: Any) -> str:
    return f"gorgon_now({compiler.process(element.seconds, **options)})"


BigKey = BigInteger().with_variant(Integer, "sqlite")  # SQLite only autoincrements INTEGER keys
metadata = MetaData(
    naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s"}
)


def _org(*, key: bool = False) -> Column[int]:
    return Column("org_id", Integer, nullable=False, server_default="1", primary_key=key, autoincrement=False)


plans = Table(
    "plans",
    metadata,
    _org(key=True),
    Column("hash", String(64), primary_key=True),
    Column("body", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("public_id", String(40), nullable=False, unique=True),
    Column("team", String(100), nullable=False),
    Column("workflow", String(200), nullable=False),
    Column("plan_hash", String(64), nullable=False),
    Column("inputs", Text, nullable=False),
    Column("target", String(20), nullable=False),
    Column("home", String(100), nullable=False, server_default=""),
    Column("root_id", BigInteger, nullable=False),
    Column("resumed_from", BigInteger),
    Column("status", SmallInteger, nullable=False),
    Column("active", Boolean, nullable=False),
    Column("cancelled", Boolean, nullable=False),
    Column("next_row", Integer, nullable=False),
    Column("idempotency_key", String(200)),
    Column("request_hash", String(64)),
    Column("outputs", Text),
    Column("error", Text),
    Column("created_at", UtcTime, nullable=False),
    Column("deadline", UtcTime),
    Column("started_at", UtcTime),
    Column("finished_at", UtcTime),
    Column("key_id", BigInteger),
    Column("key_at", UtcTime),
    Column("max_parallel", Integer),
    Column("trace_id", String(32)),
    Column("actor", String(200)),
    UniqueConstraint("org_id", "idempotency_key"),
    Index("ix_runs_org_id_id", "org_id", "id"),
    Index("ix_runs_live", "status"),
)
"""`active`: steps of the run may be claimed.  `cancelled`: cancellation was requested.
`key_id`: its concurrency key, NULL if it has none; `key_at`: when it got the key.
`max_parallel`: how many of its slow steps may run at a time, NULL for any number.
`trace_id`: the trace that it belongs to (W3C Trace Context); NULL for runs of older versions.
`actor`: who asked for it, see `Scope`; NULL for runs of older versions.
"""

run_slots = Table(
    "run_slots",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("holders", Text, nullable=False),
)
"""One row for each unfinished run with `max_parallel`; it is locked while steps of the run are claimed.

`holders`: JSON list of the steps that were claimed last.  A step that is no longer running does not count, so code that
ends or stops a step has nothing to update here.
"""

run_events = Table(
    "run_events",
    metadata,
    Column("id", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("run_id", BigInteger, nullable=False),
    Column("name", String(200), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("data", Text, nullable=False),
    Column("step_id", BigInteger),
    Index("ix_run_events_run_id_name", "run_id", "name"),
)
"""Events that were sent to runs.  `step_id`: the step that has taken it."""

event_waits = Table(
    "event_waits",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("run_id", BigInteger, nullable=False),
    Column("name", String(200), nullable=False),
    Index("ix_event_waits_run_id", "run_id"),
)
"""What the steps that wait for an event wait for."""

held_steps = Table(
    "held_steps",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
)
"""Ready steps that wait until fewer steps of their run are in progress."""

concurrency_keys = Table(
    "concurrency_keys",
    metadata,
    Column("id", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("target", String(20), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("shown", String(200), nullable=False),
    UniqueConstraint("org_id", "target", "digest"),
)
"""A key that an unfinished run holds or waits for.  The row is locked while the holders are decided.

`digest`: sha256 of the key, which may be long; `shown`: its beginning.
"""

concurrency_places = Table(
    "concurrency_places",
    metadata,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("key_id", BigInteger, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("most", Integer, nullable=False),
    Column("on_conflict", String(20), nullable=False),
    Column("timeout", Float(53)),
    Index("ix_concurrency_places_key", "key_id", "run_id"),
)
"""The place of an unfinished run at its key; deleted when the run ends.  Runs at one key are ordered by their ids.

`state`: see `concurrency.Place`.  `most`: how many runs may hold the key if this run is to start.  `timeout`: the run's
timeout in seconds, which starts when the run gets the key.
"""

steps = Table(
    "steps",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("due", UtcTime),
    Column("org_id", Integer, nullable=False, server_default="1"),
    Column("token", Integer, nullable=False),
    Column("owner", Integer),
    Column("node", Integer, nullable=False),
    Column("deps_left", Integer, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("attempt", SmallInteger, nullable=False),
    Column("crashes", SmallInteger, nullable=False),
    Column("weight", SmallInteger, nullable=False),
    Column("queue", SmallInteger, nullable=False),
    Column("grouped", Boolean, nullable=False),
    Column("carried", Boolean, nullable=False),
    Column("halted", Boolean, nullable=False, server_default="0"),
    Column("unmet", Boolean, nullable=False, server_default="0"),
    Column("parent", Integer),
    Column("position", Integer),
    Column("window_next", Integer),
    Column("window_end", Integer),
    Column("successors", ARRAY(Integer).with_variant(JSON, "sqlite"), nullable=False),
    postgresql_with={"fillfactor": 70},
)
"""`due`: for a ready step, when its message counts as lost; for a waiting step, when it wakes; for a running step, when
it was claimed.
`carried`: a canvas in flight sends this step's message when it becomes ready.
`halted`: the step was running when its run (or group) was stopped; it may finish, but neither expand nor wait.
`unmet`: a dependency of the step has ended without success.  Only then does its join have to be evaluated.
`parent`, `successors`, `window_*`: rows of the same run.  A windowed composite releases row `window_next` for each
child that finishes, up to `window_end`.
"""

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("status", SmallInteger, nullable=False),
    Column("attempts", SmallInteger, nullable=False),
    Column("started_at", UtcTime),
    Column("finished_at", UtcTime),
    Column("output", Text),
    Column("detail", Text),
)
"""`output`: JSON, or NULL if it is in `blobs`.  `detail`: JSON of error, reason, provider, model, …; NULL if empty."""

blobs = Table(
    "blobs",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("body", Text, nullable=False),
)

fingerprints = Table(
    "fingerprints",
    metadata,
    Column("root_id", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", String(64), primary_key=True),
    _org(),
    Column("step_id", BigInteger, nullable=False),
)
"""Finished steps of a run and its resumes: a step whose fingerprint is here is adopted, not paid for again."""

expansions = Table(
    "expansions",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    Column("round", Integer, primary_key=True, autoincrement=False),
    _org(),
    Column("phase", String(10), nullable=False),
    Column("base", Integer, nullable=False),
    Column("count", Integer, nullable=False),
    Column("reduce", Integer),
    Column("items", Text),
)

ledger = Table(
    "ledger",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    Column("token", Integer, primary_key=True, autoincrement=False),
    Column("ordinal", SmallInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("at", UtcTime, nullable=False),
    Column("provider", String(40), nullable=False),
    Column("model", String(200), nullable=False),
    Column("role", String(100)),
    Column("attempt", SmallInteger, nullable=False),
    Column("input_tokens", Integer, nullable=False),
    Column("cache_read_tokens", Integer, nullable=False),
    Column("cache_write_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("reasoning_tokens", Integer, nullable=False),
    Column("cost_micro", BigInteger),
    Column("price_version", String(60)),
    Column("latency_ms", Integer, nullable=False),
    Column("outcome", String(40), nullable=False),
    Column("request_id", String(200)),
    Index("ix_ledger_at", "at", postgresql_using="brin"),
)
"""One row per call.  A fact: it is kept whether or not the step's claim still held.  `cost_micro` NULL: no known price.

Rows are inserted in order of time.  On PostgreSQL, a block range index can therefore find a month, and adds no cost to
an insert.
"""

events = Table(
    "events",
    metadata,
    Column("seq", BigKey, primary_key=True, autoincrement=True),
    Column("run_id", BigInteger, nullable=False),
    Column("row", Integer),
    _org(),
    Column("kind", String(30), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("message", Text),
    Column("data", Text),
    Index("ix_events_run", "run_id", "seq"),
)
"""The journal.  `data`: JSON for machines; for a step that waits, {why, seconds}."""

workers = Table(
    "workers",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    _org(),
    Column("name", String(200), nullable=False),
    Column("target", String(20), nullable=False),
    Column("home", String(100), nullable=False),
    Column("queues", String(200), nullable=False),
    Column("slots", Integer, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("lease_until", UtcTime, nullable=False),
    Column("beat_at", UtcTime),
    Column("reaped", Boolean, nullable=False),
    Column("retired", Boolean, nullable=False, server_default="0"),
    Column("watermarks", Text),
)
"""`beat_at`: time of the last heartbeat.  `reaped`: its lease had expired and its steps were taken from it; it claims
nothing until its next heartbeat.  `retired`: it shut down by itself.

A worker may claim while its lease is valid.  Its steps are taken back once the lease has expired, whatever these flags
say.
"""

step_deaths = Table(
    "step_deaths",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    Column("token", Integer, primary_key=True, autoincrement=False),
    _org(),
    Column("at", UtcTime, nullable=False),
    Column("owner", Integer),
    Column("chance", Float(53), nullable=False),
    Column("alone", Boolean, nullable=False),
    Column("why", Text),
)
"""Worker deaths for which a step was blamed; see `engine.poison.Death`.  `why`: what broke, if the worker survived."""

backlog = Table(
    "backlog",
    metadata,
    Column("queue", SmallInteger, primary_key=True, autoincrement=False),
    Column("rank", BigInteger, primary_key=True, autoincrement=False),
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
)
"""Ready steps for which the broker has no room yet, in fair order; recovered steps have rank -1."""

shares = Table(
    "shares",
    metadata,
    _org(key=True),
    Column("queue", SmallInteger, primary_key=True, autoincrement=False),
    Column("team", String(100), primary_key=True),
    Column("next_rank", BigInteger, nullable=False),
)
"""The position of each team in the fair order of a queue (start-time fair queueing)."""

leaders = Table(
    "leaders",
    metadata,
    Column("name", String(40), primary_key=True),
    _org(),
    Column("owner", String(80), nullable=False),
    Column("until", UtcTime, nullable=False),
)

recorded_calls = Table(
    "recorded_calls",
    metadata,
    Column("id", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("at", UtcTime, nullable=False),
    Column("team", String(100), nullable=False),
    Column("workflow", String(200), nullable=False),
    Column("run", String(200)),
    Column("step", String(200)),
    Column("provider", String(40), nullable=False),
    Column("model", String(200), nullable=False),
    Column("role", String(100)),
    Column("input_tokens", Integer, nullable=False),
    Column("cache_read_tokens", Integer, nullable=False),
    Column("cache_write_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("reasoning_tokens", Integer, nullable=False),
    Column("cost_micro", BigInteger),
    Column("price_version", String(60)),
    Column("latency_ms", Integer),
    Column("outcome", String(40), nullable=False),
    Index("ix_recorded_calls_at", "at"),
)
"""Calls that were made outside of runs and reported with `costs.tracker`; reports show them beside the ledger."""

token_ratios = Table(
    "token_ratios",
    metadata,
    Column("target", String(20), primary_key=True),
    Column("provider", String(40), primary_key=True),
    Column("model", String(200), primary_key=True),
    _org(),
    Column("calls", BigInteger, nullable=False),
    Column("log_ratio", Float(53), nullable=False),
    Column("log_square", Float(53), nullable=False),
    Column("updated_at", UtcTime, nullable=False),
)
"""How far the offline token estimate is from the providers' counts: sums of ln(actual / estimate) and of its square.
The sandbox counts differently, so its calls say nothing about live ones.
"""

budgets = Table(
    "budgets",
    metadata,
    Column("id", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("scope", String(20), nullable=False),
    Column("name", String(200), nullable=False),
    Column("period", String(10), nullable=False),
    Column("timezone", String(64), nullable=False),
    Column("usd_limit", BigInteger),
    Column("token_limit", BigInteger),
    Column("updated_at", UtcTime, nullable=False),
    UniqueConstraint("org_id", "scope", "name", "period"),
)
"""Budgets set by operators.  scope: org | team | workflow; period: run (each run) | day | month.  Micro-dollars."""

budget_periods = Table(
    "budget_periods",
    metadata,
    Column("id", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("key", String(400), nullable=False, unique=True),
    Column("budget_id", BigInteger),
    Column("level", SmallInteger, nullable=False),
    Column("label", String(400), nullable=False),
    Column("starts_at", UtcTime),
    Column("ends_at", UtcTime),
    Column("usd_limit", BigInteger),
    Column("usd_wall", BigInteger),
    Column("usd_spent", BigInteger, nullable=False, server_default="0"),
    Column("usd_reserved", BigInteger, nullable=False, server_default="0"),
    Column("usd_overrun", BigInteger, nullable=False, server_default="0"),
    Column("token_limit", BigInteger),
    Column("token_wall", BigInteger),
    Column("token_spent", BigInteger, nullable=False, server_default="0"),
    Column("token_reserved", BigInteger, nullable=False, server_default="0"),
    Column("token_overrun", BigInteger, nullable=False, server_default="0"),
    Column("alerted", SmallInteger, nullable=False, server_default="0"),
    Column("waited_for", Boolean, nullable=False, server_default="0"),
    CheckConstraint("usd_reserved >= 0 AND usd_spent + usd_reserved <= usd_wall", name="usd_never_over"),
    CheckConstraint("token_reserved >= 0 AND token_spent + token_reserved <= token_wall", name="tokens_never_over"),
    Index("ix_budget_periods_budget", "budget_id"),
    postgresql_with={"fillfactor": 50},
)
"""An account: one budget in one period, or the limit that a file sets for its run or a step.  A new period is a new
row.

`level`: locks are taken from high to low (step, run, workflow, team, org), then by id.  `spent`: amounts posted, up to
what had been reserved; `overrun`: amounts beyond that.  `wall`: the limit, or what had already been taken when the
limit was lowered below it.  `alerted`: the last of 50, 80, 100 % that was reported.  `waited_for`: see `budget_waits`.
"""

reservations = Table(
    "reservations",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    Column("token", Integer, primary_key=True, autoincrement=False),
    Column("ordinal", SmallInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("at", UtcTime, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("usd", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("max_tokens", Integer, nullable=False),
    Column("usd_posted", BigInteger),
    Column("tokens_posted", BigInteger),
    Column("accounts", ARRAY(BigInteger).with_variant(JSON, "sqlite"), nullable=False),
    Index("ix_reservations_open", "step_id", postgresql_where=text("state = 0"), sqlite_where=text("state = 0")),
    postgresql_with={"fillfactor": 70},
)
"""The maximum cost of a call, reserved on every account that counts it.  Same key as the call's row in `ledger`.

`state`: 0 open, 1 settled, 2 released (the call was not made), 3 unknown (posted in full until its cost is known).
"""

postings = Table(
    "postings",
    metadata,
    Column("seq", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("period_id", BigInteger, nullable=False),
    Column("step_id", BigInteger),
    Column("token", Integer),
    Column("ordinal", SmallInteger),
    Column("kind", SmallInteger, nullable=False),
    Column("usd_reserved", BigInteger, nullable=False),
    Column("usd_spent", BigInteger, nullable=False),
    Column("usd_overrun", BigInteger, nullable=False),
    Column("token_reserved", BigInteger, nullable=False),
    Column("token_spent", BigInteger, nullable=False),
    Column("token_overrun", BigInteger, nullable=False),
    Column("at", UtcTime, nullable=False),
)
"""Every change of an account.  Append-only; the sums of the rows are the balances.

`kind`: 0 reserve, 1 settle, 2 release, 3 unknown, 4 adjust, 5 opening (what was spent before the budget was set).
"""

budget_waits = Table(
    "budget_waits",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("period_id", BigInteger, nullable=False),
    Column("patient", Boolean, nullable=False),
    Column("usd", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("woken", Boolean, nullable=False, server_default="0"),
    Column("until", UtcTime),
    Index("ix_budget_waits_period", "period_id", "step_id"),
)
"""Steps that wait for room on an account, and the least room they need; the oldest is woken first.

`patient`: it waits for the next period, so it is not woken to be refused when nothing is reserved any more.  `woken`:
it has been woken, and is on its way.  Until `until`, no step that came later may take the room it needs.
"""

budget_alerts = Table(
    "budget_alerts",
    metadata,
    Column("id", BigKey, primary_key=True, autoincrement=True),
    _org(),
    Column("period_id", BigInteger, nullable=False),
    Column("run_id", BigInteger, nullable=False),
    Column("kind", String(30), nullable=False),
    Column("mark", SmallInteger),
    Column("at", UtcTime, nullable=False),
    Column("message", Text, nullable=False),
    Column("told_at", UtcTime),
    Index(
        "ix_budget_alerts_untold", "id", postgresql_where=text("told_at IS NULL"), sqlite_where=text("told_at IS NULL")
    ),
)
"""Budget alerts to report, each once: an outbox (budget.alert at 50, 80, 100 %: `mark`; budget.overrun)."""

conversations = Table(
    "conversations",
    metadata,
    Column("step_id", BigInteger, primary_key=True, autoincrement=False),
    _org(),
    Column("at", UtcTime, nullable=False),
    Column("body", Text, nullable=False),
)
"""The conversation of a step with a model so far, as JSON.  Replies in it are paid for and are not requested again."""

limit_states = Table(
    "limit_states",
    metadata,
    Column("key", String(300), primary_key=True),
    _org(),
    Column("body", Text, nullable=False),
)
"""The limiter's state if there is no Redis: one JSON document for each gate and each account."""

limit_rules = Table(
    "limit_rules",
    metadata,
    Column("provider", String(100), primary_key=True),
    Column("model", String(200), primary_key=True),
    _org(),
    Column("body", Text, nullable=False),
    Column("at", UtcTime, nullable=False),
)
"""Limits set by people, as JSON: {dimension: number}.  `provider` and `model` are patterns."""
