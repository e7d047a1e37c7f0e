"""`gorgon runs explain`: what a run waits for, what its money went to, how long its parts took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from gorgon_common.cli import terminal
from gorgon_common.cli.backends import resolve_run, runs_of
from gorgon_common.clock import parse_time

_FEW = 12
_FOR = {
    "work": "the work itself",
    "repair": "repairs of replies that missed their schema",
    "retry": "retries after a failure",
    "fallback": "another model, after the first had failed",
    "refused": "calls that were refused (429)",
}


def explain(run: str, step: str | None, *, server: str | None, as_json: bool) -> None:
    """Explain a run, or one step of it."""
    with runs_of(server) as backend:
        document = backend.explain(resolve_run(backend, run), step)
    if as_json:
        terminal.emit(document)
    else:
        tell(document)


def tell(document: Mapping[str, Any]) -> None:
    """Print an explanation for people."""
    what = f"step {document['step']} of " if document["step"] else ""
    terminal.draw(terminal.styled(f"{what}{document['run_id']}  {document['workflow']}  {document['status']}", "name"))
    _key(document)
    _waiting(document)
    _money(document["money"], " on the sandbox" if document["target"] == "sandbox" else "")
    _time(document["time"])


def _key(document: Mapping[str, Any]) -> None:
    waits = document.get("waits_for")
    if not waits:
        return
    since = terminal.seconds(_gap(waits["since"], parse_time(document["as_of"])))
    terminal.say(f"\nThe run {waits['what']}. It waits for {since} now; none of its steps starts before.")
    for holder in waits["held_by"][:_FEW]:
        died = ", its process has died" if holder["process_died"] else ""
        terminal.say(f"  {holder['run_id']}  {holder['workflow']}  {holder['status']}{died}")
    if waits["held_by"]:
        first = waits["held_by"][0]["run_id"]
        terminal.say(f"  What keeps it: gorgon runs explain {first}   To end it: gorgon runs cancel {first}")


def _waiting(document: Mapping[str, Any]) -> None:
    entries = document["waiting"]
    if not entries:
        return
    now = parse_time(document["as_of"])
    _heading("waits for")
    terminal.table(
        ("step", "why", "", "since", "until"), [_wait(entry, now) for entry in entries[:_FEW]], right=("since", "until")
    )
    rest = sum(document["waiting_for"].values()) - min(_FEW, len(entries))
    if rest > 0:
        counted = ", ".join(f"{count} {why}" for why, count in document["waiting_for"].items())
        terminal.say(f"… and {rest} more ({counted} in all)")


def _wait(entry: Mapping[str, Any], now: datetime) -> list[str]:
    name = str(entry["step"]) if entry["item"] is None else f"{entry['step']}[{entry['item']}]"
    since = "" if entry["since"] is None else f"{terminal.seconds(_gap(entry['since'], now))} ago"
    until = "unknown"
    if entry["until"] is not None:
        left = -_gap(entry["until"], now)
        until = f"in {terminal.seconds(left)}" if left > 0 else "now"
    return [name, str(entry["why"]).replace("_", " "), str(entry["what"]), since, until]


def _gap(text: str, now: datetime) -> float:
    return (now - parse_time(text)).total_seconds()


def _money(money: Mapping[str, Any], where: str) -> None:
    if not money["calls"] and not money["adopted"]["count"]:
        return
    _heading("money")
    terminal.say(f"{terminal.cost(money)} for {terminal.number(money['calls'])} calls{where}")
    for kind, entry in money["for"].items():
        terminal.say(f"  {terminal.cost(entry)} for {_FOR.get(kind, kind)} ({terminal.number(entry['calls'])})")
    if money["cached_input_tokens"]:
        count = terminal.number(money["cached_input_tokens"])
        terminal.say(f"  {count} input tokens came from the provider's cache")
    adopted = money["adopted"]
    if adopted["count"]:
        steps = "step was" if adopted["count"] == 1 else "steps were"
        saved = "" if adopted["saved_usd"] is None else f", which saved {terminal.money(adopted['saved_usd'])}"
        terminal.say(f"  {adopted['count']} {steps} taken over from an earlier run{saved}")
    terminal.say()
    rows = [_step(entry) for entry in money["steps"][:_FEW]]
    terminal.table(("step", "calls", "cost", "what happened"), rows, right=("calls", "cost"))
    _more(len(money["steps"]) - _FEW + money["more_steps"])


def _step(entry: Mapping[str, Any]) -> list[str]:
    name = str(entry["step"]) if entry["item"] is None else f"{entry['step']}[{entry['item']}]"
    calls: Sequence[Mapping[str, Any]] = entry["calls"]
    told = [f"{call['for']}: {call['model']} {call['outcome']} {_cost_of(call)}" for call in calls[:4]]
    return [name, str(len(calls)), terminal.cost(entry, short=True), "; ".join(told) + (" …" if len(calls) > 4 else "")]


def _cost_of(call: Mapping[str, Any]) -> str:
    return "cost unknown" if call["cost_usd"] is None else terminal.money(call["cost_usd"])


def _time(time: Mapping[str, Any]) -> None:
    if not time["steps"]:
        return
    _heading("time")
    if time["seconds"] is not None:
        before = terminal.seconds(time["before_start_s"])
        terminal.say(f"{terminal.seconds(time['seconds'])}, after {before} before the first step")
    rows = []
    for part in time["steps"][:_FEW]:
        name = str(part["step"]) if part["item"] is None else f"{part['step']}[{part['item']}]"
        figures = [terminal.seconds(part[key]) for key in ("seconds", "queue_s", "calls_s", "other_s")]
        rows.append([name, *figures, str(part["attempts"] or "")])
    terminal.table(
        ("step", "took", "queue", "calls", "other", "attempts"),
        rows,
        right=("took", "queue", "calls", "other", "attempts"),
    )
    _more(len(time["steps"]) - _FEW + time["more_steps"])


def _more(count: int) -> None:
    if count > 0:
        terminal.say(f"… and {count} more; --json has them all")


def _heading(text: str) -> None:
    terminal.say()
    terminal.draw(terminal.styled(text, "quiet"))
