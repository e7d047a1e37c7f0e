from __future__ import annotations

import time
from pathlib import Path

import pytest

from gorgon_common import documents
from gorgon_common.documents import format_path, parse_path, read_document
from gorgon_common.documents.reader import _Reader
from gorgon_common.errors import Problem, WorkflowInvalid
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow.loader import LoadedWorkflow, load
from gorgon_common.workflow.source import read_workflow

FILES = Path(__file__).parent / "files"
ROLES, OPERATIONS = load_roles(), load_operations()
STEP = "steps: [{id: a, prompt: hi}]\n"


def loaded(text: str) -> LoadedWorkflow:
    return load(text, file="w.yaml", roles=ROLES, operations=OPERATIONS)


def problems(text: str) -> list[Problem]:
    with pytest.raises(WorkflowInvalid) as caught:
        loaded(text)
    return caught.value.problems


def only(text: str) -> Problem:
    found = problems(text)
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


# What a file may not be


SYNTAX = {
    "empty": ("", 1, 1, "the file is empty", "A workflow needs at least a `name:` and `steps:`."),
    "comments alone": ("# nothing\n", 1, 1, "the file is empty", "A workflow needs at least a `name:` and `steps:`."),
    "a list": ("- a\n- b\n", 1, 1, "a workflow is a mapping (`key: value`)", "Begin with `name:`, then `steps:`"),
    "open quote": ('name: "abc\n', 1, 7, "a quote is opened here and never closed", "Add the closing quote."),
    "tab": ("name: x\nsteps:\n\t- id: a\n", 3, 1, "a tab is used for indentation", "Indent with spaces"),
    "colon in text": ("name: a: b\n", 1, 8, "a `: ` that is not allowed here", "must be in quotes"),
    "open list": ("name: x\ntags: [a, b\nteam: c\n", 2, 7, "a list opened with `[` here is not closed", "Add `]`"),
    "open mapping": (
        "name: x\nlimits: {tokens: 1\nteam: c\n",
        2,
        9,
        "a mapping opened with `{` here is not",
        "Add `}`",
    ),
    "indentation": ("name: x\nlimits:\n  tokens: 1\n timeout: 2\n", 4, 2, "this does not fit", "Check the indentation"),
    "after a quote": ('name: "a" b\n', 1, 11, "this does not fit the lines before it", "after a closing quote"),
    "reserved character": ("name: @a\n", 1, 7, "text cannot begin with `@`", "Put the whole value in quotes."),
    "bad escape": ('name: "a\\q"\n', 1, 9, "an unknown escape in double quotes", "Write \\\\ for a backslash"),
    "control character": ("name: a\x07\n", 1, 8, "a control character", "Remove it"),
    "list and mapping": ("- a\nname: b\n", 2, 1, "this does not fit the list before it", "Items of a list begin with"),
    "two documents": ("name: a\n---\nname: b\n", 2, 1, "a second document begins here", "Remove the `---`"),
    "half a character": ("name: \ud800\n", 1, 7, "a character that is not valid Unicode", "Save the file as UTF-8."),
}


@pytest.mark.parametrize(("text", "line", "column", "message", "hint"), SYNTAX.values(), ids=SYNTAX)
def test_broken_yaml_is_explained(text: str, line: int, column: int, message: str, hint: str) -> None:
    problem = only(text)
    assert (problem.file, problem.line, problem.column) == ("w.yaml", line, column)
    assert message in problem.message
    assert hint in problem.hint


def test_duplicate_keys_name_the_first_line() -> None:
    problem = only(f"name: a\nteam: x\n{STEP}name: b\n")
    assert (problem.line, problem.column, problem.message) == (4, 1, "`name` is written twice")
    assert problem.hint == "It is already in line 1."


def test_anchors_aliases_and_tags_are_refused_each() -> None:
    found = problems(f"name: &n x\nteam: *n\ndescription: !!int 5\n{STEP}")
    assert [(problem.line, problem.column, problem.message) for problem in found] == [
        (1, 7, "anchors (`&n`) are not allowed"),
        (2, 7, "aliases (`*n`) are not allowed"),
        (3, 14, "tags (`!!int`) are not allowed"),
    ]


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefg", "bcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    bomb = "\n".join(lines)
    begin = time.perf_counter()
    found = problems(bomb)
    assert time.perf_counter() - begin < 0.05
    assert found[0].message == "anchors (`&a`) are not allowed"
    assert found[0].line == 1


