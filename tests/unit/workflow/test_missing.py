"""Values that may not exist when they are read: refused when the file is loaded."""

from __future__ import annotations

import pytest

from gorgon_common.errors import Problem, WorkflowInvalid
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow.source import read_workflow

HEAD = """name: w
inputs: {go: {type: boolean, default: false}}
steps:
  - {id: always, run: [echo, x]}
  - {id: maybe, when: inputs.go, run: [echo, x]}
"""


def told(text: str) -> list[Problem]:
    try:
        _, warnings = read_workflow(text, file="f.yaml", roles=load_roles(), operations=load_operations())
    except WorkflowInvalid as error:
        return error.problems
    return warnings


def steps(*lines: str, outputs: str = "") -> str:
    listed = "".join(f"  - {line}\n" for line in lines)
    return f"{HEAD}{listed}{f'outputs: {{o: {outputs}}}' if outputs else ''}\n"


SKIPPED = "step `maybe` is skipped where its condition is false"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (steps(outputs='"{{maybe.output}}"'), f"`maybe.output` may have no value: {SKIPPED}"),
        (steps(outputs='"say {{maybe.stdout}}"'), f"`maybe.stdout` may have no value: {SKIPPED}"),
        (steps(outputs='{deep: ["{{size(maybe.output)}}"]}'), f"`maybe.output` may have no value: {SKIPPED}"),
        (steps(outputs="\"{{steps['maybe'].output}}\""), SKIPPED),
        (
            steps("{id: next, run: [echo, '{{maybe.output}}']}", outputs='"{{next.output}}"'),
            "`next.output` may have no value: step `next` is skipped where `maybe` is",
        ),
        (
            steps("{id: frail, run: [ls], on_failure: skip}", outputs='"{{frail.output}}"'),
            "`frail.output` may have no value: step `frail` is skipped where it fails",
        ),
        (steps("{id: b, join: none_failed, run: [echo, '{{maybe.output}}']}"), SKIPPED),
        (steps("{id: b, join: all_done, run: [echo, '{{maybe.output}}']}"), SKIPPED),
        (steps("{id: b, join: any_success, run: [echo, '{{maybe.output}}', '{{always.output}}']}"), SKIPPED),
        (steps("{id: b, join: none_failed, when: maybe.output != '', run: [ls]}"), SKIPPED),
        (
            steps(
                "{id: b, join: none_failed, condition: {field: maybe.output, operator: matches, value: x}, run: [ls]}"
            ),
            SKIPPED,
        ),
        (
            steps("{id: g, steps: [{id: i, when: inputs.go, run: [ls]}]}", "{id: b, run: [echo, '{{i.output}}']}"),
            "step `i` is skipped where its condition is false",
        ),
        (
            steps(
                "{id: g, steps: [{id: i, when: inputs.go, run: [ls], output: {n: number}}]}",
                outputs='"{{g.output.i.n}}"',
            ),
            "`g.output.i.n` may have no value: step `i` is skipped where its condition is false",
        ),
        (
            steps("{id: l, loop: {until: i.exit_code == 0}, steps: [{id: i, when: inputs.go, run: [ls]}]}"),
            "`i.exit_code` may have no value: step `i` is skipped",
        ),
        (
            steps("{id: l, loop: {until: size(l.output) > 9}, prompt: 'Better than {{l.output}}'}"),
            "`l.output` has no value in the first round of the loop `l`",
        ),
        (
            steps("{id: l, loop: {until: size(i.output) > 9}, steps: [{id: i, prompt: 'After {{l.output.i}}'}]}"),
            "`l.output.i` has no value in the first round of the loop `l`",
        ),
        (
            steps("{id: l, loop: {until: i.status == 'skipped'}, steps: [{id: i, when: l.output.i != '', run: [ls]}]}"),
            "has no value in the first round",
        ),
    ],
)
def test_it_is_refused_with_default_as_the_way_out(text: str, message: str) -> None:
    (found,) = [entry for entry in told(text) if entry.severity == "error"]
    assert message in found.message
    assert "Write default(" in found.hint
    assert found.line is not None
    assert found.line >= 6


