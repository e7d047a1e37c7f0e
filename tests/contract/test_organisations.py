"""Two organisations in one database use the same names for everything, and share nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gorgon_common.costs.budgets import LEVELS, Account
from gorgon_common.engine.budget import Held
from gorgon_common.engine.records import KeyRequest, ReadyStep, RunInfo, step_id
from gorgon_common.engine.states import RunStatus
from gorgon_common.errors import Conflict
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.database import scope_of
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import budget_alerts, budget_periods, plans, runs, shares
from gorgon_common.scope import SYSTEM, Scope
from tests.support.engine import NOTHING, NOW, OPENAI, Desk, fan, new_run, row

ACME, GLOBEX = Scope(1, "team", "key:ops"), Scope(2, "team", "cli:ann")
BOTH = (ACME, GLOBEX)


@pytest.fixture
def desk(stores: tuple[Store, Store]) -> Desk:
    return Desk(stores[0])


@pytest.fixture
def budgets(desk: Desk) -> Iterator[Budgets]:
    made = Budgets(desk.store.database, sleep=lambda _: None)
    yield made
    made.close()


def made(desk: Desk, scope: Scope, **fields: Any) -> tuple[int, bool]:
    """Create a run with the same names for everything, whoever asks."""
    values = {"team": "team", "workflow": "w", "plan_hash": "p" * 64, "plan_body": '{"of": "both"}', **fields}
    return desk.store.create(new_run(**values), fan(2), scope=scope)


def info(scope: Scope, run: int) -> RunInfo:
    return RunInfo(run, f"run_{run}", scope.org, "team", "w", "", {}, "live", "", run, NOW)


def test_a_run_is_its_organisations_and_says_who_asked(desk: Desk) -> None:
    for scope in BOTH:
        run, _ = made(desk, scope)
        stored = desk.run(run)
        assert (stored.org_id, stored.actor) == (scope.org, scope.actor)
        assert desk.store.info(run).org == scope.org


def test_a_run_that_nobody_asked_for_is_the_systems(desk: Desk) -> None:
    run, _ = desk.store.create(new_run(), fan(2))
    assert (desk.run(run).org_id, desk.run(run).actor) == (SYSTEM.org, SYSTEM.actor)


def test_each_transaction_knows_for_whom_it_is(desk: Desk) -> None:
    database = desk.store.database
    with database.write(GLOBEX) as connection:
        assert scope_of(connection) == GLOBEX
    with database.read() as connection:
        assert scope_of(connection) == SYSTEM
    with database.statements() as connection:
        assert scope_of(connection) == SYSTEM


def test_the_same_plan_is_stored_for_each(desk: Desk) -> None:
    for scope in BOTH:
        made(desk, scope)
        made(desk, scope)
    assert sorted((plan.org_id, plan.hash) for plan in desk.all(plans)) == [(1, "p" * 64), (2, "p" * 64)]
    assert desk.store.plan_body("p" * 64) == '{"of": "both"}'


def test_an_idempotency_key_is_of_one_organisation(desk: Desk) -> None:
    ours, theirs = (made(desk, scope, idempotency_key="k", request_hash=f"of {scope.org}") for scope in BOTH)
    assert ours[1]
    assert theirs[1]
    assert ours[0] != theirs[0]
    assert made(desk, GLOBEX, idempotency_key="k", request_hash="of 2") == (theirs[0], False)
    with pytest.raises(Conflict, match="another request"):
        made(desk, ACME, idempotency_key="k", request_hash="of 2")


def test_a_concurrency_key_is_of_one_organisation(desk: Desk) -> None:
    hold = KeyRequest("deploy", 1, "queue")
    ours, theirs = (made(desk, scope, hold=hold)[0] for scope in BOTH)
    second, _ = made(desk, GLOBEX, hold=hold)
    assert [desk.store.admission(run).holds for run in (ours, theirs, second)] == [True, True, False]
    assert desk.run(ours).key_id != desk.run(theirs).key_id == desk.run(second).key_id


def test_a_worker_serves_all_organisations(desk: Desk) -> None:
    found = [made(desk, scope)[0] for scope in BOTH]
    held = desk.store.claim_and_finish(desk.worker, NOTHING, claims=[step_id(run, 0) for run in found]).mine
    assert sorted(step.run for step in held) == sorted(found)
    assert {desk.run(run).status for run in found} == {RunStatus.QUEUED}


def test_teams_of_one_name_take_turns(desk: Desk) -> None:
    """A team does not stand behind the steps of a team of the same name elsewhere."""
    runs_ = []
    for scope, count in ((ACME, 4), (GLOBEX, 2)):
        run, _ = desk.store.create(new_run(team="team"), [row(number) for number in range(count)], scope=scope)
        desk.store.enqueue([ReadyStep(step_id(run, number), number, 2, OPENAI) for number in range(count)], "team")
        runs_.append(run)
    ours, theirs = runs_
    order = [head.id >> 20 for head in desk.store.dequeue(OPENAI, 6, target="sandbox", home="")]
    assert order == [ours, theirs, ours, theirs, ours, ours]
    assert sorted((share.org_id, share.team) for share in desk.all(shares)) == [(1, "team"), (2, "team")]


def test_budgets_of_one_name_count_their_own_calls_only(desk: Desk, budgets: Budgets) -> None:
    for scope, usd in ((ACME, 50), (GLOBEX, 1000)):
        for name in ("org", "team:team", "workflow:w"):
            budgets.set(name, period="month", usd=usd, tokens=None, caller=scope)
    ours, theirs = (made(desk, scope, target="live")[0] for scope in BOTH)
    taken = budgets.reserve((step_id(theirs, 0), 1, 1), info(GLOBEX, theirs), [], usd=900, tokens=0, max_tokens=1)
    assert isinstance(taken, Held)
    refused = budgets.reserve((step_id(ours, 0), 1, 1), info(ACME, ours), [], usd=60, tokens=0, max_tokens=1)
    assert not isinstance(refused, Held)
    assert refused.balance.usd_reserved == 0
    for scope, reserved in ((ACME, 0), (GLOBEX, 900)):
        listed = budgets.listing(scope)
        assert len(listed) == 3
        sums = {sum(account["usd_reserved"] for account in budget["accounts"]) for budget in listed}
        assert sums == {reserved}
    assert len(budgets.listing(None)) == 6
    assert {period.org_id for period in desk.all(budget_periods)} == {1, 2}


def test_a_new_budget_counts_what_its_own_organisation_has_in_flight(desk: Desk, budgets: Budgets) -> None:
    """It takes over reservations of calls that began before it was set."""
    accounts = [Account(f"run:{number}", LEVELS["run"], "l", 10_000, None) for number in (1, 2)]
    for scope, account, usd in zip(BOTH, accounts, (30, 500), strict=True):
        run, _ = made(desk, scope, target="live")
        key = step_id(run, 0), 1, 1
        assert isinstance(budgets.reserve(key, info(scope, run), [account], usd=usd, tokens=0, max_tokens=1), Held)
    budgets.set("org", period="month", usd=1000, tokens=None, caller=GLOBEX)
    (listed,) = budgets.listing(GLOBEX)
    assert sum(account["usd_reserved"] for account in listed["accounts"]) == 500


def test_changes_keep_to_the_budget_of_the_caller(desk: Desk, budgets: Budgets) -> None:
    for scope, usd in ((ACME, "1"), (GLOBEX, "2")):
        budgets.change("team:team", period="day", usd=usd, caller=scope)
    budgets.change("team:team", period="day", tokens=7, caller=GLOBEX)
    limits = [[(entry["usd_limit"], entry["token_limit"]) for entry in budgets.listing(scope)] for scope in BOTH]
    assert limits == [[(1_000_000, None)], [(2_000_000, 7)]]


def test_an_alert_is_of_the_organisation_of_its_budget(desk: Desk, budgets: Budgets) -> None:
    budgets.set("org", period="month", usd=100, tokens=None, caller=GLOBEX)
    run, _ = made(desk, GLOBEX, target="live")
    key = step_id(run, 0), 1, 1
    assert isinstance(budgets.reserve(key, info(GLOBEX, run), [], usd=90, tokens=0, max_tokens=1), Held)
    budgets.settle([{"step_id": key[0], "token": 1, "ordinal": 1, "state": 1, "usd": 90, "tokens": 0}])
    assert [alert.org_id for alert in desk.all(budget_alerts)] == [2]


def test_runs_can_be_listed_by_organisation(desk: Desk) -> None:
    ours, theirs = (made(desk, scope)[0] for scope in BOTH)
    assert [entry.id for entry in desk.all(runs, runs.c.org_id == GLOBEX.org)] == [theirs] != [ours]
