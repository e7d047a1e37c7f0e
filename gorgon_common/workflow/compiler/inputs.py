"""Checks the inputs of a run against the workflow's declarations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema import Draft202012Validator

from gorgon_common import strict_json
from gorgon_common.errors import InputInvalid
from gorgon_common.workflow.expressions import conform, did_you_mean
from gorgon_common.workflow.plan import Plan


def check_inputs(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's inputs: the given values, the defaults, and None for missing optional inputs.

    Whole numbers become decimals where the schema says `number`.  Raises InputInvalid naming everything that is
    missing, unknown or of the wrong type.
    """
    faults: list[str] = []
    made: dict[str, Any] = {}
    for name in given:
        if name not in plan.inputs:
            hint = did_you_mean(name, plan.inputs, none="The workflow takes no inputs.")
            faults.append(f"`{name}` is not an input of this workflow: {hint}")
    for name, declared in plan.inputs.items():
        schema = input_schema(declared)
        if name not in given:
            if "default" in declared:
                made[name] = conform(declared["default"], schema)
            elif declared.get("required"):
                told = f" ({declared['description']})" if declared.get("description") else ""
                faults.append(f"the input `{name}` is missing{told}")
            else:
                made[name] = None
            continue
        value = given[name]
        if value is None and not declared.get("required"):
            made[name] = None
            continue
        if (path := strict_json.not_finite(value)) is not None:
            where = _where(path)
            faults.append(f"`{name}{where}` is NaN or infinite; a number must be finite")
            continue
        found = [_explain(name, error) for error in _validator(schema).iter_errors(value)]
        faults.extend(found)
        made[name] = conform(value, schema)
    if faults:
        raise InputInvalid(_listed(faults), hint=_usage(plan))
    return made


def _validator(schema: Mapping[str, Any]) -> Draft202012Validator:
    """Return a validator that also checks `format: date` and the like, as far as the library can on its own."""
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def input_schema(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of an input, without the added `required: bool`."""
    schema = {key: value for key, value in declared.items() if key not in ("required", "x-required")}
    if "x-required" in declared:
        schema["required"] = declared["x-required"]
    return schema


def _where(path: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _explain(name: str, error: Any) -> str:
    message = str(error.message)
    return f"`{name}{_where(error.absolute_path)}`: {message if len(message) <= 200 else message[:199] + '…'}"


def _listed(faults: list[str]) -> str:
    if len(faults) == 1:
        return f"{faults[0][0].upper()}{faults[0][1:]}"
    return "The inputs do not fit the workflow:\n" + "\n".join(f"  - {fault}" for fault in faults)


def _usage(plan: Plan) -> str:
    if not plan.inputs:
        return ""
    parts, needed = [], next(iter(plan.inputs))
    for name, declared in plan.inputs.items():
        kind = declared.get("type", "any")
        kind = "|".join(kind) if isinstance(kind, list) else kind
        parts.append(f"{name} ({kind}{'' if declared.get('required') else ', optional'})")
    return f"The workflow takes: {', '.join(parts)}. On the command line: -i {needed}=VALUE."
