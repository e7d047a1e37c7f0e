"""Static types: what is known about values before the workflow runs, and the complaints that follow from it.

The lattice is small: a kind, the known fields of an object, the item type of a list.  `any` fits everywhere.  Anything
in a JSON Schema that the lattice cannot express becomes `any`, so every complaint is justified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gorgon_common.workflow.expressions import tree
from gorgon_common.workflow.expressions.conditions import PRESENCE
from gorgon_common.workflow.expressions.expression import Expression, Template, parse, parse_template
from gorgon_common.workflow.expressions.names import did_you_mean
from gorgon_common.workflow.expressions.values import STEP_FIELDS


@dataclass(frozen=True, slots=True)
class Complaint:
    """A problem in an expression, at `offset` in the text it was parsed from."""

    message: str
    offset: int
    hint: str = ""
    at: tuple[str | int, ...] = ()
    """In a structured condition: the keys leading to the string that the offset refers to."""


@dataclass(frozen=True, slots=True)
class Type:
    """`kind`: any, null, bool, int, double, string, list, object, timestamp, duration or step."""

    kind: str
    fields: Mapping[str, Type] | None = None
    """object: its fields, None if unknown. step: the fields added by its output and its published names."""
    item: Type | None = None
    """list: the type of its items, None if unknown."""
    free: bool = False
    """string: free text written by a model, which will never equal a literal."""
    values: tuple[str, ...] | None = None
    """string: its only possible values (`enum`)."""
    output: Type | None = None
    """step: the type of its output."""
    command: bool = False
    """step: a command, with exit_code, stdout and stderr."""

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any] | bool | None) -> Type:
        """Return the type that a JSON Schema describes; `any` if the schema is too vague or too complex."""
        if not isinstance(schema, Mapping):
            return ANY
        if any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf", "not", "if")):
            return ANY
        kind = schema.get("type")
        if isinstance(kind, (list, tuple)):
            kinds = [entry for entry in kind if entry != "null"]
            kind = kinds[0] if len(kinds) == 1 else None
        if kind == "object":
            known = schema.get("properties")
            extra = schema.get("additionalProperties", False) or schema.get("patternProperties")
            if not isinstance(known, Mapping) or extra:
                return Type("object")
            return Type("object", fields={str(name): cls.from_schema(entry) for name, entry in known.items()})
        if kind == "array":
            return Type("list", item=cls.from_schema(schema.get("items")) if "items" in schema else None)
        words = schema.get("enum")
        if kind == "string" and isinstance(words, list) and all(isinstance(word, str) for word in words):
            return Type("string", values=tuple(words))
        return _BY_SCHEMA.get(str(kind), ANY)

    @classmethod
    def of_step(
        cls, output: Type | None = None, *, command: bool = False, published: Mapping[str, Type] | None = None
    ) -> Type:
        """Return the type of a step's name.  `output` None: unknown."""
        return cls("step", fields=published, output=output or ANY, command=command)


ANY = Type("any")
NULL = Type("null")
BOOL = Type("bool")
INT = Type("int")
DOUBLE = Type("double")
STRING = Type("string")
FREE_TEXT = Type("string", free=True)
"""The reply of a model without an output schema."""
LIST = Type("list")
OBJECT = Type("object")
TIMESTAMP = Type("timestamp")
DURATION = Type("duration")

_BY_SCHEMA = {"string": STRING, "integer": INT, "number": DOUBLE, "boolean": BOOL, "null": NULL}

_WORDS = {
    "any": "anything",
    "null": "null",
    "bool": "true or false",
    "int": "an integer",
    "double": "a decimal",
    "string": "text",
    "list": "a list",
    "object": "an object",
    "timestamp": "a timestamp",
    "duration": "a duration",
    "step": "a step",
}

_NUMBERS = frozenset({"int", "double"})

_RESULTS: dict[str, Type] = {
    **dict.fromkeys(("contains", "startsWith", "endsWith", "matches", "bool"), BOOL),
    **dict.fromkeys(("size", "int", "uint"), INT),
    **dict.fromkeys(("string", "json", "join", "type"), STRING),
    "truncate": FREE_TEXT,
    "double": DOUBLE,
    "timestamp": TIMESTAMP,
    "duration": DURATION,
    "lines": Type("list", item=STRING),
    "split": Type("list", item=STRING),
}

