"""Conditions: a CEL expression, or the structured form {field, operator, value, on_missing} with all, any and not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import functions
from gorgon_common.workflow.expressions.errors import ExpressionSyntaxError, MissingValue
from gorgon_common.workflow.expressions.evaluate import Context, evaluate
from gorgon_common.workflow.expressions.expression import Expression, Template, parse, parse_template, render_value
from gorgon_common.workflow.expressions.values import Env, to_json

WORDS = {
    "equals": "equals",
    "not_equals": "does not equal",
    "contains": "contains",
    "greater_than": "is greater than",
    "less_than": "is less than",
    "greater_or_equal": "is at least",
    "less_or_equal": "is at most",
    "in": "is one of",
    "matches": "matches",
    "exists": "exists",
    "is_empty": "is empty",
    "not_empty": "is not empty",
}
"""Operator → its wording in messages."""

PRESENCE = frozenset({"exists", "is_empty", "not_empty"})
"""Operators that test for presence: they take no value, and a missing field is an answer rather than a problem."""


def condition_expressions(
    condition: str | Mapping[str, Any], legacy: bool = False, at: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Expression | Template]]:
    """Yield (path of keys inside the condition, the expression there) for everything that refers to names.

    Raises ExpressionSyntaxError with `at`.
    """
    if isinstance(condition, str):
        yield at, _parsed(condition, legacy, at)
        return
    for key in ("all", "any"):
        for index, part in enumerate(condition.get(key) or ()):
            yield from condition_expressions(part, legacy, (*at, key, index))
    if condition.get("not") is not None:
        yield from condition_expressions(condition["not"], legacy, (*at, "not"))
    if condition.get("field") is not None:
        yield (*at, "field"), _parsed(str(condition["field"]), True, (*at, "field"))
        yield from _templates(condition.get("value"), (*at, "value"), legacy)


def _parsed(source: str, legacy: bool, at: tuple[str | int, ...]) -> Expression:
    try:
        return parse(source, legacy)
    except ExpressionSyntaxError as error:
        error.at = at
        raise


def _templates(
    value: Any, at: tuple[str | int, ...], legacy: bool
) -> Iterator[tuple[tuple[str | int, ...], Expression | Template]]:
    if isinstance(value, str):
        try:
            template = parse_template(value, legacy)
        except ExpressionSyntaxError as error:
            error.at = at
            raise
        if not template.is_literal:
            yield at, template
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _templates(entry, (*at, index), legacy)


def evaluate_condition(
    condition: str | Mapping[str, Any], env: Mapping[str, Any], *, lenient: bool = False
) -> tuple[bool, str]:
    """Return whether the condition holds, and the reason on one line: "plan.approved equals true: it is false".

    With `lenient` (older files), a missing or null field makes it false unless `on_missing` says otherwise, and a text
    is converted before it is compared with a boolean or a number.  Raises ExpressionError.
    """
    lenient = lenient or (isinstance(env, Env) and env.lenient)
    names = env.names if isinstance(env, Env) else env
    if isinstance(condition, str):
        return _bare(condition, names, lenient)
    for key, decides in (("all", False), ("any", True)):
        if condition.get(key) is not None:
            return _combined(condition[key], key, decides, names, lenient)
    if condition.get("not") is not None:
        held, why = evaluate_condition(condition["not"], names, lenient=lenient)
        return not held, f"not ({why})"
    return _field(condition, names, lenient)


def _combined(parts: Any, key: str, decides: bool, names: Mapping[str, Any], lenient: bool) -> tuple[bool, str]:
    reasons = []
    for part in parts:
        held, why = evaluate_condition(part, names, lenient=lenient)
        if held is decides:
            return decides, why
        reasons.append(why)
    joined = "; ".join(reasons)
    return not decides, f"{'none' if key == 'any' else 'all'} of: {joined}"


def _bare(source: str, names: Mapping[str, Any], lenient: bool) -> tuple[bool, str]:
    expression = parse(source, lenient)
    try:
        value = evaluate(expression.tree, Context(names))
    except MissingValue as error:
        if lenient:
            return False, f"{source}: {error.message}"
        raise MissingValue(f"condition `{_short(source)}`: {error.message}", hint=error.hint) from None
    except ExpressionError as error:
        raise ExpressionError(f"condition `{_short(source)}`: {error.message}", hint=error.hint) from None
    if not isinstance(value, bool):
        raise ExpressionError(f"condition `{_short(source)}` is {functions.of_type(value)}, not true or false")
    return value, f"{source}: {_facts(expression, names) or 'it is ' + str(value).lower()}"


def _facts(expression: Expression, names: Mapping[str, Any]) -> str:
    """Describe the current values of an expression's paths: "tests.exit_code is 1"."""
    told: list[str] = []
    for path in expression.paths[:3]:
        if path.root == "secrets":
            continue
        try:
            value = parse(str(path)).evaluate(names)
        except ExpressionError:
            fact = f"{path} is missing"
        else:
            fact = f"{path} is {_show(value)}"
        if fact not in told:
            told.append(fact)
    return ", ".join(told)


