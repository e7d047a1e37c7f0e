"""The group commit: who is served together, and who gets which error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from gorgon_common.engine.calls.batched_limiter import BatchedLimiter
from gorgon_common.engine.group_commit import GroupCommit
from gorgon_common.engine.limits import NEUTRAL, Ask, Grant, Limiter, LimitKey, Settlement
from gorgon_common.errors import Unavailable
from tests.support.running import eventually


def served_while_one_is_held(
    work: Callable[[Sequence[int]], Sequence[int]],
    items: Sequence[int],
    *,
    alone: Callable[[int], bool] = lambda _: False,
) -> tuple[list[list[int]], list[int | BaseException]]:
    """Hold the batch of item 0 until all others queue; return the batches, and the answer or error of each item."""
    begun, go = threading.Event(), threading.Event()
    batches: list[list[int]] = []

    def recorded(batch: Sequence[int]) -> Sequence[int]:
        batches.append(list(batch))
        if 0 in batch:
            begun.set()
            assert go.wait(10)
        return work(batch)

    commits = GroupCommit[int, int](recorded, alone=alone)

    def asked(item: int) -> int | BaseException:
        try:
            return commits.do(item)
        except Exception as error:  # noqa: BLE001  the test looks at it
            return error

    with ThreadPoolExecutor(len(items) + 1) as pool:
        first = pool.submit(asked, 0)
        assert begun.wait(10)
        others = []
        for number, item in enumerate(items):
            others.append(pool.submit(asked, item))
            eventually(lambda expected=number + 1: commits.waiting == expected)  # the order in which they come
        go.set()
        assert first.result(10) == work([0])[0]
        return batches, [other.result(10) for other in others]


def doubled(batch: Sequence[int]) -> list[int]:
    return [2 * item for item in batch]


def test_what_came_meanwhile_is_served_together_and_each_gets_its_own_answer() -> None:
    assert served_while_one_is_held(doubled, [1, 2, 3]) == ([[0], [1, 2, 3]], [2, 4, 6])


def test_what_must_be_alone_shares_no_batch() -> None:
    batches, answers = served_while_one_is_held(doubled, [1, 2, 3], alone=lambda item: item == 2)
    assert (batches, answers) == ([[0], [1], [2], [3]], [2, 4, 6])


def test_only_the_item_that_cannot_be_served_fails() -> None:
    def work(batch: Sequence[int]) -> list[int]:
        if 2 in batch:
            raise ValueError("two")
        return doubled(batch)

    batches, answers = served_while_one_is_held(work, [1, 2, 3])
    assert batches == [[0], [1, 2, 3], [1], [2], [3]]
    assert (answers[0], str(answers[1]), answers[2]) == (2, "two", 6)


def test_an_outage_concerns_the_whole_batch_and_is_not_repeated() -> None:
    def work(batch: Sequence[int]) -> list[int]:
        if 0 not in batch:
            raise Unavailable("away")
        return doubled(batch)

    batches, answers = served_while_one_is_held(work, [1, 2])
    assert batches == [[0], [1, 2]]
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]


def test_it_serves_again_after_an_error() -> None:
    commits = GroupCommit[int, int](lambda batch: [1 // item for item in batch])
    with pytest.raises(ZeroDivisionError):
        commits.do(0)
    assert commits.do(1) == 1


GATE = LimitKey("sandbox", "openai", "a", "m")


class Told:
    """A limiter that grants everything and notes what it is asked.  The first request is held up by `go`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def acquire(self, ask: Ask) -> Grant:
        self.asked.append(f"acquire {ask.id}")
        self.begun.set()
        assert self.go.wait(10)
        return Grant(ask.id, ask.gate)

    def acquire_many(self, asks: Sequence[Ask]) -> list[Grant]:
        self.asked.append(f"acquire {' '.join(ask.id for ask in asks)}")
        return [Grant(ask.id, ask.gate) for ask in asks]

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        self.asked.append(f"settle {grant.id}")

    def settle_many(self, settlements: Sequence[tuple[Grant, Settlement]]) -> None:
        self.asked.append(f"settle {' '.join(grant.id for grant, _ in settlements)}")


def test_one_request_to_the_limiter_settles_before_it_acquires() -> None:
    told = Told()
    limiter = BatchedLimiter(cast(Limiter, told))
    ended = Settlement(NEUTRAL)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(limiter.acquire, Ask("a", GATE))
        assert told.begun.wait(10)
        others = []
        for number, name in enumerate("bcde"):
            if name in "bd":
                others.append(pool.submit(limiter.acquire, Ask(name, GATE)))
            else:
                others.append(pool.submit(limiter.settle, Grant(name, GATE), ended))
            eventually(lambda expected=number + 1: limiter.waiting == expected)
        told.go.set()
        assert first.result(10) == Grant("a", GATE)
        assert [other.result(10) for other in others] == [Grant("b", GATE), None, Grant("d", GATE), None]
    assert told.asked == ["acquire a", "settle c e", "acquire b d"]


def test_a_single_request_is_not_made_a_batch() -> None:
    told = Told()
    told.go.set()
    limiter = BatchedLimiter(cast(Limiter, told))
    limiter.settle(Grant("b", GATE), Settlement(NEUTRAL))
    assert limiter.acquire(Ask("a", GATE)) == Grant("a", GATE)
    assert told.asked == ["settle b", "acquire a"]
