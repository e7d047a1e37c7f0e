"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from gorgon_common.cli.group import DEBUG, JSON


def _remember_json(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


def remember_debug(ctx: typer.Context, value: bool) -> bool:
    """Remember whether tracebacks are wanted."""
    ctx.meta[DEBUG] = value
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.", callback=_remember_json)]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Ask this server; `default` is GORGON_API_URL, which also applies without the option. `none`: no server.",
    ),
]
Team = Annotated[
    str | None, typer.Option("--team", metavar="NAME", help="The team that owns the run; else the file's `team:`.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="NAME=VALUE", help="An input; NAME=@PATH reads it from a file. Repeatable."),
]
InputsFile = Annotated[
    str | None, typer.Option("--inputs", metavar="FILE", help="A JSON or YAML file with inputs; - for stdin.")
]
