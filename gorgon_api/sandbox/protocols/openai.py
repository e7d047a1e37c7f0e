"""OpenAI: Responses, chat completions, embeddings and models."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from gorgon_api.sandbox.calls import Known, ModelCall, ModelReply, Tool, Usage, tokens_in
from gorgon_api.sandbox.http import Request, Response
from gorgon_api.sandbox.limits import Denied, Level
from gorgon_api.sandbox.model_service import ModelService, ProviderFailure, account_of, dump, event, log_entry, pieces

_MODELS_TEXT = """
    gpt-6-astra gpt-6-sol gpt-6-luna gpt-5.6-sol gpt-5.6-terra gpt-5.6-luna gpt-5.5 gpt-5.4 gpt-5.4-mini
    gpt-5.4-nano gpt-5.2 gpt-5.1 gpt-5 gpt-5-mini gpt-5-nano gpt-4.1 gpt-4.1-mini gpt-4.1-nano gpt-4o gpt-4o-mini o3
    o4-mini text-embedding-3-small text-embedding-3-large
"""
MODELS = tuple(_MODELS_TEXT.split())
CONTEXT = 1_000_000
IMAGE_TOKENS = 765
REASONING = re.compile(r"^(o\d|gpt-[5-9])")
CACHE_WRITES = re.compile(r"^gpt-(5\.[6-9]|[6-9])")
"""Models that count cache writes."""

ACCEPTED = Known()
"""Strict schemas that have been validated."""

EFFORT_SHARE = {"none": 0.0, "minimal": 0.05, "low": 0.15, "medium": 0.3, "high": 0.6, "xhigh": 1.2, "max": 1.5}
_RESPONSE_PARAMETERS_TEXT = """
    access_programs background background_options context_management conversation image include input instructions
    max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt
    prompt_cache_key prompt_cache_options prompt_cache_retention reasoning safety_identifier service_tier store
    stream stream_options temperature text tool_choice tools top_logprobs top_p truncation user
"""
RESPONSE_PARAMETERS = frozenset(_RESPONSE_PARAMETERS_TEXT.split())
KINDS = {
    400: ("invalid_request_error", None, "The request is not valid."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: (
        "invalid_request_error",
        "unsupported_country_region_territory",
        "Country, region, or territory not supported",
    ),
    404: (
        "invalid_request_error",
        "model_not_found",
        "The model `{model}` does not exist or you do not have access to it.",
    ),
    429: (
        "requests",
        "rate_limit_exceeded",
        "Rate limit reached for {model} on requests per min. Please try again later.",
    ),
    500: ("server_error", None, "The server had an error while processing your request. Sorry about that!"),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}
QUOTA = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this error, "
    "read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
)
WHAT = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)", "concurrent": "concurrent requests"}


def duration(seconds: float) -> str:
    """Return `120ms`, `8.64s` or `6m0s`, as the reset headers have it."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ProviderFailure:
    """Return a 400."""
    return ProviderFailure(400, "invalid_request_error", message, code, param)


