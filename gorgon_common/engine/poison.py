"""Poison detection: does a step kill the workers that run it, or was it merely running when they died?

Workers also die for unrelated reasons: machines are reclaimed, processes run out of memory.  For each death, there is a
probability that an innocent step would have been running too; it grows with the general death rate of workers and with
the time the step had been running.  A step is condemned when its deaths taken together are very unlikely to be chance,
and no other step could have caused the last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SUSPECT_DEATHS = 2
"""A step with this many deaths is a suspect.  Workers run one suspect at a time, so that the next death can be
attributed.  `claim_and_finish.sql` has the same number.
"""
POISON_DEATHS = 3
"""The minimum number of deaths that condemn a step; GORGON_POISON_DEATHS."""
HARDLY = 1e-3
"""If the deaths are less likely than this by chance, the step caused them."""
COUNTS_BELOW = 0.5
"""A death that half of all innocent steps would have seen says nothing: the step had been running for too long, or
workers die too often.  Such a death counts only if the step was the only one running.
"""
MOST = 10
"""At this multiple of the limit, the step is condemned regardless of other deaths, since it cannot finish here."""
MEMORY_SECONDS = 3600.0
"""Older deaths are forgotten."""
WINDOWS_SECONDS = (120.0, 1200.0)
"""The death rate of workers is measured over a short window and a long one; the higher rate is used."""
BEAT_SECONDS = 2.0
"""Workers send heartbeats at least this often, so the time of a death is known to within this interval."""
_PRIOR_DEATHS, _PRIOR_SECONDS = 0.5, 60.0


@dataclass(frozen=True, slots=True)
class Death:
    """A worker died while a step was running.  `chance`: the probability of that for an innocent step, 0 to 1.

    `alone`: no other step could have caused it.
    """

    chance: float
    alone: bool = True

    @property
    def counts(self) -> bool:
        """Whether the death is evidence against the step."""
        return self.alone or self.chance < COUNTS_BELOW


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a step's deaths: `deaths` is the number stored with the step."""

    deaths: int
    condemned: bool


def death_rate(deaths: int, seconds: float) -> float:
    """Return deaths per worker-second, given the deaths observed in the total seconds of all workers.

    Never 0: no deaths so far does not mean that there will be none.
    """
    return (deaths + _PRIOR_DEATHS) / (seconds + _PRIOR_SECONDS)


def chance_of(rate: float, seconds: float) -> float:
    """Return the probability that a worker dies within the seconds that a step has run on it, at a rate (1/s)."""
    return -math.expm1(-rate * max(0.0, seconds))


def combined(chances: Sequence[float]) -> float:
    """Return the probability of deaths at least this unlikely by chance alone (Fisher's combined probability)."""
    product = math.prod(chances)
    if product <= 0.0:
        return 0.0
    term = total = 1.0
    for number in range(1, len(chances)):
        term *= -math.log(product) / number
        total += term
    return product * total


def judge(deaths: Sequence[Death], limit: int) -> Verdict:
    """Judge a step by its deaths, oldest first; condemning it takes at least `limit` deaths that count (3 or more)."""
    counted = [death for death in deaths if death.counts]
    guilty = len(counted) >= limit and deaths[-1].alone and combined([death.chance for death in counted]) <= HARDLY
    if guilty or len(deaths) >= limit * MOST:
        return Verdict(max(limit, len(counted)), condemned=True)
    return Verdict(min(len(counted), limit - 1), condemned=False)
