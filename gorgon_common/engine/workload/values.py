"""Values of names before a run: the actual inputs, and step outputs as suggested by history or by their schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gorgon_common.costs.forecast import ASSUMED, HISTORY, Estimate, Repeat, learned
from gorgon_common.costs.history import History, StepHistory
from gorgon_common.engine.context import published
from gorgon_common.engine.kinds.aggregate import aggregate
from gorgon_common.engine.workload.examples import SENTENCE, reply_example
from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import (
    MISSING,
    Env,
    StepValue,
    condition_expressions,
    evaluate_condition,
    parse_template,
    render_value,
    to_text,
)
from gorgon_common.workflow.plan import COMPOSITE, Join, Kind, Node, Plan, Ref

ITEMS = 4
"""Assumed number of items in a list of unknown length."""
ITEMS_SPREAD = 0.4
_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})


class Unsized(Exception):
    """The size of a value is unknown."""


class Values:
    """The values of one plan's names.  `said`: the assumptions made, one sentence each."""

    def __init__(self, plan: Plan, inputs: Mapping[str, Any], history: History, target: str) -> None:
        self.plan = plan
        self.inputs = inputs
        self.history = history
        self.target = target
        self.said: list[str] = []
        self._values: dict[int, StepValue] = {}
        self._skips: dict[int, bool] = {}
        self._lists: dict[int, tuple[list[Any], bool] | None] = {}
        self._open: set[int] = set()

    def past(self, node: Node) -> StepHistory | None:
        """Return the history of a step."""
        return self.history.steps.get(node.id)

    def skipped(self, index: int) -> bool:
        """Tell whether a node is certain not to run."""
        if index in self._skips:
            return self._skips[index]
        self._skips[index] = False  # the body of a loop may refer to the loop
        self._skips[index] = self._is_skipped(self.plan.nodes[index])
        return self._skips[index]

    def _is_skipped(self, node: Node) -> bool:
        if node.kind in _ENGINE:
            return False
        if node.container is not None and self.skipped(node.container):
            return True
        needs = [self.skipped(dep.node) for dep in node.deps if not dep.order]
        if (node.join is Join.ALL_SUCCESS and any(needs)) or (node.join is Join.ANY_SUCCESS and needs and all(needs)):
            return True
        if node.condition is None or not self._decided(node):
            return False
        try:
            held, _ = evaluate_condition(
                node.condition, Env(Names(self, node.refs, {}), lenient=self.plan.lenient), lenient=self.plan.lenient
            )
        except (ExpressionError, Unsized):
            return False
        return not held

    def _decided(self, node: Node) -> bool:
        """Tell whether a condition depends only on known values."""
        lenient = self.plan.lenient
        names = {name for _, part in condition_expressions(node.condition, lenient) for name in part.names}
        return all(self.known(node.refs[name]) for name in names if name in node.refs)

    def known(self, ref: Ref) -> bool:
        """Tell whether the value of a name is known before the run."""
        if ref.kind == "input":
            return True
        return ref.kind in ("step", "published", "steps") and all(
            self.settled(number) for number in nodes_of({"": ref})
        )

    def settled(self, number: int) -> bool:
        """Tell whether a node's output is known before the run."""
        if self.skipped(number):
            return True
        node = self.plan.nodes[number]
        if node.kind in (Kind.AGGREGATE, Kind.CHECKPOINT) and number not in self._open:
            self._open.add(number)
            try:
                return node.condition is None and all(self.known(ref) for ref in node.refs.values())
            finally:
                self._open.discard(number)
        return False

    def items(self, index: int) -> tuple[list[Any], bool] | None:
        """Return (the items of a map, whether they are certain); None if nothing is known about them."""
        if index not in self._lists:
            self._lists[index] = None
            self._lists[index] = self._listed(self.plan.nodes[index])
        return self._lists[index]

    def _listed(self, node: Node) -> tuple[list[Any], bool] | None:
        try:
            names = Names(self, node.refs, {})
            over = render_value(node.spec["over"], Env(names, lenient=self.plan.lenient), legacy=self.plan.lenient)
        except (ExpressionError, Unsized):
            return None
        if isinstance(over, Mapping):
            over = [{"key": key, "value": value} for key, value in over.items()]
        if not isinstance(over, (list, tuple)):
            return None
        used = {name for name in self._over_names(node.spec["over"]) if name in node.refs}
        return list(over), all(self.known(node.refs[name]) for name in used)

    def _over_names(self, over: Any) -> set[str]:
        if isinstance(over, str):
            return set(parse_template(over, self.plan.lenient).names)
        if isinstance(over, Mapping):
            return {name for value in over.values() for name in self._over_names(value)}
        if isinstance(over, (list, tuple)):
            return {name for value in over for name in self._over_names(value)}
        return set()

    def value(self, number: int) -> StepValue:
        """Return the expected value of a step's name.  Raises Unsized if its size is unknown."""
        if number not in self._values:
            if number in self._open:
                return StepValue(status="pending", name=self.plan.nodes[number].id)
            self._open.add(number)
            try:
                self._values[number] = self._value(number)
            finally:
                self._open.discard(number)
        return self._values[number]

    def _value(self, number: int) -> StepValue:
        node = self.plan.nodes[number]
        if self.skipped(number):
            return StepValue(status="skipped", name=node.id)
        output = self._output(number, node)
        stdout = output if node.kind is Kind.COMMAND else None
        return StepValue(
            output=output,
            exit_code=0 if node.kind is Kind.COMMAND else None,
            stdout=stdout,
            stderr="" if node.kind is Kind.COMMAND else None,
            published=published(node, output),
            name=node.id,
        )

    def _output(self, number: int, node: Node) -> Any:
        known = self.past(node)
        if node.kind in COMPOSITE:
            return self._composite(number, node)
        if node.kind is Kind.AGGREGATE:
            return aggregate(node, Env(Names(self, node.refs, {}), lenient=self.plan.lenient))
        if node.kind is Kind.CHECKPOINT:
            return render_value(
                node.spec.get("message") or "",
                Env(Names(self, node.refs, {}), lenient=self.plan.lenient),
                text=True,
                legacy=self.plan.lenient,
            )
        if known is not None and known.sample is not None:
            return known.sample
        if node.kind is Kind.AGENT:
            return reply_example(node, self.target)
        raise Unsized

    def _composite(self, number: int, node: Node) -> Any:
        if node.kind is Kind.GROUP:
            return {self.plan.nodes[child].id: self.value(child).output for child in node.bodies["steps"]}
        if node.kind is Kind.LOOP:
            return self.value(node.bodies["body"][0]).output
        if "reduce" in node.bodies:
            return self.value(node.bodies["reduce"][0]).output
        return self.results(number)

    def results(self, number: int) -> list[Any]:
        """Return the results of a map: its body's output, repeated for the expected number of items."""
        node = self.plan.nodes[number]
        repeat = self.times(number, node)
        return [self.value(node.bodies["item"][0]).output] * max(0, round(repeat.times.median))

    def times(self, index: int, node: Node) -> Repeat:
        """Return how many items a map has."""
        known = self.past(node)
        most = int(node.spec["max_items"])
        parallel = node.spec.get("max_parallel") or self.plan.limits.get("max_parallel")
        found = self.items(index)
        if found is not None and found[1]:
            count = min(most, len(found[0]))
            return Repeat(Estimate(float(count), 0.0, HISTORY), count, parallel, exact=True)
        estimate = learned(float(count) for count in known.counts) if known is not None else None
        if estimate is None:
            count = min(most, len(found[0]) if found is not None and found[0] else ITEMS)
            if not self.skipped(index):
                self.said.append(f"`{node.name}` is assumed to have about {count} items (at most {most}).")
            estimate = Estimate(float(count), ITEMS_SPREAD, ASSUMED)
        return Repeat(estimate, most, parallel)