_TEXT = frozenset({"string"})
_TAKES: dict[str, frozenset[str]] = {
    "size": frozenset({"string", "list", "object"}),
    **dict.fromkeys(("contains", "startsWith", "endsWith", "matches", "split", "lines", "bool"), _TEXT),
    "join": frozenset({"list"}),
    "int": frozenset({"int", "double", "string", "timestamp"}),
    "double": frozenset({"int", "double", "string"}),
    "timestamp": frozenset({"string", "int", "timestamp"}),
    "duration": frozenset({"string", "duration"}),
}
_TAKES["bool"] = frozenset({"string", "bool"})


def infer(expression: Expression | Template, types: Mapping[str, Type]) -> Type:
    """Return what is known about the value.  A template that is not a single expression is text."""
    checker = _Checker(types)
    if isinstance(expression, Expression):
        return checker.value(expression.tree)
    if expression.is_single:
        return checker.value(expression.expressions[0].tree)
    return STRING


def check(expression: Expression | Template, types: Mapping[str, Type]) -> list[Complaint]:
    """Return definite errors, given the types of the root names; a root without a type may be anything."""
    checker = _Checker(types)
    parts = (expression,) if isinstance(expression, Expression) else expression.expressions
    for part in parts:
        checker.value(part.tree)
    return checker.complaints


def check_condition(
    condition: str | Mapping[str, Any], types: Mapping[str, Type], *, legacy: bool = False
) -> list[Complaint]:
    """Return definite errors in a condition: those of `check`, and violations of two further rules.

    A bare expression must be true or false.  Comparing a model's free text with a literal is refused, because the step
    would be skipped silently.  The condition must parse.
    """
    return list(_condition(condition, types, legacy, ()))


def _condition(
    condition: str | Mapping[str, Any], types: Mapping[str, Type], legacy: bool, at: tuple[str | int, ...]
) -> list[Complaint]:
    if isinstance(condition, str):
        expression = parse(condition, legacy)
        found = check(expression, types)
        kind = infer(expression, types)
        if not found and kind.kind not in ("bool", "any") and not legacy:
            told = f"the condition is {_WORDS[_output(kind).kind]}, not true or false"
            if _output(kind).kind not in ("bool", "any"):
                found.append(Complaint(told, expression.tree.offset, "Compare it with something: `==`, `!=`, `>`."))
        return [replace(complaint, at=at) for complaint in found]
    found = []
    for key in ("all", "any"):
        for index, part in enumerate(condition.get(key) or ()):
            found.extend(_condition(part, types, legacy, (*at, key, index)))
    if condition.get("not") is not None:
        found.extend(_condition(condition["not"], types, legacy, (*at, "not")))
    if condition.get("field") is not None:
        found.extend(_structured(condition, types, legacy, at))
    return found


def _structured(
    condition: Mapping[str, Any], types: Mapping[str, Type], legacy: bool, at: tuple[str | int, ...]
) -> list[Complaint]:
    field = parse(str(condition["field"]), True)
    found = [replace(complaint, at=(*at, "field")) for complaint in check(field, types)]
    operator = str(condition.get("operator", "equals"))
    if found or operator in PRESENCE:
        return found
    left = _output(infer(field, types))
    value = condition.get("value")
    if isinstance(value, str):
        template = parse_template(value, legacy)
        found.extend(replace(complaint, at=(*at, "value")) for complaint in check(template, types))
        right = _output(infer(template, types))
        literal = template.is_literal
    else:
        right, literal = _of_value(value), True
    if operator in ("equals", "not_equals", "in") and left.free and literal:
        found.append(replace(_free_text(field.source, field.tree.offset), at=(*at, "field")))
    elif (
        literal
        and operator in ("equals", "not_equals", "in")
        and (words := _outside(left, value if isinstance(value, list) else [value]))
    ):
        found.append(replace(_never(field.source, left, words, 0), at=(*at, "value")))
    elif not legacy and not _compatible(operator, left, right):
        told = f"`{field.source}` is {_WORDS[left.kind]}: `{operator}` cannot compare it with {_WORDS[right.kind]}"
        found.append(Complaint(told, 0, at=(*at, "value")))
    return found


def _compatible(operator: str, left: Type, right: Type) -> bool:
    if "any" in (left.kind, right.kind):
        return True
    if operator == "in":
        return right.kind in ("list", "object") or (right.kind == "string" and left.kind == "string")
    if operator == "contains":
        return left.kind in ("list", "object") or (left.kind == "string" and right.kind == "string")
    if operator == "matches":
        return left.kind == right.kind == "string"
    if operator in ("equals", "not_equals"):
        return right.kind == "null" or _alike(left, right)
    return _ordered(left, right)


