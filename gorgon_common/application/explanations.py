"""Puts into words what a run or a step waits for.  Persistence says why, with the facts; the sentences are here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_NAMED = 5
"""How many steps a sentence names."""

_SENTENCES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], str]] = {
    "in_doubt": lambda _entry, _document: "it is unknown whether its effect has happened",
    "paused": lambda _entry, _document: "the run starts no new steps",
    "key": lambda _entry, _document: "it starts when the run holds its concurrency key",
    "lost_worker": lambda _entry, _document: "its worker is gone; another worker takes the step over",
    "max_parallel": lambda entry, _document: _turn(entry["facts"]),
    "dependency": lambda entry, _document: f"waits for {_names(entry['facts']['names'])}",
    "no_worker": lambda entry, document: _no_worker(entry, document),
    "queue": lambda entry, _document: f"its message has been sent; {_busy(entry['queue'])}",
    "backlog": lambda entry, _document: f"{_ahead(entry['queue']['ahead'], 'step')}; {_busy(entry['queue'])}",
    "running": lambda entry, _document: "runs on {worker}, attempt {attempt}".format(**entry["facts"]),
    "retry": lambda entry, _document: (
        f"attempt {entry['facts']['attempt']} comes next; the last one failed: {_message(entry)}"
    ),
}
"""Class of a wait → the sentence for it; a parked step was described when its wait was stored, with a `message`."""


def worded(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return an explanation with a sentence (`what`) for the run and for each step that waits."""
    return {
        **document,
        "waits_for": key_worded(document["waits_for"]),
        "waiting": [_entry(entry, document) for entry in document["waiting"]],
    }


def run_worded(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run with a sentence for what it waits for, if it waits for its concurrency key."""
    return {**run, "waits_for": key_worded(run["waits_for"])} if "waits_for" in run else run


def key_worded(waits: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a run waits for with a sentence: `waits for the concurrency key 'deploy', held by …`."""
    if waits is None:
        return None
    holders = waits["held_by"]
    held_by = [{name: value for name, value in holder.items() if name != "cancelled"} for holder in holders]
    what = f"waits for the concurrency key {waits['key']!r}"
    if holders:
        first = holders[0]
        what += f", held by {first['run_id']} ({first['workflow']}) since {first['since'][:19]}Z"
        if len(holders) > 1:
            what += f" and {len(holders) - 1} more"
        if first["process_died"]:
            what += ", whose process has died: resume or cancel that run, or wait until it is ended"
        elif first["cancelled"]:
            what += ", which is being cancelled"
    if waits["ahead"]:
        what += f"; {_ahead(waits['ahead'], 'run')}"
    return {**waits, "held_by": held_by, "what": what}


def _entry(entry: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    stored = "message" in entry["facts"] and entry["why"] != "retry"
    what = _message(entry) if stored else _SENTENCES[entry["why"]](entry, document)
    return {**{name: value for name, value in entry.items() if name != "facts"}, "what": what}


def _message(entry: Mapping[str, Any]) -> str:
    return entry["facts"].get("message") or "no reason is recorded"


def _turn(facts: Mapping[str, Any]) -> str:
    if "run_limit" in facts:
        return f"the run already has as many steps under way as its `max_parallel` allows ({facts['run_limit']})"
    return f"at most {facts['limit']} run at the same time" if facts["limit"] else "its turn has not come"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _no_worker(entry: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    if entry["facts"]["embedded"]:
        resume = f"gorgon runs resume {document['run_id']}"
        return f"the process of the run has died; continue it with: {resume}"
    queue = entry["queue"]["name"]
    live = " --live" if document["target"] == "live" else ""
    return f"no worker serves the queue {queue}; start one with: gorgon worker -q {queue}{live}"


def _busy(queue: Mapping[str, Any]) -> str:
    return f"{queue['busy']} of {queue['slots']} slots of the queue {queue['name']} are taken"


def _ahead(count: int, noun: str) -> str:
    return f"{count} {noun} is ahead of it" if count == 1 else f"{count} {noun}s are ahead of it"
