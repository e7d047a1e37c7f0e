"""Renders a step's templates into the call to a model or the process to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common.engine.ports import AgentCall, CommandCall, Message
from gorgon_common.masking import SECRETS
from gorgon_common.workflow.expressions import MISSING, Env, parse_template, to_text

DEFAULT_MAX_TOKENS = 4096
MAX_OUTPUT_BYTES = 10 * 1024**2


def agent_call(spec: Mapping[str, Any], env: Env, **facts: Any) -> AgentCall:
    """Return the call of an agent step; `facts` are its fields that are not templates.  Raises ExpressionError.

    No model receives a secret: wherever a secret's value appears in the prompt, its mask is sent instead.
    """
    prompt = text(spec["prompt"], env) if spec.get("prompt") is not None else standing(spec, env)
    return AgentCall(
        messages=(Message("user", SECRETS.mask(prompt)),),
        system=SECRETS.mask(text(spec["system"], env)) if spec.get("system") else None,
        schema=SECRETS.mask_value(spec["schema"]) if spec.get("schema") else spec.get("schema"),
        max_tokens=spec.get("max_tokens") or DEFAULT_MAX_TOKENS,
        effort=spec.get("effort"),
        role=spec.get("role"),
        **facts,
    )


def command_call(spec: Mapping[str, Any], env: Env, *, timeout: float) -> CommandCall:
    """Return the process of a command step.  Values become whole arguments, variables or stdin, never program text."""
    variables = {name: text(value, env) for name, value in (spec.get("env") or {}).items()}
    for variable, name in (spec.get("exports") or {}).items():
        value = env.get(name)
        if value is not None and value is not MISSING:
            variables[variable] = to_text(value.value() if hasattr(value, "published") else value)
    return CommandCall(
        argv=tuple(text(part, env) for part in spec.get("argv") or ()),
        shell=spec.get("shell"),
        env=variables,
        stdin=text(spec.get("stdin") or "", env),
        cwd=text(spec["cwd"], env) if spec.get("cwd") else None,
        timeout=timeout,
        output_bytes=MAX_OUTPUT_BYTES,
    )


def text(template: Any, env: Env) -> str:
    """Render a template."""
    return template if not isinstance(template, str) else str(parse_template(template, env.lenient).render(env))


def standing(spec: Mapping[str, Any], env: Env) -> str:
    """Return the prompt of a step with a role but no prompt of its own: the role's task, followed by its context."""
    parts = [str(spec.get("standing") or "Do your part of the work.")]
    for name in spec.get("context") or ():
        value = env.get(name)
        if value is not None and value.status == "succeeded":
            parts.append(f"## {name}\n\n{to_text(value.value())}")
    parts += [f"## {name}\n\n{to_text(env[name])}" for name in spec.get("given") or ()]
    return "\n\n".join(parts)
