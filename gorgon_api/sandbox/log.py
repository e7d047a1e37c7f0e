"""The log: one entry per request, and the bill."""

from __future__ import annotations

import itertools
import json
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

KEPT = 100_000
"""The number of entries to keep; the bill still includes dropped entries."""


def shown(value: Any) -> str:
    """Return a value as it is written in a query: JSON unless it is a text."""
    return value if isinstance(value, str) else json.dumps(value)


def hashable(value: Any) -> Any:
    """Return a value that can be grouped by: lists and objects as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


class Log:
    """The effect log.  Entries are dicts; `seq` counts from 1 in the order in which requests were decided."""

    def __init__(self) -> None:
        self._entries: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._numbers = itertools.count(1)
        self._bill: Counter[tuple[str, str, str, str]] = Counter()
        self.total = 0

    def add(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Store an entry under the next number and return it."""
        stored = {"seq": next(self._numbers), **entry}
        self._entries.append(stored)
        self.total += 1
        return stored

    def charge(self, account: str, provider: str, model: str, usage: Mapping[str, int]) -> None:
        """Put the tokens of an answered call on the account's bill."""
        for kind, tokens in usage.items():
            if tokens:
                self._bill[(account, provider, model, kind)] += tokens
        self._bill[(account, provider, model, "calls")] += 1

    def entries(self, wanted: Mapping[str, str], since: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
        """Return entries after number `since` whose fields have the `wanted` values, oldest first, at most `limit`."""
        found = (
            entry
            for entry in self._entries
            if entry["seq"] > since and all(shown(entry.get(name)) == value for name, value in wanted.items())
        )
        return list(itertools.islice(found, limit))

    def count(self, by: Sequence[str], wanted: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return how many entries there are for each combination of the fields `by`, most first."""
        groups = Counter(tuple(hashable(entry.get(name)) for name in by) for entry in self.entries(wanted))
        return [{**dict(zip(by, group, strict=True)), "count": count} for group, count in groups.most_common()]

    def bill(self) -> dict[str, Any]:
        """Return `{account: {provider: {model: {kind: tokens, calls: n}}}}`."""
        bill: dict[str, Any] = {}
        for (account, provider, model, kind), tokens in sorted(self._bill.items()):
            bill.setdefault(account, {}).setdefault(provider, {}).setdefault(model, {})[kind] = tokens
        return bill

    def clear(self) -> None:
        """Clear the entries and the bill; the numbering continues."""
        self._entries.clear()
        self._bill.clear()
        self.total = 0
