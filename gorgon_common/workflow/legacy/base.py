"""Shared by the translators of older formats: reporting, tracking positions, and word lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gorgon_common.documents import Path
from gorgon_common.operations.providers import MODEL_PROVIDERS, PROVIDERS

AGENTS = {word: name for name in MODEL_PROVIDERS for word in PROVIDERS[name].step_types}
"""Step type of an agent → provider."""
TYPES = (
    *("claude_code", "openai", "shell", "parallel", "checkpoint", "fan_out", "fan_in", "map_reduce", "branch", "loop"),
    *("mcp_tool", "approval", "github", "notion", "gmail", "slack"),
)
KNOWN_TYPES = frozenset({*TYPES, *AGENTS})
STEP_KEYS = frozenset(
    [
        "id",
        "type",
        "params",
        "condition",
        "on_failure",
        "max_retries",
        "timeout_seconds",
        "outputs",
        "depends_on",
        "fallback",
        "default_output",
        "circuit_breaker_key",
        "name",
        "description",
        "action",
        "next_step",
    ]
)


@dataclass(slots=True)
class Finding:
    """A message about an older file, at a path of the file.  `key`: it concerns the key, not its value."""

    message: str
    path: Path
    hint: str = ""
    severity: str = "error"
    key: bool = False


@dataclass(slots=True)
class Translated:
    """An older file, translated into the current format."""

    data: Any
    moved: dict[Path, Path] = field(default_factory=dict)
    """Path in the current format → path in the file, where they differ."""
    findings: list[Finding] = field(default_factory=list)


class Part:
    """The translators' shared methods: reporting, and tracking positions."""

    def __init__(self, result: Translated) -> None:
        self.result = result

    def origin(self, path: Path) -> Path:
        """Return the path in the file for a path in the data being read."""
        return path

    def error(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        """Report something that prevents the file from loading."""
        self.result.findings.append(Finding(message, self.origin(path), hint, "error", key))

    def warn(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        """Report something that has no effect."""
        self.result.findings.append(Finding(message, self.origin(path), hint, "warning", key))

    def move(self, new: Path, old: Path) -> None:
        """Record the original position of a path."""
        source = self.origin(old)
        if new != source:
            self.result.moved[new] = source


def bare(text: str) -> str:
    """Return an expression without braces around the whole of it."""
    stripped = text.strip()
    for opening, closing in (("${", "}"), ("{{", "}}")):
        inside = stripped[len(opening) : -len(closing)]
        if stripped.startswith(opening) and stripped.endswith(closing) and opening not in inside:
            return inside.strip()
    return stripped
