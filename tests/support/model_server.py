"""A server on loopback that replies exactly as a test specifies, in the wire formats of both model providers.

The sandbox chooses its own replies.  This server does not, so that tests of the adapters control every byte.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Seen:
    """A received request; header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Say:
    """The server's reaction to one request.

    `reply` is a dict of `text`, `stop`, `usage`, … in a provider-neutral form (see `FORMS`).  Its `raw_usage`,
    `raw_stop` and `raw_text` are sent unchanged, as are the additions to the body in `raw_more`, and `raw`.  `end`:
    whole | drop (after reading the request) | truncate (half of the body) | hang (until the server is closed) | late
    (whole, after `release`).
    """

    status: int = 200
    reply: dict[str, Any] | None = None
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    end: str = "whole"


class ModelServer:
    """`say` sets the next reactions; `seen` has the requests.  By default the reply is "pong"."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.asked = threading.Event()
        self.closing = threading.Event()
        self.release = threading.Event()
        self._next: deque[Say] = deque()
        self._lock = threading.Lock()
        self.url = ""

    def say(self, *words: Say) -> None:
        self._next.extend(words)

    def take(self, seen: Seen) -> Say:
        with self._lock:
            self.seen.append(seen)
            said = self._next.popleft() if self._next else Say(reply={"text": "pong"})
        self.asked.set()
        return said


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: clients that hang up are part of the tests."""


@contextlib.contextmanager
def model_server(*, certificate: Path | None = None) -> Iterator[ModelServer]:
    """Run a server on a free port of 127.0.0.1; with a certificate (and its key in the same file) over TLS."""
    server = ModelServer()
    http = _Http(("127.0.0.1", 0), _handler(server))
    server.url = f"{'https' if certificate else 'http'}://127.0.0.1:{http.server_address[1]}"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The connection's own thread does the handshake.
        http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        thread.join()
        http.server_close()


