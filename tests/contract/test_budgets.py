"""Budgets over SQLite and PostgreSQL: nothing is ever over, whatever runs at once and whatever is killed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError

from gorgon_common.costs.budgets import LEVELS, Account, Balance, Shortage
from gorgon_common.costs.ledger import Kind, replay
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.budget import unsent
from gorgon_common.engine.budget_store import Held
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import BudgetRequest, Claimed, Finish, Result, RunInfo, Waiting, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import InputInvalid, Unavailable
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.settling import abandon_orphans
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import budget_periods, budget_waits, events, postings, reservations, steps
from tests.support import servers
from tests.support.engine import NOTHING, NOW, Desk, elapse, empty, open_store, paid, row
from tests.support.running import eventually

DAY = 86_400
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def one_postgres(postgres_admin: str) -> Iterator[Store]:
    with servers.fresh_database(postgres_admin) as url:
        store = open_store(url)
        yield store
        store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "sqlite":
        made = open_store(request.getfixturevalue("sqlite_url"))
        yield made
        made.close()
        return
    made = request.getfixturevalue("one_postgres")
    yield made
    empty(made)


@pytest.fixture
def desk(store: Store) -> Desk:
    return Desk(store)


@pytest.fixture
def budgets(store: Store) -> Iterator[Budgets]:
    made = Budgets(store.database, sleep=lambda _: None)
    yield made
    check(made)
    made.close()
    store.database.clock_offset = 0.0


def check(budgets: Budgets) -> None:
    """Hold every account against the ledger, and against its limit."""
    balances = budgets.balances()
    told = replay(budgets.postings())
    for number, balance in balances.items():
        without = replace(balance, usd_limit=None, token_limit=None)
        assert without == told.get(number, Balance())


def info(number: int = 1, *, team: str = "default", workflow: str = "test", target: str = "live") -> RunInfo:
    return RunInfo(number, f"run_{number}", 1, team, workflow, "", {}, target, "", number, NOW)


def key() -> tuple[int, int, int]:
    return step_id(1, 0), next(_numbers), 1


def limit(usd: int | None = None, tokens: int | None = None, *, name: str = "run:1", level: str = "run") -> Account:
    return Account(name, LEVELS[level], f"the limit of {name}", usd, tokens)


def fact(held: tuple[int, int, int], cost: int | None, tokens: int | None = 0, state: int = 1) -> dict[str, Any]:
    return {"step_id": held[0], "token": held[1], "ordinal": held[2], "state": state, "usd": cost, "tokens": tokens}


def reserve(budgets: Budgets, own: Sequence[Account], usd: int, tokens: int = 0, **given: Any) -> Held | Shortage:
    call = given.pop("call", None) or key()
    return budgets.reserve(call, given.pop("run", info()), own, usd=usd, tokens=tokens, max_tokens=100)


def held(answer: Held | Shortage) -> tuple[int, int, int]:
    assert isinstance(answer, Held), answer
    return answer.key


def short(answer: Held | Shortage) -> Shortage:
    assert isinstance(answer, Shortage), answer
    return answer


def one(budgets: Budgets) -> Balance:
    (balance,) = budgets.balances().values()
    return balance


def turn(budgets: Budgets, seconds: float) -> None:
    """Move the clock by which periods begin."""
    if budgets.database.sqlite:
        budgets.database.clock_offset += seconds
    else:
        budgets.offset += seconds


def kinds(budgets: Budgets) -> list[Kind]:
    return [posting.kind for posting in budgets.postings()]


# One call


def test_what_is_reserved_is_spent_by_what_it_came_to(budgets: Budgets) -> None:
    own = [limit(100, 1000)]
    call = held(reserve(budgets, own, 60, 500))
    assert (one(budgets).usd_reserved, one(budgets).token_reserved) == (60, 500)
    refused = short(reserve(budgets, own, 41, 1))
    assert refused.balance.usd_reserved == 60
    assert refused.balance.fits(41, 1, released=True)
    budgets.settle([fact(call, 35, 200)])
    assert one(budgets) == Balance(100, 35, 0, 0, 1000, 200, 0, 0)
    held(reserve(budgets, own, 65, 800))
    assert "1 tokens" in short(reserve(budgets, own, 0, 1)).explain(0, 1)
    assert kinds(budgets) == [Kind.RESERVE, Kind.SETTLE, Kind.RESERVE]


def test_a_shortage_says_which_budget_and_how_much_is_missing(budgets: Budgets) -> None:
    own = [limit(1_000_000), limit(None, 10, name="step:1:a", level="step")]
    told = short(reserve(budgets, own, 1_200_000, 5)).explain(1_200_000, 5)
    assert told == (
        "The limit of run:1 is $1.00: $0.00 spent, $0.00 reserved. The next call may cost $1.20; $1.00 is left."
    )
    assert "is 10 tokens: 0 tokens spent" in short(reserve(budgets, own, 1, 11)).explain(1, 11)


def test_a_refusal_leaves_no_trace(budgets: Budgets) -> None:
    own = [limit(100, name="step:1:a", level="step"), limit(50)]
    call = key()
    assert short(reserve(budgets, own, 60, call=call)).account.key == "run:1"
    assert [balance.usd_reserved for balance in budgets.balances().values()] == [0, 0]
    assert held(reserve(budgets, own, 50, call=call)) == call


def test_the_same_call_is_reserved_once_and_settled_once(budgets: Budgets) -> None:
    own = [limit(100)]
    call = key()
    first = reserve(budgets, own, 60, call=call)
    again = reserve(budgets, own, 60, call=call)
    assert first == again
    assert one(budgets).usd_reserved == 60
    for _ in range(3):
        budgets.settle([fact(call, 20), fact(call, 20)])
    assert one(budgets).usd_spent == 20
    late = reserve(budgets, own, 60, call=call)
    assert isinstance(late, Held)
    assert not late.is_open
    assert one(budgets).usd_reserved == 0


def test_a_call_that_was_not_made_costs_nothing(budgets: Budgets) -> None:
    call = held(reserve(budgets, [limit(100)], 60))
    budgets.settle([fact(call, None, None, state=2)])
    assert one(budgets) == Balance(100)
    assert kinds(budgets)[-1] is Kind.RELEASE


def test_an_unknown_outcome_costs_all_that_was_reserved_until_somebody_knows(budgets: Budgets) -> None:
    own = [limit(100, 100)]
    call = held(reserve(budgets, own, 60, 30))
    budgets.settle([fact(call, None, None)])
    assert one(budgets) == Balance(100, 60, 0, 0, 100, 30, 0, 0)
    budgets.settle([fact(call, None, None, state=3)])
    budgets.settle([fact(call, 12, 7)])
    assert one(budgets) == Balance(100, 12, 0, 0, 100, 7, 0, 0)
    budgets.settle([fact(call, 50, 7)])
    assert one(budgets).usd_spent == 12
    assert kinds(budgets) == [Kind.RESERVE, Kind.UNKNOWN, Kind.ADJUST]


def test_what_went_beyond_is_recorded_and_leaves_less_room(budgets: Budgets, desk: Desk) -> None:
    own = [limit(100)]
    call = held(reserve(budgets, own, 60))
    budgets.settle([fact(call, 75)])
    assert one(budgets) == Balance(100, 75, 0, 15)
    short(reserve(budgets, own, 26))
    held(reserve(budgets, own, 25))
    assert "budget.overrun" in desk.kinds(1)


def test_the_database_itself_refuses_more_than_the_limit(budgets: Budgets) -> None:
    held(reserve(budgets, [limit(100)], 60))
    with pytest.raises(IntegrityError), budgets.database.write() as connection:
        connection.execute(update(budget_periods).values(usd_reserved=101))


def test_levels_without_a_limit_are_not_kept(budgets: Budgets) -> None:
    held(reserve(budgets, [limit(), limit(None, 5, name="step:1:a", level="step")], 10, 1))
    assert len(budgets.balances()) == 1


def test_accounts_are_locked_from_leaf_to_root(budgets: Budgets) -> None:
    budgets.set("org", period="month", usd=10**6, tokens=None)
    budgets.set("team:default", period="day", usd=10**6, tokens=None)
    budgets.set("workflow:test", period="run", usd=10**6, tokens=None)
    held(reserve(budgets, [limit(10**6), limit(10**6, name="step:1:a", level="step")], 10))
    with budgets.database.read() as connection:
        accounts = connection.scalar(select(reservations.c.accounts))
        levels = dict(connection.execute(select(budget_periods.c.id, budget_periods.c.level)).all())
    assert [levels[number] for number in accounts] == [50, 40, 30, 20, 10]


# Amounts


@pytest.mark.parametrize("amount", ["-1", "-0.000001", "cheap", "nan", "inf", "1e30"])
def test_what_is_no_amount_is_refused(budgets: Budgets, amount: str) -> None:
    with pytest.raises(InputInvalid):
        budgets.change("org", period="day", usd=amount)
    assert budgets.listing() == []


def test_dollars_are_exact(budgets: Budgets) -> None:
    assert budgets.change("org", period="day", usd="0.1000015")["usd_limit"] == 100_001
    assert budgets.change("org", period="day", usd="999999.999999")["usd_limit"] == 999_999_999_999


@pytest.mark.parametrize("given", [{"usd": "0"}, {"tokens": "0"}])
def test_a_budget_of_zero_lets_nothing_through_but_what_is_free(budgets: Budgets, given: dict[str, str]) -> None:
    budgets.change("team:default", period="day", **given)
    short(reserve(budgets, [], 1, 1))
    held(reserve(budgets, [], 0, 0))
    held(reserve(budgets, [], 1, 1, run=info(team="other")))


@pytest.mark.parametrize("scope", ["team", "team:", "org:x", "run:1", "", "workflow"])
def test_what_has_no_budget(budgets: Budgets, scope: str) -> None:
    with pytest.raises(InputInvalid):
        budgets.change(scope, period="day", usd="1")


def test_a_period_or_timezone_that_is_none(budgets: Budgets) -> None:
    with pytest.raises(InputInvalid, match="no period"):
        budgets.change("org", period="week", usd="1")
    with pytest.raises(InputInvalid, match="no time zone"):
        budgets.change("org", period="day", timezone="Mars/Olympus", usd="1")


# Periods


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/Los_Angeles", "UTC"])
def test_a_day_begins_at_midnight_of_its_timezone(budgets: Budgets, zone: str) -> None:
    """Kiritimati is 14 hours ahead, Los Angeles 8 behind: their midnights are not that of the database."""
    made = budgets.set("org", period="day", timezone=zone, usd=100, tokens=None)
    ends = made.account(target="live", root=1, now=budgets.now()).ends
    assert ends is not None
    call = held(reserve(budgets, [], 100))
    turn(budgets, (ends - budgets.now()).total_seconds() - 5)
    short(reserve(budgets, [], 1))
    turn(budgets, 6)
    held(reserve(budgets, [], 100))
    budgets.settle([fact(call, 100)])  # what was reserved yesterday is spent yesterday
    live = [balance for balance in budgets.balances().values() if balance.usd_spent or balance.usd_reserved]
    assert sorted((balance.usd_spent, balance.usd_reserved) for balance in live) == [(0, 100), (100, 0)]


def test_a_clock_that_jumps_opens_no_budget_twice(budgets: Budgets) -> None:
    budgets.set("org", period="day", usd=100, tokens=None)
    budgets.settle([fact(held(reserve(budgets, [], 100)), 100)])
    for jump, room in ((3 * DAY, 100), (-3 * DAY, 0), (3 * DAY, 0), (-400 * DAY, 100), (397 * DAY, 0)):
        turn(budgets, jump)
        if room:
            budgets.settle([fact(held(reserve(budgets, [], room)), room)])
        assert short(reserve(budgets, [], 1)).balance.usd_spent == 100


def test_a_worker_whose_clock_is_wrong_spends_from_the_databases_day(one_postgres: Store) -> None:
    """SQLite has no clock but the process'."""
    budgets = Budgets(one_postgres.database)
    budgets.set("org", period="day", usd=100, tokens=None)
    budgets.settle([fact(held(reserve(budgets, [], 100)), 100)])
    mistaken = Budgets(budgets.database)
    mistaken._skew = timedelta(days=5)
    assert short(reserve(mistaken, [], 1)).balance.usd_spent == 100
    for each in (budgets, mistaken):
        each.close()
    empty(one_postgres)