class OpenAIWireFormat:
    """OpenAI's wire format."""

    name = "openai"

    def error(self, failure: ProviderFailure, request_id: str) -> bytes:
        """Return the body of an error."""
        details = {"message": failure.message, "type": failure.kind, "param": failure.param, "code": failure.code}
        return dump({"error": details})

    def headers(self, levels: Mapping[str, Level], request_id: str) -> dict[str, str]:
        """Return the headers of every reply."""
        headers = {
            "x-request-id": request_id,
            "openai-organization": "org-sandbox",
            "openai-version": "2020-10-01",
            "openai-processing-ms": "80",
        }
        for name in ("requests", "tokens"):
            if name in levels:
                headers[f"x-ratelimit-limit-{name}"] = str(int(levels[name].limit))
                headers[f"x-ratelimit-remaining-{name}"] = str(int(levels[name].remaining))
                headers[f"x-ratelimit-reset-{name}"] = duration(levels[name].reset)
        return headers

    def retry_headers(self, failure: ProviderFailure) -> dict[str, str]:
        """Return the headers that say whether and when to try again."""
        again = failure.status in (408, 409, 429) or failure.status >= 500
        headers = {"x-should-retry": "true" if again and failure.code != "insufficient_quota" else "false"}
        if failure.retry_after is not None:
            headers["retry-after"] = str(math.ceil(failure.retry_after))
            headers["retry-after-ms"] = str(math.ceil(failure.retry_after * 1000))
        return headers

    def failure(self, status: int, code: str | None, message: str | None, model: str) -> ProviderFailure:
        """Return OpenAI's own error for a status."""
        if code == "insufficient_quota":
            return ProviderFailure(status, "insufficient_quota", message or QUOTA, code)
        kind, usual, text = KINDS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None, ""))
        text = message or text.format(model=model) or f"HTTP status {status}"
        return ProviderFailure(status, kind, text, code or usual)

    def denial(self, denied: Denied, model: str) -> ProviderFailure:
        """Return the 429 for a limit that was reached."""
        what = WHAT.get(denied.kind, denied.kind)
        if math.isinf(denied.wait):
            text = f"Request too large for {model} in organization org-sandbox on {what}: Limit {denied.limit:.0f}, "
            text += f"Requested {denied.requested:.0f}. "
            text += "The input or output tokens must be reduced in order to run successfully."
            return ProviderFailure(429, denied.kind, text, "rate_limit_exceeded")
        text = f"Rate limit reached for {model} in organization org-sandbox on {what}: Limit {denied.limit:.0f}, Used "
        text += f"{denied.used:.0f}, Requested {denied.requested:.0f}. Please try again in {duration(denied.wait)}."
        after = denied.wait if denied.retry_after else None
        return ProviderFailure(429, denied.kind, text, "rate_limit_exceeded", None, after)

    def costs(self, call: ModelCall) -> dict[str, float]:
        """Return the expected usage: OpenAI admits a call by the larger of input and max_tokens."""
        expected = max(call.input_tokens, call.max_tokens or 0)
        return {
            "requests": 1,
            "tokens": expected,
            "input_tokens": call.input_tokens,
            "output_tokens": call.max_tokens or 0,
        }

    def used(self, usage: Usage) -> dict[str, float]:
        """Return the actual usage."""
        tokens = usage.input + usage.output
        return {"requests": 1, "tokens": tokens, "input_tokens": usage.input, "output_tokens": usage.output}

    def body(self, call: ModelCall, reply: ModelReply) -> bytes:
        """Return the whole reply."""
        return dump(completion(call, reply) if call.operation == "chat.completions" else response(call, reply))

    def events(self, call: ModelCall, reply: ModelReply) -> list[bytes]:
        """Return the reply as server-sent events."""
        return chat_events(call, reply) if call.operation == "chat.completions" else response_events(call, reply)

    def error_event(self, call: ModelCall, reply: ModelReply, failure: ProviderFailure, request_id: str) -> bytes:
        """Return an error that comes in the middle of a stream."""
        if call.operation == "chat.completions":
            return b"data: " + self.error(failure, request_id) + b"\n\n"
        code = "rate_limit_exceeded" if failure.status == 429 else "server_error"
        failed = {"status": "failed", "error": {"code": code, "message": failure.message}, "usage": None}
        failed |= {"completed_at": None, "incomplete_details": None}
        whole = {**response(call, reply), **failed}
        number = len(self.events(call, reply)) // 2
        return event({"type": "response.failed", "sequence_number": number, "response": whole}, "response.failed")


WIRE_FORMAT = OpenAIWireFormat()


# reading requests


