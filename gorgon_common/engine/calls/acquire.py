"""The acquire link: the limiter says when a call may be made.

A wait of up to a few hundred milliseconds is slept here.  A longer wait raises Throttled: the step gives up its slot
and is tried again later.  If that would lose something already paid for (another model's reply, a conversation that is
not stored), the call waits here instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gorgon_common import telemetry
from gorgon_common.clock import SYSTEM_CLOCK, Clock
from gorgon_common.engine import limits
from gorgon_common.engine.calls.estimates import Estimates
from gorgon_common.engine.calls.leases import Leases
from gorgon_common.engine.calls.outside import OutsideCall
from gorgon_common.engine.calls.sleep_slots import SleepSlots
from gorgon_common.engine.limits import Answer, Ask, Grant, Limiter, LimitKey, Never, Settlement, Wait
from gorgon_common.engine.ports import AgentReply
from gorgon_common.errors import Cancelled, OverLimit, Throttled
from gorgon_common.ids import new_id

IN_PLACE = 0.5
"""Waits up to this many seconds are slept in the slot."""
CROWD = 0.35
"""A step without a place to sleep waits at least this long elsewhere (seconds); a shorter wait would keep its slot."""
SLICE = 0.25
"""Seconds between two checks of `cancelled()`."""


@dataclass(frozen=True, slots=True)
class Permit:
    """A grant for a call.  `estimated`: its input tokens by the uncorrected estimate."""

    grant: Grant
    estimated: float


@dataclass(slots=True, kw_only=True)
class CallLimits:
    """How the calls of a process pass the limiter.

    `accounts`: provider → the account of its key.  `weight(team)`: the team's share relative to other teams'.
    `settlement(provider, ending)` translates a reply, or the error of a failed call, for the limiter.
    """

    limiter: Limiter
    target: str
    accounts: Mapping[str, str]
    weight: Callable[[str], float]
    settlement: Callable[[str, AgentReply | BaseException], Settlement]
    estimates: Estimates = field(default_factory=Estimates)
    sleepers: SleepSlots = field(default_factory=lambda: SleepSlots(1000))
    clock: Clock = SYSTEM_CLOCK
    sleep: Callable[[float], None] = time.sleep
    leases: Leases = field(init=False)
    _blocked: set[LimitKey] = field(default_factory=set)
    """Gates whose breaker was open at this process's last request."""

    def __post_init__(self) -> None:
        self.leases = Leases(self.limiter)

    def acquire(self, call: OutsideCall, until: float | None) -> Permit:
        """Return a permit, which must be settled.  Waits until the monotonic time `until`, or IN_PLACE if it is None.

        Raises Throttled if that takes longer, OverLimit if it will never be possible, Cancelled.
        """
        plain, estimate = self.estimates.of(call.provider, call.request)
        ask = self._ask(call, estimate)
        patient = until is not None
        ends = self.clock.monotonic() + IN_PLACE if until is None else until
        while True:
            if call.cancelled():
                raise Cancelled(made=False)
            answer = self.limiter.acquire(ask)
            self._report(ask, answer)
            match answer:
                case Grant():
                    self.leases.add(answer)
                    return Permit(answer, plain)
                case Never():
                    raise OverLimit(
                        f"This call to {ask.gate.model} can never be made: {answer.why}.",
                        hint="Ask for less (a shorter prompt, a lower `max_tokens:`), use another model, or raise the "
                        "limit: gorgon limits set.",
                    )
                case Wait():
                    self._wait(call, ask, answer, ends, patient=patient)

    def close(self) -> None:
        """Release the leases and the limiter."""
        self.leases.close()
        self.limiter.close()

    def _ask(self, call: OutsideCall, tokens: int) -> Ask:
        request = call.request
        account = self.accounts.get(call.provider, "default")
        return Ask(
            id=new_id("call"),
            gate=LimitKey(self.target, call.provider, account, request.model),
            tokens_in=tokens,
            tokens_out=request.max_tokens,
            team=request.team,
            weight=self.weight(request.team),
            ticket=request.ticket,
        )

    def _wait(self, call: OutsideCall, ask: Ask, wait: Wait, until: float, *, patient: bool) -> None:
        """Sleep until the call may be made, or raise Throttled."""
        if self.clock.monotonic() + wait.seconds > until:
            raise _throttled(ask, wait, wait.seconds)
        if patient:
            self._rest(wait.seconds, call.cancelled)
            return
        with self.sleepers.one(ask.team) as place:
            if not place:
                raise _throttled(ask, wait, max(wait.seconds, CROWD))
            self._rest(wait.seconds, call.cancelled)

    def _rest(self, seconds: float, cancelled: Callable[[], bool]) -> None:
        ends = self.clock.monotonic() + seconds
        while (left := ends - self.clock.monotonic()) > 0:
            if cancelled():
                raise Cancelled(made=False)
            self.sleep(min(left, SLICE))

    def _report(self, ask: Ask, answer: Answer) -> None:
        """Emit the limiter's answer for this call, and changes of the model's breaker."""
        gate = ask.gate
        where = (gate.provider, gate.model, gate.target)
        match answer:
            case Grant():
                if gate in self._blocked:
                    self._blocked.discard(gate)
                    telemetry.emit(telemetry.BreakerChanged(*where, open=False))
                telemetry.emit(telemetry.CallSent(*where, ask.team))
            case Wait(seconds, why, _):
                if why == limits.BREAKER and gate not in self._blocked:
                    self._blocked.add(gate)
                    telemetry.emit(telemetry.BreakerChanged(*where, open=True, seconds=seconds))
                telemetry.emit(telemetry.CallRefused(*where, ask.team, why, seconds))
            case Never():
                telemetry.emit(telemetry.CallRefused(*where, ask.team, "over_limit", None))


def _throttled(ask: Ask, wait: Wait, seconds: float) -> Throttled:
    return Throttled(reason_of(ask.gate, wait), seconds=seconds, reason=wait.why, until=wait.until)


def reason_of(gate: LimitKey, wait: Wait) -> str:
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