def test_each_run_has_its_own_budget_per_run(budgets: Budgets) -> None:
    budgets.set("team:default", period="run", usd=100, tokens=None)
    held(reserve(budgets, [], 100, run=info(1)))
    held(reserve(budgets, [], 100, run=info(2)))
    resumed = replace(info(3), root=1)
    short(reserve(budgets, [], 1, run=resumed))


def test_play_money_and_real_money_are_apart(budgets: Budgets) -> None:
    budgets.set("org", period="month", usd=100, tokens=None)
    held(reserve(budgets, [], 100, run=info(target="sandbox")))
    held(reserve(budgets, [], 100, run=info(target="live")))
    (entry,) = budgets.listing()
    assert sorted((account["target"], account["usd_reserved"]) for account in entry["accounts"]) == [
        ("live", 100),
        ("sandbox", 100),
    ]


def test_a_budget_counts_what_was_spent_before_it_was_set(budgets: Budgets, desk: Desk) -> None:
    run = desk.create([row(0)], target="live", team="blue")
    now = budgets.now()
    desk.worker = desk.register(target="live")
    desk.end(
        desk.one(run, 0), calls=(paid(cost_micro=70, usage=Usage(input_tokens=5, output_tokens=4)),), finished_at=now
    )
    budgets.set("team:blue", period="day", usd=100, tokens=None)
    budgets.set("team:red", period="day", usd=100, tokens=None)
    budgets.set("org", period="month", usd=50, tokens=None)
    spent = [entry["accounts"][0]["usd_spent"] for entry in budgets.listing()]
    assert spent == [70, 70, 0]  # org, blue, red
    short(reserve(budgets, [], 1, run=info(run, team="red")))


