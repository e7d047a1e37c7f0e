"""Lowers a Plan to Celery canvases, in segments.

1. A linear run of steps on one queue is one message: it names the first step, and the worker runs the rest in place.
2. A linear run across queues is a chain of such messages, at most CHAIN_LENGTH long.
3. A matched fan-out and fan-in (F → linear branches → J, exactly) is a chord; so are a map's items and its reduce.
4. Other ready steps are a group; a message carries a few of them.
5. Every other join relies on its in-degree counter.

A workflow as one canvas would grow quadratically, and barriers between levels waste a third of the time; see
docs/decisions/0001-canvas-in-segments.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgon_common import messages, queues
from gorgon_common.engine import rows
from gorgon_common.engine.records import Weight
from gorgon_common.workflow.plan import COMPOSITE, Kind, Node, Plan

CHAIN_LENGTH = 10
SLOW_BUNDLE = 4
FAST_BUNDLE = 64
_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})


def task(node: Node) -> str:
    """Return the task that runs a node."""
    if node.kind is Kind.NOOP and node.spec.get("milliseconds"):
        return messages.ACTION  # it simulates a call: it takes time and a slot
    return messages.BY_KIND.get(node.kind, messages.CONTROL)


@dataclass(frozen=True, slots=True)
class Message:
    """One task message: `nodes` are heads, in order."""

    queue: str
    task: str
    nodes: tuple[int, ...]
    runs: tuple[int, ...] = ()
    """For each head: the steps that its worker runs in place, the head first."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Messages in sequence."""

    parts: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Messages in parallel."""

    members: tuple[Message | Chain, ...]


@dataclass(frozen=True, slots=True)
class Chord:
    """A group, and the message that is sent when all its members have returned."""

    header: Group
    body: Message


Canvas = Message | Chain | Group | Chord


@dataclass(frozen=True, slots=True)
class Shape:
    """Which top-level steps of a plan can be sent together."""

    plain: frozenset[int]
    """Steps that are sent: neither inline nor conditional."""
    runs: Mapping[int, tuple[int, ...]]
    """Head of a linear run on one queue → its steps."""
    after: Mapping[int, int]
    """Head of a run → head of the run on another queue that follows it."""
    chords: Mapping[int, tuple[int, ...]]
    """Join → the heads of its branches."""
    chord_of: Mapping[int, int]
    """Head of a branch → its join."""

    def chain(self, head: int) -> list[int]:
        """Return the heads of the runs that follow one another from `head`, itself first."""
        heads = [head]
        while heads[-1] in self.after and len(heads) < CHAIN_LENGTH:
            heads.append(self.after[heads[-1]])
        return heads


def shape(plan: Plan) -> Shape:
    """Analyse a plan's top level."""
    successors = plan.successors()
    nodes = plan.nodes
    plain = frozenset(
        index
        for index in range(plan.top)
        if rows.weight(nodes[index]) is not Weight.INLINE and nodes[index].phase == "main"
    )

    def only(index: int) -> int | None:
        """Return the only step that depends on this one, if it depends on no other."""
        if len(successors[index]) != 1:
            return None
        (successor,) = successors[index]
        return successor if successor in plain and len(nodes[successor].deps) == 1 else None

    followed = {successor for index in plain if (successor := only(index)) is not None}
    runs: dict[int, tuple[int, ...]] = {}
    after: dict[int, int] = {}
    starts = [index for index in sorted(plain) if index not in followed]
    # The step after an inline step also begins a run, although it has only one dependency.
    while starts:
        head = starts.pop()
        run = [head]
        successor = only(head)
        while successor is not None and nodes[successor].queue == nodes[head].queue:
            run.append(successor)
            successor = only(run[-1])
        runs[head] = tuple(run)
        if successor is not None:
            after[head] = successor
            starts.append(successor)
    found = Shape(plain, runs, after, {}, {})
    chords = _chords(plan, successors, found)
    return Shape(plain, runs, after, chords, {head: join for join, heads in chords.items() for head in heads})


