"""The decisions of the limiter in Python: equivalent to `limiter.lua`, whose comments give the reasons.

The state of a gate is two plain dicts (its own and its account's).  A store reads them, passes them in and writes them
back in one transaction: SQLite on a laptop, memory while Redis cannot be reached.  Times are in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common.engine.limits import DIMENSIONS

BURST, READY, VALVE = 0.05, 0.5, 0.8
FIRST, FULL, RAISE = 0.95, 1.0, 0.01
DECREASE, FLOOR, RECOVERY, EPOCH = 0.5, 0.05, 0.2, 1000.0
GRACE, SEEN, PATIENT, OLD = 5000.0, 60_000.0, 10_000.0, 10_000.0
CLOSE, STILL, WATCH = 1000.0, 250.0, 1500.0
BREAKER_WINDOW, BREAKER_CALLS, BREAKER_SHARE = 10, 20, 0.5
BREAKER_FIRST, BREAKER_LONGEST, BREAKER_PROBE = 5000.0, 120_000.0, 60_000.0

PERIOD = {name: 86_400_000.0 if name == "requests_per_day" else 60_000.0 for name in DIMENSIONS}
_COUNTS = ("requests", "requests_per_day")

State = dict[str, Any]


def fresh() -> State:
    """Return the state of an unused gate."""
    return {"n": {}, "leases": {}, "calls": {}, "finish": {}, "teams": {}, "waiters": {}, "line": {}, "workers": {}}


class LimiterState:
    """Decides about one gate at one moment; changes `state` and `account` in place."""

    def __init__(self, state: State, account: State, now: float, *, scale: float = 1.0) -> None:
        self.state = state
        self.account = account
        self.now = now
        self.scale = scale
        """The fraction of every limit that may be used here: less than 1 in a worker without Redis."""
        self.n: dict[str, Any] = state["n"]

    # buckets

    def limit(self, d: str) -> float | None:
        """Return the current limit of a dimension."""
        found: float | None = self.n.get(f"L {d}")
        return found

    def capacity(self, d: str) -> float:
        """Return the capacity of the bucket."""
        burst = BURST * (self.limit(d) or 0)
        return max(burst, 1.5) if d in _COUNTS else burst

    def rate(self, d: str) -> float:
        """Return the refill per millisecond."""
        return float((self.limit(d) or 0) * self.n.get("f", FIRST) * self.n.get("m", 1.0) / PERIOD[d])

    def level(self, d: str) -> float:
        """Return the current level."""
        has, at, cap = self.n.get(f"l {d}"), self.n.get(f"a {d}", self.now), self.capacity(d)
        if has is None:
            second = (self.limit(d) or 0) * FIRST * 1000 / PERIOD[d]
            return min(cap, max(second, 1.0) if d in _COUNTS else second)
        return float(has) if has >= cap else min(cap, has + max(0.0, self.now - at) * self.rate(d))

    def put(self, d: str, value: float) -> None:
        """Set the level."""
        self.n[f"l {d}"] = value
        self.n[f"a {d}"] = self.now

    def refresh(self) -> None:
        """Bring the levels up to date; required before a rate changes."""
        for d in DIMENSIONS:
            if self.limit(d) is not None:
                self.put(d, self.level(d))

    def told(self, d: str) -> float | None:
        """Return what is left according to the provider, None where unknown."""
        left = self.n.get(f"p {d}")
        if left is None or self.now >= self.n.get(f"pe {d}", 0.0):
            return None
        if self.n.get(f"w {d}"):
            return float(left)
        return float(left + max(0.0, self.now - self.n.get(f"pa {d}", self.now)) * (self.limit(d) or 0) / PERIOD[d])

    # the queue

    def leave(self, member: str) -> None:
        """Remove a waiting call from the queue."""
        self.state["waiters"].pop(member, None)
        line = self.state["line"]
        if line.pop(member, None) is None:
            return
        team = member.partition("\n")[0]
        entry = line[f"{team}\n"]
        entry["gone"] += 1
        if (entry.get("oldest") or {}).get("member") == member:
            del entry["oldest"]
        if entry["gone"] >= entry["came"]:
            self.n["sw"] = max(0.0, self.n.get("sw", 0.0) - entry["weight"])
            del line[f"{team}\n"]
            self.state["teams"].pop(team, None)

    def tidy(self) -> None:
        """Remove expired leases and waiting calls that did not return."""
        for call in [call for call, until in self.state["leases"].items() if until <= self.now]:
            del self.state["leases"][call]
            self.state["calls"].pop(call, None)
        for member in [member for member, due in self.state["waiters"].items() if due <= self.now - GRACE]:
            self.leave(member)

    # acquire

    def configure(self, given: Sequence[float | None], ceilings: Sequence[float | None]) -> None:
        """Apply the configured and the learned limits."""
        for d, assumed, ceiling in zip(DIMENSIONS, given, ceilings, strict=True):
            bound = self.n.get(f"c {d}", assumed)
            if ceiling is not None and (bound is None or ceiling < bound):
                bound = ceiling
            self.n[f"H {d}"] = ceiling
            bound = None if bound is None else bound * self.scale
            if bound != self.limit(d):
                before = self.level(d) if self.limit(d) is not None else None
                if bound is None:
                    self.n.pop(f"L {d}", None)
                    continue
                self.n[f"L {d}"] = bound
                if before is not None:
                    self.put(d, min(before, self.capacity(d)))
            if bound is not None and f"l {d}" not in self.n:
                self.put(d, self.level(d))

    def acquire(
        self,
        call: str,
        *,
        ticket: str,
        team: str,
        weight: float,
        lease: float,
        worker: str,
        seats: int,
        cost: Mapping[str, float],
        given: Sequence[float | None],
        ceilings: Sequence[float | None],
    ) -> list[Any]:
        """Return [grant, workers, now, limits…], [wait, ms, why, until] or [never, dimension, cost, limit]."""
        self.configure(given, ceilings)
        self._seen(worker)
        if call in self.state["calls"]:
            return self._granted()
        share = 0.0
        for d in DIMENSIONS:
            bound = self.limit(d)
            if bound is not None:
                if cost[d] > bound / self.scale:
                    return ["never", d, cost[d], bound / self.scale]
                share = max(share, cost[d] * PERIOD[d] / bound / 1000)
        self.tidy()
        base, why, probing = self._closed()
        virtual = self.n.get("v", 0.0)
        member = f"{team}\n{ticket}"
        own = self.state["teams"].get(team)
        tag = own if own is not None else max(virtual, self.state["finish"].get(team, 0.0))
        others = sorted((start, name) for name, start in self.state["teams"].items() if name != team)
        turn = not others or tag <= others[0][0] + 1e-9
        place = self.state["line"].get(member)
        entry = self.state["line"].get(f"{team}\n", {"came": 0, "gone": 0, "weight": weight})
        ahead = max(0, place - entry["gone"] - 1) if place is not None else entry["came"] - entry["gone"]
        elder, theirs = self._oldest(team, before=place), None if turn else self._oldest(others[0][1])
        ahead = max(ahead, 0 if elder is None else 1)
        waiting = len(self.state["waiters"]) - (place is not None)
        weights = self.n.get("sw", 0.0) + (0.0 if own is not None else weight)
        before = min(waiting, ahead * weights / weight)
        if not turn:
            before = max(before, 1.0)
        room, idle, turn, base, soonest, why = self._room(cost, seats, before, ahead, turn, base, why, elder)
        if self._robs(elder, cost) or self._robs(theirs, cost):
            idle = turn = False
        if not room or not (turn or idle):
            soft = max(soonest - base, max(5.0, 1000 * self.n.get("sn", 0.0)) if room else 0.0)
            if soft > PATIENT:
                soft = PATIENT + 0.6 * (soft - PATIENT)
            wait = max(5.0, base + soft)
            self._line_up(member, team, weight, tag, wait, cost)
            return ["wait", wait, why or "turn", self.now + wait]
        self._take(call, team, weight, share, cost)
        self.state["calls"][call]["lease"] = lease
        self._served(team, tag, share / weight)
        if place is not None:
            self.leave(member)
        m = self.n.get("m", 1.0)
        if m < 1:
            self.n["m"] = min(1.0, m + RECOVERY * max(share, 1 / seats) / m)
        if probing:
            self.n["bp"], self.n["bi"] = self.now + BREAKER_PROBE, call
        self.state["leases"][call] = self.now + lease
        return self._granted()

    def _seen(self, worker: str) -> None:
        workers = self.state["workers"]
        workers[worker] = self.now
        for name in [name for name, seen in workers.items() if seen <= self.now - SEEN]:
            del workers[name]

    def _served(self, team: str, tag: float, share: float) -> None:
        """Record that a team has had its turn; a tag behind the virtual time has no effect and is dropped."""
        self.n["v"] = max(self.n.get("v", 0.0), tag)
        finish = self.state["finish"]
        finish[team] = tag + share
        for name in [name for name, end in finish.items() if end < self.n["v"]]:
            del finish[name]
        if team in self.state["teams"]:
            self.state["teams"][team] = tag + share

    def _granted(self) -> list[Any]:
        return ["grant", len(self.state["workers"]), self.now, *(self.limit(d) for d in DIMENSIONS)]

    def _closed(self) -> tuple[float, str | None, bool]:
        """Return (milliseconds until available, why it is blocked, whether the next call is the breaker's probe)."""
        base, why = 0.0, None
        shut = max(self.n.get("closed", 0.0), self.account.get("closed", 0.0)) - self.now
        if shut > base:
            base, why = shut, "retry_after"
        opens, probing = self.n.get("bo", 0.0), False
        if opens > self.now:
            if opens - self.now > base:
                base, why = opens - self.now, "breaker"
        elif opens > 0:
            left = min(self.n.get("bp", 0.0) - self.now, 1000.0)
            if left > 0:
                if left > base:
                    base, why = left, "breaker"
            else:
                probing = True
        return base, why, probing

    def _oldest(self, team: str, *, before: int | None = None) -> Any:
        """Return the first known waiting call of a team, None where no call waits.

        `before`: only a call that came before the one with that place.
        """
        found = self.state["line"].get(f"{team}\n", {}).get("oldest")
        return None if found is None or (before is not None and before <= found["place"]) else found

    def _need(self, d: str, cost: float) -> float:
        """Return the level that a call needs to start."""
        return cost if d in _COUNTS else min(cost, self.capacity(d) * READY)

    def _robs(self, elder: Any, cost: Mapping[str, float]) -> bool:
        """Return whether a call would delay the first of the queue, because its amount is not refilled in time."""
        if elder is None or self.now - elder["at"] < OLD:
            return False
        ahead = max(0.0, self.state["waiters"].get(elder["member"], self.now) - self.now)
        for d in DIMENSIONS:
            limit, theirs = self.limit(d), elder["cost"][d]
            if limit is None or theirs <= 0:
                continue
            if self.level(d) - cost[d] + ahead * self.rate(d) < self._need(d, theirs):
                return True
            left = self.told(d)
            if left is None:
                continue
            if self.n.get(f"w {d}"):
                if left >= theirs > left - cost[d]:
                    return True
            elif left - cost[d] + ahead * limit / PERIOD[d] < theirs:
                return True
        return False

    def _room(
        self,
        cost: Mapping[str, float],
        seats: int,
        before: float,
        ahead: float,
        turn: bool,
        base: float,
        why: str | None,
        elder: Any,
    ) -> tuple[bool, bool, bool, float, float, str | None]:
        """Return (enough capacity, abundant capacity, our turn, blocked until, when to return, why not)."""
        room, idle = base == 0, True
        for d in DIMENSIONS:
            left = self.told(d) if self.limit(d) is not None else None
            if left is not None and left < cost[d]:
                room = False
                window = self.n.get(f"w {d}")
                wait = self.n[f"pe {d}"] - self.now if window else (cost[d] - left) * PERIOD[d] / (self.limit(d) or 1)
                if wait > base:
                    base, why = wait, d
        soonest = base
        for d in DIMENSIONS:
            if self.limit(d) is None or cost[d] <= 0:
                continue
            has, cap, mean = self.level(d), self.capacity(d), self.n.get(f"mean {d}", cost[d])
            need = self._need(d, cost[d])
            more = max(0.0, self._need(d, elder["cost"][d]) - mean) if elder else 0.0
            room = room and has >= need
            if has < max(need, cap * VALVE):
                idle = False
                turn = turn and has >= need + ahead * mean + more
            missing = need + before * mean + more - min(cap, has + base * self.rate(d))
            if base + missing / self.rate(d) > soonest:
                soonest = base + missing / self.rate(d)
                if has < need or why is None:
                    why = d
        taken, allowed = len(self.state["leases"]), max(1, math.floor(seats * self.n.get("m", 1.0)))
        if taken >= allowed:
            room, why = False, why or "concurrency"
            soonest = max(soonest, base + (before + 1) * self.n.get("lat", 1000.0) / allowed)
        elif allowed - taken < 1 + max(1.0, VALVE * BURST * allowed):
            idle = False
            turn = turn and allowed - taken > ahead
        return room, idle, turn, base, soonest, why

    def _line_up(
        self, member: str, team: str, weight: float, tag: float, wait: float, cost: Mapping[str, float]
    ) -> None:
        line = self.state["line"]
        if member not in line:
            if team not in self.state["teams"]:
                self.state["teams"][team] = tag
                self.n["sw"] = self.n.get("sw", 0.0) + weight
            entry = line.setdefault(f"{team}\n", {"came": 0, "gone": 0, "weight": weight})
            entry["came"] += 1
            line[member] = entry["came"]
        entry, place = line[f"{team}\n"], line[member]
        oldest = entry.get("oldest")
        if oldest is None or place <= oldest["place"]:
            since = self.now if oldest is None or place < oldest["place"] else oldest["at"]
            entry["oldest"] = {"member": member, "place": place, "at": since, "cost": {d: cost[d] for d in DIMENSIONS}}
        self.state["waiters"][member] = self.now + wait
        self.n["no"] = self.n.get("no", 0) + 1

    def _take(self, call: str, team: str, weight: float, share: float, cost: Mapping[str, float]) -> None:
        for d in DIMENSIONS:
            if self.limit(d) is None:
                continue
            left = self.told(d)
            if left is not None:
                self.n[f"p {d}"], self.n[f"pa {d}"] = left - cost[d], self.now
            self.put(d, self.level(d) - cost[d])
            self.n[f"k {d}"] = self.n.get(f"k {d}", 0.0) + cost[d]
            self.n.setdefault(f"mean {d}", cost[d])
        self.n["sn"] = 0.9 * self.n.get("sn", share) + 0.1 * share
        self.n["seq"] = self.n.get("seq", 0) + 1
        self.n["yes"] = self.n.get("yes", 0) + 1
        self.state["calls"][call] = {
            "team": team,
            "weight": weight,
            "seen": self.now,
            "seq": self.n["seq"],
            "share": share,
            "reserved": {d: cost[d] for d in DIMENSIONS},
            "before": {d: self.n.get(f"k {d}", 0.0) for d in DIMENSIONS},
        }

    # settle

    def settle(
        self,
        call: str,
        *,
        outcome: str,
        after: float | None,
        used: Mapping[str, float],
        signals: Mapping[str, tuple[float | None, float | None, float | None, bool]],
    ) -> bool:
        """Settle a reservation, and learn from the reply.  `after` and the signals' third part are in milliseconds."""
        self.state["leases"].pop(call, None)
        taken = self.state["calls"].pop(call, None)
        if taken is None:
            return False
        took = self.now - taken["seen"]
        self.n["lat"] = 0.9 * self.n.get("lat", took) + 0.1 * took
        real = 0.0
        for d in DIMENSIONS:
            bound = self.limit(d)
            if bound is None:
                continue
            reserved = taken["reserved"][d]
            actual = used.get(d, reserved)
            real = max(real, actual * PERIOD[d] / bound / 1000)
            back = reserved - actual
            self.n[f"mean {d}"] = 0.9 * self.n.get(f"mean {d}", actual) + 0.1 * actual
            if back:
                self._refund(d, back, reserved, later=taken["seq"] > self.n.get(f"ps {d}", 0))
        self._correct(taken, real)
        agree: bool | None = None
        for d, (capped, left, resets, absolute) in signals.items():
            said = self._learn(d, capped, left, resets, absolute, taken)
            if said is not None:
                agree = said if agree is None else agree and said
        if outcome in ("rate_limited", "overloaded"):
            self._slow(outcome, after, named=bool(signals))
        elif outcome == "ok":
            self.n.pop("c9", None)
            if agree:
                if self.n.get("f", FIRST) < FULL:
                    self.refresh()
                    passed = min(1000.0, max(0.0, self.now - self.n.get("fa", self.now)))
                    self.n["f"] = min(FULL, self.n.get("f", FIRST) + RAISE * passed / 1000)
                self.n["fa"] = self.now
        self._judge(call, outcome)
        return True

    def _refund(self, d: str, back: float, reserved: float, *, later: bool) -> None:
        has = self.level(d)
        self.put(d, max(has, min(max(self.capacity(d), 2 * reserved), has + back)) if back > 0 else has + back)
        if f"p {d}" in self.n and later:
            self.n[f"p {d}"] += back

    def _correct(self, taken: Mapping[str, Any], real: float) -> None:
        team, change = taken["team"], (real - taken["share"]) / taken["weight"]
        if team in self.state["finish"]:
            self.state["finish"][team] += change
            if team in self.state["teams"]:
                self.state["teams"][team] += change

    def _learn(
        self,
        d: str,
        capped: float | None,
        left: float | None,
        resets: float | None,
        absolute: bool,
        taken: Mapping[str, Any],
    ) -> bool | None:
        """Apply one header; returns whether it confirms that capacity is left, None without information."""
        if capped is not None and capped != self.n.get(f"c {d}"):
            self.refresh()
            self.n[f"c {d}"] = capped
            has = self.level(d) if self.limit(d) is not None else None
            ceiling = self.n.get(f"H {d}")
            self.n[f"L {d}"] = (capped if ceiling is None else min(capped, ceiling)) * self.scale
            if has is not None:
                self.put(d, min(has, self.capacity(d)))
        if left is None or self.limit(d) is None:
            return None
        ends = None
        if resets is not None:
            ends = self._reset(d, self.now + resets if absolute else taken["seen"] + resets)
            if ends is None:
                return None
        if taken["seq"] < self.n.get(f"ps {d}", 0):
            return None
        rest = left - (self.n.get(f"k {d}", 0.0) - taken["before"][d])
        window = ends if self.n.get(f"w {d}") else None
        if window is not None:
            rest -= self._close(taken) * self.n.get(f"mean {d}", 0.0)
        else:
            rest += max(0.0, self.now - taken["seen"]) * (self.limit(d) or 0) / PERIOD[d]
        self.n[f"p {d}"], self.n[f"pa {d}"], self.n[f"ps {d}"] = rest, self.now, taken["seq"]
        self.n[f"pe {d}"] = window + 5 if window is not None else self.now + 60_000
        return bool(rest >= self.n.get(f"mean {d}", 0.0))

    def _close(self, taken: Mapping[str, Any]) -> int:
        """Return how many calls in flight started just before this one: they may have arrived after it."""
        ends = taken["seen"] + taken["lease"]
        return sum(ends - CLOSE <= until < ends for until in self.state["leases"].values())

    def _reset(self, d: str, ends: float) -> float | None:
        """Return when the provider's window resets, None where that has passed; tells windows from buckets."""
        if ends <= self.now:
            return None
        known, first = self.n.get(f"ra {d}"), self.n.get(f"r0 {d}", 0.0)
        if known is not None and self.now < known and abs(ends - first) <= STILL:
            self.n[f"ra {d}"] = max(ends, known)
            if self.now - self.n.get(f"rt {d}", self.now) >= WATCH:
                self.n[f"w {d}"] = 1
        else:
            if known is not None and self.now < known - 2 * STILL and ends > first + STILL:
                self.n[f"w {d}"] = 0
            self.n[f"ra {d}"] = self.n[f"r0 {d}"] = ends
            self.n[f"rt {d}"] = self.now
        return float(self.n[f"ra {d}"])

    def _slow(self, outcome: str, after: float | None, *, named: bool) -> None:
        self.refresh()
        if self.now - self.n.get("dec", 0.0) >= EPOCH:
            self.n["m"] = max(FLOOR, self.n.get("m", 1.0) * DECREASE)
            self.n["dec"], self.n["f"] = self.now, FIRST
        self.n["c9"] = self.n.get("c9", 0) + 1
        if outcome == "rate_limited":
            self.n["n429"] = self.n.get("n429", 0) + 1
            for d in DIMENSIONS:
                if self.limit(d) is not None and d != "requests_per_day":
                    self.put(d, min(0.0, self.level(d)))
            if after is None:
                after = min(30_000.0, 500.0 * 2 ** min(self.n["c9"], 10))
        if after is not None:
            where = self.n if named else self.account
            where["closed"] = max(where.get("closed", 0.0), self.now + after)

    # the breaker

    def _judge(self, call: str, outcome: str) -> None:
        good, bad = outcome == "ok", outcome in ("failed", "overloaded")
        if self.n.get("bi") == call:
            del self.n["bi"]
            self.n.pop("bp", None)
            if good:
                for key in ("bo", "bn", "bw"):
                    self.n.pop(key, None)
            elif bad:
                times = self.n.get("bn", 1)
                self.n["bn"] = times + 1
                self.n["bo"] = self.now + min(BREAKER_LONGEST, BREAKER_FIRST * 2**times)
        elif (good or bad) and not self.n.get("bo") and self._count(bad) and bad:
            self.n["bo"], self.n["bn"] = self.now + BREAKER_FIRST, 1
            self.n.pop("bw", None)

    def _count(self, failed: bool) -> bool:
        """Count a call; returns whether too many calls of the last ten seconds failed."""
        second = math.floor(self.now / 1000)
        kept = {at: entry for at, *entry in self.n.get("bw", ()) if at > second - BREAKER_WINDOW}
        calls, failures = kept.get(second, (0, 0))
        kept[second] = [calls + 1, failures + failed]
        self.n["bw"] = [[at, *entry] for at, entry in kept.items()]
        total = sum(entry[0] for entry in kept.values())
        failed_ones = sum(entry[1] for entry in kept.values())
        return bool(total >= BREAKER_CALLS and failed_ones >= total * BREAKER_SHARE)

    # the rest

    def extend(self, calls: Sequence[str], lease: float) -> int:
        """Extend the leases that are still held."""
        held = [call for call in calls if call in self.state["leases"]]
        self.state["leases"].update(dict.fromkeys(held, self.now + lease))
        return len(held)

    def debit(self, used: Mapping[str, float]) -> None:
        """Deduct what was used without the limiter; all such deductions together are at most the capacity."""
        self.refresh()
        share = max(1, len(self.state["workers"]))
        for d, amount in used.items():
            if self.limit(d) is not None:
                most = amount if d == "requests_per_day" else self.capacity(d) / share
                self.put(d, self.level(d) - min(amount, most))

    def drain(self) -> None:
        """Empty the buckets, except for requests per day."""
        for d in DIMENSIONS:
            if self.limit(d) is not None and d != "requests_per_day":
                self.put(d, min(0.0, self.level(d)))

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the gate for display; times in milliseconds from now."""
        self.tidy()
        levels = {
            d: {
                "limit": self.limit(d),
                "level": self.level(d),
                "told": self.told(d),
                "learned": f"c {d}" in self.n,
                "set": self.n.get(f"H {d}") == self.limit(d),
            }
            for d in DIMENSIONS
            if self.limit(d) is not None
        }
        opens = self.n.get("bo", 0.0)
        return {
            "levels": levels,
            "in_flight": len(self.state["leases"]),
            "waiting": len(self.state["waiters"]),
            "teams": {
                team.rstrip("\n"): entry["came"] - entry["gone"]
                for team, entry in self.state["line"].items()
                if isinstance(entry, dict)
            },
            "workers": sum(seen >= self.now - SEEN for seen in self.state["workers"].values()),
            "rate": self.n.get("f", FIRST) * self.n.get("m", 1.0),
            "closed": max(0.0, max(self.n.get("closed", 0.0), self.account.get("closed", 0.0)) - self.now),
            "breaker": max(0.0, opens - self.now),
            "half_open": 0 < opens <= self.now,
            "granted": self.n.get("yes", 0),
            "denied": self.n.get("no", 0),
            "refused": self.n.get("n429", 0),
        }
