"""The alarm rings for everything that was set, in the order of time, from one thread."""

from __future__ import annotations

import queue
import threading

from gorgon_common.engine.timer import Timer


def test_keys_ring_when_their_time_has_come() -> None:
    rung: queue.Queue[tuple[list[int], str]] = queue.Queue()
    alarm = Timer(lambda keys: rung.put((keys, threading.current_thread().name)))
    alarm.set(0.5, 2)
    alarm.set(0.0, 1)
    assert rung.get(timeout=5) == ([1], "gorgon-alarm")
    assert rung.get(timeout=5) == ([2], "gorgon-alarm")
    alarm.close()


def test_keys_of_one_moment_ring_together_and_start_one_thread() -> None:
    rung: queue.Queue[list[int]] = queue.Queue()
    now, threads = [0.0], set()
    alarm = Timer(rung.put, clock=lambda: now[0])
    for key in range(1000):
        alarm.set(10, key)
        threads.add(alarm._thread)
    assert len(threads) == 1
    now[0] = 10.0
    alarm.set(0, 1000)
    assert sorted(rung.get(timeout=5)) == list(range(1001))
    alarm.close()


def test_a_closed_alarm_is_silent() -> None:
    rung: queue.Queue[list[int]] = queue.Queue()
    alarm = Timer(rung.put)
    alarm.set(60, 1)
    alarm.close()
    alarm._thread.join(5)  # type: ignore[union-attr]  # it has been set
    assert rung.empty()
