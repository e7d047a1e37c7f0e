"""The base of every mapping in a workflow file, which reports all of its faults at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


def fault(message: str, *at: str | int, hint: str = "", value: Any = None, key: bool = False) -> InitErrorDetails:
    """Return one fault, at a path relative to the model.

    `key`: the key itself is wrong, not its value, so the problem points at the key.
    """
    told = {"message": message, "hint": hint, "key": key}
    return InitErrorDetails(type=PydanticCustomError("gorgon", "{message}", told), loc=at, input=value)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean …?` for the closest known word, or the list of known words."""
    names = [str(name) for name in known]
    folded = {name.lower().replace("-", "_"): name for name in names}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), list(folded), n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{folded[near[0]]}`?"
    return f"Known: {', '.join(sorted(names))}." if 0 < len(names) <= 30 else ""


def refuse(message: str, hint: str = "") -> PydanticCustomError:
    """Return the error for a validator of a single value to raise."""
    return PydanticCustomError("gorgon", "{message}", {"message": message, "hint": hint, "key": False})


def raise_all(title: str, faults: list[InitErrorDetails]) -> None:
    """Raise all faults at once, if there are any."""
    if faults:
        raise ValidationError.from_exception_data(title, faults)


def _again(error: ValidationError) -> Iterator[InitErrorDetails]:
    """Yield the errors of a validation in a form that can be raised again."""
    for entry in error.errors(include_url=False):
        kind: Any = entry["type"]
        context = entry.get("ctx", {})
        if kind == "gorgon":
            kind = PydanticCustomError("gorgon", "{message}", context)
        yield InitErrorDetails(type=kind, loc=entry["loc"], input=entry["input"], ctx=context)


class Closed(BaseModel):
    """A mapping with known keys.  Reports everything that is wrong with it at once."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)

    noun: ClassVar[str] = "mapping"
    """What messages call the mapping: `a step`."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys that people often try here → what to write instead."""

    @classmethod
    def written_keys(cls) -> list[str]:
        """Return the keys as written in the file."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def _sugar(cls, value: Any) -> Any:
        """Expand a short form of the whole mapping (a text, a number) into the mapping."""
        return value

    @classmethod
    def _faults(cls, value: dict[str, Any]) -> Iterator[InitErrorDetails]:
        """Yield faults in the combination of keys."""
        yield from ()

    def _fold(self) -> None:
        """Fold sugar between keys, after every key has been validated."""

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if isinstance(value, cls):
            return value
        value = cls._sugar(value)
        if not isinstance(value, dict):
            raise refuse(f"{cls.noun} must be a mapping (`key: value`)")
        legacy = bool(info.context and info.context.get("legacy"))
        keys = [key for key in cls.written_keys() if legacy or not key.startswith("$")]
        found = []
        for key in value:
            if key not in keys:
                hint = cls.elsewhere.get(str(key)) or suggest(str(key), keys)
                found.append(fault(f"unknown key `{key}` in {cls.noun}", key, hint=hint, value=value[key], key=True))
        known = {key: entry for key, entry in value.items() if key in keys}
        for name, field in cls.model_fields.items():
            key = field.alias or name
            if key in known and known[key] is None and field.annotation is not Any and not legacy:
                hint = "Write a value, or remove the line."
                found.append(fault(f"`{key}` has no value", key, hint=hint, key=True))
                del known[key]
                continue
            if field.is_required() and (field.alias or name) not in known:
                hint = field.description or ""
                found.append(fault(f"`{field.alias or name}` is missing in {cls.noun}", hint=hint, value=value))
        found.extend(cls._faults(known))
        made: Self | None = None
        try:
            made = handler(known)
        except ValidationError as error:
            found.extend(
                entry for entry in _again(error) if not (entry["type"] == "missing" and len(entry.get("loc", ())) == 1)
            )
        if made is None or found:
            # pydantic runs a wrap validator twice for models that refer to each other.
            found = list(
                {f"{entry.get('loc')} {entry['type']!r} {entry.get('ctx')}": entry for entry in found}.values()
            )
            raise ValidationError.from_exception_data(cls.__name__, found)
        made._fold()
        return made
