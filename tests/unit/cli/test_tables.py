"""How a table is fitted to a width."""

from __future__ import annotations

import pytest
from rich.text import Text

from gorgon_common.cli import tables
from gorgon_common.cli.tables import layout

COLUMNS = (
    tables.exact("id"),
    tables.text("name", least=8),
    tables.number("cost", drop=1),
    tables.number("tokens", drop=2),
)
ROWS = [("run_0123456789", "a name that is long", "$1,204.50", "12,345,678"), ("run_9876543210", "short", "$0", "")]


def lines(width: int) -> list[str]:
    fitted = layout(COLUMNS, ROWS, width)
    return [line.plain for row in ([column.heading for column in COLUMNS], *ROWS) for line in fitted.lines(row)]


def test_where_there_is_room_nothing_is_changed() -> None:
    assert lines(80) == [
        "id              name                      cost      tokens",
        "run_0123456789  a name that is long  $1,204.50  12,345,678",
        "run_9876543210  short                       $0",
    ]


def test_text_is_shortened_before_a_column_is_left_out() -> None:
    assert lines(48)[1] == "run_0123456789  a name t…  $1,204.50  12,345,678"


def test_columns_are_left_out_by_rank_and_named() -> None:
    assert lines(36)[1] == "run_0123456789  a name t…  $1,204.50"
    assert layout(COLUMNS, ROWS, 36).left_out == ["tokens"]
    assert lines(25)[1] == "run_0123456789  a name t…"
    assert layout(COLUMNS, ROWS, 25).left_out == ["cost", "tokens"]


@pytest.mark.parametrize("width", range(1, 20))
def test_an_id_is_never_cut_however_narrow_it_is(width: int) -> None:
    assert lines(width)[1].startswith("run_0123456789  ")


def test_wide_characters_count_as_they_are_drawn() -> None:
    columns = (tables.text("name", least=4), tables.number("n"))
    fitted = layout(columns, [("日本語の名前", "1"), ("a", "22")], 12)
    assert [fitted.line(row).cell_len for row in (("日本語の名前", "1"), ("a", "22"))] == [12, 12]


def test_sentences_go_on_below_themselves() -> None:
    columns = (tables.exact("id"), tables.prose("what it is for"))
    fitted = layout(columns, [("planner", "one two three four five six seven")], 34)
    assert [line.plain for line in fitted.lines(("planner", "one two three four five six seven"))] == [
        "planner  one two three four five",
        "         six seven",
    ]


def test_a_cell_is_one_line_and_no_markup() -> None:
    fitted = layout((tables.exact("a"),), [("x\n\ty",), ("[red]z[/]",)], 80)
    assert fitted.line(("x\n\ty",)).plain == "x y"
    assert fitted.line(("[red]z[/]",)).plain == "[red]z[/]"
    assert fitted.line((Text("styled", style="red"),)).plain == "styled"
