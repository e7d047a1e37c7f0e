"""The contents of a node: the canonical fields of its action, its retries, its queue and its failure handling."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gorgon_common.operations.providers import DEFAULT_MODEL_PROVIDER, provider_of_model
from gorgon_common.workflow.compiler.layout import Draft, Place
from gorgon_common.workflow.compiler.sources import Operations, Role, Roles
from gorgon_common.workflow.plan import Kind, OnFailure, Retry
from gorgon_common.workflow.schema import PROVIDERS, Defaults, StepBody

CONTROL = "control"
COMMAND = "command"

_RETRIED = {Kind.AGENT: 2}
_NAME = re.compile(r"[a-z][a-z0-9_]*(?:\.[A-Za-z_]\w*)*")
_SHELL_NAME = re.compile(r"\$(?:\{([A-Za-z_]\w*)|([A-Za-z_]\w*))")


def output_schema(step: StepBody, roles: Roles, *, lenient: bool) -> dict[str, Any] | None:
    """Return the JSON Schema of a step's output, None if it is text or unknown.

    This is the step's own `output:`, otherwise its role's.  In older files, the published names from the second on are
    added.
    """
    if step.output is not None:
        return step.output
    if step.action != "prompt":
        return None
    role = roles.get(step.role) if step.role else None
    schema = dict(role.output_schema) if role is not None else None
    if not lenient:
        return schema
    wanted = step.publishes[1:] if schema is not None else step.publishes if len(step.publishes) > 1 else []
    known = (schema or {}).get("properties", {})
    added = {name: {"type": "string"} for name in wanted if name not in known}
    if not added:
        return schema
    base = schema or {"type": "object", "additionalProperties": False}
    required = [*base.get("required", ()), *added]
    return {**base, "properties": {**known, **added}, "required": required}


def of_provider(name: str, default: str) -> tuple[str, str]:
    """Return (provider, model) of a model as written: `openai:gpt-6`, or a bare name that identifies its provider."""
    prefix, _, rest = name.partition(":")
    if rest and prefix in PROVIDERS:
        return prefix, rest
    return provider_of_model(name) or default, name


def models_of(step: StepBody, defaults: Defaults, role: Role | None) -> tuple[str, list[str]]:
    """Return the provider of an agent step and its models in order, each as "provider:model"."""
    provider = step.provider or defaults.provider or (role.provider if role else None) or DEFAULT_MODEL_PROVIDER
    written = step.models
    if not written and (step.provider in (None, defaults.provider) or defaults.provider is None):
        written = [
            name for name in defaults.models if step.provider is None or of_provider(name, provider)[0] == step.provider
        ]
    models = []
    for name in written:
        prefix, _, rest = name.partition(":")
        if rest and prefix in PROVIDERS:
            models.append(name)
        elif step.provider is not None:
            models.append(f"{step.provider}:{name}")
        else:
            models.append(":".join(of_provider(name, provider)))
    if models and step.provider is None:
        provider = models[0].partition(":")[0]
    return provider, models


def agent_spec(step: StepBody, defaults: Defaults, roles: Roles, *, lenient: bool) -> dict[str, Any]:
    """Return the canonical fields of an agent call, without `context`."""
    role = roles.get(step.role) if step.role else None
    provider, models = models_of(step, defaults, role)
    spec: dict[str, Any] = {"provider": provider, "model": "", "prompt": step.prompt}
    if models:
        spec["models"] = models
        first, _, name = models[0].partition(":")
        spec["model"] = name if first == provider else ""
    if step.role:
        spec["role"] = step.role
    if role is not None:
        spec["tier"] = role.tier
    spec["system"] = step.system if step.system is not None else role.system if role else None
    if step.prompt is None:
        spec["standing"] = role.task if role else ""
    spec["schema"] = output_schema(step, roles, lenient=lenient)
    spec["max_tokens"] = step.max_tokens or defaults.max_tokens or (role.max_tokens if role else None)
    spec["effort"] = step.effort or defaults.effort or (role.effort if role else None)
    spec["tools"] = step.tools
    spec["cache"] = {"ttl": step.cache.ttl} if step.cache else None
    if step.legacy is not None:
        spec["estimated_tokens"] = step.legacy.estimated_tokens
    return spec


def command_spec(step: StepBody) -> dict[str, Any]:
    """Return the canonical fields of a command, without `exports`."""
    spec: dict[str, Any] = {}
    if step.shell is not None:
        spec["shell"] = step.shell
    else:
        spec["argv"] = list(step.run) if isinstance(step.run, list) else []
    spec.update(env=dict(step.env), stdin=step.stdin, allow_failure=step.allow_failure or None, schema=step.output)
    if step.cwd is not None:
        spec["cwd"] = step.cwd
    return spec


def joined(source: Any) -> Any:
    """Return the value that an `aggregate` combines; in a list, a bare name means a step: `[plan, build.output]`."""
    if not isinstance(source, list):
        return source
    return [f"{{{{{entry}}}}}" if isinstance(entry, str) and _NAME.fullmatch(entry) else entry for entry in source]


def map_spec(step: StepBody) -> dict[str, Any]:
    """Return the canonical fields of a map."""
    made = step.map
    assert made is not None
    return {
        "over": made.over,
        "as": made.as_,
        "max_items": made.max_items,
        "max_parallel": made.max_parallel,
        "on_item_failure": made.on_item_failure,
        "min_success": made.min_success,
    }


def loop_spec(step: StepBody) -> dict[str, Any]:
    """Return the canonical fields of a loop."""
    assert step.loop is not None
    until = step.loop.until
    return {"until": until if isinstance(until, str) else until.plain(), "max": step.loop.max}


def spec_of(draft: Draft, defaults: Defaults, roles: Roles, *, lenient: bool) -> dict[str, Any]:
    """Return the canonical fields of a node, as described in the package docstring."""
    step = draft.step
    assert step is not None
    spec: dict[str, Any]
    match draft.kind:
        case Kind.MAP:
            return _given(map_spec(step))
        case Kind.LOOP:
            return _given(loop_spec(step))
        case Kind.AGENT:
            spec = agent_spec(step, defaults, roles, lenient=lenient)
        case Kind.COMMAND:
            spec = {**command_spec(step), "timeout": timeout_of(draft, defaults)}
        case Kind.GROUP:
            spec = {}
            if step.legacy is not None:
                spec = {"max_parallel": step.legacy.max_parallel, "fail_fast": step.legacy.fail_fast}
        case Kind.AGGREGATE:
            assert step.aggregate is not None
            source = step.aggregate.from_ if lenient else joined(step.aggregate.from_)
            spec = {"from": source, "how": step.aggregate.how, "schema": step.output}
        case Kind.CHECKPOINT:
            spec = {"name": step.id or draft.id, "message": step.checkpoint}
        case _:
            spec = _later_spec(draft.kind, step)
    for name in ("budget_usd", "tokens", "on_budget", "trust"):
        spec[name] = getattr(step, name)
    made = _given(spec)
    if draft.kind is Kind.AGENT:
        made.setdefault("prompt", None)
    return made


def _later_spec(kind: Kind, step: StepBody) -> dict[str, Any]:
    """Return the fields of kinds that cannot be executed yet, as written in the file."""
    if kind is Kind.ACTION:
        return {
            "uses": step.uses,
            "with": step.with_,
            "effect": step.effect,
            "on_doubt": step.on_doubt,
            "schema": step.output,
        }
    if kind is Kind.WORKFLOW:
        return {"workflow": step.workflow, "with": step.with_, "schema": step.output}
    if kind is Kind.APPROVAL:
        assert step.approval is not None
        asked = step.approval
        return {
            "message": asked.message,
            "approvers": asked.approvers,
            "timeout": asked.timeout,
            "on_timeout": asked.on_timeout,
            "preview": asked.preview,
        }
    assert step.wait is not None
    wait = step.wait
    return {"for": wait.duration, "until": wait.until, "event": wait.event, "timeout": wait.timeout}


def _given(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if value is not None and value != [] and value != {}}


def queue_of(draft: Draft, spec: Mapping[str, Any]) -> str | None:
    """Return the queue for a node's messages, None if it needs no provider."""
    match draft.kind:
        case Kind.AGENT:
            return str(spec["provider"])
        case Kind.COMMAND:
            return COMMAND
        case Kind.ACTION:
            return str(spec["uses"]).partition(".")[0]
        case Kind.APPROVAL | Kind.WORKFLOW:
            return CONTROL
    return None


