"""Older workflow formats → the present one.  Recognition and translation are to be written; nothing is recognised yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gorgon_common.workflow.document import Path


@dataclass(slots=True)
class Finding:
    """Something to tell about an older file, at a path of the file."""

    message: str
    path: Path
    hint: str = ""
    severity: str = "error"


@dataclass(slots=True)
class Translated:
    """An older file in the present form."""

    data: Any
    moved: dict[Path, Path] = field(default_factory=dict)
    """Path in the present form → path in the file."""
    findings: list[Finding] = field(default_factory=list)


def detect(data: Any) -> bool:
    """Tell whether a file is in one of the older formats."""
    return False


def translate(data: Any) -> Translated:
    """Return an older file in the present form."""
    return Translated(data)
