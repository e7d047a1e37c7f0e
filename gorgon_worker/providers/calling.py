"""What the adapters of both model SDKs do alike: watch the call, and translate whatever it raises."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2

from gorgon_common import errors
from gorgon_common.engine.ports import AgentCall, AgentReply
from gorgon_common.masking import SECRETS, redact
from gorgon_worker.providers import failures
from gorgon_worker.providers.failures import Answer, Server
from gorgon_worker.providers.replies import Heard
from gorgon_worker.providers.transport import Watch, watching

STREAM_ABOVE = 21_333
"""Output tokens above which a reply is streamed: what takes longer than ten minutes by the reckoning of Anthropic's SDK
(128,000 tokens an hour), which refuses to wait for it in one piece.  See docs/providers.md for the measurements."""


class Client:
    """Holds an SDK's client, made at the first call, so that a provider that is not used costs nothing."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: Any = None
        self._lock = threading.Lock()

    def get(self) -> Any:
        """Return the client; several threads get the same one."""
        if self._made is None:
            with self._lock:
                if self._made is None:
                    self._made = self._make()
        return self._made

    def close(self) -> None:
        """Release its connections; the next `get` makes a new client."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            made.close()


def watched(
    server: Server,
    call: AgentCall,
    cancelled: Callable[[], bool],
    attempt: Callable[[Heard], AgentReply],
    *,
    sdk_error: type[Exception],
) -> AgentReply:
    """Run `attempt` under the call's deadline and `cancelled`; raise our errors in place of the SDK's.

    `attempt` notes what the server says in its argument.  An error carries that: what was used is charged all the same.
    """
    if cancelled():
        raise errors.Cancelled(made=False)
    heard = Heard()
    with watching(call.timeout, cancelled) as watch:
        try:
            return _masked(attempt(heard))
        except errors.ProviderError as error:
            raise heard.complete(error)  # noqa: B904  it is the same error
        except errors.GorgonError:
            raise
        except (sdk_error, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise _translated(server, call, watch, heard, error) from error
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            # A body of another shape than the API promises; the SDKs do not check it.
            raise _translated(server, call, watch, heard, error) from error


def _masked(reply: AgentReply) -> AgentReply:
    """Return the reply without secrets, whatever a model knows, before anything is cut from it or asked about it."""
    text = SECRETS.mask(reply.text)
    return reply if text == reply.text else replace(reply, text=text, data=SECRETS.mask_value(reply.data))


def body_of(raw: Any, *, streamed: bool) -> Any | None:
    """Return the body of a reply in one piece; None where it is a stream, as was asked for.

    A server may answer a call for a stream in one piece: so come most errors inside HTTP 200.
    """
    response = raw.http_response
    if not streamed:
        return response.json()
    if "json" not in response.headers.get("content-type", ""):
        return None
    response.read()
    try:
        return response.json()
    except ValueError:
        return None  # a stream under the wrong name; the SDK reads it from what was received


def _translated(server: Server, call: AgentCall, watch: Watch, heard: Heard, error: Exception) -> errors.GorgonError:
    made = _error(server, call, watch, heard, error)
    return heard.complete(made) if isinstance(made, errors.ProviderError) else made


def _error(server: Server, call: AgentCall, watch: Watch, heard: Heard, error: Exception) -> errors.GorgonError:
    if watch.ended == "cancelled":
        return errors.Cancelled()
    if watch.ended == "timeout":
        return failures.timed_out(server, call.model, call.timeout)
    if watch.ended == "too_large":
        return failures.too_large(server)
    response = getattr(error, "response", None)
    if isinstance(response, httpx2.Response) and hasattr(error, "status_code"):
        code, kind, said = failures.body_error(getattr(error, "body", None))
        headers = {name.lower(): value for name, value in response.headers.items()}
        request_id = headers.get("request-id") or headers.get("x-request-id")
        answer = Answer(response.status_code, code, kind, said, headers, request_id, begun=heard.begun)
        return failures.from_answer(server, call.model, answer)
    return _without_answer(server, call, heard, error)


def _without_answer(server: Server, call: AgentCall, heard: Heard, error: Exception) -> errors.GorgonError:
    cause = _network_cause(error)
    reason = _innermost(cause or error)
    if "certificate verify failed" in reason.lower():
        return failures.distrusted(server, reason)
    if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)):
        return failures.unreachable(server, reason)
    if isinstance(cause, (httpx2.UnsupportedProtocol, httpx2.InvalidURL)):
        return failures.wrong_address(server, reason)
    if isinstance(error, UnicodeEncodeError):
        return failures.unsendable_prompt()
    if isinstance(cause, httpx2.LocalProtocolError):
        return failures.unsendable_key(server)
    if isinstance(cause, httpx2.TimeoutException):
        return failures.timed_out(server, call.model, call.timeout)
    if isinstance(cause, httpx2.DecodingError):
        return failures.unreadable(server, reason)
    if cause is not None:
        return failures.broken_off(server, reason)
    body = getattr(error, "body", None)
    if body:
        answer = Answer(200, *failures.body_error(body), heard.headers, heard.request_id, begun=heard.begun)
        return failures.from_answer(server, call.model, answer)
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    return failures.unreadable(server, reason)


def _network_cause(error: BaseException | None) -> Exception | None:
    while error is not None:
        if isinstance(error, (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)):
            return error
        error = error.__cause__
    return None


def _innermost(error: BaseException) -> str:
    """The words of the error at the bottom, which knows best (`Connection refused`)."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(redact(str(error)).split())[:300] or type(error).__name__