def _alike(left: Type, right: Type) -> bool:
    return left.kind == right.kind or {left.kind, right.kind} <= _NUMBERS


def _ordered(left: Type, right: Type) -> bool:
    return _alike(left, right) and left.kind in _NUMBERS | {"string", "timestamp", "duration", "bool"}


def _of_value(value: Any) -> Type:
    match value:
        case None:
            return NULL
        case bool():
            return BOOL
        case int():
            return INT
        case float():
            return DOUBLE
        case str():
            return STRING
        case list() | tuple():
            return LIST
        case Mapping():
            return OBJECT
    return ANY


def _free_text(source: str, offset: int) -> Complaint:
    return Complaint(
        f"`{source}` is free text of a model: comparing it with a fixed value would almost never hold",
        offset,
        "Give the step an `output:` schema and compare one of its fields, or use `contains`.",
    )


def _outside(kind: Type, words: Iterable[Any]) -> list[str]:
    """Return the fixed values that a text with an `enum` can never equal."""
    return [] if kind.values is None else [str(word) for word in words if word not in kind.values and word is not None]


def _never(source: str, kind: Type, words: list[str], offset: int) -> Complaint:
    return Complaint(
        f"`{source}` is never `{words[0]}`: its schema allows {', '.join(kind.values or ())}",
        offset,
        did_you_mean(words[0], kind.values or ()),
    )


def _output(kind: Type) -> Type:
    """Return the type of a bare step name."""
    return kind.output or ANY if kind.kind == "step" else kind