def retry_of(draft: Draft, defaults: Defaults, operations: Operations | None) -> Retry:
    """Return the retry policy of a node; each field comes from the node, else the file, else the kind's default."""
    step = draft.step
    if step is None or not draft.inner or draft.kind not in (Kind.AGENT, Kind.COMMAND, Kind.ACTION, Kind.WORKFLOW):
        return Retry()
    most = _RETRIED.get(draft.kind, 0)
    if draft.kind is Kind.ACTION and operations is not None and step.uses in operations:
        most = 2 if operations[str(step.uses)].effect == "read" else 0
    chosen: dict[str, Any] = {"max": most}
    for written in (defaults.retry, step.retry):
        if written is not None:
            said = {name: getattr(written, name) for name in written.model_fields_set}
            chosen.update({name: value for name, value in said.items() if value is not None})
    if "on" in chosen:
        chosen["on"] = tuple(chosen["on"])
    return Retry(**chosen)


def on_failure_of(step: StepBody, defaults: Defaults, roles: Roles) -> OnFailure:
    """Return what happens after the retries are exhausted."""
    if step.on_failure == "skip":
        return OnFailure("skip")
    if step.on_failure != "fallback" or step.fallback is None:
        return OnFailure()
    chosen = step.fallback
    if chosen.type == "default_value":
        return OnFailure("default", value=chosen.value)
    if chosen.type == "alternate_step":
        return OnFailure("step")
    provider, _ = models_of(step, defaults, roles.get(step.role) if step.role else None)
    return OnFailure("model", model=":".join(of_provider(str(chosen.model), provider)))


