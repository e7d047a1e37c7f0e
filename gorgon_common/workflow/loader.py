"""Loads a workflow file into a checked `Workflow`, or reports everything that is wrong with it at once.

`load` parses the text (`document`), translates the older formats into the current one (`legacy`), validates the result
against the models (`schema`) and checks what the models cannot know: ids, roles, operations.  Checks that need the
whole graph (references, types, cycles) belong to the compiler; `source.read_workflow` runs both.

Messages are written for someone new to the language: what is wrong, where, and what to write instead.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from gorgon_common.documents import Path, Positions, parse_path, quoted, read_document
from gorgon_common.errors import Problem, WorkflowInvalid
from gorgon_common.workflow import legacy
from gorgon_common.workflow.expressions import check_id
from gorgon_common.workflow.repair import repair
from gorgon_common.workflow.schema import Workflow, suggest

MAX_PROBLEMS = 100
MAX_STEPS = 10_000
"""The maximum number of steps in a file, including inner ones: as many as the engine runs."""


@dataclass(slots=True)
class LoadedWorkflow:
    """A file that is valid as far as can be checked without its graph."""

    spec: Workflow
    positions: Positions
    legacy: bool = False
    """The file is in one of the older formats."""
    problems: list[Problem] = field(default_factory=list)
    """Warnings; errors are raised."""
    file: str | None = None

    def problem(
        self,
        message: str,
        path: Path | str = (),
        *,
        hint: str = "",
        offset: int | None = None,
        key: bool = False,
        severity: str = "error",
    ) -> Problem:
        """Return a problem at a path of the spec, with its file, line and column.

        `offset` points at a character of a text value, such as the start of an expression in it.
        """
        return self.positions.problem(
            message, path, file=self.file, hint=hint, offset=offset, key=key, severity=severity
        )


@dataclass(slots=True)
class Inspected:
    """The readable part of a file.

    `loaded` is None if nothing worth compiling is left.  If `problems` contains errors, it may be a repaired reading.
    A repaired reading is only used to find more problems, and none in steps with `dropped` keys, whose intended meaning
    is unknown.
    """

    loaded: LoadedWorkflow | None
    problems: list[Problem]
    dropped: list[Path] = field(default_factory=list)
    partial: list[Path] = field(default_factory=list)
    """Places where something wrong was left out; in their steps, only references to names can be checked."""

    @property
    def broken(self) -> bool:
        """The problems include an error."""
        return any(problem.severity == "error" for problem in self.problems)


def load(
    text: str,
    *,
    file: str | None = None,
    roles: Iterable[str] | None = None,
    operations: Iterable[str] | None = None,
) -> LoadedWorkflow:
    """Read a workflow file.  Raises WorkflowInvalid with every problem.

    `roles` and `operations` contain the names that a step may use (mappings work too); None disables the check.
    """
    found = inspect(text, file=file, roles=roles, operations=operations)
    if found.loaded is None or found.broken:
        raise WorkflowInvalid(found.problems)
    return found.loaded


def inspect(
    text: str,
    *,
    file: str | None = None,
    roles: Iterable[str] | None = None,
    operations: Iterable[str] | None = None,
) -> Inspected:
    """Read as much of a workflow file as possible.  Raises nothing; see `load` for the arguments."""
    document = read_document(text, file=file)
    if not document.whole:
        return Inspected(None, tidy(document.problems))
    positions, problems = document.positions, list(document.problems)
    if not isinstance(document.data, dict):
        hint = "Begin with `name:`, then `steps:` with a list."
        problems.append(positions.problem("a workflow is a mapping (`key: value`)", (), file=file, hint=hint))
        return Inspected(None, tidy(problems))
    data, old = document.data, legacy.detect(document.data)
    if extra := next(itertools.islice(_steps(data), MAX_STEPS, None), None):
        hint = "Split the workflow, or let one step work on a list with `map:`."
        told = f"the file has more than {MAX_STEPS:,} steps"
        return Inspected(None, tidy([*problems, positions.problem(told, extra[0], file=file, hint=hint)]))
    if old:
        translated = legacy.translate(data)
        # The findings use paths of the file, so report them before paths refer to the spec.
        problems += [
            positions.problem(
                entry.message, entry.path, file=file, hint=entry.hint, severity=entry.severity, key=entry.key
            )
            for entry in translated.findings
        ]
        data, positions.moved = translated.data, translated.moved
    spec: Workflow | None = None
    dropped: list[Path] = []
    partial: list[Path] = []
    try:
        spec = Workflow.model_validate(data, context={"legacy": old})
    except ValidationError as error:
        problems += _translate(error, positions, file)
        if not old:
            guess = repair(data, error)
            spec, dropped, partial = guess.spec, guess.dropped, guess.partial
            positions.moved = guess.renamed
    names = list(_check_names(data, positions, file, old=old, roles=roles, operations=operations))
    partial += [parse_path(problem.path) for problem in names if problem.path.endswith("id")]
    # Unreadable values were replaced; their lines already have a problem.
    unread = {problem.line for problem in document.problems}
    problems = tidy([*document.problems, *(entry for entry in [*problems, *names] if entry.line not in unread)])
    loaded = LoadedWorkflow(spec, positions, old, problems, file) if spec is not None else None
    return Inspected(loaded, problems, dropped, partial)


def tidy(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems in file order, without duplicates."""
    ordered = sorted(problems, key=lambda entry: (entry.line or 0, entry.column or 0, entry.severity))
    unique = list({(entry.line, entry.column, entry.message): entry for entry in reversed(ordered)}.values())[::-1]
    return unique[:MAX_PROBLEMS]


