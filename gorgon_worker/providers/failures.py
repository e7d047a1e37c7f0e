"""What went wrong with a call to a model → the error that says what to do; the same for every provider."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from gorgon_common import errors
from gorgon_common.clock import SYSTEM_CLOCK
from gorgon_common.costs.usage import Usage
from gorgon_common.masking import redact
from gorgon_common.operations.providers import SERVERS

_Failure = TypeVar("_Failure", bound=errors.ProviderError)

_LONGEST_WAIT = 86_400.0
_NO_MONEY = ("insufficient_quota", "billing", "credit_balance", "spend_limit", "payment")
_STATUS_OF = {
    "overloaded_error": 529,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "timeout_error": 504,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "billing_error": 402,
    "invalid_request_error": 400,
    "invalid_prompt": 400,
    "bio_policy": 400,
    "misalignment_policy_violation": 400,
    "context_length_exceeded": 400,
    "model_not_found": 404,
    "invalid_api_key": 401,
    "resource_exhausted": 429,
    "too_many_requests": 429,
    "unavailable": 503,
    "server_overloaded": 529,
    "overloaded": 529,
}
"""The words for errors inside a stream or a reply (lower-case) → the HTTP status that they would have had."""
_TOO_LONG = ("context_length", "context window", "prompt is too long", "maximum context", "exceeds the context")


@dataclass(frozen=True, slots=True)
class Server:
    """Who was called: the provider's name for people (within a sentence), its URL, and the settings to correct."""

    label: str
    url: str
    key_variable: str
    url_variable: str
    models: tuple[str, ...] = ()
    """Names to suggest from."""
    sandbox: bool = False
    official: bool = True
    """Whether `url` is the provider's own."""

    def __str__(self) -> str:
        return self.label if self.official else f"{self.label} at {self.shown}"

    @property
    def shown(self) -> str:
        """Its URL without what is secret in it."""
        return redact(self.url)

    @property
    def first(self) -> str:
        """The same at the beginning of a sentence."""
        text = str(self)
        return text[0].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Answer:
    """An error of a server: `code` and `type` are the words of the body that name it, `said` its message.

    `begun`: a part of a reply came before it.
    """

    status: int
    code: str = ""
    type: str = ""
    said: str = ""
    headers: Mapping[str, str] | None = None
    request_id: str | None = None
    begun: bool = False

    @property
    def within(self) -> bool:
        """Whether it came inside a reply that HTTP calls a success."""
        return self.status < 300

    @property
    def meant(self) -> int:
        """The HTTP status that the error has, or would have had."""
        if not self.within:
            return self.status
        words = (self.code.lower(), self.type.lower())
        known = next((status for word, status in _STATUS_OF.items() if word in words), None)
        number = int(self.code) if self.code.isdecimal() and len(self.code) == 3 else 0
        return known or (number if 400 <= number < 600 else 500)

    @property
    def where(self) -> str:
        """How the error came, for people."""
        return "an error inside HTTP 200" if self.within else f"HTTP {self.status}"


def missing_key(server: Server) -> errors.Final:
    """There is no key at all."""
    return _free(
        errors.Final(
            f"There is no API key for {server.label}: {server.key_variable} is not set.",
            kind="auth",
            hint=f"Set {server.key_variable} in the environment or in .env, or run on the sandbox (without --live).",
        )
    )


def unsendable_key(server: Server) -> errors.Final:
    """The key holds characters that no HTTP header can."""
    return _free(
        errors.Final(
            f"The API key for {server.label} holds characters that a key cannot have.",
            kind="auth",
            hint=f"Copy it again into {server.key_variable}: no quotes, blanks or line breaks.",
        )
    )


def unsendable_prompt() -> errors.Final:
    """The prompt cannot be encoded."""
    return _free(
        errors.Final(
            "The prompt holds half of a surrogate pair, which no API takes.",
            hint="Correct the text that the step is given: it was cut in the middle of a character.",
        )
    )


