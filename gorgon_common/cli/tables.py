"""Tables: every list that a command prints goes through `show`.

On a terminal a table is fitted to the width.  First, columns of text are shortened with an ellipsis, as long as they
stay readable.  Then columns are left out, in the order of their `drop` ranks.  Ids and numbers are never shortened or
wrapped, because people copy them into the next command.  In a pipe nothing is narrowed: a line of headings, then one
line per row, with cells separated by tabs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from gorgon_common import lazy
from gorgon_common.cli import terminal

if TYPE_CHECKING:
    from rich.text import Text

GAP: Final = 2
"""Spaces between two columns."""
_HARD_LEAST: Final = 4
"""Characters that a column of text keeps if even the columns that are never left out do not fit."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column.  Widths are in cells of the terminal.

    `drop`: columns with 0 are never left out; of the others, the highest is left out first.  `least`: a column of text
    is shortened to this width before any column is left out; None is never shortened.  `room`: the minimum width.
    `wraps`: the text is wrapped instead of shortened; only for the last column.
    """

    heading: str
    drop: int = 0
    least: int | None = None
    right: bool = False
    room: int = 0
    wraps: bool = False


def text(heading: str, *, drop: int = 0, least: int = 12, room: int = 0) -> Column:
    """Return a column of text, which may be shortened."""
    return Column(heading, drop, least, room=room)


def prose(heading: str, *, drop: int = 0) -> Column:
    """Return a last column of sentences, which are wrapped."""
    return Column(heading, drop, least=24, wraps=True)


def exact(heading: str, *, drop: int = 0) -> Column:
    """Return a column of ids, states or times: never shortened."""
    return Column(heading, drop)


def number(heading: str, *, drop: int = 0, room: int = 0) -> Column:
    """Return a column of numbers: never shortened, aligned to the right."""
    return Column(heading, drop, right=True, room=room)


@dataclass(frozen=True, slots=True)
class Layout:
    """The shown columns, by their positions, and their widths."""

    columns: tuple[Column, ...]
    shown: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def left_out(self) -> list[str]:
        """The headings of the columns that do not fit."""
        return [column.heading for place, column in enumerate(self.columns) if place not in self.shown]

    def lines(self, cells: Sequence[Any]) -> Iterator[Text]:
        """Return one row as lines; several if the last column wraps."""
        last = self.shown[-1]
        if not self.columns[last].wraps:
            yield self.line(cells)
            return
        folded = _cell(cells[last]).wrap(lazy.load("rich.console:Console")(width=1000), self.widths[-1])
        indent = sum(self.widths[:-1]) + GAP * (len(self.widths) - 1)
        for position, part in enumerate(folded or [""]):
            yield self.line([*cells[:last], part, *cells[last + 1 :]]) if position == 0 else _blanks(indent) + part

    def line(self, cells: Sequence[Any]) -> Text:
        """Return one row as a line without trailing spaces."""
        made: Text = lazy.load("rich.text:Text")()
        for place, width in zip(self.shown, self.widths, strict=True):
            cell = _cell(cells[place])
            if cell.cell_len > width and self.columns[place].least is not None:
                cell.truncate(width, overflow="ellipsis")
            blanks = _blanks(max(0, width - cell.cell_len))
            made.append_text(blanks + cell if self.columns[place].right else cell + blanks)
            made.append(" " * GAP)
        made.rstrip()
        return made


def layout(columns: Sequence[Column], rows: Iterable[Sequence[Any]], width: int, *, headings: bool = True) -> Layout:
    """Return how a table fits into a width, in cells of the terminal."""
    natural = [max(column.room, len(column.heading) if headings else 0) for column in columns]
    for row in rows:
        natural = [max(most, _cell(cell).cell_len) for most, cell in zip(natural, row, strict=True)]
    shown = list(range(len(columns)))
    while True:
        widths = _shortened(columns, natural, shown, width)
        droppable = [place for place in shown if columns[place].drop]
        if widths is not None or not droppable:
            break
        shown.remove(max(droppable, key=lambda place: (columns[place].drop, place)))
    if widths is None:
        tight = [replace(column, least=column.least and _HARD_LEAST) for column in columns]
        widths = _shortened(tight, natural, shown, width, force=True)
    return Layout(tuple(columns), tuple(shown), tuple((widths or natural)[place] for place in shown))


def _shortened(
    columns: Sequence[Column], natural: Sequence[int], shown: Sequence[int], width: int, *, force: bool = False
) -> list[int] | None:
    """Return widths that fit, with the widest text shortened first; None if that is not enough, unless forced."""
    widths = list(natural)
    excess = sum(widths[place] for place in shown) + GAP * (len(shown) - 1) - width
    while excess > 0:
        longer = [place for place in shown if widths[place] > (columns[place].least or widths[place])]
        if not longer:
            return widths if force else None
        widest = max(longer, key=lambda place: widths[place])
        widths[widest] -= 1
        excess -= 1
    return widths


def show(columns: Sequence[Column], rows: Sequence[Sequence[Any]], *, headings: bool = True, indent: int = 0) -> None:
    """Print rows: fitted to a terminal, complete and separated by tabs in a pipe.

    `headings`: whether a terminal shows them; a pipe always gets them.  `indent`: spaces before each line on a
    terminal.
    """
    titles = [column.heading for column in columns]
    if not terminal.interactive():
        for row in (titles, *rows):
            terminal.say("\t".join(_cell(cell).plain for cell in row))
        return
    screen = terminal.console()
    fitted = layout(columns, rows, screen.width - indent, headings=headings)
    if headings:
        title = fitted.line(titles)
        title.stylize("quiet")
        screen.print(_blanks(indent) + title, soft_wrap=True)
    for row in rows:
        for line in fitted.lines(row):
            screen.print(_blanks(indent) + line, soft_wrap=True)
    if fitted.left_out and headings:
        note = f"Too narrow for: {', '.join(fitted.left_out)}. --json has everything."
        screen.print(lazy.load("rich.text:Text")(note, style="quiet"))


def _blanks(count: int) -> Text:
    made: Text = lazy.load("rich.text:Text")(" " * count)
    return made


def _cell(cell: Any) -> Text:
    """Return a cell as one line of text."""
    made = lazy.load("rich.text:Text")
    if isinstance(cell, made):
        return cell.copy()  # type: ignore[no-any-return]
    return made(" ".join(terminal.safe(str(cell)).split()))  # type: ignore[no-any-return]
