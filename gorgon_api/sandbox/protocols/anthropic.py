"""Anthropic: messages, the counting of tokens, and models."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from gorgon_api.sandbox.calls import Known, ModelCall, ModelReply, Tool, Usage, tokens_in
from gorgon_api.sandbox.http import Request, Response
from gorgon_api.sandbox.limits import Denied, Level
from gorgon_api.sandbox.model_service import ModelService, ProviderFailure, account_of, dump, event, log_entry, pieces

_MODELS_TEXT = """
    claude-opus-5-5 claude-sonnet-5-5 claude-haiku-5-5 claude-fable-5-2 claude-mythos-5-2 claude-opus-5
    claude-sonnet-5 claude-fable-5 claude-opus-4-8 claude-opus-4-7 claude-opus-4-6 claude-sonnet-4-6 claude-opus-4-5
    claude-sonnet-4-5 claude-haiku-4-5
"""
MODELS = tuple(_MODELS_TEXT.split())
CONTEXT = 1_000_000
MOST_OUTPUT = 128_000
IMAGE_TOKENS = 1100
EFFORT_SHARE = {"low": 0.15, "medium": 0.3, "high": 0.6, "xhigh": 1.2, "max": 1.5}
_PARAMETERS_TEXT = """
    max_tokens messages model cache_control container diagnostics inference_geo metadata output_config service_tier
    speed stop_sequences system thinking tool_choice tools user_profile_id workspace_id stream output_format betas
    mcp_servers context_management
"""
PARAMETERS = frozenset(_PARAMETERS_TEXT.split())
KINDS = {
    400: ("invalid_request_error", "The request is not valid."),
    401: ("authentication_error", "invalid x-api-key"),
    402: ("billing_error", "Your credit balance is too low to access the Anthropic API."),
    403: ("permission_error", "Your API key does not have permission to use the specified resource."),
    404: ("not_found_error", "model: {model}"),
    413: ("request_too_large", "Request exceeds the maximum size"),
    429: ("rate_limit_error", "This request would exceed your account's rate limit. Please try again later."),
    500: ("api_error", "Internal server error"),
    504: ("timeout_error", "Request timed out"),
    529: ("overloaded_error", "Overloaded"),
}
ACCEPTED = Known()
"""Schemas that have been validated."""

STOPS = {
    "end": "end_turn",
    "max_tokens": "max_tokens",
    "tool": "tool_use",
    "pause": "pause_turn",
    "context": "model_context_window_exceeded",
    "stop_sequence": "stop_sequence",
    "refusal": "refusal",
}


def bad_request(message: str) -> ProviderFailure:
    """Return a 400."""
    return ProviderFailure(400, "invalid_request_error", message)


def rounded(amount: float, limit: float) -> int:
    """Return tokens as the headers show them: to the nearest thousand where the limit is large."""
    return int(round(amount, -3)) if limit >= 100_000 else int(amount)


class AnthropicWireFormat:
    """Anthropic's wire format."""

    name = "anthropic"

    def error(self, failure: ProviderFailure, request_id: str) -> bytes:
        """Return the body of an error."""
        error: dict[str, Any] = {"type": failure.kind, "message": failure.message}
        if failure.code:
            error["details"] = {"error_code": failure.code}
        return dump({"type": "error", "error": error, "request_id": request_id})

    def headers(self, levels: Mapping[str, Level], request_id: str) -> dict[str, str]:
        """Return the headers of every reply."""
        headers = {"request-id": request_id, "anthropic-organization-id": "org-sandbox"}
        shown = dict(levels)
        if "tokens" not in shown and "input_tokens" in shown and "output_tokens" in shown:
            both = (shown["input_tokens"], shown["output_tokens"])
            reset = max(level.reset for level in both)
            shown["tokens"] = Level(sum(level.limit for level in both), sum(level.remaining for level in both), reset)
        for name, level in shown.items():
            stem = f"anthropic-ratelimit-{name.replace('_', '-')}"
            left = int(level.remaining) if name == "requests" else rounded(level.remaining, level.limit)
            until = datetime.fromtimestamp(math.ceil(time.time() + level.reset), UTC)
            headers[f"{stem}-limit"] = str(int(level.limit))
            headers[f"{stem}-remaining"] = str(left)
            headers[f"{stem}-reset"] = until.strftime("%Y-%m-%dT%H:%M:%SZ")
        return headers

    def retry_headers(self, failure: ProviderFailure) -> dict[str, str]:
        """Return the headers that say whether and when to try again."""
        again = failure.status in (408, 409, 429) or failure.status >= 500
        headers = {"x-should-retry": "true" if again else "false"}
        if failure.retry_after is not None:
            headers["retry-after"] = str(math.ceil(failure.retry_after))
        return headers

    def failure(self, status: int, code: str | None, message: str | None, model: str) -> ProviderFailure:
        """Return Anthropic's own error for a status; what OpenAI calls insufficient_quota is a 402 here."""
        if code == "insufficient_quota":
            status, code = 402, None
        kind, text = KINDS.get(
            status, ("api_error" if status >= 500 else "invalid_request_error", f"HTTP status {status}")
        )
        return ProviderFailure(status, kind, message or text.format(model=model), code)

    def denial(self, denied: Denied, model: str) -> ProviderFailure:
        """Return the 429 for a limit that was reached."""
        if denied.kind == "concurrent":
            text = "Number of concurrent connections has exceeded your rate limit. Please try again later."
        else:
            what = denied.kind.replace("_", " ")
            text = f"This request would exceed your organization's rate limit of {denied.limit:,.0f} {what} per minute"
            text += f" (model: {model}). Please reduce the prompt length or the maximum tokens requested, "
            text += "or try again later."
        after = denied.wait if denied.retry_after and math.isfinite(denied.wait) else None
        return ProviderFailure(429, "rate_limit_error", text, None, None, after)

    def costs(self, call: ModelCall) -> dict[str, float]:
        """Return the expected usage: output counts when it is generated, but some must be left."""
        return {"requests": 1, "tokens": call.input_tokens, "input_tokens": call.input_tokens, "output_tokens": 1}

    def used(self, usage: Usage) -> dict[str, float]:
        """Return the actual usage; cache reads do not count."""
        paid = usage.input - usage.cached
        return {"requests": 1, "tokens": paid + usage.output, "input_tokens": paid, "output_tokens": usage.output}

    def body(self, call: ModelCall, reply: ModelReply) -> bytes:
        """Return the whole reply."""
        return dump(message(call, reply))

    def events(self, call: ModelCall, reply: ModelReply) -> list[bytes]:
        """Return the reply as server-sent events."""
        return message_events(call, reply)

    def error_event(self, call: ModelCall, reply: ModelReply, failure: ProviderFailure, request_id: str) -> bytes:
        """Return an error that comes in the middle of a stream."""
        return b"event: error\ndata: " + self.error(failure, request_id) + b"\n\n"


