"""`gorgon limits …`: what the providers allow, how much of it is used, and the user's own limits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from gorgon_common import errors, lazy
from gorgon_common.application.limits import providers_like
from gorgon_common.application.roles import is_priced, known_models, resolve_model
from gorgon_common.cli import tables, terminal
from gorgon_common.cli.backends import runs_of

_GATES = (
    tables.text("provider"),
    tables.text("model"),
    tables.exact("target"),
    tables.exact("limit"),
    tables.number("free now"),
    tables.number("at most"),
    tables.exact("source"),
    tables.number("in flight"),
    tables.exact("waiting"),
    tables.number("speed"),
    tables.exact("state"),
)
_LEVELS = (tables.exact(""), tables.number(""), tables.exact(""), tables.exact("", drop=1))
"""The columns that a terminal shows below the name of a model."""
_SHORT = {"requests_per_day": "requests per day", "concurrency": "calls in flight"}
"""Limits that are not per minute."""
_FEW = 5
"""The maximum number of teams listed by name."""


def set_limits(
    provider: str,
    model: str,
    *,
    limits: Mapping[str, float | None],
    clear: bool,
    server: str | None,
    as_json: bool,
) -> None:
    """Set or clear limits for a provider's models."""
    given = {name: value for name, value in limits.items() if value is not None}
    if not clear and not given:
        raise errors.InputInvalid(
            "No limit is given.", hint="Write for example: gorgon limits set openai 'gpt-5*' --requests 500"
        )
    model = _meant(providers_like(provider), model, sets=bool(given))
    with runs_of(server) as backend:
        made = backend.set_limits(provider, model, given, clear=clear)
    kept = made["limits"]
    if as_json:
        terminal.emit({"provider": provider, "model": model, "limits": kept})
    elif kept:
        terminal.say(f"{provider} {model}: at most {_told(kept)}.  Workers see it within five seconds.")
    else:
        terminal.say(f"{provider} {model}: {'your limits are removed' if made['cleared'] else 'no limits were set'}.")


def _meant(providers: list[str], model: str, *, sets: bool) -> str:
    """Return the full model name for a tier or a short name; warns if the name is unknown."""
    for provider in providers:
        full = resolve_model(provider, model)
        if full != model:
            terminal.note(f"{model} stands for {full}: the limit applies to that model.")
            return full
    names = list(dict.fromkeys(name for provider in providers for name in known_models(provider)))
    if sets and not any(fnmatchcase(name, model) for name in names) and not is_priced(providers, model):
        near = difflib.get_close_matches(model, names, n=1)
        meant = f"  Did you mean {near[0]}?" if near else ""
        terminal.note(
            f"Gorgon does not know the model {model!r}: the limit applies to calls to exactly that name.{meant}"
        )
    return model


def list_limits(*, server: str | None, as_json: bool) -> None:
    """List every recently used gate, the limits that were set, and the accuracy of token estimates."""
    with runs_of(server) as backend:
        found = backend.limits()
    gates, rules, estimates = found["gates"], found["rules"], found["estimates"]
    if as_json:
        terminal.emit({"gates": gates, "rules": rules, "estimates": estimates})
    else:
        tell(gates, rules, estimates)


def tell(
    gates: Sequence[Mapping[str, Any]], rules: Sequence[Mapping[str, Any]], estimates: Sequence[Mapping[str, Any]]
) -> None:
    """Print the limits for people."""
    if not gates and not rules:
        terminal.say("No model was called recently, and no limits are set.")
        return
    if terminal.interactive():
        for gate in gates:
            _tell(gate)
    else:
        tables.show(_GATES, [row for gate in gates for row in _rows(gate)])
    for rule in rules:
        terminal.paragraph(f"set: {rule['provider']} {rule['model']}: {_told(rule['limits'])}")
    for seen in estimates:
        calls = terminal.counted(seen["calls"], "call")
        terminal.paragraph(
            f"input tokens of {seen['provider']} {seen['model']} ({seen['target']}): estimate corrected "
            f"×{seen['ratio']:.2f}, typical error ±{100 * seen['error']:.0f} % ({calls})"
        )


def _tell(gate: Mapping[str, Any]) -> None:
    """Print a gate for people."""
    name = f"{gate['provider']} {gate['model']} ({gate['target']})"
    terminal.draw(lazy.load("rich.text:Text").assemble((name, "name"), f": {_state(gate)}"))
    terminal.paragraph(
        f"{terminal.counted(gate['in_flight'], 'call')} in flight, {_waiting(gate)} waiting, "
        f"at {gate['rate']:.0%} of the allowed speed",
        indent=2,
    )
    levels = [(row[3], row[4], f"of {row[5]} free", row[6]) for row in _rows(gate) if row[3]]
    tables.show(_LEVELS, levels, headings=False, indent=2)


def _rows(gate: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each of a gate's limits; one row with blanks if it has none.

    (provider, model, target, what counts, free now, limit, known from, in flight, waiting, rate, state)
    """
    first = (gate["provider"], gate["model"], gate["target"])
    last = (f"{gate['in_flight']}", _waiting(gate), f"{gate['rate']:.0%}", _state(gate))
    rows: list[tuple[str, ...]] = []
    for name, level in gate["levels"].items():
        told = level.get("told")
        free = max(0.0, level["level"] if told is None else min(level["level"], told))
        known = "set" if level["set"] else "from the provider" if level["learned"] else "assumed"
        rows.append((*first, _words(name), f"{free:,.0f}", f"{level['limit']:,.0f}", known, *last))
    return rows or [(*first, "", "", "", "", *last)]


def _waiting(gate: Mapping[str, Any]) -> str:
    """Return how many calls wait, and for which teams."""
    teams = sorted(gate["teams"].items(), key=lambda entry: (-entry[1], entry[0]))
    if not teams:
        return f"{gate['waiting']}"
    more = f", {len(teams) - _FEW} more teams" if len(teams) > _FEW else ""
    return f"{gate['waiting']} ({', '.join(f'{team} {count}' for team, count in teams[:_FEW])}{more})"


def _state(gate: Mapping[str, Any]) -> str:
    if gate["breaker"]:
        left = terminal.seconds(gate["breaker"])
        return f"blocked for {left}, because most of the last calls failed (the circuit breaker is open)"
    if gate["half_open"]:
        return "one trial call, because most of the last calls failed (the circuit breaker is half open)"
    if gate["closed"]:
        return f"blocked for {terminal.seconds(gate['closed'])}, because the provider asked for a pause"
    return "available"


def _told(limits: Mapping[str, float]) -> str:
    """Return limits in words: `500 requests and 20,000 tokens a minute, 20 calls in flight`."""
    parts = [f"{value:,.0f} {_words(name)}" for name, value in limits.items() if name not in _SHORT]
    minute = [f"{' and '.join(parts)} per minute"] if parts else []
    return ", ".join([*minute, *(f"{value:,.0f} {_SHORT[name]}" for name, value in limits.items() if name in _SHORT)])


def _words(name: str) -> str:
    return _SHORT.get(name, name.replace("_", " "))
