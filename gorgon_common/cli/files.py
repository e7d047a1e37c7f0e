"""`gorgon init validate fmt schema graph`: the commands for workflow files that need no database."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from gorgon_common import documents, errors, lazy
from gorgon_common.application import workflows
from gorgon_common.cli import terminal
from gorgon_common.cli.sources import find_workflow, read_workflow_text
from gorgon_common.client.views import ENGINE_KINDS


def init(path: str, *, template: str, force: bool) -> None:
    """Write a first workflow."""
    target = Path(path)
    if target.is_dir():
        target = target / "workflow.yaml"
    if target.exists() and not force:
        raise errors.Conflict(f"{target} already exists.", hint="Choose another name, or use --force to overwrite it.")
    text = workflows.template(template)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise errors.InputInvalid(f"{target}: {error.strerror}.") from None
    terminal.say(f"Wrote {target}.")
    terminal.say()
    terminal.say(f"  gorgon validate {target}    check it")
    terminal.say(f"  gorgon graph {target}       see its steps")
    terminal.say(f"  gorgon run {target}         run it, offline on the sandbox")


def validate(files: Sequence[str], *, as_json: bool) -> None:
    """Check files; exits 2 if one does not load."""
    problems: list[errors.Problem] = []
    for name in files:
        workflow = find_workflow(name)
        try:
            plan, found = workflows.read(workflow.text, file=workflow.file)
        except errors.WorkflowInvalid as error:
            found, plan = error.problems, None
        problems += found
        if not as_json:
            terminal.tell_problems(found, stream=sys.stdout, source=workflow.text)
            if plan is not None:
                steps = sum(node.kind not in ENGINE_KINDS for node in plan.nodes[: plan.top])
                terminal.draw(_verdict(workflow.file, steps, len(found)))
    valid = not any(problem.severity == "error" for problem in problems)
    if as_json:
        terminal.emit({"valid": valid, "problems": [problem.to_dict() for problem in problems]})
    elif not valid:
        count = sum(problem.severity == "error" for problem in problems)
        terminal.say(f"\n{terminal.counted(count, 'problem')}.")
    if not valid:
        raise typer.Exit(terminal.EXIT_BAD_INPUT)


def _verdict(file: str, steps: int, warnings: int) -> Any:
    text = lazy.load("rich.text:Text")
    told = f" is valid: {terminal.counted(steps, 'step')}"
    if warnings:
        told += f", {terminal.counted(warnings, 'warning')}"
    return text.assemble(("✓ ", "ok"), (file, "name"), told)


def fmt(files: Sequence[str], *, check: bool) -> None:
    """Rewrite files in canonical form; with `check`, only report, and exit 1 if one would change."""
    changed = 0
    for name in files:
        text = read_workflow_text(name)
        made = workflows.format_text(text, file=documents.shown_name(name))
        if documents.is_stream(name) and not check:
            sys.stdout.write(made)
            continue
        if made == text:
            continue
        changed += 1
        if check:
            lines = difflib.unified_diff(_lines(text), _lines(made), name, f"{name}, formatted", lineterm="")
            terminal.say("\n".join(lines))
        else:
            _write(Path(name), made)
            terminal.note(f"formatted {name}")
    if check and changed:
        terminal.note(f"{changed} of {len(files)} would change. To format: gorgon fmt {' '.join(files)}")
        raise typer.Exit(terminal.EXIT_RUN_FAILED)


def _lines(text: str) -> list[str]:
    """Return the lines, with characters that a terminal does not show: carriage returns, and a missing line end at the
    end.
    """
    lines = [line.replace("\r", "␍") for line in text.split("\n")]
    if lines[-1]:
        lines[-1] += "⏎ is missing"
    return lines if lines[-1] else lines[:-1]


def _write(path: Path, text: str) -> None:
    """Replace a file's text; line ends are written unchanged.  Raises InputInvalid."""
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise errors.InputInvalid(f"{path} cannot be written: {error.strerror}.") from None


def schema(output: str | None) -> None:
    """Print the JSON Schema, or write it."""
    text = json.dumps(workflows.json_schema(), indent=2, ensure_ascii=False)
    if output is None:
        terminal.say(text)
        return
    try:
        Path(output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise errors.InputInvalid(f"{output}: {error.strerror}.") from None
    terminal.note(f"Wrote {output}.  First line of a workflow file:")
    terminal.note(f"# yaml-language-server: $schema={output}")


def graph(file: str, *, mermaid: bool, canvas: bool, as_json: bool) -> None:
    """Draw the steps, then the canvas."""
    workflow = find_workflow(file)
    plan, warnings = workflows.read(workflow.text, file=workflow.file)
    if as_json:
        terminal.emit(workflows.graph(plan))
        return
    if warnings:
        terminal.tell_problems(warnings, stream=sys.stderr, source=workflow.text)
    if mermaid:
        terminal.say(workflows.to_mermaid(plan))
        return
    if not canvas:
        terminal.say(workflows.to_text(plan).rstrip())
        terminal.say()
        terminal.draw(terminal.styled("Celery canvas", "name"))
    terminal.say(workflows.describe_canvas(plan))
