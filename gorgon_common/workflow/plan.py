"""The Plan: what a workflow file means, frozen.

A Plan is pure data: it is made once by the compiler, stored with the run by the hash of its canonical JSON, and read by
the engine and by the canvas adapter.  Editing the YAML file cannot change a run under way.

Shape.  `nodes` is flat.  The first `top` nodes are the steps of the file's top level, each of which becomes one row of
the run when it is created (row index = node index), followed by the engine's own three nodes (see below).  The nodes
after them are *templates*: the bodies of composite nodes (map, loop, group, a fallback step), which become rows when
the composite expands, once per item or iteration.  A template node names its composite in `container` and refers to its
siblings (nodes of the same body) by node index in `deps`; deps never cross bodies: a step inside a group that refers to
a step outside makes the *group* depend on it.

The engine's own nodes.  Top-level steps → `$gate` (a join over all steps: decides whether the run failed) → the
`on_error` steps → `$finally` (a join) → the `finally` steps → `$end` (a join: computes the outputs, ends the run).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cache
from typing import Any


class Kind(StrEnum):
    """What a node does."""

    AGENT = "agent"  # one model call (with its repair rounds)
    ACTION = "action"  # an operation of an integration (`uses:`)
    COMMAND = "command"  # a process (`run:`)
    WORKFLOW = "workflow"  # a sub-workflow
    APPROVAL = "approval"  # waits for a person
    WAIT = "wait"  # waits for a time or an event
    AGGREGATE = "aggregate"  # joins results without a model
    CHECKPOINT = "checkpoint"  # a named savepoint and message in the run's log
    GROUP = "group"  # composite: inner steps with their own order (`steps:`)
    MAP = "map"  # composite: one body per item, then an optional reduce
    LOOP = "loop"  # composite: the body again until a condition holds
    NOOP = "noop"  # queued, does nothing, or for spec.milliseconds: for benchmarks and tests; has no YAML form
    GATE = "gate"  # the engine's own joins
    FINALLY = "finally"
    END = "end"


COMPOSITE = frozenset({Kind.GROUP, Kind.MAP, Kind.LOOP})
"""Kinds that expand into rows of their own."""

INLINE = COMPOSITE | {Kind.AGGREGATE, Kind.CHECKPOINT, Kind.WAIT, Kind.GATE, Kind.FINALLY, Kind.END}
"""Kinds that need no provider: executed where they become ready, without a message."""


class Join(StrEnum):
    """When a node may start, given how its dependencies ended."""

    ALL_SUCCESS = "all_success"
    NONE_FAILED = "none_failed"
    ANY_SUCCESS = "any_success"
    ALL_DONE = "all_done"


@dataclass(frozen=True, slots=True)
class Dep:
    """An edge.  `order` edges only wait: they take no part in the join rule and pass no skip on (older files)."""

    node: int
    order: bool = False


@dataclass(frozen=True, slots=True)
class Ref:
    """What a name in one of a node's expressions stands for.

    ========== ==================================================================
    kind       meaning
    ========== ==================================================================
    input      the mapping of the run's inputs (`inputs`), or with `field` one input under its bare name (older files)
    step       the step value of node `node` (its output, status, error, fields); a loop's own id, in `until` and inside
               its body, is the loop's body node: its last iteration that has ended
    published  older files: the name `field` as published by `outputs:` of node `node`; `nodes` are other steps that
               publish it, nearest first, for where that one was skipped
    item       the current item of the map `node` (its `as:` name); also legacy `${item}`
    index      the current item's position in the map `node`, or iteration of the loop `node`, from 0
    results    the list of results of the map `node` (inside its reduce); also legacy `${items}`, `${map_results}`
    steps      the mapping of step id → step value over the nodes in `nodes` (`steps["x"]`)
    run        the run: id, workflow, team, started_at
    error      the failed step: step, message, kind, summary (in on_error, finally and fallback steps)
    secret     the mapping of secrets (`secrets`)
    ========== ==================================================================
    """

    kind: str
    node: int | None = None
    field: str | None = None
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """Re-attempts after the first.  Times in seconds."""

    max: int = 0
    backoff: str = "exponential"  # exponential | fixed
    initial: float = 2.0
    cap: float = 60.0
    jitter: str = "full"  # full | none
    on: tuple[str, ...] = ("timeout", "server", "connection", "invalid_output", "exit_code")


@dataclass(frozen=True, slots=True)
class OnFailure:
    """What happens when the retries are spent.

    action: `abort` | `skip` | `default` (the value in `value` becomes the output) | `step` (the body `fallback` runs
    and gives the output) | `model` (one more attempt on `model`, written provider:model).
    """

    action: str = "abort"
    value: Any = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One step, or one template of a step.  Times in seconds."""

    id: str
    """Unique in the plan.  Bodies: `build[]` (a map's item), `build#` (a loop's body),
    `build.reduce`, `build.fallback`; inner steps of a group keep their own id."""
    kind: Kind
    queue: str | None = None
    """The queue that its message goes to; None for INLINE kinds."""
    deps: tuple[Dep, ...] = ()
    join: Join = Join.ALL_SUCCESS
    condition: Any = None
    """Canonical condition: a CEL string, or the form {field, operator, value, on_missing} / {all|any|not}."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """The action's canonical fields; see `compiler`."""
    refs: Mapping[str, Ref] = field(default_factory=dict)
    """Every root name used by the node's expressions (condition, spec, until, over) → what it stands for."""
    retry: Retry = Retry()
    on_failure: OnFailure = OnFailure()
    timeout: float | None = None
    deadline: float | None = None
    container: int | None = None
    """The composite (or the step with a fallback body) whose template this is."""
    bodies: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Composite: template nodes by role: map {item, reduce?}, loop {body}, group {steps}, any {fallback?}.
    item, reduce, body and fallback hold exactly one node (itself a group where several steps are meant)."""
    publishes: tuple[str, ...] = ()
    """Older files: names that `outputs:` publishes; the first is the whole output unless the reply has such a field."""
    phase: str = "main"  # main | on_error | finally (top level only)

    @property
    def name(self) -> str:
        """What people call the step: the id without the mark of a template (`build`, where the id is `build[]`)."""
        return self.id.removesuffix("[]").removesuffix("#")


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole workflow, ready to run."""

    name: str
    nodes: tuple[Node, ...]
    top: int
    """Rows of a new run: nodes[:top], the engine's own three included."""
    version: str = ""
    team: str = "default"
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Input name → JSON Schema, with `default` where there is one and `required: bool` beside it."""
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Output name → template."""
    output_refs: Mapping[str, Ref] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)  # budget_usd, tokens, timeout (s), max_parallel
    concurrency: Mapping[str, Any] | None = None
    secrets: tuple[str, ...] = ()
    lenient: bool = False
    """Older files: a missing value or a reference to a skipped step renders as nothing."""
    unavailable: tuple[str, ...] = ()
    """Why `run` must refuse this plan for now: one sentence for each step that cannot be executed yet."""

    def successors(self) -> list[list[int]]:
        """Return for each node the nodes that depend on it, ascending."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for number in {dep.node for dep in node.deps}:  # an edge that also orders is one edge
                found[number].append(index)
        return found

    def to_json(self) -> str:
        """Return the canonical form: defaults left out, no spaces, keys as they are in the file.

        The order of keys is kept because it means something: a model writes the fields of an answer in their order.
        """
        return json.dumps(_plain(self), separators=(",", ":"), ensure_ascii=False)

    def hash(self) -> str:
        """Return the sha256 of the canonical form, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        data["nodes"] = tuple(_node(entry) for entry in data["nodes"])
        data["output_refs"] = {name: _ref(entry) for name, entry in data.get("output_refs", {}).items()}
        for name in ("secrets", "unavailable"):
            data[name] = tuple(data.get(name, ()))
        return cls(**data)


