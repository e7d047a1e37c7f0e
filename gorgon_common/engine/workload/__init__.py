"""Derives the work that `costs.forecast` simulates from a plan, its inputs and the history of past runs.

No call is made.  Every prompt is rendered as the engine would render it.  The inputs are known; a step's output is
replaced by its output in the last run, or else by an example of its schema.  Anything that depends on inputs alone (a
condition, the items of a map) is decided exactly as it will be in the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from gorgon_common.costs.estimate import input_bound
from gorgon_common.costs.forecast import ASSUMED, SIMILAR, Call, Estimate, Part, Repeat, Task, learned
from gorgon_common.costs.history import History, StepHistory
from gorgon_common.costs.tokens import TokenEstimator
from gorgon_common.engine.kinds.agent import DEFAULT_TIER
from gorgon_common.engine.kinds.base import DEFAULT_TIMEOUT
from gorgon_common.engine.rendering import DEFAULT_MAX_TOKENS
from gorgon_common.engine.workload.examples import example, reply_example
from gorgon_common.engine.workload.prompts import Prompts
from gorgon_common.engine.workload.values import Values, nodes_of
from gorgon_common.roles.models import resolve_model
from gorgon_common.workflow.expressions import to_text
from gorgon_common.workflow.plan import Kind, Node, Plan

__all__ = ["Outlook", "example", "outlook"]

ROUNDS = 1.4
"""Assumed number of rounds of a loop."""
REASONING = {"none": 0.0, "minimal": 0.1, "low": 0.15, "medium": 0.4, "high": 0.7, "xhigh": 1.2, "max": 1.5}
"""Reasoning tokens per visible token, by effort."""
REPLY_SPREAD, ITEMS_SPREAD, ROUNDS_SPREAD = 0.35, 0.4, 0.6
LIVE_SECONDS, LIVE_RATE = 1.5, 60.0
"""Assumed seconds until a live model starts its reply, and assumed tokens per second."""
SANDBOX_SECONDS = 0.16
STEP_SECONDS = Estimate(0.02, 0.7, ASSUMED)
"""Overhead of a step besides its call: the hop from one step to the next."""
_SAMPLES = 3
"""With at least this many past values, a step's own history is used."""
_UNCALLED = frozenset({Kind.COMMAND, Kind.ACTION, Kind.APPROVAL, Kind.WORKFLOW, Kind.WAIT, Kind.NOOP})


@dataclass(slots=True)
class Workload:
    """The work to simulate.  `said`: the assumptions made, one sentence each."""

    tasks: list[Task]
    top: list[int]
    providers: set[str]
    said: list[str] = field(default_factory=list)


def outlook(
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    history: History,
    estimator: TokenEstimator,
    target: str,
    latency: float | None = None,
) -> Workload:
    """Return the work of a plan.  `inputs` must already be validated; `latency`: the sandbox's, if set."""
    return _Reader(plan, inputs, history, estimator, target, latency).read()


