"""`gorgon plan`: what a run would use, before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common import errors, lazy
from gorgon_common.cli import terminal
from gorgon_common.cli.backends import chosen_server, connect, local_services
from gorgon_common.cli.inputs import read_inputs
from gorgon_common.cli.sources import asked_of_server, find_workflow

_NAMES = ("low", "expected", "p95", "worst")


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
    """Print what a run would use; `team` owns it, else the file's."""
    target = "live" if live else "sandbox"
    server = chosen_server(server)
    if server is not None:
        with connect(server) as client:
            asked = asked_of_server(file)
            values = read_inputs(inputs, inputs_file, client.plan(**asked)["inputs"])
            document = client.estimate(**asked, inputs=values, target=target, team=team)
    else:
        with local_services() as services:
            workflow = find_workflow(file)
            compiled, _ = services.read(workflow.text, file=workflow.file)
            values = read_inputs(inputs, inputs_file, compiled.inputs)
            document = services.estimate(compiled, values, target=target, team=team)
    if as_json:
        terminal.emit(document)
    else:
        tell(document)


def tell(document: Mapping[str, Any]) -> None:
    """Print an estimate for people."""
    terminal.draw(terminal.styled(f"{document['workflow']}, {_where(document)}", "name"))
    terminal.say()
    steps = [step for step in document["steps"] if not _silent(step)]
    columns = ("step", "calls", "tokens in", "tokens out", "expected", "p95", "worst", "time", "by")
    rows = [_row(step, document) for step in steps]
    terminal.table(columns, rows, right=columns[1:8])
    terminal.say()
    total = document["total"]
    _line("cost", total["cost_usd"], document["known"]["cost_usd"], document["unknown"]["cost"], terminal.money)
    _line("time", total["time_s"], document["known"]["time_s"], document["unknown"]["time"], terminal.seconds)
    for name in ("input", "output"):
        _line(name, total["tokens"][name], total["tokens"][name], [], _tokens)
    _line("calls", total["calls"], total["calls"], [], _tokens)
    terminal.say()
    _path(document["critical_path"])
    _quota(document["binding_quota"])
    _budgets(document["budgets"])
    _basis(document)


def _where(document: Mapping[str, Any]) -> str:
    runs = document["history"]["runs"]
    past = f"by {runs} past {'run' if runs == 1 else 'runs'}" if runs else "never run before"
    return f"{'on the real providers' if document['target'] == 'live' else 'on the sandbox'}, {past}"


def _silent(step: Mapping[str, Any]) -> bool:
    """Tell whether a step neither costs nor takes anything that is worth a line."""
    inside = step["parent"] == step["id"]  # a map's item, a loop's round: their sum is the line above
    return inside or (step["kind"] in ("checkpoint", "aggregate") and not step["calls"]["worst"])


def _row(step: Mapping[str, Any], document: Mapping[str, Any]) -> list[Any]:
    name = f"  {step['id']}" if step["parent"] else str(step["id"])
    if step["times"] is not None:
        name += f" ×{step['times']['expected']:g} (≤ {step['times']['worst']})"
    if step["runs"] == "never":
        return [name, "", "", "", terminal.styled("does not run", "quiet"), "", "", "", ""]
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


def _line(what: str, band: Mapping[str, Any], known: Mapping[str, Any], unknown: Sequence[str], show: Any) -> None:
    """Print one quantity; where something of it is not known, what is, and what is missing."""
    steps = ", ".join(dict.fromkeys(unknown))
    if unknown and not any(known[name] for name in _NAMES):
        terminal.say(f"{what:<8}unknown: {steps}")
        return
    shown = band if not unknown else known
    parts = [f"{name} {'unknown' if shown[name] is None else show(shown[name])}" for name in _NAMES]
    text = "   ".join(parts)
    if unknown:
        text += f"   + unknown: {steps}"
    terminal.say(f"{what:<8}{text}")


def _path(path: Sequence[Mapping[str, Any]]) -> None:
    if path:
        way = " → ".join(f"{entry['step']} {terminal.seconds(entry['seconds'])}" for entry in path)
        terminal.say(f"longest way: {way}")


def _quota(binding: Mapping[str, Any] | None) -> None:
    if binding is None:
        terminal.say("quota: none is known for these models")
        return
    where = f"{binding['provider']} {binding['model']}, {binding['dimension'].replace('_', ' ')}"
    much = f"{terminal.number(binding['needed'])} of {terminal.number(round(binding['per_minute']))} a minute"
    if binding["binds"]:
        terminal.say(f"quota: {where} makes it wait: {much}, {terminal.seconds(binding['seconds'])} at least")
    else:
        terminal.say(f"quota: none makes it wait; nearest is {where}: {much}")


def _budgets(budgets: Sequence[Mapping[str, Any]]) -> None:
    words = {
        "never": "is enough",
        "at worst": "would refuse at worst",
        "maybe": "may refuse (p95 is above it)",
        "likely": "will probably refuse (the expected cost is above it)",
        "certainly": "will refuse",
        "unknown": "nobody can tell whether it is enough",
    }
    for entry in budgets:
        parts = []
        if entry["left_usd"] is not None:
            parts.append(terminal.money(max(0.0, entry["left_usd"])))
        if entry["left_tokens"] is not None:
            parts.append(f"{terminal.number(max(0, entry['left_tokens']))} tokens")
        left = " and ".join(parts) or "no limit"
        terminal.say(f"budget: {entry['budget']}, {left} left: {words[entry['refuses']]}{_needed(entry)}")


def _needed(entry: Mapping[str, Any]) -> str:
    """Say how much must be free: calls are reserved at the most that they may cost."""
    if entry["refuses"] == "never" or entry["needs_usd"] is None:
        return ""
    return f"; calls are reserved at their bound, {terminal.money(entry['needs_usd'])} has to be free"


def _basis(document: Mapping[str, Any]) -> None:
    for model in document["models"]:
        seen = model["estimator"]
        past = f"{terminal.number(seen['calls'])} past {'call' if seen['calls'] == 1 else 'calls'}"
        calls = past if seen["calls"] else "never compared with a real count"
        terminal.note(
            f"tokens of {model['model']}: estimate × {seen['ratio']:.2f}, off by about {seen['error']:.0%} ({calls})"
        )
        if not model.get("priced", True):
            price = lazy.load("gorgon_common.costs.prices:how_to_price")(model["provider"], model["model"])
            terminal.note(f"{model['provider']}:{model['model']} has no price. {price}")
    for sentence in document["assumptions"]:
        terminal.note(f"assumed: {sentence}")
    if document["unavailable"]:
        terminal.note("It cannot run yet: " + " ".join(document["unavailable"]))


def warn_of_limit(document: Mapping[str, Any], limit: float) -> None:
    """Say before a run with --max-cost that it will probably not be enough.  The limit holds whatever is said here."""
    expected = document["total"]["cost_usd"]["expected"]
    if expected is None:
        expected = document["known"]["cost_usd"]["expected"]
    if expected is not None and expected > limit:
        terminal.note(
            f"The run is expected to cost {terminal.money(expected)}; --max-cost stops it at {terminal.money(limit)}."
        )


def checked_limit(limit: float | None) -> float | None:
    """Return a --max-cost.  Raises InputInvalid where it is no amount."""
    if limit is not None and not 0 <= limit <= 1e9:
        raise errors.InputInvalid(f"--max-cost {limit} is no amount in dollars.", hint="Write it like 2.50.")
    return limit