def unreachable(server: Server, reason: str) -> errors.Retryable:
    """No connection came about, so nothing was charged."""
    where = (
        "Is the sandbox running? Start it with `gorgon sandbox`."
        if server.sandbox
        else f"Check the network, the proxy and {server.url_variable}."
    )
    return _free(
        errors.Retryable(f"Cannot reach {server.label} at {server.shown}: {reason}", kind="connection", hint=where)
    )


def distrusted(server: Server, reason: str) -> errors.Final:
    """The server's certificate is not trusted."""
    return _free(
        errors.Final(
            f"The certificate of {server.label} at {server.shown} is not trusted: {reason}",
            kind="rejected",
            hint="Install ca-certificates; behind a proxy that inspects TLS, point SSL_CERT_FILE at its certificate.",
        )
    )


def wrong_address(server: Server, reason: str) -> errors.Final:
    """The URL is none."""
    return _free(errors.Final(f"{server.shown!r} is not the address of a server: {reason}", hint=_address(server)))


def broken_off(server: Server, reason: str) -> errors.Retryable:
    """The connection ended before the reply did; whether it is charged nobody knows."""
    return errors.Retryable(
        f"The connection to {server} broke before the reply was complete: {reason}",
        kind="connection",
    )


def timed_out(server: Server, model: str, timeout: float) -> errors.Retryable:
    """The call's time was over; whether it is charged nobody knows."""
    return errors.Retryable(
        f"{model} gave no complete reply within {timeout:g} s.",
        kind="timeout",
        hint="Give the step a longer `timeout:`, ask for less, or lower `effort:`.",
    )


def too_large(server: Server) -> errors.OutputTooLarge:
    """The reply does not end."""
    return errors.OutputTooLarge(
        f"{server.first} sent more than the 64 MB that one reply may have.",
        hint="Lower `max_tokens:`, or ask for less.",
    )


def gave_up(server: Server, model: str, word: str) -> errors.Retryable:
    """The server ended its reply with a word that says that it failed."""
    return errors.Retryable(
        f"{server.first} broke off the reply of {model}: it ended with {word!r}.",
        kind="server",
        hint="A half reply is not used. See the server's log for the reason.",
    )


def unreadable(server: Server, what: str, request_id: str | None = None) -> errors.Malformed:
    """The body is not what the API promises."""
    hint = (
        None
        if server.official or server.sandbox
        else f"Check that {server.url_variable} is the address of an API, not of a web page."
    )
    return errors.Malformed(f"The reply of {server} cannot be read: {what}", request_id=request_id, hint=hint)


def from_answer(server: Server, model: str, answer: Answer) -> errors.ProviderError:
    """Return the error for an answer that is one.

    For an HTTP status of 300 and above nothing is charged, and nothing for a refusal (4xx) inside HTTP 200 before any
    part of a reply.  What is charged for other errors inside a reply nobody knows.
    """
    error = _classify(server, model, answer)
    error.status = answer.status
    error.request_id = answer.request_id
    error.headers = rate_headers(answer.headers or {})
    refused = not answer.within or (answer.meant < 500 and not answer.begun)
    return _free(error) if refused else error


def _classify(server: Server, model: str, answer: Answer) -> errors.ProviderError:
    status, said = answer.meant, _short(answer.said)
    words = f"{answer.code} {answer.type}".lower()
    if any(word in words for word in _NO_MONEY) or status == 402 or "credit balance" in answer.said.lower():
        return errors.Final(
            f"The account at {server} has no credit left: {said}",
            kind="quota",
            hint=f"Add credit or raise the spending limit there, or use another key in {server.key_variable}.",
        )
    if status == 429:
        return errors.RateLimited(
            f"{server.first} limits the rate for {model}: {said}",
            retry_after=retry_after(answer.headers or {}),
            hint="Gorgon waits as long as the provider asks; a higher limit there makes the run faster.",
        )
    if status >= 500:
        overloaded = status == 529 or "overloaded" in words
        return errors.Retryable(
            f"{server.first} {'is overloaded' if overloaded else 'failed'} ({answer.where}): {said}",
            kind="overloaded" if overloaded else "server",
        )
    if status == 408:
        return errors.Retryable(f"{server.first} gave up waiting ({answer.where}): {said}", kind="timeout")
    if status in (409, 425):
        return errors.Retryable(
            f"{server.first} could not take the call just now ({answer.where}): {said}", kind="server"
        )
    return _rejected(server, model, answer, words, said)