def test_a_budget_counts_in_full_what_is_unknown_from_before_it_was_set(budgets: Budgets, desk: Desk) -> None:
    run = desk.create([row(0), row(1), row(2)], target="live", team="blue")
    desk.worker = desk.register(target="live")
    now = budgets.now()
    free, other, tiered = (desk.one(run, number) for number in range(3))
    unknown = paid(cost_micro=None, usage=Usage(), measured=False)
    budgets.unknown((free.id, free.token, 1), (30, 20, 10))  # no budget counted it
    budgets.unknown((free.id, free.token, 1), (30, 20, 10))
    desk.end(free, calls=(unknown,), finished_at=now)
    reserve(budgets, [limit(1000)], 400, 50, call=(other.id, other.token, 1))  # the limit of its file did
    desk.end(other, calls=(replace(unknown, reserved=True),), finished_at=now)
    reserve(budgets, [limit(1000)], 500, 90, call=(tiered.id, tiered.token, 1))  # only its price is unknown
    counted = paid(cost_micro=None, usage=Usage(input_tokens=5, output_tokens=2), reserved=True)
    desk.end(tiered, calls=(counted,), finished_at=now)
    for _ in range(2):
        budgets.set("org", period="month", usd=10_000, tokens=10_000)
        account = budgets.listing()[0]["accounts"][0]
        assert (account["usd_spent"], account["token_spent"]) == (30 + 400 + 500, 20 + 50 + 7)


