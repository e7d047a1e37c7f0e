"""Translates the workflow around the steps: limits, inputs, outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common.documents import Path
from gorgon_common.workflow.legacy.steps import Steps
from gorgon_common.workflow.schema import suggest

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
_TYPE_NAMES = {
    "list": "array",
    "text": "string",
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
}
_TYPE_NAMES |= {"dict": "object", "map": "object", "file": "string", "path": "string", "any": ""}


class File(Steps):
    """A whole file with steps that have a `type:`."""

    def workflow(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the whole file in the current format."""
        for key in data:
            if key not in _WORKFLOW_KEYS:
                self.warn(f"`{key}` is not a key of the older format and is ignored", (key,), key=True)
        settings = data.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        for key in settings:
            if key not in ("auto_parallel", "auto_parallel_max_workers"):
                self.warn(f"the setting `{key}` is ignored", ("settings", key), key=True)
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
        """Translate one input: types get their current names, and contradictions are resolved."""
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
