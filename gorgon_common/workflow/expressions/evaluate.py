"""Evaluates a syntax tree by walking it, with a bound on the cost.

The rules are CEL's unless workflow-language.md says otherwise: integers and decimals mix, a missing value is a separate
kind of error that `default()` and `has()` handle, and division by zero is an error for decimals too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import tree
from gorgon_common.workflow.expressions.errors import MissingValue
from gorgon_common.workflow.expressions.functions import FUNCTIONS, Meter, compare, equal, of_type
from gorgon_common.workflow.expressions.names import did_you_mean
from gorgon_common.workflow.expressions.values import MAX_TEXT, MISSING, StepValue, too_long

_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1


class Context(Meter):
    """One evaluation: the names, the variables of the enclosing comprehensions, and the steps taken so far."""

    __slots__ = ("names", "scope")

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = names
        self.scope: dict[str, Any] = {}


def evaluate(node: tree.Node, context: Context) -> Any:
    """Return the value of a node.  Raises ExpressionError, including MissingValue."""
    value = _raw(node, context)
    if type(value) is StepValue:
        return value.value()
    return value


def _raw(node: tree.Node, context: Context) -> Any:
    """Like `evaluate`, but a step stays a step, because a field of it may still be selected."""
    context.steps += 1
    if context.steps > context.LIMIT:
        context.exhausted()
    return _RULES[type(node)](node, context)


def _literal(node: tree.Literal, context: Context) -> Any:
    return node.value


def _ident(node: tree.Ident, context: Context) -> Any:
    name = node.name
    if name in context.scope:
        return context.scope[name]
    try:
        value = context.names[name]
    except KeyError:
        raise ExpressionError(f"there is no `{name}` here", hint=did_you_mean(name, context.names)) from None
    if value is MISSING:
        raise MissingValue(f"`{name}` has no value", hint="Write `default(x, y)` where it may be missing.")
    return value


def _select(node: tree.Select, context: Context) -> Any:
    operand = _raw(node.operand, context)
    field = node.field
    if type(operand) is StepValue:
        return operand.get(field)
    if isinstance(operand, Mapping):
        try:
            value = operand[field]
        except KeyError:
            value = MISSING
        if value is not MISSING:
            return value
        raise MissingValue(
            f"{tree.describe(node.operand)} has no field `{field}`", hint=did_you_mean(field, map(str, operand))
        )
    if operand is None:
        raise MissingValue(f"{tree.describe(node.operand)} is null: it has no field `{field}`")
    raise ExpressionError(f"{tree.describe(node.operand)} is {of_type(operand)}: it has no field `{field}`")


def _index(node: tree.Index, context: Context) -> Any:
    operand = _raw(node.operand, context)
    key = evaluate(node.key, context)
    if type(operand) is StepValue:
        if isinstance(key, str):
            return operand.get(key)
        operand = operand.value()
    if isinstance(operand, Mapping):
        if isinstance(key, float) and key.is_integer():
            key = int(key)
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ExpressionError(f"a key is a text or an integer, not {of_type(key)}")
        value = operand.get(key, MISSING)
        if value is MISSING:
            raise MissingValue(
                f"{tree.describe(node.operand)} has no field `{key}`", hint=did_you_mean(str(key), map(str, operand))
            )
        return value
    if isinstance(operand, (list, tuple)):
        if isinstance(key, float) and key.is_integer():
            key = int(key)
        if isinstance(key, bool) or not isinstance(key, int):
            raise ExpressionError(
                f"{tree.describe(node.operand)} is a list: its index is an integer, not {of_type(key)}"
            )
        if not 0 <= key < len(operand):
            raise MissingValue(f"{tree.describe(node.operand)} has {len(operand)} items: there is no [{key}]")
        return operand[key]
    if operand is None:
        raise MissingValue(f"{tree.describe(node.operand)} is null: it has no [{key}]")
    raise ExpressionError(f"{tree.describe(node.operand)} is {of_type(operand)}: it has no [{key}]")


def _unary(node: tree.Unary, context: Context) -> Any:
    value = evaluate(node.operand, context)
    if node.op == "!":
        return not _truth(value, node.operand)
    if isinstance(value, timedelta):
        return -value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ExpressionError(f"`-` needs a number: {tree.describe(node.operand)} is {of_type(value)}")
    return _whole(-value)


def _truth(value: Any, node: tree.Node) -> bool:
    if value is True or value is False:
        return bool(value)
    raise ExpressionError(
        f"{tree.describe(node)} is {of_type(value)}, where true or false is needed",
        hint="Compare it with something: `==`, `!=`, `>`.",
    )


def _whole(value: Any) -> Any:
    if isinstance(value, int) and not _INT_MIN <= value <= _INT_MAX:
        raise ExpressionError("the result is too large for an integer (64 bits)")
    if isinstance(value, float) and not math.isfinite(value):
        raise ExpressionError("the result is too large for a decimal")
    return value


def _binary(node: tree.Binary, context: Context) -> Any:
    op = node.op
    if op in ("&&", "||"):
        return _logic(node, context, decided=op == "||")
    left, right = evaluate(node.left, context), evaluate(node.right, context)
    if op == "==":
        return equal(left, right, context)
    if op == "!=":
        return not equal(left, right, context)
    if op == "in":
        return _contained(left, right, context)
    try:
        if op in _ORDER:
            return _ORDER[op](compare(left, right))
        return _ARITHMETIC[op](left, right, context)
    except TypeError:
        raise ExpressionError(
            f"`{op}` cannot join {of_type(left)} and {of_type(right)}: "
            f"{tree.describe(node.left)} {op} {tree.describe(node.right)}",
            hint="`string(x)`, `int(x)` and `double(x)` convert.",
        ) from None
    except OverflowError:
        raise ExpressionError(f"the result of `{op}` is too large") from None


def _logic(node: tree.Binary, context: Context, *, decided: bool) -> bool:
    """Evaluate CEL's && and ||: a side that decides the result takes precedence over an error on the other side."""
    try:
        left = _truth(evaluate(node.left, context), node.left)
    except ExpressionError as error:
        context.check()
        right = _truth(evaluate(node.right, context), node.right)
        if right is decided:
            return decided
        raise error from None
    if left is decided:
        return decided
    return _truth(evaluate(node.right, context), node.right)


