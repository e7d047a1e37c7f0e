"""The workflow file as pydantic models: the only definition of the file format.

The same models validate a file and produce the JSON Schema for editors (`json_schema`).  The schema is closed: an
unknown key is an error with a suggestion.  Sugar is folded while a model is built, so that code reading a `Workflow`
sees only one form:

==============================  ==========================================================================
written                         read
==============================  ==========================================================================
`timeout: 5m`, `24h`, `90`      seconds, as a float
`depends_on: plan`              `depends_on == ["plan"]`
`model: x`                      `models == ["x"]`
`max_retries: 3`                `retry.max == 3`
`on_failure: retry`             `retry.max` (3 if the step sets no number) and `on_failure` = `then` or `abort`
`on_failure: continue_with_default`, `default_output: v`
                                `on_failure == "fallback"`, `fallback == {type: default_value, value: v}`
`run: "text"`                   `shell == "text"`, `run is None`
`wait: 10m`                     `wait.duration == 600.0`
`approval: "Ship it?"`          `approval.message == "Ship it?"`
`cache: 24h`                    `cache.ttl == 86400.0`
`min_success: 90%`              `min_success == 0.9`
`inputs: {n: {type: string}}`   a JSON Schema, with an added `required: true | false`
`output: {approved: boolean}`   a JSON Schema
==============================  ==========================================================================

All problems of a mapping are reported at once: unknown keys, wrong values and conflicting keys.  The loader adds their
positions in the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)
from pydantic_core import InitErrorDetails

from gorgon_common.workflow.environment import refused_variable
from gorgon_common.workflow.schema_base import Closed, fault, refuse, suggest
from gorgon_common.workflow.schema_fields import JSON_TYPES, Inputs, Output, input_schemas, output_schema
from gorgon_common.workflow.schema_values import (
    DURATION_SCHEMA,
    Argument,
    Count,
    Duration,
    Money,
    Names,
    Share,
    Text,
    duration,
    on_missing_word,
    trust_reason,
)

__all__ = [
    "ACTIONS",
    "JSON_TYPES",
    "OPERATORS",
    "PROVIDERS",
    "Step",
    "StepBody",
    "Workflow",
    "duration",
    "input_schemas",
    "json_schema",
    "output_schema",
    "refused_env",
    "suggest",
]

PROVIDERS = ("anthropic", "openai")
OPERATORS = (
    "equals",
    "not_equals",
    "contains",
    "greater_than",
    "less_than",
    "greater_or_equal",
    "less_or_equal",
    "in",
    "matches",
    "exists",
    "is_empty",
    "not_empty",
)
UNARY_OPERATORS = frozenset({"exists", "is_empty", "not_empty"})
ACTIONS = ("prompt", "uses", "run", "workflow", "approval", "wait", "aggregate", "checkpoint", "steps")
SCHEMA_ID = "urn:gorgon:workflow"

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


# ── Conditions ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Condition(Closed):
    """`{field, operator, value, on_missing}`, or one of `all:`, `any:`, `not:` over more of them."""

    noun = "a condition"

    field: Text | None = Field(None, description="What to look at, such as plan.approved.")
    operator: Literal[OPERATORS] | None = Field(None, description="How to compare.")  # type: ignore[valid-type]
    value: Any = Field(None, description="What to compare with; exists, is_empty and not_empty take none.")
    on_missing: Annotated[
        Literal["error", "false"] | None,
        BeforeValidator(on_missing_word),
        WithJsonSchema({"enum": ["error", "false", False]}),
    ] = Field(None, description="What a missing or null field means: error (default) or false.")
    all: list[Condition] | None = Field(None, min_length=1, description="True when every one of these is.")
    any: list[Condition] | None = Field(None, min_length=1, description="True when at least one of these is.")
    not_: Condition | None = Field(None, alias="not", description="True when this is false.")

    @classmethod
    def _sugar(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise refuse("`condition` must be a mapping", f"Write it as an expression instead: when: {value}")
        return value

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        forms = [key for key in ("field", "all", "any", "not") if key in value]
        if len(forms) != 1:
            told = "has none of" if not forms else "mixes"
            named = ", ".join(f"`{key}`" for key in (forms or ["field", "all", "any", "not"]))
            hint = "Write {field: plan.approved, operator: equals, value: true}, or all:/any: with a list of such."
            yield fault(f"the condition {told} {named}", *forms[1:2], hint=hint, value=value)
        if forms != ["field"]:
            for key in ("operator", "value", "on_missing"):
                if forms and key in value and "field" not in forms:
                    yield fault(f"`{key}` belongs beside `field`", key, key=True, value=value[key])
            return
        operator = value.get("operator")
        if operator is None:
            hint = "Add operator: equals and value: …, or operator: exists."
            yield fault("`operator` is missing in a condition", hint=hint, value=value)
        elif operator in OPERATORS and operator not in UNARY_OPERATORS and "value" not in value:
            yield fault(f"`value` is missing: what should `{value['field']}` be compared with?", value=value)

    def plain(self) -> dict[str, Any]:
        """Return the condition as plain data, as the Plan carries it."""
        if self.all is not None:
            return {"all": [entry.plain() for entry in self.all]}
        if self.any is not None:
            return {"any": [entry.plain() for entry in self.any]}
        if self.not_ is not None:
            return {"not": self.not_.plain()}
        made: dict[str, Any] = {"field": self.field, "operator": self.operator}
        if "value" in self.model_fields_set:
            made["value"] = self.value
        return {**made, "on_missing": self.on_missing or "error"}


def _text_or_condition(value: Any) -> str:
    return "<expression>" if isinstance(value, str) else "<condition>"


def _text_or_argv(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<argv>"


Until = Annotated[
    Annotated[Text, Tag("<expression>")] | Annotated[Condition, Tag("<condition>")], Discriminator(_text_or_condition)
]


# ── Parts of a step ───────────────────────────────────────────────────────────────────────────────────────────────────

RetryOn = Literal["timeout", "server", "connection", "invalid_output", "exit_code"]


class Retry(Closed):
    """Attempts after the first."""

    noun = "`retry`"

    max: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="How many attempts after the first.")
    backoff: Literal["exponential", "fixed"] = Field("exponential", description="How the wait between attempts grows.")
    initial: Duration = Field(2.0, description="The first wait.")
    cap: Duration = Field(60.0, description="The longest wait.")
    jitter: Literal["full", "none"] = Field("full", description="Spread the waits so that steps do not retry together.")
    on: list[RetryOn] = Field(
        ["timeout", "server", "connection", "invalid_output", "exit_code"],
        min_length=1,
        description="The kinds of failure that are worth another attempt.",
    )

    @classmethod
    def _sugar(cls, value: Any) -> Any:
        return {"max": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Approval(Closed):
    """Waits for a person without occupying a worker."""

    noun = "`approval`"

    message: Text = Field(description="What the person is asked.")
    approvers: Names = Field([], description="Who may answer: role:NAME, team:NAME or a user.")
    timeout: Duration | None = Field(None, description="How long to wait for an answer.")
    on_timeout: Literal["fail", "approve", "reject", "skip"] = Field("fail", description="What no answer means.")
    preview: Any = Field(None, alias="$preview", description="Older files: what the person is shown.")

    @classmethod
    def _sugar(cls, value: Any) -> Any:
        return {"message": value} if isinstance(value, str) else value


class Wait(Closed):
    """Waits for a time or an event without occupying a worker."""

    noun = "`wait`"

    duration: Duration | None = Field(None, alias="for", description="How long.")
    until: Text | None = Field(None, description="A point in time (RFC 3339), or an expression that gives one.")
    event: Text | None = Field(None, description="The name of an event.")
    timeout: Duration | None = Field(None, description="How long to wait for the event.")

    @classmethod
    def _sugar(cls, value: Any) -> Any:
        return {"for": value} if isinstance(value, int | float | str) and not isinstance(value, bool) else value

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        forms = [key for key in ("for", "until", "event") if key in value]
        if len(forms) != 1:
            hint = "Write wait: 10m, wait: {until: TIME} or wait: {event: NAME, timeout: 24h}."
            yield fault("`wait` needs one of a duration, `until` or `event`", *forms[1:2], hint=hint, value=value)
        elif "timeout" in value and forms != ["event"]:
            yield fault("`timeout` of a wait goes with `event`", "timeout", key=True, value=value["timeout"])


class Aggregate(Closed):
    """Combines results without a model."""

    noun = "`aggregate`"

    from_: Any = Field(alias="from", description='The list to join, such as "{{build.output}}" or [plan, build].')
    how: Literal["concat", "json", "vote", "first", "merge"] = Field(
        "concat", description="concat: text after text; json: one list; vote: the most frequent; merge: one object."
    )


class Loop(Closed):
    """Repeats the step until a condition holds."""

    noun = "`loop`"

    until: Until = Field(description="An expression or a condition; the step's own id is its last iteration.")
    max: Annotated[int, Field(ge=1, le=1000)] = Field(5, description="The most iterations.")


class Cache(Closed):
    """Reuses an identical earlier call."""

    noun = "`cache`"

    ttl: Duration = Field(description="How old the earlier call may be.")

    @classmethod
    def _sugar(cls, value: Any) -> Any:
        return {"ttl": value} if isinstance(value, int | float | str) and not isinstance(value, bool) else value


class Map(Closed):
    """Runs the step once for each item of a list."""

    noun = "`map`"

    over: Any = Field(description='The list, such as "{{plan.tasks}}".')
    as_: Text = Field("item", alias="as", description="The name of the current item in expressions.")
    max_items: Annotated[int, Field(ge=1, le=100_000)] = Field(100, description="More items than this are an error.")
    max_parallel: Count | None = Field(None, description="How many items at a time.")
    on_item_failure: Literal["fail", "continue"] = Field("fail", description="What a failed item means for the rest.")
    min_success: Share | None = Field(None, description="The share of items that must succeed, such as 90%.")
    reduce: StepBody | None = Field(None, description="A step that reads {{results}}.")

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        if "over" in value and not isinstance(value["over"], str | list):
            hint = 'Write over: "{{plan.tasks}}" or a list.'
            yield fault("`over` must be an expression or a list", "over", hint=hint, value=value["over"])
        if "min_success" in value and value.get("on_item_failure", "fail") == "fail":
            hint = "Add on_item_failure: continue, or leave min_success out."
            yield fault("`min_success` has no effect while a failed item fails the step", "min_success", hint=hint)
        if isinstance(value.get("reduce"), dict):
            yield from _not_in_body(value["reduce"], "reduce")


class Fallback(Closed):
    """What stands in for the step when the retries are exhausted."""

    noun = "`fallback`"

    type: Literal["default_value", "alternate_step", "model"] = Field(description="What stands in.")
    value: Any = Field(None, description="default_value: the step's output.")
    step: StepBody | None = Field(None, description="alternate_step: the step, written here.")
    model: Text | None = Field(None, description="model: the other model, such as openai:gpt-6.")

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        needs = {"default_value": "value", "alternate_step": "step", "model": "model"}
        chosen = value.get("type")
        if not isinstance(chosen, str) or chosen not in needs:
            return
        if needs[chosen] not in value:
            yield fault(f"`fallback` of type `{chosen}` needs `{needs[chosen]}`", value=value)
        for key in set(needs.values()) - {needs[chosen]}:
            if key in value:
                yield fault(f"`{key}` does not go with a fallback of type `{chosen}`", key, key=True, value=value[key])
        if isinstance(value.get("step"), dict):
            yield from _not_in_body(value["step"], "step")


def _not_in_body(body: dict[str, Any], at: str) -> Iterator[InitErrorDetails]:
    for key in ("depends_on", "join", "map"):
        if key in body:
            yield fault(f"`{key}` has no meaning in a step written inside another", at, key, key=True, value=body[key])


class LegacyStep(Closed):
    """Properties of a step that only an older file can express."""

    publishes: list[str] = Field(default_factory=list)
    order_after: list[str] = Field(default_factory=list)
    max_parallel: int | None = None
    fail_fast: bool = False
    estimated_tokens: int | None = None


Run = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Argument], Field(min_length=1), Tag("<argv>")],
    Discriminator(_text_or_argv),
]


# ── A step ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_AGENT_ONLY = ("role", "provider", "model", "models", "system", "max_tokens", "effort", "tools")
_ELSEWHERE = {
    "type": "`type:` belongs to the older format, where every step has it. Name the action: prompt, uses, run, …",
    "params": "`params:` belongs to the older format. Write its keys on the step itself.",
    "needs": "Did you mean `depends_on`?",
    "after": "Did you mean `depends_on`?",
    "if": "Did you mean `when`?",
    "timeout_seconds": "Write timeout: 300s or timeout: 5m.",
    "command": "Write run: [program, argument, …].",
    "shell": "Write run: [program, argument, …].",
    "system_prompt": "Did you mean `system`?",
    "outputs": "A step has one `output:` with a schema, such as output: {approved: boolean}.",
    "retries": "Did you mean `max_retries`?",
    "for_each": "Did you mean `map`?",
    "foreach": "Did you mean `map`?",
    "name": "A step is named by its `id`.",
}


class StepBody(Closed):
    """One step: exactly one action, and modifiers.  A step inside another (`reduce:`, `fallback:`) needs no id."""

    noun = "a step"
    elsewhere = _ELSEWHERE

    id: Text | None = Field(None, description="The step's name: small letters, digits and _, unique in the file.")

    # Actions
    prompt: str | None = Field(None, description="What the model is asked. Without it, the role's standing task.")
    role: Text | None = Field(None, description="Who answers, such as planner; see `gorgon roles ls`.")
    provider: Literal[PROVIDERS] | None = Field(None, description="anthropic or openai.")  # type: ignore[valid-type]
    model: Text | None = Field(None, description="A model, such as claude-opus or openai:gpt-6.")
    models: list[Text] = Field([], description="Models in order: the next one when one cannot serve the call.")
    system: str | None = Field(None, description="Replaces the role's system prompt.")
    max_tokens: Count | None = Field(None, description="The longest reply, in tokens.")
    effort: Literal["low", "medium", "high"] | None = Field(None, description="How hard the model should think.")
    tools: list[Text] = Field([], description="Tools that the model may call.")
    uses: Text | None = Field(None, description="An operation of an integration, such as github.create_issue.")
    with_: dict[str, Any] = Field({}, alias="with", description="The arguments of `uses:` or `workflow:`.")
    run: Annotated[
        Run | None,
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "array", "minItems": 1, "items": {"type": ["string", "integer"]}},
                    {"type": "string", "minLength": 1},
                ]
            }
        ),
    ] = Field(None, description="A command as a list of arguments, run without a shell.")
    cwd: Text | None = Field(
        None, description="The folder that the command starts in; without it a new, empty one. `.` is the worker's own."
    )
    env: dict[str, Argument] = Field({}, description="Environment variables of the command.")
    stdin: str | None = Field(None, description="What the command reads from its standard input.")
    workflow: Text | None = Field(None, description="A sub-workflow: name, name@3 or name@latest.")
    approval: Approval | None = Field(
        None, description="Waits for a person: a message, or {message, approvers, timeout, on_timeout}."
    )
    wait: Wait | None = Field(None, description="10m, {until: TIME} or {event: NAME, timeout: 24h}.")
    aggregate: Aggregate | None = Field(None, description="Joins results without a model: {from, how}.")
    checkpoint: str | None = Field(None, description="A message for the run's log.")
    steps: list[Step] | None = Field(None, min_length=1, description="A group of steps with its own order.")

    # Modifiers
    depends_on: Names = Field([], description="Steps that must end first; those named in expressions are added.")
    join: Literal["all_success", "none_failed", "any_success", "all_done"] = Field(
        "all_success", description="How the steps before must have ended."
    )
    condition: Condition | None = Field(None, description="The step is skipped unless this holds.")
    when: Text | None = Field(None, description="The same as one CEL expression.")
    map: Map | None = Field(None, description="The step once for each item of a list.")
    loop: Loop | None = Field(None, description="The step again until a condition holds: {until, max}.")
    output: Output | None = Field(None, description="The schema of the output, such as {approved: boolean}.")
    max_retries: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="How many attempts after the first."
    )
    retry: Retry | None = Field(None, description="Attempts after the first, in detail.")
    on_failure: Literal["abort", "skip", "retry", "fallback", "continue_with_default"] | None = Field(
        None, description="What happens when the retries are spent; abort by default."
    )
    then: Literal["abort", "skip", "fallback", "continue_with_default"] | None = Field(
        None, description="With on_failure: retry — what happens when the retries are spent."
    )
    fallback: Fallback | None = Field(None, description="What stands in: a value, another step or another model.")
    default_output: Any = Field(None, description="With continue_with_default: the output that stands in.")
    timeout: Duration | None = Field(None, description="The longest that one attempt may take.")
    deadline: Duration | None = Field(None, description="The longest that all attempts may take, queueing included.")
    allow_failure: bool = Field(False, description="Commands: a non-zero exit is a result, not a failure.")
    budget_usd: Money | None = Field(None, description="The most this step may cost, in dollars.")
    tokens: Count | None = Field(None, description="The most tokens this step may use.")
    on_budget: Literal["deny", "wait", "approve"] | None = Field(None, description="What to do when a budget is short.")
    effect: Literal["once", "repeat"] | None = Field(None, description="May the effect happen more than once?")
    on_doubt: Literal["retry", "ask", "skip", "fail"] | None = Field(
        None, description="What to do when nobody can tell whether it happened."
    )
    cache: Cache | None = Field(None, description="Reuse an identical earlier call: {ttl: 24h}.")
    trust: Annotated[
        Text | None,
        BeforeValidator(trust_reason),
        WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "boolean"}]}),
    ] = Field(None, description="Accept tainted data here, with the reason; audited.")

    # Not keys of the language; set by folding or by the older formats.
    shell: Text | None = Field(None, alias="$shell", description="A command text for `sh -c`, unsubstituted.")
    legacy: LegacyStep | None = Field(None, alias="$legacy", description="What only an older file can say.")

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        yield from _action_faults(value)
        yield from _modifier_faults(value)
        yield from _failure_faults(value)

    def _fold(self) -> None:
        if self.model is not None:
            self.models = [self.model]
            self.model = None
        if isinstance(self.run, str):
            self.shell, self.run = self.run, None
        if self.max_retries is not None:
            self.retry = self.retry or Retry()
            self.retry.max = self.max_retries
            self.max_retries = None
        if self.on_failure == "retry":
            self.retry = self.retry or Retry()
            self.retry.max = 3 if self.retry.max is None else self.retry.max
            self.on_failure = self.then or "abort"
            self.then = None
        if self.on_failure == "continue_with_default":
            self.on_failure = "fallback"
            self.fallback = Fallback(type="default_value", value=self.default_output)
            self.default_output = None

    @property
    def action(self) -> str:
        """The action, one of ACTIONS.  `prompt` for every agent step; `run` includes the shell form."""
        if self.run is not None or self.shell is not None:
            return "run"
        for name in ACTIONS:
            if name not in {"prompt", "run"} and getattr(self, name) is not None:
                return name
        return "prompt"

    @property
    def publishes(self) -> list[str]:
        """Older files: the names published by the step's `outputs:`."""
        return self.legacy.publishes if self.legacy else []

    @property
    def order_after(self) -> list[str]:
        """Older files: ids of steps that this one only waits for (`all_done`, without propagating skips)."""
        return self.legacy.order_after if self.legacy else []

    def inner(self) -> Iterator[tuple[tuple[str | int, ...], StepBody]]:
        """Yield the steps written inside this one, with their paths relative to it."""
        for index, step in enumerate(self.steps or ()):
            yield ("steps", index), step
        if self.map is not None and self.map.reduce is not None:
            yield ("map", "reduce"), self.map.reduce
        if self.fallback is not None and self.fallback.step is not None:
            yield ("fallback", "step"), self.fallback.step