# Changing limits


def test_a_limit_can_be_raised_lowered_and_taken_away(budgets: Budgets) -> None:
    budgets.set("org", period="month", usd=100, tokens=None)
    call = held(reserve(budgets, [], 80))
    budgets.set("org", period="month", usd=50, tokens=None)
    short(reserve(budgets, [], 1))
    budgets.settle([fact(call, 45)])
    short(reserve(budgets, [], 6))
    held(reserve(budgets, [], 5))
    budgets.set("org", period="month", usd=200, tokens=None)
    held(reserve(budgets, [], 150))
    budgets.set("org", period="month", usd=None, tokens=None)
    held(reserve(budgets, [], 10**9))
    assert budgets.listing() == []


def test_only_what_is_named_changes(budgets: Budgets) -> None:
    budgets.change("org", period="day", timezone="Europe/Berlin", usd="5", tokens="100")
    assert budgets.change("org", period="day", usd="7") == {
        "scope": "org",
        "name": "",
        "period": "day",
        "timezone": "Europe/Berlin",
        "usd_limit": 7_000_000,
        "token_limit": 100,
    }


def test_a_resumed_run_may_get_a_higher_limit_and_keeps_its_spend(budgets: Budgets) -> None:
    budgets.settle([fact(held(reserve(budgets, [limit(100)], 100)), 100)])
    short(reserve(budgets, [limit(100)], 1))
    assert short(reserve(budgets, [limit(150)], 51)).balance.usd_spent == 100
    held(reserve(budgets, [limit(150)], 50))


