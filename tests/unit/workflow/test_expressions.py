"""Parsing, positions, templates, limits, conditions and static types of the expression language."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import (
    MAX_TEXT,
    MISSING,
    RESERVED,
    Env,
    ExpressionSyntaxError,
    MissingValue,
    Path,
    StepValue,
    Type,
    check,
    check_condition,
    check_id,
    conform,
    evaluate_condition,
    infer,
    parse,
    parse_template,
    render_value,
)
from gorgon_common.workflow.expressions.functions import Meter

PLAN = StepValue({"approved": True, "title": "Shop", "tasks": [{"id": "t1"}]}, name="plan")
SKIPPED = StepValue(MISSING, status="skipped", name="review")
ENV: dict[str, Any] = {
    "inputs": {"n": 2, "note": None},
    "plan": PLAN,
    "review": SKIPPED,
    "tests": StepValue("1 failed", exit_code=1, stdout="1 failed", stderr="", name="tests"),
    "steps": {"run-tests": StepValue("fine", name="run-tests")},
    "text": StepValue("free", name="text"),
}


def value(source: str) -> Any:
    return parse(source).evaluate(ENV)


# ── names and paths ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_and_paths_come_from_the_tree() -> None:
    expression = parse('plan.tasks[0].id == steps["run-tests"].output && xs.all(x, x.ok && y == plan)')
    assert expression.names == {"plan", "steps", "xs", "y"}
    assert expression.paths == (
        Path("plan", ("tasks", 0, "id"), 0),
        Path("steps", ("run-tests", "output"), 20),
        Path("xs", (), 49),
        Path("y", (), 67),
        Path("plan", (), 72),
    )
    assert str(expression.paths[1]) == 'steps["run-tests"].output'


def test_a_comprehension_variable_hides_only_in_its_body() -> None:
    assert parse("x.all(x, x > 1)").names == {"x"}
    assert parse("xs.map(x, xs.map(y, x + y + z))").names == {"xs", "z"}


def test_a_dynamic_index_leaves_its_root_and_its_key() -> None:
    assert {str(path) for path in parse("steps[inputs.which].output").paths} == {"steps", "inputs.which"}


# ── syntax errors ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "offset", "message", "hint"),
    [
        ("", 0, "empty", ""),
        ("a ==", 4, "ends too early", ""),
        ("a = 1", 2, "unexpected `=`", "=="),
        ("a and b", 2, "unexpected `and`", "&&"),
        ("not a", 0, "unexpected `not`", "!"),
        ("x | json", 2, "unexpected `|`", "json(x)"),
        ("contain(a, 'x')", 0, "no function `contain`", "Did you mean `contains`"),
        ("'abc", 0, "not closed", ""),
        ("for", 0, "reserved word", ""),
        ("xs.map(x)", 3, "takes a name and an expression", ""),
        ("size(a, b)", 0, "takes 1 value, not 2", ""),
        ("has(a)", 0, "takes one field", ""),
        ("b'x'", 0, "bytes", ""),
        ("12abc", 0, "not a number", ""),
        ("9223372036854775808", 0, "too large", ""),
        (r"'\q'", 1, "unknown escape", "raw string"),
        ("(1", 2, "ends too early", ""),
        ("a b", 2, "unexpected `b`", ""),
    ],
)
def test_syntax_errors_have_place_and_hint(source: str, offset: int, message: str, hint: str) -> None:
    with pytest.raises(ExpressionSyntaxError, match=message.replace("(", r"\(").replace("|", r"\|")) as caught:
        parse(source)
    assert caught.value.offset == offset
    assert hint in caught.value.hint


@given(st.text(max_size=60) | st.text(alphabet="abx.()[]{}'\"!&|?:+-*/%<>=, 019in\\ruU", max_size=60))
@example("(" * 5000)
@example("!" * 5000)
@example("a" + "+a" * 3000)
@example("[" * 300 + "]" * 300)
@settings(max_examples=400, deadline=None)
def test_the_parser_raises_nothing_else(source: str) -> None:
    for read in (parse, parse_template):
        offset = 0
        try:
            read(source)
        except ExpressionSyntaxError as error:
            offset = error.offset
        assert 0 <= offset <= len(source)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_older_templates_never_fail_to_parse(text: str) -> None:
    parse_template(text + " ${" + text + "} {{" + text + "}}", legacy=True)


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_comprehension_inside_another_at_most() -> None:
    parse("xs.map(x, ys.map(y, x))")
    parse("xs.filter(x, x > 0).map(x, ys.filter(y, y > x).map(z, z))")
    with pytest.raises(ExpressionSyntaxError, match="nested too deeply"):
        parse("xs.map(x, ys.map(y, zs.map(z, z)))")


def test_cost_is_bounded() -> None:
    names = {"xs": list(range(2000))}
    with pytest.raises(ExpressionError, match="needs more than 1,000,000 steps"):
        parse("xs.all(x, xs.all(y, x + y >= 0))").evaluate(names)


def test_two_nested_maps_over_300_items_are_within_the_bound() -> None:
    names = {"xs": list(range(300))}
    assert parse("xs.map(x, xs.map(y, x * y)).size()").evaluate(names) == 300


def test_an_exhausted_budget_is_not_an_error_to_absorb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "LIMIT", 1000)
    names = {"xs": list(range(100))}
    for source in ("xs.all(x, xs.all(y, x + y >= 0)) || true", "xs.exists(x, xs.all(y, x + y >= 0) && false)"):
        with pytest.raises(ExpressionError, match="needs more than 1,000 steps"):
            parse(source).evaluate(names)


def test_texts_are_bounded() -> None:
    names = {"s": "x" * 600_000}
    with pytest.raises(ExpressionError, match="characters long"):
        parse("s + s").evaluate(names)
    with pytest.raises(ExpressionError, match="characters long"):
        parse_template("{{s}}{{s}}").render(names)
    with pytest.raises(ExpressionError, match="characters long"):
        parse("[s, s].join('')").evaluate(names)
    assert len(parse_template("{{s}}").render(names)) == 600_000 < MAX_TEXT


def test_many_large_texts_are_bounded_together() -> None:
    names = {"s": "x" * 500_000, "xs": list(range(10_000))}
    with pytest.raises(ExpressionError, match="steps"):
        parse("xs.map(x, s + string(x))").evaluate(names)


def test_lists_are_bounded() -> None:
    with pytest.raises(ExpressionError, match="too long"):
        parse("xs.map(x, x)").evaluate({"xs": list(range(100_001))})
    with pytest.raises(ExpressionError, match="too long"):
        parse("lines(s)").evaluate({"s": "\n" * 200_000})


def test_regular_expressions_take_linear_time() -> None:
    """Backtracking would take longer than the universe; the suite's own time limit is the assertion."""
    names = {"s": "a" * 100_000 + "b"}
    assert parse("s.matches('^(a+)+$')").evaluate(names) is False
    assert parse("s.matches('(a|a)*c')").evaluate(names) is False
    assert parse("s.matches('(x+x+)+y|(.*)*b$')").evaluate(names) is True


