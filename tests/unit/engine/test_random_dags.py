"""Random workflows, run by several machines at once while messages are lost, repeated and served in any order.

Every step ends exactly once, joins obey their rule, and the run ends as a simple sequential model says.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from gorgon_common.engine.ports import AgentCall
from gorgon_common.engine.records import step_id
from gorgon_common.engine.states import FINISHED_STEP, RunStatus, StepStatus
from gorgon_common.errors import Final
from gorgon_common.persistence.tables import events
from gorgon_common.workflow.plan import Join, Kind, Node, OnFailure, Plan
from tests.support import servers
from tests.support.engine import agent, empty, node, open_store, plan_of
from tests.support.fleet import Fleet, fleet

S = StepStatus
FATAL = "fatal"
MOST = st.sampled_from([None, None, 1, 2, 3])
ENDS = ("step.succeeded", "step.failed", "step.skipped")


@dataclass(frozen=True)
class Wish:
    """One step of a random workflow."""

    after: tuple[int, ...]
    kind: str  # agent | checkpoint | map
    queue: str
    join: Join
    condition: str | None
    fails: str | None  # None | skip | default | abort
    items: int
    lanes: int
    reduce: bool


@st.composite
def wishes(draw: st.DrawFn, *, most: int = 10) -> list[Wish]:
    found = []
    for number in range(draw(st.integers(1, most))):
        before = st.integers(0, number - 1) if number else st.nothing()
        found.append(
            Wish(
                after=tuple(sorted(draw(st.sets(before, max_size=3)))) if number else (),
                kind=draw(st.sampled_from(["agent", "agent", "agent", "checkpoint", "map"])),
                queue=draw(st.sampled_from(["openai", "anthropic"])),
                join=draw(st.sampled_from([Join.ALL_SUCCESS, Join.ALL_SUCCESS, *Join])),
                condition=draw(st.sampled_from([None, None, None, "true", "false"])),
                fails=draw(st.sampled_from([None] * 9 + ["skip", "default", "abort"])),
                items=draw(st.integers(0, 5)),
                lanes=draw(st.integers(1, 3)),
                reduce=draw(st.booleans()),
            )
        )
    return found


def spec(prompt: str) -> dict[str, Any]:
    return {"provider": "openai", "model": "gpt-test", "prompt": prompt}


def planned(wanted: list[Wish], most: int | None) -> Plan:
    top: list[Node] = []
    templates: list[Node] = []
    base = len(wanted) + 3
    for number, wish in enumerate(wanted):
        common: dict[str, Any] = {"join": wish.join, "condition": wish.condition}
        name = f"s{number}"
        if wish.kind == "agent":
            way = OnFailure(wish.fails or "abort", value="instead")
            prompt = "ok" if wish.fails is None else "fail"
            top.append(agent(name, *wish.after, queue=wish.queue, spec=spec(prompt), on_failure=way, **common))
        elif wish.kind == "checkpoint":
            top.append(node(name, *wish.after, kind=Kind.CHECKPOINT, spec={"message": "here"}, **common))
        else:
            bodies = {"item": (base + len(templates),)}
            templates.append(agent(f"{name}[]", queue=wish.queue, spec=spec("ok"), container=number))
            if wish.reduce:
                bodies["reduce"] = (base + len(templates),)
                templates.append(agent(f"{name}.reduce", queue=wish.queue, spec=spec("ok"), container=number))
            over = {"over": list(range(wish.items)), "max_items": 100, "max_parallel": wish.lanes}
            top.append(node(name, *wish.after, kind=Kind.MAP, spec=over, bodies=bodies, **common))
    limits = {} if most is None else {"max_parallel": most}
    return plan_of(*top, templates=templates, limits=limits)


def model(wanted: list[Wish]) -> list[Any]:
    """Return how each step ends if they go one after the other; `fatal` for what stops the run, None behind it."""
    ends: list[Any] = []
    for wish in wanted:
        before = [ends[number] for number in wish.after]
        if any(end is None or end == FATAL for end in before):
            ends.append(None)
            continue
        unmet = {
            Join.ALL_SUCCESS: any(end is not S.SUCCEEDED for end in before),
            Join.NONE_FAILED: S.FAILED in before,
            Join.ANY_SUCCESS: bool(before) and S.SUCCEEDED not in before,
            Join.ALL_DONE: False,
        }[wish.join]
        if unmet or wish.condition == "false":
            ends.append(S.SKIPPED)
        elif wish.kind != "agent" or wish.fails in (None, "default"):
            ends.append(S.SUCCEEDED)
        else:
            ends.append(S.SKIPPED if wish.fails == "skip" else FATAL)
    return ends


def check(made: Fleet, wanted: list[Wish], seed: int, most: int | None) -> None:
    plan = planned(wanted, most)
    ends = model(wanted)
    early: list[str] = []

    def works(call: AgentCall) -> str:
        name = call.label.partition("[")[0].partition("/")[0]
        after = wanted[int(name[1:])].after
        states = made.store.states([step_id(run, number) for number in after])
        early.extend(call.label for status, _ in states.values() if S(status) not in FINISHED_STEP)
        return "done"

    def fails(call: AgentCall) -> str:
        works(call)
        raise Final("boom")

    made.provider.behaves = {"ok": works, "fail": fails}
    made.provider.calls.clear()
    made.provider.most_at_once = 0
    chance = random.Random(seed)
    run = 0  # for `works`, which may be called before `submit` returns
    run = chance.choice(made.processes).submit(plan)
    status = made.finish(run, chance=chance, lose=0.15, repeat=0.15)

    found = made.statuses(run)
    assert set(found.values()) <= FINISHED_STEP
    assert early == []
    assert most is None or made.provider.most_at_once <= most
    fatal = [number for number, end in enumerate(ends) if end == FATAL]
    assert status is (RunStatus.FAILED if fatal else RunStatus.SUCCEEDED)
    for number, end in enumerate(ends):
        if end == FATAL:
            assert found[number] in (S.FAILED, S.CANCELLED)
        elif end is None:
            assert found[number] in (S.CANCELLED, S.SKIPPED)
        else:
            assert found[number] is end or (fatal and found[number] is S.CANCELLED)
    assert not fatal or any(found[number] is S.FAILED for number in fatal)
    assert {found[number] for number in range(len(wanted), len(wanted) + 3)} == {S.SUCCEEDED}

    calls = Counter(made.provider.calls)
    assert set(calls.values()) <= {1}, calls
    with made.store.database.read() as connection:
        told = Counter(connection.scalars(select(events.c.row).where(events.c.run_id == run, events.c.kind.in_(ENDS))))
    assert told == {number: 1 for number, end in found.items() if end is not S.CANCELLED}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servers.sqlite_template(tmp_path_factory.mktemp("template"))


@given(wanted=wishes(), seed=st.integers(0, 1 << 30), most=MOST)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_workflows_on_sqlite(template: Path, wanted: list[Wish], seed: int, most: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copy(template, Path(folder, "gorgon.db"))
        with fleet(f"sqlite:///{path}", 2) as made:
            check(made, wanted, seed, most)


@pytest.fixture(scope="module")
def postgres_fleet(postgres_admin: str) -> Iterator[Fleet]:
    with servers.fresh_database(postgres_admin) as url:
        made = Fleet([open_store(url), open_store(url)])
        yield made
        made.close()


@given(wanted=wishes(), seed=st.integers(0, 1 << 30), most=MOST)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_workflows_on_postgresql(postgres_fleet: Fleet, wanted: list[Wish], seed: int, most: int | None) -> None:
    try:
        check(postgres_fleet, wanted, seed, most)
    finally:
        postgres_fleet.mailbox.waiting.clear()
        empty(postgres_fleet.store, but=["workers"])  # which go on: a claim needs a living worker
