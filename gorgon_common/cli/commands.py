"""The core's commands: names, arguments and help.  The implementation is imported when a command is called."""

from __future__ import annotations

from typing import Annotated

import typer

from gorgon_common import lazy
from gorgon_common.cli.group import Commands, examples
from gorgon_common.cli.options import AsJson, Inputs, InputsFile, Server, Team, remember_debug

BEGIN, WRITE, RUN, LOOK, SERVE = "Begin", "Write workflows", "Run them", "Look things up", "Servers and upkeep"

RUNS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon runs ls\ngorgon runs show last")
"""`gorgon runs …`; `run_commands` adds `resume`."""
WORKFLOWS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon workflows ls")
ROLES = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon roles ls")
COSTS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon costs report --by day")
BUDGETS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon budgets ls")
LIMITS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon limits ls")
DATABASE = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon db upgrade")

Files = Annotated[list[str], typer.Argument(metavar="FILE", help="YAML files; - reads stdin.")]
FileOrName = Annotated[str, typer.Argument(metavar="FILE|NAME", help="A YAML file, or a bundled workflow's name.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or `last`.")]


def _version(value: bool) -> None:
    if value:
        version = lazy.load("importlib.metadata:version")
        typer.echo(f"gorgon {version('gorgon')}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=remember_debug)] = False,
) -> None:
    """Take the options that stand before a command."""


def add_commands(app: typer.Typer) -> None:
    """Add the core's commands to the application."""
    app.command(rich_help_panel=BEGIN, **examples("gorgon init", "gorgon init review.yaml --template review"))(init)
    app.command(
        rich_help_panel=WRITE, **examples("gorgon validate workflow.yaml", "gorgon validate workflow.yaml --json")
    )(validate)
    app.command(rich_help_panel=WRITE, **examples("gorgon fmt workflow.yaml", "gorgon fmt --check workflow.yaml"))(fmt)
    app.command(
        rich_help_panel=WRITE, **examples("gorgon graph workflow.yaml", "gorgon graph feature-build --mermaid")
    )(graph)
    app.command(rich_help_panel=WRITE, **examples("gorgon schema", "gorgon schema -o workflow.schema.json"))(schema)
    app.command(
        rich_help_panel=WRITE,
        **examples("gorgon plan workflow.yaml", 'gorgon plan feature-build -i feature_request="Dark mode" --live'),
    )(plan)
    app.add_typer(RUNS, name="runs", help="List, watch, cancel and resume runs.", rich_help_panel=RUN)
    app.add_typer(WORKFLOWS, name="workflows", help="The bundled workflows.", rich_help_panel=LOOK)
    app.add_typer(ROLES, name="roles", help="The roles that agents can have.", rich_help_panel=LOOK)
    app.add_typer(COSTS, name="costs", help="What calls have cost.", rich_help_panel=LOOK)
    app.add_typer(BUDGETS, name="budgets", help="Limits on what may be spent.", rich_help_panel=LOOK)
    app.add_typer(
        LIMITS, name="limits", help="Rate limits of providers, and how much of them is used.", rich_help_panel=LOOK
    )
    app.add_typer(DATABASE, name="db", help="Create and upgrade the database's tables.", rich_help_panel=SERVE)
    app.command(rich_help_panel=SERVE, **examples("gorgon doctor", "gorgon doctor --json"))(doctor)