def _handler(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            said = server.take(Seen(self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            if said.end == "late":
                server.release.wait(30)
            if said.end == "hang":
                server.closing.wait(30)
            if said.end in ("hang", "drop"):
                self.close_connection = True
                return
            data, kind = _payload(self.path, body, said)
            self.send_response(said.status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if said.end == "truncate":
                self.close_connection = True
                data = data[: len(data) // 2]
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _payload(path: str, asked: dict[str, Any], said: Say) -> tuple[bytes, str]:
    if said.raw is not None:
        return said.raw, "application/json"
    stream = bool(asked.get("stream"))
    form = next(form for end, form in FORMS.items() if path.endswith(end))
    made = form(asked.get("model", ""), {"stop": "end", "usage": {}, "text": "", **(said.reply or {})}, stream)
    if stream:
        return "".join(made).encode(), "text/event-stream"
    return json.dumps(made).encode(), "application/json"


def _responses(model: str, reply: dict[str, Any], stream: bool) -> Any:
    usage = reply["usage"]
    part = {"type": "output_text", "text": reply["text"], "annotations": []}
    if reply["stop"] == "refusal":
        part = {"type": "refusal", "refusal": reply["text"]}
    cut = reply["stop"] == "max_tokens"
    body = {
        "id": "resp_1", "object": "response", "created_at": 0, "model": reply.get("model", model),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None, "parallel_tool_calls": False, "tool_choice": "auto", "tools": [],
        "output": [
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]},
        ],
        "service_tier": reply.get("tier", "default"),
        "usage": reply["raw_usage"] if "raw_usage" in reply else {
            "input_tokens": usage.get("input", 0), "output_tokens": usage.get("output", 0),
            "input_tokens_details": _cached(usage),
            "output_tokens_details": {"reasoning_tokens": usage.get("reasoning", 0)},
            "total_tokens": usage.get("input", 0) + usage.get("output", 0),
        },
        **reply.get("raw_more", {}),
    }  # fmt: skip
    if "raw_stop" in reply:
        body |= {"status": "incomplete", "incomplete_details": {"reason": reply["raw_stop"]}}
    if not stream:
        return body
    last = {"type": "response.incomplete" if cut else "response.completed", "sequence_number": 2, "response": body}
    delta = {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "msg_1", "output_index": 1,
             "content_index": 0, "delta": reply["text"], "logprobs": []}  # fmt: skip
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in (delta, last)]


def _cached(usage: dict[str, int]) -> dict[str, int]:
    return {"cached_tokens": usage.get("cached", 0), "cache_write_tokens": usage.get("written", 0)}


def _chat(model: str, reply: dict[str, Any], stream: bool) -> Any:
    usage = reply["usage"]
    finish = {"end": "stop", "max_tokens": "length", "refusal": "stop"}[reply["stop"]]
    finish = reply.get("raw_stop", finish)
    said = {"refusal" if reply["stop"] == "refusal" else "content": reply.get("raw_text", reply["text"])}
    counted = {
        "prompt_tokens": usage.get("input", 0), "completion_tokens": usage.get("output", 0),
        "total_tokens": usage.get("input", 0) + usage.get("output", 0),
        "prompt_tokens_details": _cached(usage),
        "completion_tokens_details": {"reasoning_tokens": usage.get("reasoning", 0)},
    }  # fmt: skip
    if "raw_usage" in reply:
        counted = reply["raw_usage"]
    shared = {"id": "chatcmpl-1", "created": 0, "model": reply.get("model", model)}
    more = {"usage": counted, "service_tier": reply.get("tier", "default"), **reply.get("raw_more", {})}
    if not stream:
        choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": finish, "logprobs": None}
        return {**shared, "object": "chat.completion", "choices": [choice], **more}
    chunks = [
        {**shared, "choices": [{"index": 0, "delta": {"role": "assistant", **said}, "finish_reason": None}]},
        {**shared, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
        {**shared, "choices": [], **more},
    ]
    lines = [json.dumps({**chunk, "object": "chat.completion.chunk"}) for chunk in chunks]
    return [f"data: {line}\n\n" for line in (*lines, "[DONE]")]


def _messages(model: str, reply: dict[str, Any], stream: bool) -> Any:
    usage = reply["usage"]
    stop = {"end": "end_turn", "max_tokens": "max_tokens", "refusal": "refusal",
            "context": "model_context_window_exceeded", "pause": "pause_turn"}[reply["stop"]]  # fmt: skip
    counted = {
        "input_tokens": usage.get("input", 0) - usage.get("cached", 0) - usage.get("written", 0),
        "cache_read_input_tokens": usage.get("cached", 0),
        "cache_creation_input_tokens": usage.get("written", 0),
        "cache_creation": {"ephemeral_5m_input_tokens": usage.get("written", 0) - usage.get("hour", 0),
                           "ephemeral_1h_input_tokens": usage.get("hour", 0)},
        "output_tokens": usage.get("output", 0),
        "output_tokens_details": {"thinking_tokens": usage.get("reasoning", 0)},
        "service_tier": reply.get("tier", "standard"),
    }  # fmt: skip
    stop = reply.get("raw_stop", stop)
    start_usage: Any = {**counted, "output_tokens": 1}
    last_usage: Any = {name: counted[name] for name in ("output_tokens", "output_tokens_details")}
    whole: Any = counted
    if "raw_usage" in reply:
        start_usage = last_usage = whole = reply["raw_usage"]
    refused = reply["stop"] == "refusal"
    details = {"type": "refusal", "category": "cyber", "explanation": reply["text"]} if refused else None
    block = {"type": "text", "text": "" if refused else reply.get("raw_text", reply["text"])}
    body = {"id": "msg_1", "type": "message", "role": "assistant", "model": reply.get("model", model),
            "content": [block], "stop_reason": stop, "stop_sequence": None, "stop_details": details,
            "usage": whole, **reply.get("raw_more", {})}  # fmt: skip
    if not stream:
        return body
    start = {**body, "content": [], "stop_reason": None, "stop_details": None, "usage": start_usage}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": block | {"type": "text_delta"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None, "stop_details": details},
         "usage": last_usage},
        {"type": "message_stop"},
    ]  # fmt: skip
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]


FORMS: dict[str, Callable[[str, dict[str, Any], bool], Any]] = {
    "/responses": _responses,
    "/chat/completions": _chat,
    "/messages": _messages,
}


def error_body(provider: str, kind: str, message: str) -> bytes:
    """Return an error in the provider's format; `kind` is its code (OpenAI) or type (Anthropic)."""
    if provider == "openai":
        return json.dumps({"error": {"message": message, "type": kind, "code": kind, "param": None}}).encode()
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}).encode()