@pytest.mark.parametrize("pattern", [r"(a)\\1", "(?=a)b", "(", "a{5000}", "[z-a]", "(?<!a)b"])
def test_patterns_that_re2_does_not_know_are_explained(pattern: str) -> None:
    with pytest.raises(ExpressionError, match="not a regular expression") as caught:
        parse(f"'a'.matches('{pattern}')").evaluate({})
    assert "RE2" in caught.value.hint


def test_deep_data_is_an_error_not_a_crash() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ExpressionError, match="nested too deeply"):
        parse("a == b").evaluate({"a": deep, "b": [deep]})
    with pytest.raises(ExpressionError, match=r"nested too deeply|characters long"):  # Python 3.13 goes deeper
        parse_template("x {{a}}").render({"a": deep})


# ── steps and missing values ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_gives_its_fields() -> None:
    assert value("plan.approved") is True
    assert value("plan.output.title") == "Shop"
    assert value("plan.status") == "succeeded"
    assert value("tests.exit_code") == 1
    assert value("plan") == PLAN.output
    assert value('steps["run-tests"].output') == "fine"
    assert value("plan.tasks.map(t, t.id)") == ["t1"]


def test_a_field_that_a_step_does_not_have_is_named() -> None:
    with pytest.raises(MissingValue, match="step `plan` has no field `aproved`") as caught:
        value("plan.aproved")
    assert "Did you mean `approved`" in caught.value.hint


