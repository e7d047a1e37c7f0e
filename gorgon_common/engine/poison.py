"""Poison: does a step kill the workers that run it, or is it only there when they die?

Workers die of their own accord too: machines are taken away, processes run out of memory.  For each death there is a
chance that an innocent step would have seen it: the higher, the more workers die anyway, and the longer it had run.
A step is condemned when its deaths together can hardly be chance, and the last of them has nobody else to blame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SUSPECT_DEATHS = 2
"""A step that saw so many deaths is a suspect: workers run one suspect at a time, so that the next death has one to
blame.  `tick.sql` has the same number."""
POISON_DEATHS = 3
"""How many deaths condemn a step, at least; GORGON_POISON_DEATHS."""
HARDLY = 1e-3
"""Deaths that are less likely than this by chance are the step's doing."""
COUNTS_BELOW = 0.5
"""A death that every second innocent step would have seen says nothing: the step had run for too long, or workers die
too often.  It counts only where the step was the only one to blame."""
MOST = 10
"""So many times the limit, and the step is condemned whatever else dies: it cannot end here."""
MEMORY_SECONDS = 3600.0
"""Older deaths are forgotten."""
WINDOWS_SECONDS = (120.0, 1200.0)
"""How often workers die is looked up over a short time and a long one; the higher rate holds."""
BEAT_SECONDS = 2.0
"""Workers say at least this often that they live, so that a death is known to within this time."""
_PRIOR_DEATHS, _PRIOR_SECONDS = 0.5, 60.0


@dataclass(frozen=True, slots=True)
class Death:
    """A worker died while a step ran.  `chance`: how likely an innocent step would have seen that, 0 to 1.

    `alone`: nobody else could be blamed.
    """

    chance: float
    alone: bool = True

    @property
    def counts(self) -> bool:
        """Whether it says something about the step."""
        return self.alone or self.chance < COUNTS_BELOW


@dataclass(frozen=True, slots=True)
class Verdict:
    """What deaths come to: `deaths` is what is stored with the step."""

    deaths: int
    condemned: bool


def death_rate(deaths: int, seconds: float) -> float:
    """Return deaths per worker and second, for so many deaths in so many seconds of all workers together.

    Never 0: that nobody has died yet does not mean that nobody will.
    """
    return (deaths + _PRIOR_DEATHS) / (seconds + _PRIOR_SECONDS)


def chance_of(rate: float, seconds: float) -> float:
    """Return how likely a worker is to die within the seconds that a step has run on it, at a rate (1/s)."""
    return -math.expm1(-rate * max(0.0, seconds))


def combined(chances: Sequence[float]) -> float:
    """Return how likely it is that chance alone brings deaths as unlikely as these: Fisher's combined probability."""
    product = math.prod(chances)
    if product <= 0.0:
        return 0.0
    term = total = 1.0
    for number in range(1, len(chances)):
        term *= -math.log(product) / number
        total += term
    return product * total


def judge(deaths: Sequence[Death], limit: int) -> Verdict:
    """Judge a step by its deaths, oldest first; it needs at least `limit` that count (3 or more)."""
    counted = [death for death in deaths if death.counts]
    guilty = len(counted) >= limit and deaths[-1].alone and combined([death.chance for death in counted]) <= HARDLY
    if guilty or len(deaths) >= limit * MOST:
        return Verdict(max(limit, len(counted)), condemned=True)
    return Verdict(min(len(counted), limit - 1), condemned=False)
