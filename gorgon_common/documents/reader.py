"""Reads YAML text as plain data, with the position of every value in the file.

A strict reading of YAML 1.2: core types only (`on` and `yes` are text), no duplicate keys, no anchors, aliases or tags,
one document, and limits on size, depth and number of nodes.  It works on the parser's events, so that a YAML bomb is
rejected before anything is built from it.  The same code reads JSON.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from gorgon_common import strict_json
from gorgon_common.documents.positions import Mark, Path, Positions, format_path
from gorgon_common.documents.scalars import plain_scalar
from gorgon_common.documents.syntax import EXPLAINED, quoted
from gorgon_common.errors import Problem

MAX_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits of a file (bytes, levels, values), and the hints for a file that exceeds them."""

    max_bytes: int
    max_depth: int
    max_nodes: int
    what: str
    """The kind of content, named in the message about a second document."""
    too_large: str
    too_deep: str
    may_be_empty: bool = False


WORKFLOW = Rules(
    max_bytes=4 * 1024 * 1024,
    max_depth=20,
    max_nodes=200_000,
    what="a file holds one workflow",
    too_large="Split the workflow, or pass large texts and data as inputs.",
    too_deep="Flatten it: groups of steps can be workflows of their own.",
)

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_UNQUOTED = re.compile(r"^(?P<lead>\s*(?:-\s+)*(?:[\w.$-]+:\s+)?)(?P<value>\{\{.*)$")


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Document:
    """The result of reading.  `whole` is False if reading had to stop; then the data is not worth checking."""

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
    usable: bool = True  # False: the key was rejected; its value is read and dropped
    keyed: bool = False


def read_document(text: str, *, file: str | None = None, rules: Rules = WORKFLOW) -> Document:
    """Read a YAML or JSON text.  Raises nothing: every problem is in the result."""
    return _Reader(text, file, rules).read()


class _Reader:
    def __init__(self, text: str, file: str | None, rules: Rules) -> None:
        text = text.removeprefix("\ufeff")  # neither the parser nor an editor counts it
        self.text = text
        self.file = file
        self.rules = rules
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
            if self.rules.may_be_empty and not self.documents:
                return Document(None, self.positions, self.problems)
            if not self.rules.may_be_empty and self.root is None and not self.problems:
                self._tell("the file is empty", 1, 1, hint="A workflow needs at least a `name:` and `steps:`.")
                raise _Stop
            return Document(self.root, self.positions, self.problems)
        except _Stop:
            return Document(None, self.positions, self.problems, whole=False)

    # Limits and reporting

    def _size(self) -> None:
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            line, column = _line_column(self.text, error.start)
            self._tell("a character that is not valid Unicode", line, column, hint="Save the file as UTF-8.")
            raise _Stop from None
        if size > self.rules.max_bytes:
            told = f"the file has {size:,} bytes; at most {self.rules.max_bytes:,} are read"
            self._tell(told, 1, 1, hint=self.rules.too_large)
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
        """Return line and column as an editor counts them; the parser also ends lines at U+2028 and the like."""
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
                hint = "Remove the `---`, or put what follows into a file of its own."
                self._tell_at(f"{self.rules.what}; a second document begins here", event.start_mark, hint=hint)
                raise _Stop

    def _no_anchors(self, message: str, mark: Any) -> None:
        """Report each name once; there may be thousands of occurrences."""
        if message not in self.anchors:
            self.anchors.add(message)
            hint = "Write the value out where it is needed; `defaults:` holds what all steps share."
            self._tell_at(message, mark, hint=hint)

    def _count(self, event: Any) -> None:
        self.nodes += 1
        if self.nodes > self.rules.max_nodes:
            told = f"the file has more than {self.rules.max_nodes:,} values"
            self._tell_at(told, event.start_mark, hint=self.rules.too_large)
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
        if len(self.frames) >= self.rules.max_depth:
            told = f"nested deeper than {self.rules.max_depth} levels"
            self._tell_at(told, event.start_mark, hint=self.rules.too_deep)
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
            self._tell_at(f"`{key}` is written twice", start, hint=f"It is already in line {first}.", path=path)
            return
        self.positions.keys[path] = self._mark(start, event.end_mark.index)

    # Scalars

    def _plain(self, event: Any) -> Any:
        try:
            return plain_scalar(event.value)
        except strict_json.NotFinite as error:
            self._tell_at(str(error), event.start_mark, path=self._path())
            return 0

    # The unquoted template

    def _is_template(self, event: Any) -> bool:
        if not event.flow_style or not self.frames:
            return False
        frame = self.frames[-1]
        return frame.flow and isinstance(frame.made, dict) and not frame.keyed and not frame.made

    def _template(self, event: Any, events: Iterator[Any]) -> None:
        """Read an unquoted `{{ x }}`, which YAML parses as a mapping whose key is a mapping, and keep it as text."""
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
            # More text follows it, which would be the parser's next error.
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
            return  # this is the cause of the parser's error
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
        """Return message, hint, and whether to point to the beginning of the construct."""
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        shown = _line(self.text, line)
        char = shown[column - 1 : column]
        for words, message, hint, at_context in EXPLAINED:
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
        """Read JSON that is not YAML (surrogate pairs in escapes); positions are then those of the file as a whole."""
        try:
            data = strict_json.loads(self.text.lstrip("\ufeff"), unique_keys=True)
            self._limits(data, 1)
        except ValueError:
            return False
        self.positions = Positions(self.text, {(): Mark(0, len(self.text), 1, 1)})
        self.root, self.documents = data, 1
        return True

    def _limits(self, data: Any, depth: int) -> None:
        if depth > self.rules.max_depth + 1:
            raise ValueError("too deep")
        entries = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
        for entry in entries:
            self._limits(entry, depth + 1)


def _line(text: str, number: int) -> str:
    lines = text.split("\n")
    return lines[number - 1].rstrip("\r") if 0 < number <= len(lines) else ""


def _line_column(text: str, place: int) -> tuple[int, int]:
    return text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
