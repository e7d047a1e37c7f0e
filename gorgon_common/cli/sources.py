"""Where workflow texts come from, and what they mean; needs no database."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gorgon_common import errors
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow import catalogue
from gorgon_common.workflow.plan import Plan
from gorgon_common.workflow.source import read_workflow

_MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Workflow:
    """A workflow's text, and what it is called in messages; `name` where it is a bundled one."""

    text: str
    file: str
    name: str | None = None


def find_workflow(given: str) -> Workflow:
    """Return the text of a file, of stdin (`-`) or of a bundled workflow.  Raises NotFound, InputInvalid."""
    if given == "-":
        return Workflow(sys.stdin.read(_MAX_BYTES), "<stdin>")
    path = Path(given)
    if path.is_file():
        return Workflow(read_text(path), given)
    if path.is_dir():
        raise errors.InputInvalid(f"{given} is a directory; a workflow is a YAML file.")
    if looks_like_path(given):
        near = [entry.name for entry in path.parent.glob("*.y*ml")][:5] if path.parent.is_dir() else []
        hint = f"YAML files there: {', '.join(sorted(near))}." if near else "`gorgon init` writes a first workflow."
        raise errors.NotFound(f"There is no file {given}.", hint=hint)
    return Workflow(catalogue.source(given), given, given)


def asked_of_server(file: str) -> dict[str, str]:
    """Return how a server is asked: a file's text travels, a name is looked up among the server's own workflows."""
    try:
        found = find_workflow(file)
    except errors.NotFound:
        if looks_like_path(file):
            raise
        return {"workflow": file}
    return {"workflow": found.name} if found.name else {"source": found.text}


def compile_text(text: str, *, file: str) -> tuple[Plan, list[errors.Problem]]:
    """Return the plan and the warnings, with no database at hand.  Raises WorkflowInvalid."""
    return read_workflow(text, file=file, roles=load_roles(), operations=load_operations())


def looks_like_path(given: str) -> bool:
    """Tell whether somebody means a file and not a bundled workflow."""
    return given.endswith((".yaml", ".yml", ".json")) or os.sep in given


def read_text(path: Path) -> str:
    """Return a workflow file's text.  Raises InputInvalid."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise errors.InputInvalid(f"{path} is too large for a workflow file.")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.InputInvalid(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise errors.InputInvalid(f"{path}: {error.strerror}.") from None
