"""A session of the system, together with the stores and publishers below it: tests and benchmarks look at both."""

from __future__ import annotations

from typing import Any

from gorgon_common import bootstrap
from gorgon_common.application.session import Session
from gorgon_common.scope import SYSTEM
from gorgon_common.settings import Settings


class Services(Session):
    """What a caller may do, and the parts that the process is wired from."""

    def __getattr__(self, name: str) -> Any:
        """Return a part: `database`, `store`, `budgets`, `views`, `publisher` …"""
        if name == "services":  # not wired, as in `MemoryServices`
            raise AttributeError(name)
        return getattr(self.services, name)


def build(settings: Settings, **options: Any) -> Services:
    return Services(bootstrap.build(settings, **options), SYSTEM)
