"""The commands that run workflows: `gorgon run`, `gorgon runs resume` and `gorgon demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from gorgon_common import lazy
from gorgon_common.cli.commands import BEGIN, RUN, RUNS, FileOrName, RunId
from gorgon_common.cli.group import examples
from gorgon_common.cli.options import AsJson, Inputs, InputsFile, Server, Team


def add_commands(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(rich_help_panel=BEGIN, **examples("gorgon demo", "gorgon demo cost"))(demo)
    app.command(
        rich_help_panel=RUN,
        **examples(
            "gorgon run workflow.yaml",
            'gorgon run feature-build -i feature_request="Dark mode"',
            "gorgon run workflow.yaml --max-cost 2.50 --json",
        ),
    )(run)


def run(
    file: FileOrName,
    inputs: Inputs = None,
    inputs_file: InputsFile = None,
    live: Annotated[
        bool | None,
        typer.Option("--live/--sandbox", help="Call the real providers, or the offline sandbox (the default)."),
    ] = None,
    team: Team = None,
    server: Server = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            "--max-cost", metavar="USD", help="Stop the run before its total cost, resumes included, exceeds USD."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Start the run, print its id and leave it to a worker.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Do not cut long outputs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a workflow here, or on a server."""
    lazy.load("gorgon_common.cli.run:run")(
        file,
        inputs=inputs or [],
        inputs_file=inputs_file,
        live=bool(live),
        team=team,
        server=server,
        detach=detach,
        full=full,
        as_json=as_json,
        max_cost=max_cost,
    )


def demo(
    which: Annotated[
        str,
        typer.Argument(metavar="parallel|cost|limits|roles|resume", help="Without a name, agents build a feature."),
    ] = "",
) -> None:
    """Show what Gorgon does, offline, in a minute."""
    lazy.load("gorgon_common.cli.demo:demo")(which)


@RUNS.command("resume", **examples("gorgon runs resume last", "gorgon runs resume last -f workflow.yaml"))
def runs_resume(
    run: RunId,
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="FILE", help="Continue with the edited workflow.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it ends.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Continue a failed, cancelled or killed run as a new run; finished steps are not paid for again."""
    lazy.load("gorgon_common.cli.run:resume")(run, file=file, detach=detach, server=server, as_json=as_json)
