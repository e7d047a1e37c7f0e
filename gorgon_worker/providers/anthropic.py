"""Anthropic through its official SDK.

Importing this module imports the SDK (0.7 s): use `providers.agent_providers`, or preload it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args
from urllib.parse import urlsplit

from gorgon_common import errors
from gorgon_common.engine.ports import AgentCall, AgentReply
from gorgon_common.roles.models import known_models, resolve_model
from gorgon_worker.providers import failures, schemas
from gorgon_worker.providers.calling import STREAM_ABOVE, Client, body_of, watched
from gorgon_worker.providers.deferred import deferred
from gorgon_worker.providers.failures import Answer, Server
from gorgon_worker.providers.replies import Heard, anthropic_usage, joined, mapping, text_of
from gorgon_worker.providers.transport import http_client

with deferred("anthropic"):
    import anthropic
    import anthropic.resources.messages.messages  # loaded here instead of by the first call
    from anthropic.types import Model

BASE_URL = "https://api.anthropic.com"

_STOPS = {
    "end_turn": "end",
    "stop_sequence": "end",
    "max_tokens": "max_tokens",
    "refusal": "refusal",
    "pause_turn": "pause",
    "model_context_window_exceeded": "context",
}
"""Its stop reasons → ours.  Another word is passed on as it is, and is no success."""
_EFFORTS = {"none": "low", "minimal": "low"}
"""Words that only OpenAI has → the nearest here."""


class AnthropicProvider:
    """`ports.AgentProvider` for Anthropic.

    `idle_connections` are kept open between calls; there is no limit on calls at once.  Above `stream_above` output
    tokens a reply is streamed.
    """

    name = "anthropic"

    def __init__(
        self,
        *,
        api_key: str | None,
        base_url: str | None = None,
        sandbox: bool = False,
        idle_connections: int = 100,
        stream_above: int = STREAM_ABOVE,
    ) -> None:
        url = base_url or BASE_URL
        official = (urlsplit(url).hostname or "").endswith("anthropic.com")
        self._stream_above = stream_above
        self._key = (api_key or "").strip() or (None if official else "none")
        self._server = Server(
            label="the sandbox" if sandbox else "Anthropic" if official else "the Anthropic-compatible server",
            url=url,
            key_variable="ANTHROPIC_API_KEY",
            url_variable="GORGON_SANDBOX_URL" if sandbox else "ANTHROPIC_BASE_URL",
            models=failures.known_models(known_models("anthropic"), get_args(get_args(Model)[0])),
            sandbox=sandbox,
            official=official or sandbox,
        )
        self._client = Client(lambda: self._connect(idle_connections))

    def _connect(self, idle_connections: int) -> anthropic.Anthropic:
        return anthropic.Anthropic(
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
        return watched(
            self._server,
            call,
            cancelled,
            lambda heard: self._by_messages(call, heard),
            sdk_error=anthropic.AnthropicError,
        )

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def problem(self) -> errors.ProviderError | None:
        """Return problems that would fail every call (a missing key), without making one."""
        return failures.missing_key(self._server) if self._key is None else None

    def _by_messages(self, call: AgentCall, heard: Heard) -> AgentReply:
        form = schemas.anthropic_form(call.schema) if call.schema is not None else None
        request: dict[str, Any] = {
            "model": resolve_model("anthropic", call.model),
            "messages": [{"role": message.role, "content": message.content} for message in call.messages],
            "max_tokens": call.max_tokens,
            "timeout": call.timeout,
        }
        words = schemas.in_words(form.original) if form is not None and form.native is None else None
        system = "\n\n".join(part for part in (call.system, words) if part)
        if system:
            request["system"] = system
        output: dict[str, Any] = {}
        if form is not None and form.native is not None:
            output["format"] = {"type": "json_schema", "schema": form.native}
        if call.effort:
            output["effort"] = _EFFORTS.get(call.effort, call.effort)
        if output:
            request["output_config"] = output
        streamed = call.max_tokens > self._stream_above
        raw = self._client.get().messages.with_raw_response.create(**request, **({"stream": True} if streamed else {}))
        heard.headers = {name.lower(): value for name, value in raw.headers.items()}
        heard.request_id = heard.headers.get("request-id")
        body = body_of(raw, streamed=streamed)
        if body is None:
            body = self._joined(raw.parse(), heard)
        return self._reply(call, form, body, heard)

    def _joined(self, events: Any, heard: Heard) -> dict[str, Any]:
        """Put a stream of events together to the body that a call in one piece would have had."""
        text: list[str] = []
        body: dict[str, Any] = {}
        complete = False
        with events:
            for received in events:
                event = received.to_dict(mode="python", warnings=False)
                heard.begun = True
                for name, kind in (("content_block", "text"), ("delta", "text_delta")):
                    part = mapping(event.get(name))
                    if part.get("type") == kind:
                        text.append(str(part.get("text") or ""))
                if event.get("type") == "message_start":
                    body = dict(mapping(event.get("message")))
                elif event.get("type") == "message_delta":
                    usage = {name: value for name, value in mapping(event.get("usage")).items() if value is not None}
                    delta = {name: value for name, value in mapping(event.get("delta")).items() if value is not None}
                    body = {**body, **delta, "usage": {**mapping(body.get("usage")), **usage}}
                elif event.get("type") == "message_stop":
                    complete = True
        if not complete:
            raise failures.broken_off(self._server, "the stream ended without a last event")
        return {**body, "content": [{"type": "text", "text": joined(text)}]}

    def _reply(self, call: AgentCall, form: schemas.Form | None, body: Any, heard: Heard) -> AgentReply:
        entry = mapping(body)
        usage = mapping(entry.get("usage"))
        heard.note(entry, service_tier=usage.get("service_tier"))
        content = entry.get("content")
        text = joined([text_of(content) or ""])
        heard.usage = anthropic_usage(usage, text=text)
        if entry.get("error") or entry.get("type") == "error":
            code, kind, said = failures.body_error(entry)
            answer = Answer(200, code, kind, said, heard.headers, heard.request_id, begun=bool(content))
            raise failures.from_answer(self._server, call.model, answer)
        if not isinstance(content, (list, str)):
            raise failures.unreadable(self._server, "there is no `content` in it")
        reason = str(entry.get("stop_reason") or "no stop_reason")
        stop = _STOPS.get(reason, reason)
        if stop == "refusal":
            text = str(mapping(entry.get("stop_details")).get("explanation") or text)
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
