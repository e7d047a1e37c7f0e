"""Masks secrets by value: the one place where values are registered, and the masking that every text output applies.

    SECRETS.add("GITHUB_TOKEN", value)
    SECRETS.mask(text)             # a line of a log, a command's output, a prompt
    SECRETS.mask_value(document)   # the same for every text inside
    redact(text)                   # also unregistered credentials in URLs and headers

A value is found in its plain form and in the forms in which programs commonly write it: base64 (whatever surrounds it),
hex, percent-encoded, escaped for JSON, Python, HTML and shells, and folded over several lines.  docs/security.md lists
what is not found.
"""

from __future__ import annotations

import base64
import bisect
import html
import json
import re
import shlex
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

MASK = "********"
SHORTEST = 8
"""The minimum length of a value that is masked; a shorter one would match innocent text."""

_FOLDED = 20
"""The minimum length of a form that is searched for across line breaks."""
_BREAK = re.compile(r"[ \t]*(?:\r\n|\r|\n|\\r\\n|\\n)[ \t]*")
_PUBLIC = frozenset(
    {"postgres", "password", "changeme", "placeholder", "not-needed", "not-required", "no-key-required", "lm-studio"}
    | {"sk-no-key-required", "dummy-key", "EMPTY", "sandbox"}
)
"""Common values: they protect nothing, and masking them would damage texts in which they are ordinary words."""
_NAMES = re.compile(
    r"(?:^|_)(?:key|token|secret|passw(?:or)?d|pass|pwd|credentials?|auth|pat|dsn)(?:_|$)"
    r"|(?:apikey|token|secret|passw(?:or)?d)$",
    re.I,
)
_KNOWN = frozenset(
    {"OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_WEBHOOK_SECRET", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"}
    | {"GORGON_API_KEY", "GITHUB_TOKEN", "GH_TOKEN", "SLACK_BOT_TOKEN", "SLACK_SIGNING_SECRET", "NOTION_TOKEN"}
    | {"NOTION_API_KEY", "GOOGLE_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "REDISCLI_AUTH"}
)
"""Variables that always hold a secret, whatever their value looks like."""
_RANDOM = 16
"""The minimum length at which a variable that is only named like a secret counts as one, if its value looks random."""

_STRUCTURES: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = (
    # Text that must be present (in lower case) before the pattern is tried.  Lengths are bounded, because hostile text
    # could make a match slow.
    (
        ("://",),
        re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]{0,30}://[^\s/:@?#\"'<>]{0,200}:)[^\s/@?#\"'<>]{1,500}(?=@)", re.I),
    ),
    (("://",), re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]{0,30}://)[^\s/:@?#\"'<>]{16,500}(?=@)", re.I)),
    (
        ("key=", "token=", "secret=", "password=", "signature=", "sig="),
        re.compile(
            r"(?P<before>[?&](?:[a-z_.-]{0,40}(?:key|token|secret|password|signature)|sig)=)[^\s&#\"'<>]{4,}", re.I
        ),
    ),
    (
        ("authorization",),
        re.compile(
            r"(?P<before>\b(?:proxy-)?authorization[\"']?\s{0,4}[:=,]\s{0,4}[b\"']{0,2}"
            r"(?:bearer|basic|token|digest|apikey)\s{1,4})[^\s\"',;]{4,}",
            re.I,
        ),
    ),
    (
        ("api-key", "auth-token", "access-token", "security-token"),
        re.compile(
            r"(?P<before>\b(?:x-)?(?:api-key|auth-token|access-token|amz-security-token)[\"']?\s{0,4}[:=,]\s{0,4}"
            r"[b\"']{0,2})[^\s\"',;]{4,}",
            re.I,
        ),
    ),
    (
        ("cookie",),
        re.compile(
            r"(?P<before>\b(?:set-)?cookie[\"']?\s{0,4}[:=]\s{0,4}[b\"']{0,2}[\w.-]{1,100}=)[^\s\"',;]{8,}", re.I
        ),
    ),
)


class Secrets:
    """Holds the values that must not be shown, and masks them.  Thread-safe."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._forms: tuple[tuple[str, str], ...] = ()  # (form, name), longest first; replaced, never modified
        self._folded: tuple[tuple[str, str], ...] = ()
        self._lock = threading.Lock()

    def add(self, name: str, value: str | None, *, declared: bool = False) -> bool:
        """Register the value of a secret under its display name; returns whether it is long enough to be masked
        (SHORTEST).

        The long lines of a multi-line value (a private key), and the secret fields of a JSON value (a service account),
        are also masked separately.  `declared`: the value was declared a secret, whatever it looks like.
        """
        if value is None or (value in _PUBLIC and not declared):
            return True
        parts = [part for part in dict.fromkeys((value, value.strip(), *_parts(value))) if len(part) >= SHORTEST]
        if not parts:
            return False
        with self._lock:
            new = [part for part in parts if part not in self._names]
            if new:
                self._names.update(dict.fromkeys(new, name))
                forms = dict(self._forms) | {form: name for part in new for form in _forms(part)}
                flat = {_BREAK.sub("", form): label for form, label in forms.items() if len(form) >= _FOLDED}
                self._forms = tuple(sorted(forms.items(), key=lambda form: -len(form[0])))
                self._folded = tuple(flat.items())
        return True

    def add_url(self, name: str, url: str | None) -> bool:
        """Register the secret parts of a URL: its password, and query fields that are named like secrets.

        A password that equals the user's name is not a secret.  Returns whether all of them can be masked.
        """
        try:
            parts = urlsplit(url or "")
            user, password = parts.username, parts.password
        except ValueError:
            return True
        values = [value for field, value in parse_qsl(parts.query) if _NAMES.search(field.replace("-", "_"))]
        if password and password != user:
            values += [password, unquote(password)]
        elif user and password is None and len(user) >= _RANDOM:  # a token used as the user name
            values += [user, unquote(user)]
        maskable = [self.add(name, value) for value in values if value]
        return all(maskable)

    def add_environment(self, environ: Mapping[str, str | None]) -> None:
        """Register the values of variables that hold secrets, according to their names, and the passwords in their
        URLs.
        """
        for name, value in environ.items():
            if not value:
                continue
            if name in _KNOWN or (_NAMES.search(name) and _looks_random(value)):
                self.add(name, value)
            elif "://" in value:
                self.add_url(name, value)

    def clear(self) -> None:
        """Remove all values (for tests)."""
        with self._lock:
            self._names, self._forms, self._folded = {}, (), ()

    def found(self, text: str) -> str | None:
        """Return the name of a secret whose value is in the text; None if there is none."""
        for form, name in self._forms:
            if form in text:
                return name
        if self._folded and ("\n" in text or "\\n" in text or "\r" in text):
            flat = _BREAK.sub("", text)
            for form, name in self._folded:
                if form in flat:
                    return name
        return None

    def mask(self, text: str) -> str:
        """Return the text with MASK in place of every registered value."""
        if self.found(text) is None:
            return text
        spans = [span for form, _ in self._forms for span in _places(form, text)]
        spans += self._folded_places(text)
        return "".join(_replaced(text, sorted(spans)))

    def mask_value(self, value: Any) -> Any:
        """Return a JSON value with every text in it masked, including field names and numbers."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, Mapping):
            return {self.mask_value(name): self.mask_value(entry) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mask_value(entry) for entry in value]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and self.found(repr(value)) is not None:
            return MASK
        return value

    def mask_json(self, text: str) -> str:
        """Return a JSON document masked.  It stays valid JSON (a number that is a secret becomes a string)."""
        if self.found(text) is None:
            return text
        try:
            masked = self.mask_value(json.loads(text))
        except (ValueError, RecursionError):
            return self.mask(text)
        return json.dumps(masked, ensure_ascii=False, separators=(",", ":"))

    def _folded_places(self, text: str) -> Iterator[tuple[int, int]]:
        breaks = list(_BREAK.finditer(text))
        if not breaks or not self._folded:
            return
        # The start of each piece between two breaks, in the text without breaks and in the original text.
        flat_starts, starts, removed = [0], [0], 0
        for found in breaks:
            removed += found.end() - found.start()
            flat_starts.append(found.end() - removed)
            starts.append(found.end())
        flat = _BREAK.sub("", text)
        for form, _ in self._folded:
            for begin, end in _places(form, flat):
                first = bisect.bisect_right(flat_starts, begin) - 1
                last = bisect.bisect_right(flat_starts, end - 1) - 1
                yield starts[first] + begin - flat_starts[first], starts[last] + end - flat_starts[last]


SECRETS = Secrets()
"""The secrets of this process."""


def redact(text: str) -> str:
    """Return the text masked, including credentials recognized by their position in URLs and headers.

    Use it for output of programs and servers (errors, logs, outputs of commands), not for text by people and models,
    where an example URL is not a secret.
    """
    masked = SECRETS.mask(text)
    lower = masked.lower()
    for hints, structure in _STRUCTURES:
        if any(hint in lower for hint in hints):
            masked = structure.sub(_hidden, masked)
    return masked


def _hidden(found: re.Match[str]) -> str:
    return f"{found['before']}{MASK}"


def _looks_random(value: str) -> bool:
    return (
        len(value) >= _RANDOM
        and not value.startswith((".", "/", "~"))
        and not any(sign.isspace() for sign in value)
        and any(sign.isdigit() for sign in value)
        and any(sign.isalpha() for sign in value)
    )


def _parts(value: str) -> Iterator[str]:
    """Yield the lines of a multi-line value, and the texts in a JSON object that are named like secrets."""
    if "\n" in value.strip():
        for line in value.splitlines():
            if len(line.strip()) >= _RANDOM and not line.startswith("-----"):
                yield line.strip()
    if value.lstrip().startswith("{"):
        try:
            document = json.loads(value)
        except (ValueError, RecursionError):
            return
        yield from _secret_fields(document)


def _secret_fields(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            if isinstance(entry, str) and _NAMES.search(str(name)):
                yield entry
                yield from _parts(entry)
            else:
                yield from _secret_fields(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _secret_fields(entry)


def _forms(value: str) -> set[str]:
    """Return the forms in which programs may write a value."""
    data = value.encode("utf-8", "surrogatepass")
    percent = {quote(value, safe="", errors="replace"), quote(value, safe="/", errors="replace")}
    percent.add(quote_plus(value, errors="replace"))
    lower = {re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), form) for form in percent}
    forms = {value, data.hex(), data.hex().upper(), *percent, *lower, *_base64(data)}
    forms |= {repr(value)[1:-1], ascii(value)[1:-1], repr(data)[2:-1], html.escape(value), html.escape(value, False)}
    forms |= {shlex.quote(value).strip("'"), value.replace("'", "'\\''")}
    for _ in range(2):  # JSON inside JSON
        forms |= {
            json.dumps(form, ensure_ascii=ascii_only)[1:-1] for form in list(forms) for ascii_only in (True, False)
        }
    return {form for form in forms if len(form) >= SHORTEST}


def _base64(data: bytes) -> Iterable[str]:
    """Return the forms of a value inside base64, for each of its three possible alignments.

    The characters at either end that depend on neighbouring data are left out.
    """
    yield base64.b64encode(data).decode()
    yield base64.urlsafe_b64encode(data).decode()
    for before in range(3):
        padded = b"\0" * before + data
        rest = -len(padded) % 3
        whole = base64.b64encode(padded + b"\0" * rest).decode()
        begin = (0, 2, 3)[before]
        end = len(whole) - (0, 2, 3)[rest]
        inner = whole[begin:end]
        yield inner
        yield inner.replace("+", "-").replace("/", "_")


def _places(form: str, text: str) -> Iterator[tuple[int, int]]:
    at = text.find(form)
    while at >= 0:
        yield at, at + len(form)
        at = text.find(form, at + 1)


def _replaced(text: str, spans: list[tuple[int, int]]) -> Iterator[str]:
    done = 0
    for begin, end in spans:
        if begin > done or not done:  # overlapping or adjacent spans share one mask
            yield text[done:begin]
            yield MASK
        done = max(done, end)
    yield text[done:]
