"""Explains errors of the YAML parser to the author of the file."""

from __future__ import annotations

EXPLAINED = (
    (
        "mapping values are not allowed",
        "a `: ` that is not allowed here",
        "Text that contains `: ` must be in quotes; otherwise check the indentation of this line and the one before.",
        False,
    ),
    ("could not find expected ':'", "a `:` is missing after the key", "Write `key: value`.", False),
    (
        "did not find expected key",
        "this does not fit the lines before it",
        "Check the indentation and the quotes: after a closing quote or bracket nothing may follow.",
        False,
    ),
    (
        "did not find expected '-' indicator",
        "this does not fit the list before it",
        "Items of a list begin with `- ` and line up; check the indentation.",
        False,
    ),
    ("did not find expected ',' or ']'", "a list opened with `[` here is not closed", "Add `]` or `,`.", True),
    ("did not find expected ',' or '}'", "a mapping opened with `{{` here is not closed", "Add `}` or `,`.", True),
    (
        "block sequence entries are not allowed",
        "a `- ` that is not allowed here",
        "Begin the list on a new line.",
        False,
    ),
    (
        "unknown escape character",
        "an unknown escape in double quotes",
        "Write \\\\ for a backslash, or use 'quotes'.",
        False,
    ),
    ("control characters are not allowed", "a control character", "Remove it; in double quotes write \\x01.", False),
    ("special characters are not allowed", "a control character", "Remove it; in double quotes write \\x01.", False),
    ("undefined alias", "aliases are not allowed", "Write the value out where it is needed.", False),
    ("found undefined tag handle", "tags (`!…`) are not allowed", "Put text that begins with `!` in quotes.", False),
    ("did not find expected alphabetic", "text cannot begin with `*` or `&`", "Put the whole value in quotes.", False),
    (
        "did not find expected <document start>",
        "this does not belong to what comes before it",
        "Check the indentation of this line and the one before.",
        False,
    ),
)
"""The parser's message → message, hint, and whether to point to the beginning of the construct."""


def quoted(text: str) -> str:
    """Return the text in the quotes that YAML needs: double ones, or single ones if it contains double ones."""
    if '"' not in text and "\\" not in text:
        return f'"{text}"'
    return "'" + text.replace("'", "''") + "'"
