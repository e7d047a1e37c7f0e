"""Determines the nodes of a workflow: steps, their wrappers (map, loop) and their bodies, in the order of the Plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgon_common.workflow.plan import Join, Kind, Ref
from gorgon_common.workflow.schema import StepBody, Workflow

Place = tuple[str | int, ...]
"""A place in the document: ("steps", 2, "prompt")."""

KINDS = {
    "prompt": Kind.AGENT,
    "uses": Kind.ACTION,
    "run": Kind.COMMAND,
    "workflow": Kind.WORKFLOW,
    "approval": Kind.APPROVAL,
    "wait": Kind.WAIT,
    "aggregate": Kind.AGGREGATE,
    "checkpoint": Kind.CHECKPOINT,
    "steps": Kind.GROUP,
}

PHASES = ("main", "on_error", "finally")


@dataclass(slots=True)
class Draft:
    """A node under construction.

    A step with a `map` or `loop` becomes two drafts.  The outer one has the modifiers (dependencies, condition, failure
    handling), the inner one the action.  `outer` and `inner` tell which one this is; for a plain step, both are true.
    """

    index: int
    id: str
    kind: Kind
    step: StepBody | None
    place: Place
    container: int | None = None
    role: str = ""
    """The body of its container that it belongs to: item, reduce, body, steps or fallback."""
    phase: str = "main"
    outer: bool = True
    inner: bool = True
    join: Join = Join.ALL_SUCCESS
    bodies: dict[str, list[int]] = field(default_factory=dict)
    deps: dict[int, bool] = field(default_factory=dict)
    """Node → whether the edge only determines the order."""
    spec: dict[str, Any] = field(default_factory=dict)
    refs: dict[str, Ref] = field(default_factory=dict)


class Layout:
    """All drafts of a workflow and how they are nested."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.drafts: list[Draft] = []
        self.ids: dict[str, int] = {}
        """Id of a step → its outer node."""
        self.publishers: dict[str, list[int]] = {}
        """Older files: published name → outer nodes of the steps that publish it, in file order."""
        self.children: dict[int, list[int]] = {}
        self.item_names: set[str] = set()
        """The `as:` names of all maps."""
        sections = (workflow.steps, workflow.on_error, workflow.finally_)
        for phase, name, steps in zip(PHASES, ("steps", "on_error", "finally"), sections, strict=True):
            for number, step in enumerate(steps):
                self._add(step, step.id, (name, number), phase=phase)
        self.gate = self._own("$gate", Kind.GATE)
        self.last = self._own("$finally", Kind.FINALLY)
        self.end = self._own("$end", Kind.END)
        self.top = len(self.drafts)
        position = 0
        while position < len(self.drafts):
            self._expand(self.drafts[position])
            position += 1

    def _own(self, name: str, kind: Kind) -> int:
        draft = Draft(len(self.drafts), name, kind, None, (), outer=False, inner=False, join=Join.ALL_DONE)
        self.drafts.append(draft)
        return draft.index

    def _add(
        self,
        step: StepBody,
        name: str,
        place: Place,
        *,
        container: Draft | None = None,
        role: str = "",
        phase: str = "",
    ) -> int:
        """Add the outer node of a step."""
        kind = Kind.MAP if step.map else Kind.LOOP if step.loop else KINDS[step.action]
        wrapped = kind in (Kind.MAP, Kind.LOOP)
        draft = Draft(len(self.drafts), name, kind, step, place, role=role, inner=not wrapped)
        self._place(draft, container, phase)
        if step.id:
            self.ids.setdefault(step.id, draft.index)
        for published in step.publishes:
            self.publishers.setdefault(published, []).append(draft.index)
        return draft.index

    def _place(self, draft: Draft, container: Draft | None, phase: str = "") -> None:
        self.drafts.append(draft)
        if container is not None:
            draft.container, draft.phase = container.index, container.phase
            container.bodies.setdefault(draft.role, []).append(draft.index)
            self.children.setdefault(container.index, []).append(draft.index)
        else:
            draft.phase = phase

    def _body(self, outer: Draft, suffix: str, role: str) -> None:
        """Add the body of a map or a loop: the loop inside the map, or the action itself."""
        step = outer.step
        assert step is not None
        looped = outer.kind is Kind.MAP and step.loop is not None
        kind = Kind.LOOP if looped else KINDS[step.action]
        name = outer.id + suffix
        draft = Draft(len(self.drafts), name, kind, step, outer.place, role=role, outer=False, inner=not looped)
        self._place(draft, outer)

    def _expand(self, draft: Draft) -> None:
        step = draft.step
        if step is None:
            return
        if draft.kind is Kind.MAP:
            self._body(draft, "[]", "item")
            if step.map is not None:
                self.item_names.add(step.map.as_)
            if step.map is not None and step.map.reduce is not None:
                reduce = (*draft.place, "map", "reduce")
                self._add(step.map.reduce, f"{draft.id}.reduce", reduce, container=draft, role="reduce")
        elif draft.kind is Kind.LOOP:
            self._body(draft, "#", "body")
        elif draft.kind is Kind.GROUP:
            for number, inner in enumerate(step.steps or ()):
                self._add(inner, inner.id, (*draft.place, "steps", number), container=draft, role="steps")
        if draft.outer and step.on_failure == "fallback" and step.fallback and step.fallback.step:
            other = (*draft.place, "fallback", "step")
            self._add(step.fallback.step, f"{draft.id}.fallback", other, container=draft, role="fallback")

    def path(self, index: int) -> list[int]:
        """Return the nodes from the top level down to this one."""
        found = [index]
        while (container := self.drafts[found[-1]].container) is not None:
            found.append(container)
        found.reverse()
        return found

    def ancestors(self, index: int) -> Iterator[Draft]:
        """Yield the node and its containers, innermost first."""
        draft = self.drafts[index]
        yield draft
        while draft.container is not None:
            draft = self.drafts[draft.container]
            yield draft

    def bodies_of_siblings(self) -> Iterator[Sequence[int]]:
        """Yield every set of nodes that may depend on each other: the top level, and each group's steps."""
        yield range(self.top)
        for draft in self.drafts:
            if steps := draft.bodies.get("steps"):
                yield steps

    def innermost(self, index: int) -> Draft:
        """Return the node with the action of the step that has this outer node."""
        draft = self.drafts[index]
        while not draft.inner and draft.bodies:
            draft = self.drafts[(draft.bodies.get("item") or draft.bodies["body"])[0]]
        return draft