# Alerts


def test_50_80_and_100_percent_are_told_once_each(budgets: Budgets, desk: Desk) -> None:
    own = [limit(100)]
    for _ in range(20):
        budgets.settle([fact(held(reserve(budgets, own, 5)), 5)])
    told = [event.message for event in sorted(desk.all(events), key=lambda event: event.seq) if "budget" in event.kind]
    assert told == [f"the limit of run:1: {mark} % is spent" for mark in (50, 80, 100)]


# With the steps


def test_a_finish_settles_in_its_own_transaction_whether_or_not_the_fence_lets_it(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(0), row(1)])
    first, second = desk.claim(run, 0, 1)
    for step in (first, second):
        reserve(budgets, [limit(1000)], 100, 50, call=(step.id, step.token, 1))
    desk.end(first, calls=(paid(reserved=True),))
    assert (one(budgets).usd_spent, one(budgets).token_spent, one(budgets).usd_reserved) == (42, 10, 100)
    stale = replace(second, token=second.token)
    with desk.store.database.write() as connection:
        connection.execute(update(steps).where(steps.c.id == second.id).values(token=second.token + 1))
    assert desk.end(stale, calls=(paid(reserved=True),)).refused == [second.id]
    assert (one(budgets).usd_spent, one(budgets).usd_reserved) == (84, 0)


@pytest.mark.parametrize("way", ["park", "expand", "fail", "finish_run"])
def test_every_way_to_end_a_claim_settles(desk: Desk, budgets: Budgets, way: str) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)])
    step = desk.one(run, 0)
    for ordinal in (1, 2):
        reserve(budgets, [limit(1000)], 100, 50, call=(step.id, step.token, ordinal))
    calls = (paid(reserved=True), unsent(2))
    ways: dict[str, Callable[[], Any]] = {
        "park": lambda: desk.store.park(
            step, Snoozed(seconds=1, reason="waiting", message="", calls=calls, attempt=False)
        ),
        "expand": lambda: desk.store.expand(step, [row(0)], phase="fallback", calls=calls),
        "fail": lambda: desk.store.fail(
            desk.worker, NOTHING, _failed(step, calls), container=1, keeps=frozenset(), run_fails=True
        ),
        "finish_run": lambda: desk.store.finish_run(
            desk.worker, _failed(step, calls), status=RunStatus.FAILED, outputs=None, error=None
        ),
    }
    ways[way]()
    assert (one(budgets).usd_spent, one(budgets).usd_reserved) == (42, 0)
    assert [entry.outcome for entry in desk.spent()] == ["ok"]


def _failed(step: Claimed, calls: Sequence[CallRecord]) -> Finish:
    result = Result(StepStatus.FAILED, error={"message": "x"}, calls=calls, started_at=NOW, finished_at=NOW)
    return Finish(step, result)


def test_a_dead_workers_calls_cost_all_that_was_reserved_until_it_turns_out_to_live(
    desk: Desk, budgets: Budgets
) -> None:
    run = desk.create([row(0)])
    step = desk.one(run, 0)
    reserve(budgets, [limit(1000)], 100, 50, call=(step.id, step.token, 1))
    elapse(desk.store, 61)
    desk.store.reap(home="")
    assert (one(budgets).usd_spent, one(budgets).usd_reserved) == (100, 0)
    again = desk.one(run, 0, worker=desk.register())
    assert again.token == step.token + 1
    desk.end(step, calls=(paid(reserved=True),))
    assert one(budgets).usd_spent == 42


def test_a_step_given_back_by_a_worker_that_broke(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(0)])
    step = desk.one(run, 0)
    reserve(budgets, [limit(1000)], 100, call=(step.id, step.token, 1))
    desk.store.release(step, crashed="it broke")
    assert (one(budgets).usd_spent, one(budgets).usd_reserved) == (100, 0)