def texts(content: Any) -> Iterable[str]:
    """Yield every text of a message's content, images as text of their size in tokens."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping):
                continue
            kind = str(part.get("type", ""))
            if "image" in kind:
                yield "i" * (4 * IMAGE_TOKENS)
            else:
                yield str(part.get("text") or part.get("refusal") or part.get("file_data") or "")


def messages_of(items: Any) -> tuple[list[str], list[str], int, bool]:
    """Return the system texts, the user texts, all tokens and whether a tool has answered already.

    Raises ProviderFailure.
    """
    if isinstance(items, str):
        return [], [items], tokens_in(items) + 3, False
    if not isinstance(items, list) or not items:
        raise bad_request("Missing required parameter: 'input' or 'messages' has to hold at least one item.", "input")
    system, user, tokens, answered = [], [], 0, False
    for item in items:
        if not isinstance(item, Mapping):
            raise bad_request("Invalid type for an item of the input: expected an object.", "input", "invalid_type")
        role = item.get("role")
        content = list(texts(item.get("content")))
        if item.get("type") == "function_call_output" or role == "tool":
            answered = True
            content += [str(item.get("output", ""))]
        elif role in ("system", "developer"):
            system += content
        elif role == "user":
            user += content
        calls = item.get("tool_calls") or item.get("arguments")
        tokens += sum(map(tokens_in, content)) + (tokens_in(json.dumps(calls)) if calls else 0) + 3
    return system, user, tokens, answered


def tools_of(body: Mapping[str, Any], answered: bool) -> Tool | None:
    """Return the function to call now: the forced one, else the first one if none was called yet."""
    functions = {}
    for item in body.get("tools") or ():
        function = item.get("function", item)
        if item.get("type") == "function":
            functions[function.get("name")] = Tool(
                function.get("name"), function.get("parameters") or {"type": "object"}
            )
    choice = body.get("tool_choice", "auto")
    if not functions or choice == "none":
        return None
    if isinstance(choice, Mapping):
        name = choice.get("function", choice).get("name")
        if name not in functions:
            raise bad_request(f"Tool choice '{name}' not found in 'tools' parameter.", "tool_choice")
        return functions[name]
    return None if answered and choice != "required" else next(iter(functions.values()))


def check_strict(schema: Any, where: str, path: tuple[str, ...] = ()) -> None:
    """Raise ProviderFailure where a strict schema is not what OpenAI accepts."""
    if isinstance(schema, list):
        for part in schema:
            check_strict(part, where, path)
        return
    if not isinstance(schema, Mapping):
        return

    def refuse(reason: str) -> ProviderFailure:
        return bad_request(
            f"Invalid schema for {where}: In context={path!r}, {reason}", "text.format.schema", "invalid_json_schema"
        )

    for keyword in ("allOf", "not", "if", "dependentRequired", "dependentSchemas", "patternProperties", "oneOf"):
        if keyword in schema:
            raise refuse(f"'{keyword}' is not permitted.")
    properties = schema.get("properties")
    if schema.get("type") == "object" or properties is not None:
        if schema.get("additionalProperties") is not False:
            raise refuse("'additionalProperties' is required to be supplied and to be false.")
        missing = [name for name in properties or {} if name not in schema.get("required", ())]
        if missing:
            raise refuse(
                "'required' is required to be supplied and to be an array including every key in properties. "
                f"Missing '{missing[0]}'."
            )
    for name, part in (properties or {}).items():
        check_strict(part, where, (*path, "properties", name))
    for name, part in {**schema.get("$defs", {}), **schema.get("definitions", {})}.items():
        check_strict(part, where, (*path, "$defs", name))
    check_strict(schema.get("items"), where, (*path, "items"))
    check_strict(schema.get("anyOf"), where, (*path, "anyOf"))


def schema_of(form: Any, param: str) -> tuple[Mapping[str, Any] | None, str]:
    """Return the schema of the reply, None for plain text, and its text as it counts.  Raises ProviderFailure."""
    if not isinstance(form, Mapping) or form.get("type") in (None, "text"):
        return None, ""
    if form["type"] == "json_object":
        return {"type": "object", "properties": {"result": {"type": "string"}, "summary": {"type": "string"}}}, ""
    if form["type"] != "json_schema":
        raise bad_request(f"Invalid value: '{form['type']}'.", f"{param}.type", "invalid_value")
    details = form.get("json_schema", form)
    if not isinstance(details, Mapping) or not details.get("name"):
        raise bad_request(f"Missing required parameter: '{param}.name'.", f"{param}.name", "missing_required_parameter")
    schema = details.get("schema") or {}
    if schema.get("type") != "object":
        text = f"Invalid schema for response_format '{details['name']}': schema must be a JSON Schema of "
        raise bad_request(
            text + f"'type: \"object\"', got 'type: \"{schema.get('type')}\"'.",
            f"{param}.schema",
            "invalid_json_schema",
        )
    text = json.dumps(schema)
    if details.get("strict") and text not in ACCEPTED:
        check_strict(schema, f"response_format '{details['name']}'")
        ACCEPTED.add(text)
    return schema, text


def check_model(body: Mapping[str, Any]) -> str:
    """Return the model.  Raises ProviderFailure where there is none of that name."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("you must provide a model parameter")
    if model.startswith(("unknown-", "claude-")):
        raise WIRE_FORMAT.failure(404, None, None, model)
    return model


