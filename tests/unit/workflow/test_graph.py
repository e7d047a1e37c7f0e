"""Plans as pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon_common.workflow.graph import condition_text, levels, to_dict, to_mermaid, to_text
from gorgon_common.workflow.plan import Dep, Kind, Node, Plan

GOLDEN = Path(__file__).parent / "golden"
PLANS = sorted(GOLDEN.glob("*.json"))


def plan(name: str) -> Plan:
    return Plan.from_json((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_the_text_of_the_example() -> None:
    assert to_text(plan("full_example")) == "\n".join(
        [
            "Feature Build 1.0",
            "  1. plan  planner (anthropic)",
            "  2. build  map task of {{plan.tasks}}, 8 at a time  ← plan  if plan.approved == true",
            "     for each item: builder (anthropic)",
            "  3. tests  $ pytest -q  ← build",
            "  4. review  reviewer (anthropic:claude-opus)  ← build, tests  if tests.exit_code == 0",
            "  5. gate  approval: Ship it?  ← review",
            "  6. pr  github.create_pull_request  ← plan, review, gate",
            "on error:",
            "  1. tell  slack.post_message",
            "finally:",
            "  1. tidy  $ rm -rf tmp",
        ]
    )


def test_inner_steps_stand_under_their_group() -> None:
    text = to_text(plan("loops_and_groups"))
    assert "  2. polish  loop until judge.approved, at most 4 times  ← outline" in text
    assert (
        "     again: group\n       1. write  agent (anthropic)\n       2. judge  reviewer (anthropic)  ← write" in text
    )
    assert "     2. third  agent (anthropic)  ← left, right" in text


def test_steps_side_by_side_share_a_number() -> None:
    lines = to_text(plan("older_auto_parallel")).splitlines()
    assert lines[1].startswith("  1. a ")
    assert lines[2].startswith("     b ")
    assert lines[3] == "  2. c  agent (anthropic)  ← a, b*"
    assert lines[4] == "* waits for it, however it ends"


def test_a_fallback_is_shown_below_its_step() -> None:
    assert "     if it fails: builder (anthropic:claude-haiku)" in to_text(plan("failure_modes"))


def test_mermaid_of_the_snippet() -> None:
    assert to_mermaid(plan("snippet_feature_build")) == "\n".join(
        [
            "flowchart TD",
            '  n0(["plan<br/>planner (anthropic)"])',
            '  n1(["build<br/>builder (anthropic)<br/>if plan.approved == true"])',
            "  n0 --> n1",
        ]
    )


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_picture_holds_every_step_once(path: Path) -> None:
    made = Plan.from_json(path.read_text(encoding="utf-8"))
    own = {Kind.GATE, Kind.FINALLY, Kind.END}
    steps = [index for index, node in enumerate(made.nodes) if node.kind not in own]
    mermaid = to_mermaid(made)
    shapes = [line.strip().removeprefix("subgraph ") for line in mermaid.splitlines() if '["' in line or '"' in line]
    for index in steps:
        assert sum(shape.startswith((f"n{index}[", f"n{index}(", f"n{index}{{", f"n{index}>")) for shape in shapes) == 1
    assert mermaid.count("subgraph ") == sum(line.strip() == "end" for line in mermaid.splitlines())
    described = to_dict(made)
    assert [node["index"] for node in described["nodes"]] == steps
    assert all(edge["from"] in steps and edge["to"] in steps for edge in described["edges"])
    assert not any(node["id"].startswith("$") for node in described["nodes"])
    text = to_text(made)
    assert all(made.nodes[index].id in text for index in steps if made.nodes[index].container is None)


def test_labels_are_escaped() -> None:
    spec = {"provider": "openai", "role": 'a"<b>#'}
    made = to_mermaid(Plan(name="x", nodes=(Node("s", Kind.AGENT, spec=spec),), top=1))
    assert "a#quot;#lt;b#gt;#35;" in made


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ("a.b  ==\n1", "a.b == 1"),
        ({"field": "a.b", "operator": "equals", "value": True}, "a.b == true"),
        ({"field": "a", "operator": "in", "value": ["x", 1]}, 'a in ["x", 1]'),
        ({"field": "a", "operator": "not_empty"}, "a not empty"),
        ({"not": {"field": "a", "operator": "exists"}}, "!(a exists)"),
        ({"any": ["x", {"all": ["y", "z"]}]}, "(x || (y && z))"),
    ],
)
def test_conditions_in_one_line(condition: object, text: str) -> None:
    assert condition_text(condition) == text


@given(st.data())
def test_levels_are_the_longest_way_to_a_node(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    edges = [data.draw(st.sets(st.integers(0, index - 1))) if index else set() for index in range(size)]
    nodes = tuple(Node(f"s{i}", Kind.NOOP, deps=tuple(Dep(d) for d in sorted(edges[i]))) for i in range(size))
    layers = levels(Plan(name="x", nodes=nodes, top=size))
    depth = {index: number for number, layer in enumerate(layers) for index in layer}
    assert sorted(depth) == list(range(size))
    for index in range(size):
        assert depth[index] == max((depth[dep] + 1 for dep in edges[index]), default=0)
