"""`gorgon costs …`: what calls have cost."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gorgon_common import errors
from gorgon_common.bootstrap import Services
from gorgon_common.cli import terminal
from gorgon_common.cli.backends import resolve_run, runs_of
from gorgon_common.client.http import Client

_PAGE = 1000
_BAR = 24
_TOKENS = ("input", "cache_read", "cache_write", "output", "reasoning")
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
        raise errors.InputInvalid("--csv and --json exclude each other.")
    with runs_of(server) as backend:
        chosen = _chosen(backend, only)
        if each:
            _calls(backend, since, until, chosen, as_csv=as_csv, as_json=as_json)
            return
        names = [name.strip() for name in by.split(",") if name.strip()]
        document = backend.costs(names, since=since, until=until, only=chosen, limit=limit)
    if as_json:
        terminal.emit(document)
    elif as_csv:
        _csv([*names, *_SUMS, *(f"{name}_tokens" for name in _TOKENS)], map(_flat, document["rows"]))
    else:
        tell(document)


def _chosen(backend: Services | Client, only: Mapping[str, str | None]) -> dict[str, str]:
    chosen = {name: value for name, value in only.items() if value is not None}
    if "run" in chosen:
        chosen["run"] = resolve_run(backend, chosen["run"])
    return chosen


def tell(document: Mapping[str, Any]) -> None:
    """Print a report for people: a table with the share of each row, and the sum."""
    rows, total = document["rows"], document["total"]
    if not rows or not total["calls"]:
        terminal.note("No calls. `gorgon run` makes some; --from, --to and the other options may leave them out.")
        return
    names = document["by"]
    whole = total["known_cost_usd"]
    lines = []
    for row in rows:
        share = row["known_cost_usd"] / whole if whole else 0.0
        bar = "█" * round(_BAR * share) if terminal.interactive() else f"{share:.1%}"
        lines.append([*(_cell(row[name]) for name in names), *_figures(row), bar])
    columns = (*names, "calls", "failed", "input", "cached", "output", "cost", "share")
    terminal.table(columns, lines, right=("calls", "failed", "input", "cached", "output", "cost"))
    left = int(document.get("groups", len(rows))) - len(rows)
    if left > 0:
        terminal.note(f"… and {left} more")
    runs = f" in {total['runs']} {'run' if total['runs'] == 1 else 'runs'}" if total["runs"] else ""
    terminal.note(f"\n{cost_text(total)} for {terminal.number(total['calls'])} calls{runs}")
    if total["unpriced_calls"]:
        terminal.note(f"{total['unpriced_calls']} calls have no known price: what they cost is not in these sums.")


def cost_text(row: Mapping[str, Any]) -> str:
    """Return a sum for people; where a price is missing, what is known of it and that it is more."""
    if not row["unpriced_calls"]:
        return terminal.money(row["cost_usd"])
    if row["unpriced_calls"] == row["calls"]:
        return "unknown"
    return f"{terminal.money(row['known_cost_usd'])} + ?"


def _figures(row: Mapping[str, Any]) -> list[str]:
    tokens = row["tokens"]
    return [
        terminal.number(row["calls"]),
        terminal.number(row["failed_calls"]),
        terminal.number(tokens["input"]),
        terminal.number(tokens["cache_read"]),
        terminal.number(tokens["output"]),
        cost_text(row),
    ]


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)


def _calls(
    backend: Services | Client,
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
        columns = ("at", "step", "role", "model", "attempt", "input", "output", "cost", "took", "outcome")
        terminal.table(columns, [_call(row) for row in rows], right=("attempt", "input", "output", "cost", "took"))


def _pages(
    backend: Services | Client, since: str | None, until: str | None, only: Mapping[str, str]
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
    """Names come from files that others wrote: a spreadsheet must not take one for a formula."""
    if not isinstance(value, str):
        return value
    shown = terminal.safe(value)
    return f"'{shown}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else shown
