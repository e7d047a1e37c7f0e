"""The errors of expressions."""

from __future__ import annotations

from gorgon_common.errors import ExpressionError


class ExpressionSyntaxError(ExpressionError):
    """The expression cannot be read.

    `offset` counts characters from the start of the text that was given to `parse` or `parse_template`; `at` holds the
    keys down to that text where it is part of a structured condition.
    """

    at: tuple[str | int, ...] = ()

    def __init__(self, message: str, offset: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.offset = offset


class MissingValue(ExpressionError):
    """A value that an expression refers to does not exist; `default(x, y)` catches exactly this."""
