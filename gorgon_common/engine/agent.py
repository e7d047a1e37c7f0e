"""One agent step's conversation with a model: the call, the validation of its reply, and at most two repair rounds.

It knows no SDK, no budget and no limiter: each call passes `calls.chain`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gorgon_common import errors, strict_json
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.calls.chain import CallChain, Verdict
from gorgon_common.engine.ports import AgentCall, AgentReply, Message
from gorgon_common.lazy import load

MAX_REPLY_BYTES = 10 * 1024**2
"""Longer replies are an error (UTF-8 bytes)."""

_SHOWN_VIOLATIONS = 20
_SHOWN_CHARACTERS = 300


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


class Memory(Protocol):
    """Where a conversation is stored between its rounds, so that nothing in it is paid for twice."""

    def earlier(self) -> Earlier | None:
        """Return where to resume; no call before that is repeated.  Raises Unavailable."""
        ...

    def keep(self, state: Earlier) -> bool:
        """Store the state of the conversation before a repair round; return whether it was stored."""
        ...


def converse(chain: CallChain, call: AgentCall, *, repair_rounds: int = 2, memory: Memory | None = None) -> AgentResult:
    """Make the call; if the reply violates `call.schema`, report the violations to the model and ask again.

    A repair round repeats the call with the last reply and the list of violations appended to its messages.
    `call.timeout` (seconds) covers all rounds together.  The chain records each call as soon as it ends, before any
    error is raised; the ledger needs nothing else.

    Raises what the chain raises; Malformed (listing the violations) if the last reply still does not fit, or was cut
    off; Refused; OutputTooLarge over MAX_REPLY_BYTES; Cancelled.
    """
    clock = chain.clock
    deadline = clock.monotonic() + call.timeout
    earlier = None if memory is None else memory.earlier()
    rounds = 0 if earlier is None else earlier.rounds
    current = call
    if earlier is not None:
        current = replace(_repair(call, earlier.text, earlier.violations, call.timeout), resumable=True)
    while True:
        verdict = chain.make(current, judged)
        reply, violations = verdict.reply, verdict.violations
        if not violations:
            return _result(reply, chain.recorder.records)
        if rounds >= repair_rounds:
            break
        rounds += 1
        kept = memory is not None and memory.keep(Earlier(rounds, reply.text, violations))
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


def judged(call: AgentCall, reply: AgentReply) -> Verdict:
    """Return the reply with its data, the error if it is unusable, and its schema violations."""
    unusable = _unusable(reply, call)
    if unusable is not None or call.schema is None:
        return Verdict(reply, unusable)
    try:
        data, violations = judge(call.schema, reply)
    except errors.Final as error:
        return Verdict(reply, error)
    return Verdict(replace(reply, data=data), None, tuple(violations))


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