class _Checker:
    """Walks a tree, infers types bottom-up and collects complaints."""

    def __init__(self, types: Mapping[str, Type]) -> None:
        self.types = types
        self.scope: dict[str, Type] = {}
        self.complaints: list[Complaint] = []

    def complain(self, message: str, offset: int, hint: str = "") -> Type:
        self.complaints.append(Complaint(message, offset, hint))
        return ANY

    def value(self, node: tree.Node) -> Type:
        return _output(self.raw(node))

    def raw(self, node: tree.Node) -> Type:
        return _INFER[type(node)](self, node)

    def literal(self, node: tree.Literal) -> Type:
        return _of_value(node.value)

    def ident(self, node: tree.Ident) -> Type:
        return self.scope.get(node.name) or self.types.get(node.name, ANY)

    def select(self, node: tree.Select) -> Type:
        return self.field(node.operand, self.raw(node.operand), node.field, node.at)

    def field(self, operand: tree.Node, kind: Type, field: str, offset: int) -> Type:
        if kind.kind == "step":
            return self.step_field(operand, kind, field, offset)
        if kind.kind == "object":
            if kind.fields is None:
                return ANY
            if field in kind.fields:
                return kind.fields[field]
            told = f"{tree.describe(operand)} has no field `{field}`"
            if operand == tree.Ident(operand.offset, "inputs"):
                told = f"there is no input `{field}`"
            return self.complain(told, offset, did_you_mean(field, kind.fields))
        if kind.kind == "any":
            return ANY
        return self.complain(f"{tree.describe(operand)} is {_WORDS[kind.kind]}: it has no field `{field}`", offset)

    def step_field(self, operand: tree.Node, kind: Type, field: str, offset: int) -> Type:
        output = kind.output or ANY
        if field == "output":
            return output
        if field == "status":
            return STRING
        if field == "error":
            return ANY
        if field in STEP_FIELDS and kind.command:
            return INT if field == "exit_code" else STRING
        if kind.fields and field in kind.fields:
            return kind.fields[field]
        if output.kind == "any" or (output.kind == "object" and output.fields is None):
            return ANY
        known = [*(kind.fields or ()), *(output.fields or ()), *(STEP_FIELDS if kind.command else STEP_FIELDS[:3])]
        if output.kind == "object" and output.fields is not None and field in output.fields:
            return output.fields[field]
        hint = did_you_mean(field, known)
        if kind.command:
            hint += " A command has passed where `exit_code == 0`."
        elif output.kind == "string":
            hint += " Its output is text: give it an `output:` schema to have fields."
        return self.complain(f"step {tree.describe(operand)} has no field `{field}`", offset, hint)

    def index(self, node: tree.Index) -> Type:
        kind = self.raw(node.operand)
        if isinstance(node.key, tree.Literal) and isinstance(node.key.value, str):
            return self.field(node.operand, kind, node.key.value, node.key.offset)
        key = self.value(node.key)
        kind = _output(kind)
        if kind.kind == "list":
            if key.kind not in ("int", "double", "any"):
                return self.complain(
                    f"{tree.describe(node.operand)} is a list: its index is an integer, not {_WORDS[key.kind]}",
                    node.key.offset,
                )
            return kind.item or ANY
        if kind.kind not in ("object", "any"):
            return self.complain(f"{tree.describe(node.operand)} is {_WORDS[kind.kind]}: it has no items", node.offset)
        return ANY

    def unary(self, node: tree.Unary) -> Type:
        kind = self.value(node.operand)
        if node.op == "!":
            self.truth(kind, node.operand)
            return BOOL
        if kind.kind not in _NUMBERS | {"any", "duration"}:
            return self.complain(
                f"`-` needs a number: {tree.describe(node.operand)} is {_WORDS[kind.kind]}", node.offset
            )
        return kind

    def truth(self, kind: Type, node: tree.Node) -> None:
        if kind.kind not in ("bool", "any"):
            self.complain(
                f"{tree.describe(node)} is {_WORDS[kind.kind]}, where true or false is needed",
                node.offset,
                "Compare it with something: `==`, `!=`, `>`.",
            )

    def binary(self, node: tree.Binary) -> Type:
        op = node.op
        left, right = self.value(node.left), self.value(node.right)
        if op in ("&&", "||"):
            self.truth(left, node.left)
            self.truth(right, node.right)
            return BOOL
        if op in ("==", "!="):
            self.equality(node, left, right)
            return BOOL
        if op == "in":
            self.membership(node, left, right)
            return BOOL
        if "any" in (left.kind, right.kind):
            return BOOL if op in ("<", "<=", ">", ">=") else _sum_with_any(op, left, right)
        if op in ("<", "<=", ">", ">="):
            if not _ordered(left, right):
                self.cannot(node, left, right)
            return BOOL
        return self.arithmetic(node, left, right)

    def equality(self, node: tree.Binary, left: Type, right: Type) -> None:
        for kind, side, other in ((left, node.left, node.right), (right, node.right, node.left)):
            if isinstance(other, tree.Literal) and (words := _outside(kind, [other.value])):
                self.complaints.append(_never(tree.describe(side).strip("`"), kind, words, other.offset))
                return
            if kind.free and isinstance(other, tree.Literal) and other.value is not None and other.value != "":
                self.complaints.append(_free_text(tree.describe(side).strip("`"), side.offset))
                return
        if "any" in (left.kind, right.kind) or "null" in (left.kind, right.kind) or _alike(left, right):
            return
        told = "is never" if node.op == "==" else "is always"
        self.complain(
            f"`{node.op}` {told} true here: {tree.describe(node.left)} is {_WORDS[left.kind]}, "
            f"{tree.describe(node.right)} is {_WORDS[right.kind]}",
            node.at,
        )

    def membership(self, node: tree.Binary, left: Type, right: Type) -> None:
        fixed = isinstance(node.right, tree.ListOf) and all(isinstance(i, tree.Literal) for i in node.right.items)
        if fixed and isinstance(node.right, tree.ListOf):
            words = _outside(left, [item.value for item in node.right.items if isinstance(item, tree.Literal)])
            if words:
                self.complaints.append(_never(tree.describe(node.left).strip("`"), left, words, node.right.offset))
                return
        if left.free and fixed:
            self.complaints.append(_free_text(tree.describe(node.left).strip("`"), node.left.offset))
        elif right.kind not in ("list", "object", "any"):
            hint = "Text contains text: `a.contains(b)`." if right.kind == "string" else ""
            self.complain(
                f"`in` needs a list or an object on its right: {tree.describe(node.right)} is {_WORDS[right.kind]}",
                node.at,
                hint,
            )

    def arithmetic(self, node: tree.Binary, left: Type, right: Type) -> Type:
        kinds = {left.kind, right.kind}
        if kinds <= _NUMBERS and not (node.op == "%" and "double" in kinds):
            return INT if kinds == {"int"} else DOUBLE
        if node.op == "+" and kinds == {"string"}:
            return FREE_TEXT if left.free or right.free else STRING
        if node.op == "+" and kinds == {"list"}:
            return left if left == right else LIST
        if node.op in ("+", "-") and kinds <= {"timestamp", "duration"}:
            return _moment(node.op, left, right) or self.cannot(node, left, right)
        return self.cannot(node, left, right)

    def cannot(self, node: tree.Binary, left: Type, right: Type) -> Type:
        return self.complain(
            f"`{node.op}` cannot join {_WORDS[left.kind]} and {_WORDS[right.kind]}: "
            f"{tree.describe(node.left)} {node.op} {tree.describe(node.right)}",
            node.at,
            "`string(x)`, `int(x)` and `double(x)` convert.",
        )

    def ternary(self, node: tree.Ternary) -> Type:
        self.truth(self.value(node.test), node.test)
        yes, no = self.value(node.yes), self.value(node.no)
        return yes if yes == no else ANY

    def list_of(self, node: tree.ListOf) -> Type:
        kinds = [self.value(item) for item in node.items]
        same = bool(kinds) and all(kind == kinds[0] for kind in kinds)
        return Type("list", item=kinds[0] if same else None)

    def map_of(self, node: tree.MapOf) -> Type:
        fields: dict[str, Type] | None = {}
        for key, value in node.entries:
            self.value(key)
            kind = self.value(value)
            if fields is not None and isinstance(key, tree.Literal) and isinstance(key.value, str):
                fields[key.value] = kind
            else:
                fields = None
        return Type("object", fields=fields)

    def call(self, node: tree.Call) -> Type:
        if node.name == "default":
            return self.default(node)
        kinds = [self.value(arg) for arg in node.args]
        takes = _TAKES.get(node.name)
        if takes is not None and kinds[0].kind not in takes | {"any"}:
            told = " or ".join(_WORDS[kind] for kind in sorted(takes))
            self.complain(
                f"`{node.name}` takes {told}: {tree.describe(node.args[0])} is {_WORDS[kinds[0].kind]}",
                node.args[0].offset,
            )
        if node.name == "dyn":
            return ANY
        if node.name.startswith("get"):
            return INT
        return _RESULTS[node.name]

    def default(self, node: tree.Call) -> Type:
        first, second = self.value(node.args[0]), self.value(node.args[1])
        return first if first == second else ANY

    def has(self, node: tree.Has) -> Type:
        self.raw(node.operand)
        return BOOL

    def comprehension(self, node: tree.Comprehension) -> Type:
        over = self.value(node.over)
        item = ANY
        if over.kind == "list":
            item = over.item or ANY
        elif over.kind == "object":
            item = STRING
        elif over.kind != "any":
            self.complain(
                f"`{node.macro}` needs a list or an object: {tree.describe(node.over)} is {_WORDS[over.kind]}",
                node.offset,
            )
        outer = self.scope
        self.scope = {**outer, node.name: item}
        if node.test is not None:
            self.truth(self.value(node.test), node.test)
        value = self.value(node.value) if node.value is not None else ANY
        self.scope = outer
        if node.macro == "filter":
            return over if over.kind == "list" else LIST
        return Type("list", item=value) if node.macro == "map" else BOOL


