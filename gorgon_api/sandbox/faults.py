"""Injected faults: what fails, for which requests, how often.

A rule comes from `POST /_faults` as a JSON object, or from a prompt as `[[sandbox: status=500 times=2
key=abc]]`; the words are the same in both.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from gorgon_api.sandbox.calls import TRIGGER, trigger_end

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|)$")
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB)?$")
_SIZES = {None: 1, "B": 1, "kB": 1000, "KB": 1000, "MB": 1000_000, "GB": 1000_000_000}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "": 1.0}
_PAIR = re.compile(r"\s*([a-z_]+)(=)?")
STOPS = ("max_tokens", "pause", "context", "refusal")


def parse_duration(text: str | float) -> float:
    """Return seconds for `500ms`, `2s`, `1.5m` or a bare number of seconds.  Raises ValueError."""
    found = _DURATION.match(str(text).strip())
    if not found:
        raise ValueError(f"{text!r} is no duration; write 500ms or 2s")
    return float(found.group(1)) * _SECONDS[found.group(2)]


def parse_size(text: str | int) -> int:
    """Return bytes for `10MB`, `2kB` or 4096, at most 256 MB.  Raises ValueError."""
    found = _SIZE.match(str(text))
    if not found:
        raise ValueError(f"{text!r} is no size; write 10MB or 4096")
    size = int(float(found.group(1)) * _SIZES[found.group(2)])
    if size > 256_000_000:
        raise ValueError(f"{text!r} is more than 256MB")
    return size


@dataclass(slots=True)
class Fault:
    """A rule: which requests, how often, and the effect.

    Which: `provider`, `account`, `model` and `role` are patterns, `contains` is a text in the request.  How often:
    `after` lets the first ones pass, `nth` takes only that one (from 1), `every` each n-th, `probability` that share
    of them, `times` at most so many. What: see docs/sandbox.md.
    """

    provider: str = "*"
    account: str = "*"
    model: str = "*"
    role: str = "*"
    contains: str = ""
    after: int = 0
    nth: int | None = None
    every: int | None = None
    probability: float | None = None
    times: int | None = None
    key: str = ""

    status: int | None = None
    code: str | None = None
    message: str | None = None
    retry_after: float | None = None
    midway: bool = False
    delay: float = 0.0
    truncate: bool = False
    malformed: bool = False
    wrong_schema: bool = False
    refuse: bool = False
    drop: bool = False
    reset: bool = False
    hang: bool = False
    huge: int | None = None
    stop: str | None = None
    text: str | None = None
    json: Any = None
    usage: Any = None

    matched: int = 0
    fired: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Fault:
        """Return the rule that a JSON object or a trigger describes.  Raises ValueError."""
        if unknown := sorted(given.keys() - _WORDS):
            raise ValueError(f"a fault has no {', '.join(map(repr, unknown))}; it has {', '.join(sorted(_WORDS))}")
        values = {name: _READERS.get(name, _same)(value) for name, value in given.items()}
        fault = cls(**values)
        if fault.stop is not None and fault.stop not in STOPS:
            raise ValueError(f"stop is one of {', '.join(STOPS)}, not {fault.stop!r}")
        if fault.status is not None and not 400 <= fault.status <= 599:
            raise ValueError(f"status is a number from 400 to 599, not {fault.status}")
        return fault

    def applies(self, subject: Subject) -> bool:
        """Return whether the rule matches this request."""
        return (
            fnmatchcase(subject.provider, self.provider)
            and fnmatchcase(subject.account, self.account)
            and fnmatchcase(subject.model, self.model)
            and fnmatchcase(subject.role, self.role)
            and self.contains in subject.text
        )

    def fires(self, seed: int) -> bool:
        """Count a matching request, and return whether the rule fires."""
        self.matched += 1
        turn = self.matched - self.after
        if turn <= 0 or (self.nth is not None and turn != self.nth):
            return False
        if (self.every is not None and turn % self.every) or (self.times is not None and self.fired >= self.times):
            return False
        chance = random.Random(f"{seed}:{self.key}:{self.matched}").random() if self.probability is not None else 0.0
        if self.probability is not None and chance >= self.probability:
            return False
        self.fired += 1
        return True

    def describe(self) -> dict[str, Any]:
        """Return the fields that are set, with the counts."""
        shown = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default or item.name in ("matched", "fired"):
                shown[item.name] = value
        return shown


@dataclass(frozen=True, slots=True)
class Subject:
    """The properties of a request that rules examine."""

    provider: str
    account: str
    model: str
    role: str
    text: str


@dataclass(slots=True)
class Effects:
    """The effects on one request: all rules that fire.  `names` goes into the log."""

    rules: list[Fault] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Return what was done, such as `status=500`."""
        found = []
        for rule in self.rules:
            for name in _ACTIONS:
                value = getattr(rule, name)
                if value not in (None, False, 0.0):
                    plain = value is True or name in ("json", "usage", "text", "message")
                    found.append(name if plain else f"{name}={value}")
        return found

    def first(self, name: str) -> Any:
        """Return the value of the first rule that has one, else None."""
        for rule in self.rules:
            value = getattr(rule, name)
            if value is not None and value is not False:
                return value
        return None

    @property
    def delay(self) -> float:
        """Additional seconds, of all rules together."""
        return sum(rule.delay for rule in self.rules)