# ── Messages for the models' errors ───────────────────────────────────────────────────────────────────────────────────


def _translate(error: ValidationError, positions: Positions, file: str | None) -> Iterator[Problem]:
    for entry in error.errors(include_url=False):
        path = tuple(part for part in entry["loc"] if not (isinstance(part, str) and _tag(part)))
        context: dict[str, Any] = entry.get("ctx") or {}
        if entry["type"] == "gorgon":
            message, hint, key = context["message"], context["hint"], context["key"]
        else:
            source = positions.text(path)
            message, hint = _explain(entry["type"], _name(path), entry["input"], context, source)
            message, key = message or f"{_name(path)}: {entry['msg'][:1].lower()}{entry['msg'][1:]}", False
        yield positions.problem(message, path, file=file, hint=hint, key=key)


def _tag(part: str) -> bool:
    """Tell whether a part of a location is pydantic's own rather than the file's."""
    return part in {"<expression>", "<condition>", "<text>", "<argv>", "[key]"}


def _name(path: Path) -> str:
    """Return the name that messages use for the value at a path: `timeout`, an item of `tags`."""
    if path and isinstance(path[-1], int):
        owner = next((part for part in reversed(path) if isinstance(part, str)), "the list")
        return f"item {path[-1] + 1} of `{owner}`"
    return f"`{path[-1]}`" if path else "the workflow"


_YES = re.compile(r"(?i)yes|no|on|off|y|n|true|false")


def _explain(kind: str, name: str, value: Any, context: dict[str, Any], source: str) -> tuple[str, str]:
    """Return message and hint for one of pydantic's own errors; an empty message if there is none."""
    shown = source if len(source) <= 60 else f"{source[:59]}…"
    if kind == "string_type":
        simple = isinstance(value, int | float) or value is None
        return f"{name} must be text", f"Put it in quotes: {quoted(source)}" if simple and source else ""
    if kind in {"int_type", "int_from_float", "int_parsing"}:
        return f"{name} must be a whole number, not {_shown(value, shown)}", ""
    if kind in {"float_type", "float_parsing"}:
        return f"{name} must be a number, not {_shown(value, shown)}", ""
    if kind in {"bool_type", "bool_parsing"}:
        word = isinstance(value, str) and _YES.fullmatch(value)
        hint = "`yes`, `no`, `on` and `off` are text in YAML 1.2: write true or false, without quotes." if word else ""
        return f"{name} must be true or false, not {_shown(value, shown)}", hint
    if kind == "list_type":
        hint = f"Write [{shown}] or one `- ` line for each." if isinstance(value, str | int) and shown else ""
        return f"{name} must be a list", hint
    if kind == "dict_type":
        return f"{name} must be a mapping (`key: value`)", ""
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context.get("expected", ""))
        return f"{_shown(value, shown)} is not a value of {name}", suggest(str(value), known)
    return _explain_bounds(kind, name, context), ""


