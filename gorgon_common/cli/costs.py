"""`gorgon costs …`: the costs of calls."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gorgon_common import errors
from gorgon_common.application.session import Session
from gorgon_common.cli import tables, terminal
from gorgon_common.cli.backends import resolve_run, runs_of
from gorgon_common.client.http import Client

_PAGE = 1000
_NAMES = {"": "Total", "live": "Live", "sandbox": "On the sandbox (play money)", "library": "Recorded by your programs"}
_BAR = 10
_TOKENS = ("input", "cache_read", "cache_write", "output", "reasoning")
_FIGURES = (
    tables.number("calls", drop=1),
    tables.number("failed", drop=6),
    tables.number("input", drop=4),
    tables.number("cached", drop=5),
    tables.number("output", drop=4),
    tables.number("cost"),
    tables.exact("share", drop=3),
)
_CALLS = (
    tables.exact("at", drop=4),
    tables.text("step", least=10),
    tables.text("role", drop=5, least=8),
    tables.text("model", least=12),
    tables.number("attempt", drop=6),
    tables.number("input", drop=3),
    tables.number("output", drop=3),
    tables.number("cost"),
    tables.number("took", drop=2),
    tables.exact("outcome", drop=1),
    tables.exact("target", drop=7),
)
_SUMS = ("calls", "failed_calls", "runs", "cost_usd", "known_cost_usd", "unpriced_calls", "latency_ms")
_CALL = (
    "at",
    "provider",
    "model",
    "role",
    "team",
    "workflow",
    "run",
    "step",
    "item",
    "attempt",
    "call",
    "cost_usd",
    "price_version",
    "latency_ms",
    "outcome",
    "request_id",
    "target",
)


def report(
    *,
    by: str,
    since: str | None,
    until: str | None,
    only: Mapping[str, str | None],
    each: bool,
    limit: int | None,
    as_csv: bool,
    as_json: bool,
    server: str | None,
) -> None:
    """Print a report, or each call."""
    if as_csv and as_json:
        raise errors.InputInvalid("--csv and --json cannot be combined.")
    with runs_of(server) as backend:
        chosen = _chosen(backend, only)
        if each:
            _calls(backend, since, until, chosen, as_csv=as_csv, as_json=as_json)
            return
        names = [name.strip() for name in by.split(",") if name.strip()]
        if only.get("target") == "all" and "target" not in names:
            names.insert(0, "target")  # real and simulated money are never added up
        document = backend.costs(names, since=since, until=until, only=chosen, limit=limit)
    if as_json:
        terminal.emit(document)
    elif as_csv:
        _csv([*names, *_SUMS, *(f"{name}_tokens" for name in _TOKENS)], map(_flat, document["rows"]))
    else:
        tell(document)


def _chosen(backend: Session | Client, only: Mapping[str, str | None]) -> dict[str, str]:
    chosen = {name: value for name, value in only.items() if value is not None}
    if "run" in chosen:
        chosen["run"] = resolve_run(backend, chosen["run"])
    return chosen


def tell(document: Mapping[str, Any]) -> None:
    """Print a report for people: a table with the share of each row, and the sum of each target."""
    rows, total = document["rows"], document["total"]
    if not rows or not total["calls"]:
        _nothing(document)
        return
    names = document["by"]
    whole = total["known_cost_usd"]
    lines = []
    for row in rows:
        share = row["known_cost_usd"] / whole if whole else 0.0
        lines.append([*(_cell(row[name]) for name in names), *_figures(row), _bar(share)])
    tables.show((*(tables.text(name, least=10) for name in names), *_FIGURES), lines)
    left = int(document.get("groups", len(rows))) - len(rows)
    if left > 0:
        terminal.note(f"… and {left} more")
    _sums(document)


def _bar(share: float) -> str:
    """Return a share as a bar on a terminal, as a number in a pipe."""
    if not terminal.interactive():
        return f"{share:.1%}"
    return "█" * round(_BAR * share) or ("▏" if share else "")


def _sums(document: Mapping[str, Any]) -> None:
    """Print the cost of each target: real and simulated money are never added up."""
    terminal.note("")
    shown, left = _by_target(document)
    for name, sums in shown.items():
        runs = f" in {terminal.counted(sums['runs'], 'run')}" if sums["runs"] else ""
        _aside(f"{_NAMES.get(name, name)}: {terminal.cost(sums)} for {terminal.counted(sums['calls'], 'call')}{runs}")
    for name, sums in left.items():
        _aside(
            f"Not counted: {terminal.counted(sums['calls'], 'call')}, {_NAMES.get(name, name).lower()}, "
            f"{terminal.cost(sums)}. See --target {name}."
        )


def _by_target(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sums of the targets that a report includes, and of those that it excludes."""
    sums = document.get("by_target") or {"": document["total"]}
    counted = document.get("targets") or list(sums)
    return (
        {name: sums[name] for name in sums if name in counted},
        {name: sums[name] for name in sums if name not in counted},
    )


