"""Workflow files: read, check, draw and format them, and find the bundled ones.  Needs no database.

What is heavy to import (the formatter, the drawing of canvases) is imported when it is used.
"""

from __future__ import annotations

from typing import Any

from gorgon_common import lazy
from gorgon_common.errors import Problem
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow import catalogue
from gorgon_common.workflow import graph as drawings
from gorgon_common.workflow import schema as language
from gorgon_common.workflow.plan import Plan
from gorgon_common.workflow.source import read_workflow

__all__ = [
    "Plan",
    "bundled",
    "bundled_text",
    "capped",
    "describe_canvas",
    "format_text",
    "graph",
    "json_schema",
    "read",
    "template",
    "to_mermaid",
    "to_text",
]

bundled = catalogue.entries
"""Return the bundled workflows in the order of their index."""
bundled_text = catalogue.source
"""Return the text of a bundled workflow.  Raises NotFound, suggesting the closest name."""
template = catalogue.template
"""Return the text of a template for `gorgon init`.  Raises NotFound."""
json_schema = language.json_schema
"""Return the JSON Schema of workflow files."""
to_mermaid = drawings.to_mermaid
"""Return a plan as a mermaid flowchart."""
to_text = drawings.to_text
"""Return a plan as a drawing of its steps."""


def read(text: str, *, file: str | None = None) -> tuple[Plan, list[Problem]]:
    """Load and compile a workflow; returns the plan and the warnings.  Raises WorkflowInvalid."""
    return read_workflow(text, file=file, roles=load_roles(), operations=load_operations())


def format_text(text: str, *, file: str) -> str:
    """Return a workflow text in its canonical form.  Raises WorkflowInvalid, InputInvalid."""
    formatted: str = lazy.load("gorgon_common.workflow.formatter:format_text")(text, file=file)  # ruamel.yaml: 0.1 s
    return formatted


def graph(plan: Plan) -> dict[str, Any]:
    """Return the steps and the Celery canvas of a plan: the document of `gorgon graph --json`."""
    return {**drawings.to_dict(plan), "canvas": lazy.load("gorgon_common.canvas.lowering").to_dict(plan)}


def describe_canvas(plan: Plan) -> str:
    """Return the Celery canvas that a plan compiles to, as text."""
    text: str = lazy.load("gorgon_common.canvas.lowering").describe(plan)
    return text


def capped(plan: Plan, usd: Any) -> Plan:
    """Return the plan with a lower limit on what a run may cost, in US dollars.  Raises InputInvalid."""
    made: Plan = lazy.load("gorgon_common.engine.estimate:capped")(plan, usd)
    return made