WIRE_FORMAT = AnthropicWireFormat()


# reading requests


def texts(content: Any) -> Iterable[str]:
    """Yield every text of a message's content, images as text of their size in tokens."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for block in content:
            if not isinstance(block, Mapping):
                continue
            kind = block.get("type")
            if kind == "image":
                yield "i" * (4 * IMAGE_TOKENS)
            elif kind == "tool_use":
                yield json.dumps(block.get("input"))
            elif kind in ("tool_result", "document"):
                inner = block.get("content", block.get("source"))
                yield from texts(
                    inner if not isinstance(inner, Mapping) else [{"type": "text", "text": json.dumps(inner)}]
                )
            else:
                yield str(block.get("text") or block.get("thinking") or "")


def prefixes_of(body: Mapping[str, Any]) -> tuple[tuple[str, int, str], ...]:
    """Return the beginnings of the input that are marked with `cache_control`: (digest, tokens, 5m or 1h)."""
    found: list[tuple[str, int, str]] = []
    digest, tokens = hashlib.sha256(), 0

    def pass_over(block: Any) -> None:
        nonlocal tokens
        control = block.get("cache_control") if isinstance(block, Mapping) else None
        bare = (
            {key: value for key, value in block.items() if key != "cache_control"}
            if isinstance(block, Mapping)
            else block
        )
        text = (
            "".join(texts([bare]))
            if isinstance(bare, Mapping) and "type" in bare and "input_schema" not in bare
            else None
        )
        tokens += tokens_in(text if text else bare if isinstance(bare, str) else json.dumps(bare))
        digest.update(json.dumps(bare, sort_keys=True).encode("utf-8", "surrogatepass"))
        if control:
            found.append((digest.hexdigest()[:24], tokens, "1h" if control.get("ttl") == "1h" else "5m"))

    for tool in body.get("tools") or ():
        pass_over(tool)
    parts = [body.get("system") or [], *(item.get("content") or [] for item in body.get("messages", ()))]
    for part in parts:
        for block in [part] if isinstance(part, str) else part:
            pass_over(block)
    control = body.get("cache_control")
    if control:
        found.append((digest.hexdigest()[:24], tokens, "1h" if control.get("ttl") == "1h" else "5m"))
    return tuple(found)


def check_schema(schema: Any, path: str = "output_config.format.schema") -> None:
    """Raise ProviderFailure where a schema is not what Anthropic accepts."""
    if isinstance(schema, list):
        for part in schema:
            check_schema(part, path)
        return
    if not isinstance(schema, Mapping):
        return
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        raise bad_request(f"{path}: For 'object' type, 'additionalProperties' must be explicitly set to false")
    unfit = {
        "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        "string": ("minLength", "maxLength"),
        "array": ("maxItems", "uniqueItems", "contains"),
    }
    kinds = schema.get("type") if isinstance(schema.get("type"), list) else [schema.get("type")]
    for kind in kinds or ():
        wrong = [keyword for keyword in unfit.get(str(kind), ()) if keyword in schema]
        if wrong:
            raise bad_request(f"{path}: For '{kind}' type, properties {', '.join(wrong)} are not supported")
    for name, part in schema.get("properties", {}).items():
        check_schema(part, f"{path}.properties.{name}")
    for name, part in {**schema.get("$defs", {}), **schema.get("definitions", {})}.items():
        check_schema(part, f"{path}.$defs.{name}")
    for keyword in ("items", "anyOf", "allOf"):
        check_schema(schema.get(keyword), f"{path}.{keyword}")


def schema_of(body: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, int]:
    """Return the schema of structured output, None where none is asked for, and its tokens.  Raises ProviderFailure."""
    form = (body.get("output_config") or {}).get("format") or body.get("output_format")
    if not form:
        return None, 0
    if (
        not isinstance(form, Mapping)
        or form.get("type") != "json_schema"
        or not isinstance(form.get("schema"), Mapping)
    ):
        raise bad_request("output_config.format: Input should be {'type': 'json_schema', 'schema': {…}}")
    text = json.dumps(form["schema"])
    if text not in ACCEPTED:
        check_schema(form["schema"])
        ACCEPTED.add(text)
    return form["schema"], tokens_in(text)


def tool_of(body: Mapping[str, Any], answered: bool) -> Tool | None:
    """Return the tool to call now: the forced one, else the first one if none was called yet."""
    tools = {
        item["name"]: Tool(item["name"], item["input_schema"])
        for item in body.get("tools") or ()
        if isinstance(item.get("input_schema"), Mapping) and item.get("name")
    }
    choice = body.get("tool_choice") or {"type": "auto"}
    if not tools or choice.get("type") == "none":
        return None
    if choice.get("type") == "tool":
        if choice.get("name") not in tools:
            raise bad_request(f"Tool '{choice.get('name')}' not found in provided tools")
        return tools[choice["name"]]
    return None if answered and choice.get("type") != "any" else next(iter(tools.values()))


def check_parameters(body: Mapping[str, Any], counting: bool) -> str:
    """Return the model.  Raises ProviderFailure for what the API would not take."""
    if unknown := sorted(body.keys() - PARAMETERS):
        raise bad_request(f"{unknown[0]}: Extra inputs are not permitted")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("model: Field required")
    if model.startswith(("unknown-", "gpt-")):
        raise WIRE_FORMAT.failure(404, None, None, model)
    limit = body.get("max_tokens")
    if not counting:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise bad_request(
                "max_tokens: Field required" if limit is None else "max_tokens: Input should be a valid integer"
            )
        if limit < 1:
            raise bad_request("max_tokens: Input should be greater than or equal to 1")
        if limit > MOST_OUTPUT:
            text = (
                f"max_tokens: {limit} > {MOST_OUTPUT}, which is the maximum allowed number of output tokens for {model}"
            )
            raise bad_request(text)
    effort = (body.get("output_config") or {}).get("effort")
    if effort is not None and effort not in EFFORT_SHARE:
        known = ", ".join(f"'{name}'" for name in EFFORT_SHARE)
        raise bad_request(f"output_config.effort: Input should be one of {known}")
    return model


def read_call(body: Mapping[str, Any], counting: bool = False) -> ModelCall:
    """Return the neutral form of a request.  Raises ProviderFailure."""
    model = check_parameters(body, counting)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages: at least one message is required")
    system = "\n".join(texts(body.get("system")))
    tokens = tokens_in(system) + (3 if system else 0)
    prompt: list[str] = []
    answered = False
    for number, item in enumerate(messages):
        if not isinstance(item, Mapping) or item.get("role") not in ("user", "assistant", "system"):
            raise bad_request(f"messages.{number}.role: Input should be 'user', 'assistant' or 'system'")
        content = list(texts(item.get("content")))
        if not any(content):
            raise bad_request(f"messages.{number}: all messages must have non-empty content")
        tokens += sum(map(tokens_in, content)) + 3
        if item["role"] == "system":
            system = "\n".join([system, *content])
        elif item["role"] == "user":
            prompt += content
            blocks = item["content"] if isinstance(item["content"], list) else ()
            answered = answered or any(block.get("type") == "tool_result" for block in blocks)
    if messages[0]["role"] != "user":
        raise bad_request('messages: first message must use the "user" role')
    schema, schema_tokens = schema_of(body)
    tokens += schema_tokens
    if body.get("tools"):
        tokens += tokens_in(json.dumps(body["tools"]))
    if tokens > CONTEXT:
        raise bad_request(f"prompt is too long: {tokens} tokens > {CONTEXT} maximum")
    thinking = (body.get("thinking") or {}).get("type") in ("enabled", "adaptive")
    effort = (body.get("output_config") or {}).get("effort") or "high"
    return ModelCall(
        provider="anthropic",
        operation="messages.count_tokens" if counting else "messages",
        model=model,
        body=body,
        system=system,
        prompt="\n".join(prompt),
        input_tokens=tokens,
        schema=schema,
        tool=tool_of(body, answered),
        max_tokens=body.get("max_tokens"),
        stop_sequences=tuple(body.get("stop_sequences") or ()),
        reasoning_share=EFFORT_SHARE[effort] if thinking else 0.0,
        stream=bool(body.get("stream")),
        prefixes=prefixes_of(body),
    )


# writing replies


def usage_of(call: ModelCall, usage: Usage) -> dict[str, Any]:
    """Return the usage; `input_tokens` leaves out what was read from or written to the cache."""
    written = usage.cache_write_5m + usage.cache_write_1h
    return {
        "input_tokens": max(0, usage.input - usage.cached - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": usage.cached,
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.cache_write_5m,
            "ephemeral_1h_input_tokens": usage.cache_write_1h,
        },
        "output_tokens": usage.output,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
        "service_tier": "standard",
        "inference_geo": "not_available",
    }


def content_of(reply: ModelReply) -> list[dict[str, Any]]:
    """Return the blocks of a message."""
    blocks: list[dict[str, Any]] = []
    if reply.refusal is not None:
        return blocks
    if reply.reasoning:
        signature = hashlib.sha256(reply.id.encode()).hexdigest()
        blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": signature})
    if reply.tool is not None:
        blocks.append(
            {"type": "tool_use", "id": f"toolu_{reply.id}", "name": reply.tool.name, "input": reply.tool_input}
        )
    else:
        blocks.append({"type": "text", "text": reply.text, "citations": None})
    return blocks


def stop_of(reply: ModelReply) -> dict[str, Any]:
    """Return why the message ended."""
    details = None
    if reply.stop == "refusal":
        details = {"type": "refusal", "category": "general_harms", "explanation": reply.refusal}
    return {"stop_reason": STOPS[reply.stop], "stop_sequence": reply.stop_sequence, "stop_details": details}


def message(call: ModelCall, reply: ModelReply) -> dict[str, Any]:
    """Return a message."""
    head = {"id": f"msg_{reply.id}", "type": "message", "role": "assistant", "model": call.model}
    return {**head, "content": content_of(reply), **stop_of(reply), "usage": usage_of(call, reply.usage)}


def message_events(call: ModelCall, reply: ModelReply) -> list[bytes]:
    """Return a message as the events that the Messages API streams."""
    whole = message(call, reply)
    started = {**whole, "content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None}
    started["usage"] = {**whole["usage"], "output_tokens": 1, "output_tokens_details": None}
    events: list[bytes] = []

    def add(kind: str, **data: Any) -> None:
        events.append(event({"type": kind, **data}, kind))

    add("message_start", message=started)
    for index, block in enumerate(whole["content"]):
        for number, (kind, data) in enumerate(block_events(block)):
            add(kind, index=index, **data)
            if index == number == 0:
                add("ping")
    counted = {
        key: value
        for key, value in whole["usage"].items()
        if key not in ("cache_creation", "service_tier", "inference_geo")
    }
    add("message_delta", delta=stop_of(reply), usage=counted)
    add("message_stop")
    return events


def block_events(block: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the events of one block."""
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    if block["type"] == "text":
        yield start, {"content_block": {**block, "text": ""}}
        for piece in pieces(block["text"]):
            yield delta, {"delta": {"type": "text_delta", "text": piece}}
    elif block["type"] == "thinking":
        yield start, {"content_block": {**block, "thinking": "", "signature": ""}}
        for piece in pieces(block["thinking"]):
            yield delta, {"delta": {"type": "thinking_delta", "thinking": piece}}
        yield delta, {"delta": {"type": "signature_delta", "signature": block["signature"]}}
    else:
        yield start, {"content_block": {**block, "input": {}}}
        for piece in pieces(json.dumps(block["input"], ensure_ascii=False)):
            yield delta, {"delta": {"type": "input_json_delta", "partial_json": piece}}
    yield stop, {}


