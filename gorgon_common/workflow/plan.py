"""The Plan: the meaning of a workflow file, frozen.

A Plan is pure data.  The compiler builds it once, it is stored with the run under the hash of its canonical JSON, and
the engine and the canvas adapter read it.  Editing the YAML file cannot change a run in progress.

Shape.  `nodes` is flat.  The first `top` nodes are the steps of the file's top level, followed by the engine's own
three nodes (see below).  Each of these becomes one row of the run when the run is created (row index = node index).
The nodes after them are *templates*: the bodies of composite nodes (map, loop, group, a fallback step), which become
rows when the composite expands, once per item or iteration.  A template node names its composite in `container` and
refers to its siblings (nodes of the same body) by node index in `deps`.  Deps never cross bodies: if a step inside a
group refers to a step outside, the *group* depends on that step.

The engine's own nodes.  Top-level steps → `$gate` (a join over all steps that decides whether the run failed) → the
`on_error` steps → `$finally` (a join) → the `finally` steps → `$end` (a join that computes the outputs and ends the
run).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cache
from typing import Any

from gorgon_common.errors import PlanTooNew

FORMAT = 1
"""The newest form of stored plans that this version reads, and the one that it writes.

A field that readers may ignore does not need a new form: a reader drops what it does not know.  Raise the number with a
change that an older reader would misunderstand, such as a new kind of node; workers of that version leave such plans to
newer ones.
"""


class Kind(StrEnum):
    """What a node does."""

    AGENT = "agent"  # one model call (with its repair rounds)
    ACTION = "action"  # an operation of an integration (`uses:`)
    COMMAND = "command"  # a process (`run:`)
    WORKFLOW = "workflow"  # a sub-workflow
    APPROVAL = "approval"  # waits for a person
    WAIT = "wait"  # waits for a time or an event
    AGGREGATE = "aggregate"  # combines results without a model
    CHECKPOINT = "checkpoint"  # a named savepoint and message in the run's log
    GROUP = "group"  # composite: inner steps with their own ordering (`steps:`)
    MAP = "map"  # composite: one body per item, then an optional reduce
    LOOP = "loop"  # composite: repeats its body until a condition holds
    NOOP = "noop"  # queued; does nothing, or sleeps for spec.milliseconds: for benchmarks and tests; has no YAML form
    GATE = "gate"  # the engine's own joins
    FINALLY = "finally"
    END = "end"


COMPOSITE = frozenset({Kind.GROUP, Kind.MAP, Kind.LOOP})
"""Kinds that expand into rows."""

INLINE = COMPOSITE | {Kind.AGGREGATE, Kind.CHECKPOINT, Kind.WAIT, Kind.GATE, Kind.FINALLY, Kind.END}
"""Kinds that need no provider; they run where they become ready, without a message."""


class Join(StrEnum):
    """When a node may start, given how its dependencies ended."""

    ALL_SUCCESS = "all_success"
    NONE_FAILED = "none_failed"
    ANY_SUCCESS = "any_success"
    ALL_DONE = "all_done"


@dataclass(frozen=True, slots=True)
class Dep:
    """An edge.  `order` edges only wait: they do not affect the join rule and do not propagate skips (older files)."""

    node: int
    order: bool = False


@dataclass(frozen=True, slots=True)
class Ref:
    """The meaning of a name in one of a node's expressions.

    ========== ==================================================================
    kind       meaning
    ========== ==================================================================
    input      the mapping of the run's inputs (`inputs`), or with `field` one input under its bare name (older files)
    step       the step value of node `node` (its output, status, error, fields); a loop's own id, in `until` and inside
               its body, is the loop's body node: its last iteration that has ended
    published  older files: the name `field` as published by `outputs:` of node `node`; `nodes` are other steps that
               publish it, nearest first, used if that one was skipped
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
    """Attempts after the first.  Times are in seconds."""

    max: int = 0
    backoff: str = "exponential"  # exponential | fixed
    initial: float = 2.0
    cap: float = 60.0
    jitter: str = "full"  # full | none
    on: tuple[str, ...] = ("timeout", "server", "connection", "invalid_output", "exit_code")


