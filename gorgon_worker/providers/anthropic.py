"""Anthropic through its official SDK.

Importing this module imports the SDK (1.7 s): use `providers.agent_providers`, or preload it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

import anthropic
from anthropic.types import Model

from gorgon_common import errors
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.ports import AgentCall, AgentReply
from gorgon_common.roles.models import known_models, resolve_model
from gorgon_worker.providers import failures, schemas
from gorgon_worker.providers.calling import STREAM_ABOVE, Client, watched
from gorgon_worker.providers.failures import Server
from gorgon_worker.providers.transport import http_client

BASE_URL = "https://api.anthropic.com"

_STOPS = {
    "end_turn": "end",
    "stop_sequence": "end",
    "tool_use": "end",
    "max_tokens": "max_tokens",
    "refusal": "refusal",
    "pause_turn": "pause",
    "model_context_window_exceeded": "context",
}
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
            self._server, call, cancelled, lambda: self._by_messages(call), sdk_error=anthropic.AnthropicError
        )

    def close(self) -> None:
        """Release the connections."""
        self._client.close()

    def problem(self) -> errors.ProviderError | None:
        """Return problems that would fail every call (a missing key), without making one."""
        return failures.missing_key(self._server) if self._key is None else None

    def _by_messages(self, call: AgentCall) -> AgentReply:
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
        create = self._client.get().messages.with_raw_response.create
        if call.max_tokens > self._stream_above:
            raw = create(**request, stream=True)
            body = self._joined(raw.parse())
        else:
            raw = create(**request)
            body = raw.http_response.json()
        return self._reply(call, form, body, {name.lower(): value for name, value in raw.headers.items()})

    def _joined(self, events: Any) -> dict[str, Any]:
        """Put a stream of events together to the body that a call in one piece would have had."""
        text: list[str] = []
        body: dict[str, Any] = {}
        complete = False
        with events:
            for event in events:
                if event.type == "content_block_delta":
                    if event.delta.type == "text_delta":
                        text.append(event.delta.text)
                elif event.type == "message_start":
                    body = event.message.to_dict(mode="json")
                elif event.type == "message_delta":
                    delta = event.to_dict(mode="json")
                    usage = {name: value for name, value in (delta.get("usage") or {}).items() if value is not None}
                    body = {**body, **(delta.get("delta") or {}), "usage": {**(body.get("usage") or {}), **usage}}
                elif event.type == "message_stop":
                    complete = True
        if not complete:
            raise failures.broken_off(self._server, "the stream ended without a last event")
        return {**body, "content": [{"type": "text", "text": "".join(text)}]}

    def _reply(self, call: AgentCall, form: schemas.Form | None, body: Any, headers: Mapping[str, str]) -> AgentReply:
        request_id = headers.get("request-id")
        if not isinstance(body, dict) or not isinstance(body.get("content"), list):
            raise failures.unreadable(self._server, "there is no `content` in it", request_id)
        stop = _STOPS.get(str(body.get("stop_reason")), "end")
        text = "".join(
            str(block.get("text") or "")
            for block in body["content"]
            if isinstance(block, dict) and block.get("type") == "text"
        )
        if stop == "refusal":
            text = str((body.get("stop_details") or {}).get("explanation") or text)
        usage = body.get("usage")
        return AgentReply(
            text=text,
            usage=_usage(usage if isinstance(usage, dict) else {}),
            model=str(body.get("model") or call.model),
            data=form.restore(schemas.read_json(text)) if form is not None and stop == "end" else None,
            stop_reason=stop,
            service_tier=usage.get("service_tier") if isinstance(usage, dict) else None,
            request_id=request_id or body.get("id"),
            headers=failures.rate_headers(headers),
        )


def _usage(entry: Mapping[str, Any]) -> Usage:
    """Anthropic's input tokens are those that no cache had to do with; ours are all of them."""
    read = int(entry.get("cache_read_input_tokens") or 0)
    written = int(entry.get("cache_creation_input_tokens") or 0)
    hour = int((entry.get("cache_creation") or {}).get("ephemeral_1h_input_tokens") or 0)
    return Usage(
        input_tokens=int(entry.get("input_tokens") or 0) + read + written,
        cache_read_tokens=read,
        cache_write_5m_tokens=max(0, written - hour),
        cache_write_1h_tokens=hour,
        output_tokens=int(entry.get("output_tokens") or 0),
        reasoning_tokens=int((entry.get("output_tokens_details") or {}).get("thinking_tokens") or 0),
    )
