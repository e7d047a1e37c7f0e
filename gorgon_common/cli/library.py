"""`gorgon workflows …` and `gorgon roles …`: what is bundled."""

from __future__ import annotations

import json

from gorgon_common.cli import terminal
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow import catalogue


def list_workflows(*, as_json: bool) -> None:
    """List the bundled workflows."""
    found = catalogue.entries()
    if as_json:
        terminal.emit([entry.to_dict() for entry in found])
        return
    terminal.table(("name", "what it does"), [(entry.name, entry.description) for entry in found])
    if terminal.interactive():
        terminal.note("\n`gorgon run NAME` runs one, `gorgon workflows show NAME` prints it.")


def show_workflow(name: str, *, as_json: bool) -> None:
    """Print a bundled workflow."""
    text = catalogue.source(name)
    if as_json:
        entry = next(entry for entry in catalogue.entries() if entry.name == name)
        terminal.emit({**entry.to_dict(), "source": text})
    else:
        terminal.say(text.rstrip("\n"))


def list_roles(*, as_json: bool) -> None:
    """List the roles."""
    roles = load_roles()
    if as_json:
        terminal.emit([role.to_dict() for role in roles.values()])
        return
    rows = [(role.name, role.purpose, f"{role.provider} {role.tier}") for role in roles.values()]
    terminal.table(("role", "what it is for", "runs on"), rows)


def show_role(name: str, *, as_json: bool) -> None:
    """Show a role."""
    role = load_roles().find(name)
    if as_json:
        terminal.emit(role.to_dict())
        return
    terminal.draw(terminal.styled(role.name, "name"))
    terminal.say(role.purpose)
    terminal.say()
    terminal.say(
        f"provider    {role.provider}, {role.tier} model, {role.effort} effort, {role.max_tokens} tokens at most"
    )
    if role.aliases:
        terminal.say(f"aliases     {', '.join(role.aliases)}")
    if role.allowed_tools:
        terminal.say(f"tools       {', '.join(role.allowed_tools)}")
    for heading, text in (
        ("system prompt", role.system),
        ("standing task", role.task),
        ("answers", json.dumps(role.output_schema, indent=2, ensure_ascii=False)),
    ):
        terminal.say()
        terminal.draw(terminal.styled(heading, "quiet"))
        terminal.say(text)
