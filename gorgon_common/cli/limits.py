"""`gorgon limits …`: what the providers allow, what is used of it, and limits of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common import errors
from gorgon_common.bootstrap import make_limiter
from gorgon_common.cli import terminal
from gorgon_common.cli.backends import local_services
from gorgon_common.persistence.limits import LimitRules
from gorgon_common.ratelimit.quotas import checked

_SHORT = {"requests_per_day": "requests a day"}


def set_limits(provider: str, model: str, *, limits: Mapping[str, float | None], clear: bool, as_json: bool) -> None:
    """Set or clear limits for a provider's models."""
    given = {name: value for name, value in limits.items() if value is not None}
    if not clear and not given:
        raise errors.InputInvalid(
            "No limit is given.", hint="Write for example: gorgon limits set openai 'gpt-5*' --requests 500"
        )
    try:
        values = checked(given)
    except ValueError as error:
        raise errors.InputInvalid(str(error)) from None
    with local_services() as services:
        rules = LimitRules(services.database)
        cleared = rules.clear(provider, model) if clear else False
        if values:
            rules.set(provider, model, values)
        kept = next((body for name, pattern, body in rules.all() if (name, pattern) == (provider, model)), {})
    if as_json:
        terminal.emit({"provider": provider, "model": model, "limits": kept})
    elif kept:
        told = ", ".join(f"{value:,.0f} {_words(name)}" for name, value in kept.items())
        terminal.say(f"{provider} {model}: at most {told}.  Workers see it within five seconds.")
    else:
        terminal.say(f"{provider} {model}: {'no limits of your own any more' if cleared else 'there were none'}.")


def list_limits(*, as_json: bool) -> None:
    """List every gate that was used lately, and the limits that were set."""
    with local_services() as services:
        limiter, _ = make_limiter(services.settings, services.database)
        try:
            gates = limiter.snapshot()
        finally:
            limiter.close()
        rules: list[dict[str, Any]] = [
            {"provider": provider, "model": model, "limits": limits}
            for provider, model, limits in LimitRules(services.database).all()
        ]
    if as_json:
        terminal.emit({"gates": gates, "rules": rules})
        return
    if not gates and not rules:
        terminal.say("No model was called lately, and no limits are set.")
        return
    rows = [row for gate in gates for row in _rows(gate)]
    columns = ("provider", "model", "target", "counts", "limit", "left", "in flight", "waiting", "rate", "state")
    if rows:
        terminal.table(columns, rows, right=("limit", "left", "in flight", "waiting", "rate"))
    for rule in rules:
        told = ", ".join(f"{value:,.0f} {_words(name)}" for name, value in rule["limits"].items())
        terminal.say(f"set: {rule['provider']} {rule['model']}: {told}")


def _rows(gate: Mapping[str, Any]) -> list[tuple[str, ...]]:
    first = (gate["provider"], gate["model"], gate["target"])
    last = (f"{gate['in_flight']}", f"{gate['waiting']}", f"{gate['rate']:.0%}", _state(gate))
    rows: list[tuple[str, ...]] = []
    for name, level in gate["levels"].items():
        told = level.get("told")
        left = level["level"] if told is None else min(level["level"], told)
        shown = f"{level['limit']:,.0f}{'' if level['learned'] else ' ?'}"
        rows.append((*(first if not rows else ("", "", "")), _words(name), shown, f"{left:,.0f}", *last))
        last = ("", "", "", "")
    return rows or [(*first, "", "", "", *last)]


def _state(gate: Mapping[str, Any]) -> str:
    if gate["breaker"]:
        return f"breaker open for {terminal.seconds(gate['breaker'])}"
    if gate["half_open"]:
        return "breaker half open"
    if gate["closed"]:
        return f"closed by the provider for {terminal.seconds(gate['closed'])}"
    return "open"


def _words(name: str) -> str:
    return _SHORT.get(name, name.replace("_", " "))
