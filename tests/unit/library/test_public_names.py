"""What `import gorgon` gives: a promise to other programs, so a change of this list is a change of the interface."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gorgon

NAMES = [
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


def test_the_exported_names() -> None:
    assert sorted(gorgon.__all__) == NAMES
    assert all(hasattr(gorgon, name) for name in NAMES)


def test_nothing_else_looks_public() -> None:
    public = {name for name, value in vars(gorgon).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - set(NAMES) == {"annotations"}


def test_the_version_is_that_of_the_distribution() -> None:
    assert gorgon.__version__ == version("gorgon")


def test_every_name_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "library.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if not re.search(rf"\b{name}\b", page)] == []


def test_importing_it_opens_nothing_and_warns_of_nothing(tmp_path: Path) -> None:
    program = "import gorgon, threading, os; print(threading.active_count(), os.listdir())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("1 []\n", "")
