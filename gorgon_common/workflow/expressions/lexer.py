"""Splits text into tokens with exact positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gorgon_common.workflow.expressions.errors import ExpressionSyntaxError

MAX_SOURCE = 20_000
"""Maximum number of characters in one expression."""

_TOKEN = re.compile(
    r"""
      (?P<space>[ \t\r\n\f]+ | //[^\n]*)
    | (?P<bytes>[bB][rR]?["'] | [rR][bB]["'])
    | (?P<string>[rR]?(?:\"{3}|'{3}|"|'))
    | (?P<number>(?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)[uU]? | \d*\.\d+ | 0[xX][0-9a-fA-F]+[uU]? | \d+[uU]?)
    | (?P<ident>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<op>&&|\|\||==|!=|<=|>=|[-+*/%<>!?:.,()\[\]{}])
    """,
    re.VERBOSE,
)

_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\\": "\\", "?": "?", '"': '"', "'": "'", "`": "`",
}  # fmt: skip

_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|X([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-3][0-7]{2})|(.))", re.S
)

_HINTS = {
    "=": "Comparison is written `==`.",
    "&": "And is written `&&`.",
    "|": "Or is written `||`; functions are called: `json(x)`, not `x | json`.",
    "$": "Inside an expression a name is written without `$`.",
    "#": "A comment in an expression starts with `//`.",
    "“": "Use straight quotes.",
    "”": "Use straight quotes.",
    "‘": "Use straight quotes.",
    "’": "Use straight quotes.",
}


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is ident, literal, op or end; `value` is the operator, the name or the literal's value."""

    kind: str
    value: Any
    offset: int
    end: int


def tokenize(source: str, start: int = 0, *, closing: bool = False) -> list[Token]:
    """Return the tokens from `start` on; the last one has the kind `end`.

    With `closing`, the expression ends at the first `}}` that closes no brace of its own (the end of a template
    expression), otherwise at the end of the text.  Raises ExpressionSyntaxError.
    """
    tokens: list[Token] = []
    position, depth = start, 0
    while position < len(source):
        if position - start > MAX_SOURCE:
            raise ExpressionSyntaxError(f"the expression is longer than {MAX_SOURCE} characters", start)
        if closing and depth == 0 and source.startswith("}}", position):
            tokens.append(Token("end", "}}", position, position + 2))
            return tokens
        match = _TOKEN.match(source, position)
        if match is None:
            raise _unexpected(source, position)
        kind = match.lastgroup
        if kind == "string":
            token = _string(source, match)
            tokens.append(token)
            position = token.end
            continue
        if kind == "bytes":
            raise ExpressionSyntaxError("bytes are not supported", position, "Leave the `b` out.")
        text, position = match.group(), match.end()
        if kind == "op":
            depth += (text == "{") - (text == "}")
            tokens.append(Token("op", text, match.start(), position))
        elif kind == "ident":
            tokens.append(Token("ident", text, match.start(), position))
        elif kind == "number":
            tokens.append(Token("literal", _number(source, match), match.start(), position))
    if closing:
        raise ExpressionSyntaxError("`{{` is not closed", start - 2, "End the expression with `}}`.")
    tokens.append(Token("end", "", len(source), len(source)))
    return tokens


def _unexpected(source: str, position: int) -> ExpressionSyntaxError:
    char = source[position]
    return ExpressionSyntaxError(f"unexpected `{char}`", position, _HINTS.get(char, ""))


def _number(source: str, match: re.Match[str]) -> int | float:
    text = match.group()
    following = source[match.end() : match.end() + 1]
    if following.isalnum() or following == "_":
        raise ExpressionSyntaxError(f"`{text}{following}` is not a number", match.start())
    body = text.rstrip("uU")
    if body[:2] in ("0x", "0X"):
        number: int | float = int(body, 16)
    elif any(mark in body for mark in ".eE"):
        number = float(body)
        if number == float("inf"):
            raise ExpressionSyntaxError(f"`{text}` is too large", match.start())
    else:
        number = int(body) if len(body) <= 20 else 2**64
    if isinstance(number, int) and number > 2**63:  # 2**63 is allowed: negation comes later
        raise ExpressionSyntaxError(f"`{text[:30]}` is too large for an integer (64 bits)", match.start())
    return number


def _string(source: str, match: re.Match[str]) -> Token:
    opening = match.group()
    raw = opening[0] in "rR"
    quote = opening.lstrip("rR")
    begin = position = match.end()
    while True:
        if source.startswith(quote, position):
            break
        char = source[position : position + 1]
        if not char or (char in "\r\n" and len(quote) == 1):
            raise ExpressionSyntaxError(f"the string is not closed: {quote} is missing", match.start())
        position += 2 if char == "\\" and not raw else 1
    text = source[begin:position]
    value = text if raw else _ESCAPE.sub(lambda found: _unescape(found, begin), text)
    return Token("literal", value, match.start(), position + len(quote))


def _unescape(match: re.Match[str], begin: int) -> str:
    *codes, octal, char = match.groups()
    offset = begin + match.start()
    digits = next((code for code in codes if code is not None), None)
    if digits is not None or octal is not None:
        code = int(digits, 16) if digits is not None else int(octal, 8)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise ExpressionSyntaxError(f"`{match.group()}` is not a character", offset)
        return chr(code)
    if char not in _ESCAPES:
        raise ExpressionSyntaxError(
            f"unknown escape `{match.group()}`", offset, 'Write `\\\\` for a backslash, or a raw string: r"…".'
        )
    return _ESCAPES[char]
