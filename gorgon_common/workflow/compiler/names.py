"""Resolves what a name means at a place in the workflow, and which edges its use requires."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from gorgon_common.workflow.compiler.layout import PHASES, Draft, Layout
from gorgon_common.workflow.compiler.sources import Roles
from gorgon_common.workflow.compiler.specs import output_schema
from gorgon_common.workflow.expressions import Path, Type, did_you_mean
from gorgon_common.workflow.expressions import types as kinds
from gorgon_common.workflow.plan import Kind, Ref

RUN = Type("object", fields=dict.fromkeys(("id", "workflow", "team", "started_at"), kinds.STRING))
_ERROR = Type("object", fields=dict.fromkeys(("step", "message", "kind", "summary"), kinds.STRING))


class Unknown(Exception):  # control flow inside the compiler; never visible outside
    """A name without a meaning at its place."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(slots=True)
class Meaning:
    """The meaning of a root name, and the steps (outer nodes) that must end first."""

    ref: Ref
    type: Type
    steps: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Edge:
    """`before` must end before `after` starts; both are siblings."""

    after: int
    before: int


class Names:
    """Resolves names.  `lenient` adds names that only older files have: bare inputs and published names."""

    def __init__(self, layout: Layout, roles: Roles) -> None:
        self.layout = layout
        self.roles = roles
        self.lenient = layout.workflow.lenient
        self.items: dict[int, Type] = {}
        """Map → the type of its items; filled in by `build`, which reads `over` before the bodies."""
        self._outputs: dict[int, Type] = {}
        self._steps: dict[int, Type] = {}

    # ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def output(self, index: int) -> Type:
        """Return the type of a step's output (outer node)."""
        if index not in self._outputs:
            self._outputs[index] = self._output(self.layout.drafts[index])
        return self._outputs[index]

    def _output(self, draft: Draft) -> Type:
        step = draft.step
        if step is None:
            return kinds.ANY
        return self._with_default(draft, self._body_output(draft))

    def _body_output(self, draft: Draft) -> Type:
        step = draft.step
        assert step is not None
        if draft.kind is Kind.MAP:
            if reduce := draft.bodies.get("reduce"):
                return self.output(reduce[0])
            item = self._body_output(self.layout.drafts[draft.bodies["item"][0]])
            failing = step.map is not None and step.map.on_item_failure == "continue"
            return Type("list", item=kinds.ANY if failing else item)
        if draft.kind is Kind.LOOP:
            return self._body_output(self.layout.drafts[draft.bodies["body"][0]])
        if draft.kind is Kind.GROUP:
            inner = draft.bodies.get("steps", [])
            return Type("object", fields={self.layout.drafts[index].id: self.output(index) for index in inner})
        if schema := output_schema(step, self.roles, lenient=self.lenient):
            return Type.from_schema(schema)
        if draft.kind is Kind.AGGREGATE and step.aggregate is not None:
            return {"concat": kinds.STRING, "json": kinds.LIST, "merge": kinds.OBJECT}.get(
                step.aggregate.how, kinds.ANY
            )
        return {Kind.AGENT: kinds.FREE_TEXT, Kind.COMMAND: kinds.STRING}.get(draft.kind, kinds.ANY)

    def _with_default(self, draft: Draft, output: Type) -> Type:
        """Return the type of an output that a default may replace: less is known about it."""
        step = draft.step
        if not draft.outer or step is None or step.on_failure != "fallback" or step.fallback is None:
            return output
        if step.fallback.type == "model":
            return output
        value = step.fallback.value
        if step.fallback.type == "default_value" and isinstance(value, dict) and output.fields is not None:
            return Type("object", fields={**dict.fromkeys(value, kinds.ANY), **output.fields})
        return output if step.fallback.type == "default_value" and value is None else kinds.ANY

    def step_type(self, index: int) -> Type:
        """Return the type of a step's name (outer node)."""
        if index not in self._steps:
            draft = self.layout.drafts[index]
            published = dict.fromkeys(draft.step.publishes, kinds.ANY) if draft.step else {}
            command = draft.kind is not Kind.MAP and self.layout.innermost(index).kind is Kind.COMMAND
            self._steps[index] = Type.of_step(self.output(index), command=command, published=published)
        return self._steps[index]

    @cached_property
    def inputs(self) -> Type:
        """Return the type of `inputs`."""
        declared = self.layout.workflow.inputs
        fields = {name: Type.from_schema({**schema, "required": []}) for name, schema in declared.items()}
        return Type("object", fields=fields)

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def meaning(self, owner: int, path: Path, *, until: bool = False) -> Meaning:
        """Return the meaning of a path's root in the expressions of the node `owner`.

        `until`: in the loop's `until:`, which is read after an iteration, not before the step.  Raises Unknown.
        """
        name = path.root
        if found := self._local(owner, name):
            return found
        if self.lenient and (found := self._old(owner, name)):
            return found
        if name in self.layout.ids:
            index = self.layout.ids[name]
            return self._step(owner, index, until=until)
        if found := self._root(owner, path, until=until):
            return found
        if self.lenient and name in self.layout.workflow.inputs:
            return Meaning(Ref("input", field=name), kinds.ANY)
        raise self._nothing(owner, name)

    def _local(self, owner: int, name: str) -> Meaning | None:
        """Resolve a name that an enclosing map or loop defines."""
        role = ""
        for draft in self.layout.ancestors(owner):
            step = draft.step
            if draft.kind is Kind.MAP and step is not None and step.map is not None:
                if role == "item" and (name == step.map.as_ or (self.lenient and name == "item")):
                    return Meaning(Ref("item", draft.index), self.items.get(draft.index, kinds.ANY))
                if role == "reduce" and name in (("results", "items", "map_results") if self.lenient else ("results",)):
                    kind = self._body_output(self.layout.drafts[draft.bodies["item"][0]])
                    failing = step.map.on_item_failure == "continue"
                    return Meaning(Ref("results", draft.index), Type("list", item=kinds.ANY if failing else kind))
            if name == "index" and role in ("item", "body") and "index" not in self.layout.ids:
                return Meaning(Ref("index", draft.index), kinds.INT)
            role = draft.role
        return None

    def _old(self, owner: int, name: str) -> Meaning | None:
        """Resolve a name of an older file that takes precedence over step ids: published names, then inputs."""
        publishers = self.layout.publishers.get(name)
        if publishers:
            others = [index for index in publishers if not self._inside(owner, index) and self._reachable(owner, index)]
            before = [index for index in others if self._comes_before(index, owner)] or others
            if before:
                last = before[-1]
                more = tuple(reversed(before[:-1]))
                if last > owner and self._repeated(owner, last):
                    return Meaning(Ref("published", last, name), kinds.ANY)
                return Meaning(Ref("published", last, name, more), kinds.ANY, list(before))
            again = [index for index in publishers if self._repeated(owner, index)]
            if again:
                return Meaning(Ref("published", again[0], name), kinds.ANY)
        if name in self.layout.workflow.inputs and name not in self.layout.ids:
            return Meaning(Ref("input", field=name), kinds.ANY)
        return None

    def _repeated(self, owner: int, index: int) -> bool:
        """Whether both are in the body of one loop, so that the previous iteration may have published the name."""
        around = set(self.layout.path(index))
        loops = [draft for draft in self.layout.ancestors(owner) if draft.kind is Kind.LOOP]
        return any(loop.index in around and loop.index != owner for loop in loops)

    def _reachable(self, owner: int, index: int) -> bool:
        try:
            self.edge(owner, index, until=True)
        except Unknown:
            return False
        return True

    def _inside(self, owner: int, index: int) -> bool:
        return any(draft.index == index for draft in self.layout.ancestors(owner))

    def _comes_before(self, index: int, owner: int) -> bool:
        return self.layout.drafts[index].place < self.layout.drafts[owner].place or not self.layout.drafts[owner].place

    def _root(self, owner: int, path: Path, *, until: bool) -> Meaning | None:
        match path.root:
            case "inputs":
                return Meaning(Ref("input"), self.inputs)
            case "secrets":
                return Meaning(Ref("secret"), kinds.ANY)  # `build` checks the names of secrets
            case "run":
                return Meaning(Ref("run"), RUN)
            case "error":
                drafts = list(self.layout.ancestors(owner))
                if drafts[-1].phase == "main" and not any(draft.role == "fallback" for draft in drafts):
                    raise Unknown(
                        "`error` is only available in on_error, finally and fallback steps",
                        "A step's own error is `step.error`.",
                    )
                return Meaning(Ref("error"), _ERROR)
            case "results":
                raise Unknown(
                    "`results` is only available in a map's `reduce:`", "A map's own results are `id.output`."
                )
            case "steps":
                return self._by_key(owner, path, until=until)
        return None

    def _by_key(self, owner: int, path: Path, *, until: bool) -> Meaning:
        """Resolve `steps["run-tests"]`."""
        if not path.fields or not isinstance(path.fields[0], str):
            raise Unknown(
                "`steps` needs the id of a step, written out",
                'Write `steps["run-tests"].output`: dependencies are read from it.',
            )
        name = path.fields[0]
        if name not in self.layout.ids:
            raise Unknown(f"there is no step `{name}`", did_you_mean(name, self.layout.ids))
        index = self.layout.ids[name]
        found = self._step(owner, index, until=until)
        assert found.ref.node is not None
        ref = Ref("steps", nodes=(found.ref.node,))
        return Meaning(ref, Type("object", fields={name: found.type}), found.steps)

    def _step(self, owner: int, index: int, *, until: bool) -> Meaning:
        """Resolve a step's id.  In `until:` and inside its loop's body, the step's own id is the last iteration."""
        target = self.layout.drafts[index]
        kind = self.step_type(index)
        if self._inside(owner, index):
            for draft in self.layout.ancestors(owner):
                if draft.kind is Kind.LOOP and draft.step is target.step and (until or draft.index != owner):
                    return Meaning(Ref("step", draft.bodies["body"][0]), kind)
            if owner == index:
                raise Unknown(
                    f"step `{target.id}` refers to itself",
                    "Only a step with `loop:` can, to read its previous iteration.",
                )
            raise Unknown(
                f"this refers to `{target.id}`, the step that it is part of",
                "Refer to a step beside it, or to `error`.",
            )
        return Meaning(Ref("step", index), kind, [index])

    def _nothing(self, owner: int, name: str) -> Unknown:
        step = self.layout.drafts[owner].step
        if step is not None and step.map is not None and name == step.map.as_:
            return Unknown(
                f"`{name}` is not known here: condition and `over` are decided once, before the items",
                "Choose the items in `over:`, for example `{{plan.tasks.filter(t, t.open)}}`.",
            )
        known = [*self.layout.ids, "inputs", "run", "steps"]
        for draft in self.layout.ancestors(owner):
            container = self.layout.drafts[draft.container].step if draft.container is not None else None
            if draft.role == "item" and container is not None and container.map is not None:
                known.append(container.map.as_)
        if self.lenient:
            known += [*self.layout.publishers, *self.layout.workflow.inputs]
        hint = did_you_mean(name, known)
        if name in self.layout.workflow.inputs:
            hint = f"There is an input of that name: write `inputs.{name}`."
        elif name in ("True", "False", "None", "nil"):
            hint = f"Write `{ {'True': 'true', 'False': 'false'}.get(name, 'null') }`."
        return Unknown(f"there is nothing called `{name}`", hint)

    # ── edges ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def edge(self, owner: int, index: int, *, until: bool = False) -> Edge | None:
        """Return the edge that is required because `owner` needs the step `index`, or None if no edge is needed.

        If a step inside a group needs one outside, the group waits, and vice versa.  Raises Unknown if the step is not
        visible from there.
        """
        mine, theirs = self.layout.path(owner), self.layout.path(index)
        target = self.layout.drafts[index]
        depth = 0
        while depth < min(len(mine), len(theirs)) and mine[depth] == theirs[depth]:
            depth += 1
        if depth == len(theirs):
            raise Unknown(f"this step is part of `{target.id}` and cannot wait for it")
        if depth == len(mine):
            if until:
                return None  # it refers to the iteration that has just ended
            raise Unknown(
                f"`{target.id}` is inside `{self.layout.drafts[owner].id}`, which cannot wait for its own inner step"
            )
        after, before = self.layout.drafts[mine[depth]], self.layout.drafts[theirs[depth]]
        for inner in theirs[depth:]:
            self._visible(self.layout.drafts[inner], target)
        if after.role != before.role:
            raise Unknown(f"`{target.id}` is in another part of the same step and cannot be seen from here")
        if after.container is None and after.phase != before.phase:
            if after.kind is not Kind.END and PHASES.index(after.phase) < PHASES.index(before.phase):
                raise Unknown(f"`{target.id}` runs in `{before.phase}:`, after all of the steps")
            return None  # the engine's own joins separate the phases
        return Edge(after.index, before.index)

    def _visible(self, draft: Draft, target: Draft) -> None:
        container = self.layout.drafts[draft.container] if draft.container is not None else None
        if draft.role == "item" and container is not None:
            raise Unknown(
                f"`{target.id}` runs once for each item of `{container.id}`, so it has more than one result",
                f"`{container.id}.output` is the list of results.",
            )
        if draft.role == "fallback" and container is not None:
            raise Unknown(
                f"`{target.id}` only runs if `{container.id}` fails", f"`{container.id}.output` is what it gives."
            )
