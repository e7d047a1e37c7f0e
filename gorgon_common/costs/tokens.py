"""Estimates the tokens of a text offline: characters counted by kind, corrected by the counts of providers.

Providers do not publish their tokenizers, or count only over the network, so this is an estimate with a known error.
Each model family has a base rate for letters, digits, signs, spaces and other scripts.  For each model, the mean of
ln(real / estimated) over past calls corrects the estimate, and its standard deviation is the error.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgon_common.costs.usage import Usage

UNSEEN_ERROR = 0.30
"""The relative error (one standard deviation) that is assumed for an unknown model."""

SANDBOX_FACTOR = 0.8
"""The sandbox counts four bytes as a token, which is about this fraction of what a model would count."""

FLUSH_CALLS = 200
FLUSH_SECONDS = 60.0
"""How many observations a process collects, and for how many seconds, before it stores them."""

_PRIOR_CALLS = 2
_LOW, _HIGH = 1 / 8, 8.0
"""A ratio outside these bounds has another cause than the text: images, a provider's own prompt."""

_WORDS = re.compile(r"[A-Za-z]+")
_DIGITS = re.compile(r"[0-9]+")
_SPACES = re.compile(r"\s+")
_SIGNS = re.compile(r"[!-/:-@\[-`{-~]")
_WIDE = re.compile(r"[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U0001f000-\U0001faff\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Family:
    """The rates of one family of tokenizers.

    `letters`: ASCII letters to a token within a word; `signs`, `wide`, `other`: tokens for a punctuation mark, for a
    character of CJK scripts or an emoji, for any other one; `call`: tokens that every message costs beside its text.
    """

    name: str
    letters: float
    signs: float
    wide: float
    other: float
    call: int


FAMILIES = (
    (re.compile(r"claude"), Family("claude", 4.6, 0.75, 1.2, 0.6, 8)),
    (re.compile(r"gpt|chatgpt|o\d|codex|text-"), Family("gpt", 5.6, 0.65, 0.9, 0.45, 4)),
)
DEFAULT_FAMILY = Family("other", 4.6, 0.75, 1.2, 0.6, 8)


def family_of(model: str) -> Family:
    """Return the family of a model, by its name."""
    return next((family for pattern, family in FAMILIES if pattern.match(model)), DEFAULT_FAMILY)


def count(text: str, model: str) -> float:
    """Return about how many tokens a text is, before any correction."""
    family = family_of(model)
    if not text:
        return 0.0
    words = sum(math.ceil(len(word) / family.letters) for word in _WORDS.findall(text))
    digits = sum(math.ceil(len(run) / 3) for run in _DIGITS.findall(text))
    # A single space belongs to the following word; line ends and indents are one token each.
    spaces = sum(1 for run in _SPACES.findall(text) if run != " ")
    signs = len(_SIGNS.findall(text)) * family.signs
    if text.isascii():
        return words + digits + spaces + signs
    wide = len(_WIDE.findall(text))
    other = sum(1 for character in text if ord(character) > 127) - wide
    return words + digits + spaces + signs + wide * family.wide + other * family.other


def count_call(model: str, *, system: str | None, messages: Sequence[str], schema: Mapping[str, Any] | None) -> float:
    """Return about how many input tokens a call has, before any correction."""
    family = family_of(model)
    total = family.call + sum(count(text, model) + family.call for text in messages)
    if system:
        total += count(system, model)
    if schema is not None:
        total += count(json.dumps(schema, ensure_ascii=False, separators=(",", ":")), model)
    return total


@dataclass(frozen=True, slots=True)
class Ratio:
    """Observations of a model: sums of ln(real / estimated) and of its square over `calls` calls."""

    calls: int = 0
    log_sum: float = 0.0
    log_square: float = 0.0

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.calls + other.calls, self.log_sum + other.log_sum, self.log_square + other.log_square)

    @property
    def factor(self) -> float:
        """The factor for estimates: 1 without observations; few observations have less weight."""
        return math.exp(self.log_sum / (self.calls + _PRIOR_CALLS)) if self.calls else 1.0

    @property
    def error(self) -> float:
        """The relative error of a corrected estimate, one standard deviation; UNSEEN_ERROR without observations."""
        if not self.calls:
            return UNSEEN_ERROR
        mean = self.log_sum / self.calls
        spread = max(0.0, self.log_square / self.calls - mean**2)
        prior = _PRIOR_CALLS * UNSEEN_ERROR**2
        return math.sqrt((self.calls * spread + prior) / (self.calls + _PRIOR_CALLS))


