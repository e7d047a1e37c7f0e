"""The positions of the values of a file: paths, marks, and problems that point to them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from gorgon_common.errors import Problem

Path = tuple[str | int, ...]

_TOKEN = re.compile(r"\[(\d+)\]|\[(\"(?:[^\"\\]|\\.)*\")\]|\.?([^.\[\]]+)")
_SIMPLE = re.compile(r"[^.\[\]\"\s]+")
_SHORT_FORMS = {"models": "model", "retry": "max_retries", "shell": "run", "fallback": "default_output"}


class Mark(NamedTuple):
    """The position of a node: `start` and `end` are offsets in the text, `line` and `column` count from 1."""

    start: int
    end: int
    line: int
    column: int
    style: str = ""  # of a scalar: "" plain, ' and " quoted, | and > block
    scalar: bool = True


def format_path(path: Path) -> str:
    """Return `steps[2].prompt` for `("steps", 2, "prompt")`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _SIMPLE.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part, ensure_ascii=False)}]"
    return text


def parse_path(text: str) -> Path:
    """Return the path that `format_path` was given."""
    parts: list[str | int] = []
    for match in _TOKEN.finditer(text):
        if match[1] is not None:
            parts.append(int(match[1]))
        else:
            parts.append(json.loads(match[2]) if match[2] is not None else match[3])
    return tuple(parts)


@dataclass(slots=True)
class Positions:
    """The position of every value in the file.

    A path may be given as a tuple or as text (`steps[2].prompt`).  A path that is not in the file resolves to its
    nearest ancestor that is, so a value that was filled in still points to the step that it belongs to.
    """

    source: str = ""
    values: dict[Path, Mark] = field(default_factory=dict)
    keys: dict[Path, Mark] = field(default_factory=dict)
    moved: dict[Path, Path] = field(default_factory=dict)
    """Older files: path in the spec → path in the file."""

    def origin(self, path: Path | str) -> Path:
        """Return the path in the file for a path in the spec: the same, except in older files."""
        whole = parse_path(path) if isinstance(path, str) else path
        for length in range(len(whole), -1, -1):
            source = self.moved.get(whole[:length])
            if source is not None:
                return (*source, *whole[length:])
        return whole

    def mark(self, path: Path | str, *, key: bool = False) -> Mark | None:
        """Return the mark of a value (or of its key), or of its nearest ancestor; None for an empty file."""
        whole = self.origin(path)
        if key and whole in self.keys:
            return self.keys[whole]
        for length in range(len(whole), -1, -1):
            found = self.values.get(whole[:length]) or self._folded(whole[:length])
            if found is not None:
                return found
        return None

    def _folded(self, path: Path) -> Mark | None:
        """Return the mark of the short form of a value, such as `model` where the spec has `models`."""
        if not path or path[-1] not in _SHORT_FORMS:
            return None
        return self.values.get((*path[:-1], _SHORT_FORMS[str(path[-1])]))

    def at(self, path: Path | str, *, key: bool = False) -> tuple[int | None, int | None]:
        """Return line and column, from 1, of a value (or of its key)."""
        mark = self.mark(path, key=key)
        return (mark.line, mark.column) if mark else (None, None)

    def inside(self, path: Path | str, offset: int) -> tuple[int | None, int | None]:
        """Return line and column of the character at `offset` in a text value, such as that of an expression in it."""
        whole = self.origin(path)
        # `approval: text` is read as `approval.message`; in that case the text is one level up.
        mark = self.values.get(whole) or self.values.get(whole[:-1])
        if mark is None or not mark.scalar:
            return self.at(path)
        place = _offset(self.source, mark, offset)
        before = self.source.rfind("\n", 0, place)
        return mark.line + self.source.count("\n", mark.start, place), place - before

    def text(self, path: Path | str, *, limit: int = 120) -> str:
        """Return the text of a value as written in the file: its first line, cut to `limit` characters."""
        mark = self.mark(path)
        if mark is None:
            return ""
        found = self.source[mark.start : mark.end].strip().split("\n", 1)[0].rstrip()
        return found if len(found) <= limit else found[: limit - 1] + "…"

    def problem(
        self,
        message: str,
        path: Path | str,
        *,
        file: str | None = None,
        hint: str = "",
        key: bool = False,
        offset: int | None = None,
        severity: str = "error",
    ) -> Problem:
        """Return a problem at a path; `offset` points into a text value."""
        line, column = self.at(path, key=key) if offset is None else self.inside(path, offset)
        mark = self.mark(path, key=key)
        text = self.source[mark.start : mark.end] if key and mark else self.text(path)
        shown = path if isinstance(path, str) else format_path(path)
        return Problem(message, file, line, column, shown, hint, severity, text.split("\n", 1)[0])


def _offset(source: str, mark: Mark, offset: int) -> int:
    """Return the position in the source of the character at `offset` in the text that was read from there.

    This does not run the reader again.  It walks over the source and derives the text along the way, including line
    folds, indentation and escapes.
    """
    place, end = mark.start, mark.end
    if mark.style in {"|", ">"}:
        place = source.find("\n", place, end) + 1
        indent = len(source[place:end]) - len(source[place:end].lstrip(" \n"))
        indent -= source[place : place + indent].rfind("\n") + 1
        header = re.match(r"[|>][-+]?([1-9])", source[mark.start : mark.start + 3])
        if header:  # counted from the parent's indentation
            begin = source.rfind("\n", 0, mark.start) + 1
            line = source[begin : mark.start]
            indent = len(line) - len(line.lstrip(" ")) + int(header[1])
        return _block_offset(source, place, end, indent, offset, folded=mark.style == ">")
    if mark.style:
        place += 1
    seen = 0
    while seen < offset and place < end:
        char = source[place]
        if mark.style == '"' and char == "\\":
            following = source[place + 1 : place + 2]
            place += {"x": 4, "u": 6, "U": 10}.get(following, 2)
            if following == "\n":
                seen -= 1
        elif mark.style == "'" and char == "'":
            place += 2
        elif char in "\r\n" or (char in " \t" and _ends_line(source, place, end)):
            place, breaks = _fold(source, place, end)
            seen += max(breaks - 1, 1) - 1
        else:
            place += 1
        seen += 1
    return min(place, end)


def _ends_line(source: str, place: int, end: int) -> bool:
    while place < end and source[place] in " \t":
        place += 1
    return place < end and source[place] in "\r\n"


def _fold(source: str, place: int, end: int) -> tuple[int, int]:
    """Skip the white space around line breaks; return where the text continues, and the number of breaks."""
    breaks = 0
    while place < end and source[place] in " \t\r\n":
        breaks += source[place] == "\n"
        place += 1
    return place, breaks


def _block_offset(source: str, place: int, end: int, indent: int, offset: int, *, folded: bool) -> int:
    seen = 0
    while place < end:
        stop = source.find("\n", place, end)
        stop = end if stop < 0 else stop
        begin = min(place + indent, stop)
        if seen + (stop - begin) >= offset:
            return begin + (offset - seen)
        seen += stop - begin + 1
        place = stop + 1
        if folded and source[place:end].split("\n", 1)[0].strip() == "" and begin < stop:
            # The break before an empty line is dropped; the empty line itself becomes the line feed.
            seen -= 1
    return end
