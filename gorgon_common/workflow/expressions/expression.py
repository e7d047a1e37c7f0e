"""Expressions and templates: parsed once, cached, evaluated as often as needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import tree
from gorgon_common.workflow.expressions.errors import ExpressionSyntaxError, MissingValue
from gorgon_common.workflow.expressions.evaluate import Context, evaluate
from gorgon_common.workflow.expressions.parser import parse_tokens
from gorgon_common.workflow.expressions.values import MAX_TEXT, Env, to_text, too_long

CACHE = 4096
"""Number of parsed expressions, and of parsed templates, that a process caches."""


@dataclass(frozen=True, slots=True)
class Path:
    """A name with constant fields: `plan.tasks[0].id` is Path("plan", ("tasks", 0, "id"), offset)."""

    root: str
    fields: tuple[str | int, ...]
    offset: int

    def __str__(self) -> str:
        return tree.spell(self.root, self.fields)


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression.  `offset` is its start in the surrounding text; offsets inside it refer to that text too."""

    source: str
    tree: tree.Node
    offset: int = 0
    names: frozenset[str] = field(init=False)
    """Root names, without the variables of comprehensions."""
    paths: tuple[Path, ...] = field(init=False)
    """Every name with its constant fields, in text order."""

    def __post_init__(self) -> None:
        found = [Path(root.name, fields, root.offset) for root, fields in tree.free_paths(self.tree)]
        found.sort(key=lambda path: path.offset)
        object.__setattr__(self, "paths", tuple(found))
        object.__setattr__(self, "names", frozenset(path.root for path in found))

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        """Return the value, using the names in `env`.

        With a lenient Env, a missing value makes the whole expression None.  Raises ExpressionError, and MissingValue
        for a value that does not exist.
        """
        lenient = False
        if isinstance(env, Env):
            lenient, env = env.lenient, env.names
        try:
            return evaluate(self.tree, Context(env))
        except MissingValue:
            if lenient:
                return None
            raise
        except RecursionError:
            raise ExpressionError("the data is nested too deeply for an expression") from None

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True, slots=True)
class Template:
    """A text with expressions: literal pieces and Expressions, alternating."""

    source: str
    parts: tuple[str | Expression, ...]
    names: frozenset[str] = field(init=False)
    paths: tuple[Path, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = self.expressions
        object.__setattr__(self, "names", frozenset().union(*(part.names for part in found)))
        object.__setattr__(self, "paths", tuple(path for part in found for path in part.paths))

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """The expressions, in text order."""
        return tuple(part for part in self.parts if isinstance(part, Expression))

    @property
    def is_literal(self) -> bool:
        """Whether it contains no expression."""
        return not any(isinstance(part, Expression) for part in self.parts)

    @property
    def is_single(self) -> bool:
        """Whether it consists of exactly one expression."""
        return len(self.parts) == 1 and isinstance(self.parts[0], Expression)

    def render(self, env: Mapping[str, Any], *, text: bool = True) -> Any:
        """Return the text with every expression replaced by its value; the contents of a value are never evaluated.

        With `text=False`, a template of exactly one expression returns the value itself.  Raises ExpressionError, also
        if the text exceeds MAX_TEXT characters.
        """
        if not text and self.is_single:
            return self.expressions[0].evaluate(env)
        lenient = isinstance(env, Env) and env.lenient
        pieces: list[str] = []
        length = 0
        for part in self.parts:
            if isinstance(part, Expression):
                value = part.evaluate(env)
                piece = "" if value is None and lenient else to_text(value)
            else:
                piece = part
            length += len(piece)
            if length > MAX_TEXT:
                raise too_long("the text", length)
            pieces.append(piece)
        return "".join(pieces)


_OLD_PATH = re.compile(r"[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*|\[\d+\])*")
_OLD_PART = re.compile(r"\.?([A-Za-z_][\w-]*)|\[(\d+)\]")


@lru_cache(maxsize=CACHE)
def parse(source: str, legacy: bool = False) -> Expression:
    """Return the parsed expression.

    With `legacy`, names in a bare path may contain dashes (`run-tests.output`), and braces around the whole expression
    (`${x}`, `{{x}}`) are removed.  Raises ExpressionSyntaxError.
    """
    start, text = 0, source
    if legacy:
        start, end = _unwrapped(source)
        text = source[:end]
        if old := _old_path(text, start):
            return Expression(source, old)
    node, _ = parse_tokens(text, start)
    return Expression(source, node)


def _unwrapped(source: str) -> tuple[int, int]:
    """Return the span of an expression inside the braces that may surround it."""
    start, end = len(source) - len(source.lstrip()), len(source.rstrip())
    for opening, closing in (("${", "}"), ("{{", "}}")):
        if source.startswith(opening, start) and source.endswith(closing, start, end):
            return start + len(opening), end - len(closing)
    return start, end


def _old_path(text: str, start: int) -> tree.Node | None:
    """Parse a path with dashes in its names, which CEL would read as a subtraction."""
    body = text[start:].strip()
    if "-" not in body or not _OLD_PATH.fullmatch(body):
        return None
    offset = start + text[start:].index(body)
    node: tree.Node | None = None
    for match in _OLD_PART.finditer(body):
        at = offset + match.start()
        if node is None:
            node = tree.Ident(at, match[1])
        elif match[1] is not None:
            node = tree.Select(offset, node, match[1], at)
        else:
            node = tree.Index(offset, node, tree.Literal(at, int(match[2])))
    return node


_OPENING = re.compile(r"\{\{")
_OLD_OPENING = re.compile(r"\{\{|\$\{(?!\{)")


@lru_cache(maxsize=CACHE)
def parse_template(text: str, legacy: bool = False) -> Template:
    """Return the parsed template: `{{ expr }}`, and in older files `${expr}` as well.

    A literal `{{` is written `{{ "{{" }}`.  In older files, unparseable expressions remain text, as they were there.
    Raises ExpressionSyntaxError.
    """
    parts: list[str | Expression] = []
    position = 0
    pending = ""
    opening = _OLD_OPENING if legacy else _OPENING
    while match := opening.search(text, position):
        pending += text[position : match.start()]
        old = match.group() == "${"
        try:
            expression, position = _braced(text, match.end(), old=old, legacy=legacy)
        except ExpressionSyntaxError:
            if not legacy:
                raise
            pending += match.group()
            position = match.end()
            continue
        if pending:
            parts.append(pending)
            pending = ""
        parts.append(expression)
    pending += text[position:]
    if pending or not parts:
        parts.append(pending)
    return Template(text, tuple(parts))


def _braced(text: str, start: int, *, old: bool, legacy: bool) -> tuple[Expression, int]:
    """Return the expression that starts after `{{` or `${`, and the offset after its end."""
    if old:
        end = text.find("}", start)
        if end < 0:
            raise ExpressionSyntaxError("`${` is not closed", start - 2)
        inner, after = text[:end], end + 1
    else:
        end = text.find("}}", start)
        inner, after = text[: max(end, start)], end + 2
    if legacy and end >= 0 and (node := _old_path(inner, start)):
        return Expression(inner[start:].strip(), node, start), after
    if old:
        node, _ = parse_tokens(inner, start)
        return Expression(inner[start:].strip(), node, start), after
    node, after = parse_tokens(text, start, closing=True)
    return Expression(text[start : after - 2].strip(), node, start), after


def render_value(value: Any, env: Mapping[str, Any], *, text: bool = False, legacy: bool = False) -> Any:
    """Return a nested value with every string in it rendered as a template; keys are unchanged.

    A string that is exactly one expression keeps the type of its value unless `text` is set.
    """
    if isinstance(value, str):
        if "{" not in value:
            return value
        return parse_template(value, legacy).render(env, text=text)
    if isinstance(value, Mapping):
        return {key: render_value(entry, env, text=text, legacy=legacy) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [render_value(entry, env, text=text, legacy=legacy) for entry in value]
    return value