def test_a_skipped_step_is_missing() -> None:
    for source in ("review.output", "review", "review.summary"):
        with pytest.raises(MissingValue, match="step `review` has no output: it is skipped"):
            value(source)
    assert value("default(review.output, 'none')") == "none"
    assert value("default(review, 'none')") == "none"
    assert value("has(review.output)") is False
    assert value("review.status") == "skipped"


def test_why_a_step_was_skipped_is_said() -> None:
    env = {"s": StepValue(status="skipped", name="s", reason="`plan` was skipped")}
    with pytest.raises(MissingValue, match=r"has no output: it is skipped \(`plan` was skipped\)"):
        parse("s.output").evaluate(env)


def test_a_default_value_of_a_skipped_step_is_its_output() -> None:
    env = {"s": StepValue({"a": 1}, status="skipped")}
    assert parse("s.a").evaluate(env) == 1


def test_published_names_come_before_the_output() -> None:
    env = {"s": StepValue("whole", published={"summary": "short"})}
    assert parse("s.summary").evaluate(env) == "short"


def test_only_missing_values_have_a_default() -> None:
    with pytest.raises(ExpressionError, match="division by zero"):
        value("default(1 / 0, 2)")


# ── templates ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("plain", "plain"),
        ("", ""),
        ("{{plan.title}}!", "Shop!"),
        ("{{ inputs.n }} {{ inputs.n == 2 }} {{inputs.note}} {{ 3.0 }} {{ 0.5 }}", "2 true null 3 0.5"),
        ("{{plan.tasks}}", '[\n  {\n    "id": "t1"\n  }\n]'),
        ('{{ {"a": {"b": 1}}["a"]["b"] }}', "1"),
        ('{{ "}}" }}{{ "{{" }}', "}}{{"),
        ("{{{'a': 1}.a}}", "1"),
        ("a {b} }} ${c}", "a {b} }} ${c}"),
    ],
)
def test_rendering(text: str, rendered: str) -> None:
    assert parse_template(text).render(ENV) == rendered


def test_a_single_expression_keeps_its_type() -> None:
    template = parse_template("{{plan.tasks}}")
    assert template.is_single
    assert template.render(ENV, text=False) == [{"id": "t1"}]
    assert not parse_template(" {{plan.tasks}}").is_single
    assert parse_template("x").is_literal
    assert parse_template("x").render(ENV, text=False) == "x"


def test_offsets_count_in_the_whole_text() -> None:
    assert parse_template("Hi {{ plan.title }}").paths == (Path("plan", ("title",), 6),)
    with pytest.raises(ExpressionSyntaxError) as caught:
        parse_template("Hi {{ plan. }}")
    assert caught.value.offset == 12
    with pytest.raises(ExpressionSyntaxError, match="not closed") as caught:
        parse_template("Hi {{ plan.title")
    assert caught.value.offset == 3


@given(st.text(max_size=50) | st.sampled_from(["{{plan.title}}", "${plan}", "{{ 1/0 }}", "}}{{", '{{"x"}}']))
@settings(max_examples=200, deadline=None)
def test_a_value_is_never_evaluated(text: str) -> None:
    env = {"x": text, "plan": PLAN}
    assert parse_template("<{{x}}>").render(env) == f"<{text}>"
    assert parse_template("<${x}>{{x}}", legacy=True).render(env) == f"<{text}>{text}"
    assert render_value({"a": ["{{x}}"]}, env) == {"a": [text]}


