"""`gorgon plan`: the predicted usage of a run, before anything is spent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_common import errors
from gorgon_common.application.roles import how_to_price
from gorgon_common.cli import tables, terminal
from gorgon_common.cli.backends import chosen_server, connect, local_session
from gorgon_common.cli.inputs import read_inputs
from gorgon_common.cli.sources import asked_of_server, find_workflow

_NAMES = ("low", "expected", "p95", "worst")
_STEPS = (
    tables.text("step", least=14),
    tables.number("calls", drop=3),
    tables.number("tokens in", drop=6),
    tables.number("tokens out", drop=5),
    tables.number("expected"),
    tables.number("p95", drop=2),
    tables.number("worst"),
    tables.number("time", drop=1),
    tables.text("based on", drop=4, least=10),
)
_TOTALS = (tables.exact("total"), *(tables.number(name) for name in _NAMES))


def plan(
    file: str,
    *,
    inputs: Sequence[str],
    inputs_file: str | None,
    live: bool,
    server: str | None,
    as_json: bool,
    team: str | None = None,
) -> None:
    """Print the predicted usage of a run; `team`: the owner, by default the file's."""
    target = "live" if live else "sandbox"
    server = chosen_server(server)
    if server is not None:
        with connect(server) as client:
            asked = asked_of_server(file)
            values = read_inputs(inputs, inputs_file, client.plan(**asked)["inputs"])
            document = client.estimate(**asked, inputs=values, target=target, team=team)
    else:
        with local_session() as session:
            workflow = find_workflow(file)
            compiled, _ = session.read(workflow.text, file=workflow.file)
            values = read_inputs(inputs, inputs_file, compiled.inputs)
            document = session.estimate(compiled, values, target=target, team=team)
    if as_json:
        terminal.emit(document)
    else:
        tell(document)


def tell(document: Mapping[str, Any]) -> None:
    """Print an estimate for people."""
    terminal.draw(terminal.styled(f"{document['workflow']}, {_where(document)}", "name"))
    terminal.say()
    steps = [step for step in document["steps"] if not _silent(step)]
    tables.show(_STEPS, [_row(step) for step in steps])
    terminal.say()
    total, known, unknown = document["total"], document["known"], document["unknown"]
    rows = [
        _total("cost", known["cost_usd"] if unknown["cost"] else total["cost_usd"], unknown["cost"], terminal.money),
        _total("time", known["time_s"] if unknown["time"] else total["time_s"], unknown["time"], terminal.seconds),
        _total("input", total["tokens"]["input"], (), _tokens),
        _total("output", total["tokens"]["output"], (), _tokens),
        _total("calls", total["calls"], (), _tokens),
    ]
    tables.show(_TOTALS, rows)
    for what in ("cost", "time"):
        missing = list(dict.fromkeys(unknown[what]))
        if missing:
            terminal.paragraph(f"The {what} of {', '.join(missing)} is unknown, and not in this sum.")
    terminal.say()
    _path(document["critical_path"])
    _quota(document["binding_quota"])
    _budgets(document["budgets"])
    _basis(document)


def _where(document: Mapping[str, Any]) -> str:
    runs = document["history"]["runs"]
    past = f"based on {terminal.counted(runs, 'past run')}" if runs else "never run before"
    return f"{'on the real providers' if document['target'] == 'live' else 'on the sandbox'}, {past}"


def _silent(step: Mapping[str, Any]) -> bool:
    """Return whether a step has no cost and no duration worth a line."""
    inside = step["parent"] == step["id"]  # a map's item or a loop's iteration: their sum is the line above
    return inside or (step["kind"] in ("checkpoint", "aggregate") and not step["calls"]["worst"])


def _row(step: Mapping[str, Any]) -> list[Any]:
    name = f"  {step['id']}" if step["parent"] else str(step["id"])
    if step["times"] is not None:
        name += f" ×{step['times']['expected']:g} (≤ {step['times']['worst']})"
    if step["runs"] == "never":
        return [terminal.styled(f"{name}, does not run", "quiet"), *[""] * (len(_STEPS) - 1)]
    cost, time = step["cost_usd"], step["time_s"]
    calls = step["calls"]["worst"]
    return [
        name,
        _tokens(step["calls"]["expected"]) if calls else "",
        _tokens(step["tokens"]["input"]["expected"]) if calls else "",
        _tokens(step["tokens"]["output"]["expected"]) if calls else "",
        _money(cost["expected"]) if calls or cost["expected"] is None else "",
        _money(cost["p95"]) if calls or cost["expected"] is None else "",
        _money(cost["worst"]) if calls or cost["expected"] is None else "",
        "unknown" if time["expected"] is None else terminal.seconds(time["expected"]),
        ", ".join(step["basis"]),
    ]


