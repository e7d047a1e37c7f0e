"""`gorgon`: the command line, assembled from the commands of every installed package.

Each package only declares its commands, in `commands.py` (found through the entry-point group `gorgon.commands`).  A
command imports its implementation when it is called: `gorgon --help` imports typer and nothing else.

Exit codes: 0 success, 1 the run failed, 2 bad input, 3 waiting or left running, 130 interrupted, 70 a fault in Gorgon.
"""

from __future__ import annotations

from importlib.metadata import entry_points

import typer

from gorgon_common.cli import commands, run_commands, streams
from gorgon_common.cli.group import Group


def build() -> typer.Typer:
    """Return the application with the commands of every installed package."""
    app = typer.Typer(
        name="gorgon",
        cls=Group,
        help="Multi-agent AI workflows, declared in YAML and run on Celery.",
        epilog="Begin with `gorgon demo`; then `gorgon init` writes a first workflow.",
        no_args_is_help=True,
        rich_markup_mode=None,  # rich's help adds 0.2 s to every start
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(commands.options)
    commands.add_commands(app)
    run_commands.add_commands(app)
    for entry in sorted(entry_points(group="gorgon.commands"), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def main() -> None:
    """Run the command given by the arguments, then end the process."""
    streams.prepare()
    try:
        build()(prog_name="gorgon")
    except SystemExit as end:
        streams.finish(end.code)


if __name__ == "__main__":
    main()
