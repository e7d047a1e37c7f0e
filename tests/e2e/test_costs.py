"""Money from a person's side: plan before, limit, report and explain afterwards, on a real sandbox."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from gorgon_common.client import schemas
from gorgon_common.client.http import Client
from gorgon_common.engine.estimate import capped
from tests.support.running import Lab, eventually, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

WORK = """
name: work
inputs: {topic: {type: string, default: tea}}
steps:
  - {id: plan, role: planner, prompt: "Plan {{inputs.topic}}"}
  - {id: build, role: builder, prompt: "Do {{task.title}}",
     map: {over: "{{plan.tasks}}", as: task, max_items: 8, max_parallel: 2}}
  - {id: check, role: reviewer, prompt: "Check TRIGGER {{build.output}}", retry: {max: 2, initial: 100ms}}
  - {id: report, role: reporter, prompt: "Report {{check.output}}"}
outputs: {report: "{{report.report}}"}
"""


@pytest.fixture
def lab(tmp_path: Path, sandbox: Sandbox) -> Iterator[Lab]:
    with laboratory(tmp_path, sandbox) as running:
        yield running


@pytest.fixture
def client(lab: Lab) -> Iterator[Client]:
    app = create_app(lab.services, SingleKey("gk_test"))
    with (
        TestClient(app) as http,
        Client("http://testserver", api_key="gk_test", transport=http._transport) as made,
    ):
        yield made


def text(trigger: str = "") -> str:
    return WORK.replace("TRIGGER", f"[[sandbox: {trigger}]]" if trigger else "")


def micros(usd: float) -> int:
    return round(usd * 1_000_000)


def test_reports_add_up_to_what_the_run_and_the_sandbox_say(lab: Lab, client: Client, sandbox: Sandbox) -> None:
    ran = lab.run(text())
    for by in (["provider"], ["model", "role"], ["step"], ["day"], ["run"], ["team", "workflow"]):
        report = lab.services.costs(by, only={"run": ran.id})
        assert sum(micros(row["cost_usd"]) for row in report["rows"]) == micros(ran.document["cost_usd"])
        assert sum(row["tokens"]["input"] for row in report["rows"]) == ran.document["tokens"]["input"]
        schemas.CostReport.model_validate(report)
        assert client.costs(by, only={"run": ran.id}) == report
    real = client.costs(["workflow"])
    assert (real["rows"], real["total"]["calls"], real["targets"]) == ([], 0, ["live", "library"]), "it was play money"
    played = client.costs(["workflow"], only={"target": "sandbox"})
    assert played["total"] == real["by_target"]["sandbox"]
    assert micros(played["total"]["cost_usd"]) == micros(ran.document["cost_usd"])
    calls = lab.services.calls(only={"run": ran.id})["items"]
    assert len(calls) == lab.calls(status=200)
    assert sum(micros(call["cost_usd"]) for call in calls) == micros(ran.document["cost_usd"])
    assert [call["item"] for call in calls if call["step"] == "build"] == list(range(len(ran.items("build"))))
    assert client.calls(only={"run": ran.id})["items"] == calls
    billed = sum(
        kinds["output"]
        for account in sandbox.bill().values()
        for models in account.values()
        for kinds in models.values()
    )
    assert billed == ran.document["tokens"]["output"]


def test_repairs_and_retries_are_told_apart_and_add_up(lab: Lab) -> None:
    ran = lab.run(text("wrong_schema times=1"))
    money = lab.services.explain(ran.id)["money"]
    assert micros(money["cost_usd"]) == micros(ran.document["cost_usd"])
    assert sum(micros(entry["cost_usd"]) for entry in money["for"].values()) == micros(ran.document["cost_usd"])
    assert sum(micros(step["cost_usd"]) for step in money["steps"]) == micros(ran.document["cost_usd"])
    assert money["for"]["repair"]["calls"] == 1
    again = lab.run(text("status=500 times=1"), {"topic": "coffee"})
    money = lab.services.explain(again.id)["money"]
    assert money["for"]["retry"]["calls"] == 1
    (check,) = (step for step in money["steps"] if step["step"] == "check")
    assert [(call["for"], call["outcome"]) for call in check["calls"]] == [("work", "server"), ("retry", "ok")]


def test_explain_says_what_a_run_waits_for_since_when_and_until_when(lab: Lab, client: Client) -> None:
    run = lab.start(text("status=500 times=1").replace("initial: 100ms", "initial: 60s, jitter: none"))

    def look() -> dict[str, Any] | None:
        found = lab.services.explain(run)
        return found if "retry" in found["waiting_for"] else None

    found = eventually(look, what="a retry")
    assert found is not None
    by_step = {entry["step"]: entry for entry in found["waiting"]}
    assert by_step["check"]["why"] == "retry"
    assert "HTTP 500" in by_step["check"]["what"]
    assert found["as_of"] >= by_step["check"]["since"]
    assert by_step["check"]["until"] > found["as_of"]
    assert (by_step["report"]["why"], by_step["report"]["on"]) == ("dependency", ["check"])
    assert set(by_step) == {"check", "report"}
    only = client.explain(run, "report")
    assert [entry["step"] for entry in only["waiting"]] == ["report"]
    schemas.Explanation.model_validate(only)
    lab.services.cancel(run)
    lab.wait(run)
    assert lab.services.explain(run)["waiting"] == []


def test_explain_says_that_nobody_is_there_to_run_it(lab: Lab) -> None:
    plan, _ = lab.services.read(text())
    run = lab.services.submit(plan, {}, home="").run_id
    (first, *_) = lab.services.explain(run, "plan")["waiting"]
    assert first["why"] == "no_worker"
    assert "gorgon worker -q anthropic" in first["what"]


def test_explain_counts_what_was_taken_over_from_an_earlier_run(lab: Lab) -> None:
    failed = lab.run(text("status=400"))
    assert failed.status == "failed"
    spent = micros(failed.document["cost_usd"])
    resumed = lab.resume(failed.id, text())
    assert resumed.status == "succeeded"
    money = lab.services.explain(resumed.id)["money"]
    assert money["adopted"]["count"] >= 2
    assert micros(money["adopted"]["saved_usd"]) == spent
    assert micros(money["cost_usd"]) == micros(resumed.document["cost_usd"])


def test_explain_splits_the_time(lab: Lab) -> None:
    ran = lab.run(text())
    time = lab.services.explain(ran.id)["time"]
    for part in time["steps"]:
        assert part["seconds"] == pytest.approx(part["queue_s"] + part["calls_s"] + part["other_s"], abs=0.005)
    assert {part["step"] for part in time["steps"]} == {"plan", "build", "check", "report"}


def test_a_plan_learns_from_runs_and_its_worst_holds(lab: Lab, client: Client) -> None:
    plan, _ = lab.services.read(text())
    before = lab.services.estimate(plan, {})
    assert before["history"]["runs"] == 0
    assert {"assumption"} == {basis for step in before["steps"] for basis in step["basis"]}
    for topic in ("tea", "coffee", "water"):
        lab.run(text(), {"topic": topic})
    after = lab.services.estimate(plan, {})
    assert after["history"]["runs"] == 3
    assert {"history"} == {basis for step in after["steps"] for basis in step["basis"]}

    def width(document: dict[str, Any]) -> float:
        band = document["total"]["cost_usd"]
        return float(band["p95"] / band["low"])

    assert width(after) < width(before)
    ran = lab.run(text(), {"topic": "juice"})
    for document in (before, after):
        assert ran.document["cost_usd"] <= document["total"]["cost_usd"]["worst"]
    band = after["total"]["cost_usd"]
    assert band["low"] <= ran.document["cost_usd"] <= band["p95"]
    remote = client.estimate(source=text(), inputs={"topic": "tea"})
    schemas.Estimate.model_validate(remote)
    assert remote["critical_path"]
    assert client.plan(source=text())["estimate"] is None


def test_nothing_is_spent_by_a_plan(lab: Lab) -> None:
    plan, _ = lab.services.read(text())
    lab.services.estimate(plan, {}, target="live")
    assert lab.calls() == 0
    assert lab.services.runs()["items"] == []


def test_max_cost_is_never_passed_and_the_plan_foretells_it(lab: Lab) -> None:
    plan, _ = lab.services.read(text())
    limit = 0.2
    assert lab.services.estimate(capped(plan, 0.000001), {})["budgets"][0]["refuses"] == "certainly"
    run = lab.services.submit(capped(plan, limit), {}, home=lab.home).run_id
    ended = lab.wait(run)
    assert ended.document["cost_usd"] <= limit
    poor = lab.wait(lab.services.submit(capped(plan, 0.000001), {}, home=lab.home).run_id)
    assert poor.status == "failed"
    assert poor.error["kind"] == "budget"
    assert poor.document["cost_usd"] == 0


# The commands


def gorgon(folder: Path, sandbox: Sandbox, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gorgon_common.cli", *arguments],
        env={**os.environ, "GORGON_HOME": str(folder), "GORGON_SANDBOX_URL": sandbox.url},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_commands_from_plan_to_report(tmp_path: Path, sandbox: Sandbox) -> None:
    (tmp_path / "work.yaml").write_text(text())
    planned = gorgon(tmp_path, sandbox, "plan", "work.yaml", "-i", "topic=tea")
    assert "never run before" in planned
    assert "build ×3 (≤ 8)" in planned
    assert "critical path: plan" in planned
    ran = json.loads(gorgon(tmp_path, sandbox, "run", "work.yaml", "--json"))
    report = json.loads(gorgon(tmp_path, sandbox, "costs", "report", "--by", "step", "--run", "last", "--json"))
    assert micros(report["total"]["cost_usd"]) == micros(ran["cost_usd"])
    rows = list(
        csv.DictReader(io.StringIO(gorgon(tmp_path, sandbox, "costs", "report", "--calls", "--run", "last", "--csv")))
    )
    assert sum(micros(float(row["cost_usd"])) for row in rows) == micros(ran["cost_usd"])
    assert {"step", "item", "attempt", "cache_read_tokens", "price_version", "latency_ms"} <= rows[0].keys()
    top = gorgon(tmp_path, sandbox, "costs", "top", "-n", "2", "--target", "sandbox")
    assert [line.split("\t")[0] for line in top.splitlines()[:2]] == ["workflow", "work"]
    explained = gorgon(tmp_path, sandbox, "runs", "explain", "last")
    assert "the work itself" in explained
    assert json.loads(gorgon(tmp_path, sandbox, "plan", "work.yaml", "--json"))["history"]["runs"] == 1


def test_the_commands_say_what_is_wrong(tmp_path: Path, sandbox: Sandbox) -> None:
    for arguments in (
        ("costs", "report", "--by", "colour"),
        ("costs", "report", "--from", "yesterday"),
        ("costs", "report", "--csv", "--json"),
        ("run", "feature-build", "--max-cost", "-1"),
        ("run", "feature-build", "--max-cost", "nan"),
        ("runs", "explain", "run_01KAR6V7Q3M8Z5T2N4H9C1X0WB"),
        ("plan", "no-such-workflow"),
        ("plan", "feature-build", "-i", "nope=1"),
    ):
        gorgon(tmp_path, sandbox, *arguments, code=2)
    assert gorgon(tmp_path, sandbox, "costs", "report", "--json")


def test_max_cost_on_the_command_line_ends_the_run(tmp_path: Path, sandbox: Sandbox) -> None:
    (tmp_path / "work.yaml").write_text(text())
    out = gorgon(tmp_path, sandbox, "run", "work.yaml", "--max-cost", "0.00001", "--json", code=1)
    document = json.loads(out)
    assert document["error"]["kind"] == "budget"
    assert document["cost_usd"] == 0
