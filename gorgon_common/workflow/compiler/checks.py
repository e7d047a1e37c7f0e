"""Finds things a step asks for but would not get: keys without effect in their place, and unrendered texts.

Everything that loads takes effect, or a warning says that it does not (yet).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from gorgon_common.workflow.compiler import specs
from gorgon_common.workflow.compiler.layout import Draft, Place
from gorgon_common.workflow.expressions import ExpressionSyntaxError, Template, parse_template
from gorgon_common.workflow.plan import Retry
from gorgon_common.workflow.schema import PROVIDERS, Defaults, StepBody, Workflow

_ATTEMPTS = frozenset({"prompt", "run", "uses", "workflow"})
"""Actions that run in attempts and can be retried."""
_TIMED = _ATTEMPTS | {"approval", "wait"}
_PAID = frozenset({"prompt", "workflow"})
_NOT_YET = ("cache", "effect", "on_doubt", "trust")
"""Keys of a step that are accepted but have no effect yet."""
_COMMAND_FAILURES = frozenset({"timeout", "exit_code", "invalid_output"})

_OLD = re.compile(r"\$\{\s*(?P<root>[A-Za-z_][\w-]*)(?P<fields>(?:\.[\w-]+|\[[^\]\n]*\])*)\s*\}")
_SINGLE = re.compile(r"(?<![{$])\{\s*(?P<root>[A-Za-z_]\w*)(?P<fields>(?:\.\w+|\[[^\]\n]*\])+)\s*\}(?!\})")


class Finding(NamedTuple):
    """A message about a place inside the step (or the file)."""

    place: Place
    message: str
    hint: str = ""
    severity: str = "error"
    offset: int | None = None


# ── Keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def key_findings(draft: Draft, step: StepBody, retry: Retry) -> Iterator[Finding]:
    """Yield the keys of a step that have no effect in their place; `retry` is the step's effective retry policy."""
    action = step.action
    within = f"in a step with `{action}:`"
    inside = "Put it on the steps inside." if action == "steps" else "Remove it."
    if step.retry is not None and action not in _ATTEMPTS:
        yield Finding(("retry",), f"retries have no meaning {within}", inside.replace("it", "them", 1))
    if step.timeout is not None and action not in _TIMED:
        yield Finding(("timeout",), f"`timeout` has no meaning {within}", inside)
    if step.deadline is not None and (action not in _TIMED or step.map is not None or step.loop is not None):
        around = f"beside `{'map' if step.map is not None else 'loop'}:`" if action in _TIMED else within
        yield Finding(("deadline",), f"`deadline` has no meaning {around}", "Use `timeout:`, or limits: {timeout: …}.")
    if not _costs(step):
        for key in ("budget_usd", "tokens", "on_budget"):
            if getattr(step, key) is not None:
                yield Finding((key,), f"`{key}` has no meaning {within}, which costs nothing", "Remove it.")
    if step.fallback is not None and step.fallback.type == "model" and action != "prompt":
        hint = "Use a fallback of type default_value or alternate_step."
        yield Finding(("fallback", "type"), f"another model has no meaning {within}", hint)
    yield from _retries(step, retry)
    yield from _providers(step)
    for key in _NOT_YET:
        if getattr(step, key) is not None:
            yield Finding((key,), f"`{key}` has no effect yet", "The workflow runs without it.", "warning")
    if step.on_budget == "approve":
        yield APPROVES_NOT


APPROVES_NOT = Finding(
    ("on_budget",), "`on_budget: approve` acts as `deny`: approvals are not built yet", "", "warning"
)


def _costs(step: StepBody) -> bool:
    return step.action in _PAID or any(_costs(inner) for _, inner in step.inner())


def _retries(step: StepBody, retry: Retry) -> Iterator[Finding]:
    written = step.retry
    if written is None or step.action not in _ATTEMPTS:
        return
    if written.max is None and retry.max == 0:
        hint = "Add max: 3: unlike a model call, this step is not tried again unless you say how often."
        yield Finding(("retry",), "`retry` has no effect: it does not say how often", hint)
    if "on" in written.model_fields_set:
        possible = _COMMAND_FAILURES if step.action == "run" else {"timeout", "server", "connection", "invalid_output"}
        if not possible & set(written.on):
            hint = f"It can fail with {', '.join(sorted(possible))}."
            yield Finding(("retry", "on"), f"a step with `{step.action}:` never fails in these ways", hint)