class _Reader:
    """Reads one plan."""

    def __init__(
        self,
        plan: Plan,
        inputs: Mapping[str, Any],
        history: History,
        estimator: TokenEstimator,
        target: str,
        latency: float | None,
    ) -> None:
        self.plan = plan
        self.history = history
        self.estimator = estimator
        self.target = target
        self.latency = latency
        self.values = Values(plan, inputs, history, target)
        self.prompts = Prompts(self.values)

    def read(self) -> Workload:
        tasks = [self._task(index, node) for index, node in enumerate(self.plan.nodes)]
        shown = list(range(self.plan.top))
        providers = {model[0] for task in tasks if task.call is not None for model in task.call.models[:1]}
        return Workload(tasks, shown, providers, list(dict.fromkeys(self.values.said)))

    # Tasks

    def _task(self, index: int, node: Node) -> Task:
        bodies = node.bodies
        body = bodies.get("item") or bodies.get("body") or bodies.get("steps") or ()
        known = self.values.past(node)
        common: dict[str, Any] = {
            "id": node.id,
            "kind": node.kind.value,
            "needs": tuple(dict.fromkeys(dep.node for dep in node.deps)),
            "body": body,
            "after": bodies.get("reduce", ()),
            "fallback": bodies.get("fallback", ()),
            "parent": node.container,
            "chance": self._chance(node, known),
            "never": self.values.skipped(index),
            "attempts": 1 + node.retry.max,
            "pauses": sum(_pause(node, attempt) for attempt in range(1, node.retry.max + 1)),
        }
        if node.kind is Kind.AGENT:
            call = None if common["never"] else self._call(index, node, known)
            return Task(**common, call=call, seconds=STEP_SECONDS)
        if node.kind is Kind.MAP:
            return Task(**common, repeat=self.values.times(index, node), seconds=STEP_SECONDS)
        if node.kind is Kind.LOOP:
            return Task(**common, repeat=self._rounds(node, known), seconds=STEP_SECONDS)
        if node.kind in _UNCALLED:
            seconds, most = self._takes(node, known)
            return Task(**common, seconds=seconds, most_seconds=most, opaque=node.kind is Kind.WORKFLOW)
        follows = tuple(nodes_of(node.refs)) if node.kind in (Kind.AGGREGATE, Kind.CHECKPOINT) else ()
        return Task(**common, of=follows, most_seconds=1.0)

    def _chance(self, node: Node, known: StepHistory | None) -> float:
        if node.phase == "on_error":
            return 0.0
        if node.container is not None:
            around = self.plan.nodes[node.container]
            if "fallback" in around.bodies and node is self.plan.nodes[around.bodies["fallback"][0]]:
                return 0.0
        if known is None or not known.skipped:
            return 1.0
        done = known.executions + len(known.counts)
        return (done + 0.5) / (done + known.skipped + 1.0)

    def _takes(self, node: Node, known: StepHistory | None) -> tuple[Estimate | None, float | None]:
        """Return the estimated and the maximum duration of a step that calls no model."""
        limit = node.timeout or (DEFAULT_TIMEOUT if node.kind in (Kind.COMMAND, Kind.ACTION) else None)
        if node.kind is Kind.NOOP:
            seconds = float(node.spec.get("milliseconds", 0)) / 1000
            return Estimate(seconds, 0.05, ASSUMED), seconds * 2 + 1
        if node.kind is Kind.WAIT and isinstance(node.spec.get("for"), (int, float)):
            seconds = float(node.spec["for"])
            return Estimate(seconds, 0.01, ASSUMED), seconds + 10
        return learned(known.took) if known is not None else None, limit

    def _rounds(self, node: Node, known: StepHistory | None) -> Repeat:
        most = int(node.spec["max"])
        estimate = learned(float(count) for count in known.counts) if known is not None else None
        if estimate is None:
            rounds = min(float(most), ROUNDS)
            self.values.said.append(f"`{node.name}` is assumed to need one or two iterations (at most {most}).")
            estimate = Estimate(rounds, ROUNDS_SPREAD, ASSUMED)
        return Repeat(estimate, most, in_turn=True)

    # Calls

    def models(self, node: Node) -> tuple[tuple[str, str], ...]:
        """Return (provider, model) in the order the engine tries them."""
        written = list(node.spec.get("models") or [f"{node.spec['provider']}:{node.spec.get('model') or ''}"])
        if node.on_failure.action == "model" and node.on_failure.model:
            written.append(node.on_failure.model)
        found = []
        for entry in written:
            provider, _, name = str(entry).partition(":")
            found.append((provider, resolve_model(provider, name or node.spec.get("tier") or DEFAULT_TIER)))
        return tuple(dict.fromkeys(found))

    def _call(self, index: int, node: Node, known: StepHistory | None) -> Call:
        models = self.models(node)
        provider, model = models[0]
        schema = node.spec.get("schema")
        base = self.estimator.estimate_call(provider, model, schema=schema)
        fixed: list[float] = []
        parts: list[Part] = []
        sized, most, bound = True, 0, 0
        for number, scope in enumerate(self.prompts.scopes(index)):
            pieces = list(self.prompts.pieces(node, scope))
            own = sum(self._tokens(models[0], piece.text) for piece in pieces if not piece.nodes)
            fixed.append(own)
            ceiling = self.prompts.most(pieces)
            most = -1 if ceiling < 0 or most < 0 else max(most, ceiling)
            bound = max(bound, input_bound(["".join(piece.text for piece in pieces)], schema=schema))
            if not number:
                sized = all(piece.sized for piece in pieces)
                parts = [
                    Part(other, self._tokens(models[0], piece.text) / len(piece.nodes))
                    for piece in pieces
                    for other in piece.nodes
                ]
        schema_bytes = 3 * len(json.dumps(schema, ensure_ascii=False).encode()) if schema is not None else 0
        output, seconds = self._reply(node, known, models[0])
        past = learned(known.input) if known is not None and not sized else None
        if not sized and past is None:
            self.values.said.append(f"The size of what `{_shown(node)}` reads is unknown, so its cost is unknown.")
        return Call(
            models=models,
            max_tokens=int(node.spec.get("max_tokens") or DEFAULT_MAX_TOKENS),
            fixed=base.tokens + fmean(fixed or [0.0]),
            error=base.error,
            output=output,
            seconds=seconds,
            timeout=float(node.timeout or DEFAULT_TIMEOUT),
            parts=tuple(parts),
            input=past,
            unsized=not sized,
            most_input=None if most < 0 else most + schema_bytes,
            bound=bound,
            extra=(known.extra * known.executions + 0.02) / (known.executions + 1) if known is not None else 0.02,
            cached=known.cached if known is not None else 0.0,
        )

    def _tokens(self, model: tuple[str, str], text: str) -> float:
        return self.estimator.estimate(*model, text).tokens if text else 0.0

    def _reply(self, node: Node, known: StepHistory | None, model: tuple[str, str]) -> tuple[Estimate, Estimate | None]:
        """Return the estimated tokens of the reply, and the duration of the call."""
        similar = self.history.similar.get((node.spec.get("role"), *model))
        output = learned(known.output) if known is not None else None
        seconds = learned(known.seconds) if known is not None else None
        if similar is not None:
            # Another step with the same role indicates the length of such replies, although its schema may differ.
            if output is None and node.spec.get("role") and len(similar.output) >= _SAMPLES:
                output = learned(similar.output, SIMILAR)
            if seconds is None and len(similar.seconds) >= _SAMPLES:
                seconds = learned(similar.seconds, SIMILAR)
        if output is None:
            visible = self._tokens(model, to_text(reply_example(node, self.target)))
            share = REASONING.get(str(node.spec.get("effort") or "none"), 0.4)
            if self.target == "sandbox":
                share *= 0.3
            output = Estimate(max(8.0, visible * (1 + share)), REPLY_SPREAD, ASSUMED)
            self.values.said.append(
                "A reply without history is assumed to be as long as its schema suggests"
                + (", and shorter on the sandbox." if self.target == "sandbox" else ".")
            )
        if seconds is None:
            seconds = self._assumed_seconds(output.median)
        return output, seconds

    def _assumed_seconds(self, tokens: float) -> Estimate:
        if self.target != "sandbox":
            self.values.said.append(
                f"A model that was never called is assumed to start its reply after {LIVE_SECONDS:g} s "
                f"and to write {LIVE_RATE:g} tokens per second."
            )
            return Estimate(LIVE_SECONDS + tokens / LIVE_RATE, 0.4, ASSUMED)
        return Estimate((SANDBOX_SECONDS if self.latency is None else self.latency) + 0.02, 0.35, ASSUMED)


def _pause(node: Node, attempt: int) -> float:
    policy = node.retry
    bound = policy.initial if policy.backoff == "fixed" else policy.initial * 2.0 ** (attempt - 1)
    return min(bound, policy.cap)


def _shown(node: Node) -> str:
    return node.name