def reasoning_share(model: str, effort: Any) -> float:
    """Return the reasoning tokens per visible token."""
    if effort is None:
        effort = "medium" if REASONING.match(model) and "chat" not in model else "none"
    if effort not in EFFORT_SHARE:
        known = ", ".join(f"'{name}'" for name in EFFORT_SHARE)
        text = f"Invalid value: '{effort}'. Supported values are: {known}."
        raise bad_request(text, "reasoning.effort", "invalid_value")
    return EFFORT_SHARE[effort]


def check_room(model: str, tokens: int) -> None:
    """Raise ProviderFailure where the input is longer than the model's context."""
    if tokens > CONTEXT:
        text = f"Your input exceeds the context window of this model ({tokens} tokens, at most {CONTEXT})."
        raise bad_request(text + " Please adjust your input and try again.", "input", "context_length_exceeded")


def read_tokens(value: Any, name: str) -> int | None:
    """Return a limit on output tokens.  Raises ProviderFailure where it is too low or no number."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_request(f"Invalid type for '{name}': expected an integer.", name, "invalid_type")
    fewest = 16 if name == "max_output_tokens" else 1
    if value < fewest:
        text = f"Invalid '{name}': integer below minimum value. Expected a value >= {fewest}, but got {value} instead."
        raise bad_request(text, name, "integer_below_min_value")
    return value


def read_call(body: Mapping[str, Any], operation: str) -> ModelCall:
    """Return the neutral form of a request to Responses or chat completions.  Raises ProviderFailure."""
    model = check_model(body)
    chat = operation == "chat.completions"
    system, user, tokens, answered = messages_of(body.get("messages" if chat else "input"))
    if chat:
        form, param, effort = body.get("response_format"), "response_format", body.get("reasoning_effort")
        if "max_tokens" in body and REASONING.match(model):
            text = "Unsupported parameter: 'max_tokens' is not supported with this model."
            raise bad_request(f"{text} Use 'max_completion_tokens' instead.", "max_tokens", "unsupported_parameter")
        limit = read_tokens(body.get("max_completion_tokens", body.get("max_tokens")), "max_completion_tokens")
        stop = body.get("stop") or ()
    else:
        if unknown := sorted(body.keys() - RESPONSE_PARAMETERS):
            raise bad_request(f"Unknown parameter: '{unknown[0]}'.", unknown[0], "unknown_parameter")
        if body.get("previous_response_id"):
            text = f"Previous response with id '{body['previous_response_id']}' not found."
            raise bad_request(text, "previous_response_id", "previous_response_not_found")
        form, param, effort = (
            (body.get("text") or {}).get("format"),
            "text.format",
            (body.get("reasoning") or {}).get("effort"),
        )
        limit = read_tokens(body.get("max_output_tokens"), "max_output_tokens")
        stop = ()
        if body.get("instructions"):
            system.insert(0, body["instructions"])
            tokens += tokens_in(body["instructions"]) + 3
    schema, schema_text = schema_of(form, param)
    tools = json.dumps(body["tools"]) if body.get("tools") else ""
    extras = tokens_in(tools) + tokens_in(schema_text)
    tokens += extras
    check_room(model, tokens)
    head = "\n".join(system)
    prefix = hashlib.sha256(f"{tools}{schema_text}{head}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return ModelCall(
        provider="openai",
        operation=operation,
        model=model,
        body=body,
        system=head,
        prompt="\n".join(user),
        input_tokens=max(1, tokens),
        schema=schema,
        tool=tools_of(body, answered),
        max_tokens=limit,
        stop_sequences=(stop,) if isinstance(stop, str) else tuple(stop),
        reasoning_share=reasoning_share(model, effort),
        stream=bool(body.get("stream")),
        prefixes=((prefix, (tokens_in(head) + extras) // 128 * 128, "auto"),),
    )


# writing replies


def tier(body: Mapping[str, Any]) -> str:
    """Return the tier that serves a request."""
    wanted = body.get("service_tier")
    return {"fast": "priority", "auto": "default", None: "default"}.get(wanted, str(wanted))


def cache_writes(call: ModelCall, usage: Usage) -> int:
    """Return the tokens written to the cache, for models that count them."""
    return usage.cache_write_5m + usage.cache_write_1h if CACHE_WRITES.match(call.model) else 0


def response_items(call: ModelCall, reply: ModelReply) -> list[dict[str, Any]]:
    """Return the output items of a response."""
    items: list[dict[str, Any]] = []
    state = "incomplete" if reply.stop == "max_tokens" else "completed"
    if reply.usage.reasoning:
        items.append({"id": f"rs_{reply.id}", "type": "reasoning", "summary": []})
    if reply.tool is not None:
        arguments = json.dumps(reply.tool_input, ensure_ascii=False)
        call_item = {"type": "function_call", "status": state, "name": reply.tool.name, "arguments": arguments}
        items.append({"id": f"fc_{reply.id}", "call_id": f"call_{reply.id}", **call_item})
        return items
    part: dict[str, Any] = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": []}
    if reply.refusal is not None:
        part = {"type": "refusal", "refusal": reply.refusal}
    message = {"type": "message", "status": state, "role": "assistant", "content": [part]}
    items.append({"id": f"msg_{reply.id}", **message})
    return items


def response(call: ModelCall, reply: ModelReply) -> dict[str, Any]:
    """Return a response object."""
    body, usage = call.body, reply.usage
    cut = reply.stop == "max_tokens"
    now = int(time.time())
    details = {"cached_tokens": usage.cached, "cache_write_tokens": cache_writes(call, usage)}
    return {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": now,
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else now,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": body.get("metadata") or {},
        "model": call.model,
        "output": response_items(call, reply),
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": (body.get("reasoning") or {}).get("effort"), "summary": None},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": tier(body),
        "store": body.get("store", True),
        "temperature": body.get("temperature", 1.0),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools") or [],
        "top_logprobs": 0,
        "top_p": body.get("top_p", 1.0),
        "truncation": body.get("truncation", "disabled"),
        "usage": {
            "input_tokens": usage.input,
            "input_tokens_details": details,
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.input + usage.output,
        },
        "user": body.get("user"),
    }


def response_events(call: ModelCall, reply: ModelReply) -> list[bytes]:
    """Return a response as the events that the Responses API streams."""
    whole = response(call, reply)
    started = {**whole, "status": "in_progress", "completed_at": None, "output": [], "usage": None}
    started["incomplete_details"] = None
    events: list[bytes] = []

    def add(kind: str, **data: Any) -> None:
        events.append(event({"type": kind, "sequence_number": len(events), **data}, kind))

    add("response.created", response=started)
    add("response.in_progress", response=started)
    for index, item in enumerate(whole["output"]):
        at = {"output_index": index, "item_id": item["id"]}
        if item["type"] == "reasoning":
            add("response.output_item.added", output_index=index, item=item)
        elif item["type"] == "function_call":
            add(
                "response.output_item.added",
                output_index=index,
                item={**item, "status": "in_progress", "arguments": ""},
            )
            for piece in pieces(item["arguments"]):
                add("response.function_call_arguments.delta", **at, delta=piece)
            add("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
        else:
            add("response.output_item.added", output_index=index, item={**item, "status": "in_progress", "content": []})
            part = item["content"][0]
            field = "text" if part["type"] == "output_text" else "refusal"
            kind = "response.output_text" if field == "text" else "response.refusal"
            more: dict[str, Any] = {"logprobs": []} if field == "text" else {}
            add("response.content_part.added", **at, content_index=0, part={**part, field: ""})
            for piece in pieces(part[field]):
                add(f"{kind}.delta", **at, content_index=0, delta=piece, **more)
            add(f"{kind}.done", **at, content_index=0, **{field: part[field]}, **more)
            add("response.content_part.done", **at, content_index=0, part=part)
        add("response.output_item.done", output_index=index, item=item)
    add(f"response.{whole['status']}", response=whole)
    return events


def finish_reason(reply: ModelReply) -> str:
    """Return why a chat completion ended."""
    return {"max_tokens": "length", "tool": "tool_calls"}.get(reply.stop, "stop")


def chat_usage(call: ModelCall, usage: Usage) -> dict[str, Any]:
    """Return the usage of a chat completion."""
    prompt = {"cached_tokens": usage.cached, "audio_tokens": 0, "cache_write_tokens": cache_writes(call, usage)}
    details = {"reasoning_tokens": usage.reasoning, "audio_tokens": 0}
    details |= {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": prompt,
        "completion_tokens_details": details,
    }


def chat_tool_call(reply: ModelReply, tool: Tool) -> dict[str, Any]:
    """Return the call of a tool in a chat completion."""
    arguments = json.dumps(reply.tool_input, ensure_ascii=False)
    return {"id": f"call_{reply.id}", "type": "function", "function": {"name": tool.name, "arguments": arguments}}


def completion(call: ModelCall, reply: ModelReply) -> dict[str, Any]:
    """Return a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None, "annotations": []}
    if reply.refusal is not None:
        message |= {"content": None, "refusal": reply.refusal}
    if reply.tool is not None:
        message |= {"content": None, "tool_calls": [chat_tool_call(reply, reply.tool)]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": call.model,
        "choices": [choice],
        "usage": chat_usage(call, reply.usage),
        "service_tier": tier(call.body),
        "system_fingerprint": "fp_sandbox",
    }