def test_an_orphaned_run_is_closed_with_its_reservations(store: Store, budgets: Budgets) -> None:
    desk = Desk(store, home="laptop")
    run = desk.create([row(0)])
    step = desk.one(run, 0)
    reserve(budgets, [limit(1000)], 100, call=(step.id, step.token, 1))
    elapse(store, 61)
    assert store.close_orphan(run)
    assert (one(budgets).usd_spent, one(budgets).usd_reserved) == (100, 0)


# Conversations


def test_what_a_conversation_has_cost_is_a_fact_before_its_step_ends(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(0)])
    step = desk.one(run, 0)
    reserve(budgets, [limit(1000)], 100, 50, call=(step.id, step.token, 1))
    assert budgets.kept(step) is None
    calls = (paid(reserved=True),)
    budgets.keep(step, calls, "first")
    budgets.keep(step, calls, "second")
    assert budgets.kept(step) == "second"
    assert (one(budgets).usd_spent, one(budgets).usd_reserved) == (42, 0)
    elapse(desk.store, 61)  # its worker dies
    desk.store.reap(home="")
    assert one(budgets).usd_spent == 42  # nothing was open any more
    again = desk.one(run, 0, worker=desk.register())
    assert budgets.kept(again) == "second"
    desk.end(step, calls=calls)  # the late finish of the first worker says the same once more
    desk.end(again)
    assert (one(budgets).usd_spent, len(desk.spent())) == (42, 1)
    with desk.store.database.write() as connection:
        abandon_orphans(connection)
    assert budgets.kept(again) is None


# Waiting


def parked(desk: Desk, run: int, number: int, period: int, usd: int, *, patient: bool = False) -> int:
    step = desk.one(run, number)
    room = BudgetRequest(period, usd, 0, patient=patient)
    said = desk.store.park(step, Snoozed(seconds=600, reason="waiting", message="", calls=(), attempt=False, room=room))
    assert said == Waiting()
    return step.id


def awake(desk: Desk) -> list[int]:
    _, sleepers = desk.store.overdue(home="")
    return sorted(key & 0xFFFFF for key in sleepers)


def test_who_waits_is_woken_when_there_is_room_and_only_as_many_as_fit(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(number) for number in range(4)])
    first, second = (held(reserve(budgets, [limit(100)], 45)) for _ in range(2))
    period = short(reserve(budgets, [limit(100)], 45)).period
    for number in range(4):
        parked(desk, run, number, period, 30)
    assert awake(desk) == []
    budgets.settle([fact(first, 20)])  # 35 are free now
    assert awake(desk) == [0]
    desk.store.wake([step_id(run, 0)])
    mine = held(reserve(budgets, [limit(100)], 30, call=(step_id(run, 0), 2, 1)))
    assert len(desk.all(budget_waits)) == 3
    budgets.settle([fact(second, 35)])  # 15 are free
    assert awake(desk) == []
    budgets.settle([fact(mine, 30)])  # nothing is reserved: no more room can come, and 15 are not enough
    assert awake(desk) == [1, 2, 3]


def test_who_is_woken_keeps_its_claim_until_it_comes_and_no_longer_than_a_moment(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(number) for number in range(4)])
    own = [limit(100)]
    first = held(reserve(budgets, own, 90, call=(step_id(run, 3), 1, 1)))
    parked(desk, run, 1, short(reserve(budgets, own, 60)).period, 60)
    later = short(reserve(budgets, own, 10, call=(step_id(run, 2), 1, 1)))
    assert (later.balance.usd_claimed, later.balance.room()) == (60, (-50, None))
    assert "$0.00006 for steps that have waited longer" in later.explain(10, 0)
    held(reserve(budgets, own, 10, call=(step_id(run, 0), 1, 1)))  # it is older than who waits
    budgets.settle([fact(first, 0)])
    assert awake(desk) == [1]
    desk.store.wake([step_id(run, 1)])
    assert short(reserve(budgets, own, 31, call=(step_id(run, 2), 1, 1))).balance.usd_claimed == 60
    held(reserve(budgets, own, 30, call=(step_id(run, 2), 1, 1)))  # there is room for both
    with desk.store.database.write() as connection:
        connection.execute(update(budget_waits).values(until=NOW))
    held(reserve(budgets, own, 60, call=(step_id(run, 3), 2, 1)))


