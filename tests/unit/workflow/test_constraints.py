"""Constraints of inputs and outputs that can never be met are refused when the file is loaded."""

from __future__ import annotations

import pytest

from gorgon_common.errors import WorkflowInvalid
from tests.unit.workflow.test_loader import loaded

FILE = "name: x\n{inputs}steps:\n  - {{id: a, prompt: hi{output}}}\n"


def refusal(field: str, *, output: bool = False) -> str:
    text = (
        FILE.format(inputs="", output=f", output: {{f: {field}}}")
        if output
        else FILE.format(inputs=f"inputs: {{f: {field}}}\n", output="")
    )
    with pytest.raises(WorkflowInvalid) as caught:
        loaded(text)
    (problem,) = caught.value.problems
    return problem.message


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('{type: string, pattern: "("}', "the pattern cannot be read"),
        ("{type: string, pattern: 3}", "the pattern cannot be read"),
        ("{type: string, enum: []}", "`enum` must be a list with at least one value"),
        ("{type: integer, minimum: 5, maximum: 2}", "no value fits: `minimum` 5 is above `maximum` 2"),
        ("{type: integer, min: 5, max: 2}", "no value fits: `minimum` 5 is above `maximum` 2"),
        ("{type: string, min_length: 5, max_length: 2}", "no value fits: `minLength` 5 is above `maxLength` 2"),
        ("{type: array, min_items: 5, max_items: 2}", "no value fits: `minItems` 5 is above `maxItems` 2"),
        ("{type: string, max_length: -1}", "`maxLength` must be a whole number, 0 or more"),
        ("{type: integer, minimum: low}", "`minimum` must be a number"),
        ('{type: array, items: {type: string, pattern: "("}}', "the pattern cannot be read"),
    ],
)
@pytest.mark.parametrize("output", [False, True])
def test_constraints_that_cannot_be_met(field: str, said: str, output: bool) -> None:
    assert refusal(field, output=output).startswith(said)


@pytest.mark.parametrize(
    "field",
    [
        "{type: string, enum: [a, b], default: c}",
        '{type: string, pattern: "b", default: a}',
        "{type: integer, minimum: 5, default: 3}",
        "{type: string, max_length: 2, default: abc}",
    ],
)
def test_a_default_must_meet_the_constraints_beside_it(field: str) -> None:
    assert refusal(field).startswith("the default does not fit: ")


def test_what_can_be_met_loads() -> None:
    loaded(FILE.format(inputs='inputs: {f: {type: string, pattern: "^a", min_length: 1, default: ab}}\n', output=""))


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ('{$ref: "#/nope"}', "`#/nope` is not in this schema"),
        ('{anyOf: [{type: string, pattern: "("}]}', "the pattern cannot be read"),
    ],
)
def test_a_full_schema_is_looked_through(inner: str, said: str) -> None:
    text = FILE.format(inputs="", output=f", output: {{type: object, properties: {{f: {inner}}}}}")
    with pytest.raises(WorkflowInvalid) as caught:
        loaded(text)
    assert [problem.message.startswith(said) for problem in caught.value.problems] == [True]