def chat_events(call: ModelCall, reply: ModelReply) -> list[bytes]:
    """Return a chat completion as chunks, with the usage at the end where it was asked for."""
    wants_usage = bool((call.body.get("stream_options") or {}).get("include_usage"))
    head = {
        "id": f"chatcmpl-{reply.id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": call.model,
        "service_tier": tier(call.body),
        "system_fingerprint": "fp_sandbox",
    }
    head |= {"usage": None} if wants_usage else {}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice]})

    events = [chunk({"role": "assistant", "content": None if reply.tool else "", "refusal": None})]
    if reply.tool is not None:
        whole = chat_tool_call(reply, reply.tool)
        function = {"name": reply.tool.name, "arguments": ""}
        events.append(chunk({"tool_calls": [{"index": 0, **whole, "function": function}]}))
        for piece in pieces(whole["function"]["arguments"]):
            events.append(chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}))
    elif reply.refusal is not None:
        events += [chunk({"refusal": piece}) for piece in pieces(reply.refusal)]
    else:
        events += [chunk({"content": piece}) for piece in pieces(reply.text)]
    events.append(chunk({}, finish_reason(reply)))
    if wants_usage:
        events.append(event({**head, "choices": [], "usage": chat_usage(call, reply.usage)}))
    return [*events, b"data: [DONE]\n\n"]