def _rejected(server: Server, model: str, answer: Answer, words: str, said: str) -> errors.Final:
    """The call is wrong, and would be the next time."""
    status = answer.meant
    if status == 401:
        return errors.Final(
            f"{server.first} does not accept the API key: {said}", kind="auth", hint=f"Check {server.key_variable}."
        )
    if status == 403:
        return errors.Final(
            f"{server.first} does not allow this key to use {model}: {said}",
            kind="auth",
            hint=f"Use another model, or a key in {server.key_variable} whose project may use it.",
        )
    if "model_not_found" in words or (status == 404 and "model" in answer.said.lower()):
        return errors.Final(
            f"{server.first} has no model {model!r}.", kind="unknown_model", hint=_suggestion(server, model)
        )
    if not answer.within and (status == 404 or 300 <= status < 400):
        return errors.Final(
            f"There is no such API at {server.shown} (HTTP {status}).", kind="rejected", hint=_address(server)
        )
    if status == 413 or any(word in f"{words} {answer.said.lower()}" for word in _TOO_LONG):
        return errors.Final(
            f"The prompt is too long for {model}: {said}",
            kind="context_length",
            hint="Pass less into the prompt, lower `max_tokens:`, or use a model with a larger context window.",
        )
    return errors.Final(
        f"{server.first} rejected the call to {model} ({answer.where}): {said}",
        hint="Correct the step as the message says.",
    )


def _suggestion(server: Server, model: str) -> str:
    near = difflib.get_close_matches(model, server.models, n=3, cutoff=0.6)
    if near and server.official:
        return f"Did you mean {' or '.join(near)}?  A tier (fast, standard, strong) works too."
    if not server.official and not server.sandbox:
        return f"Give the step a `model:` that {server.shown} serves."
    return "Use a tier (fast, standard, strong), or a name from the provider's list of models."


_RATE_HEADERS = (*(prefix for server in SERVERS.values() for prefix in server.headers), "retry-after", "x-should-retry")


def _address(server: Server) -> str:
    example = next(
        (known.example for known in SERVERS.values() if known.url_variable == server.url_variable), "https://…"
    )
    return f"Check {server.url_variable}; it looks like {example}."


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait from `retry-after-ms` or `retry-after` (number or date), None where they say none."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        if 0 <= seconds < _LONGEST_WAIT:
            return seconds
    try:
        moment = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - SYSTEM_CLOCK.now()).total_seconds()
    return min(max(0.0, seconds), _LONGEST_WAIT)


def rate_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that say something about limits, lower-case."""
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith(_RATE_HEADERS)}


def body_error(body: Any) -> tuple[str, str, str]:
    """Return (code, type, message) of an error body in either provider's form, empty where it says nothing."""
    entry = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(entry, dict):
        return "", "", str(entry or "")
    code = next((entry[name] for name in ("code", "status_code", "status") if entry.get(name)), "")
    return str(code), str(entry.get("type") or entry.get("status") or ""), str(entry.get("message") or "")


def known_models(*lists: Iterable[str]) -> tuple[str, ...]:
    """Join lists of names, without repeats."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _short(text: str) -> str:
    joined = " ".join(redact(text).split())  # before it is cut: a part of a key is not found any more
    return (joined[:300] + " …" if len(joined) > 300 else joined) or "no reason given"


def _free(error: _Failure) -> _Failure:
    error.usage = Usage()
    return error
