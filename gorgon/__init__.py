"""Gorgon's public Python interface: everything that a program outside this project may import.

    from gorgon import RateLimitedParallelExecutor, cost_tracker

Names that are not in `__all__` belong to the implementation and may change with any version.
"""

from __future__ import annotations

from importlib import metadata

from gorgon_common.client.http import Client
from gorgon_common.costs.tracker import CostTracker, cost_tracker
from gorgon_common.errors import (
    ConfigurationError,
    Conflict,
    GorgonError,
    InputInvalid,
    NotAvailable,
    NotFound,
    OverLimit,
    RateLimited,
    Unavailable,
    UserError,
    WorkflowInvalid,
)
from gorgon_common.library.executor import ParallelResult, ParallelTask, RateLimitedParallelExecutor

__all__ = [
    "Client",
    "ConfigurationError",
    "Conflict",
    "CostTracker",
    "GorgonError",
    "InputInvalid",
    "NotAvailable",
    "NotFound",
    "OverLimit",
    "ParallelResult",
    "ParallelTask",
    "RateLimited",
    "RateLimitedParallelExecutor",
    "Unavailable",
    "UserError",
    "WorkflowInvalid",
    "__version__",
    "cost_tracker",
]

try:
    __version__ = metadata.version("gorgon")
except metadata.PackageNotFoundError:  # a clone that is on the path but not installed
    __version__ = "0"