# embeddings

_WORDS = re.compile(r"\w+")


def embedding(text: str, dimensions: int) -> array[float]:
    """Return a unit vector; texts that share words have similar ones."""
    vector = array("f", bytes(4 * dimensions))
    for word in _WORDS.findall(text.lower()) or [text]:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=24).digest()
        for at in range(0, 24, 3):
            place = int.from_bytes(digest[at : at + 2], "big") % dimensions
            vector[place] += 1.0 if digest[at + 2] & 1 else -1.0
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return array("f", (value / length for value in vector))


def embed(service: ModelService, request: Request, account: str, body: Mapping[str, Any]) -> Response:
    """Answer a request for embeddings.  Raises ProviderFailure."""
    model = check_model(body)
    given = body.get("input")
    texts_given = (
        [given]
        if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int))
        else given
    )
    if not isinstance(texts_given, list) or not texts_given:
        raise bad_request("'$.input' is invalid. Please check the API reference.", "input")
    inputs = [text if isinstance(text, str) else json.dumps(text) for text in texts_given]
    tokens = sum(max(1, tokens_in(text)) for text in inputs)
    size = body.get("dimensions") or (3072 if model.endswith("large") else 1536)
    data = []
    for index, text in enumerate(inputs):
        vector = embedding(text, int(size))
        plain = base64.b64encode(vector.tobytes()).decode() if body.get("encoding_format") == "base64" else list(vector)
        data.append({"object": "embedding", "index": index, "embedding": plain})
    now = time.time()
    gate = service.limits.gate("openai", account, model, now)
    request_id = service.request_id()
    entry = log_entry(request, "openai", account, "embeddings")
    entry |= {"request_id": request_id, "model": model, "prompt": inputs[0][:200]}
    entry["digest"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    denied = gate.admit({"requests": 1, "tokens": tokens, "input_tokens": tokens}, now)
    if denied is not None:
        return service.fail(WIRE_FORMAT, gate, WIRE_FORMAT.denial(denied, model), entry, now)
    gate.leave()
    usage = Usage(input=tokens)
    service.limits.spend("openai", account, tokens)
    service.log.charge(account, "openai", model, usage.to_dict())
    service.log.add({**entry, "status": 200, "usage": usage.to_dict(), "delivered": True})
    headers = {"content-type": "application/json", **WIRE_FORMAT.headers(gate.levels(now), request_id)}
    counted = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Response(200, dump({"object": "list", "data": data, "model": model, "usage": counted}), headers)


# requests


def authenticate(request: Request) -> str:
    """Return the API key.  Raises ProviderFailure."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        text = "You didn't provide an API key. You need to provide your API key in an Authorization header using "
        raise ProviderFailure(401, "invalid_request_error", text + "Bearer auth (i.e. Authorization: Bearer YOUR_KEY).")
    key = key.strip()
    if key.startswith("bad"):
        text = f"Incorrect API key provided: {key[:3]}***. You can find your API key at https://platform.openai.com/account/api-keys."
        raise ProviderFailure(401, "invalid_request_error", text, "invalid_api_key")
    if key.startswith("broke"):
        raise ProviderFailure(429, "insufficient_quota", QUOTA, "insufficient_quota")
    return key


def model_info(model: str) -> dict[str, Any]:
    """Return the description of a model."""
    return {"id": model, "object": "model", "created": 1_750_000_000, "owned_by": "openai"}


def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object that was sent.  Raises ProviderFailure."""
    try:
        body = json.loads(request.body)
    except ValueError:
        text = "We could not parse the JSON body of your request. The OpenAI API expects a JSON payload."
        raise bad_request(text) from None
    if not isinstance(body, dict):
        raise bad_request("Invalid type for the body: expected an object.")
    return body


async def handle(service: ModelService, request: Request) -> Response:
    """Answer a request to OpenAI."""
    key = request.headers.get("authorization", "").partition(" ")[2].strip()
    account = account_of(key)
    operation = request.path.removeprefix("/v1/").replace("/", ".")
    try:
        authenticate(request)
        if request.method == "GET" and operation == "models":
            return listed(
                service, request, account, {"object": "list", "data": [model_info(model) for model in MODELS]}
            )
        if request.method == "GET" and operation.startswith("models."):
            model = check_model({"model": request.path.removeprefix("/v1/models/")})
            return listed(service, request, account, model_info(model))
        if request.method == "POST" and operation == "embeddings":
            return embed(service, request, account, read_body(request))
        if request.method == "POST" and operation in ("responses", "chat.completions"):
            body = read_body(request)
            try:
                call = read_call(body, operation)
            except (AttributeError, KeyError, TypeError) as error:
                raise bad_request(f"The request has an unexpected shape: {error}") from error
            return await service.answer(WIRE_FORMAT, request, account, call)
        text = f"Invalid URL ({request.method} {request.path})"
        raise ProviderFailure(404, "invalid_request_error", text)
    except ProviderFailure as failure:
        entry = {**log_entry(request, "openai", account, operation), "request_id": service.request_id()}
        return service.fail(WIRE_FORMAT, None, failure, entry, time.time())


def listed(service: ModelService, request: Request, account: str, data: Mapping[str, Any]) -> Response:
    """Return a reply that costs nothing."""
    request_id = service.request_id()
    entry = log_entry(request, "openai", account, "models")
    service.log.add({**entry, "request_id": request_id, "status": 200, "delivered": True})
    return Response(200, dump(data), {"content-type": "application/json", **WIRE_FORMAT.headers({}, request_id)})
