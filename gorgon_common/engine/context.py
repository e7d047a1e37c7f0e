"""What a worker has loaded of its runs, and how the names in a step's expressions resolve."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

from gorgon_common.engine.expression_scope import ExpressionScope
from gorgon_common.engine.records import Checkpoint, Claimed, Event, Expansion, Row, RunInfo, Weight, step_id
from gorgon_common.engine.rows import queue, weight
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import Unavailable
from gorgon_common.masking import SECRETS
from gorgon_common.telemetry import RunRef
from gorgon_common.workflow.expressions import MISSING, Env, StepValue
from gorgon_common.workflow.plan import FORMAT, Dep, Join, Kind, Node, Plan, Ref

RUNS_CACHED = 64
CHECKPOINTS_CACHED = 2048
_ITERATION = re.compile(r"#(\d+)")

Key = TypeVar("Key")
Value = TypeVar("Value")


class Reader(Protocol):
    """What the engine reads from the store."""

    def info(self, run: int) -> RunInfo:
        """Return a run."""
        ...

    def begin(self, run: int) -> None:
        """Mark a run as running unless it already is."""
        ...

    def plan_body(self, plan_hash: str) -> str:
        """Return a plan's JSON."""
        ...

    def checkpoints(self, ids: Sequence[int]) -> dict[int, Checkpoint]:
        """Return the checkpoints of the given steps that are finished."""
        ...

    def expansions(self, step: int) -> list[Expansion]:
        """Return the expansions of a composite, oldest round first."""
        ...

    def place(self, step: int) -> tuple[int, int | None, int | None]:
        """Return a row's (node, parent row, position)."""
        ...

    def failure(self, run: int) -> tuple[dict[str, Any] | None, bool]:
        """Return the error that failed the run, and whether it was cancelled."""
        ...

    def take_event(self, run: int, name: str, step: int) -> Event | None:
        """Return the event that a step has taken, or takes now."""
        ...

    def adoptable(self, root: int, fingerprint: str) -> Checkpoint | None:
        """Return the step that has already done the same work."""
        ...


