"""The queues for messages: one for each provider, one for commands, and one for the engine itself."""

from __future__ import annotations

OPENAI = "openai"
ANTHROPIC = "anthropic"
GITHUB = "github"
NOTION = "notion"
GMAIL = "gmail"
SLACK = "slack"
HTTP = "http"
COMMAND = "command"
CONTROL = "control"

ALL = (OPENAI, ANTHROPIC, GITHUB, NOTION, GMAIL, SLACK, HTTP, COMMAND, CONTROL)
"""Every queue; a worker without `-q` serves all of them."""
