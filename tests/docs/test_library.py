"""The Python of docs/library.md, run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
TOLD = {"cost_tracker": "0.0015\n", "RateLimitedParallelExecutor": "2 answers {} () 0\n"}


@pytest.mark.parametrize("name", TOLD)
def test_the_example_does_what_it_says(name: str, tmp_path: Path) -> None:
    (code,) = (block for block in BLOCKS if f"import {name}" in block)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "GORGON_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, TOLD[name]), done.stderr