class Cache(Generic[Key, Value]):
    """A small thread-safe LRU cache for values that never change."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """Return the value, or None."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Key, value: Value) -> None:
        """Store a value, evicting the least recently used one if necessary."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)


class RunCache:
    """The runs, plans and finished steps that this process has loaded; thread-safe."""

    def __init__(self, reader: Reader, *, plan_format: int = FORMAT) -> None:
        self.reader = reader
        self._plan_format = plan_format
        self._runs: Cache[int, Run] = Cache(RUNS_CACHED)
        self._plans: Cache[str, Plan] = Cache(RUNS_CACHED)
        self._begun: Cache[int, bool] = Cache(RUNS_CACHED)
        self._checkpoints: Cache[int, Checkpoint] = Cache(CHECKPOINTS_CACHED)

    def run(self, number: int) -> Run:
        """Return a run with its plan.  Raises NotFound, and PlanTooNew if this version cannot read the plan."""
        known = self._runs.get(number)
        if known is None:
            info = self.reader.info(number)
            known = Run(self, info, self.plan(info.plan_hash))
            self._runs.put(number, known)
        return known

    def begin(self, number: int) -> None:
        """Mark a run as running, because this process works on it."""
        if self._begun.get(number) is None:
            try:
                self.reader.begin(number)
            except Unavailable:
                return  # the next step tries again
            self._begun.put(number, True)

    def plan(self, plan_hash: str) -> Plan:
        """Return a stored plan."""
        known = self._plans.get(plan_hash)
        if known is None:
            known = Plan.from_json(self.reader.plan_body(plan_hash), self._plan_format)
            self._plans.put(plan_hash, known)
        return known

    def learn(self, plan: Plan, plan_hash: str) -> None:
        """Cache a plan that this process has compiled itself."""
        self._plans.put(plan_hash, plan)

    def checkpoints(self, ids: Sequence[int]) -> dict[int, Checkpoint]:
        """Return the checkpoints of the given steps that are finished."""
        found: dict[int, Checkpoint] = {}
        unknown = []
        for key in ids:
            known = self._checkpoints.get(key)
            if known is None:
                unknown.append(key)
            else:
                found[key] = known
        if unknown:
            for key, checkpoint in self.reader.checkpoints(unknown).items():
                self._checkpoints.put(key, checkpoint)
                found[key] = checkpoint
        return found


class Run:
    """A run and its plan."""

    def __init__(self, knowledge: RunCache, info: RunInfo, plan: Plan) -> None:
        self.knowledge = knowledge
        self.info = info
        self.plan = plan
        self.ref = RunRef(info.public_id, info.workflow, info.team, info.target, info.trace_id)
        for name in plan.secrets:  # a step may print a secret that another step received
            SECRETS.add(name, os.environ.get(name), declared=True)
        nodes = plan.nodes[: plan.top]
        self.gate = next(index for index, node in enumerate(nodes) if node.kind is Kind.GATE)
        self.keeps = frozenset(
            index
            for index, node in enumerate(nodes)
            if node.phase != "main" or node.kind in (Kind.GATE, Kind.FINALLY, Kind.END)
        )
        self.successors = plan.successors()
        self._places: dict[int, tuple[int, int | None, int | None]] = {}

    def node(self, step: Claimed) -> Node:
        """Return a step's node."""
        return self.plan.nodes[step.node]

    def shape(self, number: int) -> tuple[int, int]:
        """Return a node's (weight, queue), for rows whose conditions have been decided."""
        node = self.plan.nodes[number]
        return int(Weight.INLINE if node.queue is None else weight(node) or Weight.SLOW), queue(node)

    def place(self, row: int) -> tuple[int, int | None, int | None]:
        """Return a row's (node, parent row, position)."""
        if row < self.plan.top:
            return row, None, None
        found = self._places.get(row)
        if found is None:
            found = self._places[row] = self.knowledge.reader.place(step_id(self.info.id, row))
        return found

    def learn_places(self, base: int, made: Sequence[Row]) -> None:
        """Cache the places of rows that this process has created; the rows in `made` count from `base`."""
        for row in made:
            self._places[base + row.row] = row.node, row.parent, row.position

    def ancestry(self, step: Claimed) -> list[tuple[int, int, int | None]]:
        """Return (row, node, position) of a step and of the composites around it, innermost first."""
        chain = [(step.row, step.node, step.position)]
        parent = step.parent
        while parent is not None:
            node, above, position = self.place(parent)
            chain.append((parent, node, position))
            parent = above
        return chain

    def path(self, step: Claimed) -> str:
        """Return a step's path within the run, such as `build[3]/review#2`."""
        parts = []
        chain = self.ancestry(step)
        for place, (_, number, position) in enumerate(chain):
            node = self.plan.nodes[number]
            parent = self.plan.nodes[chain[place + 1][1]] if place + 1 < len(chain) else None
            name = node.name
            if parent is not None and parent.kind is Kind.MAP and number in parent.bodies.get("item", ()):
                parts.append(f"[{position}]")
            elif parent is not None and parent.kind is Kind.LOOP and number in parent.bodies.get("body", ()):
                parts.append(f"#{(position or 0) + 1}")
            else:
                parts.append(f"/{name}")
        return "".join(reversed(parts)).removeprefix("/")

    def shown_path(self, step: Claimed) -> str:
        """Return a step's path for display: `build[3]`, `polish (iteration 2)/review`."""
        return readable_path(self.path(step))

    def expansions(self, row: int) -> list[Expansion]:
        """Return the expansions of a composite row."""
        return self.knowledge.reader.expansions(step_id(self.info.id, row))

    def siblings(self, step: Claimed) -> dict[int, int]:
        """Return node → row for the nodes of a step's body (the whole top level for a top-level step)."""
        container = self.node(step).container
        if container is None or step.parent is None:
            return {index: index for index in range(self.plan.top)}
        for body in self.plan.nodes[container].bodies.values():
            if step.node in body:
                base = step.row - body.index(step.node)
                return {number: base + place for place, number in enumerate(body)}
        return {step.node: step.row}

    def descendants(self, step: Claimed, *, failed: bool) -> dict[int, str]:
        """Map the rows that can no longer run because `step` was skipped (or failed) to the reason.

        Includes only rows that wait for nothing else, because their successors rely on all dependencies having ended.
        Other rows are skipped when they become ready.
        """
        rows = self.siblings(step)
        stops = {Join.ALL_SUCCESS, Join.NONE_FAILED} if failed else {Join.ALL_SUCCESS}
        word = "failed" if failed else "was skipped"
        found: dict[int, str] = {}
        ended = {step.node}
        queue = [(step.node, word, stops)]
        while queue:
            cause, verb, joins = queue.pop()
            for number in self.successors[cause]:
                node = self.plan.nodes[number]
                if number not in rows or rows[number] in found or node.join not in joins:
                    continue
                if Dep(cause) not in node.deps or node.kind in (Kind.GATE, Kind.FINALLY, Kind.END):
                    continue
                if any(dep.node not in ended for dep in node.deps):
                    continue
                ended.add(number)
                found[rows[number]] = f"`{self.plan.nodes[cause].name}` {verb}"
                queue.append((number, "was skipped", {Join.ALL_SUCCESS}))
        return found

    def locate(self, step: Claimed, number: int) -> int | None:
        """Return the row of node `number` as seen from `step`; None if it does not exist (yet)."""
        rows = self.siblings(step)
        if number in rows:
            return rows[number]
        for row, node, _ in self.ancestry(step):
            if node == number:
                return row
        container = self.plan.nodes[number].container
        if container is None:
            return number
        above = self.locate(step, container)
        if above is None:
            return None
        for expansion in reversed(self.expansions(above)):
            for role, body in self.plan.nodes[container].bodies.items():
                if number in body and role == expansion.phase:
                    return expansion.base + body.index(number)
        return None

    def resolve(self, step: Claimed, number: int) -> int | None:
        """Return the row that a name refers to in `step`.  Inside a loop, the loop's own name is the previous round."""
        chain = self.ancestry(step)
        for (_, node, position), (loop, above, _) in pairwise(chain):
            if node == number and self.plan.nodes[above].kind is Kind.LOOP:
                return self.expansions(loop)[position - 1].base if position else None
        return self.locate(step, number)

    def env(self, step: Claimed, refs: Mapping[str, Ref], extra: Mapping[str, Any] | None = None) -> Env:
        """Return the scope of a step's expressions."""
        return Env(ExpressionScope(self, step, refs, extra or {}), lenient=self.plan.lenient)

    def value(self, number: int, checkpoint: Checkpoint | None) -> StepValue:
        """Return the value of a step's name."""
        node = self.plan.nodes[number]
        if checkpoint is None:
            return StepValue(status="pending", name=node.id)
        output = checkpoint.output
        if checkpoint.status is not StepStatus.SUCCEEDED and output is None:
            output = MISSING
        detail = checkpoint.detail
        return StepValue(
            output=output,
            status=checkpoint.status.name.lower(),
            error=checkpoint.error,
            exit_code=detail.get("exit_code"),
            stdout=detail.get("stdout", output if node.kind is Kind.COMMAND and output is not MISSING else None),
            stderr=detail.get("stderr"),
            published=published(node, output),
            name=node.id,
            reason=checkpoint.reason or "",
        )

    def fingerprint(self, step: Claimed, request: str) -> str:
        """Return `root:hash` of a step's place in the run and of everything that its call depends on."""
        digest = hashlib.sha256(f"{self.path(step)}\n{request}".encode("utf-8", "replace")).hexdigest()
        return f"{self.info.root}:{digest}"


def readable_path(path: str) -> str:
    """Return a step's path for display: `polish#2/review` becomes `polish (iteration 2)/review`."""
    return _ITERATION.sub(r" (iteration \1)", path)


def published(node: Node, output: Any) -> dict[str, Any]:
    """Return what `outputs:` publishes in the older format: fields by name.  If its field is missing, the first name
    gets the whole output.
    """
    if not node.publishes or output is MISSING:
        return {}
    fields = output if isinstance(output, Mapping) else {}
    names = {name: fields[name] for name in node.publishes if name in fields}
    names.setdefault(node.publishes[0], output)
    return names