def _plain(value: Any) -> Any:
    """Dataclasses to dicts without the fields that hold their default, tuples to lists."""
    if hasattr(value, "__dataclass_fields__"):
        plain: dict[str, Any] = {}
        for name, default in _defaults(value.__class__):
            current = getattr(value, name)
            if current != default:
                plain[name] = _plain(current)
        return plain
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


@cache
def _defaults(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    """Return (name, default) of a dataclass's fields."""
    return tuple(
        (entry.name, entry.default_factory() if callable(entry.default_factory) else entry.default)
        for entry in fields(kind)
    )


def _ref(data: dict[str, Any]) -> Ref:
    return Ref(**{**data, "nodes": tuple(data.get("nodes", ()))})


def _node(data: dict[str, Any]) -> Node:
    made = dict(data)
    made["kind"] = Kind(made["kind"])
    made["join"] = Join(made.get("join", Join.ALL_SUCCESS))
    made["deps"] = tuple(Dep(**dep) for dep in made.get("deps", ()))
    made["refs"] = {name: _ref(ref) for name, ref in made.get("refs", {}).items()}
    if "retry" in made:
        retry = dict(made["retry"])
        if "on" in retry:
            retry["on"] = tuple(retry["on"])
        made["retry"] = Retry(**retry)
    if "on_failure" in made:
        made["on_failure"] = OnFailure(**made["on_failure"])
    made["bodies"] = {role: tuple(body) for role, body in made.get("bodies", {}).items()}
    made["publishes"] = tuple(made.get("publishes", ()))
    return Node(**made)
