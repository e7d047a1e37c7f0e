"""A call to a model and its reply, in a provider-neutral form."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRIGGER = re.compile(r"\[\[sandbox:\s*", re.IGNORECASE)
_ROLE = re.compile(r"^\s*(?:#+\s*)?role:\s*([A-Za-z][\w-]*)", re.IGNORECASE)
_YOU_ARE = re.compile(r"\byou are (?:a|an|the)?\s*([\w -]{3,60})", re.IGNORECASE)
_ROLES_TEXT = """
    planner builder tester reviewer architect documenter data_analyst devops security_auditor security_analyst
    security migrator data_engineer analyst visualizer reporter model_builder
"""
ROLES = tuple(_ROLES_TEXT.split())
_UNESSENTIAL = ("stream", "stream_options", "metadata", "user", "safety_identifier", "store")


@dataclass(slots=True)
class Usage:
    """Tokens of a call.  `input` counts all input, cached or not; `reasoning` is part of `output`."""

    input: int = 0
    cached: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    output: int = 0
    reasoning: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the fields as a dict."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    schema: Mapping[str, Any]


@dataclass(slots=True)
class ModelCall:
    """A call to a model.

    `prompt` is the text of the user's turns, `said` the text that is searched for triggers (system and user).  `tool`
    is the tool to call now, if any.  `prefixes` are the cacheable beginnings of the input, short to long: (digest,
    tokens, kind).
    """

    provider: str
    operation: str
    model: str
    body: Mapping[str, Any]
    system: str
    prompt: str
    input_tokens: int
    schema: Mapping[str, Any] | None = None
    tool: Tool | None = None
    max_tokens: int | None = None
    stop_sequences: tuple[str, ...] = ()
    reasoning_share: float = 0.0
    stream: bool = False
    prefixes: tuple[tuple[str, int, str], ...] = ()

    @property
    def said(self) -> str:
        """The system prompt and the user's turns."""
        return f"{self.system}\n{self.prompt}"

    def role(self) -> str:
        """Return the role that the system prompt names, an empty string where it names none."""
        return role_of(self.system)

    def digest(self) -> str:
        """Return 16 hex digits that are equal for equal requests, streamed or not."""
        essence = {key: value for key, value in self.body.items() if key not in _UNESSENTIAL}
        text = json.dumps([self.provider, self.operation, essence], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(slots=True)
class ModelReply:
    """The reply to a call.  `stop`: end, max_tokens, refusal, tool, stop_sequence, pause or context."""

    id: str
    text: str = ""
    refusal: str | None = None
    tool: Tool | None = None
    tool_input: Any = None
    reasoning: str = ""
    stop: str = "end"
    stop_sequence: str | None = None
    usage: Usage = field(default_factory=Usage)


class Known:
    """A set of texts that is cleared when it has grown large."""

    def __init__(self, most: int = 1000) -> None:
        self._texts: set[str] = set()
        self._most = most

    def __contains__(self, text: object) -> bool:
        return text in self._texts

    def add(self, text: str) -> None:
        """Remember a text."""
        if len(self._texts) >= self._most:
            self._texts.clear()
        self._texts.add(text)


def role_of(system: str) -> str:
    """Return the role in the first line of a system prompt (`Role: planner`), else the role that the text describes."""
    found = _ROLE.match(system)
    if found:
        return found.group(1).lower().replace("-", "_")
    found = _YOU_ARE.search(system[:2000])
    if found:
        words = found.group(1).lower().replace(" ", "_").replace("-", "_")
        return next((role for role in ROLES if role in words), "")
    return ""


def tokens_in(text: str) -> int:
    """Return the approximate tokens of a text: one per four bytes."""
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


def without_triggers(text: str) -> str:
    """Return the text without any `[[sandbox: …]]`."""
    if "[[" not in text:
        return text
    kept = []
    start = 0
    for found in TRIGGER.finditer(text):
        if found.start() < start:
            continue
        kept.append(text[start : found.start()])
        start = trigger_end(text, found.end())
    return "".join([*kept, text[start:]])


def trigger_end(text: str, start: int) -> int:
    """Return the end of the trigger whose content begins at `start`; JSON inside may contain brackets."""
    while True:
        end = text.find("]]", start)
        if end < 0:
            return len(text)
        value = re.compile(r"\b(?:json|usage)=(?=[\[{\"])").search(text, start, end)
        if value is None:
            return end + 2
        try:
            _, start = json.JSONDecoder().raw_decode(text, value.end())
        except ValueError:
            return end + 2


def random_for(seed: int, digest: str) -> random.Random:
    """Return the random source of one call: equal for the same seed and request."""
    return random.Random(f"{seed}:{digest}")
