"""`gorgon costs …`, `gorgon budgets …` and `gorgon limits …`: names, arguments and help."""

from __future__ import annotations

from typing import Annotated

import typer

from gorgon_common import lazy
from gorgon_common.application.providers import MODEL_PROVIDERS
from gorgon_common.cli.group import Commands, examples
from gorgon_common.cli.options import AsJson, Server

COSTS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon costs report --by day")
BUDGETS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon budgets ls")
LIMITS = typer.Typer(cls=Commands, no_args_is_help=True, epilog="gorgon limits ls")

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
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help=f"{' or '.join(MODEL_PROVIDERS)}.")],
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
