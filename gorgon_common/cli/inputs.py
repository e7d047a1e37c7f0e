"""Reads inputs from the command line and converts them as the workflow's schema requires."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common import documents, strict_json
from gorgon_common.documents.data import MAX_BYTES
from gorgon_common.errors import InputInvalid, NotFound

_TEXT = frozenset({"string"})
_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_DATA = (".json", ".yaml", ".yml")


def read_inputs(given: Sequence[str], file: str | None, schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the inputs of `-i NAME=VALUE …` and `--inputs FILE`; the former take precedence.

    `schemas` are the workflow's inputs.  The value of a string input is taken literally; every other value is JSON.
    `@PATH` stands for the content of a file, which may also be YAML (`@-` for stdin).  An array may also be given as
    several values (`-i files=a -i files=b`).  Raises InputInvalid, NotFound.
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
        many = len(values) > 1 or (_is(schemas.get(name), "array") and isinstance(values[0], (str, int, float)))
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
    if text.startswith("@@"):
        text = text[1:]
    elif text.startswith("@"):
        return _content(name, text[1:], schema or {})
    types = _types(schema)
    if types == _TEXT:
        return text
    if "boolean" in types and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return strict_json.loads(text, unique_keys=True)
    except ValueError as error:
        wrong = error
    if "string" in types or not types:
        return text
    if "array" in types and _array_of_text(schema or {}) and not text.lstrip().startswith("["):
        return text
    raise InputInvalid(
        f"The input {name!r} must be {_article(types)}, and {_short(text)!r} is not valid JSON: {_reason(wrong)}.",
        hint=f"Write it as JSON, for example: -i {_example(name, types)}   or read it from a file: -i {name}=@FILE",
    )


def _reason(error: ValueError) -> str:
    return str(error).partition(": line ")[0]


def _content(name: str, path: str, schema: Mapping[str, Any]) -> Any:
    """Return the content of a file: text for a string input, lines for a list of strings, otherwise data."""
    text = _read(path, f"-i {name}=@{path}")
    types, shown = _types(schema), documents.shown_name(path)
    if types == _TEXT:
        return text
    if "string" in types or not types:
        if path.endswith(_DATA):
            return documents.read_data(text, file=shown)
        try:
            return strict_json.loads(text, unique_keys=True)
        except ValueError:
            return text
    lines = "array" in types and _array_of_text(schema) and not path.endswith(_DATA)
    if lines and text.lstrip()[:1] not in ("[", "{"):
        return [line for line in text.splitlines() if line.strip()]
    value = documents.read_data(text, file=shown)
    if types == {"array"} and not isinstance(value, list):
        raise InputInvalid(
            f"The input {name!r} must be an array, and {shown} holds {_kind(value)}.",
            hint="Write a list into the file.",
        )
    return value


def _kind(value: Any) -> str:
    words = {bool: "true or false", str: "a text", int: "a number", float: "a number", dict: "a mapping"}
    return "nothing" if value is None else words.get(type(value), "no list")


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


def read_json(option: str, given: str) -> Any:
    """Return the JSON value of an option; `@FILE` reads it from a file.  Raises InputInvalid."""
    text = _read(given[1:], option) if given.startswith("@") else given
    try:
        return strict_json.loads(text)
    except ValueError as error:
        raise InputInvalid(
            f"{option} is not JSON: {error}", hint=f"""Write it as JSON, such as {option} '{{"version": 7}}'."""
        ) from None


def _file(path: str) -> dict[str, Any]:
    shown = documents.shown_name(path)
    data = documents.read_data(_read(path, f"--inputs {path}"), file=shown)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputInvalid(f"{shown} must hold a mapping of input names to values.")
    return data


def _read(path: str, what: str) -> str:
    try:
        return documents.read_text(path, limit=MAX_BYTES)
    except (InputInvalid, NotFound) as error:
        raise InputInvalid(f"{what}: {error.message}", hint=error.hint) from None
