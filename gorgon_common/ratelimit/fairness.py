"""The queue of the limiter: start-time fair queueing between teams, in the order of arrival within a team.

The decisions of `limiter.lua` in Python; the state is described in `buckets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gorgon_common.ratelimit.buckets import Buckets

GRACE, OLD = 5000.0, 10_000.0


@dataclass(slots=True)
class Position:
    """Where a request stands in the queue.

    `tag`: its team's start tag.  `ahead`: the calls of its team before it; `before`: those of all teams.  `elder`: the
    first known waiting call of its team if that came earlier; `rival`: that of the team whose turn it is.
    """

    tag: float
    turn: bool
    place: int | None
    ahead: float
    before: float
    elder: Mapping[str, Any] | None
    rival: Mapping[str, Any] | None


def position(buckets: Buckets, name: str, weight: float, member: str) -> Position:
    """Return where a request of a team stands."""
    state = buckets.state
    team = state["teams"].get(name)
    tag = team["tag"] if team else max(state["virtual"], state["finish"].get(name, 0.0))
    others = sorted((other["tag"], key) for key, other in state["teams"].items() if key != name)
    turn = not others or tag <= others[0][0] + 1e-9
    rival = None if turn else state["teams"][others[0][1]].get("first")
    place = state["places"].get(member)
    came, gone = (team["came"], team["gone"]) if team else (0, 0)
    ahead = max(0, place - gone - 1) if place is not None else came - gone
    elder = team.get("first") if team else None
    if elder is not None and place is not None and place <= elder["place"]:
        elder = None
    ahead = max(ahead, 0 if elder is None else 1)
    weights = state["weights"] + (0.0 if team else weight)
    before = min(len(state["due"]) - (place is not None), ahead * weights / weight)
    return Position(tag, turn, place, ahead, before if turn else max(before, 1.0), elder, rival)


def line_up(
    buckets: Buckets, at: Position, name: str, weight: float, member: str, cost: Mapping[str, float], wait: float
) -> None:
    """Let a call wait in the queue; one that waits already keeps its place."""
    state, due = buckets.state, buckets.now + wait
    team, place = state["teams"].get(name), at.place
    if place is None:
        if team is None:
            team = state["teams"][name] = {"tag": at.tag, "came": 0, "gone": 0, "weight": weight}
            state["weights"] += weight
        team["came"] += 1
        place = state["places"][member] = team["came"]
    first = team.get("first")
    if first is None or place <= first["place"]:
        since = buckets.now if first is None or place < first["place"] else first["since"]
        team["first"] = {"member": member, "place": place, "since": since, "due": due, "cost": dict(cost)}
    state["due"][member] = due
    state["denied"] += 1


def leave(buckets: Buckets, member: str) -> None:
    """Remove a waiting call from the queue."""
    state = buckets.state
    state["due"].pop(member, None)
    if state["places"].pop(member, None) is None:
        return
    name = member.partition("\n")[0]
    team = state["teams"][name]
    if (team.get("first") or {}).get("member") == member:
        del team["first"]
    team["gone"] += 1
    if team["gone"] >= team["came"]:
        state["weights"] = max(0.0, state["weights"] - team["weight"])
        del state["teams"][name]


def served(buckets: Buckets, at: Position, name: str, share: float) -> None:
    """Record that a team has had its turn; a tag behind the virtual time has no effect and is dropped."""
    state = buckets.state
    state["virtual"] = max(state["virtual"], at.tag)
    finish = state["finish"]
    finish[name] = at.tag + share
    for other in [other for other, tag in finish.items() if tag < state["virtual"]]:
        del finish[other]
    if name in state["teams"]:
        state["teams"][name]["tag"] = at.tag + share


def robs(buckets: Buckets, elder: Mapping[str, Any] | None, cost: Mapping[str, float]) -> bool:
    """Return whether a call would delay the first of a queue, because its amount is not refilled in time."""
    if elder is None or buckets.now - elder["since"] < OLD:
        return False
    ahead = max(0.0, elder["due"] - buckets.now)
    for name, theirs in elder["cost"].items():
        bucket, ours = buckets.dimensions.get(name), cost.get(name, 0.0)
        if bucket is None or bucket.get("limit") is None or theirs <= 0 or ours <= 0:
            continue
        if buckets.level(bucket) - ours + ahead * buckets.rate(bucket) < buckets.starts(bucket, theirs):
            return True
        left = buckets.told(bucket)
        if left is None:
            continue
        if bucket.get("window"):
            if left >= theirs > left - ours:
                return True
        elif left - ours + ahead * bucket["limit"] / bucket["period"] < theirs:
            return True
    return False


def tidy(buckets: Buckets) -> None:
    """Remove expired leases, waiting calls that did not return, and the buckets of labels that are out of use."""
    state, now = buckets.state, buckets.now
    for call in [call for call, taken in state["calls"].items() if taken["ends"] <= now]:
        del state["calls"][call]
    for member in [member for member, due in state["due"].items() if due <= now - GRACE]:
        leave(buckets, member)
    for name in [name for name, bucket in buckets.dimensions.items() if buckets.is_idle(bucket)]:
        del buckets.dimensions[name]