def _chords(plan: Plan, successors: Sequence[Sequence[int]], found: Shape) -> dict[int, tuple[int, ...]]:
    """Return the joins that exactly match a fan-out, with the heads of their branches."""
    tails: dict[int, int] = {}
    whole: dict[int, int] = {}
    carried = set(found.after.values())
    for head in found.runs:
        if head not in carried:
            chain = found.chain(head)
            tails[found.runs[chain[-1]][-1]] = head
            whole[head] = len(chain)
    chords: dict[int, tuple[int, ...]] = {}
    for join in found.plain:
        before = [dep.node for dep in plan.nodes[join].deps]
        if len(before) < 2 or any(index not in tails or len(successors[index]) != 1 for index in before):
            continue
        heads = sorted(tails[index] for index in before)
        origins = {tuple(dep.node for dep in plan.nodes[head].deps) for head in heads}
        if len(origins) != 1:
            continue
        (origin,) = origins
        if len(origin) > 1:
            continue
        if origin and sorted(successors[origin[0]]) != heads:
            continue
        chords[join] = tuple(heads)
    return chords


def grouped(found: Shape) -> frozenset[int]:
    """Return the steps that are sent as members of a chord; a worker must not run them in place."""
    return frozenset(found.chord_of)


def message(plan: Plan, found: Shape, heads: Sequence[int]) -> Message:
    """Return one message for some heads of one queue and task."""
    node = plan.nodes[heads[0]]
    run = found.runs.get(heads[0], (heads[0],)) if len(heads) == 1 else ()
    return Message(node.queue or queues.CONTROL, task(node), tuple(heads), run)


def branch(plan: Plan, found: Shape, head: int) -> Message | Chain:
    """Return the chain that starts at a head, or its one message."""
    parts = tuple(message(plan, found, [part]) for part in found.chain(head))
    return parts[0] if len(parts) == 1 else Chain(parts)


def group(plan: Plan, found: Shape, heads: Sequence[int]) -> Group:
    """Return heads as a group: chains where they continue on other queues, else bundles by queue and task."""
    members: list[Message | Chain] = []
    bundles: dict[tuple[str, str], list[int]] = {}
    for head in heads:
        if head in found.after:
            members.append(branch(plan, found, head))
        else:
            node = plan.nodes[head]
            bundles.setdefault((node.queue or queues.CONTROL, task(node)), []).append(head)
    for (_, name), same in bundles.items():
        for part in bundled(same, name):
            members.append(message(plan, found, part))
    return Group(tuple(members))


def bundled(heads: Sequence[int], name: str) -> Iterator[Sequence[int]]:
    """Divide heads of one queue into messages: few heads per message if they need a slot, many otherwise.

    `name`: their task.  Few heads get a message each, so that several workers share them.
    """
    size = FAST_BUNDLE if name in messages.FAST else SLOW_BUNDLE if len(heads) > 8 * SLOW_BUNDLE else 1
    for start in range(0, len(heads), size):
        yield heads[start : start + size]


# For display


@dataclass(frozen=True, slots=True)
class Segment:
    """A canvas, and the steps that must end before it is sent."""

    after: tuple[str, ...]
    canvas: Canvas | None
    inline: tuple[int, ...] = ()
    """Steps that need no message, because they run where they become ready."""
    conditional: tuple[int, ...] = field(default=())


def segments(plan: Plan) -> list[Segment]:
    """Return every canvas that a plan's top level compiles to, in the order in which they can be sent."""
    found = shape(plan)
    carried = set(found.chords) | _within_chains(found)
    triggers: dict[tuple[int, ...], list[int]] = {}
    for index in range(plan.top):
        node = plan.nodes[index]
        inside = index in found.plain and (index in carried or index not in found.runs)
        if node.kind not in _ENGINE and not inside:
            triggers.setdefault(tuple(sorted({dep.node for dep in node.deps})), []).append(index)
    made = []
    for before, members in triggers.items():
        after = tuple(plan.nodes[index].id for index in before)
        sent = [index for index in members if index in found.plain]
        for join in dict.fromkeys(found.chord_of[head] for head in sent if head in found.chord_of):
            heads = list(found.chords[join])
            made.append(Segment(after, Chord(group(plan, found, heads), message(plan, found, [join]))))
            sent = [index for index in sent if index not in heads]
        for index in members:
            if index not in found.plain:
                conditional = (index,) if plan.nodes[index].queue is not None else ()
                made.append(Segment(after, None, () if conditional else (index,), conditional))
        if sent:
            whole = group(plan, found, sent)
            made.append(Segment(after, whole.members[0] if len(whole.members) == 1 else whole))
    return made


