"""Translates older workflow formats, so that files written for the earlier Gorgon load, plan and run unchanged.

`detect` recognises three forms: YAML or JSON with a `type:` on every step, JSON of `{id, steps: [{id, type, action,
params, next_step}], variables}`, and graphs of `nodes` and `edges`.  The last two are translated into the first, and
the first into the input of `schema.Workflow`.  `Translated.moved` records the original positions, so that problems
point at the file as written.

============================================  =========================================================================
written                                       becomes
============================================  =========================================================================
`claude_code`, `openai`                       `prompt`, `role`, `models`, `max_tokens`, `system` (from `system_prompt`),
                                              with `provider: anthropic` or `openai`
`shell` (`command`)                           the unsubstituted text for `sh -c` (`shell`); a list becomes `run`
`parallel` (`steps`, `max_workers`)           `steps`, a group without its own ordering
`checkpoint` (`message`)                      `checkpoint`
`fan_out` (`items`, `step_template`)          `map` (`as: item`) on the template's action; a template with a condition,
                                              or itself composite, becomes a group inside the map
`map_reduce` (`map_step`, `reduce_step`)      the same with `reduce`
`fan_in` (`concat`, …)                        `aggregate`
`fan_in` (`claude_code`, `openai`)            `prompt` with `${items}` replaced by the input's expression
`branch` (`condition`, `then`, `else`)        a group of two groups with opposite conditions; where `then` and `else`
                                              name steps, the condition goes to these
`loop` (`steps`, `condition` | `until`)       `loop` on a group whose steps follow each other; `while` runs at least
                                              once; `count` and `for_each` become a `map` that runs one item at a time
`mcp_tool` (`server`, `tool`, `arguments`)    `uses: mcp.call`
`approval` (`prompt`, `preview_from`)         `approval` (`message`, `$preview`), which also waits for what it shows
`github`, `notion`, `gmail`, `slack`          `uses: <type>.<operation>`, the other `params` under `with:`; operations
                                              that have been renamed get their current name
`outputs: [a, b]` of a step                   `$legacy: {publishes: [a, b]}`
`condition`                                   `condition` with `on_missing: false`
`on_failure`, `fallback`, `default_output`    the same; `callback` cannot be run and is an error
`max_retries` (3), `timeout_seconds` (300)    `retry.max`, `timeout`; groups get them only if written
`token_budget`, `timeout_seconds`             `limits.tokens` (100,000), `limits.timeout` (3,600 s)
`settings.auto_parallel_max_workers`          `limits.max_parallel`, with `auto_parallel: true`
`inputs` as a list, `list` for `array`        a mapping; JSON types
`variables`                                   inputs with a default
`outputs: [a]` of the workflow                `outputs: {a: "${a}"}`; null, with a warning, if nothing publishes it
a step without `depends_on`                   `$legacy: {order_after: [the step before]}`, unless `auto_parallel`
`next_step`, `edges`                          `order_after`; an edge out of a branch carries the branch's condition
============================================  =========================================================================

The result is *lenient* (`Workflow.lenient`): every edge, including those from `depends_on` and expressions, only waits
and does not propagate skips; missing values render as nothing.  `${…}` is kept, because the expression language can
read it.  In the JSON forms, `{{id_output}}` is a step's output, so a step without `outputs:` publishes that name.  Keys
that the older format did not know, and therefore ignored, are ignored here with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common.workflow.legacy.base import KNOWN_TYPES, Finding, Translated
from gorgon_common.workflow.legacy.file import File
from gorgon_common.workflow.legacy.graphs import Graph
from gorgon_common.workflow.legacy.json_form import JsonForm

__all__ = ["Finding", "Translated", "detect", "translate"]


def detect(data: Any) -> bool:
    """Tell whether a file is in one of the older formats."""
    if not isinstance(data, dict):
        return False
    if isinstance(data.get("nodes"), list) and "steps" not in data:
        return True
    steps = data.get("steps")
    return isinstance(steps, list) and any(_is_old(step) for step in steps)


def _is_old(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    kind = step.get("type", step.get("step_type"))
    known = isinstance(kind, str) and kind in KNOWN_TYPES
    return known or (kind is not None and ("params" in step or "parameters" in step))


def translate(data: dict[str, Any]) -> Translated:
    """Return an older file in the current format.  Raises nothing; problems are in the findings."""
    result = Translated(data)
    graph = "nodes" in data and "steps" not in data
    json_form = graph or _is_json_form(data)
    if graph:
        data = Graph(result).flatten(data)
    elif json_form:
        data = JsonForm(result).flatten(data)
    result.data = File(result, json_form=json_form).workflow(data)
    return result


def _is_json_form(data: Mapping[str, Any]) -> bool:
    steps = data.get("steps")
    entries = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    marks = ("next_step", "step_type", "step_id", "parameters")
    return "variables" in data or any(mark in step for step in entries for mark in marks)
