"""The record link: every call that may have been made leaves a record for the ledger, whatever its outcome."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from gorgon_common import errors
from gorgon_common.clock import Clock
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.calls.outside import OutsideCall
from gorgon_common.engine.ports import AgentReply, Pricer
from gorgon_common.logs import get_logger

_PROBE = Usage(input_tokens=1_000_000, output_tokens=1_000_000)

log = get_logger(__name__)


class Recorder:
    """Prices the calls of a conversation and passes their records to `on_call` as soon as they end."""

    def __init__(self, pricer: Pricer, clock: Clock, on_call: Callable[[CallRecord], None]) -> None:
        self._pricer = pricer
        self._clock = clock
        self._on_call = on_call
        self.records: list[CallRecord] = []

    def failures(self, call: OutsideCall) -> RecordedFailures:
        """Return a context in which a call is made: if it fails, it is recorded before the error propagates."""
        return RecordedFailures(self, call)

    def reply(self, call: OutsideCall, reply: AgentReply, unusable: errors.StepError | None, invalid: bool) -> None:
        """Record a call that was answered.  `invalid`: the reply does not fit its schema."""
        outcome = "invalid" if invalid else "ok"
        if unusable is not None:
            known = isinstance(unusable, (errors.Refused, errors.Internal))
            outcome = unusable.kind if known else "invalid"
        self._record(call, reply.usage, outcome, reply.model, reply.request_id, reply.service_tier)

    def failure(self, call: OutsideCall, error: Exception) -> Exception:
        """Record a failed call if it may have been made; return the error to raise."""
        asked = call.request.model
        match error:
            case errors.ProviderError():
                model = error.model or asked
                self._record(call, error.usage, error.kind, model, error.request_id, error.service_tier)
            case errors.Cancelled():
                if error.made:
                    self._record(call, None, "cancelled", asked)
            case errors.OutputTooLarge():
                self._record(call, None, "invalid", asked)
            case errors.GorgonError():
                pass  # no call was made, because no capacity was available
            case _:
                log.error("a call to a model broke", exc_info=error, step=call.request.label, model=asked)
                self._record(call, None, errors.Internal.kind, asked)
                return errors.Internal.of(error)
        return error

    def _record(
        self,
        call: OutsideCall,
        usage: Usage | None,
        outcome: str,
        model: str,
        request_id: str | None = None,
        service_tier: str | None = None,
    ) -> None:
        record = CallRecord(
            provider=call.provider,
            model=model,
            role=call.request.role,
            ordinal=call.ordinal,
            usage=usage or Usage(),
            cost_micro=self._cost(call, usage, model, service_tier),
            price_version=self._pricer.version,
            latency_ms=round((self._clock.monotonic() - call.began) * 1000),
            outcome=outcome,
            request_id=request_id,
            service_tier=service_tier,
            reserved=call.held,
            measured=usage is not None,
        )
        self.records.append(record)
        self._on_call(record)

    def _cost(self, call: OutsideCall, usage: Usage | None, model: str, service_tier: str | None) -> int | None:
        if usage == Usage():
            return 0  # certainly nothing is charged

        def price(used: Usage) -> int | None:
            asked = call.request.model
            return self._pricer.price(call.provider, model, used, service_tier=service_tier, asked=asked)

        try:
            if usage is not None:
                return price(usage)
            return 0 if price(_PROBE) == 0 else None  # a free model costs nothing, whatever its usage
        except Exception:
            log.exception("a call could not be priced", step=call.request.label, model=model)
            return None


class RecordedFailures:
    """See `Recorder.failures`."""

    __slots__ = ("_call", "_recorder")

    def __init__(self, recorder: Recorder, call: OutsideCall) -> None:
        self._recorder = recorder
        self._call = call

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            raised = self._recorder.failure(self._call, error)
            if raised is not error:
                raise raised from error