class Step(StepBody):
    """A step in a list; it has an id."""

    id: Text = Field(description="The step's name: small letters, digits and _, unique in the file.")


def _named(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _actions(value: Mapping[str, Any]) -> list[str]:
    """Return the actions of a step as written; `$shell` counts as `run`."""
    found = [key for key in ACTIONS if key in value]
    return [*found, "run"] if "$shell" in value and "run" not in value else found


def _action_faults(value: dict[str, Any]) -> Iterator[InitErrorDetails]:
    actions = _actions(value)
    agent = "prompt" in actions or (not actions and "role" in value)
    if not actions and not agent:
        hint = f"A step has exactly one of {_named(ACTIONS)}; a `role` alone does the role's standing task."
        yield fault("the step does nothing: it has no action", hint=hint, value=value)
        return
    if len(actions) > 1:
        hint = "A step has exactly one action: make two steps of it."
        yield fault(f"the step has {len(actions)} actions: {_named(actions)}", actions[1], hint=hint, key=True)
        return
    action = "prompt" if agent else actions[0]
    belongs = dict.fromkeys(_AGENT_ONLY, ("prompt",)) | {
        "with": ("uses", "workflow"),
        "cwd": ("run",),
        "env": ("run",),
        "stdin": ("run",),
        "allow_failure": ("run",),
    }
    for key, owners in belongs.items():
        if key in value and action not in owners:
            hint = f"It goes with {' or '.join(f'`{owner}:`' for owner in owners)}."
            yield fault(f"`{key}` has no meaning in a step with `{action}:`", key, hint=hint, key=True)
    for key in ("output", "cache"):
        if key in value and action in {"approval", "wait", "checkpoint", "steps"}:
            yield fault(f"`{key}` has no meaning in a step with `{action}:`", key, key=True)
    text = value.get("run")
    if isinstance(text, str) and "{{" in text:
        hint = 'Values enter a command only whole: write a list, run: [program, "{{x}}"], or put them into `env:`.'
        yield fault("a command text is run by a shell as it is: `{{ … }}` is not filled in", "run", hint=hint)
    name = value.get("workflow")
    if isinstance(name, str) and not re.fullmatch(r"[A-Za-z0-9_./-]+(@(\d+|latest))?", name):
        yield fault(f"`{name}` is not the name of a workflow", "workflow", hint="Write name, name@3 or name@latest.")
    env = value.get("env")
    for key in env if isinstance(env, dict) else ():
        if refused_env(str(key)):
            hint = "It would change what the command is or how it is read; choose another name."
            yield fault(f"the environment variable `{key}` may not be set", "env", key, hint=hint, key=True)


def refused_env(name: str) -> bool:
    """Tell whether a command's environment may not set this name: it would change which program runs, or how."""
    return refused_variable(name) is not None or not _ENV_NAME.fullmatch(name)


def _modifier_faults(value: dict[str, Any]) -> Iterator[InitErrorDetails]:
    for one, other, hint in (
        ("condition", "when", "Keep one of them; `when` can join both with &&."),
        ("model", "models", "Put it first in `models`."),
        ("map", "loop", "Put one of them on a `steps:` group around the other."),
    ):
        if one in value and other in value:
            yield fault(f"`{one}` and `{other}` do not go together", other, hint=hint, key=True)
    models = value.get("models")
    named: list[tuple[tuple[str | int, ...], Any]] = [(("model",), value.get("model"))]
    named += [(("models", index), name) for index, name in enumerate(models if isinstance(models, list) else ())]
    for at, name in named:
        prefix = name.split(":", 1)[0] if isinstance(name, str) and ":" in name else ""
        # A model's own name may contain a colon (llama3:8b), so only prefixes that resemble a provider are refused.
        if prefix and prefix not in PROVIDERS and difflib.get_close_matches(prefix, PROVIDERS, n=1):
            yield fault(f"unknown provider `{prefix}` in `{name}`", *at, hint=suggest(prefix, PROVIDERS), value=name)


def _failure_faults(value: dict[str, Any]) -> Iterator[InitErrorDetails]:
    retry = value.get("retry")
    number = retry.get("max") if isinstance(retry, dict) else retry
    if number is not None and "max_retries" in value and value["max_retries"] != number:
        hint = "Keep one of the two."
        yield fault(f"`max_retries: {value['max_retries']}` contradicts `retry: {{max: {number}}}`", "retry", hint=hint)
    if "then" in value and value.get("on_failure") != "retry":
        yield fault("`then` goes with `on_failure: retry`", "then", key=True, hint="Put it into `on_failure` instead.")
    chosen = value.get("then") if value.get("on_failure") == "retry" else value.get("on_failure")
    for mode, key in (("fallback", "fallback"), ("continue_with_default", "default_output")):
        if chosen == mode and key not in value:
            yield fault(f"`{mode}` needs `{key}`: what should stand in?", "on_failure", value=chosen)
        if key in value and chosen != mode:
            yield fault(
                f"`{key}` has no effect without `on_failure: {mode}`", key, hint=f"Add on_failure: {mode}.", key=True
            )


# ── The file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Defaults(Closed):
    """Defaults for steps that do not set their own values."""

    noun = "`defaults`"
    elsewhere: ClassVar[Mapping[str, str]] = {"timeout_seconds": "Write timeout: 300s or timeout: 5m."}

    provider: Literal[PROVIDERS] | None = Field(None, description="anthropic or openai.")  # type: ignore[valid-type]
    model: Text | None = Field(None, description="A model, such as claude-opus.")
    models: list[Text] = Field([], description="Models in order of preference.")
    effort: Literal["low", "medium", "high"] | None = Field(None, description="How hard the model should think.")
    max_tokens: Count | None = Field(None, description="The longest reply, in tokens.")
    timeout: Duration | None = Field(None, description="The longest that one attempt may take.")
    deadline: Duration | None = Field(None, description="The longest that all attempts may take.")
    max_retries: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="Attempts after the first.")
    retry: Retry | None = Field(None, description="Attempts after the first, in detail.")

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        yield from _modifier_faults(value)
        yield from _failure_faults(value)

    def _fold(self) -> None:
        if self.model is not None:
            self.models = [self.model]
            self.model = None
        if self.max_retries is not None:
            self.retry = self.retry or Retry()
            self.retry.max = self.max_retries
            self.max_retries = None