class Names(Mapping[str, Any]):
    """The names in one node's expressions."""

    def __init__(self, values: Values, refs: Mapping[str, Ref], scope: Mapping[int, tuple[Any, int]]) -> None:
        self._values = values
        self._refs = refs
        self._scope = scope

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, name: str) -> Any:
        ref = self._refs[name]
        resolve: Callable[[Ref], Any] = getattr(self, f"_{ref.kind}", self._other)
        return resolve(ref)

    def _input(self, ref: Ref) -> Any:
        inputs = self._values.inputs
        return inputs if ref.field is None else inputs.get(ref.field, MISSING)

    def _step(self, ref: Ref) -> Any:
        assert ref.node is not None
        return self._values.value(ref.node)

    def _published(self, ref: Ref) -> Any:
        for number in nodes_of({"": ref}):
            found = self._values.value(number).published.get(ref.field or "", MISSING)
            if found is not MISSING:
                return found
        return MISSING

    def _steps(self, ref: Ref) -> Any:
        return {self._values.plan.nodes[number].id: self._values.value(number) for number in ref.nodes}

    def _item(self, ref: Ref) -> Any:
        assert ref.node is not None
        if ref.node in self._scope:
            return self._scope[ref.node][0]
        found = self._values.items(ref.node)
        if found is None or not found[0]:
            raise Unsized
        return found[0][0]

    def _index(self, ref: Ref) -> Any:
        return self._scope[ref.node][1] if ref.node is not None and ref.node in self._scope else 0

    def _results(self, ref: Ref) -> Any:
        assert ref.node is not None
        return self._values.results(ref.node)

    def _run(self, ref: Ref) -> Any:
        plan = self._values.plan
        return {
            "id": f"run_{'0' * 26}",
            "workflow": plan.name,
            "team": plan.team,
            "started_at": "2026-01-01T00:00:00.000000Z",
        }

    def _error(self, ref: Ref) -> Any:
        return {"step": "step", "kind": "error", "message": SENTENCE, "hint": None, "summary": SENTENCE}

    def _other(self, ref: Ref) -> Any:
        if ref.kind == "secret":
            return dict.fromkeys(self._values.plan.secrets, "x" * 32)
        return MISSING


def nodes_of(refs: Mapping[str, Ref]) -> list[int]:
    """Return the nodes that references name, in order."""
    return list(
        dict.fromkeys(
            number for ref in refs.values() for number in (*(() if ref.node is None else (ref.node,)), *ref.nodes)
        )
    )


def safe_text(value: Any) -> str:
    """Return a value as text; an empty string if it has none."""
    if value is MISSING or value is None:
        return ""
    try:
        return to_text(value)
    except ExpressionError:
        return ""
