"""Servers that do not say what they used: budgets hold, and every sum that a person sees says what it does not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.model_server import ModelServer, Say, model_server

CHAIN = "name: chain\nLIMITS\nsteps:\n" + "".join(
    f"  - {{id: s{number}, provider: openai, model: gpt-5, prompt: hello, max_tokens: 500, max_retries: 0"
    f"{f', depends_on: s{number - 1}' if number else ''}}}\n"
    for number in range(4)
)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as made:
        yield made


class Desk:
    """The commands, in a home of their own, against one server."""

    def __init__(self, folder: Path, server: ModelServer) -> None:
        self.folder = folder
        self.environment = {**os.environ, "GORGON_HOME": str(folder), "OPENAI_BASE_URL": f"{server.url}/v1"}

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gorgon_common.cli", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def json(self, *arguments: str, code: int = 0) -> Any:
        text = self(*arguments, "--json", code=code)
        return json.loads(text[text.index("{") : text.rindex("}") + 1])


@pytest.fixture
def gorgon(tmp_path: Path, server: ModelServer) -> Desk:
    return Desk(tmp_path, server)


def test_a_server_that_does_not_count_passes_no_budget(gorgon: Desk, server: ModelServer) -> None:
    server.say(*[Say(reply={"text": "fine", "raw_usage": None})] * 4)
    (gorgon.folder / "chain.yaml").write_text(CHAIN.replace("LIMITS", "limits: {budget_usd: 0.012}"))
    ran = gorgon.json("run", "chain.yaml", "--live", code=1)
    assert len(server.seen) == 2, "two calls fit at their worst"
    assert ran["error"]["kind"] == "budget"
    assert (ran["cost_usd"], ran["known_cost_usd"], ran["unpriced_calls"]) == (None, 0.0, 2)
    assert [step["unpriced_calls"] for step in ran["steps"]] == [1, 1, 0, 0]
    report = gorgon.json("costs", "report")
    assert (report["total"]["cost_usd"], report["total"]["unpriced_calls"]) == (None, 2)


def test_every_sum_says_how_many_calls_it_does_not_know(gorgon: Desk, server: ModelServer) -> None:
    server.say(
        Say(reply={"text": "fine", "usage": {"input": 1000, "output": 1000}}),
        *[Say(reply={"text": "fine", "raw_usage": None})] * 3,
    )
    (gorgon.folder / "chain.yaml").write_text(CHAIN.replace("LIMITS", ""))
    told = "$0.0112 + 3 calls of unknown cost"
    assert told in gorgon("run", "chain.yaml", "--live")
    assert told in gorgon("runs", "show", "last")
    assert told in gorgon("runs", "explain", "last")
    assert told in gorgon("costs", "report")
    assert "$0.0112 + ?" in gorgon("runs", "ls")


def test_a_model_of_ones_own_is_free_where_its_price_says_so(gorgon: Desk, server: ModelServer) -> None:
    (gorgon.folder / "own.yaml").write_text(
        "name: own\nsteps:\n  - {id: a, provider: openai, model: llama3.3, prompt: hello, max_retries: 0}\n"
    )
    hint = gorgon.json("run", "own.yaml", "--live", code=1)["error"]["hint"]
    assert server.seen == []
    entry = next(line for line in hint.splitlines() if line.startswith("- {"))
    planned = gorgon("plan", "own.yaml", "--live")
    assert "The cost of a is unknown" in planned
    assert entry in planned
    (gorgon.folder / "prices.yaml").write_text(entry)
    gorgon.environment["GORGON_PRICES"] = str(gorgon.folder / "prices.yaml")
    server.say(Say(reply={"text": "fine", "raw_usage": None}))
    ran = gorgon.json("run", "own.yaml", "--live")
    assert (ran["status"], ran["cost_usd"], ran["unpriced_calls"]) == ("succeeded", 0.0, 0)
