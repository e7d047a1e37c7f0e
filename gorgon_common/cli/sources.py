"""Finds workflow texts; needs no database."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gorgon_common import documents, errors
from gorgon_common.application.workflows import bundled_text


@dataclass(frozen=True, slots=True)
class Workflow:
    """A workflow's text, and its name in messages; `name` if it is a bundled one."""

    text: str
    file: str
    name: str | None = None


def find_workflow(given: str) -> Workflow:
    """Return the text of a file, a pipe, stdin (`-`) or a bundled workflow.  Raises NotFound, InputInvalid."""
    if given == documents.STDIN or Path(given).exists():
        return Workflow(read_workflow_text(given), documents.shown_name(given))
    path = Path(given)
    if looks_like_path(given):
        near = [entry.name for entry in path.parent.glob("*.y*ml")][:5] if path.parent.is_dir() else []
        hint = f"YAML files there: {', '.join(sorted(near))}." if near else "`gorgon init` writes a first workflow."
        raise errors.NotFound(f"There is no file {given}.", hint=hint)
    return Workflow(bundled_text(given), given, given)


def asked_of_server(file: str) -> dict[str, str]:
    """Return the arguments for a server: a file's text is sent, a name is looked up among the server's workflows."""
    try:
        found = find_workflow(file)
    except errors.NotFound:
        if looks_like_path(file):
            raise
        return {"workflow": file}
    return {"workflow": found.name} if found.name else {"source": found.text}


def looks_like_path(given: str) -> bool:
    """Return whether the argument means a file and not a bundled workflow."""
    return given.endswith((".yaml", ".yml", ".json")) or os.sep in given


def read_workflow_text(name: str) -> str:
    """Return the text of a workflow file, a pipe or stdin (`-`).  Raises NotFound, InputInvalid."""
    return documents.read_text(name, limit=documents.WORKFLOW.max_bytes)
