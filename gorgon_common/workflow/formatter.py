"""`gorgon fmt`: formats a workflow file canonically, keeping its comments.

It changes indentation (two spaces, lists indented), the order of the top-level keys, the position of `id` in a step
(first), and short forms of values (`depends_on: a` → `[a]`, `90s` → `1m30s`, `0.9` → `90%`).  It keeps comments, blank
lines, quotes, flow or block style, line endings, and the order of keys inside a step.  The meaning never changes: the
result is read again and compared, and formatting it again changes nothing.

JSON files and files in the older format are not converted.  In files in the older format and in invalid files, only the
indentation and the order change.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from gorgon_common import durations
from gorgon_common.documents import Path, Positions, read_document
from gorgon_common.errors import GorgonError, Problem, WorkflowInvalid
from gorgon_common.workflow import legacy
from gorgon_common.workflow.schema import JSON_TYPES, Workflow, duration

_TOP = Workflow.written_keys()
_STRANGE = re.compile("[\x85\u2028\u2029\r](?!\n)")
"""Characters that end a line in YAML 1.1 but in no editor."""
_DIRECTIVES = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*(?:%[^\n]*\n(?:[ \t]*(?:#[^\n]*)?\n)*)+---[ \t]*\n")
"""Directives and the comments around them, up to the line that starts the document."""
_ROUNDS = 4
_DURATIONS = frozenset({"timeout", "deadline", "initial", "cap", "ttl", "for"})


def format_text(text: str, *, file: str | None = None) -> str:
    """Return the text in canonical form.

    Raises WorkflowInvalid if it is not valid YAML, and GorgonError if no canonical form preserves its meaning.
    """
    document = read_document(text, file=file)
    if document.problems:
        raise WorkflowInvalid(document.problems, source=text)
    if text.lstrip("\ufeff \t\r\n").startswith("{") or not isinstance(document.data, dict):
        return text
    strange = _STRANGE.search(text)
    if strange:
        line, column = text.count("\n", 0, strange.start()) + 1, strange.start() - text.rfind("\n", 0, strange.start())
        hint = "Write it as \\u2028 in double quotes, or remove it."
        raise WorkflowInvalid(
            [Problem("an invisible line separator, which cannot be formatted", file, line, column, hint=hint)],
            source=text,
        )
    windows = text.count("\r\n") * 2 > text.count("\n")
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    head = _directives(plain)
    made = _stable(plain[len(head) :], document.data, file, before=head.count("\n"))
    made = head + made
    _compare(document.data, made, file)
    return made.replace("\n", "\r\n") if windows else made


def _directives(text: str) -> str:
    """Return the lines from `%YAML 1.1` to `---`, which stay unchanged; a file is read as YAML 1.2 in any case."""
    match = _DIRECTIVES.match(text)
    return match[0] if match else ""


def _stable(text: str, data: dict[str, Any], file: str | None, *, before: int) -> str:
    """Format until nothing changes any more; `before` is the number of lines above the text.  Raises GorgonError."""
    old, valid = legacy.detect(data), True
    if not old:
        try:
            Workflow.model_validate(data)
        except ValidationError:
            valid = False  # the meaning of its short forms is unknown
    for _ in range(_ROUNDS):
        made = _formatted(text, file, before=before, values=valid and not old, order=not old)
        if made == text:
            return made
        text = made
    raise GorgonError(
        f"{file or 'the text'} has no canonical form: each formatting changes it again, so it was left as it is",
        hint="Please report this with the file.",
    )


def _formatted(text: str, file: str | None, *, before: int, values: bool, order: bool) -> str:
    """Format once: always the indentation, with `values` also the short forms, with `order` the order of keys."""
    yaml = _yaml()
    try:
        tree = yaml.load(text)
    except YAMLError as error:
        raise WorkflowInvalid([_unreadable(error, file, before)]) from None
    if values:
        _workflow(tree)
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    made = _align(text, buffer.getvalue().rstrip("\n") + "\n")
    return _reorder(made) if order else made


def _unreadable(error: YAMLError, file: str | None, before: int) -> Problem:
    """Return the problem for text that the loader can read but the round trip cannot, mostly tabs between words."""
    mark = getattr(error, "problem_mark", None)
    line, column = (mark.line + 1 + before, mark.column + 1) if mark is not None else (1, 1)
    hint = "Use spaces instead of tabs, and quote unusual text."
    return Problem("this is valid, but cannot be formatted as it stands", file, line, column, hint=hint)


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 100_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.allow_duplicate_keys = False
    return yaml


def _comment_lines(text: str) -> tuple[list[str], list[int]]:
    """Return the lines, and the indices of the lines that are only a comment (a `#` inside a text is none)."""
    lines = text.split("\n")
    marks = read_document(text).positions.values.values()
    inside = {
        line
        for mark in marks
        if mark.style
        for line in range(mark.line, mark.line + text.count("\n", mark.start, mark.end))
    }
    return lines, [i for i, line in enumerate(lines) if line.lstrip().startswith("#") and i not in inside]


def _neighbours(lines: list[str], comments: list[int], at: int) -> list[tuple[int, ...]]:
    """Return where the content lines after and before a comment start: the column, and the one after a list's dash."""
    found: list[tuple[int, ...]] = []
    skipped = set(comments)
    for way in (range(at + 1, len(lines)), range(at - 1, -1, -1)):
        content = next((lines[i] for i in way if lines[i].strip() and i not in skipped), "")
        indent = len(content) - len(content.lstrip(" "))
        dashes = len(content) - len(content.lstrip(" -")) if content.lstrip().startswith("- ") else indent
        found.append((indent, dashes))
    return found


