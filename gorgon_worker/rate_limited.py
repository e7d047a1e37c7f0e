"""Sends every call to a model through the limiter: acquire → call → settle with the actual usage.

A wait of up to a few hundred milliseconds is slept here.  A longer wait raises Throttled: the step gives up its slot
and is tried again later.  If that would lose something already paid for (another model's reply, a conversation that is
not stored), the call waits here instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from gorgon_common import telemetry
from gorgon_common.clock import SYSTEM_CLOCK, Clock
from gorgon_common.costs.tokens import Ratio, TokenEstimator, count_call
from gorgon_common.costs.usage import Usage
from gorgon_common.engine import limits
from gorgon_common.engine.limits import Answer, Ask, Grant, Limiter, LimitKey, Never, Settlement, Wait
from gorgon_common.engine.ports import AgentCall, AgentProvider, AgentReply
from gorgon_common.errors import (
    Cancelled,
    GorgonError,
    OverLimit,
    ProviderError,
    RateLimited,
    Retryable,
    Throttled,
)
from gorgon_common.ids import new_id
from gorgon_common.logs import get_logger
from gorgon_common.ratelimit.costs import used
from gorgon_common.ratelimit.headers import signals
from gorgon_worker.providers.failures import retry_after

IN_PLACE = 0.5
"""Waits up to this many seconds are slept in the slot."""
CROWD = 0.35
"""A step without a place to sleep waits at least this long elsewhere (seconds); a shorter wait would keep its slot."""
SLICE = 0.25
"""Seconds between two checks of `cancelled()`."""
BEAT = 15.0
"""Seconds between two extensions of the leases of calls in flight."""

log = get_logger(__name__)


class Leases:
    """The calls in flight in this process; their leases are extended while the process is alive."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._held: dict[str, Grant] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, grant: Grant) -> None:
        """Keep a call's lease alive."""
        with self._lock:
            self._held[grant.id] = grant
            if self._thread is None:
                self._thread = threading.Thread(target=self._forever, name="gorgon-leases", daemon=True)
                self._thread.start()

    def drop(self, grant: Grant) -> None:
        """Stop extending the lease of a finished call."""
        with self._lock:
            self._held.pop(grant.id, None)

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()

    def extend(self) -> None:
        """Extend the leases of all calls in flight.  A failure is retried at the next interval."""
        with self._lock:
            held = list(self._held.values())
        try:
            if held:
                self._limiter.extend(held)
        except GorgonError as error:
            log.warning("leases were not extended", error=error.message)

    def _forever(self) -> None:
        while not self._stop.wait(BEAT):
            self.extend()


class Estimates:
    """Estimates of input tokens: a count of characters, corrected by past calls and this process's replies;
    thread-safe.

    `known` returns the ratios of past calls.  It is called once, before the first estimate.  `unseen`: the factor for
    models without any data.
    """

    def __init__(self, known: Callable[[], Mapping[tuple[str, str], Ratio]] = dict, *, unseen: float = 1.0) -> None:
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


class SleepSlots:
    """Limits how many calls may sleep in their slots, because too many sleepers would keep others from starting.
    Thread-safe.

    At most `most` per team, and `most` + `spare` in total, so that a busy team leaves room for a quiet one.
    """

    def __init__(self, most: int, spare: int = 0) -> None:
        self._most = most
        self._all = most + spare
        self._teams: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self, team: str) -> Iterator[bool]:
        """Reserve a place to sleep until the end of the block; yields whether there is one."""
        with self._lock:
            mine = self._teams.get(team, 0)
            free = mine < self._most and sum(self._teams.values()) < self._all
            if free:
                self._teams[team] = mine + 1
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._teams[team] -= 1