class Limits(Closed):
    """What a run may use."""

    noun = "`limits`"
    elsewhere: ClassVar[Mapping[str, str]] = {
        "budget": "Did you mean `budget_usd`?",
        "token_budget": "Did you mean `tokens`?",
        "timeout_seconds": "Write timeout: 3600s or timeout: 1h.",
    }

    budget_usd: Money | None = Field(None, description="The most a run may cost, in dollars.")
    tokens: Count | None = Field(None, description="The most tokens a run may use.")
    timeout: Duration | None = Field(None, description="The longest that a run may take.")
    max_parallel: Count | None = Field(None, description="The most steps at a time.")
    on_budget: Literal["deny", "wait", "approve"] | None = Field(None, description="What to do when a budget is short.")


class Concurrency(Closed):
    """How many runs with the same key may be active at a time."""

    noun = "`concurrency`"

    key: Text = Field(description="Runs with the same key are counted together.")
    max: Count = Field(1, description="How many of them at a time.")
    on_conflict: Literal["queue", "reject", "cancel_running"] = Field("queue", description="What one too many means.")

    @classmethod
    def _sugar(cls, value: Any) -> Any:
        return {"key": value} if isinstance(value, str) else value


class Webhook(Closed):
    """A webhook that starts a run."""

    noun = "`webhook`"

    source: Text = Field(description="Who sends it, such as github.")
    event: Text | None = Field(None, description="The event, such as issues.opened.")
    inputs: dict[str, Any] = Field({}, description="Inputs of the run, taken from the event.")