def _same(value: Any) -> Any:
    return value


def _whole(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError(f"{value!r} is below 0")
    return number


def _share(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"probability is from 0 to 1, not {value!r}")
    return number


def _flag(value: Any) -> bool:
    if value in (True, "true", "1", "yes"):
        return True
    if value in (False, "false", "0", "no"):
        return False
    raise ValueError(f"{value!r} is neither true nor false")


_FLAGS = ("midway", "truncate", "malformed", "wrong_schema", "refuse", "drop", "reset", "hang")
_READERS: dict[str, Any] = {
    **dict.fromkeys(
        ("provider", "account", "model", "role", "contains", "key", "code", "message", "stop", "text"), str
    ),
    **dict.fromkeys(("after", "nth", "every", "times", "status"), _whole),
    **dict.fromkeys(_FLAGS, _flag),
    **dict.fromkeys(("delay", "retry_after"), parse_duration),
    "probability": _share,
    "huge": parse_size,
}
_WORDS = {item.name for item in fields(Fault)} - {"matched", "fired"}
_NAMES = [item.name for item in fields(Fault)]
_ACTIONS = _NAMES[_NAMES.index("status") : _NAMES.index("matched")]


def read_triggers(text: str) -> list[dict[str, Any]]:
    """Return the words of every `[[sandbox: …]]` in `text`.  Raises ValueError where one cannot be read."""
    if "[[" not in text:
        return []
    triggers = []
    position = 0
    while found := TRIGGER.search(text, position):
        position = trigger_end(text, found.end())
        inside = text[found.end() : position - 2]
        try:
            triggers.append(_words(inside))
        except ValueError as error:
            raise ValueError(f"[[sandbox: {inside}]]: {error}") from error
    return triggers


def _words(inside: str) -> dict[str, Any]:
    """Return `{name: value}` for `status=500 times=2`; a name alone is true.  Raises ValueError."""
    words: dict[str, Any] = {}
    position = 0
    while inside[position:].strip():
        found = _PAIR.match(inside, position)
        if not found or not found.group(1):
            raise ValueError(f"cannot read {inside[position:].strip()!r}; write name=value")
        name, position = found.group(1), found.end()
        if not found.group(2):
            words[name] = True
        elif name in ("json", "usage"):
            try:
                words[name], position = json.JSONDecoder().raw_decode(inside, position)
            except ValueError as error:
                raise ValueError(f"{name}= is not followed by JSON: {error}") from error
        elif name in ("text", "message", "contains"):
            words[name], position = _quoted(inside, position)
        else:
            end = next((at for at in range(position, len(inside)) if inside[at].isspace()), len(inside))
            words[name], position = inside[position:end], end
    return words


def _quoted(inside: str, position: int) -> tuple[str, int]:
    """Return a JSON string that begins at `position`, else the rest of the line."""
    if inside[position : position + 1] == '"':
        try:
            value, end = json.JSONDecoder().raw_decode(inside, position)
        except ValueError:
            return inside[position:], len(inside)
        return str(value), end
    return inside[position:].strip(), len(inside)


class Faults:
    """The active rules, and the counts of rules from prompts."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rules: dict[int, Fault] = {}
        self._next = 1
        self._triggered: dict[str, Fault] = {}

    def add(self, fault: Fault) -> int:
        """Activate a rule; return its number."""
        number = self._next
        self._next += 1
        fault.key = fault.key or f"rule-{number}"
        self._rules[number] = fault
        return number

    def remove(self, number: int) -> bool:
        """Remove one rule; return whether it existed."""
        return self._rules.pop(number, None) is not None

    def clear(self) -> None:
        """Remove every rule and every count."""
        self._rules.clear()
        self._triggered.clear()

    def describe(self) -> list[dict[str, Any]]:
        """Return every rule with its counts; those from prompts have no id."""
        rules: list[dict[str, Any]] = [{"id": number, **rule.describe()} for number, rule in self._rules.items()]
        return rules + [{"id": None, **rule.describe()} for rule in self._triggered.values()]

    def effects(self, subject: Subject) -> Effects:
        """Return the effects on a request.  Raises ValueError for a trigger that cannot be read."""
        rules = [self._trigger(words) for words in read_triggers(subject.text)]
        rules += self._rules.values()
        return Effects([rule for rule in rules if rule.applies(subject) and rule.fires(self._seed)])

    def _trigger(self, words: dict[str, Any]) -> Fault:
        """Return the rule of a trigger: the same rule with its counts for the same key."""
        own = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:12]
        key = f"{words.get('key', '')}:{own}"
        fault = self._triggered.get(key)
        if fault is None:
            fault = Fault.parse(words)
            fault.key = str(words.get("key") or own)
            if len(self._triggered) >= 10_000:
                self._triggered.pop(next(iter(self._triggered)))
            self._triggered[key] = fault
        return fault