def _align(before: str, made: str) -> str:
    """Re-indent stand-alone comments together with the line below (or above), whose indentation may have changed."""
    old_lines, old = _comment_lines(before)
    lines, new = _comment_lines(made)
    if len(old) != len(new):
        return made
    for i, j in zip(old, new, strict=True):
        column = len(old_lines[i]) - len(old_lines[i].lstrip(" "))
        places = [
            (side, depth)
            for side, columns in enumerate(_neighbours(old_lines, old, i))
            for depth, place in enumerate(columns)
            if place == column
        ]
        side, depth = places[0] if places else (0, 0)
        lines[j] = " " * _neighbours(lines, new, j)[side][depth] + lines[j].lstrip(" ")
    return "\n".join(lines)


def _compare(before: dict[str, Any], made: str, file: str | None) -> None:
    """Raise GorgonError unless both mean the same: as workflows, or as data if they are not (yet) valid workflows."""
    after = read_document(made, file=file)
    same = not after.problems and (_same(before, after.data) or _same_workflow(before, after.data))
    if not same:
        raise GorgonError(
            f"formatting {file or 'the text'} would change what it means, so it was left as it is",
            hint="Please report this with the file.",
        )


def _same_workflow(before: dict[str, Any], after: Any) -> bool:
    if legacy.detect(before):
        return False
    try:
        one, other = Workflow.model_validate(before), Workflow.model_validate(after)
    except ValidationError:
        return False
    return one == other and _same(one.model_dump(), other.model_dump())


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal and of the same types; in Python, true equals 1 and 1 equals 1.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# ── Values ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _workflow(tree: Any) -> None:
    _inputs(tree.get("inputs"))
    for key in ("defaults", "limits"):
        if isinstance(tree.get(key), MutableMapping):
            _durations(tree[key])
            _retry(tree[key])
    if isinstance(tree.get("concurrency"), str):
        _set(tree, "concurrency", _flow(key=tree["concurrency"]))
    for part in ("steps", "on_error", "finally"):
        for step in _mappings(tree.get(part)):
            _step(step)


def _mappings(value: Any) -> Iterator[Any]:
    yield from (entry for entry in value if isinstance(entry, CommentedMap)) if isinstance(value, list) else ()


def _step(step: CommentedMap) -> None:
    _durations(step)
    _listed(step, "depends_on")
    _retry(step)
    _default_output(step)
    rules: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("approval", _approval),
        ("wait", _wait),
        ("cache", _cache),
        ("output", _output),
        ("map", _map),
        ("retry", _durations),
    )
    for key, rule in rules:
        if key in step:
            made = rule(step[key])
            if made is not None:
                _set(step, key, made)
    for inner in _mappings(step.get("steps")):
        _step(inner)
    for owner, key in (("map", "reduce"), ("fallback", "step")):
        holder = step.get(owner)
        if isinstance(holder, CommentedMap) and isinstance(holder.get(key), CommentedMap):
            _step(holder[key])