class RateLimitedProvider:
    """An `AgentProvider` that asks the limiter before each call."""

    def __init__(
        self,
        inner: AgentProvider,
        limiter: Limiter,
        leases: Leases,
        *,
        target: str,
        account: str,
        weight: Callable[[str], float],
        estimates: Estimates,
        beds: SleepSlots | None = None,
        clock: Clock = SYSTEM_CLOCK,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._limiter = limiter
        self._leases = leases
        self._target = target
        self._account = account
        self._weight = weight
        self._estimates = estimates
        self._beds = beds or SleepSlots(1000)
        self._clock = clock
        self._sleep = sleep
        self._open: set[str] = set()
        """Models whose breaker was open at this worker's last request."""

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        """Make the call when there is capacity; see `ports.AgentProvider`.

        Raises Throttled if that takes longer than IN_PLACE, OverLimit if it will never be possible.
        """
        patient = call.patient or (len(call.messages) > 1 and not call.resumable)
        ends = self._clock.monotonic() + call.timeout
        while True:
            plain, estimate = self._estimates.of(self.name, call)
            ask = Ask(
                id=new_id("call"),
                gate=LimitKey(self._target, self.name, self._account, call.model),
                tokens_in=estimate,
                tokens_out=call.max_tokens,
                team=call.team,
                weight=self._weight(call.team),
                ticket=call.ticket,
            )
            until = ends if patient else self._clock.monotonic() + IN_PLACE
            grant = self._enter(ask, until, cancelled, patient=patient)
            left = ends - self._clock.monotonic()
            try:
                return self._made(grant, replace(call, timeout=max(0.001, left)), plain, cancelled)
            except RateLimited:
                if not patient or self._clock.monotonic() >= ends:
                    raise

    def close(self) -> None:
        """Release the connections."""
        self._inner.close()

    def _enter(self, ask: Ask, until: float, cancelled: Callable[[], bool], *, patient: bool) -> Grant:
        """Return a grant; sleeps until the monotonic time `until` at most."""
        while True:
            if cancelled():
                raise Cancelled(made=False)
            answer = self._limiter.acquire(ask)
            self._report(ask, answer)
            match answer:
                case Grant():
                    self._leases.add(answer)
                    return answer
                case Never():
                    raise OverLimit(
                        f"This call to {ask.gate.model} can never be made: {answer.why}.",
                        hint="Ask for less (a shorter prompt, a lower `max_tokens:`), use another model, or raise the "
                        "limit: gorgon limits set.",
                    )
                case Wait():
                    if self._clock.monotonic() + answer.seconds > until:
                        raise _throttled(ask, answer, answer.seconds)
                    if patient:
                        self._rest(answer.seconds, cancelled)
                        continue
                    with self._beds.one(ask.team) as bed:
                        if not bed:
                            raise _throttled(ask, answer, max(answer.seconds, CROWD))
                        self._rest(answer.seconds, cancelled)

    def _report(self, ask: Ask, answer: Answer) -> None:
        """Emit the limiter's answer for this call, and changes of the model's breaker."""
        gate = ask.gate
        where = (gate.provider, gate.model, gate.target)
        match answer:
            case Grant():
                if gate.model in self._open:
                    self._open.discard(gate.model)
                    telemetry.emit(telemetry.BreakerChanged(*where, open=False))
                telemetry.emit(telemetry.CallSent(*where, ask.team))
            case Wait(seconds, why, _):
                if why == limits.BREAKER and gate.model not in self._open:
                    self._open.add(gate.model)
                    telemetry.emit(telemetry.BreakerChanged(*where, open=True, seconds=seconds))
                telemetry.emit(telemetry.CallRefused(*where, ask.team, why, seconds))
            case Never():
                telemetry.emit(telemetry.CallRefused(*where, ask.team, "over_limit", None))

    def _rest(self, seconds: float, cancelled: Callable[[], bool]) -> None:
        ends = self._clock.monotonic() + seconds
        while (left := ends - self._clock.monotonic()) > 0:
            if cancelled():
                raise Cancelled(made=False)
            self._sleep(min(left, SLICE))

    def _made(self, grant: Grant, call: AgentCall, plain: float, cancelled: Callable[[], bool]) -> AgentReply:
        settlement = Settlement(limits.NEUTRAL)
        try:
            reply = self._inner.call(call, cancelled)
            settlement = Settlement(limits.OK, _used(self.name, reply.usage), signals(self.name, reply.headers))
            self._estimates.learn(self.name, call.model, plain, reply.usage)
            return reply
        except ProviderError as error:
            settlement = after_error(self.name, error)
            raise
        finally:
            self._leases.drop(grant)
            try:
                self._limiter.settle(grant, settlement)
            except GorgonError as error:
                log.warning("a call was not settled with the limiter", error=error.message)


class RateLimitedProviders(Mapping[str, AgentProvider]):
    """Provider name → provider behind the limiter.

    `beds`: limits the calls that sleep in their slots.  `estimates`: estimates input tokens from past calls.
    """

    def __init__(
        self,
        inner: Mapping[str, AgentProvider],
        limiter: Limiter,
        *,
        target: str,
        accounts: Mapping[str, str],
        weight: Callable[[str], float],
        beds: SleepSlots | None = None,
        estimates: Estimates | None = None,
    ) -> None:
        self._inner = inner
        self._beds = beds or SleepSlots(1000)
        self._limiter = limiter
        self._leases = Leases(limiter)
        self._target = target
        self._accounts = accounts
        self._weight = weight
        self._estimates = estimates or Estimates()
        self._made: dict[str, RateLimitedProvider] = {}

    def __getitem__(self, name: str) -> AgentProvider:
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = RateLimitedProvider(
                self._inner[name],
                self._limiter,
                self._leases,
                target=self._target,
                account=self._accounts.get(name, "default"),
                weight=self._weight,
                estimates=self._estimates,
                beds=self._beds,
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def close(self) -> None:
        """Release the leases and the limiter."""
        self._leases.close()
        self._limiter.close()


def _throttled(ask: Ask, wait: Wait, seconds: float) -> Throttled:
    return Throttled(told(ask.gate, wait), seconds=seconds, reason=wait.why, until=wait.until)


def after_error(provider: str, error: ProviderError) -> Settlement:
    """Return the settlement of a failed call for the limiter."""
    outcome = limits.NEUTRAL
    wait: float | None = None
    if isinstance(error, RateLimited):
        outcome, wait = limits.RATE_LIMITED, error.retry_after
    elif isinstance(error, Retryable):
        overloaded = error.kind == "overloaded"
        outcome = limits.OVERLOADED if overloaded else limits.FAILED
        wait = retry_after(error.headers) if overloaded else None
    return Settlement(outcome, _used(provider, error.usage), signals(provider, error.headers), wait)


def _used(provider: str, usage: Usage | None) -> dict[str, float]:
    """Return a call's usage per dimension; if it is unknown, the reserved amount stays charged."""
    return {} if usage is None else used(provider, usage)


def told(gate: LimitKey, wait: Wait) -> str:
    """Return why a call waits, in words."""
    who = f"{gate.provider} {gate.model}"
    match wait.why:
        case limits.RETRY_AFTER:
            return f"{who}: the provider asked for a pause"
        case limits.BREAKER:
            return f"{who}: blocked, because most of the last calls failed"
        case limits.CONCURRENCY:
            return f"{who}: the maximum number of calls is in flight"
        case limits.TURN:
            return f"{who}: other calls come first"
        case limits.UNREACHABLE:
            return "the rate limiter cannot be reached"
    return f"{who}: no room under the rate limit for {wait.why.replace('_', ' ')}"
