"""Finds values that may not exist when they are read, using the graph, before any money is spent.

A step may be skipped (its condition, `on_failure: skip`, or a skipped dependency), and the first round of a loop has no
previous round.  Reading such a value fails the run unless `default()`, `has()`, a condition or the join rule guards it.
Complaints are limited to values that are read whenever the expression is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from gorgon_common.workflow.compiler.layout import Draft, Layout, Place
from gorgon_common.workflow.expressions import Expression, Path, Template, parse, tree
from gorgon_common.workflow.expressions.conditions import PRESENCE
from gorgon_common.workflow.plan import Join, Kind, Ref


class Read(NamedTuple):
    """One reference in an expression of the node `owner`."""

    owner: int
    path: Path
    ref: Ref
    place: Place
    condition: bool = False
    """The reference is in the node's own condition."""
    until: bool = False
    """The reference is in the node's `until:`, which is read after a round."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A read that may find no value."""

    read: Read
    message: str
    hint: str
    severity: str = "error"


def certain_paths(expression: Expression | Template) -> set[int]:
    """Return the offsets of the names that are read whenever the expression is evaluated, and that must exist."""
    parts = (expression,) if isinstance(expression, Expression) else expression.expressions
    return {offset for part in parts for offset in _certain(part.tree, frozenset())}


def certain_fields(
    condition: Any, at: tuple[str | int, ...] = (), *, legacy: bool = False
) -> Iterator[tuple[tuple[str | int, ...], set[int]]]:
    """Yield (keys inside a condition, offsets of the names there) for what it reads and needs in any case."""
    if isinstance(condition, str):
        yield at, certain_paths(parse(condition, legacy))
        return
    for key in ("all", "any"):
        if condition.get(key):
            yield from certain_fields(condition[key][0], (*at, key, 0), legacy=legacy)  # the rest may not be read
    if condition.get("not") is not None:
        yield from certain_fields(condition["not"], (*at, "not"), legacy=legacy)
    needed = condition.get("on_missing", "error") == "error" and condition.get("operator") not in PRESENCE
    if condition.get("field") is not None and needed:
        yield (*at, "field"), certain_paths(parse(str(condition["field"]), True))


def _certain(node: tree.Node, bound: frozenset[str]) -> Iterator[int]:
    if found := tree.chain(node):
        if found[0].name not in bound:
            yield found[0].offset
        return
    match node:
        case tree.Has() | tree.Call(name="default"):
            return
        case tree.Binary(op="&&" | "||"):
            return  # the other side may decide
        case tree.Ternary(test=test):
            yield from _certain(test, bound)
        case tree.Comprehension(over=over):
            yield from _certain(over, bound)
        case _:
            for child in tree.children(node):
                yield from _certain(child, bound)


