from __future__ import annotations

from gorgon_common.costs.usage import CallRecord, Usage


def test_usage_adds_up() -> None:
    one = Usage(1, 2, 3, 4, 5, 6)
    assert one + Usage(10, 20, 30, 40, 50, 60) == Usage(11, 22, 33, 44, 55, 66)
    assert one + Usage() == one


def test_a_record_as_a_dict() -> None:
    record = CallRecord("openai", "m", "planner", 1, Usage(input_tokens=3), None, "v1", 12, "timeout")
    assert record.to_dict()["usage"]["input_tokens"] == 3
    assert record.to_dict()["cost_micro"] is None
