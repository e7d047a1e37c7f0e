"""A rich console that prints foreign text as plain text, so that it cannot control the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text


class SafeConsole(Console):
    """Passes every text through `safe` before layout, whatever drawing contains it."""

    def __init__(self, safe: Callable[[str], str], **options: Any) -> None:
        super().__init__(**options)
        self._safe = safe

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Draw a renderable; tables, paddings and groups call this again for each text in them."""
        return super().render(self._cleaned(renderable), options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a plain string as text."""
        return super().render_str(self._safe(text), **options)

    def _cleaned(self, renderable: RenderableType) -> RenderableType:
        if not isinstance(renderable, Text):
            return renderable
        plain = renderable.plain
        if self._safe(plain) == plain:
            return renderable
        parts = [self._part(renderable, begin, end) for begin, end in _runs(renderable)]
        cleaned = renderable.blank_copy()
        for part in parts:
            cleaned.append_text(part)
        if self._safe(cleaned.plain) != cleaned.plain:  # a secret that spans two styles
            cleaned.plain = self._safe(plain)
        return cleaned

    def _part(self, text: Text, begin: int, end: int) -> Text:
        part = text[begin:end]
        clean = self._safe(part.plain)
        if clean == part.plain:
            return part
        made = Text(clean, end="")
        for span in part.spans:
            made.stylize(span.style, 0, len(clean))
        return made


def _runs(text: Text) -> list[tuple[int, int]]:
    """Return the start and end of the parts of a text that have the same styles throughout."""
    edges = sorted({0, len(text), *(edge for span in text.spans for edge in (span.start, span.end))})
    edges = [edge for edge in edges if 0 <= edge <= len(text)]
    return list(pairwise(edges))
