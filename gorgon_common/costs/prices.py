"""Prices usage in micro-dollars: our dated table (`prices.yaml`) first, then the offline snapshot of genai-prices.

Nothing is fetched.  An unknown price is None, never 0: a model that neither table knows, and a service tier that
the model has no price for (the standard price would be too low for `priority`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import ROUND_HALF_UP, Decimal
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from gorgon_common.clock import SYSTEM_CLOCK, Clock
from gorgon_common.costs.usage import Usage
from gorgon_common.documents import read_data, read_text
from gorgon_common.documents.data import MAX_BYTES
from gorgon_common.errors import ConfigurationError, InputInvalid, NotFound
from gorgon_common.lazy import load

MILLION = Decimal(1_000_000)
MODELS_CACHED = 256

_STANDARD = frozenset({None, "", "default", "standard", "auto", "standard_only"})
_CONTEXTS: Mapping[str, Mapping[str, str]] = {
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
    "fast": {"service_tier": "fast", "speed": "fast"},
    "batch": {"processing": "batch"},
}
"""Service tier, as the providers name it → what genai-prices selects its price variants by."""

_RATES = ("input", "cache_read", "cache_write", "cache_write_1h", "output")


@dataclass(frozen=True, slots=True)
class Override:
    """One entry of `prices.yaml`.  Rates in dollars per million tokens."""

    provider: str
    model: str
    since: date
    until: date | None
    rates: Mapping[str, Decimal]
    long: Mapping[str, Decimal] | None = None
    above: int = 0
    tiers: Mapping[str, Mapping[str, Decimal]] = field(default_factory=dict)

    def active(self, day: date) -> bool:
        """Whether the entry holds on that day."""
        return self.since <= day and (self.until is None or day < self.until)

    def price(self, usage: Usage, tier: str | None) -> Decimal | None:
        """Return millionths of a dollar (rates are per million tokens), None for a tier without a price."""
        if tier is None:
            rates = self.long if self.long and usage.input_tokens > self.above else self.rates
        elif tier in self.tiers:
            rates = self.tiers[tier]
        else:
            return None
        base = rates["input"]
        write = rates.get("cache_write", base)
        cached = usage.cache_read_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
        return (
            max(0, usage.input_tokens - cached) * base
            + usage.cache_read_tokens * rates.get("cache_read", base)
            + usage.cache_write_5m_tokens * write
            + usage.cache_write_1h_tokens * rates.get("cache_write_1h", write)
            + usage.output_tokens * rates["output"]
        )


_Leaves = tuple[int, int, int, int, int]
"""Tokens: input without a cache, cache reads, cache writes for 5 minutes and for an hour, output."""


def _leaves(usage: Usage) -> _Leaves:
    cached = usage.cache_read_tokens + usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
    return (
        max(0, usage.input_tokens - cached),
        usage.cache_read_tokens,
        usage.cache_write_5m_tokens,
        usage.cache_write_1h_tokens,
        usage.output_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A model's prices in the snapshot at one moment.

    `rates`: micro-dollars per token of each kind in `_Leaves`.  None where a price depends on the size of the call; the
    library computes it then, which takes a tenth of a millisecond.
    """

    provider: Any
    model: Any
    context: Mapping[str, str]
    rates: tuple[Decimal, ...] | None


