"""From plans to canvases: golden trees of what each shape compiles to."""

from __future__ import annotations

from inspect import cleandoc

import pytest

from gorgon_common.canvas import lowering
from gorgon_common.workflow.plan import Join, Kind, Node, Plan
from tests.support.engine import agent, node, plan_of


def chain(length: int, *queues: str) -> Plan:
    return plan_of(
        *[
            agent(f"s{number}", *([number - 1] if number else []), queue=queues[number % len(queues)])
            for number in range(length)
        ]
    )


def fan(*branches: tuple[str, ...], origin: bool = True, join: bool = True) -> Plan:
    """A fan-out over branches (each a tuple of queues) and a fan-in."""
    top: list[Node] = [agent("start")] if origin else []
    ends = []
    for place, queues in enumerate(branches):
        for step, queue in enumerate(queues):
            before = len(top) - 1 if step else 0
            top.append(agent(f"b{place}{'abc'[step]}", *([before] if step or origin else []), queue=queue))
        ends.append(len(top) - 1)
    return plan_of(*top, *([agent("join", *ends)] if join else []))


ANTH, OPEN = "anthropic", "openai"

GOLDEN: dict[str, tuple[Plan, str]] = {
    "a run on one queue is one message": (
        chain(4, OPEN),
        """
        at the start:
          gorgon.agent s0 → s1 → s2 → s3  [openai]
        """,
    ),
    "a run across queues is a chain": (
        plan_of(agent("a"), agent("b", 0), agent("c", 1, queue=ANTH), agent("d", 2), agent("e", 3)),
        """
        at the start:
          chain
          ├─ gorgon.agent a → b  [openai]
          ├─ gorgon.agent c  [anthropic]
          └─ gorgon.agent d → e  [openai]
        """,
    ),
    "a long chain is cut": (
        chain(13, OPEN, ANTH),
        """
        at the start:
          chain
          ├─ gorgon.agent s0  [openai]
          ├─ gorgon.agent s1  [anthropic]
          ├─ gorgon.agent s2  [openai]
          ├─ gorgon.agent s3  [anthropic]
          ├─ gorgon.agent s4  [openai]
          ├─ gorgon.agent s5  [anthropic]
          ├─ gorgon.agent s6  [openai]
          ├─ gorgon.agent s7  [anthropic]
          ├─ gorgon.agent s8  [openai]
          └─ gorgon.agent s9  [anthropic]
        after s9:
          chain
          ├─ gorgon.agent s10  [openai]
          ├─ gorgon.agent s11  [anthropic]
          └─ gorgon.agent s12  [openai]
        """,
    ),
    "a matched fan-out and fan-in is a chord": (
        fan((OPEN,), (ANTH,), (OPEN,)),
        """
        at the start:
          gorgon.agent start  [openai]
        after start:
          chord
          ├─ group
          │  ├─ gorgon.agent b0a  [openai]
          │  ├─ gorgon.agent b2a  [openai]
          │  └─ gorgon.agent b1a  [anthropic]
          └─ gorgon.agent join  [openai]
        """,
    ),
    "branches of a chord may be runs and chains": (
        fan((OPEN, OPEN), (OPEN, ANTH), (ANTH,)),
        """
        at the start:
          gorgon.agent start  [openai]
        after start:
          chord
          ├─ group
          │  ├─ chain
          │  │  ├─ gorgon.agent b1a  [openai]
          │  │  └─ gorgon.agent b1b  [anthropic]
          │  ├─ gorgon.agent b0a → b0b  [openai]
          │  └─ gorgon.agent b2a  [anthropic]
          └─ gorgon.agent join  [openai]
        """,
    ),
    "a fan-in of what stands at the start is a chord": (
        fan((OPEN,), (ANTH,), origin=False),
        """
        at the start:
          chord
          ├─ group
          │  ├─ gorgon.agent b0a  [openai]
          │  └─ gorgon.agent b1a  [anthropic]
          └─ gorgon.agent join  [openai]
        """,
    ),
    "a fan-out without a fan-in is a group": (
        fan((OPEN,), (ANTH,), join=False),
        """
        at the start:
          gorgon.agent start  [openai]
        after start:
          group
          ├─ gorgon.agent b0a  [openai]
          └─ gorgon.agent b1a  [anthropic]
        """,
    ),
    "any other join has its counter alone": (
        plan_of(agent("a"), agent("b", 0), agent("c", 0), agent("d", 1, 2), agent("e", 2)),
        """
        at the start:
          gorgon.agent a  [openai]
        after a:
          group
          ├─ gorgon.agent b  [openai]
          └─ gorgon.agent c  [openai]
        after b, c:
          gorgon.agent d  [openai]
        after c:
          gorgon.agent e  [openai]
        """,
    ),
    "a join of only some of a fan-out is no chord": (
        plan_of(agent("a"), agent("b", 0), agent("c", 0), agent("d", 0), agent("e", 1, 2)),
        """
        at the start:
          gorgon.agent a  [openai]
        after a:
          group
          ├─ gorgon.agent b  [openai]
          ├─ gorgon.agent c  [openai]
          └─ gorgon.agent d  [openai]
        after b, c:
          gorgon.agent e  [openai]
        """,
    ),
    "conditions, other join rules and inline steps end a segment": (
        plan_of(
            agent("a"),
            agent("b", 0, condition="x"),
            agent("c", 1),
            node("note", 2, kind=Kind.CHECKPOINT),
            agent("d", 3),
            agent("e", 4, join=Join.ALL_DONE),
        ),
        """
        at the start:
          gorgon.agent a  [openai]
        after a:
          if its condition holds: gorgon.agent b  [openai]
        after b:
          gorgon.agent c  [openai]
        after c:
          in place: checkpoint note
        after note:
          gorgon.agent d  [openai]
        after d:
          if its condition holds: gorgon.agent e  [openai]
        """,
    ),
    "a map is a chord of lanes with its reduce": (
        plan_of(
            agent("a"),
            node("m", 0, kind=Kind.MAP, bodies={"item": (6,), "reduce": (7,)}),
            agent("z", 1),
            templates=[agent("m[]", container=1), agent("m.reduce", container=1, queue=ANTH)],
        ),
        """
        at the start:
          gorgon.agent a  [openai]
        after a:
          in place: map m
          ├─ group of parallel lanes: gorgon.agent m  [openai]
          └─ then, as a chord's body: gorgon.agent m.reduce  [anthropic]
        after m:
          gorgon.agent z  [openai]
        """,
    ),
    "a group inside a map": (
        plan_of(
            node("m", kind=Kind.MAP, bodies={"item": (4,)}),
            templates=[
                node("m[]", kind=Kind.GROUP, container=0, bodies={"steps": (5, 6)}),
                agent("x", container=4),
                agent("y", container=4, queue=ANTH),
            ],
        ),
        """
        at the start:
          in place: map m
          └─ group of parallel lanes: in place: group m
             ├─ steps: gorgon.agent x  [openai]
             └─ steps: gorgon.agent y  [anthropic]
        """,
    ),
    "kinds and queues have messages of their own": (
        plan_of(agent("a"), node("b", kind=Kind.COMMAND, queue="command"), node("c")),
        """
        at the start:
          group
          ├─ gorgon.agent a  [openai]
          ├─ gorgon.command b  [command]
          └─ gorgon.noop c  [openai]
        """,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_trees(name: str) -> None:
    plan, tree = GOLDEN[name]
    assert lowering.describe(plan) == cleandoc(tree)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_step_is_in_the_canvas_once(name: str) -> None:
    plan, _ = GOLDEN[name]
    shown: list[str] = []

    def walk(entry: object) -> None:
        if isinstance(entry, dict):
            shown.extend(entry.get("steps", ()))
            for key in ("chain", "group", "header", "body", "chord", "canvas"):
                walk(entry.get(key))
            shown.extend(entry.get("inline", ()))
            shown.extend(entry.get("conditional", ()))
        elif isinstance(entry, list):
            for part in entry:
                walk(part)

    walk(lowering.to_dict(plan))
    assert sorted(shown) == sorted(entry.id for entry in plan.nodes[: plan.top - 3])


def test_many_heads_are_a_few_to_a_message() -> None:
    slow = lowering.group(*_shaped(plan_of(*[agent(f"s{number}") for number in range(70)])))
    assert [len(member.nodes) for member in slow.members if isinstance(member, lowering.Message)] == [4] * 17 + [2]
    fast = lowering.group(*_shaped(plan_of(*[node(f"s{number}") for number in range(130)])))
    assert [len(member.nodes) for member in fast.members if isinstance(member, lowering.Message)] == [64, 64, 2]


def test_few_heads_have_a_message_each_so_that_several_workers_share_them() -> None:
    whole = lowering.group(*_shaped(plan_of(*[agent(f"s{number}") for number in range(12)])))
    assert len(whole.members) == 12


def _shaped(plan: Plan) -> tuple[Plan, lowering.Shape, list[int]]:
    return plan, lowering.shape(plan), list(range(plan.top - 3))


def test_only_heads_of_a_chord_are_grouped() -> None:
    plan, _ = GOLDEN["branches of a chord may be runs and chains"]
    found = lowering.shape(plan)
    assert {plan.nodes[number].id for number in lowering.grouped(found)} == {"b0a", "b1a", "b2a"}
    assert lowering.grouped(lowering.shape(GOLDEN["any other join has its counter alone"][0])) == frozenset()


def test_a_thousand_steps_are_analysed_at_once() -> None:
    """Linear in the steps: no part of a plan is walked again for every step."""
    for plan in (
        chain(3000, OPEN, ANTH),
        fan(*[(OPEN,)] * 3000),
        plan_of(*[agent(f"s{number}") for number in range(3000)]),
    ):
        assert len(lowering.shape(plan).plain) >= 3000