def _flow(**entries: Any) -> CommentedMap:
    made = CommentedMap(entries)
    made.fa.set_flow_style()
    return made


def _set(mapping: CommentedMap, key: str, value: Any) -> None:
    mapping[key] = value


def _rename(mapping: CommentedMap, old: str, new: str, value: Any) -> None:
    """Put `new: value` in place of `old`, keeping its comments."""
    place = list(mapping).index(old)
    comments = mapping.ca.items.pop(old, None)
    del mapping[old]
    mapping.insert(place, new, value)
    if comments is not None:
        mapping.ca.items[new] = comments


def _listed(mapping: CommentedMap, key: str) -> None:
    if isinstance(mapping.get(key), str):
        made = CommentedSeq([mapping[key]])
        made.fa.set_flow_style()
        mapping[key] = made


def _durations(mapping: Any) -> None:
    if not isinstance(mapping, CommentedMap):
        return
    for key in _DURATIONS & set(mapping):
        text = _duration(mapping[key])
        if text is not None:
            mapping[key] = text


def _duration(value: Any) -> str | None:
    """Return the canonical text, or None if the value is already canonical or is not a duration."""
    try:
        text = durations.text(duration(value))
    except ValueError:  # not a duration; `validate` reports that
        return None
    return None if text == value else text


def _retry(mapping: CommentedMap) -> None:
    """Rewrite `retry: 3` and `retry: {max: 3}` as `max_retries: 3`."""
    retry = mapping.get("retry")
    if isinstance(retry, CommentedMap) and set(retry) == {"max"} and not retry.ca.items:
        retry = retry["max"]
    if isinstance(retry, int) and not isinstance(retry, bool):
        if "max_retries" in mapping:
            del mapping["retry"]
        else:
            _rename(mapping, "retry", "max_retries", retry)


def _default_output(step: CommentedMap) -> None:
    """Rewrite `continue_with_default` with `default_output` as `fallback` with a default value."""
    chosen = next((key for key in ("on_failure", "then") if step.get(key) == "continue_with_default"), None)
    if chosen is None or "default_output" not in step or "fallback" in step:
        return
    step[chosen] = "fallback"
    value = step["default_output"]
    flow = not isinstance(value, CommentedMap | CommentedSeq) or value.fa.flow_style()
    # The value carries comments as well; inside flow braces they would end up in the wrong place.
    made = CommentedMap({"type": "default_value", "value": _bare(value) if flow else value})
    if flow:
        made.fa.set_flow_style()
    _rename(step, "default_output", "fallback", made)


def _bare(value: Any) -> Any:
    """Return the value without comments, in flow style."""
    if isinstance(value, Mapping):
        return _flow(**{str(key): _bare(entry) for key, entry in value.items()})
    if isinstance(value, list):
        made = CommentedSeq([_bare(entry) for entry in value])
        made.fa.set_flow_style()
        return made
    return value


def _approval(value: Any) -> Any:
    if isinstance(value, str):
        return _flow(message=value) if "\n" not in value else CommentedMap({"message": value})
    _durations(value)
    if isinstance(value, CommentedMap):
        _listed(value, "approvers")
    return None


def _wait(value: Any) -> Any:
    if isinstance(value, CommentedMap):
        if set(value) == {"for"} and not value.ca.items:
            return _duration(value["for"]) or value["for"]
        _durations(value)
        return None
    return _duration(value)


def _cache(value: Any) -> Any:
    if isinstance(value, CommentedMap):
        _durations(value)
        return None
    return _flow(ttl=_duration(value) or value)


def _map(value: Any) -> None:
    if not isinstance(value, CommentedMap):
        return
    share = value.get("min_success")
    if isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1:
        value["min_success"] = f"{round(share * 100, 6):g}%"


def _inputs(inputs: Any) -> None:
    if not isinstance(inputs, CommentedMap):
        return
    for name, entry in inputs.items():
        if isinstance(entry, str):
            inputs[name] = _flow(type=entry)


