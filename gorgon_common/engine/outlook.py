"""From a plan, its inputs and what past runs tell to the work that `costs.forecast` plays.

Nothing is called.  Every prompt is rendered as the engine would render it: inputs are there already; what a step will
return is stood in for by what it returned last time, or else by an example of its schema.  What depends on inputs alone
(a condition, the items of a map) is decided here exactly as it will be in the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from gorgon_common.costs.estimate import input_bound
from gorgon_common.costs.forecast import ASSUMED, HISTORY, KIN, REREAD, Call, Guess, Part, Repeat, Task, learned
from gorgon_common.costs.history import History, StepHistory
from gorgon_common.costs.tokens import TokenEstimator
from gorgon_common.engine.aggregate import aggregate
from gorgon_common.engine.context import published
from gorgon_common.engine.rendering import DEFAULT_MAX_TOKENS
from gorgon_common.engine.step import DEFAULT_TIER, DEFAULT_TIMEOUT
from gorgon_common.errors import ExpressionError
from gorgon_common.roles.models import resolve_model
from gorgon_common.workflow.expressions import (
    MISSING,
    Env,
    Expression,
    StepValue,
    condition_expressions,
    evaluate_condition,
    parse_template,
    render_value,
    to_text,
)
from gorgon_common.workflow.expressions.tree import Comprehension, children
from gorgon_common.workflow.plan import COMPOSITE, Join, Kind, Node, Plan, Ref

ITEMS = 4
"""How many items a list of unknown length is taken to have."""
ROUNDS = 1.4
"""How many rounds a loop is taken to need."""
REPLY_TOKENS = 450
"""How long a reply in plain text is taken to be."""
REASONING = {"none": 0.0, "minimal": 0.1, "low": 0.15, "medium": 0.4, "high": 0.7, "xhigh": 1.2, "max": 1.5}
"""Reasoning tokens for each visible one, by effort."""
REPLY_SPREAD, ITEMS_SPREAD, ROUNDS_SPREAD = 0.35, 0.4, 0.6
LIVE_SECONDS, LIVE_RATE = 1.5, 60.0
"""A live model is taken to begin after so many seconds and to write so many tokens a second."""
SANDBOX_SECONDS = 0.16
STEP_SECONDS = Guess(0.02, 0.7, ASSUMED)
"""What a step costs beside its call: the hop from one to the next."""

_SHOWN_ITEMS = 50
_SAMPLES = 3
"""Past values from which on a step speaks for itself."""
_SENTENCE = "The part that was asked for is done in small steps, each of which can be checked alone."
_BRIEF = _SENTENCE[:26]
"""The sandbox's invented replies are much shorter than those of models."""
_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})
_UNCALLED = frozenset({Kind.COMMAND, Kind.ACTION, Kind.APPROVAL, Kind.WORKFLOW, Kind.WAIT, Kind.NOOP})


class _Unsized(Exception):
    """Nobody knows how large a value is."""


@dataclass(slots=True)
class Outlook:
    """What is to be played, and what people are told beside it: `said` is what was assumed, a sentence each."""

    tasks: list[Task]
    top: list[int]
    providers: set[str]
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a prompt: its text, and the nodes whose output it follows (none: it is known)."""

    text: str
    nodes: tuple[int, ...] = ()
    sized: bool = True
    bounded: bool = True


def outlook(
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    history: History,
    estimator: TokenEstimator,
    target: str,
    latency: float | None = None,
) -> Outlook:
    """Return the work of a plan.  `inputs` are checked already; `latency`: the sandbox's, where it was set."""
    return _Reader(plan, inputs, history, estimator, target, latency).read()


def example(schema: Any, sentence: str = _SENTENCE, depth: int = 0) -> Any:
    """Return a value of a JSON Schema as a model might write it: sentences, lists of three."""
    if not isinstance(schema, Mapping) or depth > 8:
        return sentence
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return example(schema[key][0], sentence, depth + 1)
    kind = schema.get("type")
    kind = next((entry for entry in kind if entry != "null"), "null") if isinstance(kind, list) else kind
    match kind:
        case "object":
            fields = (schema.get("properties") or {}).items()
            return {name: _field(name, entry, sentence, depth) for name, entry in fields}
        case "array":
            return [example(schema.get("items") or {}, sentence, depth + 1) for _ in range(3)]
        case "boolean":
            return True
        case "integer" | "number":
            return 12
        case "null":
            return None
    return sentence


