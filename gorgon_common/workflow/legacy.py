"""Older workflow formats → the present one, so that files written for the earlier Gorgon load, plan and run unchanged.

Three forms are recognised (`detect`): YAML or JSON with a `type:` on every step, JSON of `{id, steps: [{id, type,
action, params, next_step}], variables}`, and graphs of `nodes` and `edges`.  The last two become the first, the first
becomes what `schema.Workflow` reads; `Translated.moved` remembers where everything stood, so that problems point at the
file as written.

============================================  =========================================================================
written                                       becomes
============================================  =========================================================================
`claude_code`, `openai`                       `prompt`, `role`, `models`, `max_tokens`, `system` (from `system_prompt`),
                                              with `provider: anthropic` or `openai`
`shell` (`command`)                           the unsubstituted text for `sh -c` (`shell`); a list becomes `run`
`parallel` (`steps`, `max_workers`)           `steps`, a group without order of its own
`checkpoint` (`message`)                      `checkpoint`
`fan_out` (`items`, `step_template`)          `map` (`as: item`) on the template's action; a template with a condition,
                                              or itself composite, becomes a group inside the map
`map_reduce` (`map_step`, `reduce_step`)      the same with `reduce`
`fan_in` (`concat`, …)                        `aggregate`
`fan_in` (`claude_code`, `openai`)            `prompt` with `${items}` replaced by the input's expression
`branch` (`condition`, `then`, `else`)        a group of two groups with opposite conditions; where `then` and `else`
                                              name steps, the condition goes to these
`loop` (`steps`, `condition` | `until`)       `loop` on a group whose steps follow each other; `while` runs at least
                                              once; `count` and `for_each` become a `map` of one at a time
`mcp_tool` (`server`, `tool`, `arguments`)    `uses: mcp.call`
`approval` (`prompt`, `preview_from`)         `approval` (`message`, `$preview`), which also waits for what it shows
`github`, `notion`, `gmail`, `slack`          `uses: <type>.<operation>`, the other `params` under `with:`; operations
                                              that have been renamed get their present name
`outputs: [a, b]` of a step                   `$legacy: {publishes: [a, b]}`
`condition`                                   `condition` with `on_missing: false`
`on_failure`, `fallback`, `default_output`    the same; `callback` cannot be run and is an error
`max_retries` (3), `timeout_seconds` (300)    `retry.max`, `timeout`; groups get them only where they are written
`token_budget`, `timeout_seconds`             `limits.tokens` (100,000), `limits.timeout` (3,600 s)
`settings.auto_parallel_max_workers`          `limits.max_parallel`, with `auto_parallel: true`
`inputs` as a list, `list` for `array`        a mapping; JSON types
`variables`                                   inputs with a default
`outputs: [a]` of the workflow                `outputs: {a: "${a}"}`; null, with a warning, where nothing publishes it
a step without `depends_on`                   `$legacy: {order_after: [the step before]}`, unless `auto_parallel`
`next_step`, `edges`                          `order_after`; an edge out of a branch carries the branch's condition on
============================================  =========================================================================

The result is *lenient* (`Workflow.lenient`): every edge, also one from `depends_on` or from an expression, only waits
and passes no skip on; missing values render as nothing.  `${…}` stays as written: the expression language reads it.
In the JSON forms `{{id_output}}` is a step's output, so a step without `outputs:` publishes that name there.
A key that the older format did not know was ignored by it and is ignored here, with a warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gorgon_common.workflow.document import Path
from gorgon_common.workflow.schema import suggest

MAX_ITEMS = 10_000
"""Items of a fan-out: the older format knew no limit."""

_AGENTS = {
    "claude_code": "anthropic",
    "claude": "anthropic",
    "anthropic": "anthropic",
    "openai": "openai",
}
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
TYPES = (
    *("claude_code", "openai", "shell", "parallel", "checkpoint", "fan_out", "fan_in", "map_reduce", "branch", "loop"),
    *("mcp_tool", "approval", "github", "notion", "gmail", "slack"),
)
_KNOWN_TYPES = frozenset({*TYPES, *_AGENTS})

_STEP_KEYS = frozenset(
    [
        "id",
        "type",
        "params",
        "condition",
        "on_failure",
        "max_retries",
        "timeout_seconds",
        "outputs",
        "depends_on",
        "fallback",
        "default_output",
        "circuit_breaker_key",
        "name",
        "description",
        "action",
        "next_step",
    ]
)
_WORKFLOW_KEYS = frozenset(
    [
        "id",
        "workflow_id",
        "name",
        "version",
        "description",
        "inputs",
        "outputs",
        "steps",
        "metadata",
        "token_budget",
        "timeout_seconds",
        "settings",
        "variables",
        "team",
        "nodes",
        "edges",
        "$schema",
        "created_at",
        "updated_at",
        "status",
        "tags",
        "author",
        "category",
    ]
)
_PARAMS: dict[str, frozenset[str]] = {
    "agent": frozenset(["role", "prompt", "model", "max_tokens", "system_prompt", "estimated_tokens"]),
    "shell": frozenset({"command", "allow_failure"}),
    "parallel": frozenset(["steps", "max_workers", "fail_fast", "strategy", "rate_limit"]),
    "checkpoint": frozenset({"message"}),
    "fan_out": frozenset(["items", "max_concurrent", "fail_fast", "step_template", "collect_errors"]),
    "fan_in": frozenset(["input", "aggregation", "aggregate_prompt", "role", "model", "max_tokens", "system_prompt"]),
    "map_reduce": frozenset(["items", "max_concurrent", "fail_fast", "map_step", "reduce_step"]),
    "mcp_tool": frozenset({"server", "tool", "arguments"}),
    "approval": frozenset(["prompt", "message", "preview_from", "timeout_hours", "approvers"]),
}
_PARAMS_HINT = "In the older format it belongs under `params:`."
_TYPE_NAMES = {
    "list": "array",
    "text": "string",
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
}
_TYPE_NAMES |= {"dict": "object", "map": "object", "file": "string", "path": "string", "any": ""}
_THEN = ("then", "if_true", "true", "true_steps", "on_true", "then_steps")
_ELSE = ("else", "if_false", "false", "false_steps", "on_false", "else_steps")
_AGGREGATIONS = {
    **{name: name for name in ("concat", "json", "vote", "first", "merge")},
    "collect": "json",
    "list": "json",
    "array": "json",
}
_ITEMS = re.compile(r"\$\{\s*items\s*\}|\{\{\s*items\s*\}\}")
_WHOLE = re.compile(r"\s*(?:\$\{[^}]*\}|\{\{.*\}\})\s*", re.DOTALL)
_BRACES = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


@dataclass(slots=True)
class Finding:
    """Something to tell about an older file, at a path of the file.  `key`: at the key, not its value."""

    message: str
    path: Path
    hint: str = ""
    severity: str = "error"
    key: bool = False


@dataclass(slots=True)
class Translated:
    """An older file in the present form."""

    data: Any
    moved: dict[Path, Path] = field(default_factory=dict)
    """Path in the present form → path in the file, where they differ."""
    findings: list[Finding] = field(default_factory=list)


def detect(data: Any) -> bool:
    """Tell whether a file is in one of the older formats."""
    if not isinstance(data, dict):
        return False
    if isinstance(data.get("nodes"), list) and "steps" not in data:
        return True
    steps = data.get("steps")
    return isinstance(steps, list) and any(_is_old(step) for step in steps)


def _is_old(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    kind = step.get("type", step.get("step_type"))
    known = isinstance(kind, str) and kind in _KNOWN_TYPES
    return known or (kind is not None and ("params" in step or "parameters" in step))


def translate(data: dict[str, Any]) -> Translated:
    """Return an older file in the present form.  Raises nothing: what is wrong is in the findings."""
    result = Translated(data)
    graph = "nodes" in data and "steps" not in data
    json_form = graph or _is_json_form(data)
    if graph:
        data = _Graph(result).flatten(data)
    elif json_form:
        data = _Json(result).flatten(data)
    result.data = _File(result, json_form=json_form).workflow(data)
    return result


def _is_json_form(data: Mapping[str, Any]) -> bool:
    steps = data.get("steps")
    entries = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    marks = ("next_step", "step_type", "step_id", "parameters")
    return "variables" in data or any(mark in step for step in entries for mark in marks)


class _Part:
    """What the translators share: telling, and remembering where things stood."""

    def __init__(self, result: Translated) -> None:
        self.result = result

    def error(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        self.result.findings.append(Finding(message, path, hint, "error", key))

    def warn(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        self.result.findings.append(Finding(message, path, hint, "warning", key))

    def move(self, new: Path, old: Path) -> None:
        if new != old:
            self.result.moved[new] = old


# ── JSON with next_step ───────────────────────────────────────────────────────────────────────────────────────────────


class _Json(_Part):
    """`{id, steps: [{id, type, action, params, next_step}], variables}` → steps with `type:`."""

    _NAMES = (("step_id", "id"), ("step_type", "type"), ("parameters", "params"))

    def flatten(self, data: dict[str, Any]) -> dict[str, Any]:
        steps = data.get("steps")
        if not isinstance(steps, list):
            return data
        made = [self._step(step, ("steps", index)) for index, step in enumerate(steps)]
        return {**data, "steps": self._ordered(made)}

    def _step(self, step: Any, at: Path) -> Any:
        if not isinstance(step, dict):
            return step
        renamed = dict(step)
        for old, new in self._NAMES:
            if old in renamed and new not in renamed:
                renamed[new] = renamed.pop(old)
                self.move((*at, new), (*at, old))
        params = renamed.get("params")
        if isinstance(params, dict) and isinstance(params.get("command"), str):
            # The shell reads ${x}; it has no other way to a value.
            renamed["params"] = {**params, "command": _BRACES.sub(r"${\1}", params["command"])}
        return renamed

    def _ordered(self, steps: list[Any]) -> list[Any]:
        """`next_step` says who follows; where nobody does, the order of the file holds."""
        named = {step["id"]: step for step in steps if isinstance(step, dict) and isinstance(step.get("id"), str)}
        after: dict[str, list[str]] = {}
        for index, step in enumerate(steps):
            following = step.get("next_step") if isinstance(step, dict) else None
            for name in following if isinstance(following, list) else [following]:
                if name is None:
                    continue
                if not isinstance(name, str) or name not in named:
                    hint = suggest(str(name), named)
                    self.error(f"there is no step `{name}`", ("steps", index, "next_step"), hint)
                elif isinstance(step.get("id"), str):
                    after.setdefault(name, []).append(step["id"])
        made = []
        for index, step in enumerate(steps):
            if isinstance(step, dict):
                before = steps[index - 1] if index else None
                told = isinstance(before, dict) and "next_step" in before
                follows = after.get(str(step.get("id")))
                if follows is not None or told or index == 0:
                    step = {**step, "$after": follows or []}
                step.pop("next_step", None)
            made.append(step)
        return made


# ── Graphs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Graph(_Part):
    """`nodes` and `edges` → steps with `type:`, `$after` and conditions."""

    def flatten(self, data: dict[str, Any]) -> dict[str, Any]:
        self.nodes: dict[str, tuple[int, dict[str, Any]]] = {}
        self._read_nodes(data["nodes"])
        self._read_edges(data.get("edges"))
        self._bodies()
        order = self._sorted()
        self.guards: dict[str, list[tuple[str, bool]]] = {}
        steps: list[Any] = []
        for name in order:
            self.guards[name] = self._guard(name)
            if self._kind(name) in {"start", "end"}:
                continue
            if not any(name in body for body in self.inside.values()):
                at: Path = ("steps", len(steps))
                steps.append(self._step(name, at))
        whole = {key: value for key, value in data.items() if key not in {"nodes", "edges"}}
        if not isinstance(whole.get("name"), str) or not whole["name"]:
            whole["name"] = str(data.get("id") or "workflow")
        return {**whole, "steps": steps}

    def _read_nodes(self, nodes: list[Any]) -> None:
        for index, node in enumerate(nodes):
            if not isinstance(node, dict) or not isinstance(node.get("id"), str | int):
                self.error("a node needs an `id`", ("nodes", index))
                continue
            if str(node["id"]) in self.nodes:
                self.error(f"the id `{node['id']}` is used twice", ("nodes", index, "id"))
                continue
            self.nodes[str(node["id"])] = (index, node)

    def _read_edges(self, edges: Any) -> None:
        self.incoming: dict[str, list[tuple[str, str]]] = {name: [] for name in self.nodes}
        self.outgoing: dict[str, list[tuple[str, str]]] = {name: [] for name in self.nodes}
        for index, edge in enumerate(edges if isinstance(edges, list) else ()):
            if not isinstance(edge, dict):
                self.error("an edge needs `source` and `target`", ("edges", index))
                continue
            ends = [edge.get("source", edge.get("from")), edge.get("target", edge.get("to"))]
            unknown = [end for end in ends if str(end) not in self.nodes]
            for end in unknown:
                self.error(f"there is no node `{end}`", ("edges", index), suggest(str(end), self.nodes))
            if not unknown:
                source, target = str(ends[0]), str(ends[1])
                handle = str(edge.get("sourceHandle") or edge.get("source_handle") or edge.get("label") or "").lower()
                self.outgoing[source].append((target, handle))
                self.incoming[target].append((source, handle))

    def _kind(self, name: str) -> str:
        node = self.nodes[name][1]
        return str(node.get("type") or "agent")

    def _bodies(self) -> None:
        """Nodes between a loop's `body` handle and the way back belong to the loop."""
        self.inside: dict[str, list[str]] = {}
        for name in self.nodes:
            begins = [target for target, handle in self.outgoing[name] if handle in {"body", "loop", "each"}]
            if self._kind(name) != "loop" or not begins:
                continue
            others = [target for target, handle in self.outgoing[name] if handle not in {"body", "loop", "each"}]
            outside = self._reached(others, name)
            self.inside[name] = [entry for entry in self._reached(begins, name) if entry not in outside]
        for loop, body in self.inside.items():
            self.incoming[loop] = [edge for edge in self.incoming[loop] if edge[0] not in body]
            for entry in body:
                self.outgoing[entry] = [edge for edge in self.outgoing[entry] if edge[0] != loop]
                self.incoming[entry] = [edge for edge in self.incoming[entry] if edge[0] != loop]
            self.outgoing[loop] = [edge for edge in self.outgoing[loop] if edge[0] not in body]

    def _reached(self, begins: list[str], stop: str) -> list[str]:
        found: list[str] = []
        waiting = list(begins)
        while waiting:
            name = waiting.pop(0)
            if name == stop or name in found:
                continue
            found.append(name)
            waiting.extend(target for target, _ in self.outgoing[name])
        return found

    def _sorted(self) -> list[str]:
        """Nodes, each after those it follows; nodes of a cycle at the end, for the compiler to refuse."""
        left = {name: len(self.incoming[name]) for name in self.nodes}
        ready = [name for name, count in left.items() if not count]
        order: list[str] = []
        while ready:
            name = ready.pop(0)
            order.append(name)
            for target, _ in self.outgoing[name]:
                left[target] -= 1
                if not left[target]:
                    ready.append(target)
        return [*order, *(name for name in self.nodes if name not in order)]

    def _guard(self, name: str) -> list[tuple[str, bool]]:
        """Branch decisions that hold on every way to the node."""
        ways: list[list[tuple[str, bool]]] = []
        for source, handle in self.incoming[name]:
            way = list(self.guards.get(source, []))
            if self._kind(source) == "branch" and handle in {"true", "false", "yes", "no"}:
                way.append((source, handle in {"true", "yes"}))
            ways.append(way)
        return [entry for entry in ways[0] if all(entry in way for way in ways)] if ways else []

    def _before(self, name: str) -> list[str]:
        """Steps that a node follows: start and end nodes are only points to pass."""
        found: list[str] = []
        for source, _ in self.incoming[name]:
            found.extend(self._before(source) if self._kind(source) in {"start", "end"} else [source])
        return list(dict.fromkeys(found))

    def _step(self, name: str, at: Path) -> dict[str, Any]:
        index, node = self.nodes[name]
        source: Path = ("nodes", index)
        self.move(at, source)
        data = node.get("data")
        data = dict(data) if isinstance(data, dict) else {}
        step: dict[str, Any] = {"id": name, "type": self._agent_type(name, data), "$after": self._before(name)}
        inner = data.pop("params", None)
        for key in _STEP_KEYS - {"id", "type", "params", "action", "next_step"}:
            if key in data and not (key == "condition" and self._kind(name) in {"branch", "loop"}):
                step[key] = data.pop(key)
                self.move((*at, key), (*source, "data", key))
        step["params"] = {**data, **(inner if isinstance(inner, dict) else {})}
        for key in step["params"]:
            where = ("data", "params", key) if isinstance(inner, dict) and key in inner else ("data", key)
            self.move((*at, "params", key), (*source, *where))
        drawn = ("label", "provider", "agent", "agent_type", "icon", "color", "status")
        for key in (*drawn, "condition") if self._kind(name) == "branch" else drawn:
            step["params"].pop(key, None)
        guard = [self._decision(branch, taken) for branch, taken in self.guards.get(name, [])]
        if guard:
            own = [step["condition"]] if isinstance(step.get("condition"), dict) else []
            step["condition"] = {"all": [*guard, *own]} if len(guard) + len(own) > 1 else guard[0]
        if name in self.inside:
            step["params"]["steps"] = [
                self._step(entry, (*at, "params", "steps", position))
                for position, entry in enumerate(self.inside[name])
            ]
        return step

    def _agent_type(self, name: str, data: Mapping[str, Any]) -> str:
        kind = self._kind(name)
        if kind not in {"agent", "default", "custom"}:
            # A branch decides nothing of its own here: its edges carry the condition.
            return "checkpoint" if kind == "branch" else kind
        said = str(data.get("provider") or data.get("agent_type") or data.get("agent") or "claude_code").lower()
        return "openai" if "openai" in said or "gpt" in said else "claude_code"

    def _decision(self, branch: str, taken: bool) -> dict[str, Any]:
        index, node = self.nodes[branch]
        data = node.get("data")
        condition = data.get("condition") if isinstance(data, dict) else None
        if not isinstance(condition, dict):
            self.error("a branch needs a `condition`", ("nodes", index), "{field: …, operator: equals, value: …}")
            condition = {"field": "missing", "operator": "exists"}
        return dict(condition) if taken else {"not": dict(condition)}


