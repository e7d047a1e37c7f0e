"""Answers calls to models, independently of the wire format: faults, limits, reply, cache, log, latency."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gorgon_api.sandbox.calls import ModelCall, ModelReply, Usage, random_for, tokens_in, without_triggers
from gorgon_api.sandbox.faults import Effects, Faults, Subject
from gorgon_api.sandbox.http import Request, Response
from gorgon_api.sandbox.limits import Denied, Gate, Level, Limits
from gorgon_api.sandbox.log import Log
from gorgon_api.sandbox.replies import free_text, hints_for, repeated, structured, swollen

CACHE_SECONDS = {"5m": 300.0, "1h": 3600.0, "auto": 600.0}
CACHE_FEWEST = 1024
"""The fewest tokens that a provider caches."""

STREAM_STEPS = 32
"""The number of portions of a streamed reply that takes time."""

FIRST_PORTION = 0.3
"""The share of a streamed reply's time before its first words."""

REFUSAL = "I'm sorry, but I can't help with that request."


@dataclass(eq=False)
class ProviderFailure(Exception):
    """An error reply.  `kind` is what the provider calls the error's type; `retry_after` is in seconds."""

    status: int
    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None


class WireFormat(Protocol):
    """The wire format of one provider."""

    name: str

    def error(self, failure: ProviderFailure, request_id: str) -> bytes:
        """Return the body of an error."""
        ...

    def headers(self, levels: Mapping[str, Level], request_id: str) -> dict[str, str]:
        """Return the headers of every reply."""
        ...

    def retry_headers(self, failure: ProviderFailure) -> dict[str, str]:
        """Return the headers that say whether and when to try again."""
        ...

    def failure(self, status: int, code: str | None, message: str | None, model: str) -> ProviderFailure:
        """Return the provider's own error for a status."""
        ...

    def denial(self, denied: Denied, model: str) -> ProviderFailure:
        """Return the provider's own error for a limit that was reached."""
        ...

    def costs(self, call: ModelCall) -> dict[str, float]:
        """Return the expected usage of a call by dimension, for its admission."""
        ...

    def used(self, usage: Usage) -> dict[str, float]:
        """Return the actual usage of a call by dimension."""
        ...

    def body(self, call: ModelCall, reply: ModelReply) -> bytes:
        """Return the whole reply."""
        ...

    def events(self, call: ModelCall, reply: ModelReply) -> list[bytes]:
        """Return the reply as server-sent events."""
        ...

    def error_event(self, call: ModelCall, reply: ModelReply, failure: ProviderFailure, request_id: str) -> bytes:
        """Return an error that comes in the middle of a stream."""
        ...