class GenaiPricer:
    """`ports.Pricer`: thread-safe; loads genai-prices (a third of a second) at the first price that needs it.

    `own`: the operator's prices, which go before `overrides` (without them our table), which go before the snapshot.
    """

    def __init__(
        self, *, clock: Clock = SYSTEM_CLOCK, overrides: Sequence[Override] | None = None, own: Sequence[Override] = ()
    ) -> None:
        text = resources.files(__package__).joinpath("prices.yaml").read_text(encoding="utf-8")
        ours = tuple(read_overrides(text) if overrides is None else overrides)
        self._tables = (tuple(own), ours)
        shown = text if overrides is None else repr(ours)
        if own:
            shown += repr(tuple(own))
        self._clock = clock
        self._snapshot: Any = None
        self._known: dict[tuple[str, str, str | None], tuple[datetime, _Snapshot | None]] = {}
        """Model → its prices and the minute they were read in; prices begin and end at full minutes."""
        self._lock = threading.Lock()
        digest = hashlib.sha256(shown.encode()).hexdigest()[:8]
        self.version = f"genai-prices {metadata.version('genai-prices')}+{digest}"
        """Identifies the snapshot and the overrides."""

    def price(
        self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None, asked: str | None = None
    ) -> int | None:
        """Return micro-dollars, rounded half up; None where there is no price.

        `asked`: what the call asked for, where the reply names another: most often a dated snapshot of the same.  In
        each table the reply's name goes first; a table with either name goes before the next one, since budgets
        reserve at the price of `asked`.

        At least 1 where something was used, unless an override says that the model is free.
        """
        if not (usage.input_tokens or usage.output_tokens):
            return 0
        now = self._clock.now()
        tier = None if service_tier in _STANDARD else service_tier
        names = list(dict.fromkeys((model, asked or model)))
        for table in self._tables:
            for name in names:
                for entry in table:
                    if entry.provider == provider and entry.model == name and entry.active(now.date()):
                        amount = entry.price(usage, tier)
                        return None if amount is None else _micros(amount, free=True)
        for name in names:
            found = self._from_snapshot(provider, name, usage, tier, now)
            if found is not None:
                return found
        return None

    def window(self, provider: str, model: str) -> int | None:
        """Return the most tokens that a call of this model can have, None where the snapshot does not say."""
        try:
            _, info = self._loaded().find_provider_model(model, None, provider, None)
        except LookupError:
            return None
        return None if info.context_window is None else int(info.context_window)

    def _from_snapshot(self, provider: str, model: str, usage: Usage, tier: str | None, now: datetime) -> int | None:
        key, minute = (provider, model, tier), now.replace(second=0, microsecond=0)
        read_at, known = self._known.get(key, (None, None))
        if read_at != minute:
            known = self._read(provider, model, tier, now)
            if len(self._known) >= MODELS_CACHED:
                self._known.clear()
            self._known[key] = (minute, known)
        if known is None:
            return None
        if known.rates is None:
            return _micros(self._calculated(known, usage, now), free=False)
        counts = zip(known.rates, _leaves(usage), strict=True)
        return _micros(sum((rate * count for rate, count in counts if count), Decimal(0)), free=False)

    def _read(self, provider: str, model: str, tier: str | None, now: datetime) -> _Snapshot | None:
        """Return a model's prices in the snapshot, None where it has none."""
        try:
            found, info = self._loaded().find_provider_model(model, None, provider, None)
        except LookupError:
            return None
        context = _CONTEXTS.get(tier) if tier else {}
        if context is None or (context and not _has_variant(info, context, now)):
            return None
        prices = info.get_prices(now, context)
        if prices.input_mtok is None or prices.output_mtok is None:
            return None
        priced = _Snapshot(found, info, context, None)
        if any(not isinstance(rate, Decimal | None) for rate in vars(prices).values()):
            return priced
        million = int(MILLION)
        probes = (
            Usage(input_tokens=million),
            Usage(input_tokens=million, cache_read_tokens=million),
            Usage(input_tokens=million, cache_write_5m_tokens=million),
            Usage(input_tokens=million, cache_write_1h_tokens=million),
            Usage(output_tokens=million),
        )
        rates = tuple(self._calculated(priced, probe, now) / MILLION for probe in probes)
        return replace(priced, rates=rates)

    def _calculated(self, priced: _Snapshot, usage: Usage, now: datetime) -> Decimal:
        """Return micro-dollars, as the library computes them."""
        calculation = priced.model.calc_price(
            self._genai_usage(usage),
            priced.provider,
            genai_request_timestamp=now,
            price_context=priced.context or None,
        )
        amount: Decimal = calculation.total_price * MILLION
        return amount

    def _loaded(self) -> Any:
        with self._lock:
            if self._snapshot is None:
                self._snapshot = load("genai_prices.data_snapshot:get_snapshot")()
            return self._snapshot

    @staticmethod
    def _genai_usage(usage: Usage) -> Any:
        written = usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
        return load("genai_prices:Usage")(
            # A total below its own parts would be rejected; the parts are what is charged.
            input_tokens=max(usage.input_tokens, usage.cache_read_tokens + written),
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=written,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
            output_tokens=usage.output_tokens,
        )


