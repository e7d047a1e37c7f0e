"""Guesses what an invalid file was meant to say, so that the compiler can look for more problems in it.

A repaired file is never run.  The guess only decides whether the user sees all problems at once, or the typing errors
first and the wrong references on the next attempt.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from gorgon_common.documents import Path
from gorgon_common.workflow.schema import Workflow

_MEANT = re.compile(r"Did you mean `([^`]+)`\?")
_HARMLESS = frozenset(
    {
        *("timeout", "deadline", "max_retries", "retry", "max_tokens", "effort", "provider", "budget_usd", "tokens"),
        *("on_budget", "on_doubt", "effect", "cache", "max_items", "max_parallel", "min_success", "on_item_failure"),
        *("limits", "defaults", "triggers", "metadata", "concurrency", "description", "version", "team", "on_failure"),
        *("budget", "join", "max", "backoff", "initial", "cap", "jitter", "on_timeout", "approvers", "allow_failure"),
        *("schedule", "timezone", "on_missed", "on_conflict", "required", "description", "max_items", "trust"),
    }
)
"""Keys whose value is referenced by nothing else in the file: leaving them out does not change the rest."""
_ROUNDS = 6
_NO_WAY = frozenset({"steps", "inputs", "secrets"})
"""Without these, references to them would be reported as wrong."""


@dataclass(slots=True)
class Repaired:
    """A guess.  `spec` is None if a guess would be misleading."""

    spec: Workflow | None = None
    renamed: dict[Path, Path] = field(default_factory=dict)
    """Path of a key as intended → as written."""
    dropped: list[Path] = field(default_factory=list)
    """Unknown keys, whose intended meaning is unclear."""
    partial: list[Path] = field(default_factory=list)
    """Wrong values that were left out; names in the same step keep their meaning."""


def repair(data: dict[str, Any], error: ValidationError) -> Repaired:
    """Return the workflow with the faults of `error` repaired.

    Misspelt keys are replaced by the closest known key, wrong values are left out, and a step without an action does
    nothing.
    """
    guess = copy.deepcopy(data)
    made = Repaired()
    for _ in range(_ROUNDS):
        for entry in error.errors(include_url=False):
            path = tuple(part for part in entry["loc"] if not (isinstance(part, str) and part.startswith(("<", "["))))
            context = entry.get("ctx") or {}
            if not (_mend(guess, path, context, made) or _leave_out(guess, path, made)):
                return made
        try:
            made.spec = Workflow.model_validate(guess)
            break
        except ValidationError as left:
            error = left
    return made


def _mend(data: Any, path: Path, context: dict[str, Any], made: Repaired) -> bool:
    """Repair one fault without losing anything; returns False if that is impossible."""
    owner = _at(data, path[:-1])
    key = path[-1] if path else None
    if not isinstance(owner, dict) or not isinstance(key, str):
        return False
    if key not in owner:
        return True
    meant = _MEANT.search(str(context.get("hint", "")))
    if context.get("key") and "unknown key" in str(context.get("message", "")):
        value = owner.pop(key)
        if meant is None or meant[1] in owner:
            made.dropped.append(path)
        else:
            owner[meant[1]] = value
            made.renamed[(*path[:-1], meant[1])] = path
        return True
    if key in _HARMLESS:
        del owner[key]
        return True
    return False


def _leave_out(data: dict[str, Any], path: Path, made: Repaired) -> bool:
    """Leave out or replace a wrong value; returns False if that would produce misleading problems elsewhere."""
    step = _step_of(path)
    if step:
        return _leave_out_of_step(data, step, path, made)
    if len(path) >= 2 and path[0] == "inputs" and isinstance(data.get("inputs"), dict):
        data["inputs"][path[1]] = {}  # accepts any value
        return True
    if not path or path[0] == "name":
        missing = not isinstance(data.get("name"), str) or not data["name"]
        data["name"] = "a workflow"
        return missing
    if path[0] in _NO_WAY or path[0] not in data:
        return False
    del data[str(path[0])]
    return True


def _leave_out_of_step(data: Any, step: Path, path: Path, made: Repaired) -> bool:
    body = _at(data, step)
    owner = _at(data, step[:-1])
    made.partial.append(path)
    if not isinstance(body, dict):
        if not isinstance(owner, list) or not isinstance(step[-1], int):
            return False
        owner[step[-1]] = {"id": _free_id(step), "checkpoint": ""}
        return True
    key = path[len(step)] if len(path) > len(step) else "id"
    if key != "id":
        if key in ("map", "loop", "steps"):  # these define names for the steps inside
            made.dropped.append(path)
        return body.pop(key, body) is not body
    if not isinstance(body.get("id"), str) or not body["id"]:
        body["id"] = _free_id(step)
        return True
    if "checkpoint" in body:
        return False
    body["checkpoint"] = ""  # it has no readable action
    return True


def _step_of(path: Path) -> Path:
    """Return the path of the innermost step that contains a path; empty outside of steps."""
    found: Path = ()
    for end in range(1, len(path) + 1):
        inner, before = path[end - 1], path[end - 2] if end > 1 else None
        around = path[: max(end - 2, 0)]
        listed = isinstance(inner, int) and before in ("steps", "on_error", "finally") and around in ((), found)
        written = (before, inner) in (("map", "reduce"), ("fallback", "step")) and around == found
        if listed or written:
            found = path[:end]
    return found


def _free_id(step: Path) -> str:
    return "step_" + "_".join(str(part) for part in step if isinstance(part, int))


def _at(data: Any, path: Path) -> Any:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
