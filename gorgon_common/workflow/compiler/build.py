"""Turns drafts into nodes: reads expressions, resolves names, draws edges, and reports all problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from gorgon_common.errors import Problem, WorkflowInvalid
from gorgon_common.workflow.compiler import checks, missing, specs
from gorgon_common.workflow.compiler.layout import PHASES, Draft, Layout, Place
from gorgon_common.workflow.compiler.names import RUN, Meaning, Names, Unknown
from gorgon_common.workflow.compiler.sources import Bare, Operations, Roles, Source
from gorgon_common.workflow.expressions import (
    Complaint,
    Expression,
    ExpressionSyntaxError,
    Path,
    Template,
    Type,
    check,
    check_condition,
    check_id,
    condition_expressions,
    did_you_mean,
    infer,
    parse_template,
)
from gorgon_common.workflow.expressions.types import ANY, STRING
from gorgon_common.workflow.plan import FORMAT, Dep, Join, Kind, Node, OnFailure, Plan, Ref
from gorgon_common.workflow.schema import StepBody, Workflow, refused_env

_LISTS = frozenset({"list", "object", "any"})


@dataclass(frozen=True, slots=True)
class Compiled:
    """The result of compiling a workflow: the plan if there is no error, and every problem, including warnings."""

    plan: Plan | None
    problems: list[Problem] = field(default_factory=list)


def compile_workflow(spec: Source | Workflow, *, roles: Roles, operations: Operations | None = None) -> Plan:
    """Return the Plan of a workflow.  Raises WorkflowInvalid with every problem found.

    `spec` is the loader's result, or a bare Workflow (its problems have no line).  `roles`: name or alias → Role.
    `operations`: name → operation, None if they are unknown.  `try_compile` also returns warnings.
    """
    made = try_compile(spec, roles=roles, operations=operations)
    if made.plan is None:
        raise WorkflowInvalid(made.problems)
    return made.plan


def try_compile(spec: Source | Workflow, *, roles: Roles, operations: Operations | None = None) -> Compiled:
    """Return the Plan with its warnings, or every problem if there is an error among them."""
    source: Source = Bare(spec) if isinstance(spec, Workflow) else spec
    builder = _Builder(source, roles, operations)
    plan = builder.plan()
    problems = sorted(builder.problems, key=lambda entry: (entry.line or 0, entry.column or 0))
    broken = any(problem.severity == "error" for problem in problems)
    return Compiled(None if broken else plan, problems)


class _Builder:
    def __init__(self, source: Source, roles: Roles, operations: Operations | None) -> None:
        self.source = source
        self.workflow = source.spec
        self.lenient = self.workflow.lenient
        self.roles = roles
        self.operations = operations
        self.layout = Layout(self.workflow)
        self.names = Names(self.layout, roles)
        self.known = frozenset({*self.layout.ids, *self.layout.item_names, "inputs", "secrets"})
        """Names that an expression could use somewhere in the file."""
        self.problems: list[Problem] = []
        self.unavailable: list[str] = []
        self.reads: list[missing.Read] = []
        self._told: set[tuple[Place, int | None, str]] = set()

    # ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def tell(
        self, message: str, place: Place, *, hint: str = "", offset: int | None = None, severity: str = "error"
    ) -> None:
        """Report a problem, once."""
        key = (place, offset, message)
        if key not in self._told:
            self._told.add(key)
            self.problems.append(self.source.problem(message, place, hint=hint, offset=offset, severity=severity))

    def tell_all(self, complaints: list[Complaint], place: Place) -> None:
        """Report type complaints; as warnings in older files, which were never checked."""
        severity = "warning" if self.lenient else "error"
        for complaint in complaints:
            at = (*place, *complaint.at)
            self.tell(complaint.message, at, hint=complaint.hint, offset=complaint.offset, severity=severity)

    # ── the plan ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self) -> Plan:
        """Return the plan; it is only usable if no error was reported."""
        defaults = self.workflow.defaults
        for draft in self.layout.drafts:
            if draft.step is not None:
                draft.spec = specs.spec_of(draft, defaults, self.roles, lenient=self.lenient)
        for draft in self.layout.drafts:
            if draft.step is not None:
                self.expressions(draft, draft.step)
        for draft in self.layout.drafts:
            if draft.step is not None and draft.outer:
                self.written_deps(draft, draft.step)
        for draft in self.layout.drafts:
            if draft.step is not None:
                self.standing(draft, draft.step)
                self.check_step(draft, draft.step)
        self.own_nodes()
        self.cycles()
        outputs, output_refs = self.outputs()
        self.concurrency()
        self.gaps()
        self.promises()
        workflow = self.workflow
        return Plan(
            format=FORMAT,
            name=workflow.name,
            nodes=tuple(self.node(draft) for draft in self.layout.drafts),
            top=self.layout.top,
            version=workflow.version,
            team=workflow.team,
            inputs=workflow.inputs,
            outputs=outputs,
            output_refs=output_refs,
            limits=workflow.limits.model_dump(exclude_none=True),
            concurrency=workflow.concurrency.model_dump(exclude_none=True) if workflow.concurrency else None,
            secrets=tuple(workflow.secrets),
            lenient=self.lenient,
            unavailable=tuple(self.unavailable),
        )

    def node(self, draft: Draft) -> Node:
        """Freeze a draft."""
        step = draft.step
        made = Node(
            id=draft.id,
            kind=draft.kind,
            deps=tuple(Dep(index, order) for index, order in sorted(draft.deps.items())),
            join=draft.join,
            spec=draft.spec,
            refs=dict(sorted(draft.refs.items())),
            container=draft.container,
            bodies={role: tuple(body) for role, body in draft.bodies.items()},
            phase=draft.phase,
        )
        if step is None:
            return made
        defaults = self.workflow.defaults
        return replace(
            made,
            queue=specs.queue_of(draft, draft.spec),
            join=self.join(step) if draft.outer else Join.ALL_SUCCESS,
            condition=self.condition(step) if draft.outer else None,
            retry=specs.retry_of(draft, defaults, self.operations),
            on_failure=specs.on_failure_of(step, defaults, self.roles) if draft.outer else OnFailure(),
            timeout=specs.timeout_of(draft, defaults),
            deadline=(step.deadline or defaults.deadline) if draft.outer else None,
            publishes=tuple(step.publishes) if draft.outer else (),
        )

    def join(self, step: StepBody) -> Join:
        """Return the join rule.  Older files do not propagate skips: the successors of a skipped step run."""
        join = Join(step.join)
        return Join.NONE_FAILED if self.lenient and join is Join.ALL_SUCCESS else join

    @staticmethod
    def condition(step: StepBody) -> Any:
        """Return the canonical condition of a step."""
        if step.when is not None:
            return step.when
        return step.condition.plain() if step.condition is not None else None

    # ── expressions ──────────────────────────────────────────────────────────────────────────────────────────────────

    def expressions(self, draft: Draft, step: StepBody) -> None:
        """Read every expression of a node: refs, edges and complaints."""
        if draft.outer:
            if step.when is not None:
                self.read_condition(draft, step.when, (*draft.place, "when"))
            if step.condition is not None:
                self.read_condition(draft, step.condition.plain(), (*draft.place, "condition"))
        if draft.kind is Kind.LOOP:
            self.read_condition(draft, draft.spec["until"], (*draft.place, "loop", "until"), until=True)
        for at, value in specs.texts(draft):
            place = (*draft.place, *at)
            for inner, template in self.templates(value, place, step):
                types = self.read(draft, template, inner, secrets=at[0] in ("with", "env"))
                self.tell_all(check(template, types), inner)
                if at == ("cwd",):
                    self.fixed_folder(template, inner)
                if at == inner[len(draft.place) :] == ("map", "over"):
                    self.over(draft, template, types, inner)
            if at in (("map", "over"), ("aggregate", "from")):
                self.forgotten_braces(value, place)
            if at == ("aggregate", "from") and isinstance(value, list):
                self.joined_texts(value, place)
        if draft.kind is Kind.COMMAND:
            self.command(draft, step)

    def forgotten_braces(self, value: Any, place: Place) -> None:
        """Report a text where a list belongs; it is usually an expression without its braces."""
        if isinstance(value, str) and not self.lenient and "{{" not in value:
            hint = f'Write it as an expression: "{{{{{value.strip()}}}}}".'
            self.tell(f"`{place[-1]}` needs a list, and this is a text", place, hint=hint)

    def joined_texts(self, values: list[Any], place: Place) -> None:
        """Report a plain text in an `aggregate` list; it is neither a step nor clearly meant as text."""
        for number, value in enumerate(values):
            if isinstance(value, str) and not self.lenient and "{{" not in value:
                hint = f'Name a step, or write {{{{ "{value}" }}}} where the text itself is meant.'
                self.tell(f"`{value}` is not the name of a step", (*place, number), hint=hint)

    def templates(self, value: Any, place: Place, step: StepBody | None = None) -> Iterator[tuple[Place, Template]]:
        """Yield every text with an expression in a nested value (of a step)."""
        if isinstance(value, str):
            try:
                template = parse_template(value, self.lenient)
            except ExpressionSyntaxError as error:
                self.tell(error.message, place, hint=error.hint, offset=error.offset)
                return
            if not self.lenient:
                self.other_notations(template, place, step)
            if not template.is_literal:
                yield place, template
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                yield from self.templates(entry, (*place, str(key)), step)
        elif isinstance(value, (list, tuple)):
            for index, entry in enumerate(value):
                yield from self.templates(entry, (*place, index), step)

    def other_notations(self, template: Template, place: Place, step: StepBody | None) -> None:
        """Report references in other notations, `${x}` and `{inputs.x}`, which would silently remain text."""
        known, inputs = self.known, self.workflow.inputs
        if step is not None and (place[-1] == "stdin" or "run" in place[-2:]):
            found = checks.command_literal_findings(template, known, inputs, step.env)
        else:
            found = checks.literal_findings(template, known, inputs)
        for finding in (*found, *checks.single_findings(template, known, inputs)):
            self.tell(finding.message, place, hint=finding.hint, offset=finding.offset)

    def read(
        self,
        draft: Draft,
        expression: Expression | Template,
        place: Place,
        *,
        secrets: bool = False,
        until: bool = False,
        needed: set[int] | None = None,
    ) -> dict[str, Type]:
        """Resolve the names of an expression; return their types.

        `needed`: for a condition, the offsets of the names that it reads in any case.
        """
        types: dict[str, Type] = {}
        certain = missing.certain_paths(expression) if needed is None else needed
        for path in expression.paths:
            if path.root == "secrets" and "secrets" not in self.layout.ids:
                self.secret(path, place, allowed=secrets)
            try:
                meaning = self.names.meaning(draft.index, path, until=until)
                self.connect(draft, meaning, until=until)
            except Unknown as unknown:
                self.tell(unknown.message, place, hint=unknown.hint, offset=path.offset)
                continue
            self.bind(draft.refs, types, path.root, meaning)
            if path.offset in certain:
                condition = needed is not None
                self.reads.append(missing.Read(draft.index, path, meaning.ref, place, condition, until))
        return types

    @staticmethod
    def bind(refs: dict[str, Ref], types: dict[str, Type], name: str, meaning: Meaning) -> None:
        """Record the meaning of a name; `steps` collects every step that is reached through it."""
        ref, kind = meaning.ref, meaning.type
        if ref.kind == "steps":
            if name in refs:
                ref = replace(ref, nodes=tuple(sorted({*refs[name].nodes, *ref.nodes})))
            if name in types:
                kind = Type("object", fields={**(types[name].fields or {}), **(kind.fields or {})})
        refs[name] = ref
        types[name] = kind

    def connect(self, draft: Draft, meaning: Meaning, *, until: bool = False) -> None:
        """Draw the edges that the use of a name requires.  Raises Unknown."""
        for index in meaning.steps:
            edge = self.names.edge(draft.index, index, until=until)
            if edge is not None:
                deps = self.layout.drafts[edge.after].deps
                deps[edge.before] = deps.get(edge.before, True) and self.lenient

    def secret(self, path: Path, place: Place, *, allowed: bool) -> None:
        """Check that a secret is declared and used only where secrets are allowed."""
        if not allowed:
            self.tell(
                f"`{path}` would put a secret where it can be read: into a text, a condition or a model's prompt",
                place,
                hint="Secrets may stand under `with:` and `env:` only.",
                offset=path.offset,
            )
        elif not path.fields:
            self.tell("`secrets` needs a name: `secrets.GITHUB_TOKEN`", place, offset=path.offset)
        elif path.fields[0] not in self.workflow.secrets:
            hint = did_you_mean(str(path.fields[0]), self.workflow.secrets, none="")
            hint = hint or f"Declare it at the top of the file: `secrets: [{path.fields[0]}]`."
            self.tell(f"the secret `{path.fields[0]}` is not declared", place, hint=hint, offset=path.offset)

    def read_condition(self, draft: Draft, condition: Any, place: Place, *, until: bool = False) -> None:
        """Resolve and check a condition."""
        types: dict[str, Type] = {}
        try:
            needed = dict(missing.certain_fields(condition, legacy=self.lenient))
            for at, expression in condition_expressions(condition, self.lenient):
                types.update(self.read(draft, expression, (*place, *at), until=until, needed=needed.get(at, set())))
                self.exit_codes(expression, (*place, *at))
            complaints = check_condition(condition, types, legacy=self.lenient)
        except ExpressionSyntaxError as error:
            self.tell(error.message, (*place, *error.at), hint=error.hint, offset=error.offset)
            return
        self.tell_all(complaints, place)

    def exit_codes(self, expression: Expression | Template, place: Place) -> None:
        """Report a condition on an exit code that is always 0, because a non-zero exit of that command ends the run."""
        for path in expression.paths:
            index = self.layout.ids.get(path.root)
            if index is None or path.fields != ("exit_code",) or self.lenient:
                continue
            step = self.layout.innermost(index).step
            if (
                step is not None
                and step.action == "run"
                and not step.allow_failure
                and step.on_failure in (None, "abort")
            ):
                self.tell(
                    f"`{path}` is always 0 here: another exit code fails step `{path.root}` and ends the run",
                    place,
                    hint=f"Add `allow_failure: true` to `{path.root}`.",
                    offset=path.offset,
                    severity="warning",
                )

    def over(self, draft: Draft, template: Template, types: Mapping[str, Type], place: Place) -> None:
        """Check that `over` gives a list; its item type becomes the type of the `as:` name."""
        kind = infer(template, types)
        kind = kind.output or ANY if kind.kind == "step" else kind
        if kind.kind not in _LISTS and not self.lenient:
            hint = '`lines(x)` and `split(x, ",")` make a list of a text.' if kind.kind == "string" else ""
            self.tell("`over` needs a list", place, hint=hint)
        if kind.kind == "object":
            self.names.items[draft.index] = Type("object", fields={"key": STRING, "value": ANY})
        elif kind.item is not None:
            self.names.items[draft.index] = kind.item

    def fixed_folder(self, template: Template, place: Place) -> None:
        """Report a model's output that decides where a command runs, since programs and settings may be found there."""
        for path in template.paths:
            if path.root != "inputs":
                hint = 'Write the folder out, or take it from an input: cwd: "{{inputs.folder}}".'
                self.tell(f"`{path}` may not decide the folder of a command", place, hint=hint, offset=path.offset)

    def command(self, draft: Draft, step: StepBody) -> None:
        """Check that a command's program is fixed; values may only be arguments, environment or input."""
        found = specs.relative_path(step) if step.cwd is None and not self.lenient else None
        if found is not None:
            at, path = found
            hint = (
                "Add `cwd: .` to start it in the folder of the worker (or of `gorgon run`), or write an absolute path."
            )
            message = f"`{path}` is a relative path, and a command without `cwd:` starts in a new, empty folder"
            self.tell(message, (*draft.place, *at), hint=hint, severity="warning")
        if step.shell is None:
            argv = step.run if isinstance(step.run, list) else []
            filled = ["{{" in argument or (self.lenient and "${" in argument) for argument in argv]
            for at, message, hint in specs.command_faults(step, filled):
                self.tell(message, (*draft.place, *at), hint=hint)
            return
        known = {**self.workflow.inputs, **self.layout.publishers}
        exports = {}
        for name in specs.shell_names(step.shell, known):
            place = (*draft.place, "run")
            if refused_env(name):
                hint = "Rename it: as an environment variable it would change what the command is."
                self.tell(f"the command refers to `{name}`, a name that may not be exported", place, hint=hint)
                continue
            if name in self.layout.publishers:
                try:
                    meaning = self.names.meaning(draft.index, Path(name, (), 0))
                    self.connect(draft, meaning)
                except Unknown as unknown:
                    self.tell(unknown.message, place, hint=unknown.hint)
                    continue
                draft.refs[name] = meaning.ref
            else:
                draft.refs[name] = Ref("input", field=name)
            exports[name] = name
        if exports:
            draft.spec = {**draft.spec, "exports": exports}

    # ── Written dependencies and keys ────────────────────────────────────────────────────────────────────────────────

    def written_deps(self, draft: Draft, step: StepBody) -> None:
        """Draw the edges of `depends_on`, and the file order of older files."""
        for number, name in enumerate(step.depends_on):
            self.dependency(draft, name, (*draft.place, "depends_on", number), order=False)
        for name in step.order_after:
            self.dependency(draft, name, draft.place, order=True)

    def dependency(self, draft: Draft, name: str, place: Place, *, order: bool) -> None:
        """Draw one written edge."""
        if name not in self.layout.ids:
            hint = did_you_mean(name, [known for known in self.layout.ids if known != draft.id])
            self.tell(f"there is no step `{name}` to depend on", place, hint=hint)
            return
        if self.layout.ids[name] == draft.index:
            self.tell(f"step `{name}` depends on itself", place, hint="Remove it from `depends_on`.")
            return
        try:
            edge = self.names.edge(draft.index, self.layout.ids[name])
        except Unknown as unknown:
            self.tell(unknown.message, place, hint=unknown.hint)
            return
        if edge is not None:
            deps = self.layout.drafts[edge.after].deps
            deps[edge.before] = order and deps.get(edge.before, True)

    def standing(self, draft: Draft, step: StepBody) -> None:
        """Give an agent with a role but no prompt the role's task; inputs, item and outputs are its material."""
        if draft.kind is not Kind.AGENT or step.prompt is not None:
            return
        context: list[str] = []
        given: list[str] = []
        if self.workflow.inputs and "inputs" not in self.layout.ids:
            given.append("inputs")
            draft.refs["inputs"] = Ref("input")
        for outer in self.layout.ancestors(draft.index):
            around = self.layout.drafts[outer.container] if outer.container is not None else None
            if around is not None and around.step is not None and around.step.map is not None:
                name, kind = (around.step.map.as_, "item") if outer.role == "item" else ("results", "results")
                if outer.role in ("item", "reduce") and name not in draft.refs:
                    draft.refs[name] = Ref(kind, around.index)
                    given.append(name)
            for index in sorted(outer.deps):
                before = self.layout.drafts[index]
                if before.step is not None and before.id not in context:
                    context.append(before.id)
                    draft.refs.setdefault(before.id, Ref("step", index))
            if outer.outer and outer.deps:
                break
        found = {"context": context, "given": given}
        draft.spec = {**draft.spec, **{name: names for name, names in found.items() if names}}

    def check_step(self, draft: Draft, step: StepBody) -> None:
        """Report contradictions in a step, and features that cannot run yet."""
        if draft.kind is Kind.MAP and step.map is not None and not self.lenient:
            self.item_name(draft, step.map.as_)
        if draft.outer:
            self.keys(draft, step)
        if not draft.inner:
            return
        if draft.kind is Kind.APPROVAL and not any(outer.deps for outer in self.layout.ancestors(draft.index)):
            self.tell(
                f"the approval `{draft.id}` depends on nothing, so it would ask as soon as the run starts",
                (*draft.place, "approval"),
                hint="Name the step whose result is to be approved in `depends_on:`.",
                severity="warning" if self.lenient else "error",
            )
        if draft.kind is Kind.AGENT:
            self.agent(draft, step)
        hidden = sorted(set(_fields(draft)) & {"output", "status", "error"})
        for name in hidden:
            self.tell(
                f"the output field `{name}` is hidden by the step's own `{name}`",
                (*draft.place, "output") if step.output else draft.place,
                hint=f"It is reached as `{draft.id}.output.{name}`.",
                severity="warning",
            )
        reason = _unavailable(draft, step)
        if reason:
            self.unavailable.append(reason)
            self.tell(reason, draft.place, hint="`gorgon run` refuses the workflow until then.", severity="warning")

    def keys(self, draft: Draft, step: StepBody) -> None:
        """Report keys of a step that have no effect; as warnings in older files, which were never checked."""
        retry = specs.retry_of(self.layout.innermost(draft.index), self.workflow.defaults, self.operations)
        for finding in (*checks.key_findings(draft, step, retry), *(() if self.lenient else checks.unfilled(step))):
            severity = "warning" if self.lenient else finding.severity
            self.tell(finding.message, (*draft.place, *finding.place), hint=finding.hint, severity=severity)

    def unenforced(self, what: str, place: Place) -> None:
        """Warn of a key that is accepted but not enforced yet: a limit without effect must not go unnoticed."""
        if not self.lenient:
            self.tell(f"`{what}` has no effect yet", place, hint="The workflow runs without it.", severity="warning")

    def promises(self) -> None:
        """Warn of workflow-level features that do nothing yet."""
        if self.workflow.triggers:
            self.unenforced("triggers", ("triggers",))
        if self.workflow.limits.on_budget == "approve":
            finding = checks.APPROVES_NOT
            self.tell(finding.message, ("limits", "on_budget"), severity=finding.severity)
        if not self.lenient:
            for finding in (*checks.default_findings(self.workflow.defaults), *checks.unfilled_inputs(self.workflow)):
                self.tell(finding.message, finding.place, hint=finding.hint, severity=finding.severity)

    def item_name(self, draft: Draft, name: str) -> None:
        """Check that the `as:` name is a valid id and hides no other name."""
        place = (*draft.place, "map", "as")
        wrong = check_id(name)
        if wrong:
            self.tell(wrong, place)
        elif name in self.layout.ids:
            hint = "Choose another name: inside the map the step could not be reached."
            self.tell(f"`{name}` is the id of a step already", place, hint=hint)

    def agent(self, draft: Draft, step: StepBody) -> None:
        """Check the roles and tools of an agent step."""
        if step.role and step.role not in self.roles:
            hint = did_you_mean(step.role, self.roles)
            self.tell(f"there is no role `{step.role}`", (*draft.place, "role"), hint=hint)
        elif step.role and step.tools:
            allowed = list(self.roles[step.role].allowed_tools)
            for number, tool in enumerate(step.tools):
                if tool not in allowed:
                    hint = did_you_mean(tool, allowed, none="This role uses no tools.")
                    self.tell(
                        f"the role `{step.role}` may not use `{tool}`", (*draft.place, "tools", number), hint=hint
                    )
        if step.prompt is None and not step.role:
            self.tell("an agent step needs a `prompt` or a `role`", draft.place)

    # ── the engine's own nodes ───────────────────────────────────────────────────────────────────────────────────────

    def own_nodes(self) -> None:
        """Join the phases: `$gate` after the steps, `$finally` after on_error, `$end` after finally."""
        layout = self.layout
        joins = {"main": layout.gate, "on_error": layout.last, "finally": layout.end}
        before: int | None = None
        for phase in PHASES:
            steps = [d for d in layout.drafts[: layout.top] if d.step is not None and d.phase == phase]
            for draft in steps:
                if before is not None:
                    draft.deps.setdefault(before, True)
            followed = {index for draft in steps for index in draft.deps}
            join = layout.drafts[joins[phase]]
            join.deps = {draft.index: False for draft in steps if draft.index not in followed}
            if before is not None and not join.deps:
                join.deps = {before: False}
            before = join.index

    def cycles(self) -> None:
        """Report every cycle, one per set of steps that may depend on each other."""
        for body in self.layout.bodies_of_siblings():
            sorter = TopologicalSorter({index: list(self.layout.drafts[index].deps) for index in body})
            try:
                sorter.prepare()
            except CycleError as error:
                found = [self.layout.drafts[index] for index in reversed(error.args[1])]
                first = min(range(len(found) - 1), key=lambda position: found[position].index)
                ring = [*found[first:-1], *found[:first], found[first]]
                told = " → ".join(draft.id for draft in ring)
                hint = "Each waits for the one after it; remove one `depends_on` or one reference."
                loops = [draft for draft in self.layout.ancestors(ring[0].index) if draft.kind is Kind.LOOP]
                if loops:
                    name = f"{loops[0].id}.output.{ring[1].id}"
                    hint += f" The output of a step in the previous iteration is `default({name}, '')`."
                self.tell(f"the steps wait for each other in a circle: {told}", ring[0].place, hint=hint)

    # ── outputs and concurrency key ──────────────────────────────────────────────────────────────────────────────────

    def outputs(self) -> tuple[dict[str, Any], dict[str, Ref]]:
        """Read the workflow's outputs.  In older files, a name that nothing publishes is null, with a warning."""
        end = self.layout.drafts[self.layout.end]
        made: dict[str, Any] = {}
        for name, value in self.workflow.outputs.items():
            place: Place = ("outputs", name)
            made[name] = value
            if self.lenient and self.unpublished(value):
                self.tell(f"no step publishes `{name}`: this output will be null", place, severity="warning")
                made[name] = None
                continue
            for inner, template in self.templates(value, place):
                deps = dict(end.deps)
                types = self.read(end, template, inner)
                end.deps = deps  # `$end` comes after everything anyway
                self.tell_all(check(template, types), inner)
        refs, end.refs = end.refs, {}
        return made, dict(sorted(refs.items()))

    def gaps(self) -> None:
        """Report values that may not exist when they are read; in older files, such values render as nothing."""
        if self.lenient:
            return
        for gap in missing.Gaps(self.layout).find(self.reads):
            read = gap.read
            self.tell(gap.message, read.place, hint=gap.hint, offset=read.path.offset, severity=gap.severity)

    def unpublished(self, value: Any) -> bool:
        """Whether an older file's output refers to something that does not exist."""
        if not isinstance(value, str):
            return value is None
        template = parse_template(value, True)
        known = {*self.layout.publishers, *self.layout.ids, *self.workflow.inputs, "inputs", "steps", "run"}
        return not template.names <= known

    def concurrency(self) -> None:
        """Check the concurrency key, which is rendered before the run and can only use inputs and the run."""
        if self.workflow.concurrency is None:
            return
        place: Place = ("concurrency", "key")
        for inner, template in self.templates(self.workflow.concurrency.key, place):
            for path in template.paths:
                self.key_path(path, inner)
            self.tell_all(check(template, {"inputs": self.names.inputs, "run": RUN}), inner)
        if not self.workflow.concurrency.key.strip():
            self.tell("the concurrency key is empty", place, hint='Write a name, or "{{inputs.name}}".')

    def key_path(self, path: Path, place: Place) -> None:
        """Report values that a key cannot contain, or that would make it useless."""
        bare = self.lenient and path.root in self.workflow.inputs
        if path.root not in ("inputs", "run") and not bare:
            hint = "Write `inputs.name`: the key is needed before any step has run."
            if path.root == "secrets":
                hint = "The key is stored and shown to people, so it cannot contain this."
            self.tell(f"`{path.root}` cannot be part of the key", place, hint=hint, offset=path.offset)
        field = path.fields[0] if path.fields else None
        if path.root == "run" and field in (None, "id", "started_at"):
            hint = "Leave it out: runs that are to wait for each other need the same key."
            told = f"`{path}` differs from run to run, so no run would ever wait"
            self.tell(told, place, hint=hint, offset=path.offset)


def _fields(draft: Draft) -> Mapping[str, Any]:
    schema = draft.spec.get("schema")
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _unavailable(draft: Draft, step: StepBody) -> str | None:
    """Return why a step cannot run yet, in one sentence."""
    told = f"step `{draft.id}`"
    match draft.kind:
        case Kind.ACTION if str(step.uses).startswith("mcp."):
            return f"{told} uses {step.uses}: MCP is not available yet"
        case Kind.ACTION:
            return f"{told} uses {step.uses}: integrations are not available yet"
        case Kind.APPROVAL:
            return f"{told} waits for an approval: approvals are not available yet"
        case Kind.WORKFLOW:
            return f"{told} runs the workflow {step.workflow}: sub-workflows are not available yet"
        case Kind.AGENT if step.tools:
            return f"{told} gives the model tools: tools are not available yet"
    return None