def make_pricer(path: Path | None) -> GenaiPricer:
    """Return the prices, those of the operator's own file (in the form of `prices.yaml`) before all others.

    Raises ConfigurationError where the file cannot be read.
    """
    if path is None:
        return GenaiPricer()
    try:
        own = read_overrides(read_text(str(path), limit=MAX_BYTES), file=str(path))
    except (InputInvalid, NotFound) as error:
        raise ConfigurationError(
            f"The price table cannot be read: {error.message}", hint="Correct GORGON_PRICES, or unset it."
        ) from None
    return GenaiPricer(own=own)


def how_to_price(provider: str, model: str) -> str:
    """Return how an operator gives a model a price, for the hint of an error."""
    entry = f"provider: {provider}, model: {json.dumps(model)}, from: 2026-01-01, reason: our price"
    return (
        "Put its price in a file, in dollars per million tokens (0 if the model is free), and name the file in "
        f"GORGON_PRICES (more in docs/costs.md, Prices of your own):\n- {{{entry}, prices: {{input: 0, output: 0}}}}"
    )


def read_overrides(text: str, *, file: str = "prices.yaml") -> list[Override]:
    """Read the form of `prices.yaml`.

    Raises InputInvalid where it is not YAML, and ConfigurationError that names the entry that is wrong.
    """
    entries = read_data(text, file=file)
    if not isinstance(entries, list | None):
        raise ConfigurationError("The price table must be a list, one entry for each model.")
    found = []
    for position, entry in enumerate(entries or ()):
        try:
            if not str(entry["reason"]).strip():
                raise ValueError("reason is empty")
            long = dict(entry.get("long") or {})
            found.append(
                Override(
                    provider=str(entry["provider"]),
                    model=str(entry["model"]),
                    since=_day(entry["from"]),
                    until=_day(entry["until"]) if "until" in entry else None,
                    above=int(long.pop("above", 0)),
                    long=_rates(long) if long else None,
                    rates=_rates(entry["prices"]),
                    tiers={str(name): _rates(rates) for name, rates in (entry.get("tiers") or {}).items()},
                )
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConfigurationError(
                f"Entry {position + 1} of the price table is wrong: {type(error).__name__}: {error}.",
                hint="It needs provider, model, from, reason and prices: {input, output}, dollars per million tokens.",
            ) from None
    return found


def _day(value: Any) -> date:
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a date like 2026-11-17") from None


def _rates(entry: Mapping[str, Any]) -> dict[str, Decimal]:
    rates = {name: Decimal(str(value)) for name, value in entry.items()}
    unknown = [name for name, rate in rates.items() if name not in _RATES or not rate.is_finite() or rate < 0]
    if unknown or "input" not in rates or "output" not in rates:
        raise ValueError(f"prices {dict(entry)} need input and output, and may have {', '.join(_RATES)}, none negative")
    return rates


def _has_variant(info: Any, context: Mapping[str, str], now: datetime) -> bool:
    return any(
        all(context.get(key) == value for key, value in variant.when.items())
        and (variant.constraint is None or variant.constraint.active(now))
        for variant in info.price_variants or ()
    )


def _micros(amount: Decimal, *, free: bool) -> int | None:
    """Round to whole micro-dollars, at least 1: only an override makes a model free."""
    if amount == 0:
        return 0 if free else None
    return max(1, int(amount.quantize(Decimal(1), ROUND_HALF_UP)))