def _nothing(document: Mapping[str, Any]) -> None:
    _, left = _by_target(document)
    if not left:
        terminal.note("No calls match. `gorgon run` makes some; check --from, --to and the other filters.")
        return
    terminal.note("No calls that cost real money." if "live" in document["targets"] else "No such calls.")
    for name, sums in left.items():
        _aside(f"There are {terminal.counted(sums['calls'], 'call')}, {_NAMES[name].lower()}: --target {name}")


def _aside(text: str) -> None:
    terminal.paragraph(text, stream=sys.stderr)


def _figures(row: Mapping[str, Any]) -> list[str]:
    tokens = row["tokens"]
    return [
        terminal.number(row["calls"]),
        terminal.number(row["failed_calls"]),
        terminal.number(tokens["input"]),
        terminal.number(tokens["cache_read"]),
        terminal.number(tokens["output"]),
        terminal.cost(row, short=True),
    ]


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)


def _calls(
    backend: Session | Client,
    since: str | None,
    until: str | None,
    only: Mapping[str, str],
    *,
    as_csv: bool,
    as_json: bool,
) -> None:
    rows = _pages(backend, since, until, only)
    if as_json:
        terminal.emit({"items": list(rows), "next": None})
    elif as_csv:
        _csv([*_CALL, *(f"{name}_tokens" for name in _TOKENS)], map(_flat, rows))
    else:
        tell_calls(list(rows))


def tell_calls(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print calls for people."""
    tables.show(_CALLS, [_call(row) for row in rows])


def _pages(
    backend: Session | Client, since: str | None, until: str | None, only: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    cursor: str | None = None
    while True:
        page = backend.calls(since=since, until=until, only=only, limit=_PAGE, cursor=cursor)
        yield from page["items"]
        cursor = page["next"]
        if cursor is None:
            return


def _call(row: Mapping[str, Any]) -> list[str]:
    step = _cell(row["step"]) if row["item"] is None else f"{row['step']}[{row['item']}]"
    return [
        str(row["at"])[:19].replace("T", " "),
        step,
        _cell(row["role"]),
        row["model"],
        str(row["attempt"]) if row["call"] == 1 else f"{row['attempt']}.{row['call']}",
        terminal.number(row["tokens"]["input"]),
        terminal.number(row["tokens"]["output"]),
        "unknown" if row["cost_usd"] is None else terminal.money(row["cost_usd"]),
        "" if row["latency_ms"] is None else terminal.seconds(row["latency_ms"] / 1000),
        row["outcome"],
        row["target"],
    ]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {f"{name}_tokens": row["tokens"][name] for name in _TOKENS}
    return {**{name: value for name, value in row.items() if name != "tokens"}, **tokens}


def _csv(columns: Sequence[str], rows: Any) -> None:
    """Print rows as CSV (RFC 4180); an unknown value is an empty cell."""
    writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _safe(value) for name, value in row.items()})


def _safe(value: Any) -> Any:
    """Escape names for CSV: they come from files by other people, and a spreadsheet must not read one as a formula."""
    if not isinstance(value, str):
        return value
    shown = terminal.safe(value)
    return f"'{shown}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else shown
