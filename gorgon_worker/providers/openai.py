"""OpenAI, and every server that speaks its API, through the official SDK.

Two of its APIs: Responses, which is OpenAI's own, and chat completions, which compatible servers speak (Ollama, vLLM).
Importing this module imports the SDK (two thirds of a second): use `providers.agent_providers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

import openai
import openai.resources.responses  # loaded here instead of by the first call: it takes a tenth of a second
from openai.types import ChatModel

from gorgon_common import errors
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.ports import AgentCall, AgentReply
from gorgon_common.roles.models import known_models, resolve_model
from gorgon_worker.providers import failures, schemas
from gorgon_worker.providers.calling import STREAM_ABOVE, Client, watched
from gorgon_worker.providers.failures import Answer, Server
from gorgon_worker.providers.transport import http_client

BASE_URL = "https://api.openai.com/v1"

_STOPS = {"stop": "end", "tool_calls": "end", "length": "max_tokens", "content_filter": "refusal"}
_INCOMPLETE = {"max_output_tokens": "max_tokens", "content_filter": "refusal"}


class OpenAIProvider:
    """`ports.AgentProvider` for OpenAI.

    `api`: `responses`, `chat`, or `auto`, which is chat where `base_url` is neither OpenAI's nor the sandbox.  A
    compatible server needs no key.  `idle_connections` are kept open between calls; there is no limit on calls at once.
    """

    name = "openai"

    def __init__(
        self,
        *,
        api_key: str | None,
        base_url: str | None = None,
        sandbox: bool = False,
        api: str = "auto",
        idle_connections: int = 100,
        stream_above: int = STREAM_ABOVE,
    ) -> None:
        url = base_url or BASE_URL
        official = (urlsplit(url).hostname or "").endswith("openai.com")
        if api not in ("auto", "responses", "chat"):
            raise errors.ConfigurationError(f"api is {api!r}.", hint="It is responses, chat or auto.")
        self._chat = api == "chat" or (api == "auto" and not official and not sandbox)
        self._official = official
        self._stream_above = stream_above
        self._key = (api_key or "").strip() or (None if official else "none")
        self._server = Server(
            label="the sandbox" if sandbox else "OpenAI" if official else "the OpenAI-compatible server",
            url=url,
            key_variable="OPENAI_API_KEY",
            url_variable="GORGON_SANDBOX_URL" if sandbox else "OPENAI_BASE_URL",
            models=failures.known_models(known_models("openai"), get_args(ChatModel)),
            sandbox=sandbox,
            official=official or sandbox,
        )
        self._client = Client(lambda: self._connect(idle_connections))

    def _connect(self, idle_connections: int) -> openai.OpenAI:
        return openai.OpenAI(
            api_key=self._key,
            base_url=self._server.url,
            max_retries=0,  # a hidden retry would bypass the budget, the limiter and the lease
            http_client=http_client(self._server.url, idle_connections=idle_connections),
        )

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        """Make the call and return the reply; see `ports.AgentProvider`."""
        if self._key is None:
            raise failures.missing_key(self._server)
        if not (self._key.isascii() and self._key.isprintable()):
            raise failures.unsendable_key(self._server)
        attempt = self._by_chat if self._chat else self._by_responses
        return watched(self._server, call, cancelled, lambda: attempt(call), sdk_error=openai.OpenAIError)

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def problem(self) -> errors.ProviderError | None:
        """Return problems that would fail every call (a missing key), without making one."""
        return failures.missing_key(self._server) if self._key is None else None

    # Responses

    def _by_responses(self, call: AgentCall) -> AgentReply:
        form = schemas.openai_form(call.schema) if call.schema is not None else None
        request: dict[str, Any] = {
            "model": resolve_model("openai", call.model),
            "input": [{"role": message.role, "content": message.content} for message in call.messages],
            "max_output_tokens": call.max_tokens,
            "store": False,
            "timeout": call.timeout,
        }
        system = _system(call, form)
        if system:
            request["instructions"] = system
        if form is not None and (asked := _json_schema(call, form)):
            request["text"] = {"format": {"type": "json_schema", **asked}}
        if call.effort:
            request["reasoning"] = {"effort": call.effort}
        create = self._client.get().responses.with_raw_response.create
        if call.max_tokens > self._stream_above:
            raw = create(**request, stream=True)
            body = self._last_event(raw.parse())
        else:
            raw = create(**request)
            body = raw.http_response.json()
        return self._reply_of_response(call, form, body, _lower(raw.headers))

    def _last_event(self, events: Any) -> Any:
        with events:
            for event in events:
                if event.type in ("response.completed", "response.incomplete", "response.failed"):
                    return event.response.to_dict(mode="json")
        raise failures.broken_off(self._server, "the stream ended without a last event")

    def _reply_of_response(
        self, call: AgentCall, form: schemas.Form | None, body: Any, headers: Mapping[str, str]
    ) -> AgentReply:
        request_id = headers.get("x-request-id")
        if not isinstance(body, dict) or not isinstance(body.get("output"), list):
            raise failures.unreadable(self._server, "there is no `output` in it", request_id)
        usage = _usage(body.get("usage"), "input_tokens", "output_tokens")
        status = body.get("status")
        if status == "failed":
            code, kind, said = failures.body_error(body.get("error"))
            error = failures.from_answer(self._server, call.model, Answer(200, code, kind, said, headers, request_id))
            error.usage = usage
            raise error
        parts = [
            part
            for item in body["output"]
            if isinstance(item, dict)
            for part in item.get("content") or ()
            if item.get("type") == "message" and isinstance(part, dict)
        ]
        refusals = [str(part.get("refusal") or "") for part in parts if part.get("type") == "refusal"]
        text = "".join(str(part.get("text") or "") for part in parts if part.get("type") == "output_text")
        if refusals:
            stop = "refusal"
        elif status == "incomplete":
            stop = _INCOMPLETE.get(str((body.get("incomplete_details") or {}).get("reason")), "max_tokens")
        elif status == "completed":
            stop = "end"
        else:
            raise failures.unreadable(self._server, f"its status is {status!r}", request_id)
        return _reply(call, form, " ".join(refusals) if refusals else text, stop, usage, body, headers)

    # Chat completions

    def _by_chat(self, call: AgentCall) -> AgentReply:
        form = schemas.openai_form(call.schema) if call.schema is not None else None
        system = _system(call, form)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": message.role, "content": message.content} for message in call.messages]
        model = resolve_model("openai", call.model)
        request: dict[str, Any] = {
            "model": model,
            "messages": messages,
            self._max_tokens(model): call.max_tokens,
            "timeout": call.timeout,
        }
        if form is not None and (asked := _json_schema(call, form)):
            request["response_format"] = {"type": "json_schema", "json_schema": asked}
        if call.effort:
            request["reasoning_effort"] = call.effort
        create = self._client.get().chat.completions.with_raw_response.create
        if call.max_tokens > self._stream_above:
            raw = create(**request, stream=True, stream_options={"include_usage": True})
            body = self._joined(raw.parse())
        else:
            raw = create(**request)
            body = raw.http_response.json()
        return self._reply_of_chat(call, form, body, _lower(raw.headers))

    def _max_tokens(self, model: str) -> str:
        """OpenAI refuses the older name for its newer models, behind a gateway too; other servers may know no other."""
        return "max_completion_tokens" if self._official or model in get_args(ChatModel) else "max_tokens"

    def _joined(self, chunks: Any) -> dict[str, Any]:
        """Put a stream of chunks together to the body that a call in one piece would have had."""
        text: list[str] = []
        refusal: list[str] = []
        body: dict[str, Any] = {}
        finish = None
        with chunks:
            for chunk in chunks:
                body["model"] = chunk.model
                if chunk.usage is not None:
                    body["usage"] = chunk.usage.to_dict(mode="json")
                for choice in chunk.choices[:1]:
                    text.append(choice.delta.content or "")
                    refusal.append(choice.delta.refusal or "")
                    finish = choice.finish_reason or finish
        if finish is None:
            raise failures.broken_off(self._server, "the stream ended without a reason")
        message = {"content": "".join(text), "refusal": "".join(refusal) or None}
        return {**body, "choices": [{"message": message, "finish_reason": finish}]}

    def _reply_of_chat(
        self, call: AgentCall, form: schemas.Form | None, body: Any, headers: Mapping[str, str]
    ) -> AgentReply:
        choices = body.get("choices") if isinstance(body, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        message = first.get("message") if isinstance(first, dict) else None
        if not isinstance(first, dict) or not isinstance(message, dict):
            raise failures.unreadable(
                self._server, "there is no `choices[0].message` in it", headers.get("x-request-id")
            )
        stop = "refusal" if message.get("refusal") else _STOPS.get(str(first.get("finish_reason")), "end")
        usage = _usage(body.get("usage"), "prompt_tokens", "completion_tokens")
        text = str(message.get("refusal") or message.get("content") or "")
        return _reply(call, form, text, stop, usage, body, headers)


def _reply(
    call: AgentCall,
    form: schemas.Form | None,
    text: str,
    stop: str,
    usage: Usage,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
) -> AgentReply:
    return AgentReply(
        text=text,
        usage=usage,
        model=str(body.get("model") or call.model),
        data=form.restore(schemas.read_json(text)) if form is not None and stop == "end" else None,
        stop_reason=stop,
        service_tier=body.get("service_tier"),
        request_id=headers.get("x-request-id") or body.get("id"),
        headers=failures.rate_headers(headers),
    )


def _system(call: AgentCall, form: schemas.Form | None) -> str:
    words = schemas.in_words(form.original) if form is not None and form.native is None else None
    return "\n\n".join(part for part in (call.system, words) if part)


def _json_schema(call: AgentCall, form: schemas.Form) -> dict[str, Any] | None:
    """The format to ask for.  What is not strict must have an object at its root; else the words must do."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", call.role or "reply")[:64]
    if form.native is not None:
        return {"name": name, "schema": form.native, "strict": True}
    if form.original.get("type") == "object":
        return {"name": name, "schema": dict(form.original), "strict": False}
    return None


def _usage(entry: Any, read: str, written: str) -> Usage:
    entry = entry if isinstance(entry, dict) else {}
    inputs = entry.get(f"{read}_details") or {}
    outputs = entry.get(f"{written}_details") or {}
    kept_12h = int((inputs.get("cache_write_tokens_details") or {}).get("ttl_12h_tokens") or 0)
    return Usage(
        input_tokens=int(entry.get(read) or 0),
        cache_read_tokens=int(inputs.get("cached_tokens") or 0),
        cache_write_5m_tokens=max(0, int(inputs.get("cache_write_tokens") or 0) - kept_12h),
        cache_write_1h_tokens=kept_12h,
        output_tokens=int(entry.get(written) or 0),
        reasoning_tokens=int(outputs.get("reasoning_tokens") or 0),
    )


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
