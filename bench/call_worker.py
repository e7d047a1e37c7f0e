"""A worker whose providers answer immediately, inside the process: the cost of a call in Gorgon itself.

    python -m bench.call_worker QUEUE… [--slots N] [--milliseconds N] [--unlimited]

`--unlimited`: calls pass neither the limiter nor a budget.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_common.costs.usage import Usage
from gorgon_common.engine.limits import Answer, Ask, Grant, Settlement
from gorgon_common.engine.ports import AgentCall, AgentReply
from gorgon_worker import wiring, worker

USED = Usage(input_tokens=20, output_tokens=5)


class Stub:
    """A provider of models that gives the same reply every time, after `seconds`."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self._seconds = seconds

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        if self._seconds:
            time.sleep(self._seconds)
        return AgentReply("fine", USED, call.model, service_tier="default", request_id="stub")

    def problem(self) -> None:
        """Return nothing: no call would fail."""

    def close(self) -> None:
        pass


class Stubs(dict[str, Any]):
    """Provider name → stub."""

    def close(self) -> None:
        pass


class NoLimiter:
    """Admits every call."""

    def acquire(self, ask: Ask) -> Grant:
        return Grant(ask.id, ask.gate)

    def acquire_many(self, asks: Sequence[Ask]) -> list[Answer]:
        return [self.acquire(ask) for ask in asks]

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        pass

    def settle_many(self, settlements: Sequence[tuple[Grant, Settlement]]) -> None:
        pass

    def extend(self, grants: Sequence[Grant]) -> int:
        return len(grants)

    def snapshot(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.call_worker")
    parser.add_argument("queues", nargs="+")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=0.0)
    parser.add_argument("--unlimited", action="store_true")
    asked = parser.parse_args(arguments)
    seconds = asked.milliseconds / 1000
    providers: Mapping[str, Any] = Stubs({name: Stub(name, seconds) for name in ("openai", "anthropic")})
    wiring.agent_providers = lambda *_args, **_kwargs: providers  # type: ignore[assignment]
    if asked.unlimited:
        real = wiring.make_limiter
        wiring.make_limiter = lambda *args: (NoLimiter(), real(*args)[1])  # type: ignore[assignment,return-value]
    worker.main(queues=asked.queues, slots=asked.slots, target="sandbox", events=False, metrics_port=None)


if __name__ == "__main__":
    main()