# ── Steps with `type:` ────────────────────────────────────────────────────────────────────────────────────────────────


class _File(_Part):
    """Steps with `type:` and `params:` → what the schema reads."""

    def __init__(self, result: Translated, *, json_form: bool) -> None:
        super().__init__(result)
        self.json_form = json_form
        self.moved_before = dict(result.moved)
        self.published: list[str] = []
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

    def move(self, new: Path, old: Path) -> None:
        """Paths of a graph or of the JSON form are already not those of the file: go through them."""
        for length in range(len(old), -1, -1):
            if old[:length] in self.moved_before:
                old = (*self.moved_before[old[:length]], *old[length:])
                break
        super().move(new, old)

    def _origin(self, path: Path) -> Path:
        for length in range(len(path), -1, -1):
            if path[:length] in self.moved_before:
                return (*self.moved_before[path[:length]], *path[length:])
        return path

    def error(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        super().error(message, self._origin(path), hint, key=key)

    def warn(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        super().warn(message, self._origin(path), hint, key=key)

    # The workflow

    def workflow(self, data: dict[str, Any]) -> dict[str, Any]:
        for key in data:
            if key not in _WORKFLOW_KEYS:
                self.warn(f"`{key}` is no key of the older format and is ignored", (key,), key=True)
        settings = data.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        together = settings.get("auto_parallel") is True
        limits: dict[str, Any] = {"tokens": data.get("token_budget", 100_000)}
        limits["timeout"] = data.get("timeout_seconds", 3600)
        self.move(("limits", "tokens"), ("token_budget",))
        self.move(("limits", "timeout"), ("timeout_seconds",))
        if together:
            limits["max_parallel"] = settings.get("auto_parallel_max_workers", 4)
            self.move(("limits", "max_parallel"), ("settings", "auto_parallel_max_workers"))
        made: dict[str, Any] = {
            "name": data.get("name") or data.get("id") or data.get("workflow_id"),
            "limits": limits,
            "inputs": self._inputs(data),
            "$lenient": True,
        }
        if made["name"] is None:
            del made["name"]
        for key in ("description", "team", "metadata"):
            if data.get(key) is not None:
                made[key] = data[key]
        if data.get("version") is not None:
            made["version"] = str(data["version"])
        if "steps" in data:
            made["steps"] = self._steps(data["steps"], ("steps",), ("steps",), in_order=not together)
        for name, branches in self.decisions.items():
            self.error(f"the branch `{branches[0][0]}` names a step `{name}` that does not exist", ("steps",))
        made["outputs"] = self._outputs(data, made)
        made["$published"] = list(dict.fromkeys(self.published))
        return made

    def _inputs(self, data: Mapping[str, Any]) -> Any:
        made: dict[str, Any] = {}
        inputs = data.get("inputs") or {}
        if isinstance(inputs, list):
            for index, entry in enumerate(inputs):
                if isinstance(entry, str):
                    made[entry] = {"type": "string", "required": True}
                elif isinstance(entry, dict) and isinstance(entry.get("name"), str):
                    name = entry["name"]
                    self.move(("inputs", name), ("inputs", index))
                    made[name] = self._input({k: v for k, v in entry.items() if k != "name"}, ("inputs", index))
                else:
                    self.error("an input needs a `name`", ("inputs", index), "{name: …, type: string}")
        elif isinstance(inputs, dict):
            made = {name: self._input(entry, ("inputs", name)) for name, entry in inputs.items()}
        else:
            self.error("`inputs` must be a mapping or a list", ("inputs",))
        variables = data.get("variables")
        for name, value in (variables if isinstance(variables, dict) else {}).items():
            self.move(("inputs", name), ("variables", name))
            described = isinstance(value, dict) and "type" in value and set(value) <= {"type", "default", "description"}
            made.setdefault(name, self._input(value if described else {"default": value}, ("variables", name)))
        return made

    def _input(self, entry: Any, at: Path) -> Any:
        """One input: types by their present names, what contradicts itself made consistent."""
        if isinstance(entry, str):
            entry = {"type": entry}
        if not isinstance(entry, dict):
            return {"default": entry} if entry is not None else {}
        kept = {key: entry[key] for key in ("default", "description", "enum", "items") if entry.get(key) is not None}
        kind = entry.get("type")
        if isinstance(kind, str):
            kind = _TYPE_NAMES.get(kind.lower(), kind)
        if kind:
            kept["type"] = kind
        if entry.get("required") is True and "default" not in kept:
            kept["required"] = True
        if "default" in kept and isinstance(kind, str) and not _default_fits(kept["default"], kind):
            self.warn(f"the default is not of type `{kind}`; the type is ignored", (*at, "default"))
            del kept["type"]
        for key in entry:
            if key not in {"default", "description", "enum", "items", "type", "required", "name"}:
                self.warn(f"`{key}` of an input is ignored", (*at, key), key=True)
        return kept

    def _outputs(self, data: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
        outputs = data.get("outputs") or {}
        if isinstance(outputs, dict):
            return outputs
        if not isinstance(outputs, list):
            self.error("`outputs` must be a list of names", ("outputs",))
            return {}
        steps = made.get("steps")
        ids = [step.get("id") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
        known = {*self.published, *(name for name in ids if isinstance(name, str)), *made["inputs"]}
        found: dict[str, Any] = {}
        for index, entry in enumerate(outputs):
            name = entry.get("name") if isinstance(entry, dict) else entry
            if not isinstance(name, str) or not name:
                self.error("an output needs a name", ("outputs", index))
                continue
            self.move(("outputs", name), ("outputs", index))
            found[name] = f"${{{name}}}" if name in known else None
            if name not in known:
                hint = suggest(name, known)
                self.warn(f"no step publishes `{name}`: this output will be null", ("outputs", index), hint)
        return found

    # Steps

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
        """One step.  `inner`: a template, written inside another step, whose id does not count."""
        kind = step.get("type")
        if kind is None:
            hint = "Another step of this file has `type:`, so the file is in the older format. Use one format."
            self.error("the step has no `type`", old, hint)
            return {"id": step.get("id"), "checkpoint": ""} if "id" in step else {"checkpoint": ""}
        for key in step:
            if key not in _STEP_KEYS and not key.startswith("$"):
                hint = _PARAMS_HINT if any(key in known for known in _PARAMS.values()) else suggest(key, _STEP_KEYS)
                self.warn(f"`{key}` is no key of a step and is ignored", (*old, key), hint, key=True)
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
        if kind in _AGENTS:
            self._unknown("agent", params, old)
            return self._agent(_AGENTS[kind], params, old, new)
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
            # What the template publishes is one item's; the step publishes the list.
            body["$legacy"].pop("publishes", None)
        return {**body, "map": over}

    def _with_defaults(self, template: dict[str, Any], step: Mapping[str, Any]) -> dict[str, Any]:
        """A template takes what it does not say from the step around it."""
        shared = {key: step[key] for key in ("max_retries", "timeout_seconds") if key in step}
        return {**shared, **template}

    def _fan_in(self, step: dict[str, Any], params: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        how = str(params.get("aggregation", "concat"))
        source = params.get("input", [])
        if how in _AGENTS:
            text = str(params.get("aggregate_prompt") or params.get("prompt") or "Summarise these results: ${items}")
            shown = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
            asked = {key: value for key, value in params.items() if key in _PARAMS["agent"]}
            asked["prompt"] = _ITEMS.sub(lambda _: shown.strip(), text) if _ITEMS.search(text) else f"{text}\n\n{shown}"
            asked.setdefault("role", "analyst")
            made = self._agent(_AGENTS[how], asked, old, new)
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
        """The steps of one way: names of steps elsewhere, and steps written here."""
        entries = way if isinstance(way, list) else [way]
        return [entry for entry in entries if isinstance(entry, str)], [e for e in entries if not isinstance(e, str)]

    @property
    def decisions(self) -> dict[str, list[tuple[str, Any, bool]]]:
        """Step id → the branches that name it: their id, condition and side."""
        if not hasattr(self, "_decisions"):
            self._decisions: dict[str, list[tuple[str, Any, bool]]] = {}
        return self._decisions

    def _decided(self, condition: Any, taken: bool) -> dict[str, Any]:
        if isinstance(condition, str):
            bare = _bare(condition)
            return {"when": bare if taken else f"!({bare})"}
        made = self._condition(condition)
        return {"condition": made if taken else {"not": made}}

    def _apply_decisions(self, steps: list[Any]) -> None:
        """Put the conditions of branches on the steps that they name."""
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
            return _bare(until) if isinstance(until, str) else self._condition(until)
        condition = params.get("condition", params.get("while"))
        if condition is None:
            self.error("a loop needs `condition` (go on while it holds) or `until`", old)
            return "true"
        return f"!({_bare(condition)})" if isinstance(condition, str) else {"not": self._condition(condition)}

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
            found["when"] = _bare(condition)
            self.move((*new, "when"), (*old, "condition"))
        elif condition is not None:
            found["condition"] = self._condition(condition)
        leaf = not ({"steps", "map", "approval", "checkpoint", "aggregate"} & made.keys())
        if leaf or ("map" in made and "steps" not in made and "retry" not in made):
            found["retry"] = {"max": step.get("max_retries", 3)}
            found["timeout"] = step.get("timeout_seconds", 300)
        elif "steps" in made and "timeout_seconds" in step:
            found["timeout"] = step["timeout_seconds"]
        self.move((*new, "retry", "max"), (*old, "max_retries"))
        self.move((*new, "timeout"), (*old, "timeout_seconds"))
        if "map" in made and "retry" in made:
            # The template said it (or took it from here).
            found.pop("retry", None)
            found.pop("timeout", None)
        found |= self._failure(step, old, new)
        if isinstance(step.get("circuit_breaker_key"), str):
            found["$legacy"] = {**made.get("$legacy", {}), "breaker": step["circuit_breaker_key"]}
        return found

    def _condition(self, condition: Any) -> Any:
        """A condition is false where its field is missing; graphs had two operators of their own."""
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
        # Only where nothing else is published: from the second on, names are asked of the model.
        if self.json_form and not found and isinstance(step.get("id"), str) and not inner:
            found.append(f"{step['id']}_output")
        if found:
            made["$legacy"] = {**made.get("$legacy", {}), "publishes": found}
            if not inner:
                self.published.extend(found)


def _bare(text: str) -> str:
    """An expression without the braces around the whole of it."""
    stripped = text.strip()
    for opening, closing in (("${", "}"), ("{{", "}}")):
        inside = stripped[len(opening) : -len(closing)]
        if stripped.startswith(opening) and stripped.endswith(closing) and opening not in inside:
            return inside.strip()
    return stripped


def _default_fits(value: Any, kind: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
        "object": (dict,),
    }
    if kind not in kinds:
        return True
    return isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))
