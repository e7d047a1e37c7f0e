"""Translates steps with `type:` and `params:` into the schema's form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from gorgon_common.documents import Path
from gorgon_common.workflow.legacy.base import AGENTS, STEP_KEYS, TYPES, Part, Translated, bare
from gorgon_common.workflow.schema import suggest

MAX_ITEMS = 10_000
"""Maximum number of items of a fan-out; the older format had no limit."""

_INTEGRATIONS = frozenset({"github", "notion", "gmail", "slack"})
_RENAMED = {
    "github.list_repos": "github.list_repositories",
    "github.get_repo": "github.get_repository",
    "github.get_repo_info": "github.get_repository",
    "github.create_pr": "github.create_pull_request",
    "github.list_prs": "github.list_pull_requests",
    "github.add_comment": "github.comment",
    "notion.query_database": "notion.query_data_source",
    "notion.append": "notion.append_blocks",
    "gmail.send_email": "gmail.send",
    "gmail.send_message": "gmail.send",
    "slack.send_message": "slack.post_message",
    "slack.send_notification": "slack.post_message",
    "slack.send_approval": "slack.request_approval",
}
_THEN = ("then", "if_true", "true", "true_steps", "on_true", "then_steps")
_ELSE = ("else", "if_false", "false", "false_steps", "on_false", "else_steps")
_PARAMS: dict[str, frozenset[str]] = {
    "agent": frozenset(["role", "prompt", "model", "max_tokens", "system_prompt", "estimated_tokens"]),
    "shell": frozenset({"command", "allow_failure"}),
    "parallel": frozenset(["steps", "max_workers", "fail_fast", "strategy", "rate_limit"]),
    "checkpoint": frozenset({"message"}),
    "fan_out": frozenset(["items", "max_concurrent", "fail_fast", "step_template", "collect_errors"]),
    "fan_in": frozenset(["input", "aggregation", "aggregate_prompt", "role", "model", "max_tokens", "system_prompt"]),
    "map_reduce": frozenset(["items", "max_concurrent", "fail_fast", "map_step", "reduce_step"]),
    "branch": frozenset(["condition", "if", "when", *_THEN, *_ELSE]),
    "loop": frozenset(
        [
            *(
                "steps",
                "step",
                "body",
                "do",
                "max_iterations",
                "max",
                "loop_type",
                "collection",
                "items",
                "as",
                "count",
            ),
            *("until", "condition", "while"),
        ]
    ),
    "mcp_tool": frozenset({"server", "tool", "arguments"}),
    "approval": frozenset(["prompt", "message", "preview_from", "timeout_hours", "approvers"]),
}
_PARAMS_HINT = "In the older format it belongs under `params:`."
_AGGREGATIONS = {
    **{name: name for name in ("concat", "json", "vote", "first", "merge")},
    "collect": "json",
    "list": "json",
    "array": "json",
}
_ITEMS = re.compile(r"\$\{\s*items\s*\}|\{\{\s*items\s*\}\}")
_WHOLE = re.compile(r"\s*(?:\$\{[^}]*\}|\{\{.*\}\})\s*", re.DOTALL)


class Steps(Part):
    """Translates steps; `published` collects the names that they publish."""

    def __init__(self, result: Translated, *, json_form: bool) -> None:
        super().__init__(result)
        self.json_form = json_form
        self.moved_before = dict(result.moved)
        self.published: list[str] = []
        self.decisions: dict[str, list[tuple[str, Any, bool]]] = {}
        """Step id → the branches that name it: their id, condition and side."""
        self.makers: dict[str, Callable[[dict[str, Any], dict[str, Any], Path, Path], dict[str, Any]]] = {
            "shell": self._shell,
            "parallel": self._parallel,
            "checkpoint": self._checkpoint,
            "fan_out": self._fan_out,
            "fan_in": self._fan_in,
            "map_reduce": self._map_reduce,
            "branch": self._branch,
            "loop": self._loop,
            "mcp_tool": self._mcp,
            "approval": self._approval,
        }

    def origin(self, path: Path) -> Path:
        """Map a path to the file.  Paths of a graph or of the JSON form differ from the file's and are mapped twice."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.moved_before:
                return (*self.moved_before[path[:length]], *path[length:])
        return path

    def _steps(self, steps: Any, old: Path, new: Path, *, in_order: bool) -> Any:
        if not isinstance(steps, list):
            return steps
        made = []
        before: str | None = None
        for index, step in enumerate(steps):
            at_old, at_new = (*old, index), (*new, index)
            self.move(at_new, at_old)
            if not isinstance(step, dict):
                made.append(step)
                continue
            translated = self.step(step, at_old, at_new)
            if "$after" in step:
                self._after(translated, step["$after"])
            elif in_order and before is not None and "depends_on" not in step:
                self._after(translated, [before])
            made.append(translated)
            before = step["id"] if isinstance(step.get("id"), str) else None
        self._apply_decisions(made)
        return made

    def _after(self, step: dict[str, Any], names: list[str]) -> None:
        extra = step.setdefault("$legacy", {})
        extra["order_after"] = list(dict.fromkeys([*extra.get("order_after", []), *names]))

    def step(self, step: dict[str, Any], old: Path, new: Path, *, inner: bool = False) -> dict[str, Any]:
        """Translate one step.  `inner`: a template written inside another step, whose id is ignored."""
        kind = step.get("type")
        if kind is None:
            hint = "Another step of this file has `type:`, so the file is in the older format. Use one format."
            self.error("the step has no `type`", old, hint)
            return {"id": step.get("id"), "checkpoint": ""} if "id" in step else {"checkpoint": ""}
        for key in step:
            if key not in STEP_KEYS and not key.startswith("$"):
                hint = _PARAMS_HINT if any(key in known for known in _PARAMS.values()) else suggest(key, STEP_KEYS)
                self.warn(f"`{key}` is not a key of a step and is ignored", (*old, key), hint, key=True)
        params = step.get("params")
        if params is None:
            params = {}
        if not isinstance(params, dict):
            self.error("`params` must be a mapping", (*old, "params"))
            params = {}
        made: dict[str, Any] = {"id": step["id"]} if "id" in step and not inner else {}
        made |= self._action(str(kind), step, params, old, new)
        made |= self._modifiers(step, made, old, new)
        self._publish(step, made, inner=inner)
        return made

    def _action(self, kind: str, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        if kind in AGENTS:
            self._unknown("agent", params, old)
            return self._agent(AGENTS[kind], params, old, new)
        if kind in self.makers:
            self._unknown(kind, params, old)
            return self.makers[kind](step, params, old, new)
        integration = kind.split(".", 1)[0]
        if integration in _INTEGRATIONS:
            return self._integration(integration, step, params, old, new)
        self.error(f"there is no step type `{kind}`", (*old, "type"), suggest(kind, TYPES))
        return {"checkpoint": ""}

    def _unknown(self, kind: str, params: Mapping[str, Any], old: Path) -> None:
        known = _PARAMS.get(kind)
        if known is None:
            return
        for key in params:
            if key not in known:
                hint = suggest(key, known)
                hint = hint if hint.startswith("Did") else ""
                self.warn(f"the parameter `{key}` is ignored", (*old, "params", key), hint, key=True)

    def _agent(self, provider: str, params: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
        made: dict[str, Any] = {"provider": provider}
        self.move((*new, "provider"), (*old, "type"))
        for key, name in (
            ("role", "role"),
            ("prompt", "prompt"),
            ("model", "model"),
            ("max_tokens", "max_tokens"),
            ("system_prompt", "system"),
        ):
            if params.get(key) is not None:
                made[name] = params[key]
                self.move((*new, name), (*old, "params", key))
        if "prompt" not in made and "role" not in made:
            self.error("the step has neither `prompt` nor `role` in its `params`", old, "Say what the model is asked.")
            made["prompt"] = ""
        if isinstance(params.get("estimated_tokens"), int):
            made["$legacy"] = {"estimated_tokens": params["estimated_tokens"]}
        return made

    def _shell(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        command = params.get("command")
        key = "run" if isinstance(command, list) else "$shell"
        self.move((*new, key), (*old, "params", "command"))
        self.move((*new, "run"), (*old, "params", "command"))
        if command is None or command == "":
            self.error("a shell step needs `params.command`", old)
            command = ":"
        made: dict[str, Any] = {key: command}
        if "allow_failure" in params:
            made["allow_failure"] = params["allow_failure"]
            self.move((*new, "allow_failure"), (*old, "params", "allow_failure"))
        return made

    def _parallel(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        steps = params.get("steps")
        self.move((*new, "steps"), (*old, "params", "steps"))
        if not isinstance(steps, list) or not steps:
            self.error("a parallel step needs `params.steps`, a list of steps", old)
            return {"checkpoint": ""}
        extra: dict[str, Any] = {"max_parallel": params.get("max_workers", 4)}
        extra["fail_fast"] = params.get("fail_fast") is True
        inner = self._steps(steps, (*old, "params", "steps"), (*new, "steps"), in_order=False)
        return {"steps": inner, "$legacy": extra}

    def _checkpoint(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        self.move((*new, "checkpoint"), (*old, "params", "message"))
        return {"checkpoint": str(params.get("message") or "")}

    def _fan_out(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        return self._map(step, params, old, new, "step_template")

    def _map_reduce(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        made = self._map(step, params, old, new, "map_step")
        reduce = params.get("reduce_step")
        if not isinstance(reduce, dict):
            self.error("a map_reduce step needs `params.reduce_step`", old)
            return made
        at = (*new, "map", "reduce")
        self.move(at, (*old, "params", "reduce_step"))
        if "map" in made:
            body = self.step({"type": "claude_code", **reduce}, (*old, "params", "reduce_step"), at, inner=True)
            made["map"]["reduce"] = {**body, "id": reduce["id"]} if "id" in reduce else body
        return made

    def _map(
        self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path, template_key: str
    ) -> dict[str, Any]:
        template = params.get(template_key)
        if not isinstance(template, dict):
            self.error(f"a {step['type']} step needs `params.{template_key}`", old)
            return {"checkpoint": ""}
        if "items" not in params:
            self.error(f"a {step['type']} step needs `params.items`", old)
        source = (*old, "params", template_key)
        over: dict[str, Any] = {
            "over": params.get("items", []),
            "max_items": MAX_ITEMS,
            "max_parallel": params.get("max_concurrent", 5),
            "on_item_failure": "fail" if params.get("fail_fast") is True else "continue",
        }
        self.move((*new, "map", "over"), (*old, "params", "items"))
        self.move((*new, "map", "max_parallel"), (*old, "params", "max_concurrent"))
        composite = template.get("type") in ("parallel", "fan_out", "map_reduce", "branch", "loop")
        if composite or "condition" in template:
            at = (*new, "steps", 0)
            self.move(at, source)
            inner = self.step(template, source, at)
            inner["id"] = str(template.get("id") or f"{step.get('id', 'map')}_item")
            return {"map": over, "steps": [inner]}
        body = self.step(self._with_defaults(template, step), source, new, inner=True)
        for key in ("id", "depends_on"):
            body.pop(key, None)
        if "$legacy" in body:
            # The template publishes the value of one item, the step publishes the list.
            body["$legacy"].pop("publishes", None)
        return {**body, "map": over}

    def _with_defaults(self, template: dict[str, Any], step: Mapping[str, Any]) -> dict[str, Any]:
        """Return the template with missing values taken from the step around it."""
        shared = {key: step[key] for key in ("max_retries", "timeout_seconds") if key in step}
        return {**shared, **template}

    def _fan_in(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        how = str(params.get("aggregation", "concat"))
        source = params.get("input", [])
        if how in AGENTS:
            text = str(params.get("aggregate_prompt") or params.get("prompt") or "Summarise these results: ${items}")
            shown = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
            asked = {key: value for key, value in params.items() if key in _PARAMS["agent"]}
            asked["prompt"] = _ITEMS.sub(lambda _: shown.strip(), text) if _ITEMS.search(text) else f"{text}\n\n{shown}"
            asked.setdefault("role", "analyst")
            made = self._agent(AGENTS[how], asked, old, new)
            self.move((*new, "prompt"), (*old, "params", "aggregate_prompt"))
            return made
        self.move((*new, "aggregate", "from"), (*old, "params", "input"))
        self.move((*new, "aggregate"), (*old, "params"))
        if how not in _AGGREGATIONS:
            hint = suggest(how, [*_AGGREGATIONS, "claude_code", "openai"])
            if how == "custom":
                hint = "It called a function of the program; use concat, json, or claude_code with an aggregate_prompt."
            self.error(f"there is no aggregation `{how}`", (*old, "params", "aggregation"), hint)
        return {"aggregate": {"from": source, "how": _AGGREGATIONS.get(how, "concat")}}

    def _branch(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        key = next((key for key in ("condition", "if", "when") if key in params), "condition")
        condition = params.get(key)
        if condition is None:
            hint = "{field: …, operator: equals, value: …}"
            self.error("a branch needs `params.condition`", old, hint)
            return {"checkpoint": ""}
        ways = [
            next(((name, params[name]) for name in names if params.get(name) is not None), None)
            for names in (_THEN, _ELSE)
        ]
        if not any(ways):
            self.error("a branch needs `then` or `else` in its `params`", old)
        groups: list[dict[str, Any]] = []
        for way, taken in zip(ways, (True, False), strict=True):
            if way is None:
                continue
            named, inline = self._split(way[1])
            for name in named:
                self.decisions.setdefault(name, []).append((str(step.get("id", "")), condition, taken))
            if not inline:
                continue
            at = (*new, "steps", len(groups))
            source = (*old, "params", way[0])
            self.move(at, source)
            self.move((*at, "condition"), (*old, "params", key))
            group = {
                "id": f"{step.get('id', 'branch')}_{'then' if taken else 'else'}",
                **self._decided(condition, taken),
            }
            group["steps"] = self._steps(inline, source, (*at, "steps"), in_order=True)
            groups.append(group)
        return {"steps": groups} if groups else {"checkpoint": ""}

    @staticmethod
    def _split(way: Any) -> tuple[list[str], list[Any]]:
        """Return the steps of one branch: names of steps elsewhere, and steps written here."""
        entries = way if isinstance(way, list) else [way]
        return [entry for entry in entries if isinstance(entry, str)], [e for e in entries if not isinstance(e, str)]

    def _decided(self, condition: Any, taken: bool) -> dict[str, Any]:
        if isinstance(condition, str):
            expression = bare(condition)
            return {"when": expression if taken else f"!({expression})"}
        made = self._condition(condition)
        return {"condition": made if taken else {"not": made}}

    def _apply_decisions(self, steps: list[Any]) -> None:
        """Add the conditions of branches to the steps that they name."""
        for step in steps:
            if not isinstance(step, dict):
                continue
            for branch, condition, taken in self.decisions.pop(str(step.get("id", "")), []):
                self._after(step, [branch])
                decided = self._decided(condition, taken)
                if "condition" in decided and "condition" in step:
                    step["condition"] = {"all": [decided["condition"], step["condition"]]}
                elif "when" in decided and "when" in step:
                    step["when"] = f"({decided['when']}) && ({step['when']})"
                else:
                    step.update(decided)

    def _loop(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        key = next((key for key in ("steps", "step", "body", "do") if params.get(key) is not None), None)
        if key is None:
            self.error("a loop needs `params.steps`, a list of steps", old)
            return {"checkpoint": ""}
        body = params[key]
        source: Path = (*old, "params", key)
        self.move((*new, "steps"), source)
        single = isinstance(body, dict)
        if single:
            body = [{"id": f"{step.get('id', 'loop')}_body", **body}]
            self.move((*new, "steps", 0), source)
        inner = self._steps(body, source, (*new, "steps"), in_order=True)
        if single:
            self.move((*new, "steps", 0), source)
        most = params.get("max_iterations", params.get("max", 10))
        kind = params.get("loop_type") or ("for_each" if "collection" in params or "items" in params else "while")
        made: dict[str, Any] = {"steps": inner}
        if kind == "for_each":
            items = params.get("items", params.get("collection", []))
            if isinstance(items, str) and not _WHOLE.fullmatch(items):
                items = f"${{{items}}}"
            made["map"] = {"over": items, "max_items": MAX_ITEMS, "max_parallel": 1, "as": params.get("as", "item")}
        elif kind == "count":
            count = params.get("count", most)
            made["map"] = {"over": list(range(count)) if isinstance(count, int) else count, "max_parallel": 1}
            made["map"]["max_items"] = MAX_ITEMS
        else:
            made["loop"] = {"until": self._until(params, old), "max": most}
            self.move((*new, "loop", "max"), (*old, "params", "max_iterations"))
        return made

    def _until(self, params: Mapping[str, Any], old: Path) -> Any:
        if params.get("until") is not None:
            until = params["until"]
            return bare(until) if isinstance(until, str) else self._condition(until)
        condition = params.get("condition", params.get("while"))
        if condition is None:
            self.error("a loop needs `condition` (go on while it holds) or `until`", old)
            return "true"
        return f"!({bare(condition)})" if isinstance(condition, str) else {"not": self._condition(condition)}

    def _mcp(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        self.move((*new, "uses"), (*old, "type"))
        self.move((*new, "with"), (*old, "params"))
        for key in ("server", "tool"):
            if not params.get(key):
                self.error(f"an mcp_tool step needs `params.{key}`", old)
        return {"uses": "mcp.call", "with": {"arguments": {}, **params}}

    def _approval(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        message_key = "prompt" if "prompt" in params else "message"
        self.move((*new, "approval"), (*old, "params"))
        self.move((*new, "approval", "message"), (*old, "params", message_key))
        approval: dict[str, Any] = {"message": params.get(message_key) or "Approval required"}
        hours = params.get("timeout_hours", 24)
        seconds = step.get("timeout_seconds")
        plain = isinstance(hours, int | float) and not isinstance(hours, bool)
        approval["timeout"] = seconds if seconds is not None else hours * 3600 if plain else hours
        if params.get("approvers") is not None:
            approval["approvers"] = params["approvers"]
        made: dict[str, Any] = {"approval": approval}
        shown = params.get("preview_from")
        if shown is not None:
            names = [shown] if isinstance(shown, str) else shown
            approval["$preview"] = names
            if isinstance(names, list):
                self._after(made, [name for name in names if isinstance(name, str)])
        return made

    def _integration(
        self, integration: str, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path
    ) -> dict[str, Any]:
        key = next((key for key in ("operation", "action") if key in params), None)
        operation = params[key] if key else step.get("action") or str(step.get("type", "")).partition(".")[2]
        self.move((*new, "uses"), (*old, "params", key) if key else (*old, "action" if "action" in step else "type"))
        self.move((*new, "with"), (*old, "params"))
        if not operation:
            self.error(f"a {integration} step needs `params.operation`", old, "Such as create_issue.")
            return {"checkpoint": ""}
        name = f"{integration}.{operation}"
        arguments = {name: value for name, value in params.items() if name != key}
        return {"uses": _RENAMED.get(name, name), "with": arguments}

    # Modifiers

    def _modifiers(self, step: dict[str, Any], made: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in ("depends_on", "condition", "default_output"):
            self.move((*new, key), (*old, key))
        if step.get("depends_on") is not None:
            found["depends_on"] = step["depends_on"]
        condition = step.get("condition")
        if isinstance(condition, str):
            found["when"] = bare(condition)
            self.move((*new, "when"), (*old, "condition"))
        elif condition is not None:
            found["condition"] = self._condition(condition)
        leaf = not ({"steps", "map", "approval", "checkpoint", "aggregate"} & made.keys())
        if leaf or ("map" in made and "steps" not in made and "retry" not in made):
            found["retry"] = {"max": step.get("max_retries", 3)}
            if "$shell" in made or "run" in made:
                self._command_retry(step, found["retry"])
            found["timeout"] = step.get("timeout_seconds", 300)
        elif "steps" in made and "timeout_seconds" in step:
            found["timeout"] = step["timeout_seconds"]
        self.move((*new, "retry", "max"), (*old, "max_retries"))
        self.move((*new, "timeout"), (*old, "timeout_seconds"))
        if "map" in made and "retry" in made:
            # The template already sets it (or took it from here).
            found.pop("retry", None)
            found.pop("timeout", None)
        found |= self._failure(step, old, new)
        if isinstance(step.get("circuit_breaker_key"), str):
            told = "`circuit_breaker_key` has no effect: there is a breaker for each provider and model"
            self.warn(told, (*old, "circuit_breaker_key"), key=True)
        return found

    @staticmethod
    def _command_retry(step: Mapping[str, Any], retry: dict[str, Any]) -> None:
        """Retry a command that exits with a non-zero status only if the file asks for it."""
        if "max_retries" not in step and step.get("on_failure") != "retry":
            retry["on"] = ["timeout", "invalid_output"]

    def _condition(self, condition: Any) -> Any:
        """Translate a condition: it is false if its field is missing, and graphs had two additional operators."""
        if not isinstance(condition, dict):
            return condition
        for key in ("all", "any"):
            if isinstance(condition.get(key), list):
                return {key: [self._condition(entry) for entry in condition[key]]}
        if "not" in condition:
            return {"not": self._condition(condition["not"])}
        made = {"on_missing": "false", **condition}
        if made.get("operator") == "is_true":
            return {"field": made.get("field"), "operator": "not_empty", "on_missing": "false"}
        if made.get("operator") == "is_false":
            return {**made, "operator": "in", "value": [False, 0, "", "false"]}
        if "value" not in made and made.get("operator") not in (None, "not_empty", "exists", "is_empty"):
            made["value"] = None
        return made

    def _failure(self, step: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        mode = step.get("on_failure", "abort")
        fallback = step.get("fallback")
        if mode == "continue_with_default":
            return {"on_failure": mode, "default_output": step.get("default_output", {})}
        if fallback is not None and mode != "fallback":
            self.warn("`fallback` has no effect without `on_failure: fallback`", (*old, "fallback"), key=True)
        if mode != "fallback":
            return {"on_failure": mode}
        if not isinstance(fallback, dict):
            self.warn("there is no `fallback`, so a failure ends the run", (*old, "on_failure"))
            return {"on_failure": "abort"}
        kind = fallback.get("type", "default_value")
        made: dict[str, Any] = {"type": kind}
        if kind == "default_value":
            made["value"] = fallback.get("value")
        elif kind == "alternate_step" and isinstance(fallback.get("step"), dict):
            source = (*old, "fallback", "step")
            at = (*new, "fallback", "step")
            body = self.step(fallback["step"], source, at, inner=True)
            body.pop("depends_on", None)
            made["step"] = {**body, "id": fallback["step"]["id"]} if "id" in fallback["step"] else body
        elif kind == "callback":
            hint = "It called a function of the program; use default_value or alternate_step."
            self.error("a fallback of type `callback` cannot be run", (*old, "fallback", "type"), hint)
            made = {"type": "default_value", "value": None}
        else:
            made |= {key: value for key, value in fallback.items() if key in {"step", "model"}}
        return {"on_failure": "fallback", "fallback": made}

    def _publish(self, step: dict[str, Any], made: dict[str, Any], *, inner: bool) -> None:
        outputs = step.get("outputs")
        if isinstance(outputs, dict):
            outputs = list(outputs)
        names = [outputs] if isinstance(outputs, str) else outputs
        found: list[str] = []
        for entry in names if isinstance(names, list) else ():
            name = entry.get("name") if isinstance(entry, dict) else entry
            if isinstance(name, str) and name:
                found.append(name)
        # Only if nothing else is published: from the second name on, the model is asked for each name.
        if self.json_form and not found and isinstance(step.get("id"), str) and not inner:
            found.append(f"{step['id']}_output")
        if found:
            made["$legacy"] = {**made.get("$legacy", {}), "publishes": found}
            if not inner:
                self.published.extend(found)