def test_too_large_is_refused_before_it_is_read() -> None:
    text = f"name: a\n{STEP}# {'x' * documents.WORKFLOW.max_bytes}\n"
    assert "at most 4,194,304 are read" in only(text).message
    fits = f"name: a\n{STEP}# ".ljust(documents.WORKFLOW.max_bytes - 1, "x") + "\n"
    assert loaded(fits).spec.name == "a"


def test_size_is_counted_in_bytes() -> None:
    text = f"name: a\n{STEP}# ".ljust(documents.WORKFLOW.max_bytes // 2 + 100, "é")
    assert "at most 4,194,304 are read" in only(text).message


def nested(depth: int) -> str:
    return f"name: a\n{STEP}metadata: {{x: {'[' * (depth - 2)}{']' * (depth - 2)}}}\n"


def test_depth_twenty_is_the_limit() -> None:
    # The file itself and `metadata:` are the first two levels.
    assert loaded(nested(20)).spec.metadata
    problem = only(nested(21))
    assert problem.message == "nested deeper than 20 levels"
    assert (problem.line, problem.column) == (3, 15 + 18)


def test_two_hundred_thousand_values_are_the_limit() -> None:
    # Each entry is one value; beside them the file has ten keys and values.
    head = f"name: a\n{STEP}"
    most = documents.WORKFLOW.max_nodes - read_nodes(head + "metadata: {x: []}\n")
    assert not read_document(f"{head}metadata: {{x: [{', '.join(['1'] * most)}]}}\n").problems
    problem = only(f"{head}metadata: {{x: [{', '.join(['1'] * (most + 1))}]}}\n")
    assert problem.message == "the file has more than 200,000 values"


def test_ten_thousand_steps_are_the_limit() -> None:
    def steps(count: int) -> str:
        return "name: a\nsteps:\n" + "".join(f"  - {{id: s{number}, checkpoint: x}}\n" for number in range(count))

    assert len(loaded(steps(5_000)).spec.steps) == 5_000
    problem = only(steps(10_001))
    assert problem.message == "the file has more than 10,000 steps"
    assert problem.line == 10_003


def read_nodes(text: str) -> int:
    reader = _Reader(text, None, documents.WORKFLOW)
    reader.read()
    return reader.nodes


def test_a_deep_flood_of_brackets_is_refused_quickly() -> None:
    begin = time.perf_counter()
    found = problems("a: " + "[" * 200_000)
    assert time.perf_counter() - begin < 0.5
    assert found[0].message == "nested deeper than 20 levels"


# YAML 1.2


def test_types_are_those_of_yaml_1_2() -> None:
    text = "{a: yes, b: on, c: No, d: 1_000, e: 0o17, f: 017, g: 0x1F, h: 1e3, i: ~, j: 12:30:45, k: .5, l: True}"
    assert read_document(text).data == {
        "a": "yes",
        "b": "on",
        "c": "No",
        "d": "1_000",
        "e": 15,
        "f": 17,
        "g": 31,
        "h": 1000.0,
        "i": None,
        "j": "12:30:45",
        "k": 0.5,
        "l": True,
    }


def test_keys_are_text() -> None:
    assert read_document("on: 1\n5: 2\ntrue: 3\n").data == {"on": 1, "5": 2, "true": 3}


@pytest.mark.parametrize("number", [".inf", "-.INF", ".nan", "1e999"])
def test_numbers_that_json_cannot_carry_are_refused(number: str) -> None:
    problem = only(f"name: a\n{STEP}metadata: {{x: {number}}}\n")
    assert (problem.line, problem.column) == (3, 15)
    assert problem.message == f"`{number}` is not a number that can be used"


def test_a_mapping_is_no_key() -> None:
    assert only(f"name: a\n{STEP}metadata: {{[a]: b}}\n").message == "a mapping or a list cannot be a key"


def test_json_is_read_with_tabs_and_surrogate_pairs() -> None:
    text = '{\n\t"name": "\\ud83d\\ude00",\n\t"steps": [{"id": "a", "prompt": "hi\\/"}]\n}'
    made = loaded(text)
    assert made.spec.name == "😀"
    assert made.spec.steps[0].prompt == "hi/"


def test_windows_lines_and_a_byte_order_mark() -> None:
    made = loaded("\ufeffname: a\r\nsteps:\r\n  - id: a\r\n    prompt: hi\r\n")
    assert made.positions.at("steps[0].prompt") == (4, 13)


# The unquoted template


def test_unquoted_templates_are_shown_in_quotes() -> None:
    found = problems(
        'name: a\nsteps:\n  - id: a\n    prompt: {{ inputs.x }}\n  - id: b\n    prompt: {{ f("x") }}\n'
        "  - id: c\n    run: [echo, {{a}}]\n"
    )
    assert [(problem.line, problem.column, problem.message, problem.hint) for problem in found] == [
        (4, 13, "`{{ inputs.x }}` must be in quotes", 'Write "{{ inputs.x }}"'),
        (6, 13, '`{{ f("x") }}` must be in quotes', "Write '{{ f(\"x\") }}'"),
        (8, 17, "`{{a}}` must be in quotes", 'Write "{{a}}"'),
    ]


def test_unquoted_templates_that_break_the_file_are_recognised() -> None:
    found = problems("name: a\nsteps:\n  - id: a\n    prompt: {{ x }} and more\n    system: {{ y[0] }}\n")
    assert [(problem.line, problem.column, problem.hint) for problem in found] == [
        (4, 13, 'Write "{{ x }} and more"'),
        (5, 13, 'Write "{{ y[0] }}"'),
    ]


def test_the_other_problems_are_told_beside_an_unquoted_template() -> None:
    found = problems("name: a\nsteps:\n  - id: a\n    prompt: {{ x }}\n    rol: planner\n")
    assert [problem.line for problem in found] == [4, 5]


# What the models find


def test_everything_wrong_is_told_at_once() -> None:
    """The whole report, line by line: the messages are the interface."""
    text = (FILES / "broken" / "everything.yaml").read_text()
    with pytest.raises(WorkflowInvalid) as caught:
        load(text, file="everything.yaml", roles=ROLES, operations=OPERATIONS)
    assert str(caught.value).rstrip() == (FILES / "broken" / "everything.txt").read_text().rstrip()


FAULTS = {
    "no name": (STEP, 1, 1, "`name` is missing in the workflow", "What the workflow is called"),
    "no steps": ("name: a\n", 1, 1, "`steps` is missing in the workflow", "The steps"),
    "empty steps": ("name: a\nsteps: []\n", 2, 8, "`steps` is an empty list", ""),
    "empty name": (f"name: ''\n{STEP}", 1, 7, "`name` is empty", ""),
    "nothing after a key": ("name: a\nsteps:\n", 2, 1, "`steps` has no value", "Write a value, or remove the line."),
    "unknown key": (f"name: a\nstep: 1\n{STEP}", 2, 1, "unknown key `step` in the workflow", "Did you mean `steps`?"),
    "older key": (
        f"name: a\ntoken_budget: 1\n{STEP}",
        2,
        1,
        "unknown key `token_budget`",
        "Write limits: {tokens: …}.",
    ),
    "merge key": (f"name: a\n<<: {{}}\n{STEP}", 2, 1, "unknown key `<<`", "Merge keys are not part of YAML 1.2"),
    "inputs as a list": (
        f"name: a\ninputs: [x]\n{STEP}",
        2,
        9,
        "`inputs` must be a mapping",
        "Write name: {type: string}",
    ),
    "unknown keyword of an input": (
        f"name: a\ninputs: {{x: {{type: string, defalt: 1}}}}\n{STEP}",
        *(2, 28, "unknown key `defalt` in a field's schema", "Did you mean `default`?"),
    ),
    "required with a default": (
        f"name: a\ninputs: {{x: {{type: string, required: true, default: a}}}}\n{STEP}",
        *(2, 38, "an input is either required or has a default", "need not be given"),
    ),
    "negative budget": (f"name: a\nlimits: {{budget_usd: -1}}\n{STEP}", 2, 22, "`budget_usd` must be at least 0", ""),
    "conflict": (
        f"name: a\nconcurrency: {{key: a, on_conflict: que}}\n{STEP}",
        *(2, 36, "`que` is not a value of `on_conflict`", "Did you mean `queue`?"),
    ),
    "trigger without form": (
        f"name: a\ntriggers: [{{inputs: {{}}}}]\n{STEP}",
        2,
        12,
        "either `schedule` or `webhook`",
        "",
    ),
    "secrets": (f"name: a\nsecrets: TOKEN\n{STEP}", 2, 10, "`secrets` must be a list", "Write [TOKEN]"),
}


@pytest.mark.parametrize(("text", "line", "column", "message", "hint"), FAULTS.values(), ids=FAULTS)
def test_faults_of_the_file(text: str, line: int, column: int, message: str, hint: str) -> None:
    problem = only(text)
    assert (problem.line, problem.column) == (line, column)
    assert message in problem.message
    assert hint in problem.hint


STEPS = {
    "no action": ("id: a", "{id", "the step does nothing: it has no action", "A step has exactly one of"),
    "two actions": ("id: a, prompt: b, run: [c]", "run:", "the step has 2 actions: `prompt`, `run`", "make two steps"),
    "role with another action": (
        "id: a, role: planner, run: [c]",
        "role:",
        "`role` has no meaning",
        "It goes with `prompt:`.",
    ),
    "with without uses": ("id: a, prompt: b, with: {}", "with:", "`with` has no meaning", "`uses:` or `workflow:`"),
    "output of a wait": (
        "id: a, wait: 5m, output: {x: string}",
        "output:",
        "`output` has no meaning in a step with `wait:`",
        "",
    ),
    "shell with template": ("id: a, run: 'echo {{inputs.x}}'", "'echo", "`{{ … }}` is not filled in", "write a list"),
    "empty command": ("id: a, run: []", "[]", "`run` is an empty list", ""),
    "older type": ("id: a, type: agent, prompt: b", "type:", "unknown key `type`", "belongs to the older format"),
    "both conditions": (
        "id: a, prompt: b, when: 'true', condition: {field: x, operator: exists}",
        *("when:", "`condition` and `when` do not go together", "Keep one of them"),
    ),
    "condition as text": (
        "id: a, prompt: b, condition: x == 1",
        "x == 1",
        "`condition` must be a mapping",
        "when: x == 1",
    ),
    "no operator": ("id: a, prompt: b, condition: {field: x}", "{field", "`operator` is missing", "operator: equals"),
    "no value": (
        "id: a, prompt: b, condition: {field: x, operator: equals}",
        *("{field", "`value` is missing: what should `x` be compared with?", ""),
    ),
    "map and loop": (
        "id: a, prompt: b, map: {over: [1]}, loop: {until: 'true'}",
        *("loop:", "`map` and `loop` do not go together", "`steps:` group"),
    ),
    "map over a number": (
        "id: a, prompt: b, map: {over: 5}",
        "5}",
        "`over` must be an expression or a list",
        "plan.tasks",
    ),
    "reduce with depends_on": (
        "id: a, prompt: b, map: {over: [1], reduce: {prompt: c, depends_on: x}}",
        *("depends_on", "`depends_on` has no meaning in a step written inside another", ""),
    ),
    "duration": ("id: a, prompt: b, timeout: fast", "fast", "`fast` is not a duration", "30s, 5m, 24h, 1h30m"),
    "negative duration": ("id: a, prompt: b, timeout: -5", "-5", "`-5` is out of range", "between 0 and 10 years"),
    "contradicting retries": (
        "id: a, prompt: b, max_retries: 2, retry: {max: 3}",
        *("{max", "`max_retries: 2` contradicts `retry: {max: 3}`", "Keep one"),
    ),
    "retry on": (
        "id: a, prompt: b, retry: {on: [timeouts]}",
        *("timeouts", "`timeouts` is not a value of item 1 of `on`", "Did you mean `timeout`?"),
    ),
    "fallback missing": ("id: a, prompt: b, on_failure: fallback", "fallback", "`fallback` needs `fallback`", ""),
    "fallback alone": (
        "id: a, prompt: b, fallback: {type: default_value, value: 1}",
        *("fallback:", "`fallback` has no effect without `on_failure: fallback`", "Add on_failure: fallback."),
    ),
    "fallback without its value": (
        "id: a, prompt: b, on_failure: fallback, fallback: {type: model}",
        *("{type", "`fallback` of type `model` needs `model`", ""),
    ),
    "then alone": (
        "id: a, prompt: b, then: skip",
        "then",
        "`then` goes with `on_failure: retry`",
        "`on_failure` instead",
    ),
    "provider in a model": (
        "id: a, prompt: b, model: opnai:gpt-6",
        *("opnai", "unknown provider `opnai` in `opnai:gpt-6`", "Did you mean `openai`?"),
    ),
    "workflow name": ("id: a, workflow: a@b", "a@b", "`a@b` is not the name of a workflow", "name@3 or name@latest"),
    "environment": ("id: a, run: [b], env: {LD_PRELOAD: x}", "LD_", "`LD_PRELOAD` may not be set", "another name"),
    "wait forms": ("id: a, wait: {for: 5m, until: x}", "x}", "`wait` needs one of", "wait: 10m"),
    "aggregate": ("id: a, aggregate: {how: concat}", "{how", "`from` is missing in `aggregate`", "{{build.output}}"),
    "loop without until": ("id: a, prompt: b, loop: {max: 3}", "{max", "`until` is missing in `loop`", ""),
    "number as text": ("id: a, prompt: 5.10", "5.10", "`prompt` must be text", 'Put it in quotes: "5.10"'),
    "output of no type": (
        "id: a, prompt: b, output: {x: text}",
        "text",
        "`text` is not a type",
        "Did you mean `string`?",
    ),
    "output as text": (
        "id: a, prompt: b, output: boolean",
        "boolean",
        "`output` must be a mapping",
        "output: {approved: boolean}",
    ),
    "empty expression": ("id: a, prompt: b, when: ''", "''", "`when` is empty", ""),
    "role": ("id: a, role: bilder", "bilder", "there is no role `bilder`", "Did you mean `builder`?"),
    "integration": (
        "id: a, uses: jira.create, with: {}",
        "jira",
        "there is no integration `jira`",
        "Known: anthropic, ",
    ),
    "operation": (
        "id: a, uses: slack.post, with: {}",
        "slack",
        "`slack` has no operation `slack.post`",
        "`slack.post_message`?",
    ),
}


@pytest.mark.parametrize(("step", "place", "message", "hint"), STEPS.values(), ids=STEPS)
def test_faults_of_a_step(step: str, place: str, message: str, hint: str) -> None:
    """`place`: what the problem points at."""
    line = f"  - {{{step}}}"
    problem = only(f"name: a\nsteps:\n{line}\n")
    assert problem.column is not None
    assert problem.line == 3
    assert line[problem.column - 1 :].startswith(place)
    assert message in problem.message
    assert hint in problem.hint
    assert problem.file == "w.yaml"
    assert problem.path.startswith("steps[0]")


def test_a_message_never_speaks_of_the_machinery() -> None:
    texts = [text for text, *_ in FAULTS.values()]
    texts += [f"name: a\nsteps:\n  - {{{step}}}\n" for step, *_ in STEPS.values()]
    texts.append((FILES / "broken" / "everything.yaml").read_text())
    for text in texts:
        for problem in problems(text):
            told = f"{problem.message} {problem.hint}".lower()
            for word in ("pydantic", "valid string", "input should", "field required", "type=", "nonetype"):
                assert word not in told, told


# Ids


@pytest.mark.parametrize("name", ["Plan", "run-tests", "2nd", "inputs", "size", "in", "default", "läuft"])
def test_ids_that_cannot_be_named_in_expressions_are_refused(name: str) -> None:
    problem = only(f"name: a\nsteps:\n  - id: {name}\n    prompt: hi\n")
    assert (problem.line, problem.column) == (3, 9)
    assert f"`{name}`" in problem.message


def test_ids_are_unique_in_the_whole_file_groups_included() -> None:
    text = (
        "name: a\nsteps:\n  - id: one\n    steps:\n      - {id: two, prompt: hi}\n"
        "      - {id: three, prompt: hi, map: {over: [1], reduce: {id: one, prompt: hi}}}\n"
        "finally: [{id: two, run: [rm]}]\n"
    )
    found = problems(text)
    assert [(problem.line, problem.column, problem.message) for problem in found] == [
        (6, 63, "the id `one` is used twice"),
        (7, 16, "the id `two` is used twice"),
    ]
    assert "line 3" in found[0].hint
    assert "line 5" in found[1].hint


def test_names_are_not_checked_where_none_are_given() -> None:
    assert load("name: a\nsteps: [{id: x, role: anything}, {id: y, uses: a.b}]\n").spec.steps[1].uses == "a.b"


# Positions


TEXTS = """\
name: positions
steps:
  - id: a
    prompt: "say \\"x\\" \\u00e9 {{one}}"
  - id: b
    prompt: 'it''s {{one}}'
  - id: c
    prompt: |
      first {{one}}

        second {{two}}
  - id: d
    prompt: >-
      folded
      text {{one}}

      next {{two}}
  - id: e
    prompt: plain 😀
      goes on {{one}}
  - id: f
    prompt: "quoted
      on {{one}}


      far {{two}}"
  - {id: g, prompt: "{{one}}"}
  - id: h
    prompt: |2-
        indented {{one}}
  - id: i
    approval: "sure about {{one}}?"
"""


def test_a_place_inside_of_a_text_is_found_in_every_style() -> None:
    made = load(TEXTS)
    lines = TEXTS.split("\n")
    seen = 0
    for index, step in enumerate(made.spec.steps):
        for name in ("{{one}}", "{{two}}"):
            text = step.approval.message if step.approval else step.prompt
            assert text is not None
            if name in text:
                path = f"steps[{index}].{'approval.message' if step.approval else 'prompt'}"
                line, column = made.positions.inside(path, text.index(name))
                assert line is not None
                assert column is not None
                assert lines[line - 1][column - 1 :].startswith(name), (step.id, name, line, column)
                seen += 1
    assert seen == 12


def test_what_was_filled_in_points_at_the_nearest_thing_written() -> None:
    positions = load("name: a\nsteps:\n  - id: x\n    model: m\n    prompt: hi\n    max_retries: 2\n").positions
    assert positions.at("steps[0].models[0]") == (4, 12)
    assert positions.at(("steps", 0, "retry", "max")) == (6, 18)
    assert positions.at("steps[0].timeout") == (3, 5)
    assert positions.at("steps[7].prompt") == (3, 3)
    assert positions.at("steps[0].model", key=True) == (4, 5)


@pytest.mark.parametrize("path", [("a", 0, "b"), ("with", "a b", 'q"."', 3, "é"), (), ("1",)])
def test_paths_survive_being_written(path: tuple[str | int, ...]) -> None:
    assert parse_path(format_path(path)) == path


def test_a_problem_of_the_compiler_carries_place_text_and_file() -> None:
    made = loaded("name: a\nsteps:\n  - id: x\n    prompt: say {{nothing}}\n")
    problem = made.problem("there is no `nothing`", "steps[0].prompt", hint="h", offset=6)
    assert (problem.file, problem.line, problem.column, problem.path) == ("w.yaml", 4, 19, "steps[0].prompt")
    assert problem.text == "say {{nothing}}"


# Everything together


def test_the_compiler_is_asked_too_where_keys_are_misspelt() -> None:
    text = """\
name: x
limits: {timeout: soon}
steps:
  - id: plan
    role: planer
    promt: "Plan {{inputs.nothing}}"
    outptu: {approved: boolean}
  - id: build
    role: builder
    prompt: "{{plan.aproved}} and {{nobody.output}}"
    on_failure: rety
    depends_on: [plann]
"""
    with pytest.raises(WorkflowInvalid) as caught:
        read_workflow(text, file="w.yaml", roles=ROLES, operations=OPERATIONS)
    places = [(problem.line, problem.column) for problem in caught.value.problems]
    assert places == [(2, 19), (5, 11), (6, 5), (6, 27), (7, 5), (10, 21), (10, 37), (11, 17), (12, 18)]


def test_a_step_whose_meaning_is_unknown_is_not_judged_further() -> None:
    text = (
        "name: x\nsteps:\n  - {id: a, role: planner}\n  - {id: b, role: builder, frobnicate: [x], prompt: '{{zzz}}'}\n"
    )
    with pytest.raises(WorkflowInvalid) as caught:
        read_workflow(text, roles=ROLES, operations=OPERATIONS)
    assert [problem.message for problem in caught.value.problems] == ["unknown key `frobnicate` in a step"]


def test_wrong_values_do_not_hide_wrong_names() -> None:
    text = """name: w
inputs: {x: {type: strng}, y: {type: string}}
steps:
  - {id: a, prompt: 5}
  - {id: b, run: {x: 1}, when: nothing.output == 1}
  - {id: c, prompt: "{{inputs.z}} {{a.output}} {{inputs.x}}", depends_on: [zz]}
  - {id: d, prompt: "{{missing.output}}", map: {over: "{{inputs.q}}", max_items: many}}
  - {id: e, prompt: hi, run: [ls]}
  - {id: f, aggregate: {from: [a], how: glue}}
  - {id: f, prompt: "{{lost.output}}"}
  - {prompt: "{{away.output}}"}
  - 5
  - {id: g, steps: [{id: h, run: 3}, {id: i, prompt: "{{gone.output}} {{h.output}}"}]}
outputs: {o: "{{nope.output}}"}
"""
    with pytest.raises(WorkflowInvalid) as caught:
        read_workflow(text, roles=ROLES, operations=OPERATIONS)
    told = [(problem.line, problem.message) for problem in caught.value.problems]
    assert told == [
        (2, "`strng` is not a type"),
        (4, "`prompt` must be text"),
        (5, "`run` must be a list"),
        (5, "there is nothing called `nothing`"),
        (6, "there is no input `z`"),
        (6, "there is no step `zz` to depend on"),
        (7, "there is nothing called `missing`"),
        (7, "there is no input `q`"),
        (7, "`max_items` must be a whole number, not `many`"),
        (8, "the step has 2 actions: `prompt`, `run`"),
        (9, "`glue` is not a value of `how`"),
        (10, "the id `f` is used twice"),
        (10, "there is nothing called `lost`"),
        (11, "`id` is missing in a step"),
        (11, "there is nothing called `away`"),
        (12, "a step must be a mapping (`key: value`)"),
        (13, "`run` must be a list"),
        (13, "there is nothing called `gone`"),
        (14, "there is nothing called `nope`"),
    ]


def test_warnings_come_with_the_plan() -> None:
    plan, warnings = read_workflow(
        "name: x\nsteps:\n  - {id: a, uses: slack.post_message, with: {channel: '#a', text: hi}}\n",
        file="w.yaml",
        roles=ROLES,
        operations=OPERATIONS,
    )
    assert plan.nodes[0].id == "a"
    assert [(warning.severity, warning.line) for warning in warnings] == [("warning", 3)]


@pytest.mark.parametrize("name", ["feature-build", "review", "complete"])
def test_the_snippets_load_and_plan(name: str) -> None:
    text = (FILES / "snippets" / f"{name}.yaml").read_text()
    plan, problems = read_workflow(text, file=name, roles=ROLES, operations=OPERATIONS)
    assert plan.top > 3
    assert all(problem.severity == "warning" for problem in problems)


def test_the_first_snippet_means_what_it_says() -> None:
    spec = loaded((FILES / "snippets" / "feature-build.yaml").read_text()).spec
    plan, build = spec.steps
    assert (plan.action, plan.role, plan.prompt) == ("prompt", "planner", "Analyze feature requirements")
    assert (build.action, build.prompt, build.depends_on) == ("prompt", None, ["plan"])
    assert build.condition is not None
    assert build.condition.plain() == {
        "field": "plan.approved",
        "operator": "equals",
        "value": True,
        "on_missing": "error",
    }


def test_the_third_snippet_means_what_it_says() -> None:
    review = loaded((FILES / "snippets" / "review.yaml").read_text()).spec.steps[2]
    assert review.prompt == "Review the code from {{build.output}}"
    assert review.retry is not None
    assert (review.retry.max, review.on_failure) == (3, "abort")


def test_three_hundred_lines_load_in_under_fifty_milliseconds() -> None:
    step = (
        "  - id: s{0}\n    role: builder\n    prompt: |\n      Do {{{{inputs.x}}}}\n    timeout: 5m\n    effort: low\n"
    )
    text = "name: long\ninputs: {x: string}\nsteps:\n" + "".join(step.format(number) for number in range(50))
    assert text.count("\n") > 300
    loaded(text)
    times = []
    for _ in range(5):
        begin = time.thread_time()  # other work on the machine does not count
        loaded(text)
        times.append(time.thread_time() - begin)
    assert min(times) < 0.05


def test_a_syntax_error_elsewhere_is_told_beside_an_unquoted_template() -> None:
    found = problems('name: a\nsteps:\n  - id: a\n    prompt: {{ x }}\n    system: "open\n')
    assert [(problem.line, problem.message) for problem in found] == [
        (4, "`{{ x }}` must be in quotes"),
        (5, "a quote is opened here and never closed"),
    ]
