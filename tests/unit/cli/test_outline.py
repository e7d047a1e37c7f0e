"""A run as lines, and the lines as text."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest

from gorgon_common.cli import screen, terminal
from gorgon_common.cli.outline import label, outline
from gorgon_common.cli.screen import Plain, RunDrawing, cut_lines, ending, readable

NOW = datetime(2026, 11, 22, 9, 30, 10, tzinfo=UTC)


def at(seconds: float) -> str:
    return f"2026-11-22T09:30:{seconds:09.6f}Z"


def step(name: str, status: str = "succeeded", *, item: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "item": item,
        "kind": "agent",
        "status": status,
        "reason": None,
        "error": None,
        "attempts": 1,
        "tokens": {"input": 0, "output": 0},
        "cost_usd": None,
        "started_at": None,
        "finished_at": None,
        **more,
    }


def run(*steps: dict[str, Any], status: str = "running", **more: Any) -> dict[str, Any]:
    return {
        "run_id": "run_1",
        "workflow": "w",
        "status": status,
        "outputs": None,
        "error": None,
        "cost_usd": 0.0,
        "tokens": {"input": 0, "output": 0},
        "started_at": at(0),
        "finished_at": None,
        "steps": list(steps),
        **more,
    }


def drawn(drawing: Any, *, width: int = 110, height: int = 40) -> str:
    console = terminal.console(io.StringIO())
    console.size = (width, height)
    console.print(drawing)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def shape(document: dict[str, Any]) -> list[tuple[str, int]]:
    return [(line.name, line.depth) for line in outline(document, NOW)]


class TestOutline:
    def test_a_map_is_one_line_with_its_progress_and_failed_items(self) -> None:
        items = [
            step("build", "succeeded" if n < 3 else "failed" if n == 3 else "running", item=n, parent="build",
                 tokens={"input": 10, "output": 5}, cost_usd=0.5, role="builder", error="bad" if n == 3 else None)
            for n in range(6)
        ]  # fmt: skip
        lines = outline(run(step("build", "waiting", kind="map"), *items), NOW)
        assert [(line.name, line.depth) for line in lines] == [("build", 0), ("build[3]", 1)]
        build = lines[0]
        assert (build.done, build.failed, build.total) == (4, 1, 6)
        assert (build.tokens, build.cost, build.who) == (90, 3.0, "builder")

    def test_groups_nest(self) -> None:
        rows = [
            step("g", kind="group"),
            step("a", parent="g"),
            step("h", kind="group", parent="g"),
            step("b", parent="h"),
            step("c", parent="g"),
            step("other"),
        ]
        assert shape(run(*rows)) == [("g", 0), ("a", 1), ("h", 1), ("b", 2), ("c", 1), ("other", 0)]

    def test_a_loop_shows_its_present_iteration(self) -> None:
        rows = [step("fix", "waiting", kind="loop")]
        for n in range(3):
            rows += [
                step("fix", kind="group", item=n, parent="fix"),
                step("patch", item=n, parent="fix"),
                step("check", "running" if n == 2 else "succeeded", item=n, parent="fix"),
            ]
        rows.append(step("report"))
        lines = outline(run(*rows), NOW)
        assert [(line.name, line.depth, line.status) for line in lines] == [
            ("fix", 0, "waiting"),
            ("patch", 1, "succeeded"),
            ("check", 1, "running"),
            ("report", 0, "succeeded"),
        ]
        assert lines[0].total == 3

    def test_items_that_are_groups_stay_inside_their_map(self) -> None:
        rows = [step("m", kind="map")]
        for n in range(2):
            rows += [step("m", kind="group", item=n, parent="m"), step("inner", item=n, parent="m")]
        rows += [step("m.reduce", parent="m"), step("after")]
        assert shape(run(*rows)) == [("m", 0), ("reduce", 1), ("after", 0)]

    def test_a_fallback_belongs_to_its_step(self) -> None:
        rows = [step("x", "failed"), step("x.fallback", parent="x"), step("y")]
        assert shape(run(*rows)) == [("x", 0), ("fallback", 1), ("y", 0)]

    def test_the_engines_own_joins_are_not_shown(self) -> None:
        assert outline(run(step("$gate", kind="gate"), step("$end", kind="end")), NOW) == []

    def test_what_runs_counts_until_now(self) -> None:
        rows = [step("a", "running", started_at=at(7.5)), step("b", started_at=at(1), finished_at=at(1.25)), step("c")]
        assert [line.elapsed for line in outline(run(*rows), NOW)] == [2.5, 0.25, None]

    def test_labels(self) -> None:
        assert label(step("build", item=3)) == "build[3]"
        assert label(step("refine", item=0)) == "refine[0]"
        assert label(step("plan")) == "plan"


class TestDrawing:
    def test_every_state_says_what_matters(self) -> None:
        rows = [
            step("plan", role="planner", model="big", tokens={"input": 1000, "output": 234}, cost_usd=0.5,
                 started_at=at(0), finished_at=at(1.25)),
            step("wait", "waiting", reason="quota until 09:31"),
            step("docs", "skipped", reason="review.approved is false"),
            step("bad", "failed", error={"message": "No such model.", "hint": "Models: a, b."}),
            step("again", "running", role="tester", attempts=2, started_at=at(9)),
            step("later", "pending"),
        ]  # fmt: skip
        text = drawn(RunDrawing(run(*rows, tokens={"input": 1000, "output": 234}, cost_usd=0.5), NOW, target="sandbox"))
        assert "w  sandbox · run_1" in text
        assert "✓ plan" in text
        assert "planner · big" in text
        assert "1,234 tok  $0.5000   1.2 s" in text
        assert "quota until 09:31" in text
        assert "skipped: review.approved is false" in text
        assert "No such model." in text
        assert "Models: a, b." in text
        assert "attempt 2" in text
        assert "3 of 6 steps · 1,234 tokens · $0.5000 · 10.0 s" in text

    def test_a_run_taller_than_the_terminal_keeps_what_matters(self) -> None:
        rows = [step(f"s{n:03}", "pending" if n > 60 else "succeeded") for n in range(200)]
        rows[50].update(status="failed", error="broken")
        rows[61].update(status="running")
        text = drawn(RunDrawing(run(*rows), NOW), height=20)
        assert len(text.splitlines()) <= 20
        assert "broken" in text
        assert "s061" in text
        assert "more succeeded" in text
        assert "more pending" in text

    @pytest.mark.parametrize("width", [40, 60, 80, 200])
    def test_it_fits_the_width(self, width: int) -> None:
        rows = [step("a_rather_long_name_of_a_step_that_goes_on", "failed", error="word " * 40)]
        assert max(map(len, drawn(RunDrawing(run(*rows), NOW), width=width).splitlines())) <= width

    def test_text_of_a_model_is_not_markup(self) -> None:
        rows = [step("a", "failed", error="[red]not [/bold] markup[/]")]
        assert "[red]not [/bold] markup[/]" in drawn(RunDrawing(run(*rows), NOW))


class TestEnding:
    def test_success_shows_outputs(self) -> None:
        done = run(status="succeeded", finished_at=at(4.2), outputs={"score": 0.5, "text": "a\nb", "list": [{"x": 1}]})
        text = drawn(ending(done, full=False, now=NOW))
        assert "✓ w succeeded  in 4.2 s" in text
        assert "score  0.5" in text
        assert "text\n  a\n  b" in text
        assert "list\n  - x: 1" in text

    def test_failure_says_why_what_to_do_and_how_to_resume(self) -> None:
        done = run(status="failed", finished_at=at(1), error={"message": "`a` failed: no.", "hint": "Mend it."})
        text = drawn(ending(done, full=False, now=NOW, server="http://s"))
        assert "✗ w failed" in text
        assert "`a` failed: no." in text
        assert "Mend it." in text
        assert "gorgon runs resume run_1 --server http://s" in text

    def test_long_outputs_are_cut_with_the_way_to_see_all(self) -> None:
        done = run(status="succeeded", finished_at=at(1), outputs={"text": "line\n" * 40})
        cut, whole = (drawn(ending(done, full=full, now=NOW), height=100) for full in (False, True))
        assert "… 32 more lines" in cut
        assert "gorgon runs show run_1 --full" in cut
        assert whole.count("line") == 40
        assert "more lines" not in whole


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("a\nb", ["a", "b"]),
        (None, ["null"]),
        (True, ["true"]),
        ({"a": 1, "b": {"c": [1, 2]}}, ["a: 1", "b:", "  c:", "    - 1", "    - 2"]),
        ([{"a": 1, "b": 2}, "x"], ["- a: 1", "  b: 2", "- x"]),
        ({"a": [], "b": {}, "c": "x\ny"}, ["a: []", "b: {}", "c:", "  x", "  y"]),
        ("", [""]),
    ],
)
def test_readable(value: Any, lines: list[str]) -> None:
    assert list(readable(value)) == lines


def test_one_huge_line_is_cut() -> None:
    lines, more = cut_lines("x" * 100_000, full=False)
    assert len(lines[0]) < 2_000
    assert more
    assert cut_lines("x" * 100_000, full=True) == (["x" * 100_000], "")


class TestPlain:
    def test_a_line_for_each_change_and_none_twice(self, capsys: pytest.CaptureFixture[str]) -> None:
        view = Plain()
        view.update(run(step("a", "running"), step("b", "pending"), status="running"))
        view.update(run(step("a", "running"), step("b", "pending"), status="running"))
        done = step("a", tokens={"input": 1, "output": 2}, cost_usd=0.25, started_at=at(0), finished_at=at(2))
        view.update(run(done, step("b", "skipped", reason="not\nneeded"), status="running"))
        assert capsys.readouterr().out.splitlines() == [
            "run_1  running  w",
            "a  running",
            "a  succeeded  2.0 s  3 tokens  $0.2500",
            "b  skipped  not needed",
        ]


def test_money_and_time_for_people() -> None:
    assert [terminal.money(value) for value in (None, 0, 0.00004, 0.0123, 4.2)] == [
        "–",
        "$0",
        "<$0.0001",
        "$0.0123",
        "$4.20",
    ]
    assert [terminal.seconds(value) for value in (0.0854, 0.999, 3.21, 99.94, 245, 3_725)] == [
        "85 ms", "1.0 s", "3.2 s", "99.9 s", "4m 05s", "1h 02m",
    ]  # fmt: skip


def test_the_live_tree_ends_with_the_last_state() -> None:
    file = io.StringIO()
    console = terminal.console(file, force_terminal=True)
    tree = screen.Tree(console, target="sandbox")
    tree.update(run(step("a", "running")))
    tree.say("wait")
    tree.update(run(step("a"), status="succeeded"))
    tree.close()
    assert "✓" in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in file.getvalue()