def _moment(op: str, left: Type, right: Type) -> Type | None:
    if op == "+":
        return DURATION if left == right == DURATION else TIMESTAMP if left != right else None
    if right == DURATION:
        return left
    return DURATION if left == TIMESTAMP else None


def _sum_with_any(op: str, left: Type, right: Type) -> Type:
    known = left if right.kind == "any" else right
    return DOUBLE if op != "+" and known.kind == "double" else ANY


_INFER: dict[type, Callable[[_Checker, Any], Type]] = {
    tree.Literal: _Checker.literal,
    tree.Ident: _Checker.ident,
    tree.Select: _Checker.select,
    tree.Index: _Checker.index,
    tree.Unary: _Checker.unary,
    tree.Binary: _Checker.binary,
    tree.Ternary: _Checker.ternary,
    tree.ListOf: _Checker.list_of,
    tree.MapOf: _Checker.map_of,
    tree.Call: _Checker.call,
    tree.Has: _Checker.has,
    tree.Comprehension: _Checker.comprehension,
}


def conform(value: Any, schema: Mapping[str, Any] | None) -> Any:
    """Return a JSON value with whole numbers converted to decimals where the schema says `number`.

    JSON does not distinguish 3 from 3.0, but the schema does, and `/` depends on it.
    """
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if schema.get("type") == "number" and abs(value) < 2**53 else value
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return [conform(item, schema["items"]) for item in value]
    if isinstance(value, dict) and isinstance(schema.get("properties"), Mapping):
        known = schema["properties"]
        return {name: conform(entry, known.get(name)) for name, entry in value.items()}
    return value
