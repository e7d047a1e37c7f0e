"""Inputs from the command line, made what the workflow's schema asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gorgon_common.errors import InputInvalid

_MAX_BYTES = 10_000_000
_TEXT = frozenset({"string"})
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def read_inputs(given: Sequence[str], file: str | None, schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the inputs of `-i NAME=VALUE …` and `--inputs FILE`; the former win.

    `schemas` are the workflow's inputs: a value for a text is taken as it is, every other one is JSON; `@PATH` stands
    for a file's content.  An array takes several values as well (`-i files=a -i files=b`).  Raises InputInvalid.
    """
    inputs = _file(file) if file is not None else {}
    collected: dict[str, list[Any]] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not equals or not name.strip():
            raise InputInvalid(f"-i {entry!r} is not NAME=VALUE.", hint=_known(schemas))
        name = name.strip()
        collected.setdefault(name, []).append(_value(name, text, schemas.get(name)))
    for name, values in collected.items():
        if len(values) > 1 and not _is(schemas.get(name), "array"):
            raise InputInvalid(f"The input {name!r} is given {len(values)} times.", hint="Give it once.")
        many = len(values) > 1 or (_is(schemas.get(name), "array") and not isinstance(values[0], list))
        inputs[name] = [part for value in values for part in _parts(value)] if many else values[0]
    return inputs


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _types(schema: Mapping[str, Any] | None) -> frozenset[str]:
    found = (schema or {}).get("type")
    return frozenset([found] if isinstance(found, str) else found or ())


def _is(schema: Mapping[str, Any] | None, name: str) -> bool:
    return name in _types(schema)


def _value(name: str, text: str, schema: Mapping[str, Any] | None) -> Any:
    path = None
    if text.startswith("@@"):
        text = text[1:]
    elif text.startswith("@"):
        path = text[1:]
        text = _read(path, f"-i {name}=@{path}")
    types = _types(schema)
    if types == _TEXT:
        return text
    try:
        return json.loads(text)
    except ValueError:
        pass
    if path is not None and path.endswith((".yaml", ".yml")):
        return _yaml(text, path)
    if "boolean" in types and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if "string" in types or not types:
        return text
    if "array" in types and _array_of_text(schema or {}):
        return [line for line in text.splitlines() if line.strip()] if path is not None else text
    raise InputInvalid(
        f"The input {name!r} must be {_article(types)}, and {_short(text)!r} is not valid JSON.",
        hint=f"Write it as JSON, for example: -i {_example(name, types)}   or put it into a file: -i {name}=@FILE",
    )


def _array_of_text(schema: Mapping[str, Any]) -> bool:
    items = schema.get("items")
    return not isinstance(items, Mapping) or _types(items) in (_TEXT, frozenset())


def _article(types: frozenset[str]) -> str:
    return " or ".join(f"{'an' if name[0] in 'aeio' else 'a'} {name}" for name in sorted(types))


def _example(name: str, types: frozenset[str]) -> str:
    samples = {
        "array": '\'["a", "b"]\'',
        "object": "'{\"name\": 1}'",
        "integer": "3",
        "number": "0.5",
        "boolean": "true",
    }
    return f"{name}={next((samples[kind] for kind in sorted(types) if kind in samples), 'null')}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"


def _known(schemas: Mapping[str, Any]) -> str:
    return f"Inputs of this workflow: {', '.join(schemas)}." if schemas else "This workflow takes no inputs."


def _file(path: str) -> dict[str, Any]:
    text = _read(path, f"--inputs {path}")
    try:
        data = json.loads(text)
    except ValueError as error:
        if path.endswith(".json"):
            raise InputInvalid(f"{path} is not valid JSON: {error}") from None
        data = _yaml(text, path)
    if not isinstance(data, dict):
        raise InputInvalid(f"{path} must hold a mapping of input names to values.")
    return {str(name): value for name, value in data.items()}


def _yaml(text: str, path: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputInvalid(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _read(path: str, what: str) -> str:
    try:
        if path == "-":
            return sys.stdin.read(_MAX_BYTES)
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise InputInvalid(f"{what}: the file is larger than 10 MB.")
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputInvalid(f"{what}: the file is not UTF-8 text.") from None
    except OSError as error:
        raise InputInvalid(f"{what}: {error.strerror}.") from None