class Trigger(Closed):
    """What starts runs automatically: a schedule or a webhook."""

    noun = "a trigger"

    schedule: Text | None = Field(None, description="A cron expression, such as 0 3 * * *.")
    timezone: Text | None = Field(None, description="The schedule's time zone, such as Europe/Berlin; UTC by default.")
    on_missed: Literal["skip", "run_once"] | None = Field(None, description="What a missed time means.")
    webhook: Webhook | None = Field(None, description="{source, event}.")
    inputs: dict[str, Any] = Field({}, description="Inputs of the run.")

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        forms = [key for key in ("schedule", "webhook") if key in value]
        if len(forms) != 1:
            yield fault("a trigger has either `schedule` or `webhook`", *forms[1:], value=value)
        schedule = value.get("schedule")
        if isinstance(schedule, str) and not schedule.startswith("@") and len(schedule.split()) != 5:
            hint = 'Five fields: minute, hour, day, month, weekday, such as "0 3 * * *".'
            yield fault(f"`{schedule}` is not a cron expression", "schedule", hint=hint, value=schedule)
        for key in ("timezone", "on_missed"):
            if key in value and "schedule" not in value:
                yield fault(f"`{key}` goes with `schedule`", key, key=True, value=value[key])


class Workflow(Closed):
    """A Gorgon workflow: agents, commands and integrations, and the order in which they work."""

    noun = "the workflow"
    elsewhere: ClassVar[Mapping[str, str]] = {
        "token_budget": "Write limits: {tokens: …}.",
        "budget_usd": "Write limits: {budget_usd: …}.",
        "timeout": "Write limits: {timeout: …}.",
        "timeout_seconds": "Write limits: {timeout: …}.",
        "settings": "`settings:` belongs to the older format.",
        "tags": "Write metadata: {tags: […]}.",
        "author": "Write metadata: {author: …}.",
        "max_parallel": "Write limits: {max_parallel: …}.",
        "id": "A workflow is named by its `name`.",
        "<<": "Merge keys are not part of YAML 1.2; write the keys out.",
    }

    name: Text = Field(description="What the workflow is called.")
    version: str = Field("", description='The version, as text: "1.0".')
    description: str = Field("", description="What the workflow does, in a sentence.")
    team: Text = Field("default", max_length=100, description="Who owns the cost and the budget.")
    inputs: Inputs = Field({}, description="What a run is given: name → type, as JSON Schema in shorthand.")
    secrets: list[Text] = Field([], description="Names of secrets; the values live in the secret store.")
    defaults: Defaults = Field(default_factory=Defaults, description="Values for steps that do not give their own.")
    limits: Limits = Field(default_factory=Limits, description="What a run may use: budget_usd, tokens, timeout, …")
    concurrency: Concurrency | None = Field(None, description="How many runs with the same key may go on at a time.")
    triggers: list[Trigger] = Field([], description="What starts a run by itself.")
    steps: list[Step] = Field(min_length=1, description="The steps; their order is in depends_on and expressions.")
    on_error: list[Step] = Field([], description="Steps that run when a step has failed.")
    finally_: list[Step] = Field([], alias="finally", description="Steps that run at the end in any case.")
    outputs: dict[str, Any] = Field({}, description='What a run gives: name → "{{step.output}}".')
    metadata: dict[str, Any] = Field({}, description="author, category, tags and whatever else you note.")

    # Not keys of the language; set by the older formats.
    lenient: bool = Field(False, alias="$lenient", description="A missing value renders as nothing.")
    published: list[str] = Field([], alias="$published", description="Every name that a step's `outputs:` publishes.")

    def walk(self) -> Iterator[tuple[tuple[str | int, ...], StepBody]]:
        """Yield every step of the file with its path, outer steps before inner ones, in file order."""
        waiting: list[tuple[tuple[str | int, ...], StepBody]] = []
        for part, steps in (("finally", self.finally_), ("on_error", self.on_error), ("steps", self.steps)):
            waiting.extend(((part, index), steps[index]) for index in reversed(range(len(steps))))
        while waiting:
            path, step = waiting.pop()
            yield path, step
            inner = [((*path, *at), body) for at, body in step.inner()]
            waiting.extend(reversed(inner))


