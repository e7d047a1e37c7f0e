"""OpenAI, and every server that speaks its API, through the official SDK.

Two of its APIs: Responses, which is OpenAI's own, and chat completions, which compatible servers speak (Ollama, vLLM).
Importing this module imports the SDK (two thirds of a second): use `providers.agent_providers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

from gorgon_common import errors
from gorgon_common.engine.ports import AgentCall, AgentReply
from gorgon_common.roles.models import known_models, resolve_model
from gorgon_worker.providers import failures, schemas
from gorgon_worker.providers.calling import STREAM_ABOVE, Client, body_of, watched
from gorgon_worker.providers.deferred import deferred
from gorgon_worker.providers.failures import Answer, Server
from gorgon_worker.providers.replies import Heard, joined, mapping, openai_usage, refusal_of, text_of
from gorgon_worker.providers.transport import http_client

with deferred("openai"):
    import openai
    import openai.resources.chat.completions  # both are loaded here instead of by the first call
    import openai.resources.responses
    from openai.types import ChatModel

BASE_URL = "https://api.openai.com/v1"

_STOPS = {
    "stop": "end",
    "eos": "end",
    "eos_token": "end",
    "end_turn": "end",
    "stop_sequence": "end",
    "length": "max_tokens",
    "max_tokens": "max_tokens",
    "model_length": "context",
    "content_filter": "refusal",
}
"""What servers give as `finish_reason` → ours.  Another word is passed on as it is, and is no success."""
_FAILED = frozenset({"error", "abort", "aborted", "cancelled", "canceled", "timeout", "insufficient_system_resource"})
_LAST_EVENTS = frozenset(f"response.{status}" for status in ("completed", "incomplete", "failed", "cancelled"))
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
        return watched(self._server, call, cancelled, lambda heard: attempt(call, heard), sdk_error=openai.OpenAIError)

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def problem(self) -> errors.ProviderError | None:
        """Return problems that would fail every call (a missing key), without making one."""
        return failures.missing_key(self._server) if self._key is None else None

    # Responses

    def _by_responses(self, call: AgentCall, heard: Heard) -> AgentReply:
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
        streamed = call.max_tokens > self._stream_above
        raw = self._client.get().responses.with_raw_response.create(**request, **({"stream": True} if streamed else {}))
        _headers(heard, raw)
        body = body_of(raw, streamed=streamed)
        if body is None:
            body = self._last_event(call, raw.parse(), heard)
        return self._reply_of_response(call, form, body, heard)

    def _last_event(self, call: AgentCall, events: Any, heard: Heard) -> Any:
        with events:
            for received in events:
                event = received.to_dict(mode="python", warnings=False)
                kind = str(event.get("type"))
                if kind in _LAST_EVENTS:
                    return event.get("response")
                if kind == "error":
                    raise self._error_within(call, event, heard)
                heard.begun = heard.begun or kind.endswith(".delta")
        raise failures.broken_off(self._server, "the stream ended without a last event")

    def _reply_of_response(self, call: AgentCall, form: schemas.Form | None, body: Any, heard: Heard) -> AgentReply:
        entry = mapping(body)
        heard.note(entry, service_tier=entry.get("service_tier"))
        items = [mapping(item) for item in entry["output"]] if isinstance(entry.get("output"), list) else []
        messages = [item for item in items if item.get("type") == "message"]
        heard.begun = heard.begun or bool(messages)
        text = joined([text_of(item.get("content")) or "" for item in messages])
        heard.usage = openai_usage(entry.get("usage"), "input_tokens", "output_tokens", text=text)
        if entry.get("error"):
            raise self._error_within(call, entry, heard)
        status = entry.get("status")
        if status == "failed":
            raise failures.gave_up(self._server, call.model, "failed")
        if not isinstance(entry.get("output"), list):
            raise failures.unreadable(self._server, "there is no `output` in it")
        refusal = joined([refusal_of(item.get("content")) for item in messages])
        whole = all(item.get("status") in (None, "completed") for item in messages)
        if refusal:
            stop = "refusal"
        elif status == "incomplete":
            reason = str(mapping(entry.get("incomplete_details")).get("reason") or "incomplete")
            stop = _INCOMPLETE.get(reason, reason)
        elif status == "completed":
            stop = "end" if whole else "incomplete"
        else:
            raise failures.unreadable(self._server, f"its status is {status!r}")
        return _reply(call, form, refusal or text, stop, heard)

    # Chat completions

    def _by_chat(self, call: AgentCall, heard: Heard) -> AgentReply:
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
        streamed = call.max_tokens > self._stream_above
        if streamed:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        raw = self._client.get().chat.completions.with_raw_response.create(**request)
        _headers(heard, raw)
        body = body_of(raw, streamed=streamed)
        if body is None:
            body = self._joined(raw.parse(), heard)
        return self._reply_of_chat(call, form, body, heard)

    def _max_tokens(self, model: str) -> str:
        """OpenAI refuses the older name for its newer models, behind a gateway too; other servers may know no other."""
        return "max_completion_tokens" if self._official or model in get_args(ChatModel) else "max_tokens"

    def _joined(self, chunks: Any, heard: Heard) -> dict[str, Any]:
        """Put a stream of chunks together to the body that a call in one piece would have had."""
        said: dict[str, list[str]] = {"content": [], "refusal": []}
        body: dict[str, Any] = {}
        choice: dict[str, Any] = {}
        closed, odd = False, None
        with chunks:
            for received in chunks:
                chunk = received.to_dict(mode="python", warnings=False)
                closed = closed or bool(chunk.get("usage") and not chunk.get("choices"))
                body |= {name: value for name, value in chunk.items() if value is not None and name != "choices"}
                for entry in map(mapping, chunk.get("choices") or ()):
                    if entry.get("index") not in (None, 0):
                        continue
                    heard.begun = True
                    delta = mapping(entry.get("delta"))
                    for name, parts in said.items():
                        text = text_of(delta.get(name))
                        parts.append(text or "")
                        odd = delta[name] if text is None else odd
                    for name in ("finish_reason", "error"):
                        choice[name] = entry.get(name) or choice.get(name)
        if not (closed or choice.get("finish_reason") or choice.get("error")):
            raise failures.broken_off(self._server, "the stream ended without a reason")
        message = {
            "content": joined(said["content"]) if odd is None else odd,
            "refusal": joined(said["refusal"]) or None,
        }
        return {**body, "choices": [{**choice, "message": message}]}

    def _reply_of_chat(self, call: AgentCall, form: schemas.Form | None, body: Any, heard: Heard) -> AgentReply:
        entry = mapping(body)
        heard.note(entry, service_tier=entry.get("service_tier"))
        choices = entry.get("choices")
        first = mapping(choices[0] if isinstance(choices, list) and choices else None)
        heard.begun = heard.begun or bool(first)
        message = mapping(first.get("message"))
        content = text_of(message.get("content"))
        text = joined([content or ""])
        refusal = joined([text_of(message.get("refusal")) or refusal_of(message.get("content"))])
        heard.usage = openai_usage(entry.get("usage"), "prompt_tokens", "completion_tokens", text=text or refusal)
        for part in (entry, first):
            if part.get("error"):
                raise self._error_within(call, part, heard)
        if "message" not in first:
            raise failures.unreadable(self._server, "there is no `choices[0].message` in it")
        if content is None:
            raise failures.unreadable(self._server, "`content` is neither a text nor a list of parts")
        finish = str(first.get("finish_reason") or "no finish_reason")
        if finish.lower() in _FAILED:
            raise failures.gave_up(self._server, call.model, finish)
        stop = "refusal" if refusal else _STOPS.get(finish.lower(), finish)
        return _reply(call, form, refusal or text, stop, heard)

    def _error_within(self, call: AgentCall, body: Mapping[str, Any], heard: Heard) -> errors.ProviderError:
        code, kind, said = failures.body_error(body)
        answer = Answer(200, code, kind, said, heard.headers, heard.request_id, begun=heard.begun)
        return failures.from_answer(self._server, call.model, answer)


def _reply(call: AgentCall, form: schemas.Form | None, text: str, stop: str, heard: Heard) -> AgentReply:
    return AgentReply(
        text=text,
        usage=heard.usage,
        model=heard.model or call.model,
        data=form.restore(schemas.read_json(text)) if form is not None and stop == "end" else None,
        stop_reason=stop,
        service_tier=heard.service_tier,
        request_id=heard.request_id,
        headers=failures.rate_headers(heard.headers),
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


def _headers(heard: Heard, raw: Any) -> None:
    heard.headers = {name.lower(): value for name, value in raw.headers.items()}
    heard.request_id = heard.headers.get("x-request-id")