def _field(condition: Mapping[str, Any], names: Mapping[str, Any], lenient: bool) -> tuple[bool, str]:
    source = str(condition["field"])
    operator = str(condition.get("operator", "equals"))
    if operator not in WORDS:
        raise ExpressionError(f"there is no operator `{operator}`", hint=f"Known: {', '.join(WORDS)}.")
    if operator in PRESENCE:
        value = _value(source, names)
        held = _PRESENCE[operator](value)
        return held, f"{source} {WORDS[operator]}: it is {'missing' if value is None else _show(value)}"
    wanted = render_value(condition.get("value"), Env(names, lenient), legacy=lenient)
    told = f"{source} {WORDS[operator]} {_show(wanted)}"
    value = _value(source, names)
    if value is None and not (wanted is None and operator in ("equals", "not_equals")):
        on_missing = condition.get("on_missing") or ("false" if lenient else "error")
        if on_missing in ("false", False):
            return False, f"{told}: it is missing"
        raise MissingValue(
            f"condition `{told}`: `{source}` is missing or null",
            hint="`on_missing: false` makes the condition false instead.",
        )
    if lenient:
        value = _coerced(value, wanted)
    try:
        held = _COMPARED[operator](value, wanted)
    except TypeError:
        raise ExpressionError(
            f"condition `{told}`: `{source}` is {functions.of_type(value)}, which cannot be compared this way with "
            f"{functions.of_type(wanted)}"
        ) from None
    return held, f"{told}: it is {_show(value)}"


def _value(source: str, names: Mapping[str, Any]) -> Any:
    try:
        return evaluate(parse(source, True).tree, Context(names))
    except MissingValue:
        return None


def _coerced(value: Any, wanted: Any) -> Any:
    """Older files: convert a published text to the type of the literal it is compared with."""
    if not isinstance(value, str) or isinstance(wanted, str):
        return value
    text = value.strip().lower()
    if isinstance(wanted, bool):
        return {"true": True, "yes": True, "false": False, "no": False}.get(text, value)
    if isinstance(wanted, (int, float)):
        try:
            return float(text)
        except ValueError:
            return value
    return value


def _contains(value: Any, wanted: Any) -> bool:
    if isinstance(value, str):
        if not isinstance(wanted, str):
            raise TypeError
        return wanted in value
    if isinstance(value, (list, tuple)):
        return any(functions.equal(item, wanted, functions.Meter()) for item in value)
    if isinstance(value, Mapping):
        return isinstance(wanted, str) and wanted in value
    raise TypeError


def _in(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str) and not isinstance(value, str):
        raise TypeError
    return _contains(wanted, value)


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and len(value) == 0)


_PRESENCE: dict[str, Callable[[Any], bool]] = {
    "exists": lambda value: value is not None,
    "is_empty": _empty,
    "not_empty": lambda value: not _empty(value),
}

_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "equals": lambda a, b: functions.equal(a, b, functions.Meter()),
    "not_equals": lambda a, b: not functions.equal(a, b, functions.Meter()),
    "contains": _contains,
    "in": _in,
    "greater_than": lambda a, b: functions.compare(a, b) == 1,
    "less_than": lambda a, b: functions.compare(a, b) == -1,
    "greater_or_equal": lambda a, b: functions.compare(a, b) in (0, 1),
    "less_or_equal": lambda a, b: functions.compare(a, b) in (-1, 0),
    "matches": lambda a, b: functions.matches(functions.Meter(), a, b),
}


def _show(value: Any) -> str:
    return _short(to_json(value) if not isinstance(value, str) else f'"{value}"')


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"
