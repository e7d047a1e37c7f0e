"""Turns workflow text into a Plan with the loader and the compiler.  The entry point for API, CLI and worker."""

from __future__ import annotations

from typing import Any

from gorgon_common.documents import Path, parse_path
from gorgon_common.errors import Problem, WorkflowInvalid
from gorgon_common.workflow.compiler import try_compile
from gorgon_common.workflow.loader import inspect, tidy
from gorgon_common.workflow.plan import Plan

_REFERENCES = ("there is nothing called", "there is no step", "there is no input")


def read_workflow(text: str, *, file: str | None = None, roles: Any, operations: Any) -> tuple[Plan, list[Problem]]:
    """Return the plan of a workflow and the warnings.  Raises WorkflowInvalid with every problem at once.

    `roles`: name or alias → Role; `operations`: name → Operation.  A file with mistakes is still compiled if enough of
    it is usable, so that wrong references are reported together with misspelt keys.
    """
    found = inspect(text, file=file, roles=roles, operations=operations)
    if found.loaded is None:
        raise WorkflowInvalid(found.problems, source=text)
    compiled = try_compile(found.loaded, roles=roles, operations=operations)
    if not found.broken:
        problems = tidy([*found.problems, *compiled.problems])
        if compiled.plan is None:
            raise WorkflowInvalid(problems, source=text)
        return compiled.plan, problems
    told = {(problem.line, problem.column) for problem in found.problems}
    steps = {_step(path) for path in found.dropped}
    partly = {_step(path) for path in found.partial}
    more = [
        problem
        for problem in compiled.problems
        if (problem.line, problem.column) not in told
        and _step(parse_path(problem.path)) not in steps
        and (_step(parse_path(problem.path)) not in partly or _is_reference(problem))
    ]
    raise WorkflowInvalid(tidy([*found.problems, *more]), source=text)


def _is_reference(problem: Problem) -> bool:
    """Tell whether a problem is about a name; such a problem holds even in a step that was partly left out."""
    return problem.severity == "error" and problem.message.startswith(_REFERENCES)


def _step(path: Path) -> Path:
    """Return the path of the step that contains a path; the path itself outside of steps."""
    if len(path) >= 2 and path[0] in {"steps", "on_error", "finally"}:
        return path[:2]
    return path