def _money(usd: float | None) -> str:
    return "unknown" if usd is None else terminal.money(usd)


def _tokens(count: float | None) -> str:
    return "unknown" if count is None else terminal.number(round(count))


def _total(what: str, band: Mapping[str, Any], unknown: Sequence[str], show: Callable[[Any], str]) -> list[str]:
    """Return the row of one quantity.  A sum with unknown parts says so, and is not 0 if all parts are unknown."""
    if unknown and not any(band[name] for name in _NAMES):
        return [what, *("unknown" for _ in _NAMES)]
    more = "+" if unknown else ""
    return [what, *("unknown" if band[name] is None else f"{show(band[name])}{more}" for name in _NAMES)]


def _path(path: Sequence[Mapping[str, Any]]) -> None:
    if path:
        way = " → ".join(f"{entry['step']} {terminal.seconds(entry['seconds'])}" for entry in path)
        terminal.paragraph(f"critical path: {way}")


def _quota(binding: Mapping[str, Any] | None) -> None:
    if binding is None:
        terminal.say("quota: none is known for these models")
        return
    where = f"{binding['provider']} {binding['model']}, {binding['dimension'].replace('_', ' ')}"
    much = f"{terminal.number(binding['needed'])} of {terminal.number(round(binding['per_minute']))} per minute"
    if binding["binds"]:
        delay = terminal.seconds(binding["seconds"])
        terminal.paragraph(f"quota: {where} delays it by at least {delay} ({much})")
    else:
        terminal.paragraph(f"quota: no quota delays it; the closest is {where} ({much})")


def _budgets(budgets: Sequence[Mapping[str, Any]]) -> None:
    words = {
        "never": "enough",
        "at worst": "enough, except in the worst case",
        "maybe": "may not be enough (p95 is above it)",
        "likely": "probably not enough (the expected cost is above it)",
        "certainly": "not enough",
        "unknown": "it is unknown whether this is enough",
    }
    for entry in budgets:
        parts = []
        if entry["left_usd"] is not None:
            parts.append(terminal.money(max(0.0, entry["left_usd"])))
        if entry["left_tokens"] is not None:
            parts.append(f"{terminal.number(max(0, entry['left_tokens']))} tokens")
        left = " and ".join(parts) or "no limit"
        terminal.paragraph(f"budget: {entry['budget']}, {left} left: {words[entry['refuses']]}{_needed(entry)}")


def _needed(entry: Mapping[str, Any]) -> str:
    """Return how much budget must be free: each call reserves its maximum cost."""
    if entry["refuses"] == "never" or entry["needs_usd"] is None:
        return ""
    return f"; each call reserves the most it may cost, so {terminal.money(entry['needs_usd'])} must be free"


def _basis(document: Mapping[str, Any]) -> None:
    for model in document["models"]:
        seen = model["estimator"]
        past = terminal.counted(seen["calls"], "past call")
        calls = f"from {past}" if seen["calls"] else "not yet compared with a real count"
        corrected = f"estimate corrected ×{seen['ratio']:.2f}, typical error ±{100 * seen['error']:.0f} %"
        _note(f"tokens of {model['model']}: {corrected} ({calls})")
        if not model.get("priced", True):
            price = how_to_price(model["provider"], model["model"])
            terminal.note(f"{model['provider']}:{model['model']} has no price. {price}")
    for sentence in document["assumptions"]:
        _note(f"assumption: {sentence}")
    if document["unavailable"]:
        _note("It cannot run yet: " + " ".join(document["unavailable"]))


def _note(text: str) -> None:
    terminal.paragraph(text, stream=sys.stderr)


def warn_of_limit(document: Mapping[str, Any], limit: float) -> None:
    """Before a run with --max-cost, warn if the limit is probably too low.  The limit applies in any case."""
    expected = document["total"]["cost_usd"]["expected"]
    if expected is None:
        expected = document["known"]["cost_usd"]["expected"]
    if expected is not None and expected > limit:
        terminal.note(
            f"The run is expected to cost {terminal.money(expected)}; --max-cost stops it at {terminal.money(limit)}."
        )


def checked_limit(limit: float | None) -> float | None:
    """Return the value of --max-cost.  Raises InputInvalid if it is not an amount."""
    if limit is not None and not 0 <= limit <= 1e9:
        raise errors.InputInvalid(f"--max-cost {limit} is not an amount in dollars.", hint="Write it like 2.50.")
    return limit