def init(
    path: Annotated[str, typer.Argument(metavar="FILE", help="The file to write.")] = "workflow.yaml",
    template: Annotated[str, typer.Option("--template", "-t", help="minimal, map or review.")] = "minimal",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> None:
    """Write a first workflow to change and run."""
    lazy.load("gorgon_common.cli.files:init")(path, template=template, force=force)


def validate(files: Files, as_json: AsJson = False) -> None:
    """Check workflow files: what is wrong, where, and what to do."""
    lazy.load("gorgon_common.cli.files:validate")(files, as_json=as_json)


def fmt(
    files: Files,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a file would change.")] = False,
) -> None:
    """Rewrite workflow files in their canonical form."""
    lazy.load("gorgon_common.cli.files:fmt")(files, check=check)


def schema(
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to a file.")] = None,
) -> None:
    """Print the JSON Schema of workflow files, for editors."""
    lazy.load("gorgon_common.cli.files:schema")(output)


def graph(
    file: FileOrName,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a mermaid flowchart.")] = False,
    canvas: Annotated[bool, typer.Option("--canvas", help="Print only the Celery canvas.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a workflow's steps, and the Celery canvas they compile to."""
    lazy.load("gorgon_common.cli.files:graph")(file, mermaid=mermaid, canvas=canvas, as_json=as_json)


def plan(
    file: FileOrName,
    inputs: Inputs = None,
    inputs_file: InputsFile = None,
    live: Annotated[
        bool, typer.Option("--live/--sandbox", help="For the real providers, or for the offline sandbox (the default).")
    ] = False,
    team: Team = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what a run costs and how long it takes, before anything is spent."""
    lazy.load("gorgon_common.cli.plans:plan")(
        file, inputs=inputs or [], inputs_file=inputs_file, live=live, team=team, server=server, as_json=as_json
    )


def doctor(as_json: AsJson = False) -> None:
    """Check settings, versions, connections and keys."""
    lazy.load("gorgon_common.cli.doctor:doctor")(as_json=as_json)


@RUNS.command("ls", **examples("gorgon runs ls", "gorgon runs ls --status failed -n 5"))
def runs_ls(
    status: Annotated[str | None, typer.Option("--status", help="Only runs in this state.")] = None,
    workflow: Annotated[str | None, typer.Option("--workflow", help="Only runs of this workflow.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=200, help="How many to show.")] = 20,
    cursor: Annotated[str | None, typer.Option("--cursor", help="Continue where the last page ended.")] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    lazy.load("gorgon_common.cli.runs:ls")(
        status=status, workflow=workflow, limit=limit, cursor=cursor, server=server, as_json=as_json
    )


@RUNS.command("show", **examples("gorgon runs show last", "gorgon runs show last --full --json"))
def runs_show(
    run: RunId,
    step: Annotated[str | None, typer.Option("--step", help="Only this step, with its whole output.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Do not cut long outputs.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Show a run with its steps and outputs."""
    lazy.load("gorgon_common.cli.runs:show")(run, step=step, full=full, server=server, as_json=as_json)


@RUNS.command("watch", **examples("gorgon runs watch last"))
def runs_watch(run: RunId, server: Server = None, as_json: AsJson = False) -> None:
    """Watch a run until it ends; Ctrl-C stops only the watching."""
    lazy.load("gorgon_common.cli.runs:watch")(run, server=server, as_json=as_json)


@RUNS.command("logs", **examples("gorgon runs logs last", "gorgon runs logs last --follow"))
def runs_logs(
    run: RunId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Print a run's journal; with --json one document, or one per line with --follow."""
    lazy.load("gorgon_common.cli.runs:logs")(run, follow=follow, server=server, as_json=as_json)


@RUNS.command("explain", **examples("gorgon runs explain last"))
def runs_explain(
    run: RunId,
    step: Annotated[str | None, typer.Argument(metavar="STEP", help="Only this step; `name[3]` for one item.")] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Explain what a run is waiting for, what its money was spent on, and how long its parts took."""
    lazy.load("gorgon_common.cli.explain:explain")(run, step, server=server, as_json=as_json)


@RUNS.command("cancel", **examples("gorgon runs cancel last"))
def runs_cancel(run: RunId, server: Server = None, as_json: AsJson = False) -> None:
    """End a run: calls in flight are aborted, no new step starts."""
    lazy.load("gorgon_common.cli.runs:cancel")(run, server=server, as_json=as_json)


@RUNS.command("signal", **examples("gorgon runs signal last deployed --data '{\"version\": 7}'"))
def runs_signal(
    run: RunId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The event that a `wait:` of the run names.")],
    data: Annotated[
        str | None, typer.Option(metavar="JSON", help="The step's output, as JSON; @FILE reads it from a file.")
    ] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Send an event to a run: a step that waits for it goes on."""
    lazy.load("gorgon_common.cli.runs:signal")(run, name, data, server=server, as_json=as_json)


@WORKFLOWS.command("ls", **examples("gorgon workflows ls"))
def workflows_ls(as_json: AsJson = False) -> None:
    """List the bundled workflows."""
    lazy.load("gorgon_common.cli.library:list_workflows")(as_json=as_json)


@WORKFLOWS.command("show", **examples("gorgon workflows show feature-build"))
def workflows_show(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: AsJson = False) -> None:
    """Print a bundled workflow; `gorgon workflows show NAME > my.yaml` copies it."""
    lazy.load("gorgon_common.cli.library:show_workflow")(name, as_json=as_json)


@ROLES.command("ls", **examples("gorgon roles ls"))
def roles_ls(as_json: AsJson = False) -> None:
    """List the roles."""
    lazy.load("gorgon_common.cli.library:list_roles")(as_json=as_json)


@ROLES.command("show", **examples("gorgon roles show planner"))
def roles_show(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: AsJson = False) -> None:
    """Show a role: its prompt, its defaults, what it answers."""
    lazy.load("gorgon_common.cli.library:show_role")(name, as_json=as_json)


Since = Annotated[
    str | None, typer.Option("--from", metavar="TIME", help="From this day (UTC) or time on: 2026-11-22.")
]
Until = Annotated[str | None, typer.Option("--to", metavar="TIME", help="Up to this day, included, or time.")]
ByTeam = Annotated[str | None, typer.Option("--team", help="Only this team.")]
ByWorkflow = Annotated[str | None, typer.Option("--workflow", help="Only this workflow.")]
ByRun = Annotated[str | None, typer.Option("--run", metavar="RUN", help="Only this run; `last` is the newest.")]
ByProvider = Annotated[str | None, typer.Option("--provider", help="Only this provider.")]
ByModel = Annotated[str | None, typer.Option("--model", help="Only this model.")]
ByTarget = Annotated[
    str | None,
    typer.Option("--target", help="live, sandbox, library or all; without it live and library, which cost real money."),
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]


@COSTS.command(
    "report",
    **examples(
        "gorgon costs report --by workflow,model",
        "gorgon costs report --by day --from 2026-11-01 --csv",
        "gorgon costs report --run last --calls",
    ),
)
def costs_report(
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="NAME,…",
            help="provider, model, role, team, workflow, run, step, day, target or outcome; several with commas.",
        ),
    ] = "provider,model",
    since: Since = None,
    until: Until = None,
    team: ByTeam = None,
    workflow: ByWorkflow = None,
    run: ByRun = None,
    provider: ByProvider = None,
    model: ByModel = None,
    role: Annotated[str | None, typer.Option("--role", help="Only this role.")] = None,
    step: Annotated[str | None, typer.Option("--step", help="Only steps of this name.")] = None,
    target: ByTarget = None,
    calls: Annotated[bool, typer.Option("--calls", help="One row for each call instead of sums.")] = False,
    as_csv: AsCsv = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Report what calls have cost, by any of their properties."""
    lazy.load("gorgon_common.cli.costs:report")(
        by=by,
        since=since,
        until=until,
        only={
            "team": team,
            "workflow": workflow,
            "run": run,
            "provider": provider,
            "model": model,
            "role": role,
            "step": step,
            "target": target,
        },
        each=calls,
        limit=None,
        as_csv=as_csv,
        as_json=as_json,
        server=server,
    )


@COSTS.command("top", **examples("gorgon costs top", "gorgon costs top --by step -n 3"))
def costs_top(
    by: Annotated[str, typer.Option("--by", metavar="NAME,…", help="As for `report`.")] = "workflow,step,model",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many to show.")] = 10,
    since: Since = None,
    until: Until = None,
    team: ByTeam = None,
    workflow: ByWorkflow = None,
    run: ByRun = None,
    target: ByTarget = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Show what has cost the most."""
    lazy.load("gorgon_common.cli.costs:report")(
        by=by,
        since=since,
        until=until,
        only={"team": team, "workflow": workflow, "run": run, "target": target},
        each=False,
        limit=limit,
        as_csv=False,
        as_json=as_json,
        server=server,
    )


@BUDGETS.command(
    "set",
    **examples(
        "gorgon budgets set org --usd 100", "gorgon budgets set team:web --usd 5 --per day --timezone Europe/Berlin"
    ),
)
def budgets_set(
    scope: Annotated[str, typer.Argument(metavar="SCOPE", help="org, team:NAME or workflow:NAME.")],
    usd: Annotated[
        str | None, typer.Option("--usd", metavar="AMOUNT", help="Dollars; `none` removes the limit.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="N", help="Tokens; `none` removes the limit.")
    ] = None,
    per: Annotated[str, typer.Option("--per", metavar="PERIOD", help="run (each one), day or month.")] = "month",
    timezone: Annotated[
        str | None, typer.Option("--timezone", metavar="NAME", help="Time zone of its days, such as Europe/Berlin.")
    ] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Set or change a budget; limits that are not named stay as they are."""
    lazy.load("gorgon_common.cli.budgets:set_budget")(
        scope, usd=usd, tokens=tokens, per=per, timezone=timezone, server=server, as_json=as_json
    )


@BUDGETS.command("ls", **examples("gorgon budgets ls"))
def budgets_ls(server: Server = None, as_json: AsJson = False) -> None:
    """List budgets, with what is spent and reserved."""
    lazy.load("gorgon_common.cli.budgets:list_budgets")(server=server, as_json=as_json)


@DATABASE.command("upgrade", **examples("gorgon db upgrade"))
def database_upgrade(as_json: AsJson = False) -> None:
    """Create the tables, or bring them up to date."""
    lazy.load("gorgon_common.cli.doctor:upgrade_database")(as_json=as_json)


@LIMITS.command("ls", **examples("gorgon limits ls"))
def limits_ls(server: Server = None, as_json: AsJson = False) -> None:
    """List rate limits, what is left of them, and how many calls wait."""
    lazy.load("gorgon_common.cli.limits:list_limits")(server=server, as_json=as_json)


@LIMITS.command(
    "set",
    **examples(
        "gorgon limits set openai 'gpt-5*' --requests 500 --tokens 200000", "gorgon limits set openai 'gpt-5*' --clear"
    ),
)
def limits_set(
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="openai or anthropic.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, or a pattern such as 'gpt-5*'.")] = "*",
    requests: Annotated[float | None, typer.Option("--requests", help="Requests per minute.")] = None,
    requests_per_day: Annotated[float | None, typer.Option("--requests-per-day", help="Requests per day.")] = None,
    tokens: Annotated[float | None, typer.Option("--tokens", help="Input and output tokens per minute.")] = None,
    input_tokens: Annotated[float | None, typer.Option("--input-tokens", help="Input tokens per minute.")] = None,
    output_tokens: Annotated[float | None, typer.Option("--output-tokens", help="Output tokens per minute.")] = None,
    concurrency: Annotated[float | None, typer.Option("--concurrency", help="Calls in flight.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the limits that were set.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Set limits that apply regardless of what the provider reports."""
    lazy.load("gorgon_common.cli.limits:set_limits")(
        provider,
        model,
        limits={
            "requests": requests,
            "requests_per_day": requests_per_day,
            "tokens": tokens,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "concurrency": concurrency,
        },
        clear=clear,
        server=server,
        as_json=as_json,
    )
