"""Poison: a step is condemned for deaths that are its doing, and not for those that would have come anyway."""

from __future__ import annotations

import random

import pytest

from gorgon_common.engine.poison import MOST, Death, chance_of, death_rate, judge

QUIET = chance_of(death_rate(0, 3600.0), 2.0)


def test_where_nobody_else_dies_three_deaths_condemn() -> None:
    assert judge([Death(QUIET)] * 2, 3).condemned is False
    verdict = judge([Death(QUIET, alone=False), Death(QUIET, alone=False), Death(QUIET)], 3)
    assert (verdict.condemned, verdict.deaths) == (True, 3)


def test_the_last_death_must_have_nobody_else_to_blame() -> None:
    assert not judge([Death(QUIET)] * 5 + [Death(QUIET, alone=False)], 3).condemned


def test_the_limit_is_kept() -> None:
    assert not judge([Death(QUIET)] * 6, 7).condemned
    assert judge([Death(QUIET)] * 7, 7).condemned


def test_a_death_that_half_of_all_steps_would_have_seen_counts_only_for_a_step_that_was_alone() -> None:
    assert judge([Death(0.6, alone=False)] * 9, 3).deaths == 0
    assert judge([Death(0.6, alone=True)] * 2, 3).deaths == 2


def test_a_step_that_is_not_condemned_stays_a_suspect() -> None:
    assert judge([Death(0.4)] * 5, 3).deaths == 2


def test_nothing_is_tried_for_ever() -> None:
    assert judge([Death(1.0, alone=False)] * (3 * MOST), 3).condemned


@pytest.mark.parametrize(("length", "lifetime"), [(0.3, 8.0), (1.0, 8.0), (3.0, 8.0), (20.0, 60.0), (300.0, 600.0)])
def test_machines_that_die_all_the_time_condemn_hardly_any_innocent_step(length: float, lifetime: float) -> None:
    """Each worker dies every `lifetime` seconds, whatever it runs; a step of `length` is tried until it ends."""
    chance = random.Random(20261130)
    condemned = 0
    for _ in range(4000):
        deaths: list[Death] = []
        while (died := chance.expovariate(1 / lifetime)) < length:
            deaths.append(Death(chance_of(1 / lifetime, died + 1.7), alone=len(deaths) >= 2))
            if judge(deaths, 3).condemned:
                condemned += 1
                break
    assert condemned <= 3


def test_a_step_that_kills_is_condemned_even_there() -> None:
    deaths: list[Death] = []
    while not (deaths and judge(deaths, 3).condemned):
        deaths.append(Death(chance_of(1 / 8, 1.7), alone=len(deaths) >= 2))
    assert 3 <= len(deaths) <= 3 * MOST