def _output(output: Any) -> None:
    """Remove the braces of a field that only states its type."""
    if not isinstance(output, CommentedMap) or output.get("type") in JSON_TYPES:
        return
    for name, entry in output.items():
        alone = isinstance(entry, CommentedMap) and set(entry) == {"type"} and entry["type"] in JSON_TYPES
        if alone and not entry.ca.items and entry.fa.flow_style():
            output[name] = str(entry["type"])


# ── Order of keys ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _reorder(text: str) -> str:
    """Put the top-level keys in the reference's order, and `id` first in steps.  Works on lines, so comments stay."""
    positions = read_document(text).positions
    data = read_document(text).data
    lines = text.split("\n")
    for path, step in _block_steps(data, positions):
        _id_first(lines, positions, path, step)
    moved = "\n".join(lines)
    return _top_order(moved)


def _block_steps(data: Any, positions: Positions) -> Iterator[tuple[Path, list[str]]]:
    """Yield block-style steps whose `id` is not the first key, inner steps first."""

    def walk(steps: Any, path: Path) -> Iterator[tuple[Path, list[str]]]:
        for index, step in enumerate(steps if isinstance(steps, list) else ()):
            if not isinstance(step, dict):
                continue
            at = (*path, index)
            yield from walk(step.get("steps"), (*at, "steps"))
            mark = positions.values[at]
            flow = positions.source[mark.start : mark.start + 1] == "{"
            if "id" in step and next(iter(step)) != "id" and not flow:
                yield at, list(step)

    for part in ("steps", "on_error", "finally"):
        yield from walk(data.get(part) if isinstance(data, dict) else None, (part,))


def _id_first(lines: list[str], positions: Positions, path: Path, keys: list[str]) -> None:
    first = positions.keys[(*path, keys[0])]
    own = positions.keys[(*path, "id")]
    value = positions.values[(*path, "id")]
    if value.line != own.line or own.style or value.end > positions.source.find("\n", value.start):
        return
    begin, at = first.line - 1, own.line - 1
    indent = first.column - 1
    id_line = lines[at][own.column - 1 :]
    first_line = lines[begin]
    lines[begin : at + 1] = [
        first_line[:indent] + id_line,
        " " * indent + first_line[indent:],
        *lines[begin + 1 : at],
    ]


def _top_order(text: str) -> str:
    document = read_document(text)
    if not isinstance(document.data, dict):
        return text
    keys = list(document.data)
    wanted = sorted(keys, key=lambda key: _TOP.index(key) if key in _TOP else len(_TOP))
    if keys == wanted:
        return text
    lines = text.rstrip("\n").split("\n")
    starts = [_with_comments(lines, document.positions.keys[(key,)].line - 1) for key in keys]
    head_end = _header(lines, starts[0], document.positions.keys[(keys[0],)].line - 1)
    starts[0] = head_end
    chunks = {
        key: _trimmed(lines[start:end]) for key, start, end in zip(keys, starts, [*starts[1:], len(lines)], strict=True)
    }
    made = _trimmed(lines[:head_end])
    for position, key in enumerate(wanted):
        long = len(chunks[key]) > 1 or (position and len(chunks[wanted[position - 1]]) > 1)
        if made and (long or position == 0):
            made.append("")
        made.extend(chunks[key])
    return "\n".join(made) + "\n"


def _with_comments(lines: list[str], line: int) -> int:
    """Return the first of the comment and empty lines directly above a key."""
    while line > 0 and (not lines[line - 1].strip() or lines[line - 1].startswith("#")):
        line -= 1
    return line


def _header(lines: list[str], begin: int, key_line: int) -> int:
    """Return where the file's own comment ends: at the last empty line above the first key, but after any modeline."""
    for line in range(key_line - 1, begin - 1, -1):
        if not lines[line].strip():
            return line + 1
    end = begin
    while end < key_line and ("yaml-language-server" in lines[end] or lines[end].startswith("---")):
        end += 1
    return end


def _trimmed(lines: list[str]) -> list[str]:
    begin, end = 0, len(lines)
    while begin < end and not lines[begin].strip():
        begin += 1
    while end > begin and not lines[end - 1].strip():
        end -= 1
    return lines[begin:end]
