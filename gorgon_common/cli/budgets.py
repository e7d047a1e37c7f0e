"""`gorgon budgets …`: sets budgets, and shows what is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common import errors
from gorgon_common.application.budgets import dollars
from gorgon_common.cli import tables, terminal
from gorgon_common.cli.backends import runs_of
from gorgon_common.client.views import budget_document

_NONE = "none"
_COLUMNS = (
    tables.text("budget", least=12),
    tables.exact("per"),
    tables.exact("target"),
    tables.number("limit"),
    tables.number("spent"),
    tables.number("reserved", drop=3),
    tables.number("used", drop=1),
    tables.exact("until", drop=4),
)


def set_budget(
    scope: str,
    *,
    usd: str | None,
    tokens: str | None,
    per: str,
    timezone: str | None,
    server: str | None,
    as_json: bool,
) -> None:
    """Set or change a budget."""
    if usd is None and tokens is None:
        raise errors.InputInvalid("A budget needs a limit.", hint="Give it --usd 50, --tokens 1000000 or both.")
    limits = {name: _given(text) for name, text in (("usd", usd), ("tokens", tokens)) if text is not None}
    with runs_of(server) as backend:
        made = backend.set_budget(scope, period=per, timezone=timezone, **limits)
    if as_json:
        terminal.emit(budget_document(made))
        return
    shown = [text for text in (_money(made["usd_limit"]), _count(made["token_limit"])) if text]
    told = " and ".join(shown) or "no limit any more"
    zone = "" if made["period"] == "run" else f"; days begin at midnight in {made['timezone']}"
    terminal.say(f"{_name(made)} per {made['period']}: {told}{zone}.")


def list_budgets(*, server: str | None, as_json: bool) -> None:
    """List the budgets with what is spent and reserved."""
    with runs_of(server) as backend:
        found = backend.list_budgets()
    if as_json:
        terminal.emit([budget_document(entry) for entry in found])
        return
    tell(found)


def tell(found: Sequence[Mapping[str, Any]]) -> None:
    """Print budgets for people."""
    if not found:
        terminal.say("There are no budgets.  `gorgon budgets set org --usd 100` sets one for each month.")
        return
    rows = []
    for entry in found:
        for account in entry["accounts"] or [{}]:
            rows += [row for row in (_row(entry, account, "usd", _money), _row(entry, account, "token", _short)) if row]
    tables.show(_COLUMNS, rows)


def _row(entry: Mapping[str, Any], account: Mapping[str, Any], unit: str, shown: Any) -> tuple[str, ...] | None:
    limit = entry[f"{unit}_limit"]
    if limit is None:
        return None
    spent = account.get(f"{unit}_spent", 0)
    used = f"{100 * spent // limit} %" if limit else "–"
    if entry["period"] == "run":
        return (_name(entry), "run", "", shown(limit), "", "", "", "separate for each run")
    until = (account.get("ends_at") or "")[:16].replace("T", " ")
    return (
        _name(entry),
        entry["period"],
        account.get("target", ""),
        shown(limit),
        shown(spent),
        shown(account.get(f"{unit}_reserved", 0)),
        used,
        f"{until} UTC" if until else "",
    )


def _given(text: str) -> str | None:
    return None if text.strip().lower() == _NONE else text


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['scope']} {entry['name']}".strip()


def _money(micro: int | None) -> str:
    return "" if micro is None else dollars(micro)


def _short(tokens: int | None) -> str:
    return "" if tokens is None else f"{tokens:,} tok"


def _count(tokens: int | None) -> str:
    return "" if tokens is None else f"{tokens:,} tokens"