@dataclass(frozen=True, slots=True)
class OnFailure:
    """What happens after the retries are exhausted.

    action: `abort` | `skip` | `default` (the value in `value` becomes the output) | `step` (the body `fallback` runs
    and produces the output) | `model` (one more attempt on `model`, written provider:model).
    """

    action: str = "abort"
    value: Any = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One step, or one template of a step.  Times are in seconds."""

    id: str
    """Unique in the plan.  Bodies: `build[]` (a map's item), `build#` (a loop's body), `build.reduce`,
    `build.fallback`; inner steps of a group keep their own id.
    """
    kind: Kind
    queue: str | None = None
    """The queue for its message; None for INLINE kinds."""
    deps: tuple[Dep, ...] = ()
    join: Join = Join.ALL_SUCCESS
    condition: Any = None
    """Canonical condition: a CEL string, or the form {field, operator, value, on_missing} / {all|any|not}."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """The action's canonical fields; see `compiler`."""
    refs: Mapping[str, Ref] = field(default_factory=dict)
    """Every root name in the node's expressions (condition, spec, until, over) → what it stands for."""
    retry: Retry = Retry()
    on_failure: OnFailure = OnFailure()
    timeout: float | None = None
    deadline: float | None = None
    container: int | None = None
    """The composite (or the step with a fallback body) that this template belongs to."""
    bodies: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Composite: template nodes by role: map {item, reduce?}, loop {body}, group {steps}, any {fallback?}. item,
    reduce, body and fallback hold exactly one node, which is a group if several steps are meant.
    """
    publishes: tuple[str, ...] = ()
    """Older files: names that `outputs:` publishes; the first is the whole output unless the reply has such a field."""
    phase: str = "main"  # main | on_error | finally (top level only)

    @property
    def name(self) -> str:
        """The step's display name: its id without the template marker (`build` for `build[]`)."""
        return self.id.removesuffix("[]").removesuffix("#")


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete workflow, ready to run."""

    name: str
    nodes: tuple[Node, ...]
    top: int
    """Number of rows of a new run: nodes[:top], including the engine's own three."""
    version: str = ""
    team: str = "default"
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Input name → JSON Schema, with an optional `default`, and `required: bool` added to it."""
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Output name → template."""
    output_refs: Mapping[str, Ref] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)  # budget_usd, tokens, timeout (s), max_parallel
    concurrency: Mapping[str, Any] | None = None
    secrets: tuple[str, ...] = ()
    lenient: bool = False
    """Older files: a missing value or a reference to a skipped step renders as an empty text."""
    unavailable: tuple[str, ...] = ()
    """Why this plan cannot run yet: one sentence per step that cannot be executed."""
    format: int = 1
    """See `FORMAT`.  Plans that were stored before there was a number have the first form."""

    def successors(self) -> list[list[int]]:
        """Return for each node the nodes that depend on it, in ascending order."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            for number in {dep.node for dep in node.deps}:  # an edge that also orders counts once
                found[number].append(index)
        return found

    def to_json(self) -> str:
        """Return the canonical form: without defaults and spaces, keys in the order of the file.

        The order of keys is kept because it is significant: a model writes the fields of an answer in this order.
        """
        return json.dumps(_plain(self), separators=(",", ":"), ensure_ascii=False)

    def hash(self) -> str:
        """Return the SHA-256 of the canonical form, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str, newest: int = FORMAT) -> Plan:
        """Parse the output of `to_json` of this or another version; unknown fields are dropped.

        `newest`: the newest form that the caller reads.  Raises PlanTooNew.
        """
        data = json.loads(text)
        if data.get("format", 1) > newest:
            raise PlanTooNew(f"The plan has the form {data.get('format', 1)}; this version of Gorgon reads {newest}.")
        data = _known(cls, data)
        data["nodes"] = tuple(_node(entry) for entry in data["nodes"])
        data["output_refs"] = {name: _ref(entry) for name, entry in data.get("output_refs", {}).items()}
        for name in ("secrets", "unavailable"):
            data[name] = tuple(data.get(name, ()))
        return cls(**data)


def _plain(value: Any) -> Any:
    """Convert dataclasses to dicts without fields that hold their default, and tuples to lists."""
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
    """Return (name, default) for the fields of a dataclass."""
    return tuple(
        (entry.name, entry.default_factory() if callable(entry.default_factory) else entry.default)
        for entry in fields(kind)
    )


def _known(kind: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a dataclass of this version has."""
    names = {entry.name for entry in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def _ref(data: dict[str, Any]) -> Ref:
    return Ref(**{**_known(Ref, data), "nodes": tuple(data.get("nodes", ()))})


def _node(data: dict[str, Any]) -> Node:
    made = _known(Node, data)
    made["kind"] = Kind(made["kind"])
    made["join"] = Join(made.get("join", Join.ALL_SUCCESS))
    made["deps"] = tuple(Dep(**_known(Dep, dep)) for dep in made.get("deps", ()))
    made["refs"] = {name: _ref(ref) for name, ref in made.get("refs", {}).items()}
    if "retry" in made:
        retry = _known(Retry, made["retry"])
        if "on" in retry:
            retry["on"] = tuple(retry["on"])
        made["retry"] = Retry(**retry)
    if "on_failure" in made:
        made["on_failure"] = OnFailure(**_known(OnFailure, made["on_failure"]))
    made["bodies"] = {role: tuple(body) for role, body in made.get("bodies", {}).items()}
    made["publishes"] = tuple(made.get("publishes", ()))
    return Node(**made)
