"""Translates JSON of `{id, steps: [{id, type, action, params, next_step}], variables}` into steps with `type:`."""

from __future__ import annotations

import re
from typing import Any

from gorgon_common.documents import Path
from gorgon_common.workflow.legacy.base import Part
from gorgon_common.workflow.schema import suggest

_BRACES = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


class JsonForm(Part):
    """Translates `{id, steps: [{id, type, action, params, next_step}], variables}` into steps with `type:`."""

    _NAMES = (("step_id", "id"), ("step_type", "type"), ("parameters", "params"))

    def flatten(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the file with its keys under their current names and its order in `$after`."""
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
            # The shell reads ${x}, its only way to access a value.
            renamed["params"] = {**params, "command": _BRACES.sub(r"${\1}", params["command"])}
        return renamed

    def _ordered(self, steps: list[Any]) -> list[Any]:
        """Derive `$after` from `next_step`; where no step has one, the order of the file applies."""
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