Workflow.model_rebuild()


# ── JSON Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────

_SHORT: dict[str, list[dict[str, Any]]] = {
    "Approval": [{"type": "string", "minLength": 1}],
    "Wait": DURATION_SCHEMA["anyOf"],
    "Retry": [{"type": "integer", "minimum": 0}],
    "Cache": DURATION_SCHEMA["anyOf"],
    "Concurrency": [{"type": "string", "minLength": 1}],
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a workflow file in the current format, for editors."""
    made = _tidy(Workflow.model_json_schema(by_alias=True, mode="validation"))
    defs = made["$defs"]
    defs.pop("LegacyStep", None)
    for name, short in _SHORT.items():
        defs[name] = {"description": defs[name].get("description", ""), "anyOf": [*short, defs[name]]}
    for name in ("Step", "StepBody"):
        defs[name]["anyOf"] = [{"required": [key]} for key in (*ACTIONS, "role")]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **made}


def _tidy(node: Any) -> Any:
    """Remove internal keys, and the `null` that only means "not given"."""
    if isinstance(node, list):
        return [_tidy(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    made = {}
    for key, entry in node.items():
        if key == "properties":
            made[key] = {name: _tidy(value) for name, value in entry.items() if not name.startswith("$")}
        elif key == "anyOf":
            kept = [_tidy(value) for value in entry if value != {"type": "null"}]
            made.update(kept[0] if len(kept) == 1 else {key: kept})
        elif (
            key == "title"
            or (key == "default" and entry in (None, [], {}, ""))
            or (key == "default" and "$ref" in node)
        ):
            continue
        else:
            made[key] = _tidy(entry)
    return made
