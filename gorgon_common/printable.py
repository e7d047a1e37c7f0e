"""Makes foreign text safe for a terminal: characters that control the terminal or mislead the reader become visible."""

from __future__ import annotations

import re

# ASCII control characters (except tab and line feed) and those of Latin-1, characters that change the writing direction
# or are invisible, line separators that only some programs recognize, and halves of surrogate pairs.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return the text with control characters written as escapes: `\x1b`, `\u202e`.  Tabs and line feeds stay.

    ANSI, OSC and C1 escapes thereby lose their effect and stay readable; this includes colours in foreign text.
    """
    if text.isascii() and text.isprintable():
        return text
    return _STEERING.sub(_escape, text.replace("\r\n", "\n"))


def single_line(text: str) -> str:
    r"""Return the same text on one line: a line feed is written as `\n`."""
    return visible(text).replace("\n", "\\n")


def json_safe(text: str) -> str:
    """Return a JSON document in which such characters inside strings are written as JSON escapes."""
    return _STEERING.sub(_json_escape, text) if not text.isascii() or "\x7f" in text else text


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
