"""`gorgon budgets set` and `ls`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gorgon_common.cli import build


def gorgon(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(build(), ["budgets", *arguments])
    return done.exit_code, done.output


def test_none_yet() -> None:
    code, said = gorgon("ls")
    assert code == 0
    assert "gorgon budgets set org --usd 100" in said


def test_what_is_set_is_listed() -> None:
    code, said = gorgon("set", "team:blue", "--usd", "12.5", "--per", "day", "--timezone", "Europe/Berlin")
    assert (code, said.strip()) == (0, "team blue per day: $12.50; days begin at midnight in Europe/Berlin.")
    assert gorgon("set", "team:blue", "--tokens", "1000", "--per", "day")[0] == 0
    assert gorgon("set", "workflow:review", "--usd", "1", "--per", "run")[0] == 0
    blue, review = json.loads(gorgon("ls", "--json")[1])
    assert (blue["usd_limit"], blue["token_limit"], blue["timezone"]) == (12.5, 1000, "Europe/Berlin")
    assert {account["target"] for account in blue["accounts"]} == {"live", "sandbox"}
    assert (review["scope"], review["name"], review["period"], review["accounts"]) == ("workflow", "review", "run", [])
    table = gorgon("ls")[1]
    assert "$12.50" in table
    assert "1,000 tok" in table
    assert "separate for each run" in table


def test_a_limit_is_taken_away() -> None:
    gorgon("set", "org", "--usd", "5")
    assert "no limit any more" in gorgon("set", "org", "--usd", "none")[1]
    assert json.loads(gorgon("ls", "--json")[1]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["org"], "needs a limit"),
        (["org", "--usd", "-1"], "cannot be negative"),
        (["org", "--usd", "much"], "not an amount in dollars"),
        (["org", "--tokens", "1.5"], "not a number of tokens"),
        (["nobody", "--usd", "1"], "not a budget scope"),
        (["org", "--usd", "1", "--per", "year"], "no period"),
        (["org", "--usd", "1", "--timezone", "Here"], "no time zone"),
        (["org", "--usd", "none"], "needs a limit"),
    ],
)
def test_what_cannot_be_set_is_told(arguments: list[str], said: str) -> None:
    code, output = gorgon("set", *arguments)
    assert code == 2
    assert said in output
    assert gorgon("ls", "--json")[1].strip() == "[]"
