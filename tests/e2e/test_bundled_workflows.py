"""Every bundled workflow, run as a person would: `gorgon run NAME`, embedded, against a sandbox process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gorgon_common.workflow import catalogue
from tests.support.sandbox import Sandbox, sandbox, sandbox_process, start_sandbox

__all__ = ["sandbox", "sandbox_process"]

NAMES = [entry.name for entry in catalogue.entries()]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def gorgon_run(home: Path, sandbox: Sandbox, *arguments: str, **environment: str) -> dict[str, Any]:
    """`gorgon run … --json`; returns the document of a run that succeeded."""
    done = subprocess.run(
        [sys.executable, "-m", "gorgon_common.cli", "run", *arguments, "--json"],
        env={**os.environ, "GORGON_HOME": str(home), "GORGON_SANDBOX_URL": sandbox.url, **environment},
        cwd=home.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["status"] == "succeeded"
    assert document["error"] is None
    return document


def when(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def by_id(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for step in document["steps"]:
        found.setdefault(step["id"], []).append(step)
    return found


def agents(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for step in document["steps"] if step["kind"] == "agent" and step["status"] == "succeeded"]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_without_arguments(name: str, home: Path, sandbox: Sandbox) -> None:
    document = gorgon_run(home, sandbox, name)
    assert document["workflow"] == name
    assert document["outputs"]
    assert all(value not in (None, "", []) for value in document["outputs"].values()), document["outputs"]
    assert len(agents(document)) >= 4
    assert document["cost_usd"] > 0
    assert document["tokens"]["input"] > document["tokens"]["output"] > 0


def test_feature_build_fans_out_and_joins(home: Path, sandbox: Sandbox) -> None:
    document = gorgon_run(home, sandbox, "feature-build", "-i", "feature_request=Dark mode for the settings page")
    roles = [step["role"] for step in agents(document)]
    assert {"planner", "builder", "tester", "security", "reviewer", "documenter"} == set(roles)
    assert roles.count("builder") >= 2
    assert 7 <= len(roles) <= 10
    assert len(sandbox.log(status=200, role="builder")) == roles.count("builder")
    assert document["outputs"]["approved"] is True
    assert len(document["outputs"]["files"]) == roles.count("builder")


def test_feature_build_stops_at_a_plan_that_is_not_approved(home: Path) -> None:
    refused = {
        "summary": "Unsafe.",
        "tasks": [],
        "risks": [],
        "success_criteria": [],
        "questions": [],
        "approved": False,
    }
    with start_sandbox(faults=[{"role": "planner", "json": refused}]) as sandbox:
        document = gorgon_run(home, sandbox, "feature-build")
        assert [entry["role"] for entry in sandbox.log(status=200)] == ["planner"]
    assert document["outputs"]["approved"] is False
    assert document["outputs"]["verdict"] == "Unsafe."
    assert document["outputs"]["files"] == []
    steps = by_id(document)
    for name in ("build", "tests", "audit", "review", "docs"):
        assert [step["status"] for step in steps[name]] == ["skipped"]
        assert steps[name][0]["reason"]


def test_code_review_reads_a_directory(home: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "deep").mkdir(parents=True)
    (source / "one.py").write_text("first = 1\n")
    (source / "deep" / "two words.py").write_text("second = 2\n")
    (source / "empty.py").write_text("")
    (source / "notes.txt").write_text("not code\n")
    sandbox.clear_log()
    document = gorgon_run(home, sandbox, "code-review", "-i", f"directory={source}", GORGON_COMMANDS_ALLOW="find,grep")
    assert len(document["outputs"]["reviews"]) == 2
    read = [step for step in document["steps"] if step["kind"] == "command" and step["item"] is not None]
    texts = {step["output"] for step in read}
    assert texts == {f"{source}/one.py:1:first = 1\n", f"{source}/deep/two words.py:1:second = 2\n"}


def test_code_review_survives_a_file_that_cannot_be_reviewed(home: Path) -> None:
    files = [{"path": f"f{number}.py", "content": f"marker_{number} = 1"} for number in range(10)]
    fault = {"role": "reviewer", "contains": "marker_3", "refuse": True}
    with start_sandbox(faults=[fault]) as sandbox:
        document = gorgon_run(home, sandbox, "code-review", "-i", f"files={json.dumps(files)}")
    reviews = document["outputs"]["reviews"]
    assert [number for number, review in enumerate(reviews) if review.get("failed")] == [3]


def test_bug_fix_goes_round_until_the_tester_is_content(home: Path) -> None:
    failing = {
        "summary": "It still takes off a fraction of a cent.",
        "tests": [],
        "results": [{"name": "fifteen percent", "method": "read", "evidence": "199.7 != 170", "passed": False}],
        "tests_run": 1,
        "passed": False,
    }
    # Answered only where the prompt holds what the tester said of the patch before.
    better = {"summary": "Divides no more.", "files": [], "notes": [], "completed": True}
    faults = [
        {"role": "tester", "json": failing, "times": 1},
        {"role": "builder", "contains": "199.7 != 170", "json": better},
    ]
    with start_sandbox(faults=faults) as sandbox:
        document = gorgon_run(home, sandbox, "bug-fix")
        assert len(sandbox.log(status=200, role="tester")) == 2
        assert len(sandbox.log(status=200, role="builder")) == 2
    assert document["outputs"]["tests_passed"] is True
    rounds = by_id(document)["patch"]
    assert [step["output"] == better for step in rounds] == [False, True]
    assert document["outputs"]["patch"] == []


def test_parallel_analysis_goes_on_without_a_specialist(home: Path) -> None:
    with start_sandbox(faults=[{"role": "security", "refuse": True}]) as sandbox:
        document = gorgon_run(home, sandbox, "parallel-analysis")
    assert by_id(document)["threats"][0]["status"] == "skipped"
    assert "Security: no answer" in document["outputs"]["views"]
    assert "Design: no answer" not in document["outputs"]["views"]


def test_log_analysis_cuts_a_file(home: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_text("".join(f"2026-03-02T10:00:{number % 60:02}Z INFO line {number}\n" for number in range(25)))
    document = gorgon_run(
        home, sandbox, "log-analysis", "-i", f"file={log}", "-i", "chunk_lines=10", GORGON_COMMANDS_ALLOW="awk"
    )
    items = [step for step in by_id(document)["incident"] if step["item"] is not None]
    assert len(items) == 3
    (reduce,) = by_id(document)["incident.reduce"]
    assert reduce["item"] is None
    waited = when(reduce["started_at"]) - max(when(step["finished_at"]) for step in items)
    assert waited.total_seconds() < 3  # the sweep, which repairs a lost message, takes five


def test_analytics_pipeline_draws_no_charts_where_none_are_wanted(home: Path, sandbox: Sandbox) -> None:
    document = gorgon_run(home, sandbox, "analytics-pipeline", "-i", "charts=false")
    assert by_id(document)["visualise"][0]["status"] == "skipped"
    assert by_id(document)["report"][0]["status"] == "succeeded"
    assert document["outputs"]["charts"] == []
