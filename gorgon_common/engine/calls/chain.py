"""The chain that every call to the outside passes, as one paragraph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gorgon_common import errors
from gorgon_common.clock import SYSTEM_CLOCK, Clock
from gorgon_common.engine.calls.acquire import CallLimits
from gorgon_common.engine.calls.intent import NO_EFFECTS, EffectLedger
from gorgon_common.engine.calls.outside import OutsideCall
from gorgon_common.engine.calls.record import Recorder
from gorgon_common.engine.calls.reserve import Money, NoMoney, reserve
from gorgon_common.engine.calls.send import send
from gorgon_common.engine.calls.settle import Settling
from gorgon_common.engine.ports import AgentCall, AgentProvider, AgentReply
from gorgon_common.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reply is worth: the reply with its data, why it cannot be used at all, and how it misses its schema."""

    reply: AgentReply
    unusable: errors.StepError | None = None
    violations: tuple[str, ...] = ()


Judge = Callable[[AgentCall, AgentReply], Verdict]


class CallChain:
    """Makes the calls of one conversation with one provider.

    `before`: how many calls this claim has made already; ordinals count on from there.  `limits`: None without a
    limiter.
    """

    def __init__(
        self,
        provider: AgentProvider,
        recorder: Recorder,
        *,
        name: str,
        cancelled: Callable[[], bool],
        money: Money | None = None,
        limits: CallLimits | None = None,
        effects: EffectLedger = NO_EFFECTS,
        before: int = 0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.recorder = recorder
        self.clock = clock
        self._provider = provider
        self._name = name
        self._cancelled = cancelled
        self._money = money or NoMoney()
        self._limits = limits
        self._effects = effects
        self._ordinal = before

    def make(self, request: AgentCall, judge: Judge) -> Verdict:
        """Make one call and judge its reply.  Every call that may have been made is recorded before this ends.

        Raises what `reserve`, `acquire` and the provider raise, and the reason why a reply cannot be used.
        """
        call = self._prepared(request)
        self._effects.intend(call.ordinal, call.request)
        in_flight = reserve(self._money, call)
        call.began = self.clock.monotonic()
        with self.recorder.failures(call), in_flight:
            reply = self._sent(call)
        verdict = self._judged(judge, call.request, reply)
        self.recorder.reply(call, reply, verdict.unusable, bool(verdict.violations))
        self._effects.confirm(call.ordinal, reply)
        if verdict.unusable is not None:
            raise verdict.unusable
        return verdict

    def _prepared(self, request: AgentCall) -> OutsideCall:
        self._ordinal += 1
        return OutsideCall(self._name, self._ordinal, request, self.clock.monotonic(), self._cancelled)

    def _sent(self, call: OutsideCall) -> AgentReply:
        """Acquire, send and settle; again after a refusal, if something already paid for would be lost otherwise."""
        limits, request = self._limits, call.request
        if limits is None:
            return send(self._provider, call, request.timeout)
        clock = limits.clock
        ends = clock.monotonic() + request.timeout
        patient = request.patient or (len(request.messages) > 1 and not request.resumable)
        while True:
            permit = limits.acquire(call, ends if patient else None)
            try:
                with Settling(limits, permit) as settling:
                    return settling.replied(send(self._provider, call, ends - clock.monotonic()))
            except errors.RateLimited:
                if not patient or clock.monotonic() >= ends:
                    raise

    @staticmethod
    def _judged(judge: Judge, request: AgentCall, reply: AgentReply) -> Verdict:
        try:
            return judge(request, reply)
        except Exception as error:
            log.exception("a reply could not be judged", step=request.label, model=reply.model)
            return Verdict(reply, errors.Internal.of(error))