def test_who_needs_more_than_there_can_be_stands_in_nobodys_way(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(number) for number in range(3)])
    own = [limit(100)]
    first = held(reserve(budgets, own, 90, call=(step_id(run, 0), 1, 1)))
    parked(desk, run, 1, short(reserve(budgets, own, 80)).period, 80)
    budgets.settle([fact(held(reserve(budgets, own, 5, call=(step_id(run, 0), 2, 1))), 5)])
    short(reserve(budgets, own, 5, call=(step_id(run, 2), 1, 1)))  # 80 of the 95 can come back still
    budgets.settle([fact(first, 90)])
    assert awake(desk) == [1]  # to be refused: 5 are left
    held(reserve(budgets, own, 5, call=(step_id(run, 2), 1, 3)))


def test_who_waits_for_the_next_period_is_not_woken_in_vain(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(0), row(1)])
    budgets.set("org", period="day", usd=100, tokens=None)
    call = held(reserve(budgets, [], 60))
    period = short(reserve(budgets, [], 60)).period
    parked(desk, run, 0, period, 60, patient=True)
    parked(desk, run, 1, period, 30, patient=False)
    budgets.settle([fact(call, 60)])
    assert awake(desk) == [1]  # the one before it can not go, so it does not stand in its way
    budgets.set("org", period="day", usd=200, tokens=None)
    assert awake(desk) == [0, 1]


def test_room_that_came_before_the_step_was_parked_is_not_missed(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(0)])
    call = held(reserve(budgets, [limit(100)], 80))
    period = short(reserve(budgets, [limit(100)], 80)).period
    budgets.settle([fact(call, 10)])
    parked(desk, run, 0, period, 80)
    assert awake(desk) == [0]


def test_a_cancelled_step_keeps_nobody_waiting(desk: Desk, budgets: Budgets) -> None:
    run = desk.create([row(0), row(1)])
    first, _ = (held(reserve(budgets, [limit(100)], 45)) for _ in range(2))
    period = short(reserve(budgets, [limit(100)], 45)).period
    parked(desk, run, 0, period, 30)
    parked(desk, run, 1, period, 30)
    with desk.store.database.write() as connection:
        connection.execute(update(steps).where(steps.c.id == step_id(run, 0)).values(status=int(StepStatus.CANCELLED)))
    budgets.settle([fact(first, 20)])
    assert awake(desk) == [1]


# Many at once


def test_an_account_that_is_not_there_lets_nothing_through(budgets: Budgets) -> None:
    held(reserve(budgets, [limit(100)], 10))
    budgets._accounts.put("run:1", (999_999, 100, None))  # as if its transaction had been rolled back
    with pytest.raises(Unavailable):
        reserve(budgets, [limit(100)], 10)
    assert one(budgets).usd_reserved == 10


def test_an_account_whose_transaction_was_rolled_back_is_not_remembered(budgets: Budgets) -> None:
    step = limit(100, name="step:1:a", level="step")
    with pytest.raises(IntegrityError):
        reserve(budgets, [step, limit(-1)], 10)  # opened together, and the database refuses the other
    held(reserve(budgets, [step], 10))


@pytest.mark.slow
def test_threads_never_take_more_than_there_is(budgets: Budgets, store: Store) -> None:
    other = Budgets(store.database)
    both = (budgets, other)
    accounts = [limit(5_000)]
    taken: list[tuple[int, int, int]] = []

    def work(seed: int) -> int:
        chance = random.Random(seed)
        refused = 0
        for _ in range(40):
            mine = both[seed % 2]
            amount = chance.randint(1, 60)
            step = limit(2_500, name=f"step:1:{seed % 4}", level="step")
            answer = reserve(mine, [step, *accounts], amount)
            if isinstance(answer, Shortage):
                refused += 1
                continue
            taken.append(answer.key)
            if chance.random() < 0.9:
                for _ in range(chance.randint(1, 2)):
                    mine.settle([fact(answer.key, chance.randint(0, amount))])
        return refused

    with ThreadPoolExecutor(8) as pool:
        refused = sum(pool.map(work, range(8)))
    assert refused
    assert len(taken) == len(set(taken))
    for balance in budgets.balances().values():
        assert balance.usd_limit is not None
        assert balance.usd_spent + balance.usd_reserved <= balance.usd_limit
    check(budgets)
    other.close()