def test_nested_values_are_rendered() -> None:
    given_value = {"a": ["{{inputs.n}}", "n={{inputs.n}}", 7, None], "{{b}}": "${inputs.n}"}
    assert render_value(given_value, ENV) == {"a": [2, "n=2", 7, None], "{{b}}": "${inputs.n}"}
    assert render_value("{{inputs.n}}", ENV, text=True) == "2"


def test_older_files() -> None:
    env = Env({"a": "A", "item": {"id": 1}, "run-tests": StepValue("ok"), "gone": SKIPPED, "none": None}, lenient=True)

    def old(text: str) -> Any:
        return parse_template(text, legacy=True).render(env)

    assert old("${a} {{a}} ${item.id} ${run-tests.output}") == "A A 1 ok"
    assert old("[${gone.output}] [${none}]") == "[] []"
    assert old("${HOME:-x} ${} {{ oops oops }} ${{a}}") == "${HOME:-x} ${} {{ oops oops }} $A"
    assert parse_template("${a}").is_literal
    assert parse_template("${gone}", legacy=True).render(env, text=False) is None


def test_lenient_is_about_missing_values_alone() -> None:
    with pytest.raises(ExpressionError, match="division"):
        parse_template("{{1 / 0}}").render(Env({}, lenient=True))


# ── conditions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("condition", "held", "why"),
    [
        (
            {"field": "plan.approved", "operator": "equals", "value": True},
            True,
            "plan.approved equals true: it is true",
        ),
        (
            {"field": "plan.approved", "operator": "equals", "value": False},
            False,
            "plan.approved equals false: it is true",
        ),
        (
            {"field": "plan.title", "operator": "not_equals", "value": "x"},
            True,
            'plan.title does not equal "x": it is "Shop"',
        ),
        ({"field": "plan.title", "operator": "contains", "value": "ho"}, True, 'contains "ho"'),
        ({"field": "plan.tasks", "operator": "contains", "value": {"id": "t1"}}, True, "contains"),
        ({"field": "inputs.n", "operator": "greater_than", "value": 1.5}, True, "is greater than 1.5: it is 2"),
        ({"field": "inputs.n", "operator": "less_than", "value": 2}, False, "is less than 2: it is 2"),
        ({"field": "inputs.n", "operator": "less_or_equal", "value": 2}, True, "is at most 2"),
        (
            {"field": "inputs.n", "operator": "greater_or_equal", "value": "{{inputs.n + 1}}"},
            False,
            "is at least 3: it is 2",
        ),
        ({"field": "inputs.n", "operator": "in", "value": [1, 2]}, True, "is one of [1, 2]"),
        ({"field": "plan.title", "operator": "matches", "value": "^S.*p$"}, True, "matches"),
        ({"field": "plan.tasks", "operator": "not_empty"}, True, "is not empty"),
        ({"field": "review.output", "operator": "exists"}, False, "review.output exists: it is missing"),
        ({"field": "inputs.note", "operator": "is_empty"}, True, "is empty: it is missing"),
        ({"field": "inputs.note", "operator": "equals", "value": None}, True, "equals null"),
        ({"field": "inputs.note", "operator": "equals", "value": 1, "on_missing": "false"}, False, "it is missing"),
        ({"not": {"field": "plan.approved", "operator": "equals", "value": True}}, False, "not (plan.approved"),
        (
            {
                "all": [
                    {"field": "inputs.n", "operator": "equals", "value": 2},
                    {"field": "inputs.n", "operator": "equals", "value": 3},
                ]
            },
            False,
            "inputs.n equals 3: it is 2",
        ),
        (
            {
                "any": [
                    {"field": "inputs.n", "operator": "equals", "value": 1},
                    {"field": "inputs.n", "operator": "equals", "value": 2},
                ]
            },
            True,
            "inputs.n equals 2: it is 2",
        ),
        ("tests.exit_code == 0", False, "tests.exit_code == 0: tests.exit_code is 1"),
        ("plan.approved && inputs.n > 1", True, "plan.approved is true, inputs.n is 2"),
    ],
)
def test_conditions(condition: Any, held: bool, why: str) -> None:
    found, told = evaluate_condition(condition, ENV)
    assert found is held
    assert why in told


