"""A best guess at what a faulty file was meant to say, so that the compiler can look for more problems in it.

Nothing repaired is ever run: the guess only decides whether a person is told of all problems at once or of the typing
errors first and of the wrong references at the next attempt.
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
"""Keys whose value nothing else in the file refers to: without them the rest means the same."""
_ROUNDS = 3


@dataclass(slots=True)
class Repaired:
    """A guess.  `spec` is None where it would mislead."""

    spec: Workflow | None = None
    renamed: dict[Path, Path] = field(default_factory=dict)
    """Path of a key as it was meant → as it was written."""
    dropped: list[Path] = field(default_factory=list)
    """Keys that nobody knows; what was meant by them is missing from the guess."""


def repair(data: dict[str, Any], error: ValidationError) -> Repaired:
    """Return the workflow with the faults of `error` mended.

    Misspelt keys become what they resemble; a wrong value is left out where nothing else can refer to it.
    """
    guess = copy.deepcopy(data)
    made = Repaired()
    for _ in range(_ROUNDS):
        for entry in error.errors(include_url=False):
            path = tuple(part for part in entry["loc"] if not (isinstance(part, str) and part.startswith(("<", "["))))
            if not _mend(guess, path, entry.get("ctx") or {}, made):
                return made
        try:
            made.spec = Workflow.model_validate(guess)
            break
        except ValidationError as left:
            error = left
    return made


def _mend(data: Any, path: Path, context: dict[str, Any], made: Repaired) -> bool:
    """Mend one fault; False where nothing can be done."""
    owner = data
    for part in path[:-1]:
        try:
            owner = owner[part]
        except (KeyError, IndexError, TypeError):
            return False
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
