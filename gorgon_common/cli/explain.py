"""`gorgon runs explain`: what a run waits for, what its money was spent on, and how long its parts took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from gorgon_common.cli import tables, terminal
from gorgon_common.cli.backends import resolve_run, runs_of
from gorgon_common.clock import parse_time

_FEW = 12
_WAITS = (
    tables.exact("step"),
    tables.exact("state"),
    tables.number("so far"),
    tables.number("continues"),
    tables.text("why"),
)
_MONEY = (
    tables.text("step", least=12),
    tables.number("calls"),
    tables.number("cost"),
    tables.prose("what happened", drop=1),
)
_TIME = (
    tables.text("step", least=12),
    tables.number("took"),
    tables.number("in queue"),
    tables.number("in calls"),
    tables.number("other", drop=1),
    tables.number("attempts", drop=2),
)
_CLASSES = {
    "dependency": "waits for other steps",
    "max_parallel": "waits for its turn",
    "paused": "waits for the run",
    "key": "waits for the concurrency key",
    "no_worker": "waits for a worker",
    "queue": "waits for a worker",
    "backlog": "waits for a worker",
    "running": "runs",
    "lost_worker": "waits for another worker",
    "retry": "waits for its next attempt",
    "budget": "waits for a budget",
    "time": "waits for a time",
    "event": "waits for an event",
    "quota": "waits for a rate limit",
    "breaker": "waits for the provider",
    "concurrency": "waits for other calls",
    "turn": "waits for its turn",
    "limiter": "waits for the rate limiter",
    "in_doubt": "waits for a decision",
    "waiting": "waits",
}
"""Reason why a step has not ended → description of its state."""
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
    terminal.say()
    terminal.paragraph(f"The run {waits['what']}. It has waited for {since}; none of its steps starts before that.")
    for holder in waits["held_by"][:_FEW]:
        died = ", its process has died" if holder["process_died"] else ""
        terminal.say(f"  {holder['run_id']}  {holder['status']}{died}  {holder['workflow']}")
    if waits["held_by"]:
        first = waits["held_by"][0]["run_id"]
        terminal.say(f"  To see what it waits for:  gorgon runs explain {first}")
        terminal.say(f"  To end it:                 gorgon runs cancel {first}")


def _waiting(document: Mapping[str, Any]) -> None:
    entries = document["waiting"]
    if not entries:
        return
    now = parse_time(document["as_of"])
    _heading("waiting")
    rows = [_wait(entry, now) for entry in entries[:_FEW]]
    if terminal.interactive():
        for name, why, waited, goes_on, what in rows:
            facts = ", ".join(
                fact for fact in (waited and f"{waited} so far", goes_on and f"continues {goes_on}") if fact
            )
            terminal.paragraph(f"{name}  {why}{': ' if why and facts else ''}{facts}", indent=2)
            terminal.paragraph(what, indent=4, style="quiet")
    else:
        tables.show(_WAITS, rows)
    rest = sum(document["waiting_for"].values()) - min(_FEW, len(entries))
    if rest > 0:
        counted = ", ".join(f"{_CLASSES.get(why, why)} {count}" for why, count in document["waiting_for"].items())
        terminal.paragraph(f"… and {rest} more; in all: {counted}", indent=2)


def _wait(entry: Mapping[str, Any], now: datetime) -> list[str]:
    """Return the step, what it does, for how long, when it continues, and the reason as a sentence."""
    since = "" if entry["since"] is None else terminal.seconds(max(0.0, _gap(entry["since"], now)))
    until = ""
    if entry["until"] is not None:
        left = -_gap(entry["until"], now)
        until = f"in {terminal.seconds(left)}" if left > 0 else "now"
    why = str(entry["why"])
    return [_named(entry), _CLASSES.get(why, why.replace("_", " ")), since, until, str(entry["what"])]


def _named(entry: Mapping[str, Any]) -> str:
    return str(entry["step"]) if entry["item"] is None else f"{entry['step']}[{entry['item']}]"


def _gap(text: str, now: datetime) -> float:
    return (now - parse_time(text)).total_seconds()


def _money(money: Mapping[str, Any], where: str) -> None:
    if not money["calls"] and not money["adopted"]["count"]:
        return
    _heading("money")
    terminal.say(f"{terminal.cost(money)} for {terminal.counted(money['calls'], 'call')}{where}")
    for kind, entry in money["for"].items():
        spent = f"{terminal.cost(entry)} for {_FOR.get(kind, kind)} ({terminal.number(entry['calls'])})"
        terminal.paragraph(spent, indent=2)
    if money["cached_input_tokens"]:
        count = terminal.number(money["cached_input_tokens"])
        terminal.paragraph(f"{count} input tokens came from the provider's cache", indent=2)
    adopted = money["adopted"]
    if adopted["count"]:
        steps = "step was" if adopted["count"] == 1 else "steps were"
        saved = "" if adopted["saved_usd"] is None else f", which saved {terminal.money(adopted['saved_usd'])}"
        terminal.paragraph(f"{adopted['count']} {steps} taken over from an earlier run{saved}", indent=2)
    terminal.say()
    tables.show(_MONEY, [_step(entry) for entry in money["steps"][:_FEW]])
    _more(len(money["steps"]) - _FEW + money["more_steps"])


def _step(entry: Mapping[str, Any]) -> list[str]:
    calls: Sequence[Mapping[str, Any]] = entry["calls"]
    told = [
        f"{call['for']}: {call['model']}, {str(call['outcome']).replace('_', ' ')}, {_cost_of(call)}"
        for call in calls[:4]
    ]
    return [
        _named(entry),
        str(len(calls)),
        terminal.cost(entry, short=True),
        "; ".join(told) + (" …" if len(calls) > 4 else ""),
    ]


def _cost_of(call: Mapping[str, Any]) -> str:
    return "cost unknown" if call["cost_usd"] is None else terminal.money(call["cost_usd"])


def _time(time: Mapping[str, Any]) -> None:
    if not time["steps"]:
        return
    _heading("time")
    if time["seconds"] is not None:
        before = terminal.seconds(time["before_start_s"])
        terminal.say(f"{before} until the first step started, then {terminal.seconds(time['seconds'])}")
    rows = []
    for part in time["steps"][:_FEW]:
        figures = [terminal.seconds(part[key]) for key in ("seconds", "queue_s", "calls_s", "other_s")]
        rows.append([_named(part), *figures, str(part["attempts"] or "")])
    tables.show(_TIME, rows)
    _more(len(time["steps"]) - _FEW + time["more_steps"])


def _more(count: int) -> None:
    if count > 0:
        terminal.say(f"… and {count} more; --json has them all")


def _heading(text: str) -> None:
    terminal.say()
    terminal.draw(terminal.styled(text, "quiet"))
