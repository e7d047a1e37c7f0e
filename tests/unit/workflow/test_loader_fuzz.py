"""Whatever a file holds, reading it ends in a workflow or in problems, never in an exception of the reader's own."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_common.documents import read_document
from gorgon_common.errors import GorgonError, WorkflowInvalid
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow import catalogue
from gorgon_common.workflow.formatter import format_text
from gorgon_common.workflow.source import read_workflow

FILES = Path(__file__).parent / "files"
ROLES, OPERATIONS = load_roles(), load_operations()

PRESENT = [catalogue.source(entry.name) for entry in catalogue.entries()]
PRESENT += [path.read_text() for path in (FILES / "snippets").glob("*.yaml")]
OLDER = [path.read_text() for path in sorted((FILES / "older").iterdir())]

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "5m", "{{plan.output}}", "${x}", "${", "{{", "equals", "id", "prompt", "90%"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "type", "prompt", "steps", "over", "field", "value", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def read(text: str) -> bool:
    """Read a text; True where it is a workflow.  Every problem must have a place and words."""
    try:
        read_workflow(text, file="w.yaml", roles=ROLES, operations=OPERATIONS)
    except WorkflowInvalid as error:
        found = error.problems
    else:
        return True
    assert found
    for problem in found:
        assert problem.message
        assert problem.line is not None, problem
        assert problem.column is not None
        assert 1 <= problem.line <= text.count("\n") + 1
        assert "<" not in problem.path
    return False


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += places(entry, (*path, key))
    return found


def replaced(data: Any, path: tuple[str | int, ...], junk: Any) -> Any:
    made = copy.deepcopy(data)
    owner = made
    for part in path[:-1]:
        owner = owner[part]
    owner[path[-1]] = junk
    return made


@pytest.mark.parametrize("text", [*PRESENT, *OLDER])
def test_the_corpus_itself_is_read(text: str) -> None:
    assert read(text)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), text=st.sampled_from([*PRESENT, *OLDER]))
def test_junk_in_any_place_is_told_about(data: st.DataObject, text: str) -> None:
    tree = read_document(text).data
    path = data.draw(st.sampled_from(places(tree)))
    made = replaced(tree, path, data.draw(JUNK))
    read(json.dumps(made))
    read(yaml.safe_dump(json.loads(json.dumps(made)), sort_keys=False))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.sampled_from([*PRESENT, *OLDER]))
def test_a_damaged_text_is_told_about(data: st.DataObject, text: str) -> None:
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 40)))
    put = data.draw(st.text(alphabet=" \n\t:-{}[]#\"'&*!|>%@`ax0\x00\ud800\u2028é,?", max_size=6))
    damaged = text[:begin] + put + text[end:]
    if read(damaged):
        # Where the formatter cannot keep the meaning it says so; it never writes another.
        with contextlib.suppress(GorgonError):
            made = format_text(damaged)
            assert read_document(made).data is not None
            assert format_text(made) == made


@settings(max_examples=50, deadline=None)
@given(JUNK)
def test_junk_alone_is_told_about(junk: Any) -> None:
    read(json.dumps(junk))
    read(json.dumps({"name": "a", "steps": [{"id": "a", "type": "shell", "params": junk}]}))
    read(json.dumps({"nodes": [junk, {"id": "a", "type": "loop", "data": junk}], "edges": [junk, {"source": "a"}]}))
