"""The configured limits of each gate: the tiers of the provider, the limits file, and what `gorgon limits set` stored.

Later sources take precedence.  The numbers of a tier are an assumption that the provider's headers replace.  Numbers
that a person has set apply regardless of what the provider reports (its lower limits still hold).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gorgon_common.documents import read_data, read_text
from gorgon_common.documents.data import MAX_BYTES
from gorgon_common.engine.limits import LimitKey, Quota
from gorgon_common.errors import ConfigurationError, InputInvalid, NotFound, Unavailable
from gorgon_common.operations.providers import PROVIDERS, dimensions_of

CONCURRENCY = "concurrency"
REFRESH = 5.0
"""Seconds until every process notices a change by `gorgon limits set`."""
FREE = Quota(concurrency=64)
"""A compatible server: no quota is known."""
MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Rule:
    """Limits that a person has set; `provider` and `model` are patterns."""

    provider: str
    model: str
    values: Mapping[str, float]

    def applies(self, gate: LimitKey) -> bool:
        """Return whether the rule applies to calls of this gate."""
        return fnmatchcase(gate.provider, self.provider) and fnmatchcase(gate.model, self.model)


@dataclass(frozen=True, slots=True)
class OwnLimits:
    """A limits file: tiers, rules and the teams' weights."""

    tiers: Mapping[str, str]
    rules: Sequence[Rule]
    weights: Mapping[str, float]


class QuotaBook:
    """`engine.limits.Quotas`; thread-safe.

    `stored` returns the rules of `gorgon limits set`, newest first; it is asked every REFRESH seconds.  `official`:
    whether the provider's own server is called, so that its tiers apply.
    """

    def __init__(
        self,
        own: OwnLimits,
        *,
        stored: Callable[[], Sequence[Rule]] = tuple,
        official: Callable[[str], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = own
        self._stored = stored
        self._official = official
        self._clock = clock
        self._lock = threading.Lock()
        self._read: float | None = None
        self._known: tuple[Sequence[Rule], dict[LimitKey, tuple[Quota, Quota]]] = ((), {})
        """What people have set, and the resulting limits of each gate; replaced together."""

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        """Return (the limits assumed until the provider reports its own, the limits that apply regardless)."""
        rules, found = self._refresh()
        if gate not in found:
            found[gate] = self._look(gate, rules)
        return found[gate]

    def weight(self, team: str) -> float:
        """Return a team's weight relative to other teams."""
        return self._own.weights.get(team, 1.0)

    def _refresh(self) -> tuple[Sequence[Rule], dict[LimitKey, tuple[Quota, Quota]]]:
        """Read what people have set, if it is due; the first caller waits until it has been read once."""
        now = self._clock()
        if self._read is None or now - self._read >= REFRESH:
            first = self._read is None
            if self._lock.acquire(blocking=first):
                try:
                    self._reread(now)
                finally:
                    self._lock.release()
        return self._known

    def _reread(self, now: float) -> None:
        if self._read is not None and now - self._read < REFRESH:
            return  # another thread was faster
        try:
            rules = tuple(self._stored())
        except Unavailable:
            if self._read is not None:
                self._read = now  # keep what was read before
            return
        if rules != self._known[0]:
            self._known = (rules, {})
        self._read = now

    def _look(self, gate: LimitKey, rules: Sequence[Rule]) -> tuple[Quota, Quota]:
        assumed = self._assumed(gate)
        values: dict[str, float] = {}
        for rule in (*rules, *self._own.rules):
            if rule.applies(gate):
                values = {**rule.values, **values}
        if CONCURRENCY in values:
            assumed = Quota(values[CONCURRENCY], **assumed.limits)
        return assumed, Quota(**{CONCURRENCY: MOST, **values})

    def _assumed(self, gate: LimitKey) -> Quota:
        provider = PROVIDERS.get(gate.provider)
        if provider is None:
            return FREE
        if gate.target == "sandbox":
            return Quota(**provider.sandbox)
        if not provider.tiers or not self._official(gate.provider):
            return FREE
        return Quota(**provider.amounts(self._own.tiers.get(gate.provider, provider.tier), gate.model))


def read_limits(path: Path | None) -> OwnLimits:
    """Read a limits file; none gives none.  Raises ConfigurationError that says what is wrong in it.

    ```yaml
    openai: {tier: 3, models: {"gpt-5*": {requests: 1000, tokens: 500000}}}
    weights: {research: 2}
    ```
    """
    if path is None:
        return OwnLimits({}, (), {})
    try:
        data = read_data(read_text(str(path), limit=MAX_BYTES), file=str(path)) or {}
    except (InputInvalid, NotFound) as error:
        raise ConfigurationError(
            f"The limits cannot be read: {error.message}", hint="Correct the file, or GORGON_LIMITS_FILE."
        ) from None
    try:
        return _own(data)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path}: {error}", hint="docs/limits.md shows what it may say.") from None


def checked(provider: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return limits by name, for the providers that match a pattern.

    Raises ValueError where one is unknown to them, not above 0, or half a call in flight.
    """
    known = _limits_of(provider)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"there is no limit {name!r}; there are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {_shown(value)}; it has to be a number above 0")
        if name == "concurrency" and value != int(value):
            raise ValueError(f"concurrency is {value:g}; it has to be a whole number of calls")
    return {name: float(value) for name, value in values.items()}


def _limits_of(pattern: str) -> list[str]:
    """Return the limits that can be set for the providers that match a pattern; of every provider if none does."""
    names = [name for name in PROVIDERS if fnmatchcase(name, pattern)] or list(PROVIDERS)
    limits = [dimension.name for name in names for dimension in dimensions_of(name)]
    return [*dict.fromkeys(limits), CONCURRENCY]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _own(data: Mapping[str, Any]) -> OwnLimits:
    tiers, rules, weights = {}, [], {}
    for name, entry in data.items():
        if name == "weights":
            weights = {str(team): float(weight) for team, weight in entry.items()}
            if not all(0 < weight < math.inf for weight in weights.values()):
                raise ValueError("a team's weight has to be a number above 0")
            continue
        if unknown := sorted(set(entry) - {"tier", "models"}):
            raise ValueError(f"{name} has no {', '.join(unknown)}; it has tier and models")
        if "tier" in entry:
            known = list(PROVIDERS[name].tiers) if name in PROVIDERS else []
            if str(entry["tier"]) not in known:
                raise ValueError(f"{name} has no tier {entry['tier']!r}; it has {', '.join(known) or 'none'}")
            tiers[name] = str(entry["tier"])
        models = entry.get("models", {})
        rules += [Rule(name, str(pattern), checked(name, values)) for pattern, values in models.items()]
    return OwnLimits(tiers, tuple(rules), weights)
