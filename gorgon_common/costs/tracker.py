"""Records the cost of calls that a program makes outside of runs, for the same reports as those of runs.

    from gorgon import cost_tracker

    cost_tracker.record(provider="openai", model="gpt-6.1-terra", role="reviewer", input_tokens=900, output_tokens=120)
    cost_tracker.get_report(team="research", start_date="2026-11-01")

Calls are stored in the configured database (GORGON_DATABASE_URL), or in the `book` of a CostTracker; nothing is kept in
memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Protocol

from gorgon_common.clock import SYSTEM_CLOCK, Clock, format_time
from gorgon_common.costs.budgets import micro_dollars
from gorgon_common.costs.usage import Usage
from gorgon_common.errors import InputInvalid
from gorgon_common.lazy import load

WORKFLOW = "library"
"""The workflow of calls that name none."""
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call that was made outside of a run.  `cost_micro` is None where it is unknown."""

    at: datetime
    team: str
    workflow: str
    provider: str
    model: str
    usage: Usage
    cost_micro: int | None
    price_version: str | None
    role: str | None = None
    run: str | None = None
    step: str | None = None
    latency_ms: int | None = None
    outcome: str = "ok"


class Book(Protocol):
    """Where calls are recorded and reported: `application.session.Session`.  Raises Unavailable."""

    def record_calls(self, calls: Sequence[RecordedCall]) -> None:
        """Store calls."""
        ...

    def costs(
        self,
        by: Sequence[str],
        *,
        since: str | None = None,
        until: str | None = None,
        only: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Return a report."""
        ...


class _Prices(Protocol):
    version: str

    def price(
        self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None, asked: str | None = None
    ) -> int | None:
        """Return micro-dollars, None where there is no price."""
        ...


class CostTracker:
    """Records calls and reports costs; thread-safe.

    `book`: where; without one the configured database, opened at the first use.  `prices`: what a call costs of which
    nobody says so; without them the configured table.
    """

    def __init__(self, book: Book | None = None, *, prices: _Prices | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self._book = book
        self._prices = prices
        self._clock = clock
        self._opened: Any = None
        self._lock = threading.Lock()

    def record(
        self,
        *,
        provider: str,
        model: str,
        role: str | None = None,
        input_tokens: int = 0,
        output_tokens: int = 0,
        cost_usd: float | str | None = None,
        cached_tokens: int = 0,
        reasoning_tokens: int = 0,
        team: str = "default",
        workflow: str = WORKFLOW,
        run: str | None = None,
        step: str | None = None,
        latency_ms: int | None = None,
        outcome: str = "ok",
        at: datetime | None = None,
    ) -> float | None:
        """Record one call; returns what it cost in US dollars, None where nobody knows.

        `cost_usd`: what it cost; without it the price table says.  `input_tokens` counts `cached_tokens` too,
        `output_tokens` those of reasoning.  Raises InputInvalid for negative or absurd figures, Unavailable.
        """
        for name, value in (("provider", provider), ("model", model), ("team", team), ("workflow", workflow)):
            if not isinstance(value, str) or not 0 < len(value) <= 200:
                raise InputInvalid(f"{name} is {value!r}.", hint="Give its name, 1 to 200 characters.")
        usage = Usage(
            input_tokens=_count("input_tokens", input_tokens),
            cache_read_tokens=_count("cached_tokens", cached_tokens),
            output_tokens=_count("output_tokens", output_tokens),
            reasoning_tokens=_count("reasoning_tokens", reasoning_tokens),
        )
        moment = at or self._clock.now()
        if moment.tzinfo is None:
            raise InputInvalid(f"`at` has no timezone: {moment}.", hint="Give an aware datetime.")
        version: str | None = None
        if cost_usd is not None:
            cost: int | None = micro_dollars(cost_usd, "cost_usd")
        else:
            prices = self._priced()
            cost, version = prices.price(provider, model, usage), prices.version
        call = RecordedCall(
            at=moment,
            team=team,
            workflow=workflow,
            provider=provider,
            model=model,
            usage=usage,
            cost_micro=cost,
            price_version=version,
            role=role,
            run=run,
            step=step,
            latency_ms=latency_ms,
            outcome=outcome,
        )
        self._where().record_calls([call])
        return None if cost is None else cost / 1e6

    def get_report(
        self,
        *,
        by: Sequence[str] | str = ("provider", "model", "role"),
        team: str | None = None,
        workflow: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        role: str | None = None,
        target: str | None = None,
        start_date: date | str | None = None,
        end_date: date | str | None = None,
    ) -> dict[str, Any]:
        """Return what calls have cost, those of runs included: `{by, rows, total, …}` as `gorgon costs report --json`.

        `target`: live (runs with real money), library (calls recorded here), sandbox (play money) or all; without it
        live and library.  `start_date`, `end_date`: days in UTC, both included, or times.  Raises InputInvalid,
        Unavailable.
        """
        named = {
            "team": team,
            "workflow": workflow,
            "provider": provider,
            "model": model,
            "role": role,
            "target": target,
        }
        return self._where().costs(
            [by] if isinstance(by, str) else list(by),
            since=_written(start_date),
            until=_written(end_date),
            only={name: value for name, value in named.items() if value is not None},
        )

    def close(self) -> None:
        """Release the connections of a database that was opened here."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _where(self) -> Book:
        if self._book is not None:
            return self._book
        with self._lock:
            if self._opened is None:
                # What is wired knows this layer, not the other way round: it is found by name, and only here.
                settings = load("gorgon_common.settings:get_settings")()
                self._opened = load("gorgon_common.application.session:open_session")(settings)
            book: Book = self._opened
            return book

    def _priced(self) -> _Prices:
        with self._lock:
            if self._prices is None:
                settings = load("gorgon_common.settings:get_settings")()
                self._prices = load("gorgon_common.costs.prices:make_pricer")(settings.prices)
            return self._prices


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
        raise InputInvalid(f"{name} is {value!r}.", hint="Give a whole number of tokens, 0 or more.")
    return value


def _written(moment: date | str | None) -> str | None:
    if isinstance(moment, datetime):
        return format_time(moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))
    return moment.isoformat() if isinstance(moment, date) else moment


cost_tracker = CostTracker()
"""The tracker of the configured database."""