@pytest.mark.parametrize(
    "text",
    [
        steps(outputs="\"{{default(maybe.output, 'no')}}\""),
        steps(outputs='"{{maybe.status}} {{maybe.error}}"'),
        steps(outputs="\"{{has(maybe.output) ? maybe.output : 'no'}}\""),
        steps(outputs="\"{{maybe.status == 'succeeded' && maybe.output == 'x'}}\""),
        steps(outputs="\"{{inputs.go ? maybe.output : 'no'}}\""),
        steps(outputs="\"{{default(maybe.output, default(always.output, 'no'))}}\""),
        steps(outputs='"{{always.output}}"'),
        steps("{id: b, run: [echo, '{{maybe.output}}']}", outputs="\"{{default(b.output, 'no')}}\""),
        steps("{id: b, join: none_failed, when: maybe.status == 'succeeded', run: [echo, '{{maybe.output}}']}"),
        steps("{id: b, join: any_success, run: [echo, '{{maybe.output}}']}"),
        steps("{id: b, join: any_success, depends_on: [maybe, always], run: [ls]}", outputs='"{{b.output}}"'),
        steps(
            "{id: b, join: none_failed, condition: {field: maybe.output, operator: exists}, run: [ls]}",
        ),
        steps(
            "{id: b, join: none_failed, run: [ls],"
            " condition: {field: maybe.output, operator: matches, value: x, on_missing: false}}"
        ),
        steps("{id: g, steps: [{id: i, when: inputs.go, run: [ls]}, {id: j, run: [echo, '{{i.output}}']}]}"),
        steps("{id: l, loop: {until: l.exit_code == 0}, allow_failure: true, run: [ls]}", outputs='"{{l.output}}"'),
        steps("{id: l, loop: {until: size(l.output) > 9}, prompt: \"Better than {{default(l.output, '')}}\"}"),
        steps("{id: l, loop: {until: size(l.output) > 9}, prompt: \"{{index > 0 ? l.output : ''}}\"}"),
        steps("{id: l, loop: {until: i.status == 'x'}, steps: [{id: i, when: index > 0, prompt: '{{l.output.i}}'}]}"),
        steps("{id: m, when: inputs.go, map: {over: [1], as: n}, run: [echo, '{{always.output}}']}"),
    ],
)
def test_what_is_guarded_loads(text: str) -> None:
    assert told(text) == []


def test_final_steps_are_warned_of_what_may_not_have_come_to_its_end() -> None:
    text = steps() + "finally:\n  - {id: tidy, run: [echo, '{{always.output}}']}\n"
    (warning,) = told(text)
    assert warning.severity == "warning"
    assert "`finally:` also runs where step `always` did not come to its end" in warning.message
    assert told(text.replace("always.output", "default(always.output, 0)")) == []


def test_older_files_render_nothing_and_load() -> None:
    text = (
        "name: w\nsettings: {auto_parallel: true}\nsteps:\n"
        "- {id: a, type: shell, params: {command: ls}, condition: {field: b.output, operator: not_empty}}\n"
        "- {id: b, type: shell, params: {command: ls}}\n"
        "outputs: {o: '${a.output}'}\n"
    )
    assert [entry for entry in told(text) if "no value" in entry.message] == []


def test_a_long_chain_passes_a_skip_on() -> None:
    chain = [f"{{id: s{number}, run: [echo, '{{{{s{number - 1}.output}}}}']}}" for number in range(1, 3_000)]
    text = steps("{id: s0, run: [echo, '{{maybe.output}}']}", *chain, outputs='"{{s2999.output}}"')
    (found,) = told(text)
    assert found.message == "`s2999.output` may have no value: step `s2999` is skipped where `maybe` is"
