"""One agent step's conversation with a model: the call, the validation of its reply, and at most two repair rounds.

It knows no SDK: the provider is a port.  Every call produces one CallRecord for the ledger, whatever its outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gorgon_common import errors, strict_json
from gorgon_common.clock import SYSTEM_CLOCK, Clock
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.ports import AgentCall, AgentProvider, AgentReply, Message, Pricer
from gorgon_common.lazy import load
from gorgon_common.logs import get_logger

MAX_REPLY_BYTES = 10 * 1024**2
"""Longer replies are an error (UTF-8 bytes)."""

_SHOWN_VIOLATIONS = 20
_SHOWN_CHARACTERS = 300
_PROBE = Usage(input_tokens=1_000_000, output_tokens=1_000_000)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AgentResult:
    """The result of a successful conversation.

    `data` is the validated reply if the call had a schema.  `usage` and `cost_micro` are sums over `calls`;
    `cost_micro` is None if any cost is unknown.
    """

    text: str
    data: Any
    model: str
    usage: Usage
    cost_micro: int | None
    calls: tuple[CallRecord, ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Earlier:
    """The state of a conversation before its repair round `rounds` (from 1): the last reply and its violations."""

    rounds: int
    text: str
    violations: tuple[str, ...]


@dataclass(slots=True)
class _Conversation:
    """What stays constant between rounds, and the records so far."""

    provider: AgentProvider
    provider_name: str
    call: AgentCall
    pricer: Pricer
    cancelled: Callable[[], bool]
    on_call: Callable[[CallRecord], None]
    clock: Clock
    reserve: Callable[[AgentCall, int], tuple[AgentCall, bool]] | None = None
    over: Callable[[int], bool] | None = None
    records: list[CallRecord] = field(default_factory=list)
    held: bool = False
    """Budgets hold a reservation for the current call."""

    def ask(self, call: AgentCall) -> tuple[AgentReply, list[str]]:
        """Make one call; return its reply and the violations as sentences.  Records the call before raising."""
        if self.reserve is not None:
            call, self.held = self.reserve(call, len(self.records) + 1)
        started = self.clock.monotonic()
        reply = self._made(call, started)
        try:
            reply, unusable, violations = _judged(call, reply)
        except Exception as error:
            log.exception("a reply could not be judged", step=call.label, model=reply.model)
            unusable, violations = errors.Internal.of(error), []
        outcome = "invalid" if violations else "ok"
        if unusable:
            known = isinstance(unusable, (errors.Refused, errors.Internal))
            outcome = unusable.kind if known else "invalid"
        self._record(reply.usage, started, outcome, reply.model, reply.request_id, reply.service_tier)
        if unusable:
            raise unusable
        return reply, violations

    def _made(self, call: AgentCall, started: float) -> AgentReply:
        """Make a call.  If it fails, record it before the error propagates."""
        try:
            try:
                return self.provider.call(call, self.cancelled)
            finally:
                if self.over is not None:
                    self.held = self.over(len(self.records) + 1) or self.held
        except errors.ProviderError as error:
            model = error.model or call.model
            self._record(error.usage, started, error.kind, model, error.request_id, error.service_tier)
            raise
        except errors.Cancelled as error:
            if error.made:
                self._record(None, started, "cancelled", call.model)
            raise
        except errors.OutputTooLarge:
            self._record(None, started, "invalid", call.model)
            raise
        except errors.GorgonError:
            raise  # no call was made, because no capacity was available
        except Exception as error:
            log.exception("a call to a model broke", step=call.label, model=call.model)
            self._record(None, started, errors.Internal.kind, call.model)
            raise errors.Internal.of(error) from error

    def _record(
        self,
        usage: Usage | None,
        started: float,
        outcome: str,
        model: str,
        request_id: str | None = None,
        service_tier: str | None = None,
    ) -> None:
        record = CallRecord(
            provider=self.provider_name,
            model=model,
            role=self.call.role,
            ordinal=len(self.records) + 1,
            usage=usage or Usage(),
            cost_micro=self._cost(usage, model, service_tier),
            price_version=self.pricer.version,
            latency_ms=round((self.clock.monotonic() - started) * 1000),
            outcome=outcome,
            request_id=request_id,
            service_tier=service_tier,
            reserved=self.held,
            measured=usage is not None,
        )
        self.records.append(record)
        self.on_call(record)

    def _cost(self, usage: Usage | None, model: str, service_tier: str | None) -> int | None:
        if usage == Usage():
            return 0  # certainly nothing is charged

        def price(used: Usage) -> int | None:
            asked = self.call.model
            return self.pricer.price(self.provider_name, model, used, service_tier=service_tier, asked=asked)

        try:
            if usage is not None:
                return price(usage)
            return 0 if price(_PROBE) == 0 else None  # a free model costs nothing, whatever its usage
        except Exception:
            log.exception("a call could not be priced", step=self.call.label, model=model)
            return None


def converse(
    provider: AgentProvider,
    call: AgentCall,
    *,
    pricer: Pricer,
    provider_name: str,
    cancelled: Callable[[], bool],
    on_call: Callable[[CallRecord], None],
    repair_rounds: int = 2,
    clock: Clock = SYSTEM_CLOCK,
    reserve: Callable[[AgentCall, int], tuple[AgentCall, bool]] | None = None,
    over: Callable[[int], bool] | None = None,
    earlier: Earlier | None = None,
    keep: Callable[[Earlier], bool] | None = None,
) -> AgentResult:
    """Make the call; if the reply violates `call.schema`, report the violations to the model and ask again.

    A repair round repeats the call with the last reply and the list of violations appended to its messages.
    `call.timeout` (seconds) covers all rounds together.  `on_call` receives one record per call as soon as it ends,
    before any error is raised; the ledger needs nothing else.  `reserve` receives every call and its ordinal before it
    is made.  It returns the call as the budgets allow it, and whether they hold a reservation for it; an error it
    raises ends the conversation.  `over` receives the ordinal when the call has ended, before its record, and tells
    whether a reservation exists by then.

    `keep` receives the state of the conversation before each repair round, so that an interrupted conversation can
    resume there: passed as `earlier`, no call is repeated.  It returns whether the state was stored.

    Raises the provider's errors; Malformed (listing the violations) if the last reply still does not fit, or was cut
    off; Refused; OutputTooLarge over MAX_REPLY_BYTES; Cancelled.
    """
    conversation = _Conversation(provider, provider_name, call, pricer, cancelled, on_call, clock, reserve, over)
    deadline = clock.monotonic() + call.timeout
    rounds = 0 if earlier is None else earlier.rounds
    current = call
    if earlier is not None:
        current = replace(_repair(call, earlier.text, earlier.violations, call.timeout), resumable=True)
    while True:
        reply, violations = conversation.ask(current)
        if not violations:
            return _result(reply, conversation.records)
        if rounds >= repair_rounds:
            break
        rounds += 1
        kept = keep is not None and keep(Earlier(rounds, reply.text, tuple(violations)))
        current = replace(_repair(call, reply.text, violations, deadline - clock.monotonic()), resumable=kept)
    listed = "\n".join(f"- {violation}" for violation in violations)
    asked = f" after {repair_rounds} rounds of repair" if repair_rounds else ""
    raise errors.Malformed(
        f"The reply of {call.model} does not fit the output schema{asked}:\n{listed}",
        hint="Make the schema simpler or its descriptions clearer, or use a stronger model.",
    )


def judge(schema: Mapping[str, Any], reply: AgentReply) -> tuple[Any, list[str]]:
    """Return the reply's data and its schema violations, one sentence each, at most 20; none if it fits the schema.

    Validates `reply.data`, or the text if the adapter could not parse it.  Raises Final if the schema itself is
    invalid.
    """
    data = reply.data
    if data is None:
        try:
            data = strict_json.loads(reply.text)
        except ValueError as error:
            return None, [f"the reply is not JSON: {error}"]
    return data, misfits(schema, data)


def misfits(schema: Mapping[str, Any], data: Any) -> list[str]:
    """Return the schema violations of data, one sentence each, at most 20.  Raises Final if the schema is invalid."""
    try:
        found = sorted(_validator(schema).iter_errors(data), key=lambda error: list(map(str, error.absolute_path)))
    except RecursionError:
        return ["the reply is nested too deeply for its schema"]
    except load("referencing.exceptions:Unresolvable") as error:
        raise errors.Final(
            f"The output schema refers to {error.ref!r}, which is not in it.",
            hint="Put it under `$defs` and refer to it as `#/$defs/name`.",
        ) from None
    sentences = list(dict.fromkeys(_sentence(error) for error in found))
    if len(sentences) > _SHOWN_VIOLATIONS:
        sentences[_SHOWN_VIOLATIONS:] = [f"… and {len(sentences) - _SHOWN_VIOLATIONS} more"]
    return sentences


def _validator(schema: Mapping[str, Any]) -> Any:
    kind = load("jsonschema.validators:validator_for")(schema, default=load("jsonschema:Draft202012Validator"))
    # Without an explicit registry, the library would fetch remote references over the network.
    return kind(schema, registry=load("referencing:Registry")())


def _sentence(error: Any) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    message = str(error.message)
    if len(message) > _SHOWN_CHARACTERS:
        # jsonschema puts the entire offending value first.
        half = _SHOWN_CHARACTERS // 2
        message = f"{message[:half]} … {message[-half:]}"
    return f"{where or 'the reply'}: {message}"


def _repair(call: AgentCall, text: str, violations: Sequence[str], remaining: float) -> AgentCall:
    if remaining <= 0:
        raise errors.Retryable(
            f"{call.model} gave a reply that does not fit its schema, and no time is left to repair it.",
            kind="timeout",
            hint="Give the step a longer `timeout:`.",
        )
    listed = "\n".join(f"- {violation}" for violation in violations)
    complaint = (
        f"Your reply does not fit the JSON Schema that was asked for:\n{listed}\n\n"
        "Answer again with the complete corrected JSON and nothing else."
    )
    # The API rejects an empty turn.
    earlier = Message("assistant", text.strip() or "(empty)")
    return replace(call, messages=(*call.messages, earlier, Message("user", complaint)), timeout=remaining)


def _judged(call: AgentCall, reply: AgentReply) -> tuple[AgentReply, errors.StepError | None, list[str]]:
    """Return the reply with its data, the error if it is unusable, and its schema violations."""
    unusable = _unusable(reply, call)
    if unusable is not None or call.schema is None:
        return reply, unusable, []
    try:
        data, violations = judge(call.schema, reply)
    except errors.Final as error:
        return reply, error, []
    return replace(reply, data=data), None, violations


def _unusable(reply: AgentReply, call: AgentCall) -> errors.StepError | None:
    """Return the error for a reply that is too large, empty, refused or incomplete; None for a complete one."""
    size = len(reply.text.encode(errors="replace"))
    if size > MAX_REPLY_BYTES:
        return errors.OutputTooLarge(
            f"The reply of {reply.model} has {size / 1024**2:.1f} MB; the limit is {MAX_REPLY_BYTES // 1024**2} MB.",
            hint="Lower `max_tokens:`, or ask for less.",
        )
    if reply.stop_reason == "refusal":
        return errors.Refused(
            f"{reply.model} declined to answer: {reply.text[:_SHOWN_CHARACTERS]}", hint="Change the prompt."
        )
    if reply.stop_reason == "max_tokens":
        return errors.Malformed(
            f"The reply of {reply.model} was cut off at max_tokens={call.max_tokens}.",
            hint="Raise `max_tokens:` (reasoning counts too), lower `effort:`, or ask for a shorter answer.",
        )
    if reply.stop_reason == "context":
        return errors.Malformed(
            f"The reply of {reply.model} was cut off because its context window is full.",
            hint="Shorten the prompt, or use a model with a larger context window.",
        )
    if reply.stop_reason == "pause":
        return errors.Malformed(f"{reply.model} paused in the middle of its reply.", hint="Run the step again.")
    if reply.stop_reason != "end":
        return errors.Malformed(
            f"The reply of {reply.model} is not known to be whole: the server ended it with {reply.stop_reason!r}.",
            hint="Only a reply that ends regularly is used. See the documentation of the server for the word.",
        )
    if call.schema is None and not reply.text.strip():
        return errors.Malformed(
            f"The reply of {reply.model} is empty.",
            hint="Run the step again, raise `max_tokens:` (reasoning counts too), or ask more clearly.",
        )
    return None


def _result(reply: AgentReply, records: list[CallRecord]) -> AgentResult:
    usage = Usage()
    cost: int | None = 0
    for record in records:
        usage += record.usage
        cost = None if cost is None or record.cost_micro is None else cost + record.cost_micro
    return AgentResult(reply.text, reply.data, reply.model, usage, cost, tuple(records))
