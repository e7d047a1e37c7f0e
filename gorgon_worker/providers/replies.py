"""What a server's reply says, read without trusting its form: token counts, text, and why it ended.

Servers that speak a provider's API leave out fields, fill them with other types, or report an error inside HTTP 200.
What cannot be read with certainty is unknown (None), never 0 and never a success.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gorgon_common import errors
from gorgon_common.costs.usage import Usage

MOST_TOKENS = 2**31 - 1
"""A larger count is no count, and would not fit its column."""
_TEXTS = frozenset({"text", "output_text"})


@dataclass(slots=True)
class Heard:
    """What the server has said so far during one call.  An error of the call takes over what it does not know itself.

    `usage` is set only when it is final.  `begun`: part of a reply has arrived, so that something may be charged.
    """

    headers: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None
    model: str | None = None
    service_tier: str | None = None
    usage: Usage | None = None
    begun: bool = False

    def note(self, body: Mapping[str, Any], *, service_tier: Any = None) -> None:
        """Take over what a body says of itself: its id, its model and its service tier."""
        self.request_id = self.request_id or word(body.get("id"))
        self.model = word(body.get("model")) or self.model
        self.service_tier = word(service_tier) or self.service_tier

    def complete(self, error: errors.ProviderError) -> errors.ProviderError:
        """Return the error with what was heard before it."""
        if self.usage is not None and error.usage in (None, Usage()):
            error.usage = self.usage
        error.model = error.model or self.model
        error.service_tier = error.service_tier or self.service_tier
        error.request_id = error.request_id or self.request_id
        return error


def word(value: Any) -> str | None:
    """Return a value that should be a short text, None where it is none."""
    return value if isinstance(value, str) and value else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a value that should be an object, an empty one where it is none."""
    return value if isinstance(value, Mapping) else {}


def text_of(content: Any) -> str | None:
    """Return the text of a message: a string, or a list of parts without the model's thoughts.

    None where it is neither.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        entry = mapping(part)
        if isinstance(part, str):
            texts.append(part)
        elif entry.get("type", "text") in _TEXTS and isinstance(entry.get("text"), str):
            texts.append(entry["text"])
    return "".join(texts)


def refusal_of(content: Any) -> str:
    """Return the text of the parts of a message that refuse, empty where there are none."""
    parts = [mapping(part) for part in content] if isinstance(content, list) else []
    return " ".join(str(part.get("refusal") or "declined") for part in parts if part.get("type") == "refusal")


def joined(parts: list[str]) -> str:
    """Join pieces of text.  The halves of a surrogate pair may come apart in a stream; one without its other half is
    replaced: no API and no database takes it.
    """
    text = "".join(parts)
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def count(value: Any) -> int | None:
    """Return a number of tokens, None for what is none: negative, a fraction, words, beyond MOST_TOKENS.

    Digits in a text count: so the SDKs read them in a stream.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(MOST_TOKENS)):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
        return None
    return value


def part(entry: Mapping[str, Any], name: str) -> int | None:
    """Return a count that may be missing, which means 0; None where it is there and is none."""
    value = entry.get(name)
    return 0 if value is None else count(value)


def openai_usage(entry: Any, read: str, written: str, *, text: str) -> Usage | None:
    """Return what a call used from the `usage` of Responses or chat completions, None where that is unknown.

    `read` and `written` are the names of the two halves.  Where `total_tokens` says more than both halves, the rest is
    output: some servers count reasoning there only.  A half that is missing is what the other leaves of the total.
    """
    body = mapping(entry)
    inputs, outputs, total = (count(body.get(name)) for name in (read, written, "total_tokens"))
    if total is not None:
        if inputs is None and outputs is not None and body.get(read) is None:
            inputs = total - outputs
        elif inputs is not None and (outputs is None or inputs + outputs < total):
            outputs = total - inputs if outputs is not None or body.get(written) is None else None
    detail, written_detail = mapping(body.get(f"{read}_details")), mapping(body.get(f"{written}_details"))
    hours = part(mapping(detail.get("cache_write_tokens_details")), "ttl_12h_tokens")
    return _usage(
        inputs,
        outputs,
        cached=part(detail, "cached_tokens"),
        stored=part(detail, "cache_write_tokens"),
        stored_longer=hours,
        reasoning=part(written_detail, "reasoning_tokens"),
        text=text,
    )


def anthropic_usage(entry: Any, *, text: str) -> Usage | None:
    """Return the same from the `usage` of Anthropic, whose input tokens are those that no cache had to do with."""
    body = mapping(entry)
    plain, outputs = count(body.get("input_tokens")), count(body.get("output_tokens"))
    cached = part(body, "cache_read_input_tokens")
    by_time = mapping(body.get("cache_creation"))
    hour, minutes = part(by_time, "ephemeral_1h_input_tokens"), part(by_time, "ephemeral_5m_input_tokens")
    stored = part(body, "cache_creation_input_tokens")
    if body.get("cache_creation_input_tokens") is None and hour is not None and minutes is not None:
        stored = hour + minutes
    inputs = None if plain is None or cached is None or stored is None else plain + cached + stored
    return _usage(
        inputs,
        outputs,
        cached=cached,
        stored=stored,
        stored_longer=hour,
        reasoning=part(mapping(body.get("output_tokens_details")), "thinking_tokens"),
        text=text,
    )


def _usage(
    inputs: int | None,
    outputs: int | None,
    *,
    cached: int | None,
    stored: int | None,
    stored_longer: int | None,
    reasoning: int | None,
    text: str,
) -> Usage | None:
    """Return the usage, None where a count is missing or contradicts another, or where the server did not count."""
    if inputs is None or outputs is None or cached is None or stored is None or stored_longer is None:
        return None
    if reasoning is None or reasoning > outputs or stored_longer > stored or cached + stored > inputs:
        return None
    if inputs > MOST_TOKENS or not inputs or outputs < 0 or (text and not outputs):
        return None  # nothing can be asked with no token, and no text is told with none
    return Usage(
        input_tokens=inputs,
        cache_read_tokens=cached,
        cache_write_5m_tokens=stored - stored_longer,
        cache_write_1h_tokens=stored_longer,
        output_tokens=outputs,
        reasoning_tokens=reasoning,
    )