def _field(name: str, schema: Any, sentence: str, depth: int) -> Any:
    made = example(schema, sentence, depth + 1)
    if made != sentence:
        return made
    if name in ("id", "severity", "category", "kind", "type", "unit", "language", "status"):
        return "t1"
    if name in ("title", "name", "path", "file", "location"):
        return sentence[:32]
    if name in ("code", "content", "report", "diff", "body", "document"):
        return "\n".join([sentence] * 6)
    return sentence if depth else f"{sentence}  {sentence}"


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
        self.inputs = inputs
        self.history = history
        self.estimator = estimator
        self.target = target
        self.latency = latency
        self.values: dict[int, StepValue] = {}
        self.skips: dict[int, bool] = {}
        self.lists: dict[int, tuple[list[Any], bool] | None] = {}
        self.said: list[str] = []
        self._open: set[int] = set()

    def read(self) -> Outlook:
        tasks = [self._task(index, node) for index, node in enumerate(self.plan.nodes)]
        shown = list(range(self.plan.top))
        providers = {model[0] for task in tasks if task.call is not None for model in task.call.models[:1]}
        return Outlook(tasks, shown, providers, list(dict.fromkeys(self.said)))

    # Tasks

    def _task(self, index: int, node: Node) -> Task:
        bodies = node.bodies
        body = bodies.get("item") or bodies.get("body") or bodies.get("steps") or ()
        known = self._past(node)
        common: dict[str, Any] = {
            "id": node.id,
            "kind": node.kind.value,
            "needs": tuple(dict.fromkeys(dep.node for dep in node.deps)),
            "body": body,
            "after": bodies.get("reduce", ()),
            "fallback": bodies.get("fallback", ()),
            "parent": node.container,
            "chance": self._chance(node, known),
            "never": self.skipped(index),
            "attempts": 1 + node.retry.max,
            "pauses": sum(_pause(node, attempt) for attempt in range(1, node.retry.max + 1)),
        }
        if node.kind is Kind.AGENT:
            call = None if common["never"] else self._call(index, node, known)
            return Task(**common, call=call, seconds=STEP_SECONDS)
        if node.kind is Kind.MAP:
            return Task(**common, repeat=self._items(index, node, known), seconds=STEP_SECONDS)
        if node.kind is Kind.LOOP:
            return Task(**common, repeat=self._rounds(node, known), seconds=STEP_SECONDS)
        if node.kind in _UNCALLED:
            seconds, most = self._takes(node, known)
            return Task(**common, seconds=seconds, most_seconds=most, opaque=node.kind is Kind.WORKFLOW)
        follows = tuple(_nodes(node.refs)) if node.kind in (Kind.AGGREGATE, Kind.CHECKPOINT) else ()
        return Task(**common, of=follows, most_seconds=1.0)

    def _past(self, node: Node) -> StepHistory | None:
        return self.history.steps.get(node.id)

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

    def _takes(self, node: Node, known: StepHistory | None) -> tuple[Guess | None, float | None]:
        """Return how long a step without a call to a model takes, and at most."""
        limit = node.timeout or (DEFAULT_TIMEOUT if node.kind in (Kind.COMMAND, Kind.ACTION) else None)
        if node.kind is Kind.NOOP:
            seconds = float(node.spec.get("milliseconds", 0)) / 1000
            return Guess(seconds, 0.05, ASSUMED), seconds * 2 + 1
        if node.kind is Kind.WAIT and isinstance(node.spec.get("for"), (int, float)):
            seconds = float(node.spec["for"])
            return Guess(seconds, 0.01, ASSUMED), seconds + 10
        return learned(known.took) if known is not None else None, limit

    def _items(self, index: int, node: Node, known: StepHistory | None) -> Repeat:
        most = int(node.spec["max_items"])
        parallel = node.spec.get("max_parallel") or self.plan.limits.get("max_parallel")
        found = self.items(index)
        if found is not None and found[1]:
            count = min(most, len(found[0]))
            return Repeat(Guess(float(count), 0.0, HISTORY), count, parallel, exact=True)
        guess = learned(float(count) for count in known.counts) if known is not None else None
        if guess is None:
            count = min(most, len(found[0]) if found is not None and found[0] else ITEMS)
            if not self.skipped(index):
                self.said.append(f"`{node.id}` is taken to have about {count} items (at most {most}).")
            guess = Guess(float(count), ITEMS_SPREAD, ASSUMED)
        return Repeat(guess, most, parallel)

    def _rounds(self, node: Node, known: StepHistory | None) -> Repeat:
        most = int(node.spec["max"])
        guess = learned(float(count) for count in known.counts) if known is not None else None
        if guess is None:
            rounds = min(float(most), ROUNDS)
            self.said.append(f"`{node.id}` is taken to need one round or two (at most {most}).")
            guess = Guess(rounds, ROUNDS_SPREAD, ASSUMED)
        return Repeat(guess, most, in_turn=True)

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
        for number, scope in enumerate(self._scopes(index)):
            pieces = list(self._pieces(node, scope))
            own = sum(self._tokens(models[0], piece.text) for piece in pieces if not piece.nodes)
            fixed.append(own)
            ceiling = self._most(pieces)
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
            self.said.append(f"Nothing is known of the size of what `{_shown(node)}` reads: its cost is unknown.")
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

    def _reply(self, node: Node, known: StepHistory | None, model: tuple[str, str]) -> tuple[Guess, Guess | None]:
        """Return how many tokens the reply has, and how long the call takes."""
        kin = self.history.kin.get((node.spec.get("role"), *model))
        output = learned(known.output) if known is not None else None
        seconds = learned(known.seconds) if known is not None else None
        if kin is not None:
            # Another step of the role says how long such replies are; its schema may be another one.
            if output is None and node.spec.get("role") and len(kin.output) >= _SAMPLES:
                output = learned(kin.output, KIN)
            if seconds is None and len(kin.seconds) >= _SAMPLES:
                seconds = learned(kin.seconds, KIN)
        if output is None:
            visible = self._tokens(model, to_text(self._reply_example(node)))
            share = REASONING.get(str(node.spec.get("effort") or "none"), 0.4)
            if self.target == "sandbox":
                share *= 0.3
            output = Guess(max(8.0, visible * (1 + share)), REPLY_SPREAD, ASSUMED)
            self.said.append(
                "A reply that nothing is known of is taken to be as long as its schema suggests"
                + (", less on the sandbox." if self.target == "sandbox" else ".")
            )
        if seconds is None:
            seconds = self._assumed_seconds(output.median)
        return output, seconds

    def _assumed_seconds(self, tokens: float) -> Guess:
        if self.target != "sandbox":
            self.said.append(
                f"A model that was never called is taken to begin after {LIVE_SECONDS:g} s "
                f"and to write {LIVE_RATE:g} tokens a second."
            )
            return Guess(LIVE_SECONDS + tokens / LIVE_RATE, 0.4, ASSUMED)
        return Guess((SANDBOX_SECONDS if self.latency is None else self.latency) + 0.02, 0.35, ASSUMED)

    def _reply_example(self, node: Node) -> Any:
        schema = node.spec.get("schema")
        sentence = _BRIEF if self.target == "sandbox" else _SENTENCE
        if schema is not None:
            return example(schema, sentence)
        return " ".join([sentence] * max(1, REPLY_TOKENS // 18))

    # Prompts

    def _scopes(self, index: int) -> Iterator[dict[int, tuple[Any, int]]]:
        """Yield map → (item, position) for the items of the maps around a node, as far as they are told apart."""
        around = self._maps_around(index)
        exact = [number for number in around if (found := self.items(number)) is not None and found[1] and found[0]]
        if not exact:
            yield {}
            return
        innermost = exact[0]
        found = self.items(innermost)
        assert found is not None
        numbered = list(enumerate(found[0]))
        if len(numbered) > _SHOWN_ITEMS:
            longest = sorted(numbered, key=lambda entry: -len(_safe_text(entry[1])))[: _SHOWN_ITEMS // 2]
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

    def _pieces(self, node: Node, scope: Mapping[int, tuple[Any, int]]) -> Iterator[_Piece]:
        """Yield the parts of what a call sends."""
        spec = node.spec
        if spec.get("system"):
            yield from self._template(node, str(spec["system"]), scope)
        if spec.get("prompt") is not None:
            yield from self._template(node, str(spec["prompt"]), scope)
            return
        yield _Piece(str(spec.get("standing") or "Do your part of the work."))
        for name in spec.get("context") or ():
            if name in node.refs:
                yield self._valued(node, name, scope)
        for name in spec.get("given") or ():
            yield _Piece(f"## {name}\n\n{_safe_text(self.inputs.get(name))}\n\n")

    def _valued(self, node: Node, name: str, scope: Mapping[int, tuple[Any, int]]) -> _Piece:
        names = _Names(self, node.refs, scope)
        try:
            value = names[name]
            text = to_text(value) if value is not MISSING else ""
        except (ExpressionError, KeyError):
            text = ""
        except _Unsized:
            return _Piece("", tuple(_nodes({name: node.refs[name]})), sized=False)
        return _Piece(f"## {name}\n\n{text}\n\n", self._varying({name: node.refs[name]}, scope))

    def _template(self, node: Node, text: str, scope: Mapping[int, tuple[Any, int]]) -> Iterator[_Piece]:
        lenient = self.plan.lenient
        names = _Names(self, node.refs, scope)
        for part in parse_template(text, lenient).parts:
            if not isinstance(part, Expression):
                yield _Piece(part)
                continue
            used = {name: node.refs[name] for name in part.names if name in node.refs}
            varying = self._varying(used, scope)
            try:
                value = part.evaluate(Env(names, lenient=lenient))
                yield _Piece("" if value is None and lenient else to_text(value), varying, bounded=not _copies(part))
            except ExpressionError:
                yield _Piece("", varying, bounded=not _copies(part))
            except _Unsized:
                yield _Piece("", varying, sized=False, bounded=False)

    def _varying(self, refs: Mapping[str, Ref], scope: Mapping[int, tuple[Any, int]]) -> tuple[int, ...]:
        """Return the nodes whose output decides how long a text with these names is."""
        found: list[int] = []
        for ref in refs.values():
            if ref.kind == "item" and ref.node is not None and ref.node not in scope:
                listed = self.items(ref.node)
                if listed is None or not listed[1]:
                    # One item of a list: it follows the steps that write the list, not how many items there are.
                    over = self.plan.nodes[ref.node]
                    found += [number for number in _nodes(over.refs) if not self.skipped(number)] or [ref.node]
            elif ref.kind in ("step", "published", "steps", "results"):
                found += [number for number in _nodes({"": ref}) if not self._settled(number)]
        return tuple(dict.fromkeys(found))

    def _most(self, pieces: Sequence[_Piece]) -> int:
        """Return the most tokens that the pieces can be, -1 where nothing bounds them; a token is at least a byte."""
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
        """Return the most tokens that a node's output can be as text, None where nothing bounds it."""
        node = self.plan.nodes[number]
        if self._settled(number):
            return len(_safe_text(self.value(number).output).encode("utf-8", "replace"))
        if number in seen:
            return 0
        seen = seen | {number}
        inner = [child for body in node.bodies.values() for child in body]
        if node.kind is Kind.AGENT:
            own: int | None = round(REREAD * int(node.spec.get("max_tokens") or DEFAULT_MAX_TOKENS)) + 1_000
        elif node.kind in (Kind.MAP, Kind.LOOP, Kind.GROUP):
            own = 1_000
        elif node.kind in (Kind.AGGREGATE, Kind.CHECKPOINT):
            inner = [*inner, *_nodes(node.refs)]
            own = 2 * len(json.dumps(self.inputs, default=str).encode()) + 10_000
        else:
            own = None
        if own is None:
            return None
        times = 1
        if node.kind is Kind.MAP:
            listed = self.items(number)
            times = len(listed[0]) if listed is not None and listed[1] else int(node.spec["max_items"])
        for child in inner:
            most = self._most_returned(child, seen)
            if most is None:
                return None
            own += most * times
        return own

    # What names stand for

    def skipped(self, index: int) -> bool:
        """Tell whether it is certain that a node does not run."""
        if index in self.skips:
            return self.skips[index]
        self.skips[index] = False  # a loop's body may refer to the loop
        self.skips[index] = self._is_skipped(self.plan.nodes[index])
        return self.skips[index]

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
                node.condition, Env(_Names(self, node.refs, {}), lenient=self.plan.lenient), lenient=self.plan.lenient
            )
        except (ExpressionError, _Unsized):
            return False
        return not held

    def _decided(self, node: Node) -> bool:
        """Tell whether a condition depends on nothing but what is known."""
        lenient = self.plan.lenient
        names = {name for _, part in condition_expressions(node.condition, lenient) for name in part.names}
        return all(self._known(node.refs[name]) for name in names if name in node.refs)

    def _known(self, ref: Ref) -> bool:
        if ref.kind == "input":
            return True
        return ref.kind in ("step", "published", "steps") and all(self._settled(number) for number in _nodes({"": ref}))

    def _settled(self, number: int) -> bool:
        """Tell whether what a node returns is known before the run."""
        if self.skipped(number):
            return True
        node = self.plan.nodes[number]
        if node.kind in (Kind.AGGREGATE, Kind.CHECKPOINT) and number not in self._open:
            self._open.add(number)
            try:
                return node.condition is None and all(self._known(ref) for ref in node.refs.values())
            finally:
                self._open.discard(number)
        return False

    def items(self, index: int) -> tuple[list[Any], bool] | None:
        """Return (the items of a map, whether they are certain); None where nothing is known of them."""
        if index not in self.lists:
            self.lists[index] = None
            self.lists[index] = self._listed(self.plan.nodes[index])
        return self.lists[index]

    def _listed(self, node: Node) -> tuple[list[Any], bool] | None:
        try:
            names = _Names(self, node.refs, {})
            over = render_value(node.spec["over"], Env(names, lenient=self.plan.lenient), legacy=self.plan.lenient)
        except (ExpressionError, _Unsized):
            return None
        if isinstance(over, Mapping):
            over = [{"key": key, "value": value} for key, value in over.items()]
        if not isinstance(over, (list, tuple)):
            return None
        used = {name for name in self._over_names(node.spec["over"]) if name in node.refs}
        return list(over), all(self._known(node.refs[name]) for name in used)

    def _over_names(self, over: Any) -> set[str]:
        if isinstance(over, str):
            return set(parse_template(over, self.plan.lenient).names)
        if isinstance(over, Mapping):
            return {name for value in over.values() for name in self._over_names(value)}
        if isinstance(over, (list, tuple)):
            return {name for value in over for name in self._over_names(value)}
        return set()

    def value(self, number: int) -> StepValue:
        """Return what a step's name stands for here.  Raises _Unsized where nobody can tell."""
        if number not in self.values:
            if number in self._open:
                return StepValue(status="pending", name=self.plan.nodes[number].id)
            self._open.add(number)
            try:
                self.values[number] = self._value(number)
            finally:
                self._open.discard(number)
        return self.values[number]

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
        known = self._past(node)
        if node.kind in COMPOSITE:
            return self._composite(number, node)
        if node.kind is Kind.AGGREGATE:
            return aggregate(node, Env(_Names(self, node.refs, {}), lenient=self.plan.lenient))
        if node.kind is Kind.CHECKPOINT:
            return render_value(
                node.spec.get("message") or "",
                Env(_Names(self, node.refs, {}), lenient=self.plan.lenient),
                text=True,
                legacy=self.plan.lenient,
            )
        if known is not None and known.sample is not None:
            return known.sample
        if node.kind is Kind.AGENT:
            return self._reply_example(node)
        raise _Unsized

    def _composite(self, number: int, node: Node) -> Any:
        if node.kind is Kind.GROUP:
            return {self.plan.nodes[child].id: self.value(child).output for child in node.bodies["steps"]}
        if node.kind is Kind.LOOP:
            return self.value(node.bodies["body"][0]).output
        if "reduce" in node.bodies:
            return self.value(node.bodies["reduce"][0]).output
        return self.results(number)

    def results(self, number: int) -> list[Any]:
        """Return the results of a map: as many of its body's output as it is expected to have items."""
        node = self.plan.nodes[number]
        repeat = self._items(number, node, self._past(node))
        return [self.value(node.bodies["item"][0]).output] * max(0, round(repeat.times.median))


class _Names(Mapping[str, Any]):
    """The names of one node's expressions."""

    def __init__(self, reader: _Reader, refs: Mapping[str, Ref], scope: Mapping[int, tuple[Any, int]]) -> None:
        self._reader = reader
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
        inputs = self._reader.inputs
        return inputs if ref.field is None else inputs.get(ref.field, MISSING)

    def _step(self, ref: Ref) -> Any:
        assert ref.node is not None
        return self._reader.value(ref.node)

    def _published(self, ref: Ref) -> Any:
        for number in _nodes({"": ref}):
            found = self._reader.value(number).published.get(ref.field or "", MISSING)
            if found is not MISSING:
                return found
        return MISSING

    def _steps(self, ref: Ref) -> Any:
        return {self._reader.plan.nodes[number].id: self._reader.value(number) for number in ref.nodes}

    def _item(self, ref: Ref) -> Any:
        assert ref.node is not None
        if ref.node in self._scope:
            return self._scope[ref.node][0]
        found = self._reader.items(ref.node)
        if found is None or not found[0]:
            raise _Unsized
        return found[0][0]

    def _index(self, ref: Ref) -> Any:
        return self._scope[ref.node][1] if ref.node is not None and ref.node in self._scope else 0

    def _results(self, ref: Ref) -> Any:
        assert ref.node is not None
        return self._reader.results(ref.node)

    def _run(self, ref: Ref) -> Any:
        plan = self._reader.plan
        return {
            "id": f"run_{'0' * 26}",
            "workflow": plan.name,
            "team": plan.team,
            "started_at": "2026-01-01T00:00:00.000000Z",
        }

    def _error(self, ref: Ref) -> Any:
        return {"step": "step", "kind": "error", "message": _SENTENCE, "hint": None, "summary": _SENTENCE}

    def _other(self, ref: Ref) -> Any:
        if ref.kind == "secret":
            return dict.fromkeys(self._reader.plan.secrets, "x" * 32)
        return MISSING


def _nodes(refs: Mapping[str, Ref]) -> list[int]:
    """Return the nodes that references name, in order."""
    return list(
        dict.fromkeys(
            number for ref in refs.values() for number in (*(() if ref.node is None else (ref.node,)), *ref.nodes)
        )
    )


def _copies(expression: Expression) -> bool:
    """Tell whether an expression may say a value more than once: what it gives has no bound then."""
    queue = [expression.tree]
    while queue:
        node = queue.pop()
        if isinstance(node, Comprehension):
            return True
        queue += children(node)
    return len(expression.paths) > len({path.root for path in expression.paths})


def _safe_text(value: Any) -> str:
    if value is MISSING or value is None:
        return ""
    try:
        return to_text(value)
    except ExpressionError:
        return ""


def _pause(node: Node, attempt: int) -> float:
    policy = node.retry
    bound = policy.initial if policy.backoff == "fixed" else policy.initial * 2.0 ** (attempt - 1)
    return min(bound, policy.cap)


def _shown(node: Node) -> str:
    return node.id.removesuffix("[]").removesuffix("#")