def _contained(left: Any, right: Any, context: Context) -> bool:
    if isinstance(right, Mapping):
        return isinstance(left, (str, int)) and not isinstance(left, bool) and left in right
    if isinstance(right, (list, tuple)):
        context.spend(len(right) // 4)
        return any(equal(left, item, context) for item in right)
    hint = "Text contains text: `a.contains(b)`." if isinstance(right, str) else ""
    raise ExpressionError(f"`in` needs a list or an object on its right, not {of_type(right)}", hint=hint)


_ORDER: dict[str, Callable[[int], bool]] = {
    "<": lambda order: order < 0,
    "<=": lambda order: order <= 0,
    ">": lambda order: order == 1,
    ">=": lambda order: order in (0, 1),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _add(left: Any, right: Any, context: Context) -> Any:
    if _is_number(left) and _is_number(right):
        return _whole(left + right)
    if isinstance(left, str) and isinstance(right, str):
        length = len(left) + len(right)
        if length > MAX_TEXT:
            raise too_long("the text", length)
        context.spend(length // 20)
        return left + right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        context.listed(len(left) + len(right))
        return [*left, *right]
    if isinstance(left, (datetime, timedelta)) and isinstance(right, (datetime, timedelta)):
        return left + right  # type: ignore[operator]  # two timestamps raise TypeError, as they should
    raise TypeError


def _subtract(left: Any, right: Any, context: Context) -> Any:
    if _is_number(left) and _is_number(right):
        return _whole(left - right)
    if isinstance(left, (datetime, timedelta)) and isinstance(right, (datetime, timedelta)):
        return left - right  # type: ignore[operator]
    raise TypeError


def _multiply(left: Any, right: Any, context: Context) -> Any:
    if _is_number(left) and _is_number(right):
        return _whole(left * right)
    raise TypeError


def _divide(left: Any, right: Any, context: Context) -> Any:
    if not (_is_number(left) and _is_number(right)):
        raise TypeError
    if right == 0:
        raise ExpressionError("division by zero")
    if isinstance(left, int) and isinstance(right, int):
        quotient = abs(left) // abs(right)
        return _whole(quotient if (left < 0) == (right < 0) else -quotient)
    return _whole(left / right)


def _remainder(left: Any, right: Any, context: Context) -> Any:
    if not (_is_number(left) and _is_number(right)):
        raise TypeError
    if isinstance(left, float) or isinstance(right, float):
        raise TypeError
    if right == 0:
        raise ExpressionError("division by zero")
    rest = abs(left) % abs(right)
    return -rest if left < 0 else rest


_ARITHMETIC: dict[str, Callable[[Any, Any, Context], Any]] = {
    "+": _add,
    "-": _subtract,
    "*": _multiply,
    "/": _divide,
    "%": _remainder,
}


def _ternary(node: tree.Ternary, context: Context) -> Any:
    chosen = node.yes if _truth(evaluate(node.test, context), node.test) else node.no
    return evaluate(chosen, context)


def _list(node: tree.ListOf, context: Context) -> Any:
    return [evaluate(item, context) for item in node.items]


def _map(node: tree.MapOf, context: Context) -> Any:
    made: dict[str | int, Any] = {}
    for key_node, value_node in node.entries:
        key = evaluate(key_node, context)
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ExpressionError(f"a key is a text or an integer, not {of_type(key)}")
        if key in made:
            raise ExpressionError(f"the key `{key}` is there twice")
        made[key] = evaluate(value_node, context)
    return made


def _call(node: tree.Call, context: Context) -> Any:
    if node.name == "default":
        try:
            value = evaluate(node.args[0], context)
        except MissingValue:
            value = None
        return evaluate(node.args[1], context) if value is None else value
    values = [evaluate(arg, context) for arg in node.args]
    context.steps += 2
    try:
        return FUNCTIONS[node.name](context, *values)
    except TypeError:
        given = ", ".join(of_type(value) for value in values)
        raise ExpressionError(f"`{node.name}` cannot take {given}: {tree.describe(node.args[0])}") from None


def _has(node: tree.Has, context: Context) -> Any:
    try:
        _raw(node.operand, context)
    except MissingValue:
        return False
    return True


def _comprehension(node: tree.Comprehension, context: Context) -> Any:
    over = evaluate(node.over, context)
    if isinstance(over, Mapping):
        over = list(over)
    if not isinstance(over, (list, tuple)):
        raise ExpressionError(
            f"`{node.macro}` needs a list or an object: {tree.describe(node.over)} is {of_type(over)}"
        )
    context.listed(len(over))
    outer = context.scope
    context.scope = inner = dict(outer)
    try:
        return _MACROS[node.macro](node, over, inner, context)
    finally:
        context.scope = outer


def _quantifier(node: tree.Comprehension, over: Any, inner: dict[str, Any], context: Context) -> bool:
    """Evaluate `all` and `exists`: as with && and ||, a deciding item takes precedence over an error on another."""
    decided = node.macro == "exists"
    failure: ExpressionError | None = None
    assert node.test is not None
    for item in over:
        inner[node.name] = item
        try:
            if _truth(evaluate(node.test, context), node.test) is decided:
                return decided
        except ExpressionError as error:
            context.check()
            failure = failure or error
    if failure is not None:
        raise failure
    return not decided


def _exists_one(node: tree.Comprehension, over: Any, inner: dict[str, Any], context: Context) -> bool:
    return len(_filter(node, over, inner, context)) == 1


def _filter(node: tree.Comprehension, over: Any, inner: dict[str, Any], context: Context) -> list[Any]:
    assert node.test is not None
    kept = []
    for item in over:
        inner[node.name] = item
        if _truth(evaluate(node.test, context), node.test):
            kept.append(item)
    return kept


def _map_macro(node: tree.Comprehension, over: Any, inner: dict[str, Any], context: Context) -> list[Any]:
    assert node.value is not None
    made = []
    for item in over:
        inner[node.name] = item
        if node.test is None or _truth(evaluate(node.test, context), node.test):
            made.append(evaluate(node.value, context))
    return made


_MACROS: dict[str, Callable[[tree.Comprehension, Any, dict[str, Any], Context], Any]] = {
    "all": _quantifier,
    "exists": _quantifier,
    "exists_one": _exists_one,
    "filter": _filter,
    "map": _map_macro,
}

_RULES: dict[type, Callable[[Any, Context], Any]] = {
    tree.Literal: _literal,
    tree.Ident: _ident,
    tree.Select: _select,
    tree.Index: _index,
    tree.Unary: _unary,
    tree.Binary: _binary,
    tree.Ternary: _ternary,
    tree.ListOf: _list,
    tree.MapOf: _map,
    tree.Call: _call,
    tree.Has: _has,
    tree.Comprehension: _comprehension,
}
