"""What the translators of older formats share: telling, remembering where things stood, and words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gorgon_common.documents import Path

AGENTS = {
    "claude_code": "anthropic",
    "claude": "anthropic",
    "anthropic": "anthropic",
    "openai": "openai",
}
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
    """Something to tell about an older file, at a path of the file.  `key`: at the key, not its value."""

    message: str
    path: Path
    hint: str = ""
    severity: str = "error"
    key: bool = False


@dataclass(slots=True)
class Translated:
    """An older file in the present form."""

    data: Any
    moved: dict[Path, Path] = field(default_factory=dict)
    """Path in the present form → path in the file, where they differ."""
    findings: list[Finding] = field(default_factory=list)


class Part:
    """What the translators share: telling, and remembering where things stood."""

    def __init__(self, result: Translated) -> None:
        self.result = result

    def origin(self, path: Path) -> Path:
        """Return the path in the file for a path in what is being read."""
        return path

    def error(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        """Tell what keeps the file from loading."""
        self.result.findings.append(Finding(message, self.origin(path), hint, "error", key))

    def warn(self, message: str, path: Path, hint: str = "", *, key: bool = False) -> None:
        """Tell what has no effect."""
        self.result.findings.append(Finding(message, self.origin(path), hint, "warning", key))

    def move(self, new: Path, old: Path) -> None:
        """Remember where something stood."""
        source = self.origin(old)
        if new != source:
            self.result.moved[new] = source


def bare(text: str) -> str:
    """An expression without the braces around the whole of it."""
    stripped = text.strip()
    for opening, closing in (("${", "}"), ("{{", "}}")):
        inside = stripped[len(opening) : -len(closing)]
        if stripped.startswith(opening) and stripped.endswith(closing) and opening not in inside:
            return inside.strip()
    return stripped