# requests


def authenticate(request: Request) -> str:
    """Return the API key, from `Authorization: Bearer` or `x-api-key`; an empty string where there is none."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def check_key(request: Request, key: str) -> None:
    """Raise ProviderFailure for a key or version that would be refused."""
    if not key:
        raise ProviderFailure(401, "authentication_error", "x-api-key header is required")
    if key.startswith("bad"):
        raise WIRE_FORMAT.failure(401, None, None, "")
    if key.startswith("broke"):
        raise WIRE_FORMAT.failure(402, None, None, "")
    if not request.headers.get("anthropic-version"):
        raise bad_request("anthropic-version: header is required")


def model_info(model: str) -> dict[str, Any]:
    """Return the description of a model."""
    words = model.split("-")
    return {
        "type": "model",
        "id": model,
        "display_name": " ".join(word.capitalize() for word in words),
        "created_at": "2026-01-15T00:00:00Z",
        "lifecycle": "active",
        "line": words[1] if len(words) > 1 and words[1] in ("haiku", "sonnet", "opus", "fable", "mythos") else None,
        "max_input_tokens": CONTEXT,
        "max_tokens": MOST_OUTPUT,
        "deprecated_at": None,
        "retires_at": None,
        "capabilities": None,
    }


def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object that was sent.  Raises ProviderFailure."""
    try:
        body = json.loads(request.body)
    except ValueError:
        raise bad_request("The request body is not valid JSON") from None
    if not isinstance(body, dict):
        raise bad_request("Input should be an object")
    return body


