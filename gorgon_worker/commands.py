"""The worker's commands: names, arguments and help.  Their implementations are imported when a command is called."""

from __future__ import annotations

from typing import Annotated

import typer

from gorgon_common import lazy
from gorgon_common.cli.commands import SERVE
from gorgon_common.cli.group import examples


def add_commands(app: typer.Typer) -> None:
    """Add the worker's commands to the application."""
    app.command(rich_help_panel=SERVE, **examples("gorgon worker", "gorgon worker --live --queue openai --slots 20"))(
        worker
    )
    app.command(rich_help_panel=SERVE, **examples("gorgon flower", "gorgon flower --port 5556"))(flower)


def worker(
    queues: Annotated[
        list[str] | None, typer.Option("--queue", "-q", metavar="NAME", help="Serve this queue. Repeatable.")
    ] = None,
    slots: Annotated[int | None, typer.Option("--slots", min=1, max=1000, help="Steps at the same time.")] = None,
    live: Annotated[
        bool, typer.Option("--live/--sandbox", help="Run steps on the real providers, or on the sandbox.")
    ] = False,
    events: Annotated[
        bool | None,
        typer.Option(
            "--events/--no-events", help="Send what Flower shows, obey remote control (GORGON_FLOWER_EVENTS)."
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port", min=0, max=65535, metavar="PORT", help="Serve Prometheus metrics there; 0: any free port."
        ),
    ] = None,
) -> None:
    """Run steps from the broker, until stopped."""
    lazy.load("gorgon_worker.start:worker")(
        queues=queues, slots=slots, live=live, events=events, metrics_port=metrics_port
    )


def flower(
    host: Annotated[str | None, typer.Option("--host", help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="The port.")] = None,
) -> None:
    """Serve Flower, which shows workers and messages."""
    lazy.load("gorgon_worker.flower:flower")(host=host, port=port)