_CHILD = """
import os, signal, sys
from tests.contract.test_budgets import fact, info, limit
from gorgon_common.costs.budgets import Shortage
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.database import Database
url, seed = sys.argv[1], int(sys.argv[2])
budgets = Budgets(Database(url))
sys.stdin.readline()
for number in range(60):
    call = (1 << 20 | seed, number, 1)
    answer = budgets.reserve(call, info(), [limit(2000)], usd=20, tokens=0, max_tokens=1)
    if seed == 0 and number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    if not isinstance(answer, Shortage):
        budgets.settle([fact(call, 11)])
"""


@pytest.mark.slow
def test_processes_never_take_more_than_there_is_and_a_killed_one_leaves_its_reservation(
    budgets: Budgets, store: Store
) -> None:
    url = store.database.engine.url.render_as_string(hide_password=False)
    children = [
        subprocess.Popen([sys.executable, "-c", _CHILD, url, str(seed)], stdin=subprocess.PIPE, env={**os.environ})
        for seed in range(4)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"go\n")
        child.stdin.close()
    codes = [child.wait(60) for child in children]
    assert codes == [-signal.SIGKILL, 0, 0, 0]
    balance = one(budgets)
    assert balance.usd_spent + balance.usd_reserved <= 2000
    assert balance.usd_spent + 20 > 2000 - balance.usd_reserved - 20  # it was filled
    with budgets.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(reservations).where(reservations.c.state == 0)) <= 1


_SMALL = """
import sys, threading
from collections import deque
from tests.contract.test_budgets import fact, info, limit
from gorgon_common.costs.budgets import Shortage
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.database import Database
url, seed = sys.argv[1], int(sys.argv[2])
budgets = Budgets(Database(url))
stopped = threading.Event()
def listen():
    sys.stdin.readline()
    stopped.set()
threading.Thread(target=listen, daemon=True).start()
open_calls, number, told = deque(), 0, False
while not stopped.is_set():
    number += 1
    call = (50 << 20 | seed, number, 1)
    answer = budgets.reserve(call, info(), [limit(100)], usd=10, tokens=0, max_tokens=1)
    if not isinstance(answer, Shortage):
        open_calls.append(call)
    if len(open_calls) > 2 or isinstance(answer, Shortage) and open_calls:
        budgets.settle([fact(open_calls.popleft(), 0)])
    elif len(open_calls) == 2 and not told:
        told = True
        print("holds two", flush=True)
for call in open_calls:
    budgets.settle([fact(call, 0)])
"""


@pytest.mark.slow
def test_many_small_calls_do_not_keep_a_large_one_waiting_for_ever(store: Store, desk: Desk, budgets: Budgets) -> None:
    """Three processes hold two calls or three at any time, 10 each of 100, without a pause: there are never 60 free."""
    run = desk.create([row(0)])
    large = desk.one(run, 0)
    url = store.database.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", _SMALL, url]
    children = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "holds two\n"
        for ordinal in range(1, 101):  # negative control: who only asks again and again is never let in
            shortage = short(reserve(budgets, [limit(100)], 60, call=(large.id, large.token, ordinal)))
        room = BudgetRequest(shortage.period, 60, 0)
        desk.store.park(large, Snoozed(seconds=600, reason="waiting", message="", calls=(), attempt=False, room=room))
        eventually(lambda: awake(desk), within=20, what="room for the large call")
        desk.store.wake([large.id])
        held(reserve(budgets, [limit(100)], 60, call=(large.id, large.token + 1, 1)))
    finally:
        for child in children:
            child.communicate("stop\n", timeout=30)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert (one(budgets).usd_spent, one(budgets).usd_reserved) == (0, 60)


def test_the_ledger_is_only_appended_to(budgets: Budgets) -> None:
    call = held(reserve(budgets, [limit(100)], 60))
    with budgets.database.read() as connection:
        before = connection.execute(select(postings).order_by(postings.c.seq)).all()
    budgets.settle([fact(call, 10)])
    with budgets.database.read() as connection:
        after = connection.execute(select(postings).order_by(postings.c.seq)).all()
        assert connection.scalar(text("select count(*) from postings")) == 2
    assert after[: len(before)] == before
