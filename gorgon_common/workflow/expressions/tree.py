"""The syntax tree.  Every node stores the offset of its first character."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Node:
    """Any expression."""

    offset: int


@dataclass(frozen=True, slots=True)
class Literal(Node):
    """A constant: int, float, str, bool or None."""

    value: Any


@dataclass(frozen=True, slots=True)
class Ident(Node):
    """A name."""

    name: str


@dataclass(frozen=True, slots=True)
class Select(Node):
    """`operand.field`."""

    operand: Node
    field: str
    at: int
    """Offset of the field's name."""


@dataclass(frozen=True, slots=True)
class Index(Node):
    """`operand[key]`."""

    operand: Node
    key: Node


@dataclass(frozen=True, slots=True)
class Unary(Node):
    """`!x` or `-x`."""

    op: str
    operand: Node


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """`left op right`; `at` is the operator's offset."""

    op: str
    left: Node
    right: Node
    at: int


@dataclass(frozen=True, slots=True)
class Ternary(Node):
    """`test ? yes : no`."""

    test: Node
    yes: Node
    no: Node


@dataclass(frozen=True, slots=True)
class ListOf(Node):
    """`[a, b]`."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class MapOf(Node):
    """`{k: v}`."""

    entries: tuple[tuple[Node, Node], ...]


@dataclass(frozen=True, slots=True)
class Call(Node):
    """`name(args)`; a method call `x.name(args)` has x as its first argument."""

    name: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Has(Node):
    """`has(x.y)`."""

    operand: Select | Index


@dataclass(frozen=True, slots=True)
class Comprehension(Node):
    """`over.macro(name, test)`, and `over.map(name, value)` or `over.map(name, test, value)`."""

    macro: str
    over: Node
    name: str
    test: Node | None
    value: Node | None


def children(node: Node) -> tuple[Node, ...]:
    """Return the direct operands of a node."""
    match node:
        case Select(operand=operand) | Unary(operand=operand) | Has(operand=operand):
            return (operand,)
        case Index(operand=operand, key=key):
            return (operand, key)
        case Binary(left=left, right=right):
            return (left, right)
        case Ternary(test=test, yes=yes, no=no):
            return (test, yes, no)
        case ListOf(items=items):
            return items
        case MapOf(entries=entries):
            return tuple(part for entry in entries for part in entry)
        case Call(args=args):
            return args
        case Comprehension(over=over, test=test, value=value):
            return (over, *(part for part in (test, value) if part is not None))
    return ()


def chain(node: Node) -> tuple[Ident, tuple[str | int, ...]] | None:
    """Return (root, fields) if the node is a name followed only by constant fields and indexes."""
    fields: list[str | int] = []
    while True:
        match node:
            case Ident():
                return node, tuple(reversed(fields))
            case Select(operand=operand, field=field):
                fields.append(field)
                node = operand
            case Index(operand=operand, key=Literal(value=str() | int() as key)) if not isinstance(key, bool):
                fields.append(key)
                node = operand
            case _:
                return None


def spell(root: str, fields: tuple[str | int, ...]) -> str:
    """Return a path as written in a file: `plan.tasks[0].id`, `steps["run-tests"].output`."""
    text = root
    for field in fields:
        if isinstance(field, int):
            text += f"[{field}]"
        else:
            text += f".{field}" if field.isidentifier() else f'["{field}"]'
    return text


def describe(node: Node) -> str:
    """Return what messages call a node: its path, or its kind."""
    if found := chain(node):
        return f"`{spell(found[0].name, found[1])}`"
    match node:
        case Literal(value=value):
            return f"`{value!r}`"
        case Call(name=name):
            return f"`{name}(…)`"
        case Comprehension(macro=macro):
            return f"`….{macro}(…)`"
        case Select(field=field):
            return f"`….{field}`"
        case Binary(op=op):
            return f"`… {op} …`"
    return "the value"


def free_paths(node: Node) -> Iterator[tuple[Ident, tuple[str | int, ...]]]:
    """Yield every maximal (root, fields) chain whose root is not a comprehension's variable."""
    yield from _free(node, frozenset())


def _free(node: Node, bound: frozenset[str]) -> Iterator[tuple[Ident, tuple[str | int, ...]]]:
    if found := chain(node):
        if found[0].name not in bound:
            yield found
        return
    if isinstance(node, Comprehension):
        yield from _free(node.over, bound)
        inner = bound | {node.name}
        for part in (node.test, node.value):
            if part is not None:
                yield from _free(part, inner)
        return
    for child in children(node):
        yield from _free(child, bound)