def test_a_missing_field_follows_on_missing() -> None:
    condition = {"field": "plan.nothing", "operator": "equals", "value": True}
    with pytest.raises(MissingValue, match="missing or null"):
        evaluate_condition(condition, ENV)
    assert evaluate_condition(condition, ENV, lenient=True)[0] is False
    assert evaluate_condition({**condition, "on_missing": "false"}, ENV)[0] is False
    with pytest.raises(MissingValue):
        evaluate_condition({**condition, "on_missing": "error"}, ENV, lenient=True)
    with pytest.raises(MissingValue, match=r"condition `review\.approved`"):
        evaluate_condition("review.approved", ENV)
    assert evaluate_condition("review.approved", Env(ENV, lenient=True))[0] is False


def test_a_condition_gives_true_or_false() -> None:
    with pytest.raises(ExpressionError, match="is an integer, not true or false"):
        evaluate_condition("inputs.n", ENV)
    with pytest.raises(ExpressionError, match="cannot be compared"):
        evaluate_condition({"field": "plan.title", "operator": "less_than", "value": 3}, ENV)


@pytest.mark.parametrize(("text", "wanted"), [("true", True), ("Yes", True), ("no", False), ("3", 3), ("2.5", 2.5)])
def test_older_files_compare_texts_by_meaning(text: str, wanted: Any) -> None:
    condition = {"field": "x", "operator": "equals", "value": wanted}
    assert evaluate_condition(condition, {"x": text}, lenient=True)[0] is True
    assert evaluate_condition(condition, {"x": text})[0] is False


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ids() -> None:
    assert check_id("plan_2") is None
    for name in ("Plan", "2x", "run-tests", "", "_x", "ü"):
        assert check_id(name), name
    assert "run_tests" in str(check_id("run-tests"))
    for name in RESERVED:
        assert check_id(name), name
    assert {"in", "loop", "inputs", "steps", "error", "default", "map", "size", "json"} <= RESERVED


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA = {
    "type": "object",
    "properties": {
        "approved": {"type": "boolean"},
        "title": {"type": "string"},
        "score": {"type": "number"},
        "count": {"type": ["integer", "null"]},
        "tasks": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "string"}}}},
        "level": {"type": "string", "enum": ["low", "high"]},
        "other": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    },
}
TYPES = {
    "plan": Type.of_step(Type.from_schema(SCHEMA)),
    "text": Type.of_step(Type("string", free=True)),
    "tests": Type.of_step(Type("string"), command=True),
    "inputs": Type("object", fields={"n": Type("int"), "s": Type("string")}),
}


@pytest.mark.parametrize(
    "source",
    [
        "plan.approved",
        "plan.level == 'low' || plan.level in ['low', 'high'] || plan.level != null",
        "plan.score / 2 > 1 && plan.count < 3",
        "plan.tasks.all(t, t.id != '')",
        "plan.other == 1 || plan.other == 'x'",
        "plan.output.title + inputs.s == 'xy'",
        "tests.exit_code == 0 && tests.stdout.contains('x')",
        "text.output.contains('done') || text == ''",
        "default(plan.count, 0) > 1",
        "unknown.thing > 1",
        "plan.status == 'succeeded'",
        "lines(text.output).size() > 1",
        "plan.tasks[0].id.startsWith('t')",
        "inputs.n in [1, 2]",
        "plan.error == null",
        "timestamp(plan.title) + duration('1h') > timestamp(run.started_at)",
        "timestamp(plan.title) - timestamp(plan.title) < duration('1h')",
        "timestamp(plan.title).getHours() > 3",
        "{'a': plan.title}.a == 'x'",
        "{plan.title: 1}[plan.title] == 1",
        "[1, 2] + [3] == [1, 2, 3]",
        "-plan.score < 1 && -plan.count < 1",
        "(plan.approved ? 1 : 2) == 1",
        "dyn(plan.title) == 1",
        "inputs.s + json(plan.tasks) != ''",
        "plan.tasks.filter(t, t.id != '').size() > 0 && plan.tasks.exists_one(t, has(t.id))",
        "plan['title'] == 'x' && plan.output['title'] == 'x'",
        "plan.output.all(k, k != '')",
        "default(plan.title, 'x') == 'x' && default(plan.count, 'x') == 1",
        "xs[0].y == 1 && xs.map(x, x.y) == [1]",
        "xs + 1.5 > 2.5 && xs + 'a' == 'b'",
    ],
)
def test_no_complaint_about_what_is_right(source: str) -> None:
    assert check_condition(source, TYPES) == []


