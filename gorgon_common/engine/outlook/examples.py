"""What a model might reply, where nothing is known of what it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common.workflow.plan import Node

REPLY_TOKENS = 450
"""How long a reply in plain text is taken to be."""
SENTENCE = "The part that was asked for is done in small steps, each of which can be checked alone."
_BRIEF = SENTENCE[:26]
"""The sandbox's invented replies are much shorter than those of models."""


def example(schema: Any, sentence: str = SENTENCE, depth: int = 0) -> Any:
    """Return a value of a JSON Schema as a model might write it: sentences, lists of three."""
    if not isinstance(schema, Mapping) or depth > 8:
        return sentence
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return example(schema[key][0], sentence, depth + 1)
    kind = schema.get("type")
    kind = next((entry for entry in kind if entry != "null"), "null") if isinstance(kind, list) else kind
    match kind:
        case "object":
            fields = (schema.get("properties") or {}).items()
            return {name: _field(name, entry, sentence, depth) for name, entry in fields}
        case "array":
            return [example(schema.get("items") or {}, sentence, depth + 1) for _ in range(3)]
        case "boolean":
            return True
        case "integer" | "number":
            return 12
        case "null":
            return None
    return sentence


def _field(name: str, schema: Any, sentence: str, depth: int) -> Any:
    made = example(schema, sentence, depth + 1)
    if made != sentence:
        return made
    if name in ("id", "severity", "category", "kind", "type", "unit", "language", "status"):
        return "t1"
    if name in ("title", "name", "path", "file", "location"):
        return sentence[:32]
    if name in ("code", "content", "report", "diff", "body", "document"):
        return "\n".join([sentence] * 6)
    return sentence if depth else f"{sentence}  {sentence}"


def reply_example(node: Node, target: str) -> Any:
    """Return a reply to an agent step: of its schema if it has one, else plain text."""
    schema = node.spec.get("schema")
    sentence = _BRIEF if target == "sandbox" else SENTENCE
    if schema is not None:
        return example(schema, sentence)
    return " ".join([sentence] * max(1, REPLY_TOKENS // 18))