def _within_chains(found: Shape) -> set[int]:
    """Return the heads that follow a chain: a long chain is cut, and the rest is sent separately."""
    within: set[int] = set()
    starts = [head for head in found.runs if head not in set(found.after.values())]
    while starts:
        chain = found.chain(starts.pop())
        within.update(chain[1:])
        if chain[-1] in found.after:
            starts.append(found.after[chain[-1]])
    return within


def describe(plan: Plan) -> str:
    """Return the canvas of a plan as a text tree for the terminal."""
    lines = []
    for segment in segments(plan):
        when = f"after {', '.join(segment.after)}" if segment.after else "at the start"
        lines.append(f"{when}:")
        lines += [f"  {line}" for line in _tree(plan, segment)]
    return "\n".join(lines)


def _tree(plan: Plan, segment: Segment) -> list[str]:
    if segment.canvas is not None:
        return _lines(plan, segment.canvas)
    for index in segment.conditional:
        node = plan.nodes[index]
        return [f"if its condition holds: {_one(plan, Message(str(node.queue), task(node), (index,)))}"]
    return _composite(plan, segment.inline[0])


def _composite(plan: Plan, index: int) -> list[str]:
    node = plan.nodes[index]
    head = f"in place: {node.kind} {node.name}"
    if node.kind not in COMPOSITE:
        return [head]
    lines = [head]
    inside = [(role, child) for role, body in node.bodies.items() for child in body]
    for place, (role, child) in enumerate(inside):
        inner = plan.nodes[child]
        last = place == len(inside) - 1
        what = _composite(plan, child) if inner.queue is None else [_one(plan, message_of(plan, child))]
        word = {"item": "group of parallel lanes", "reduce": "then, as a chord's body"}.get(role, role)
        lines.append(f"{'└─' if last else '├─'} {word}: {what[0]}")
        lines += [f"{'   ' if last else '│  '}{line}" for line in what[1:]]
    return lines


def message_of(plan: Plan, index: int) -> Message:
    """Return the message of a single step."""
    node = plan.nodes[index]
    return Message(node.queue or queues.CONTROL, task(node), (index,), (index,))


def _one(plan: Plan, sent: Message) -> str:
    shown = [plan.nodes[index].name for index in (sent.runs or sent.nodes)]
    names = " → ".join(shown) if sent.runs else ", ".join(shown[:6]) + (f", … ({len(shown)})" if len(shown) > 6 else "")
    return f"{sent.task} {names}  [{sent.queue}]"


def _lines(plan: Plan, canvas: Canvas) -> list[str]:
    match canvas:
        case Message():
            return [_one(plan, canvas)]
        case Chain(parts):
            return ["chain", *_nested(plan, parts)]
        case Group(members):
            return ["group", *_nested(plan, members)]
        case Chord(header, body):
            return ["chord", *_nested(plan, (header, body))]


def _nested(plan: Plan, members: Sequence[Canvas]) -> list[str]:
    lines = []
    for place, member in enumerate(members):
        last = place == len(members) - 1
        first, *rest = _lines(plan, member)
        lines.append(f"{'└─' if last else '├─'} {first}")
        lines += [f"{'   ' if last else '│  '}{line}" for line in rest]
    return lines


def to_dict(plan: Plan) -> list[dict[str, Any]]:
    """Return the canvas as data: for each segment `{after, canvas | inline | conditional}`."""
    made: list[dict[str, Any]] = []
    for segment in segments(plan):
        entry: dict[str, Any] = {"after": list(segment.after)}
        if segment.canvas is not None:
            entry["canvas"] = _data(plan, segment.canvas)
        else:
            key = "conditional" if segment.conditional else "inline"
            entry[key] = [plan.nodes[index].id for index in segment.conditional or segment.inline]
        made.append(entry)
    return made


def _data(plan: Plan, canvas: Canvas) -> dict[str, Any]:
    match canvas:
        case Message(queue, name, nodes, runs):
            steps = [plan.nodes[index].id for index in (runs or nodes)]
            return {"task": name, "queue": queue, "steps": steps, "in_place": bool(runs) and len(runs) > 1}
        case Chain(parts):
            return {"chain": [_data(plan, part) for part in parts]}
        case Group(members):
            return {"group": [_data(plan, member) for member in members]}
        case Chord(header, body):
            return {"chord": {"header": _data(plan, header)["group"], "body": _data(plan, body)}}