@pytest.mark.parametrize(
    ("source", "message", "hint", "offset"),
    [
        ("plan.aproved", "step `plan` has no field `aproved`", "Did you mean `approved`", 5),
        ("plan.tasks.all(t, t.idd == '')", "`t` has no field `idd`", "Known: id", 20),
        ("plan.tasks[0].idd", "no field `idd`", "id", 14),
        ("inputs.m", "there is no input `m`", "n", 7),
        ("text.summary == 'x'", "step `text` has no field `summary`", "`output:` schema", 5),
        ("tests.passed", "step `tests` has no field `passed`", "exit_code == 0", 6),
        ("text.output == 'yes'", "free text of a model", "output:", 0),
        ("'yes' == text", "free text of a model", "output:", 9),
        ("text.output in ['yes', 'no']", "free text of a model", "contains", 0),
        ("plan.approved == 'yes'", "never true", "", 14),
        ("plan.title > 3", "cannot join text and an integer", "int(x)", 11),
        ("plan.title + 1 == ''", "cannot join", "", 11),
        ("!plan.title", "true or false is needed", "", 1),
        ("plan.title && true", "true or false is needed", "", 0),
        ("plan.approved.x", "it has no field `x`", "", 14),
        ("plan.title", "the condition is text", "", 0),
        ("size(plan.score) > 1", "`size` takes", "", 5),
        ("plan.title.all(x, true)", "needs a list", "", 0),
        ("plan.level == 'hi'", "is never `hi`: its schema allows low, high", "Known: high, low", 14),
        ("plan.level in ['low', 'hihg']", "is never `hihg`", "`high`", 14),
        ("inputs.n[0] == 1", "it has no items", "", 0),
        ("plan.tasks[plan.title].id == ''", "its index is an integer, not text", "", 11),
        ("-plan.title == 1", "`-` needs a number", "", 0),
        ("timestamp(plan.title) * 2 == 1", "cannot join a timestamp and an integer", "", 22),
        ("plan.score % 2 == 1", "cannot join", "", 11),
        ("plan.output.approved.all(x, x)", "needs a list or an object", "", 0),
        ("text.output + 'x' == 'yes'", "free text of a model", "", 0),
        ("'x' in plan.title", "needs a list or an object", "contains", 4),
    ],
)
def test_complaints(source: str, message: str, hint: str, offset: int) -> None:
    found = check_condition(source, TYPES)
    assert len(found) == 1, found
    assert message in found[0].message
    assert hint in found[0].hint
    assert found[0].offset == offset


def test_complaints_about_structured_conditions() -> None:
    def complain(field: str, operator: str, wanted: Any) -> list[Any]:
        return check_condition({"all": [{"field": field, "operator": operator, "value": wanted}]}, TYPES)

    assert complain("plan.approved", "equals", True) == []
    assert complain("plan.score", "greater_than", 1) == []
    assert complain("text.output", "contains", "done") == []
    assert "free text" in complain("text.output", "equals", "done")[0].message
    assert complain("text.output", "equals", "done")[0].at == ("all", 0, "field")
    assert "cannot compare" in complain("plan.approved", "equals", "true")[0].message
    assert "no field" in complain("plan.aproved", "exists", None)[0].message
    assert complain("plan.level", "in", ["low", "high"]) == []
    assert "is never `hi`" in complain("plan.level", "in", ["low", "hi"])[0].message
    assert "is never `hi`" in complain("plan.level", "not_equals", "hi")[0].message