@dataclass(frozen=True, slots=True)
class TokenCount:
    """An estimate.  `error` is relative, one standard deviation; `calls` is the number of past calls behind it."""

    tokens: int
    error: float
    calls: int


class TokenEstimator:
    """Estimates input tokens, corrected per (provider, model).  `unseen`: the factor without observations."""

    def __init__(self, ratios: Mapping[tuple[str, str], Ratio] | None = None, *, unseen: float = 1.0) -> None:
        self._ratios = dict(ratios or {})
        self._unseen = unseen

    def ratio(self, provider: str, model: str) -> Ratio:
        """Return the observations of a model; if it was never called, those of its family at the same provider."""
        known = self._ratios.get((provider, model))
        if known is not None:
            return known
        family = family_of(model)
        similar = [
            ratio for (other, name), ratio in self._ratios.items() if other == provider and family_of(name) is family
        ]
        joined = sum(similar, Ratio())
        if not joined.calls:
            return joined
        # The family gives an estimate of the ratio, with the confidence of two calls of the model itself.
        share = min(1.0, _PRIOR_CALLS / joined.calls)
        return Ratio(min(joined.calls, _PRIOR_CALLS), joined.log_sum * share, joined.log_square * share)

    def estimate(self, provider: str, model: str, text: str) -> TokenCount:
        """Return the tokens of a text."""
        return self._corrected(provider, model, count(text, model))

    def estimate_call(
        self,
        provider: str,
        model: str,
        *,
        system: str | None = None,
        messages: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
    ) -> TokenCount:
        """Return the input tokens of a call."""
        return self._corrected(provider, model, count_call(model, system=system, messages=messages, schema=schema))

    def _corrected(self, provider: str, model: str, tokens: float) -> TokenCount:
        ratio = self.ratio(provider, model)
        factor = ratio.factor if ratio.calls else self._unseen
        return TokenCount(math.ceil(tokens * factor), ratio.error, ratio.calls)

    def describe(self) -> list[dict[str, Any]]:
        """Return the observations of each model: `{provider, model, family, calls, ratio, error}`."""
        return [
            {
                "provider": provider,
                "model": model,
                "family": family_of(model).name,
                "calls": ratio.calls,
                "ratio": round(ratio.factor, 4),
                "error": round(ratio.error, 4),
            }
            for (provider, model), ratio in sorted(self._ratios.items())
        ]


@dataclass(slots=True)
class Calibration:
    """Collects observations of calls and stores them in batches; thread-safe.

    `store` gets (provider, model) → Ratio of the observations since the last batch: after `every` calls, or with the
    first call that comes `seconds` after the batch began.
    """

    store: Callable[[Mapping[tuple[str, str], Ratio]], None]
    every: int = FLUSH_CALLS
    seconds: float = FLUSH_SECONDS
    clock: Callable[[], float] = time.monotonic
    _seen: dict[tuple[str, str], Ratio] = field(default_factory=dict)
    _count: int = 0
    _since: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, provider: str, model: str, estimated: float, usage: Usage | None) -> None:
        """Note a call: what was estimated without correction, and what the provider counted (None: it did not)."""
        if usage is None or estimated <= 0 or usage.input_tokens <= 0:
            return
        ratio = usage.input_tokens / estimated
        if not _LOW <= ratio <= _HIGH:
            return
        log = math.log(ratio)
        with self._lock:
            key = (provider, model)
            self._seen[key] = self._seen.get(key, Ratio()) + Ratio(1, log, log * log)
            self._count += 1
            now = self.clock()
            if self._since is None:
                self._since = now
            full = self._count >= self.every or now - self._since >= self.seconds
        if full:
            self.flush()

    def flush(self) -> None:
        """Store the collected observations."""
        with self._lock:
            seen, self._seen, self._count, self._since = self._seen, {}, 0, None
        if seen:
            self.store(seen)
