"""Estimated and maximum sizes of a plan's prompts; each prompt is rendered as the engine would render it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon_common.costs.forecast import REREAD
from gorgon_common.engine.rendering import DEFAULT_MAX_TOKENS
from gorgon_common.engine.workload.values import Names, Unsized, Values, nodes_of, safe_text
from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import MISSING, Env, Expression, parse_template, to_text
from gorgon_common.workflow.expressions.tree import Comprehension, children
from gorgon_common.workflow.plan import Kind, Node, Ref

_SHOWN_ITEMS = 50


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt: its text, and the nodes whose output determines its length (none: the text is known)."""

    text: str
    nodes: tuple[int, ...] = ()
    sized: bool = True
    bounded: bool = True


class Prompts:
    """The prompts of one plan."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.plan = values.plan
        self.inputs = values.inputs

    def scopes(self, index: int) -> Iterator[dict[int, tuple[Any, int]]]:
        """Yield map → (item, position) for the items of the maps around a node, as far as the items are known."""
        around = self._maps_around(index)
        exact = [
            number for number in around if (found := self.values.items(number)) is not None and found[1] and found[0]
        ]
        if not exact:
            yield {}
            return
        innermost = exact[0]
        found = self.values.items(innermost)
        assert found is not None
        numbered = list(enumerate(found[0]))
        if len(numbered) > _SHOWN_ITEMS:
            longest = sorted(numbered, key=lambda entry: -len(safe_text(entry[1])))[: _SHOWN_ITEMS // 2]
            step = len(numbered) // (_SHOWN_ITEMS // 2)
            numbered = [*longest, *numbered[::step]]
        for position, item in numbered:
            yield {innermost: (item, position)}

    def _maps_around(self, index: int) -> list[int]:
        found = []
        container = self.plan.nodes[index].container
        while container is not None:
            node = self.plan.nodes[container]
            if node.kind is Kind.MAP and index not in node.bodies.get("reduce", ()):
                found.append(container)
            index, container = container, node.container
        return found

    def pieces(self, node: Node, scope: Mapping[int, tuple[Any, int]]) -> Iterator[Piece]:
        """Yield the parts of a call's prompt."""
        spec = node.spec
        if spec.get("system"):
            yield from self._template(node, str(spec["system"]), scope)
        if spec.get("prompt") is not None:
            yield from self._template(node, str(spec["prompt"]), scope)
            return
        yield Piece(str(spec.get("standing") or "Do your part of the work."))
        for name in spec.get("context") or ():
            if name in node.refs:
                yield self._valued(node, name, scope)
        for name in spec.get("given") or ():
            yield Piece(f"## {name}\n\n{safe_text(self.inputs.get(name))}\n\n")

    def _valued(self, node: Node, name: str, scope: Mapping[int, tuple[Any, int]]) -> Piece:
        names = Names(self.values, node.refs, scope)
        try:
            value = names[name]
            text = to_text(value) if value is not MISSING else ""
        except (ExpressionError, KeyError):
            text = ""
        except Unsized:
            return Piece("", tuple(nodes_of({name: node.refs[name]})), sized=False)
        return Piece(f"## {name}\n\n{text}\n\n", self._varying({name: node.refs[name]}, scope))

    def _template(self, node: Node, text: str, scope: Mapping[int, tuple[Any, int]]) -> Iterator[Piece]:
        lenient = self.plan.lenient
        names = Names(self.values, node.refs, scope)
        for part in parse_template(text, lenient).parts:
            if not isinstance(part, Expression):
                yield Piece(part)
                continue
            used = {name: node.refs[name] for name in part.names if name in node.refs}
            varying = self._varying(used, scope)
            try:
                value = part.evaluate(Env(names, lenient=lenient))
                yield Piece("" if value is None and lenient else to_text(value), varying, bounded=not _copies(part))
            except ExpressionError:
                yield Piece("", varying, bounded=not _copies(part))
            except Unsized:
                yield Piece("", varying, sized=False, bounded=False)

    def _varying(self, refs: Mapping[str, Ref], scope: Mapping[int, tuple[Any, int]]) -> tuple[int, ...]:
        """Return the nodes whose output determines the length of a text with these names."""
        found: list[int] = []
        for ref in refs.values():
            if ref.kind == "item" and ref.node is not None and ref.node not in scope:
                listed = self.values.items(ref.node)
                if listed is None or not listed[1]:
                    # The size of one item depends on the steps that write the list, not on the number of items.
                    over = self.plan.nodes[ref.node]
                    found += [number for number in nodes_of(over.refs) if not self.values.skipped(number)] or [ref.node]
            elif ref.kind in ("step", "published", "steps", "results"):
                found += [number for number in nodes_of({"": ref}) if not self.values.settled(number)]
        return tuple(dict.fromkeys(found))

    def most(self, pieces: Sequence[Piece]) -> int:
        """Return the maximum number of tokens in the pieces, -1 if there is no bound; a token is at least one byte."""
        total = 0
        for piece in pieces:
            if not piece.nodes and piece.sized:
                total += len(piece.text.encode("utf-8", "replace"))
                continue
            if not piece.bounded:
                return -1
            for number in piece.nodes:
                most = self._most_returned(number, set())
                if most is None:
                    return -1
                total += most
        return total

    def _most_returned(self, number: int, seen: set[int]) -> int | None:
        """Return the maximum number of tokens in a node's output as text, None if there is no bound."""
        node = self.plan.nodes[number]
        if self.values.settled(number):
            return len(safe_text(self.values.value(number).output).encode("utf-8", "replace"))
        if number in seen:
            return 0
        seen = seen | {number}
        inner = [child for body in node.bodies.values() for child in body]
        if node.kind is Kind.AGENT:
            own: int | None = round(REREAD * int(node.spec.get("max_tokens") or DEFAULT_MAX_TOKENS)) + 1_000
        elif node.kind in (Kind.MAP, Kind.LOOP, Kind.GROUP):
            own = 1_000
        elif node.kind in (Kind.AGGREGATE, Kind.CHECKPOINT):
            inner = [*inner, *nodes_of(node.refs)]
            own = 2 * len(json.dumps(self.inputs, default=str).encode()) + 10_000
        else:
            own = None
        if own is None:
            return None
        times = 1
        if node.kind is Kind.MAP:
            listed = self.values.items(number)
            times = len(listed[0]) if listed is not None and listed[1] else int(node.spec["max_items"])
        for child in inner:
            most = self._most_returned(child, seen)
            if most is None:
                return None
            own += most * times
        return own


def _copies(expression: Expression) -> bool:
    """Tell whether an expression may repeat a value; its result then has no bound."""
    queue = [expression.tree]
    while queue:
        node = queue.pop()
        if isinstance(node, Comprehension):
            return True
        queue += children(node)
    return len(expression.paths) > len({path.root for path in expression.paths})