def test_inference() -> None:
    assert infer(parse("plan.tasks.map(t, t.id)"), TYPES) == Type("list", item=Type("string"))
    assert infer(parse("plan.score + 1"), TYPES).kind == "double"
    assert infer(parse("plan.count + 1"), TYPES).kind == "int"
    assert infer(parse_template("{{plan.tasks}}"), TYPES).kind == "list"
    assert infer(parse_template("x {{plan.tasks}}"), TYPES).kind == "string"
    assert check(parse_template("a {{plan.title}} {{plan.tilte}}"), TYPES)[0].offset == 24


def test_the_schema_decides_whether_a_number_is_a_decimal() -> None:
    output = conform({"score": 3, "count": 3, "tasks": [{"id": "a"}]}, SCHEMA)
    env = {"plan": StepValue(output)}
    assert parse("plan.score / 2").evaluate(env) == 1.5
    assert parse("plan.count / 2").evaluate(env) == 1
    assert parse_template("{{plan.score}}").render(env) == "3"


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_parsed_expression_is_immutable() -> None:
    with pytest.raises(AttributeError):
        parse("a").source = "b"  # type: ignore[misc]


def test_parsing_is_cached() -> None:
    assert parse("plan.approved") is parse("plan.approved")
    assert parse_template("{{plan.approved}}") is parse_template("{{plan.approved}}")


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_steps_and_times_look_like_in_texts() -> None:
    names = {**ENV, "steps": {"a": StepValue({"x": 1}), "b": SKIPPED}}
    rendered = parse_template(
        "{{json(steps)}} {{plan}} {{timestamp('2026-05-01T12:00:00Z')}} {{duration('1m')}}"
    ).render(names)
    assert '{"a": {"output": {"x": 1}, "status": "succeeded"}, "b": {"output": null, "status": "skipped"}}' in rendered
    assert '"title": "Shop"' in rendered
    assert rendered.endswith("2026-05-01T12:00:00Z 60s")
    assert (
        parse_template("{{json({'at': timestamp('2026-05-01T12:00:00Z')})}}").render({})
        == '{"at": "2026-05-01T12:00:00Z"}'
    )


def test_fields_of_a_command_that_is_not_one() -> None:
    step = StepValue({"stdout": "mine", "error": "x"}, name="s")
    assert parse("s.stdout").evaluate({"s": step}) == "mine"
    assert parse("s.error").evaluate({"s": step}) is None
    assert parse("s.output.error").evaluate({"s": step}) == "x"
    with pytest.raises(MissingValue, match="has no field `nope`"):
        parse("s.nope").evaluate({"s": StepValue("text", exit_code=0, name="s")})


def test_what_is_nested_in_a_missing_value() -> None:
    for source in ("inputs.note.x", "inputs.note[0]", "inputs['nope']", "plan.tasks[9].id", "plan['nope']"):
        with pytest.raises(MissingValue):
            value(source)
        assert value(f"default({source}, 'd')") == "d"
        assert value(f"has({source})") is False


def test_an_env_is_a_mapping() -> None:
    env = Env({"a": 1}, lenient=True)
    assert (dict(env), len(env), env.get("b")) == ({"a": 1}, 1, None)


def test_conform_leaves_what_it_does_not_know() -> None:
    assert conform({"a": 1}, None) == {"a": 1}
    assert conform([1, True, "x"], {"type": "array", "items": {"type": "number"}}) == [1.0, True, "x"]
    assert conform(2**60, {"type": "number"}) == 2**60