class Gaps:
    """Finds the reads that may find no value.  The edges of the layout must be complete."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._skips: dict[int, str] = {}
        self._entered: set[int] = set()
        self._origin: dict[int, int] = {}
        """A step that inherits a skip → the step that is skipped in its own right."""

    def find(self, reads: list[Read]) -> Iterator[Gap]:
        """Yield the values that may be missing."""
        for read in reads:
            gap = self._first_round(read) if self._own_loop(read) else self._skipped(read)
            if gap is not None:
                yield gap

    # ── loops ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _own_loop(self, read: Read) -> Draft | None:
        """Return the loop whose previous round is read from inside the loop."""
        for draft in self.layout.ancestors(read.owner):
            if draft.kind is Kind.LOOP and read.ref.node == draft.bodies["body"][0]:
                return draft
        return None

    def _first_round(self, read: Read) -> Gap | None:
        loop = self._own_loop(read)
        assert loop is not None
        if read.until and read.owner == loop.index:
            return None
        path = self.layout.path(read.owner)
        if self._guarded(read, path[path.index(loop.index) + 1 :]):
            return None
        return Gap(
            read,
            f"`{read.path}` has no value in the first round of the loop `{loop.id}`",
            f"Write default({read.path}, …) with what the first round begins with.",
        )

    # ── skipped steps ────────────────────────────────────────────────────────────────────────────────────────────────

    def _skipped(self, read: Read) -> Gap | None:
        for target, fields in self._targets(read):
            if not fields or fields[0] not in ("status", "error"):
                gap = self._missing(read, target)
                if gap is not None:
                    return gap
        return None

    def _targets(self, read: Read) -> Iterator[tuple[int, tuple[str | int, ...]]]:
        """Yield the step that is read, with the fields after its name, and any inner step that is read through it."""
        fields = read.path.fields
        if read.ref.kind == "steps" and fields:
            target, fields = self.layout.ids.get(str(fields[0])), fields[1:]
        else:
            target = read.ref.node if read.ref.kind == "step" else None
        if target is None:
            return
        yield target, fields
        group = self.layout.innermost(target)
        many = self.layout.drafts[target].kind is Kind.MAP
        names = fields[1:] if fields[:1] == ("output",) else fields
        if group.kind is Kind.GROUP and not many and len(names) > 1:  # the output of a skipped inner step is null
            for inner in group.bodies.get("steps", ()):
                if self.layout.drafts[inner].id == names[0]:
                    yield inner, names[1:]

    def _missing(self, read: Read, target: int) -> Gap | None:
        mine, theirs = self.layout.path(read.owner), self.layout.path(target)
        depth = 0
        while depth < min(len(mine), len(theirs)) and mine[depth] == theirs[depth]:
            depth += 1
        below = [index for index in theirs[depth:] if self.layout.drafts[index].outer]
        if not below or self._guarded(read, mine[depth:]):
            return None
        inner = next((index for index in below[1:] if self.skip_reason(index)), None)
        if inner is not None:
            return self._gap(read, inner)
        before = below[0]
        if depth == len(mine):
            return self._gap(read, before) if self.skip_reason(before) else None
        after = self.layout.drafts[mine[depth]]
        if after.kind is not Kind.END and after.phase != self.layout.drafts[before].phase:
            return self._late(read, after, before)
        if after.kind is not Kind.END and not self._runs_without(after):
            return None
        return self._gap(read, before) if self.skip_reason(before) else None

    @staticmethod
    def _runs_without(after: Draft) -> bool:
        """Whether a node may run although one of its dependencies was skipped."""
        assert after.step is not None
        if Join(after.step.join) is Join.ANY_SUCCESS:
            return sum(not order for order in after.deps.values()) > 1
        return Join(after.step.join) is not Join.ALL_SUCCESS

    def _guarded(self, read: Read, nodes: list[int]) -> bool:
        """Whether a condition guards the read: the node's own, or that of a container."""
        around = [index for index in nodes if not (read.condition and index == read.owner)]
        return any(_conditional(self.layout.drafts[index]) for index in around)

    def _gap(self, read: Read, index: int) -> Gap:
        return Gap(
            read,
            f"`{read.path}` may have no value: step `{self.layout.drafts[index].id}` {self.skip_reason(index)}",
            f"Write default({read.path}, …) with what holds then.",
        )

    def _late(self, read: Read, after: Draft, before: int) -> Gap:
        return Gap(
            read,
            f"`{read.path}` may have no value: `{after.phase}:` also runs where step "
            f"`{self.layout.drafts[before].id}` did not come to its end",
            f"Write default({read.path}, …) with what holds then.",
            "warning",
        )

    def skip_reason(self, index: int) -> str:
        """Return why a step may be skipped while the run continues, as the end of a sentence; "" if it cannot be."""
        waiting = [index]
        while waiting:  # a chain of steps may be longer than Python's stack
            current = waiting[-1]
            if current in self._skips:
                waiting.pop()
                continue
            unknown = [before for before in self._passing(current) if before not in self._skips]
            if unknown and current not in self._entered:
                self._entered.add(current)
                waiting += unknown
                continue
            self._skips[current] = self._reason(self.layout.drafts[current])  # cycles are reported elsewhere
            waiting.pop()
        return self._skips[index]

    def _passing(self, index: int) -> list[int]:
        """Return the steps whose skip a step could inherit."""
        return [before for before, order in self.layout.drafts[index].deps.items() if not order]

    def _reason(self, draft: Draft) -> str:
        step = draft.step
        if step is None or not draft.outer:
            return ""
        if _conditional(draft):
            return "is skipped where its condition is false"
        if step.on_failure == "skip":
            return "is skipped where it fails"
        if draft.phase == "on_error" and draft.container is None:
            return "runs only where a step has failed"
        before = self._passing(draft.index)
        skipped = [index for index in before if self._skips.get(index)]
        join = Join(step.join)
        if skipped and (join is Join.ALL_SUCCESS or (join is Join.ANY_SUCCESS and len(skipped) == len(before))):
            self._origin[draft.index] = origin = self._origin.get(skipped[0], skipped[0])
            return f"is skipped where `{self.layout.drafts[origin].id}` is"
        return ""


def _conditional(draft: Draft) -> bool:
    step = draft.step
    return draft.outer and step is not None and (step.when is not None or step.condition is not None)
