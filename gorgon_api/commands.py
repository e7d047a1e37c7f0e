"""The API's commands: names, arguments and help.  Their implementations are imported when a command is called."""

from __future__ import annotations

from typing import Annotated

import typer

from gorgon_common import lazy
from gorgon_common.cli.commands import SERVE
from gorgon_common.cli.group import examples


def add_commands(app: typer.Typer) -> None:
    """Add the API's commands to the application."""
    app.command(rich_help_panel=SERVE, **examples("gorgon api", "gorgon api --port 8080"))(api)
    app.command(rich_help_panel=SERVE, **examples("gorgon sandbox", "gorgon sandbox --port 9000"))(sandbox)


def api(
    host: Annotated[str | None, typer.Option("--host", help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="The port; 0 for any free one.")] = None,
) -> None:
    """Serve the REST API."""
    lazy.load("gorgon_api.serve:api")(host=host, port=port)


def sandbox(
    host: Annotated[str | None, typer.Option("--host", help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="The port; 0 for any free one.")] = None,
) -> None:
    """Serve the simulated providers, for tests and trials."""
    lazy.load("gorgon_api.serve:sandbox")(host=host, port=port)