def _explain_bounds(kind: str, name: str, context: dict[str, Any]) -> str:
    bounds = {
        "greater_than_equal": ("must be at least {}", "ge"),
        "greater_than": ("must be more than {}", "gt"),
        "less_than_equal": ("must be at most {}", "le"),
        "less_than": ("must be less than {}", "lt"),
        "too_short": ("is an empty list", ""),
        "string_too_short": ("is empty", ""),
        "finite_number": ("must be a finite number", ""),
    }
    if kind not in bounds:
        return ""
    words, key = bounds[kind]
    return f"{name} {words.format(context.get(key, ''))}"


def _shown(value: Any, source: str) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"`{source or value}`"


# ── Checks beyond the models ──────────────────────────────────────────────────────────────────────────────────────────


def _steps(data: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every step of a file that may still be invalid, in file order."""
    waiting: list[tuple[Path, Any]] = []
    for part in ("finally", "on_error", "steps"):
        waiting.extend(_entries((part,), data.get(part)))
    while waiting:
        path, step = waiting.pop()
        if not isinstance(step, dict):
            continue
        yield path, step
        for owner, key in (("fallback", "step"), ("map", "reduce")):
            waiting.append(((*path, owner, key), _get(step.get(owner), key)))
        waiting.extend(_entries((*path, "steps"), step.get("steps")))


def _entries(path: Path, steps: Any) -> list[tuple[Path, Any]]:
    found = [((*path, index), step) for index, step in enumerate(steps)] if isinstance(steps, list) else []
    return found[::-1]


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _check_names(
    data: Mapping[str, Any],
    positions: Positions,
    file: str | None,
    *,
    old: bool,
    roles: Iterable[str] | None,
    operations: Iterable[str] | None,
) -> Iterator[Problem]:
    seen: dict[str, Path] = {}
    for path, step in _steps(data):
        name = step.get("id")
        if isinstance(name, str) and name:
            at = (*path, "id")
            if name in seen:
                line = positions.at((*seen[name], "id"))[0]
                hint = f"The step in line {line} already has this id; ids are unique in the whole file."
                yield positions.problem(f"the id `{name}` is used twice", at, file=file, hint=hint)
            seen.setdefault(name, path)
            # Older files can refer to any id as steps["run-tests"].
            wrong = None if old else check_id(name)
            if wrong:
                yield positions.problem(wrong, at, file=file)
        role = step.get("role")
        if roles is not None and isinstance(role, str) and role and role not in roles:
            hint = suggest(role, roles)
            yield positions.problem(f"there is no role `{role}`", (*path, "role"), file=file, hint=hint)
        uses = step.get("uses")
        if operations is not None and isinstance(uses, str) and uses and uses not in operations:
            yield _unknown_operation(uses, operations, positions, (*path, "uses"), file)


def _unknown_operation(
    name: str, operations: Iterable[str], positions: Positions, path: Path, file: str | None
) -> Problem:
    names = list(operations)
    integration = name.split(".", 1)[0]
    integrations = sorted({entry.split(".", 1)[0] for entry in names})
    if integration not in integrations:
        hint = suggest(name, names)
        hint = hint if hint.startswith("Did") else suggest(integration, integrations)
        return positions.problem(f"there is no integration `{integration}`", path, file=file, hint=hint)
    hint = suggest(name, [entry for entry in names if entry.startswith(f"{integration}.")])
    return positions.problem(f"`{integration}` has no operation `{name}`", path, file=file, hint=hint)