def _providers(step: StepBody) -> Iterator[Finding]:
    """Yield bare model names that are known to belong to a provider other than the stated one."""
    if step.provider is None:
        return
    for number, name in enumerate(step.models):
        if wrong := foreign_model(step.provider, name):
            place: Place = ("models", number) if len(step.models) > 1 else ("models",)
            yield Finding(place, *wrong)


def foreign_model(provider: str, name: str) -> tuple[str, str] | None:
    """Return (message, hint) if a bare model name belongs to a provider other than `provider`."""
    prefix, _, rest = name.partition(":")
    if rest and prefix in PROVIDERS:
        return None
    owner, _ = specs.of_provider(name, provider)
    if owner == provider:
        return None
    return (
        f"`{name}` is a model of {owner}, and the provider is {provider}",
        f"Write provider: {owner}, or leave it out. For a compatible server's own model: {provider}:{name}.",
    )


# ── Texts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def literal_findings(template: Template, known: Collection[str], inputs: Collection[str]) -> Iterator[Finding]:
    """Yield references in other notations: `${plan.output}`, `{inputs.x}`.  `known`: names that mean something."""
    for match, offset in _references(template):
        yield _not_filled(match, offset, known, inputs)


def command_literal_findings(
    template: Template, known: Collection[str], inputs: Collection[str], variables: Collection[str]
) -> Iterator[Finding]:
    """Yield the same for a command, where `${NAME}` may belong to the shell."""
    for match, offset in _references(template):
        root, fields = match["root"], match["fields"]
        if not match[0].startswith("$") or fields or ((root in known or root in inputs) and root not in variables):
            yield _not_filled(match, offset, known, inputs)


def single_findings(template: Template, known: Collection[str], inputs: Collection[str]) -> Iterator[Finding]:
    """Yield references in single braces to names of the file; other single braces are text."""
    cursor = 0
    for part in template.parts:
        if not isinstance(part, str):
            continue
        cursor = template.source.index(part, cursor)
        for match in _SINGLE.finditer(part):
            if match["root"] in known:
                yield _not_filled(match, cursor + match.start(), known, inputs)
        cursor += len(part)


def _references(template: Template) -> Iterator[tuple[re.Match[str], int]]:
    cursor = 0
    for part in template.parts:
        if not isinstance(part, str):
            continue
        cursor = template.source.index(part, cursor)
        for match in _OLD.finditer(part):
            yield match, cursor + match.start()
        cursor += len(part)


def _not_filled(match: re.Match[str], offset: int, known: Collection[str], inputs: Collection[str]) -> Finding:
    path = match["root"] + match["fields"]
    if match["root"] in inputs and match["root"] not in known:
        path = f"inputs.{path}"
    return Finding(
        (),
        f"`{match[0]}` is not filled in",
        f"Write {{{{{path}}}}}. Where it is meant as text: {{{{ '{match[0]}' }}}}.",
        offset=offset,
    )


def unfilled(step: StepBody) -> Iterator[Finding]:
    """Yield expressions in places where they are not evaluated and would remain text."""
    places: list[tuple[Place, Any]] = [
        (("models",), step.models),
        (("role",), step.role),
        (("workflow",), step.workflow),
        (("uses",), step.uses),
        (("tools",), step.tools),
        (("env",), list(step.env)),
        (("with",), list(step.with_)),
        (("output",), step.output),
    ]
    if step.fallback is not None:
        places += [(("fallback", "value"), step.fallback.value), (("fallback", "model"), step.fallback.model)]
    if step.approval is not None:
        places.append((("approval", "approvers"), step.approval.approvers))
    for place, value in places:
        for at in _expressions(value, place):
            yield Finding(at, "an expression is not read here", "Write the value out.")


def unfilled_inputs(workflow: Workflow) -> Iterator[Finding]:
    """Yield expressions in the defaults of inputs, which remain text."""
    for name, schema in workflow.inputs.items():
        for at in _expressions(schema.get("default"), ("inputs", name, "default")):
            yield Finding(at, "an expression in a default is not read: it stays text", "", "warning")


def _expressions(value: Any, place: Place) -> Iterator[Place]:
    if isinstance(value, str):
        try:
            found = "{{" in value and not parse_template(value).is_literal
        except ExpressionSyntaxError:
            found = True
        if found:
            yield place
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _expressions(entry, (*place, str(key)))
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            yield from _expressions(entry, (*place, number))


def default_findings(defaults: Defaults) -> Iterator[Finding]:
    """Yield contradictions in `defaults:`."""
    if defaults.provider is None:
        return
    for name in defaults.models:
        if wrong := foreign_model(defaults.provider, name):
            yield Finding(("defaults", "models"), *wrong)