async def handle(service: ModelService, request: Request) -> Response:
    """Answer a request to Anthropic."""
    key = authenticate(request)
    account = account_of(key)
    operation = request.path.removeprefix("/v1/").replace("/", ".")
    try:
        check_key(request, key)
        if request.method == "GET" and operation == "models":
            data = [model_info(model) for model in MODELS]
            page = {"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}
            return free(service, request, account, "models", page)
        if request.method == "GET" and operation.startswith("models."):
            model = request.path.removeprefix("/v1/models/")
            check_parameters({"model": model}, counting=True)
            return free(service, request, account, "models", model_info(model))
        if request.method == "POST" and operation in ("messages", "messages.count_tokens"):
            body = read_body(request)
            try:
                call = read_call(body, counting=operation != "messages")
            except (AttributeError, KeyError, TypeError) as error:
                raise bad_request(f"The request has an unexpected shape: {error}") from error
            if operation == "messages":
                return await service.answer(WIRE_FORMAT, request, account, call)
            return free(service, request, account, operation, {"input_tokens": call.input_tokens})
        raise ProviderFailure(404, "not_found_error", "Not found")
    except ProviderFailure as failure:
        entry = {**log_entry(request, "anthropic", account, operation), "request_id": service.request_id()}
        return service.fail(WIRE_FORMAT, None, failure, entry, time.time())


def free(service: ModelService, request: Request, account: str, operation: str, data: Mapping[str, Any]) -> Response:
    """Return a reply that costs nothing."""
    request_id = service.request_id()
    entry = log_entry(request, "anthropic", account, operation)
    service.log.add({**entry, "request_id": request_id, "status": 200, "delivered": True})
    return Response(200, dump(data), {"content-type": "application/json", **WIRE_FORMAT.headers({}, request_id)})
