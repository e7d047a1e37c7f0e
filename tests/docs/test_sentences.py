"""Sentences at which readers stopped: none of them comes back, in a page, a message or a help text."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GONE = (
    "kept to whatever the provider says",
    "whether it is open",
    "with all its resumes, costs more",
    "longest way",
    "none makes it wait",
    "off by about",
    "more than is left",
    "is no day and no time",
    "is nothing that has a budget",
    "until there is somebody to ask",
    "is told to end; it is finishing",
    "It is tried again as `retry:` says",
)
PACKAGES = ("gorgon", "gorgon_common", "gorgon_worker", "gorgon_api", "dashboard", "workflows")
FILES = [
    *[ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")],
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".yaml", ".sql")),
    *sorted((ROOT / "tests" / "unit" / "cli" / "golden").glob("*.txt")),
]


@pytest.mark.parametrize("sentence", GONE)
def test_it_is_gone(sentence: str) -> None:
    assert len(FILES) > 250
    found = [str(path.relative_to(ROOT)) for path in FILES if sentence in flat(path)]
    assert found == []


def flat(path: Path) -> str:
    """The text of a file with its lines joined: a sentence may be broken, also between two strings of Python."""
    return (
        " ".join(path.read_text(encoding="utf-8").replace('"\n', "\n").split()).replace(' f"', " ").replace(' "', " ")
    )
