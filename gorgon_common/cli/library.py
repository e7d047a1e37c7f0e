"""`gorgon workflows …` and `gorgon roles …`: the bundled workflows and roles."""

from __future__ import annotations

import json

from gorgon_common.application.roles import load_roles
from gorgon_common.application.workflows import bundled, bundled_text
from gorgon_common.cli import tables, terminal


def list_workflows(*, as_json: bool) -> None:
    """List the bundled workflows."""
    found = bundled()
    if as_json:
        terminal.emit([entry.to_dict() for entry in found])
        return
    columns = (tables.exact("name"), tables.prose("what it does"))
    tables.show(columns, [(entry.name, entry.description) for entry in found])
    if terminal.interactive():
        terminal.note("\n`gorgon run NAME` runs one, `gorgon workflows show NAME` prints it.")


def show_workflow(name: str, *, as_json: bool) -> None:
    """Print a bundled workflow."""
    text = bundled_text(name)
    if as_json:
        entry = next(entry for entry in bundled() if entry.name == name)
        terminal.emit({**entry.to_dict(), "source": text})
    else:
        terminal.say(text.rstrip("\n"))


def list_roles(*, as_json: bool) -> None:
    """List the roles."""
    roles = load_roles()
    if as_json:
        terminal.emit([role.to_dict() for role in roles.values()])
        return
    rows = [(role.name, f"{role.provider} {role.tier}", role.purpose) for role in roles.values()]
    columns = (tables.exact("role"), tables.exact("runs on", drop=1), tables.prose("what it is for"))
    tables.show(columns, rows)


def show_role(name: str, *, as_json: bool) -> None:
    """Show a role."""
    role = load_roles().find(name)
    if as_json:
        terminal.emit(role.to_dict())
        return
    terminal.draw(terminal.styled(role.name, "name"))
    terminal.paragraph(role.purpose)
    terminal.say()
    tokens = terminal.number(role.max_tokens)
    terminal.paragraph(f"provider    {role.provider}, {role.tier} model, {role.effort} effort, at most {tokens} tokens")
    if role.aliases:
        terminal.say(f"aliases     {', '.join(role.aliases)}")
    if role.allowed_tools:
        terminal.paragraph(f"tools       {', '.join(role.allowed_tools)}")
    for heading, text in (
        ("system prompt", role.system),
        ("standing task", role.task),
        ("answers", json.dumps(role.output_schema, indent=2, ensure_ascii=False)),
    ):
        terminal.say()
        terminal.draw(terminal.styled(heading, "quiet"))
        for line in text.splitlines():
            terminal.paragraph(line)
