"""The sentences for what runs and steps wait for."""

from __future__ import annotations

from typing import Any

import pytest

from gorgon_common.application.explanations import key_worded, run_worded, worded

QUEUE = {"name": "openai", "workers": 1, "slots": 4, "busy": 3, "ahead": 1}


def told(why: str, facts: dict[str, Any] | None = None, **more: Any) -> str:
    entry = {"step": "a", "why": why, "facts": facts or {}, **more}
    document = {"run_id": "run_1", "target": "live", "waits_for": None, "waiting": [entry]}
    (found,) = worded(document)["waiting"]
    assert "facts" not in found
    return str(found["what"])


@pytest.mark.parametrize(
    ("why", "facts", "sentence"),
    [
        ("dependency", {"names": list("abcdefg")}, "waits for a, b, c, d, e and 2 more"),
        ("max_parallel", {"limit": 2}, "at most 2 run at the same time"),
        ("max_parallel", {"limit": None}, "its turn has not come"),
        ("max_parallel", {"run_limit": 3}, "as its `max_parallel` allows (3)"),
        ("max_parallel", {"message": "stored", "attempt": 1}, "stored"),
        ("running", {"worker": "host:1", "attempt": 2}, "runs on host:1, attempt 2"),
        ("retry", {"message": "HTTP 500", "attempt": 2}, "attempt 2 comes next; the last one failed: HTTP 500"),
        ("quota", {"message": None, "attempt": 1}, "no reason is recorded"),
        ("no_worker", {"embedded": False}, "start one with: gorgon worker -q openai --live"),
        ("no_worker", {"embedded": True}, "continue it with: gorgon runs resume run_1"),
        ("queue", {}, "its message has been sent; 3 of 4 slots of the queue openai are taken"),
        ("backlog", {}, "1 step is ahead of it; 3 of 4 slots"),
        ("in_doubt", {}, "unknown whether its effect has happened"),
        ("paused", {}, "starts no new steps"),
        ("key", {}, "holds its concurrency key"),
        ("lost_worker", {}, "another worker takes the step over"),
    ],
)
def test_each_class_has_a_sentence(why: str, facts: dict[str, Any], sentence: str) -> None:
    assert sentence in told(why, facts, queue=QUEUE)


def holder(**more: Any) -> dict[str, Any]:
    fixed = {"run_id": "run_2", "workflow": "deploy", "since": "2026-12-01T00:00:00.5Z"}
    return {**fixed, "process_died": False, "cancelled": False, **more}


@pytest.mark.parametrize(
    ("holders", "ahead", "sentence"),
    [
        ([], 0, "waits for the concurrency key 'k'"),
        ([holder()], 0, "waits for the concurrency key 'k', held by run_2 (deploy) since 2026-12-01T00:00:00Z"),
        ([holder(), holder()], 2, "00Z and 1 more; 2 runs are ahead of it"),
        (
            [holder(process_died=True)],
            1,
            "whose process has died: resume or cancel that run, or wait until it is ended; 1",
        ),
        ([holder(cancelled=True)], 0, "00Z, which is being cancelled"),
    ],
)
def test_a_run_that_waits_for_its_key(holders: list[dict[str, Any]], ahead: int, sentence: str) -> None:
    found = key_worded({"key": "k", "held_by": holders, "ahead": ahead})
    assert found is not None
    assert sentence in found["what"]
    assert all("cancelled" not in entry for entry in found["held_by"])


def test_a_run_that_waits_for_nothing_stays_as_it_is() -> None:
    assert run_worded({"run_id": "run_1"}) == {"run_id": "run_1"}
    assert key_worded(None) is None