@dataclass(slots=True)
class ModelService:
    """The state of the sandbox.  `latency` is the total time of a reply in seconds, None for a realistic one."""

    seed: int
    latency: float | None
    faults: Faults
    limits: Limits
    log: Log
    cache: dict[tuple[str, str, str], float] = field(default_factory=dict)
    requests: int = 0

    def request_id(self) -> str:
        """Return a request id, unique in this process."""
        self.requests += 1
        return f"req_{hashlib.sha256(f'{self.seed}:{self.requests}'.encode()).hexdigest()[:24]}"

    # one call from start to end

    async def answer(self, wire: WireFormat, request: Request, account: str, call: ModelCall) -> Response:
        """Answer a call to a model, or fail as its provider would."""
        request_id = self.request_id()
        now = time.time()
        digest = call.digest()
        gate = self.limits.gate(wire.name, account, call.model, now)
        entry = {
            **log_entry(request, wire.name, account, call.operation),
            "request_id": request_id,
            "model": call.model,
            "role": call.role(),
            "stream": call.stream,
            "digest": digest,
            "prompt": without_triggers(call.prompt)[:200],
        }
        try:
            effects = self.faults.effects(Subject(wire.name, account, call.model, call.role(), call.said))
        except ValueError as error:
            failure = wire.failure(400, None, f"The sandbox cannot read a trigger: {error}", call.model)
            return self.fail(wire, gate, failure, entry, now)
        entry["faults"] = effects.names
        if effects.first("reset") or effects.first("hang"):
            self.log.add({**entry, "status": 0, "delivered": False})
            return Response(end="hang" if effects.first("hang") else "drop")
        status = effects.first("status")
        midway = call.stream and effects.first("midway")
        if status is not None and not midway:
            failure = self.injected(wire, status, effects, call.model)
            await asyncio.sleep(effects.delay)
            return self.fail(wire, gate, failure, entry, now)
        if not self.limits.quota_left(gate, wire.name, account):
            return self.fail(wire, gate, wire.failure(429, "insufficient_quota", None, call.model), entry, now)
        reserved = wire.costs(call)
        denied = gate.admit(reserved, now)
        if denied is not None:
            return self.fail(wire, gate, wire.denial(denied, call.model), entry, now)
        streamed = False
        try:
            reply = self.compose(call, account, digest, effects, now)
            gate.settle(reserved, wire.used(reply.usage), now)
            self.limits.spend(wire.name, account, reply.usage.input + reply.usage.output)
            self.log.charge(account, wire.name, call.model, reply.usage.to_dict())
            stored = self.log.add({**entry, "status": 200, "usage": reply.usage.to_dict(), "delivered": True})
            headers = wire.headers(gate.levels(now), request_id)
            total = self.reply_time(digest, reply.usage.output) + effects.delay
            passed = asyncio.get_running_loop().time() - request.arrived
            remaining = max(0.0, total - passed)
            if call.stream and not effects.first("drop"):
                events = self.spoil_events(wire.events(call, reply), effects)
                if midway:
                    failure = self.injected(wire, status or 500, effects, call.model)
                    stored["error"] = failure.code or failure.kind
                    events = events[: len(events) // 2]
                    events.append(wire.error_event(call, reply, failure, request_id))
                end = "truncate" if effects.first("truncate") else "whole"
                head = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
                stored["delivered"] = end == "whole"
                streamed = True
                return Response(200, headers=head, stream=paced(events, remaining, request, stored, gate), end=end)
            await asyncio.sleep(remaining)
        finally:
            if not streamed:
                gate.leave()
        if request.closed.done():
            stored["delivered"] = False
        return self.whole(wire.body(call, reply), headers, effects, stored)

    @staticmethod
    def whole(body: bytes, headers: dict[str, str], effects: Effects, stored: dict[str, Any]) -> Response:
        """Return a reply that is not streamed, damaged if a fault demands it."""
        if effects.first("malformed"):
            body = body[: len(body) * 2 // 3] + b'"}}, oops'
        end = "drop" if effects.first("drop") else "truncate" if effects.first("truncate") else "whole"
        stored["delivered"] = stored["delivered"] and end == "whole"
        return Response(200, body, {"content-type": "application/json", **headers}, end=end)

    @staticmethod
    def spoil_events(events: list[bytes], effects: Effects) -> list[bytes]:
        """Return the events, damaged if a fault demands it."""
        middle = len(events) // 2
        if effects.first("malformed"):
            middle += b"event: ping" in events[middle]
            events[middle] = events[middle].rstrip()[:-4] + b"oops\n\n"
        return events[:middle] if effects.first("truncate") else events

    @staticmethod
    def injected(wire: WireFormat, status: int, effects: Effects, model: str) -> ProviderFailure:
        """Return the error of a fault."""
        plain = wire.failure(status, effects.first("code"), effects.first("message"), model)
        after = effects.first("retry_after")
        return ProviderFailure(plain.status, plain.kind, plain.message, plain.code, plain.param, after)

    def fail(
        self, wire: WireFormat, gate: Gate | None, failure: ProviderFailure, entry: dict[str, Any], now: float
    ) -> Response:
        """Return an error and log it."""
        stored = self.log.add(
            {**entry, "status": failure.status, "error": failure.code or failure.kind, "delivered": True}
        )
        headers = wire.headers(gate.levels(now) if gate else {}, stored.get("request_id", ""))
        headers |= wire.retry_headers(failure)
        body = wire.error(failure, stored.get("request_id", ""))
        return Response(failure.status, body, {"content-type": "application/json", **headers})

    # the reply

    def reply_time(self, digest: str, output_tokens: int) -> float:
        """Return the time of a reply in seconds: the configured latency, else 80 to 250 ms depending on its length."""
        if self.latency is not None:
            return self.latency
        jitter = int(digest[:4], 16) / 0xFFFF
        return min(0.25, 0.08 + 0.03 * jitter + 0.00015 * output_tokens)

    def compose(self, call: ModelCall, account: str, digest: str, effects: Effects, now: float) -> ModelReply:
        """Return the reply to a call, with its usage."""
        rng = random_for(self.seed, digest)
        reply = ModelReply(id=hashlib.sha256(f"{self.seed}:{digest}".encode()).hexdigest()[:24])
        self.say(call, reply, effects, rng)
        self.cut(call, reply, effects)
        self.count(call, reply, account, effects, now)
        return reply

    def say(self, call: ModelCall, reply: ModelReply, effects: Effects, rng: random.Random) -> None:
        """Fill in the content of the reply."""
        hints = hints_for(call, rng)
        if effects.first("refuse") or effects.first("stop") == "refusal":
            reply.refusal, reply.stop = REFUSAL, "refusal"
            return
        if effects.first("json") is not None:
            reply.text = json.dumps(effects.first("json"), ensure_ascii=False)
        elif effects.first("text") is not None:
            reply.text = effects.first("text")
        elif call.tool is not None:
            reply.tool, reply.stop = call.tool, "tool"
            reply.tool_input = structured(call.tool.schema, hints, rng, wrong=bool(effects.first("wrong_schema")))
        elif call.schema is not None:
            value = structured(call.schema, hints, rng, wrong=bool(effects.first("wrong_schema")))
            if effects.first("huge"):
                value = swollen(value, effects.first("huge"), hints.sentence(0))
            reply.text = json.dumps(value, ensure_ascii=False)
        else:
            reply.text = free_text(hints)
            if effects.first("huge"):
                reply.text = repeated(hints.sentence(0) + "\n", effects.first("huge"))
        if call.reasoning_share:
            reply.reasoning = hints.sentence(2)

    def cut(self, call: ModelCall, reply: ModelReply, effects: Effects) -> None:
        """End the reply early where `max_tokens`, a stop sequence or a fault says so."""
        for sequence in call.stop_sequences:
            if sequence and sequence in reply.text:
                reply.text = reply.text[: reply.text.index(sequence)]
                reply.stop, reply.stop_sequence = "stop_sequence", sequence
        forced = effects.first("stop")
        if forced in ("max_tokens", "pause", "context") and reply.refusal is None:
            reply.text = reply.text[: len(reply.text) // 2]
            reply.stop = forced
        if call.max_tokens is None or effects.first("huge") or reply.tool is not None:
            return
        room = call.max_tokens - min(int(tokens_in(reply.text) * call.reasoning_share), call.max_tokens // 4)
        if tokens_in(reply.text) > room:
            reply.text = reply.text.encode()[: 4 * room].decode(errors="ignore")
            reply.stop = "max_tokens"

    def count(self, call: ModelCall, reply: ModelReply, account: str, effects: Effects, now: float) -> None:
        """Fill in the usage."""
        said = reply.text + (reply.refusal or "")
        if reply.tool is not None:
            said += reply.tool.name + json.dumps(reply.tool_input)
        visible = max(1, tokens_in(said))
        reasoning = int(visible * call.reasoning_share)
        if call.max_tokens is not None:
            reasoning = min(reasoning, call.max_tokens // 4)
            visible = min(visible, call.max_tokens - reasoning)
        usage = Usage(input=call.input_tokens, output=visible + reasoning, reasoning=reasoning)
        self.use_cache(call, account, usage, now)
        dictated = effects.first("usage")
        if isinstance(dictated, dict):
            usage = Usage(**{name: int(dictated.get(name, value)) for name, value in usage.to_dict().items()})
        reply.usage = usage

    def use_cache(self, call: ModelCall, account: str, usage: Usage, now: float) -> None:
        """Count which prefixes of the input are read from the prompt cache and which are written to it."""
        known = 0
        for digest, tokens, _ in call.prefixes:
            key = (account, call.model, digest)
            if tokens < CACHE_FEWEST:
                continue
            if self.cache.get(key, 0.0) > now:
                known = tokens
        written = known
        for digest, tokens, kind in call.prefixes:
            if tokens < CACHE_FEWEST:
                continue
            self.cache[(account, call.model, digest)] = now + CACHE_SECONDS[kind]
            if tokens > written:
                if kind == "1h":
                    usage.cache_write_1h += tokens - written
                else:
                    usage.cache_write_5m += tokens - written
                written = tokens
        usage.cached = known
        if len(self.cache) > 50_000:
            self.cache = {key: until for key, until in self.cache.items() if until > now}


def log_entry(request: Request, provider: str, account: str, operation: str) -> dict[str, Any]:
    """Return the fields that every entry of the log has."""
    return {
        "time": time.time(),
        "provider": provider,
        "account": account,
        "operation": operation,
        "model": None,
        "role": None,
        "status": None,
        "usage": None,
        "digest": None,
        "prompt": None,
        "idempotency_key": request.headers.get("idempotency-key"),
        "faults": [],
        "error": None,
    }


async def paced(
    events: Sequence[bytes], seconds: float, request: Request, stored: dict[str, Any], gate: Gate
) -> AsyncGenerator[bytes, None]:
    """Send events over `seconds`: the first, a pause, then the rest in even portions."""
    finished = False
    try:
        if seconds <= 0:
            yield b"".join(events)
            finished = True
            return
        yield events[0]
        await asyncio.sleep(seconds * FIRST_PORTION)
        size = max(1, math.ceil((len(events) - 1) / STREAM_STEPS))
        portions = [events[start : start + size] for start in range(1, len(events), size)]
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for number, portion in enumerate(portions):
            yield b"".join(portion)
            due = begin + seconds * (1 - FIRST_PORTION) * (number + 1) / len(portions)
            if number + 1 < len(portions):
                await asyncio.sleep(max(0.0, due - loop.time()))
        finished = True
    finally:
        gate.leave()
        stored["delivered"] &= finished and not request.closed.done()


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return one server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n").encode()


def pieces(text: str) -> list[str]:
    """Return the text in the portions in which it is streamed."""
    size = max(24, math.ceil(len(text) / 64))
    return [text[start : start + size] for start in range(0, len(text), size)]


def account_of(key: str) -> str:
    """Return an API key for display: whole if it is short, else abbreviated, because it may be a real one."""
    return key if len(key) <= 32 else f"{key[:6]}…{hashlib.sha256(key.encode()).hexdigest()[:6]}"


def dump(data: Mapping[str, Any]) -> bytes:
    """Return compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
