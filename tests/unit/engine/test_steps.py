"""What becomes of steps, on a real store: outcomes of one step, and composites from their expansion to their end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select

from gorgon_common.costs.usage import Usage
from gorgon_common.engine import rendering
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.ports import AgentCall
from gorgon_common.engine.records import Claimed, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import Final, RateLimited, Retryable, Throttled, Unavailable
from gorgon_common.persistence.tables import events, ledger
from gorgon_common.workflow.plan import Dep, Join, Kind, Node, OnFailure, Plan, Ref, Retry
from tests.support.engine import Desk, agent, node, plan_of
from tests.support.fleet import Fleet, fleet

S = StepStatus
R = RunStatus


def step(name: str, *after: int, prompt: str = "go", **fields: Any) -> Node:
    return agent(name, *after, **{"spec": {"provider": "openai", "model": "gpt-test", "prompt": prompt}, **fields})


def failing(error: Exception) -> Callable[[AgentCall], str]:
    def call(_: AgentCall) -> str:
        raise error

    return call


class Lab:
    """Runs a plan to its end and says what came of it."""

    def __init__(self, made: Fleet) -> None:
        self.made = made
        self.made.provider.behaves["boom"] = failing(Final("boom"))

    def run(self, plan: Plan, **inputs: Any) -> RunStatus:
        self.number = self.made.processes[0].submit(plan, inputs)
        self.made.drain()
        return self.made.status(self.number)

    def output(self, row: int) -> Any:
        return self.end(row).output

    def end(self, row: int) -> Any:
        key = step_id(self.number, row)
        return self.made.store.checkpoints([key])[key]

    def state(self, row: int) -> StepStatus:
        return self.made.statuses(self.number)[row]

    def error(self) -> dict[str, Any]:
        found = self.made.store.failure(self.number)[0]
        assert found is not None
        return found


@pytest.fixture
def lab(sqlite_url: str) -> Iterator[Lab]:
    with fleet(sqlite_url) as made:
        yield Lab(made)


# One step


def test_a_steps_output_is_what_the_next_ones_name_stands_for(lab: Lab) -> None:
    second = step("b", 0, prompt="after {{a}}", refs={"a": Ref("step", node=0)})
    assert lab.run(plan_of(step("a", prompt="first"), second)) is R.SUCCEEDED
    assert (lab.output(0), lab.output(1)) == ("first", "after first")
    assert lab.end(0).detail["model"] == "gpt-test"


def test_a_failure_ends_the_run_and_says_what_to_do(lab: Lab) -> None:
    error = Final("The key is not valid.", hint="Set OPENAI_API_KEY.")
    lab.made.provider.behaves["bad"] = failing(error)
    assert lab.run(plan_of(step("a", prompt="bad"), step("b", 0))) is R.FAILED
    assert (lab.state(0), lab.state(1)) == (S.FAILED, S.CANCELLED)
    told = lab.error()
    assert (told["step"], told["message"], told["hint"]) == ("a", "The key is not valid.", "Set OPENAI_API_KEY.")
    assert told["summary"] == "test: step a failed: The key is not valid."


@pytest.mark.parametrize(
    ("way", "state", "after"),
    [
        (OnFailure("skip"), S.SKIPPED, S.SKIPPED),
        (OnFailure("default", value={"a": 1}), S.SUCCEEDED, S.SUCCEEDED),
        (OnFailure("model", model="openai:gpt-other"), S.SUCCEEDED, S.SUCCEEDED),
    ],
)
def test_ways_out_of_a_failure(lab: Lab, way: OnFailure, state: StepStatus, after: StepStatus) -> None:
    def first_model_only(call: AgentCall) -> str:
        if call.model == "gpt-test":
            raise Final("boom")
        return "the other one"

    lab.made.provider.behaves["bad"] = first_model_only
    assert lab.run(plan_of(step("a", prompt="bad", on_failure=way), step("b", 0))) is R.SUCCEEDED
    assert (lab.state(0), lab.state(1)) == (state, after)
    expected = {"skip": None, "default": {"a": 1}, "model": "the other one"}
    assert lab.output(0) == expected[way.action]
    if way.action == "skip":
        assert lab.end(0).reason == "it failed: boom"
        assert lab.end(1).reason == "`a` was skipped"
    else:
        assert lab.end(0).detail["fallback"] == "boom"


def test_a_fallback_step_takes_over_and_knows_the_error(lab: Lab) -> None:
    instead = step("a.fallback", prompt="instead of {{error.message}}", container=0, refs={"error": Ref("error")})
    first = step("a", prompt="boom", on_failure=OnFailure("step"), bodies={"fallback": (5,)})
    assert lab.run(plan_of(first, step("b", 0), templates=[instead])) is R.SUCCEEDED
    assert lab.output(0) == "instead of boom"
    assert lab.state(1) is S.SUCCEEDED


def test_a_fallback_that_fails_too_fails_the_step(lab: Lab) -> None:
    instead = step("a.fallback", prompt="boom", container=0)
    first = step("a", prompt="boom", on_failure=OnFailure("step"), bodies={"fallback": (4,)})
    assert lab.run(plan_of(first, templates=[instead])) is R.FAILED
    assert "boom" in lab.error()["message"]


def test_attempts_are_counted_and_end(lab: Lab) -> None:
    tries: list[int] = []

    def busy(call: AgentCall) -> str:
        tries.append(1)
        raise Retryable("busy", kind="server")

    lab.made.provider.behaves["busy"] = busy
    lab.number = lab.made.processes[0].submit(
        plan_of(step("a", prompt="busy", retry=Retry(max=2, initial=30, jitter="none")))
    )
    lab.made.drain()
    for _ in range(2):
        assert lab.state(0) is S.WAITING
        lab.made.elapse(61)
        lab.made.processes[0].sweep.once()
        lab.made.drain()
    assert len(tries) == 3
    assert lab.end(0).attempts == 3
    assert lab.made.status(lab.number) is R.FAILED


def executed(lab: Lab, plan: Plan, row: int = 0, **fields: Any) -> Any:
    """Return the outcome of one step that is claimed by hand."""
    lab.made.mailbox.away = True
    run = lab.made.processes[0].submit(plan)
    held = Desk(lab.made.store).one(run, row)
    return lab.made.processes[0].machine.executor.execute(Claimed(*[fields.get(n, getattr(held, n)) for n in FIELDS]))


FIELDS = ("id", "token", "node", "weight", "queue", "attempt", "parent", "position", "crashes")


def test_a_rate_limit_is_a_wait_and_no_attempt(lab: Lab) -> None:
    limited = RateLimited("later")
    limited.retry_after = 12.0
    lab.made.provider.behaves["limited"] = failing(limited)
    outcome = executed(lab, plan_of(step("a", prompt="limited")))
    assert isinstance(outcome, Snoozed)
    assert (outcome.seconds, outcome.reason, outcome.attempt) == (12.0, "retry_after", False)
    assert [record.outcome for record in outcome.calls] == ["rate_limited"]


def models(*names: str, prompt: str) -> Node:
    return agent("a", spec={"models": list(names), "prompt": prompt})


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (lambda: RateLimited("later", retry_after=61.0), ["gpt-test", "gpt-other"]),
        (lambda: RateLimited("later", retry_after=59.0), ["gpt-test"]),
        (lambda: RateLimited("later"), ["gpt-test"]),
        (lambda: throttled("breaker", 1.0), ["gpt-test", "gpt-other"]),
        (lambda: throttled("retry_after", 61.0), ["gpt-test", "gpt-other"]),
        (lambda: throttled("retry_after", 59.0), ["gpt-test"]),
        (lambda: throttled("requests_per_day", 600.0), ["gpt-test", "gpt-other"]),
        (lambda: throttled("requests", 600.0), ["gpt-test"]),
        (lambda: throttled("turn", 600.0), ["gpt-test"]),
        (lambda: Final("no such model"), ["gpt-test", "gpt-other"]),
    ],
)
def test_which_waits_are_a_reason_to_take_the_next_model(
    lab: Lab, error: Callable[[], Exception], asked: list[str]
) -> None:
    seen: list[str] = []

    def busy(call: AgentCall) -> str:
        seen.append(call.model)
        if call.model == "gpt-test":
            raise error()
        return "the other one"

    lab.made.provider.behaves["busy"] = busy
    outcome = executed(lab, plan_of(models("openai:gpt-test", "openai:gpt-other", prompt="busy")))
    assert seen == asked
    assert isinstance(outcome, Snoozed) == (len(asked) == 1)


def throttled(reason: str, seconds: float) -> Throttled:
    return Throttled(f"because of {reason}", seconds=seconds, reason=reason, until=0.0)


def test_where_no_model_can_serve_the_shortest_wait_is_taken(lab: Lab) -> None:
    waits = {"gpt-a": 300.0, "gpt-b": 200.0, "gpt-c": 400.0}

    def busy(call: AgentCall) -> str:
        raise throttled("retry_after", waits[call.model])

    lab.made.provider.behaves["busy"] = busy
    outcome = executed(lab, plan_of(models(*(f"openai:{name}" for name in waits), prompt="busy")))
    assert (outcome.seconds, outcome.reason, outcome.attempt) == (200.0, "retry_after", False)


def test_a_failure_that_may_pass_is_tried_again_rather_than_to_wait_for_long(lab: Lab) -> None:
    def busy(call: AgentCall) -> str:
        raise throttled("retry_after", 3600.0) if call.model == "gpt-a" else Retryable("busy")

    lab.made.provider.behaves["busy"] = busy
    step_ = agent("a", spec={"models": ["openai:gpt-a", "openai:gpt-b"], "prompt": "busy"}, retry=Retry(max=2))
    outcome = executed(lab, plan_of(step_))
    assert (outcome.reason, outcome.attempt) == ("retry", True)
    assert outcome.seconds < 60


@pytest.mark.parametrize(("usage", "patient"), [(Usage(), False), (Usage(input_tokens=5), True), (None, True)])
def test_only_what_was_paid_for_makes_the_next_model_wait_on_its_slot(
    lab: Lab, usage: Usage | None, patient: bool
) -> None:
    seen: list[bool] = []

    def fails(call: AgentCall) -> str:
        seen.append(call.patient)
        if call.model == "gpt-other":
            return "the other one"
        error = Retryable("broken", kind="server")
        error.usage = usage
        raise error

    lab.made.provider.behaves["busy"] = fails
    executed(lab, plan_of(models("openai:gpt-test", "openai:gpt-other", prompt="busy")))
    assert seen == [False, patient]


def test_a_step_that_has_killed_three_workers_is_not_begun(lab: Lab) -> None:
    outcome = executed(lab, plan_of(step("a")), crashes=3)
    assert outcome.result.error["kind"] == "poison"
    assert lab.made.provider.calls == []


def rows_of(lab: Lab) -> list[tuple[str, int | None, int]]:
    with lab.made.store.database.read() as connection:
        found = connection.execute(ledger.select().order_by(ledger.c.step_id, ledger.c.token, ledger.c.ordinal))
        return [(row.outcome, row.cost_micro, row.input_tokens) for row in found if row.provider != "none"]


def test_an_exception_in_a_call_is_recorded_and_named(lab: Lab) -> None:
    lab.made.provider.behaves["bad"] = failing(ZeroDivisionError("by nothing"))
    assert lab.run(plan_of(step("a", prompt="bad", retry=Retry(max=3)))) is R.FAILED
    assert lab.error()["kind"] == "internal"
    assert "ZeroDivisionError: by nothing" in lab.error()["message"]
    assert rows_of(lab) == [("internal", None, 0)], "what was used nobody knows"
    assert len(lab.made.provider.calls) == 1


def test_an_exception_behind_a_call_is_recorded_and_named(lab: Lab) -> None:
    broken = {"provider": "openai", "model": "m", "prompt": "go", "schema": {"type": "string", "pattern": "("}}
    lab.made.provider.behaves["go"] = '"text"'
    assert lab.run(plan_of(agent("a", spec=broken))) is R.FAILED
    assert lab.error()["kind"] == "internal"
    assert rows_of(lab) == [("internal", 1, 1)], "the call is paid, whatever became of its reply"


def test_an_exception_beside_a_call_fails_the_step_under_its_own_name(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "MAX_OUTPUT_BYTES", "not a number")
    assert lab.run(plan_of(step("a"))) is R.FAILED
    assert (lab.error()["kind"], lab.error()["message"][:42]) == (
        "internal",
        "Gorgon failed at this step: TypeError: '>'",
    )
    assert rows_of(lab) == [("ok", 1, 1)]


class AwayLater:
    """A store of budgets without any, which is away from the second call on."""

    def __init__(self) -> None:
        self.noted = 0

    def applying(self, info: Any) -> list[Any]:
        return []

    def note(self, key: Any, info: Any, bound: Any) -> None:
        self.noted += 1
        if self.noted > 1:
            raise Unavailable("The database is away.")

    def over(self, key: Any) -> bool:
        return False

    def unknown(self, key: Any, bound: Any) -> None:
        raise Unavailable("The database is away.")

    def keep(self, step: Any, calls: Any, body: str) -> None:
        raise Unavailable("The database is away.")


def test_a_database_that_is_away_between_two_calls_takes_none_of_them_with_it(lab: Lab) -> None:
    object.__setattr__(lab.made.processes[0].machine.executor.services, "budgets", AwayLater())
    asks = {"provider": "openai", "model": "m", "prompt": "go", "schema": {"type": "integer"}}
    outcome = executed(lab, plan_of(agent("a", spec=asks)))
    assert isinstance(outcome, Snoozed)
    assert (outcome.attempt, outcome.message) == (False, "The database is away.")
    assert [(call.outcome, call.cost_micro) for call in outcome.calls] == [("invalid", 1)]


def test_an_output_over_the_cap_fails_the_step(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_OUTPUT_BYTES", 100)
    lab.made.provider.behaves["large"] = "x" * 101
    assert lab.run(plan_of(step("a", prompt="large"))) is R.FAILED
    assert "at most 10 MB" in lab.error()["message"]
    assert "Write large results to a file" in lab.error()["hint"]


def test_a_provider_that_is_not_there_is_named(lab: Lab) -> None:
    other = agent("a", spec={"provider": "nowhere", "model": "m", "prompt": "go"})
    assert lab.run(plan_of(other)) is R.FAILED
    assert lab.error()["message"] == "There is no model provider 'nowhere'."


def test_an_expression_that_fails_fails_its_step(lab: Lab) -> None:
    bad = step("a", prompt="{{inputs.number / 0}}", refs={"inputs": Ref("input")})
    assert lab.run(plan_of(bad), number=1) is R.FAILED
    assert lab.error()["kind"] == "expression"


# Joins and phases


@pytest.mark.parametrize(
    ("join", "first", "second", "state"),
    [
        (Join.ALL_SUCCESS, "ok", "skip", S.SKIPPED),
        (Join.NONE_FAILED, "ok", "skip", S.SUCCEEDED),
        (Join.NONE_FAILED, "skip", "skip", S.SUCCEEDED),
        (Join.ANY_SUCCESS, "skip", "ok", S.SUCCEEDED),
        (Join.ANY_SUCCESS, "skip", "skip", S.SKIPPED),
        (Join.ALL_DONE, "skip", "skip", S.SUCCEEDED),
    ],
)
def test_join_rules(lab: Lab, join: Join, first: str, second: str, state: StepStatus) -> None:
    makes = {"ok": {}, "skip": {"condition": "false"}}
    assert (
        lab.run(plan_of(step("a", **makes[first]), step("b", **makes[second]), step("c", 0, 1, join=join)))
        is R.SUCCEEDED
    )
    assert lab.state(2) is state


def test_an_edge_that_only_orders_passes_no_skip_on(lab: Lab) -> None:
    after = Node("b", Kind.AGENT, "openai", (Dep(0, order=True),), spec=step("x").spec)
    assert lab.run(plan_of(step("a", condition="false"), after)) is R.SUCCEEDED
    assert (lab.state(0), lab.state(1)) == (S.SKIPPED, S.SUCCEEDED)


def test_a_skip_that_must_wait_is_told_with_its_cause(lab: Lab) -> None:
    lab.run(plan_of(step("a"), step("b", condition="false"), step("c", 0, 1), step("d", 2)))
    assert [lab.end(row).reason for row in (1, 2, 3)] == [
        "its condition is false: false: it is false",
        "`b` was skipped",
        "`c` was skipped",
    ]


def test_after_a_failure_come_on_error_and_finally(lab: Lab) -> None:
    plan = plan_of(
        step("a", prompt="boom"),
        step("mend", prompt="mend {{error.step}}", phase="on_error", refs={"error": Ref("error")}),
        step("tidy", phase="finally"),
    )
    assert lab.run(plan) is R.FAILED
    assert (lab.output(1), lab.state(2)) == ("mend a", S.SUCCEEDED)


def test_without_a_failure_on_error_is_skipped(lab: Lab) -> None:
    assert lab.run(plan_of(step("a"), step("mend", phase="on_error"), step("tidy", phase="finally"))) is R.SUCCEEDED
    assert (lab.state(1), lab.end(1).reason, lab.state(2)) == (S.SKIPPED, "no step has failed", S.SUCCEEDED)


def test_a_final_step_that_fails_fails_the_run(lab: Lab) -> None:
    assert lab.run(plan_of(step("a"), step("tidy", prompt="boom", phase="finally"))) is R.FAILED


def test_a_runs_outputs_are_its_templates(lab: Lab) -> None:
    plan = plan_of(step("a", prompt="one"), outputs={"x": "{{a}}!"}, output_refs={"a": Ref("step", node=0)})
    assert lab.run(plan) is R.SUCCEEDED
    assert lab.made.row(lab.number).outputs == '{"x":"one!"}'


# Inline steps


@pytest.mark.parametrize(
    ("how", "source", "output"),
    [
        ("concat", ["{{a}}", "{{b}}"], "one\n\ntwo"),
        ("json", ["{{a}}", "{{b}}"], ["one", "two"]),
        ("first", ["", "{{b}}"], "two"),
        ("vote", ["x", "{{b}}", "x"], "x"),
        ("merge", [{"a": 1, "b": 1}, {"b": 2}], {"a": 1, "b": 2}),
        ("merge", [[1], [2, 3]], [1, 2, 3]),
    ],
)
def test_aggregates(lab: Lab, how: str, source: Any, output: Any) -> None:
    refs = {"a": Ref("step", node=0), "b": Ref("step", node=1)}
    whole = node("all", 0, 1, kind=Kind.AGGREGATE, spec={"from": source, "how": how}, refs=refs)
    assert lab.run(plan_of(step("a", prompt="one"), step("b", prompt="two"), whole)) is R.SUCCEEDED
    assert lab.output(2) == output


def test_what_cannot_be_merged(lab: Lab) -> None:
    assert (
        lab.run(plan_of(node("all", kind=Kind.AGGREGATE, spec={"from": [{"a": 1}, [2]], "how": "merge"}))) is R.FAILED
    )
    assert "needs objects only, or lists only" in lab.error()["message"]


# Maps


def mapped(over: Any, *, item: Node | None = None, reduce: Node | None = None, **spec: Any) -> Plan:
    """A map `m` (row 0) and a step after it (row 1); templates are nodes 5 and 6."""
    bodies = {"item": (5,), **({"reduce": (6,)} if reduce else {})}
    whole = node("m", kind=Kind.MAP, bodies=bodies, spec={"over": over, "max_items": 10, **spec})
    each = item or step("m[]", prompt="item {{it}}", container=0, refs={"it": Ref("item", node=0)})
    return plan_of(whole, step("z", 0), templates=[each, *([reduce] if reduce else [])])


@pytest.mark.parametrize("lanes", [None, 1, 2, 9])
def test_results_of_a_map_are_in_the_order_of_its_items(lab: Lab, lanes: int | None) -> None:
    assert lab.run(mapped(list("abcde"), max_parallel=lanes)) is R.SUCCEEDED
    assert lab.output(0) == [f"item {letter}" for letter in "abcde"]
    assert lab.state(1) is S.SUCCEEDED


def test_a_mapping_is_mapped_by_its_entries(lab: Lab) -> None:
    item = step("m[]", prompt="{{it.key}}={{it.value}}", container=0, refs={"it": Ref("item", node=0)})
    lab.run(mapped({"x": 1, "y": 2}, item=item))
    assert lab.output(0) == ["x=1", "y=2"]


def test_a_map_of_nothing_has_no_results(lab: Lab) -> None:
    assert lab.run(mapped([])) is R.SUCCEEDED
    assert lab.output(0) == []


def test_a_map_is_over_a_list(lab: Lab) -> None:
    assert lab.run(mapped("{{1 + 1}}")) is R.FAILED
    assert "`over:` of `m` gives an integer, not a list." in lab.error()["message"]


def test_a_map_has_at_most_so_many_items(lab: Lab) -> None:
    assert lab.run(mapped(list(range(11)))) is R.FAILED
    assert "`m` has 11 items; at most 10 are allowed." in lab.error()["message"]
    assert lab.made.provider.calls == []


def test_a_reduce_gets_every_result(lab: Lab) -> None:
    whole = step("m.reduce", prompt="all: {{results}}", container=0, refs={"results": Ref("results", node=0)})
    assert lab.run(mapped(list("ab"), reduce=whole)) is R.SUCCEEDED
    assert lab.output(0) == 'all: ["item a","item b"]' or lab.output(0).startswith("all: ")
    assert "item a" in lab.output(0)
    assert "item b" in lab.output(0)


def some_fail(call: AgentCall) -> str:
    if call.label in ("m[1]", "m[3]"):
        raise Final("boom")
    return call.label


def collecting(lab: Lab, **spec: Any) -> RunStatus:
    lab.made.provider.behaves["some"] = some_fail
    item = step("m[]", prompt="some", container=0)
    return lab.run(mapped(list("abcde"), item=item, on_item_failure="collect", **spec))


@pytest.mark.parametrize(("least", "status"), [(0, R.SUCCEEDED), (0.6, R.SUCCEEDED), (0.61, R.FAILED), (1, R.FAILED)])
def test_a_map_may_go_on_without_some_of_its_items(lab: Lab, least: float, status: RunStatus) -> None:
    assert collecting(lab, min_success=least, max_parallel=2) is status
    if status is R.SUCCEEDED:
        assert lab.output(0)[0] == "m[0]"
        assert lab.output(0)[1] == {"failed": True, "error": "boom"}
        assert lab.end(0).detail == {"items": 5, "failed_items": 2}
    else:
        assert "3 of 5 items succeeded" in lab.error()["message"]


def test_else_its_first_failure_stops_it(lab: Lab) -> None:
    lab.made.provider.behaves["some"] = some_fail
    item = step("m[]", prompt="some", container=0)
    assert lab.run(mapped(list("abcde"), item=item, max_parallel=1)) is R.FAILED
    assert lab.made.provider.calls == ["m[0]", "m[1]"]
    assert "boom" in lab.error()["message"]


# Loops and groups


def looped(most: int) -> Plan:
    body = step("l#", prompt="count", container=0)
    until = {"until": 'l == "3"', "max": most}
    whole = node("l", kind=Kind.LOOP, bodies={"body": (5,)}, spec=until, refs={"l": Ref("step", node=5)})
    return plan_of(whole, step("z", 0), templates=[body])


@pytest.mark.parametrize(("most", "rounds", "met"), [(9, 3, True), (2, 2, False)])
def test_a_loop_goes_on_until_its_condition_holds_or_its_rounds_are_over(
    lab: Lab, most: int, rounds: int, met: bool
) -> None:
    seen: list[str] = []

    def count(call: AgentCall) -> str:
        seen.append(call.label)
        return str(len(seen))

    lab.made.provider.behaves["count"] = count
    assert lab.run(looped(most)) is R.SUCCEEDED
    assert seen == [f"l#{number}" for number in range(1, rounds + 1)]
    assert lab.output(0) == str(rounds)
    assert lab.end(0).detail == {"iterations": rounds, "until_met": met}


def test_a_loop_fails_with_its_body(lab: Lab) -> None:
    lab.made.provider.behaves["count"] = failing(Final("boom"))
    assert lab.run(looped(3)) is R.FAILED
    assert lab.made.provider.calls == ["l#1"]
    assert "l (iteration 1): boom" in lab.error()["message"]
    assert "#" not in lab.error()["summary"]


def grouped(*inner: Node, **spec: Any) -> Plan:
    numbers = tuple(range(5, 5 + len(inner)))
    return plan_of(node("g", kind=Kind.GROUP, bodies={"steps": numbers}, spec=spec), step("z", 0), templates=inner)


def test_a_group_ends_with_the_results_of_its_steps(lab: Lab) -> None:
    second = Node("y", Kind.AGENT, "openai", (Dep(5),), container=0, spec=step("s", prompt="two").spec)
    assert lab.run(grouped(step("x", prompt="one", container=0), second)) is R.SUCCEEDED
    assert lab.output(0) == {"x": "one", "y": "two"}


@pytest.mark.parametrize(("fast", "calls"), [(True, ["g/x", "g/y"]), (False, ["g/x", "g/y", "g/z"])])
def test_a_group_that_fails_fast_does_not_begin_what_is_left(lab: Lab, fast: bool, calls: list[str]) -> None:
    inner = [step("x", container=0), step("y", prompt="boom", container=0), step("z", container=0)]
    assert lab.run(grouped(*inner, fail_fast=fast, max_parallel=1)) is R.FAILED
    assert lab.made.provider.calls == calls
    assert "boom" in lab.error()["message"]


def test_a_map_over_nothing_says_what_it_got_and_what_to_do(lab: Lab) -> None:
    assert lab.run(mapped("{{null}}")) is R.FAILED
    assert "`over:` of `m` gives null, not a list." in lab.error()["message"]
    assert "default(" in lab.error()["hint"]


def test_outputs_that_cannot_be_made_are_named_as_such(lab: Lab) -> None:
    plan = plan_of(step("a"), outputs={"x": "{{a.nothing}}"}, output_refs={"a": Ref("step", node=0)})
    assert lab.run(plan) is R.FAILED
    assert lab.error()["step"] == "outputs"
    assert "its outputs failed: " in lab.error()["summary"]
    assert "$end" not in json.dumps(lab.error())


def test_the_last_failure_does_not_promise_another_attempt(lab: Lab) -> None:
    lab.made.provider.behaves["lost"] = failing(Retryable("The connection broke.", kind="connection"))
    assert lab.run(plan_of(step("a", prompt="lost", retry=Retry(max=0)))) is R.FAILED
    assert lab.error()["hint"] == "The step was tried once. Raise its `max_retries:`, or continue the run later."


def test_the_journal_names_the_map_that_stopped(lab: Lab) -> None:
    lab.made.provider.behaves["item b"] = failing(Final("boom"))
    assert lab.run(mapped(list("abc"), max_parallel=1, on_item_failure="fail")) is R.FAILED
    with lab.made.store.database.read() as connection:
        told = connection.execute(select(events).where(events.c.run_id == lab.number).order_by(events.c.seq)).all()
    stops = [(entry.kind, entry.row, entry.message) for entry in told if entry.kind.endswith("stopping")]
    assert stops[0] == ("step.stopping", 0, "1 step will not start: another step of the same part failed")
    assert all("the run" in message for kind, _, message in stops if kind == "run.stopping")