def timeout_of(draft: Draft, defaults: Defaults) -> float | None:
    """Return the time limit of one attempt, in seconds; it belongs to the node with the action."""
    step = draft.step
    if step is None or not draft.inner:
        return None
    own = step.approval.timeout if step.approval else step.wait.timeout if step.wait else None
    if step.timeout is not None or own is not None:
        return step.timeout if step.timeout is not None else own
    timed = draft.kind in (Kind.AGENT, Kind.COMMAND, Kind.ACTION)
    return defaults.timeout if timed else None


# ── Places of expressions ─────────────────────────────────────────────────────────────────────────────────────────────


def texts(draft: Draft) -> Iterator[tuple[Place, Any]]:
    """Yield (place inside the step, value) for everything in a node's action that may contain `{{ … }}`."""
    step = draft.step
    assert step is not None
    match draft.kind:
        case Kind.MAP:
            assert step.map is not None
            yield ("map", "over"), step.map.over
        case Kind.AGENT:
            yield ("prompt",), step.prompt
            yield ("system",), step.system
        case Kind.COMMAND:
            yield ("run",), step.run
            yield ("cwd",), step.cwd
            yield ("env",), step.env
            yield ("stdin",), step.stdin
        case Kind.ACTION | Kind.WORKFLOW:
            yield ("with",), step.with_
        case Kind.APPROVAL:
            assert step.approval is not None
            yield ("approval", "message"), step.approval.message
            yield ("approval", "$preview"), step.approval.preview
        case Kind.WAIT:
            assert step.wait is not None
            yield ("wait", "until"), step.wait.until
            yield ("wait", "event"), step.wait.event
        case Kind.AGGREGATE:
            yield ("aggregate", "from"), draft.spec.get("from", [])
        case Kind.CHECKPOINT:
            yield ("checkpoint",), step.checkpoint


def shell_names(text: str, known: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return the names in `known` that a shell text refers to as `$name` or `${name…}`, in its order."""
    found = [match[1] or match[2] for match in _SHELL_NAME.finditer(text)]
    return [name for name in dict.fromkeys(found) if name in known]


_FILE_NAME = re.compile(
    r"[\w-][\w.-]*\.(?:cfg|conf|csv|css|go|html?|ini|ipynb|java|jsonl?|js|log|md|pdf|php|py|rb|rs|sh|sql|tf|toml|ts|tsv|txt|xml"
    r"|ya?ml)"
)
_OWN_FOLDER = re.compile(r"(?:^|[;&|\n]\s*)(?:cd|git clone|mkdir|mktemp|tar|unzip)\b")
"""A text that creates files or changes the folder; its relative paths may be its own."""


def relative_path(step: StepBody) -> tuple[Place, str] | None:
    """Return (place, path) of the first relative path that a command receives literally, None if there is none."""
    if step.shell is not None:
        words = [] if _OWN_FOLDER.search(step.shell) or ">" in step.shell else step.shell.split()
        return next(((("run",), word) for word in words if _is_relative(word.strip("\"'"))), None)
    argv = step.run if isinstance(step.run, list) else []
    places = enumerate(map(str, argv))
    return next(((("run", index), word) for index, word in places if _is_relative(word)), None)


def _is_relative(word: str) -> bool:
    if re.search(r"[\s{}$*?=:@()]", word) or word.startswith(("-", "/", "~")):
        return False
    return word in (".", "..") or word.startswith(("./", "../")) or bool(_FILE_NAME.fullmatch(word.rpartition("/")[2]))


_INTERPRETERS = re.compile(r"(?:ba|da|z|k|fi)?sh|python[\d.]*|perl|ruby|node|php|lua|pwsh|Rscript|osascript")
_PROGRAM = re.compile(r"-[a-zA-Z]*[ce]|--eval|--command|-Command")


def command_faults(step: StepBody, has_expression: Sequence[bool]) -> Iterator[tuple[Place, str, str]]:
    """Yield (place, message, hint) for values that a command must not contain; `has_expression` by argument."""
    argv = step.run if isinstance(step.run, list) else []
    interpreter = False
    for position, argument in enumerate(argv):
        if has_expression[position]:
            if position == 0:
                yield ("run", 0), "the program of a command must be written out", "Values may be its arguments."
            elif interpreter and _PROGRAM.fullmatch(argv[position - 1]):
                yield (
                    ("run", position),
                    f"a value may not become part of a program (`{argv[position - 1]}`)",
                    "Give it as a further argument, in `env:` or as `stdin:`.",
                )
        interpreter = interpreter or bool(_INTERPRETERS.fullmatch(argument.rpartition("/")[2]))
