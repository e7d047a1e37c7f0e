"""Data files that accompany workflows: inputs, prices, limits.  YAML by the same rules as a workflow, or JSON."""

from __future__ import annotations

from typing import Any

from gorgon_common import strict_json
from gorgon_common.documents.reader import Rules, read_document
from gorgon_common.errors import InputInvalid

MAX_BYTES = 10_000_000
"""The maximum size of a data file."""

_RULES = Rules(
    max_bytes=MAX_BYTES,
    max_depth=100,
    max_nodes=500_000,
    what="a file with data holds one document",
    too_large="Split the file.",
    too_deep="Flatten the data.",
    may_be_empty=True,
)


def read_data(text: str, *, file: str) -> Any:
    """Return the data of a YAML or JSON text; None if it is empty.

    Types are those of YAML 1.2 (`NO`, `on`, `12:30` and dates are text), keys in a mapping are unique, and numbers are
    finite.  Raises InputInvalid with every problem, its line and its column.
    """
    if file.endswith(".json") or text.lstrip()[:1] in ("{", "["):
        try:
            return strict_json.loads(text, unique_keys=True)
        except (strict_json.NotFinite, strict_json.TooDeep) as error:
            raise InputInvalid(f"{file} is not valid JSON: {error}.") from None
        except ValueError as error:
            if file.endswith(".json"):
                raise InputInvalid(f"{file} is not valid JSON: {error}.") from None
    document = read_document(text, file=file, rules=_RULES)
    if document.problems:
        raise InputInvalid("\n".join(str(problem).replace(": error: ", ": ", 1) for problem in document.problems))
    return document.data
