"""Processes that are killed all the time, and a run that is suspended; `python -m bench.churn` does it for long."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench import money
from tests.support.churn import run_churn
from tests.support.processes import RedisProcess, cluster
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.servers import fresh_database
from tests.support.suspending import suspended_run

__all__ = ["sandbox", "sandbox_process"]

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def test_under_churn_nothing_is_stuck_wrong_or_lost(postgres_admin: str, sandbox: Sandbox, tmp_path: Path) -> None:
    redis = RedisProcess(tmp_path)
    try:
        with (
            fresh_database(postgres_admin) as database,
            cluster(database, redis.url, sandbox, tmp_path, lease=2.0) as made,
        ):
            found = run_churn(made, sandbox, runs_=6, seconds=8, every=1.5, workers=2, slots=16, grace=60, seed=7)
            over = money.over(made.services.budgets)
            assert money.replayed(made.services.budgets)
    finally:
        redis.stop()
    assert (found.stuck, found.failed, found.wrong, found.unaccounted, over) == ([], [], [], [], 0)
    assert found.kills.total() > 0
    assert found.calls > 6 * 12


def test_a_run_that_was_suspended_for_longer_than_its_lease_ends_right(sandbox: Sandbox, tmp_path: Path) -> None:
    """It finds its own lease run out when it wakes up, before its heartbeat has renewed it."""
    ended = suspended_run(tmp_path, sandbox, "asleep", random.Random(3), lease=0.5, times=3)
    assert ended.wrong == ""
    assert ended.at, "it was suspended in mid-run"
