"""Estimates a call's input tokens, once: the limiter reserves them, and later estimates learn from the real count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from gorgon_common.costs.tokens import Calibration, Ratio, TokenEstimator, count_call
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.ports import AgentCall
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger

log = get_logger(__name__)


class Estimates:
    """Estimates of input tokens: a count of characters, corrected by past calls and this process's replies;
    thread-safe.

    `known` returns the ratios of past calls.  It is called once, before the first estimate.  `unseen`: the factor for
    models without any data.  `calibration` stores what calls show, for other processes and for plans.
    """

    def __init__(
        self,
        known: Callable[[], Mapping[tuple[str, str], Ratio]] = dict,
        *,
        unseen: float = 1.0,
        calibration: Calibration | None = None,
    ) -> None:
        self._calibration = calibration
        self._known = known
        self._unseen = unseen
        self._past: TokenEstimator | None = None
        self._factors: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def of(self, provider: str, call: AgentCall) -> tuple[float, int]:
        """Return (the uncorrected count, the corrected estimate)."""
        plain = count_call(
            call.model, system=call.system, messages=[turn.content for turn in call.messages], schema=call.schema
        )
        factor = self._factor(provider, call.model)
        return plain, round(plain * (self._unseen if factor is None else factor))

    def learn(self, provider: str, model: str, plain: float, usage: Usage | None) -> None:
        """Learn from a call's actual usage; None (unknown) changes nothing."""
        if self._calibration is not None:
            self._calibration.observe(provider, model, plain, usage)
        if usage is None or plain <= 0 or usage.input_tokens <= 0:
            return
        ratio = min(8.0, max(1 / 8, usage.input_tokens / plain))
        known = self._factor(provider, model)
        self._factors[(provider, model)] = ratio if known is None else 0.8 * known + 0.2 * ratio

    def _factor(self, provider: str, model: str) -> float | None:
        """Return the correction factor, or None if there is no data."""
        found = self._factors.get((provider, model))
        if found is not None:
            return found
        seen = self._begun().ratio(provider, model)
        return seen.factor if seen.calls else None

    def _begun(self) -> TokenEstimator:
        with self._lock:
            if self._past is None:
                try:
                    self._past = TokenEstimator(self._known())
                except GorgonError as error:
                    self._past = TokenEstimator()
                    log.warning("token estimates begin without what past calls have shown", error=error.message)
            return self._past
