"""YAML text → plain data, with the place of every value in the file.

A strict reading of YAML 1.2: core types only (`on` and `yes` are text), no duplicate keys, no anchors, aliases or tags,
one document, and limits on size, depth and number of nodes.  It works on the parser's events, so that a bomb is refused
before anything is built from it.  JSON is read by the same code.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from gorgon_common.errors import Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_NODES = 200_000
MAX_PROBLEMS = 100

Path = tuple[str | int, ...]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]{1,400}")
_OCTAL = re.compile(r"0o[0-7]{1,400}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNQUOTED = re.compile(r"^(?P<lead>\s*(?:-\s+)*(?:[\w.$-]+:\s+)?)(?P<value>\{\{.*)$")
_TOKEN = re.compile(r"\[(\d+)\]|\[(\"(?:[^\"\\]|\\.)*\")\]|\.?([^.\[\]]+)")
_SIMPLE = re.compile(r"[^.\[\]\"\s]+")


_SHORT_FORMS = {"models": "model", "retry": "max_retries", "shell": "run", "fallback": "default_output"}


class Mark(NamedTuple):
    """Where a node is: `start` and `end` are offsets in the text, `line` and `column` count from 1."""

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
    """Return what `format_path` was given."""
    parts: list[str | int] = []
    for match in _TOKEN.finditer(text):
        if match[1] is not None:
            parts.append(int(match[1]))
        else:
            parts.append(json.loads(match[2]) if match[2] is not None else match[3])
    return tuple(parts)


@dataclass(slots=True)
class Positions:
    """Where everything is in the file.

    A path may be given as a tuple or as text (`steps[2].prompt`).  A path that is not in the file resolves to its
    nearest ancestor that is, so a value that was filled in still points at the step it belongs to.
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
        """The mark of the short form of a value, such as `model` where the spec has `models`."""
        if not path or path[-1] not in _SHORT_FORMS:
            return None
        return self.values.get((*path[:-1], _SHORT_FORMS[str(path[-1])]))

    def at(self, path: Path | str, *, key: bool = False) -> tuple[int | None, int | None]:
        """Return line and column, from 1, of a value (or of its key)."""
        mark = self.mark(path, key=key)
        return (mark.line, mark.column) if mark else (None, None)

    def inside(self, path: Path | str, offset: int) -> tuple[int | None, int | None]:
        """Return line and column of the character at `offset` of a text value, such as that of an expression in it."""
        whole = self.origin(path)
        # `approval: text` is read as `approval.message`: then the text is one step up.
        mark = self.values.get(whole) or self.values.get(whole[:-1])
        if mark is None or not mark.scalar:
            return self.at(path)
        place = _offset(self.source, mark, offset)
        before = self.source.rfind("\n", 0, place)
        return mark.line + self.source.count("\n", mark.start, place), place - before

    def text(self, path: Path | str, *, limit: int = 120) -> str:
        """Return the text of a value as it stands in the file, the first line of it at most `limit` long."""
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
    """Find the place in the source of the character at `offset` of the text that was read from there.

    The reader is not asked again: the source is walked beside what it must have become, line folds, indentation and
    escapes included.
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
    """Skip the white space around line breaks; return where the text goes on and how many breaks there were."""
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


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Document:
    """What was read.  `whole` is False where reading had to stop: then the data is not worth checking."""

    data: Any
    positions: Positions
    problems: list[Problem]
    whole: bool = True


class _Stop(Exception):
    """Reading cannot go on."""


@dataclass(slots=True)
class _Frame:
    """A mapping or a list that is being read."""

    made: Any
    path: Path
    start: Any
    flow: bool
    key: str | None = None
    usable: bool = True  # False: the key was refused, its value is read and dropped
    keyed: bool = False


def read_document(text: str, *, file: str | None = None) -> Document:
    """Read a YAML or JSON text.  Raises nothing: every problem is in the result."""
    return _Reader(text, file).read()


class _Reader:
    def __init__(self, text: str, file: str | None) -> None:
        text = text.removeprefix("\ufeff")  # the parser does not count it, and neither does an editor
        self.text = text
        self.file = file
        self.positions = Positions(text)
        self.problems: list[Problem] = []
        self.nodes = 0
        self.frames: list[_Frame] = []
        self.root: Any = None
        self.documents = 0
        self.anchors: set[str] = set()
        self.breaks = [match.start() for match in re.finditer("\n", text)]

    def read(self) -> Document:
        try:
            self._size()
            self._events()
            if not self.documents or (self.root is None and not self.problems):
                self._tell("the file is empty", 1, 1, hint="A workflow needs at least a `name:` and `steps:`.")
                raise _Stop
            return Document(self.root, self.positions, self.problems)
        except _Stop:
            return Document(None, self.positions, self.problems, whole=False)

    # Limits and telling

    def _size(self) -> None:
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            line, column = _line_column(self.text, error.start)
            self._tell("a character that is not valid Unicode", line, column, hint="Save the file as UTF-8.")
            raise _Stop from None
        if size > MAX_BYTES:
            hint = "Move long prompts and data into inputs or files of their own."
            self._tell(f"the file has {size:,} bytes; at most {MAX_BYTES:,} (256 KB) are read", 1, 1, hint=hint)
            raise _Stop

    def _tell(self, message: str, line: int, column: int, *, hint: str = "", text: str = "", path: Path = ()) -> None:
        shown = text or _line(self.text, line).strip()
        self.problems.append(Problem(message, self.file, line, column, format_path(path), hint, "error", shown[:120]))
        if len(self.problems) >= MAX_PROBLEMS:
            raise _Stop

    def _tell_at(self, message: str, mark: Any, *, hint: str = "", text: str = "", path: Path = ()) -> None:
        line, column = self._where(mark)
        self._tell(message, line, column, hint=hint, text=text, path=path)

    def _where(self, mark: Any) -> tuple[int, int]:
        """Line and column as an editor counts them: for the parser U+2028 and the like end a line, too."""
        line = bisect.bisect_left(self.breaks, mark.index)
        return line + 1, mark.index - (self.breaks[line - 1] if line else -1)

    def _mark(self, start: Any, end: int, style: str = "", *, scalar: bool = True) -> Mark:
        return Mark(start.index, max(end, start.index), *self._where(start), style, scalar)

    # Events

    def _events(self) -> None:
        try:
            events = yaml.parse(self.text, Loader=_LOADER)
            for event in events:
                self._event(event, events)
        except (yaml.YAMLError, ValueError) as error:
            if self.text.lstrip("\ufeff \t\r\n").startswith("{") and self._as_json():
                return
            self._syntax(error)
            raise _Stop from None

    def _event(self, event: Any, events: Iterator[Any]) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._count(event)
            self._scalar(event)
        elif isinstance(event, yaml.MappingStartEvent):
            if self._is_template(event):
                self._template(event, events)
            else:
                self._open({}, event)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._open([], event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close(event)
        elif isinstance(event, yaml.AliasEvent):
            self._count(event)
            self._no_anchors(f"aliases (`*{event.anchor}`) are not allowed", event.start_mark)
            self._put(None, event, event.end_mark, refused=True)
        elif isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                hint = "Remove the `---`, or put the second workflow into a file of its own."
                self._tell_at("a file holds one workflow; a second document begins here", event.start_mark, hint=hint)
                raise _Stop

    def _no_anchors(self, message: str, mark: Any) -> None:
        """Tell of each name once: there may be thousands of the same."""
        if message not in self.anchors:
            self.anchors.add(message)
            hint = "Write the value out where it is needed; `defaults:` holds what all steps share."
            self._tell_at(message, mark, hint=hint)

    def _count(self, event: Any) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            hint = "Split the workflow, or pass large data as inputs."
            self._tell_at(f"the file has more than {MAX_NODES:,} values", event.start_mark, hint=hint)
            raise _Stop
        anchor = getattr(event, "anchor", None)
        if anchor and not isinstance(event, yaml.AliasEvent):
            self._no_anchors(f"anchors (`&{anchor}`) are not allowed", event.start_mark)
        tag = getattr(event, "tag", None)
        if tag and tag not in {"!", "tag:yaml.org,2002:str"}:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            hint = "Write the value without it; quote what is text."
            self._tell_at(f"tags (`{shown}`) are not allowed", event.start_mark, hint=hint)

    def _open(self, made: Any, event: Any) -> None:
        self._count(event)
        if len(self.frames) >= MAX_DEPTH:
            hint = "Flatten it: groups of steps can be workflows of their own."
            self._tell_at(f"nested deeper than {MAX_DEPTH} levels", event.start_mark, hint=hint)
            raise _Stop
        self.frames.append(_Frame(made, self._path(), event.start_mark, event.flow_style))

    def _close(self, event: Any) -> None:
        frame = self.frames.pop()
        end = event.end_mark if frame.flow else event.start_mark
        start = frame.start
        self.positions.values.setdefault(
            frame.path,
            self._mark(start, end.index, scalar=False),
        )
        self._place(frame.made, start)

    def _path(self) -> Path:
        if not self.frames:
            return ()
        frame = self.frames[-1]
        if isinstance(frame.made, list):
            return (*frame.path, len(frame.made))
        return (*frame.path, frame.key if frame.key is not None and frame.usable else "?")

    def _scalar(self, event: Any) -> None:
        frame = self.frames[-1] if self.frames else None
        if frame is not None and isinstance(frame.made, dict) and not frame.keyed:
            self._key(frame, event)
            return
        value = event.value
        if event.implicit[0] and not event.style and not event.tag:
            value = self._plain(event)
        self._put(value, event, event.end_mark)

    def _put(self, value: Any, event: Any, end: Any, *, refused: bool = False) -> None:
        start = event.start_mark
        path = self._path()
        style = getattr(event, "style", None) or ""
        self.positions.values.setdefault(path, self._mark(start, end.index, style))
        if refused and self.frames:
            frame = self.frames[-1]
            if isinstance(frame.made, dict) and not frame.keyed:
                frame.keyed, frame.usable, frame.key = True, False, None
                return
        self._place(value, start)

    def _place(self, value: Any, start: Any) -> None:
        if not self.frames:
            self.root = value
            return
        frame = self.frames[-1]
        if isinstance(frame.made, list):
            frame.made.append(value)
        elif not frame.keyed:
            hint = "A key is a word, such as `name:`."
            self._tell_at("a mapping or a list cannot be a key", start, hint=hint)
            frame.keyed, frame.usable, frame.key = True, False, None
        else:
            if frame.usable and frame.key is not None:
                frame.made[frame.key] = value
            frame.keyed, frame.usable, frame.key = False, True, None

    def _key(self, frame: _Frame, event: Any) -> None:
        key, start = event.value, event.start_mark
        path = (*frame.path, key)
        frame.keyed, frame.usable, frame.key = True, True, key
        if path in self.positions.keys:
            frame.usable = False
            first = self.positions.keys[path].line
            self._tell_at(f"`{key}` is written twice", start, hint=f"It stands in line {first} already.", path=path)
            return
        self.positions.keys[path] = self._mark(start, event.end_mark.index)

    # Scalars

    def _plain(self, event: Any) -> Any:
        text = event.value
        if text in _NULL:
            return None
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
        if text[0] in "-+.0123456789":
            return self._number(text, event)
        return text

    def _number(self, text: str, event: Any) -> Any:
        if _INT.fullmatch(text):
            return int(text)
        if _OCTAL.fullmatch(text):
            return int(text[2:], 8)
        if _HEX.fullmatch(text):
            return int(text[2:], 16)
        number = math.inf if _NOT_FINITE.fullmatch(text) else None
        if number is None and _FLOAT.fullmatch(text):
            number = float(text)
        if number is None:
            return text
        if not math.isfinite(number):
            self._tell_at(f"`{text[:40]}` is not a number that can be used", event.start_mark, path=self._path())
            return 0
        return number

    # The unquoted template

    def _is_template(self, event: Any) -> bool:
        if not event.flow_style or not self.frames:
            return False
        frame = self.frames[-1]
        return frame.flow and isinstance(frame.made, dict) and not frame.keyed and not frame.made

    def _template(self, event: Any, events: Iterator[Any]) -> None:
        """`{{ x }}` without quotes is a mapping whose key is a mapping: read on to its end and keep it as text."""
        depth, end = 2, event
        while depth:
            end = next(events)
            self._count(end)
            depth += isinstance(end, yaml.CollectionStartEvent)
            depth -= isinstance(end, yaml.CollectionEndEvent)
        frame = self.frames.pop()
        text = self.text[frame.start.index : end.end_mark.index]
        rest = self.text[end.end_mark.index :].split("\n", 1)[0].rstrip()
        if rest.strip() and not rest.lstrip().startswith("#") and not any(outer.flow for outer in self.frames):
            # Text goes on behind it; the reader will stumble over that next.
            text += rest
        self._tell_at(
            f"`{text}` must be in quotes", frame.start, hint=f"Write {quoted(text)}", text=text, path=frame.path
        )
        start = frame.start
        self.positions.values[frame.path] = self._mark(start, end.end_mark.index)
        self._place(text, start)

    # Syntax errors

    def _syntax(self, error: Exception) -> None:
        unquoted = list(self._unquoted_lines())
        for line, column, value in unquoted:
            self._tell(
                f"`{value}` must be in quotes: it begins with `{{{{`", line, column, hint=f"Write {quoted(value)}"
            )
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = mark.index if mark is not None else getattr(error, "position", 0)
        line, column = _line_column(self.text, min(place or 0, len(self.text)))
        context = getattr(error, "context_mark", None)
        message, hint, at_context = self._explain(error, line, column)
        if at_context and context is not None:
            line, column = self._where(context)
        if unquoted or line in {problem.line for problem in self.problems}:
            return  # that is what the parser stumbled over
        self._tell(message, line, column, hint=hint)

    def _unquoted_lines(self) -> Iterator[tuple[int, int, str]]:
        told = {problem.line for problem in self.problems}
        for number, line in enumerate(self.text.split("\n"), 1):
            if number in told:
                continue
            match = _UNQUOTED.match(line.rstrip())
            if match and "}}" in match["value"]:
                yield number, len(match["lead"]) + 1, match["value"]

    def _explain(self, error: Exception, line: int, column: int) -> tuple[str, str, bool]:
        """Return message, hint and whether the beginning of the construct is the place to point at."""
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        shown = _line(self.text, line)
        char = shown[column - 1 : column]
        for words, message, hint, at_context in _EXPLAINED:
            if words in problem:
                return message.format(char=char), hint, at_context
        if "cannot start any token" in problem:
            if "\t" in shown[:column]:
                return "a tab is used for indentation", "Indent with spaces: YAML does not allow tabs.", False
            return f"text cannot begin with `{char}`", "Put the whole value in quotes.", False
        if "end of stream" in problem:
            return "a quote is opened here and never closed", "Add the closing quote.", True
        return f"this is not valid YAML: {problem}", "", False

    def _as_json(self) -> bool:
        """Read JSON that is not YAML (surrogate pairs in escapes); positions are then those of the file."""
        try:
            data = json.loads(self.text.lstrip("\ufeff"), object_pairs_hook=self._pairs)
            self._limits(data, 1)
        except (ValueError, RecursionError):
            return False
        self.positions = Positions(self.text, {(): Mark(0, len(self.text), 1, 1)})
        self.root, self.documents = data, 1
        return True

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("duplicate key")
        return made

    def _limits(self, data: Any, depth: int) -> None:
        if depth > MAX_DEPTH + 1:
            raise ValueError("too deep")
        entries = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
        for entry in entries:
            self._limits(entry, depth + 1)


_EXPLAINED = (
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
        "this does not belong to what stands before it",
        "Check the indentation of this line and the one before.",
        False,
    ),
)


def quoted(text: str) -> str:
    """Return the text in the quotes that YAML needs: double ones, single ones where it holds double ones."""
    if '"' not in text and "\\" not in text:
        return f'"{text}"'
    return "'" + text.replace("'", "''") + "'"


def _line(text: str, number: int) -> str:
    lines = text.split("\n")
    return lines[number - 1].rstrip("\r") if 0 < number <= len(lines) else ""


def _line_column(text: str, place: int) -> tuple[int, int]:
    return text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
