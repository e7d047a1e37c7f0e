from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_common.documents import read_document
from gorgon_common.errors import GorgonError, WorkflowInvalid
from gorgon_common.workflow import catalogue, formatter
from gorgon_common.workflow.formatter import format_text
from gorgon_common.workflow.schema import Workflow

FILES = Path(__file__).parent / "files"
MESSY = (FILES / "fmt" / "messy.yaml").read_text()

TEXTS = {entry.name: catalogue.source(entry.name) for entry in catalogue.entries()}
TEXTS |= {f"template {name}": catalogue.template(name) for name in catalogue.templates()}
BUNDLED = list(TEXTS)
TEXTS |= {f"snippet {path.stem}": path.read_text() for path in (FILES / "snippets").glob("*.yaml")}
TEXTS |= {f"older {path.stem}": path.read_text() for path in (FILES / "older").glob("*.yaml")}
TEXTS["messy"] = MESSY


def comments(text: str) -> list[str]:
    return sorted("#" + line.split("# ", 1)[1].strip() for line in text.split("\n") if "# " in line)


def test_the_messy_file_becomes_the_tidy_one() -> None:
    assert format_text(MESSY) == (FILES / "fmt" / "messy.formatted.yaml").read_text()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_formatting_twice_changes_nothing_more(text: str) -> None:
    once = format_text(text)
    assert format_text(once) == once


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_windows_line_ends_and_a_directive_make_no_difference(text: str) -> None:
    once = format_text(text)
    assert format_text(text.replace("\n", "\r\n")) == once.replace("\n", "\r\n")
    body = text if text.startswith("---\n") else f"---\n{text}"
    assert format_text(f"%YAML 1.1\n{body}") == f"%YAML 1.1\n---\n{format_text(body.removeprefix('---' + chr(10)))}"


ODD = [
    *("yes", "on", "NO", "~", "12:30", "01234", "1_000", "0o14", "0x1F"),
    *("1e3", ".5", "+7", "2026-11-30", "2026-11-30T10:00:00Z", "=", "<<", "y", "null", "True"),
]


@pytest.mark.parametrize("head", ["", "%YAML 1.1\n---\n", "%YAML 1.2\n---\n"])
@pytest.mark.parametrize("name", ["name", "nme"])
@pytest.mark.parametrize("value", ODD)
def test_no_odd_value_is_changed(head: str, name: str, value: str) -> None:
    text = f"{head}{name}: w\nmetadata: {{k: {value}, l: [{value}]}}\nsteps:\n- {{id: a, prompt: {value}}}\n"
    try:
        made = format_text(text)
    except WorkflowInvalid:
        return  # refused with its place, and left as it is
    assert read_document(made).data == read_document(text).data
    assert format_text(made) == made


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_comment_is_kept(text: str) -> None:
    assert comments(format_text(text)) == comments(text)


@pytest.mark.parametrize("name", BUNDLED)
def test_what_is_bundled_is_in_canonical_form(name: str) -> None:
    assert format_text(TEXTS[name]) == TEXTS[name]


STEP: list[tuple[str, str]] = [
    ("depends_on: b", "depends_on: [b]"),
    ("depends_on: [b, c]", "depends_on: [b, c]"),
    ("timeout: 300", "timeout: 5m"),
    ("timeout: 1h 30m", "timeout: 1h30m"),
    ('deadline: "90s"', 'deadline: "1m30s"'),
    ("retry: 3", "max_retries: 3"),
    ("retry: {max: 3, backoff: fixed}", "retry: {max: 3, backoff: fixed}"),
    ("retry: {initial: 120}", "retry: {initial: 2m}"),
    ("cache: 3600", "cache: {ttl: 1h}"),
    ("cache: {ttl: 1h}", "cache: {ttl: 1h}"),
    ("output: {a: {type: boolean}}", "output: {a: boolean}"),
    (
        "output: {type: object, properties: {a: {type: string}}}",
        "output: {type: object, properties: {a: {type: string}}}",
    ),
    (
        "map: {over: [1], on_item_failure: continue, min_success: 0.5}",
        "map: {over: [1], on_item_failure: continue, min_success: 50%}",
    ),
    ("max_retries: 3  # three", "max_retries: 3  # three"),
    ("when: 'a  ==  1'", "when: 'a  ==  1'"),
]


@pytest.mark.parametrize(("written", "canonical"), STEP)
def test_short_forms_of_a_step(written: str, canonical: str) -> None:
    frame = "name: a\nsteps:\n  - id: x\n    prompt: hi\n    {}\n"
    assert format_text(frame.format(written)) == frame.format(canonical)


ACTIONS = [
    ("wait: 600", "wait: 10m"),
    ("wait: {for: 90s}", "wait: 1m30s"),
    ("wait: {event: x, timeout: 86400}", "wait: {event: x, timeout: 24h}"),
    ("approval: Ship it?", "approval: {message: Ship it?}"),
    ("approval: {message: a, approvers: role:b}", "approval: {message: a, approvers: [role:b]}"),
    ("run: a | b", "run: a | b"),
]


@pytest.mark.parametrize(("written", "canonical"), ACTIONS)
def test_short_forms_of_an_action(written: str, canonical: str) -> None:
    frame = "name: a\nsteps:\n  - id: x\n    {}\n"
    assert format_text(frame.format(written)) == frame.format(canonical)


def test_steps_inside_of_steps_are_formatted_too() -> None:
    text = """\
name: a
steps:
  - id: x
    prompt: hi
    map:
      over: [1]
      reduce: {prompt: hi, timeout: 60}
    on_failure: fallback
    fallback:
      type: alternate_step
      step: {prompt: hi, timeout: 120}
on_error:
  - {id: e, run: [a], timeout: 180}
"""
    made = format_text(text)
    assert [word for word in ("1m", "2m", "3m") if f"timeout: {word}" in made] == ["1m", "2m", "3m"]


def test_block_texts_are_not_touched() -> None:
    text = (
        'name: a\nsteps:\n  - id: x\n    prompt: |\n      a   \n        b\n\n      # no comment\n    system: "a\\tb"\n'
    )
    assert format_text(text) == text


def test_windows_line_ends_stay_and_are_no_difference() -> None:
    made = format_text("name: a\r\nsteps:\r\n- id: x\r\n  prompt: |\r\n    hi\r\n    you\r\n")
    assert made == "name: a\r\nsteps:\r\n  - id: x\r\n    prompt: |\r\n      hi\r\n      you\r\n"
    assert format_text(made) == made


def test_mixed_line_ends_become_those_of_the_most_lines() -> None:
    assert format_text("name: a\r\nsteps:\r\n  - {id: x, prompt: hi}\n").count("\r\n") == 3
    assert "\r" not in format_text("name: a\nsteps:\n  - {id: x, prompt: hi}\r\n")


@pytest.mark.parametrize("version", ["1.1", "1.2"])
@pytest.mark.parametrize("key", ["name", "nme"])
def test_a_directive_changes_no_value(version: str, key: str) -> None:
    text = f"# mine\n%YAML {version}\n---\n{key}: yes\nsteps:\n- {{id: a, prompt: on, timeout: 12:30}}\n"
    made = format_text(text)
    assert made.startswith(f"# mine\n%YAML {version}\n---\n")
    assert f"\n{key}: yes\n" in made
    assert read_document(made).data == read_document(text).data
    assert format_text(made) == made


def test_older_files_keep_their_words() -> None:
    text = "name: a\nsteps:\n- type: openai\n  id: x\n  timeout_seconds: 300\n  depends_on: y\n  params: {prompt: hi}\n"
    assert format_text(text) == (
        "name: a\nsteps:\n  - type: openai\n    id: x\n    timeout_seconds: 300\n    depends_on: y\n"
        "    params: {prompt: hi}\n"
    )


def test_json_stays_as_it_is() -> None:
    text = (FILES / "older" / "graph.json").read_text()
    assert format_text(text) == text


def test_a_file_that_is_wrong_but_readable_is_formatted() -> None:
    made = format_text("steps:\n- {promt: hi, timeout: soon, depends_on: x}\nname: 5\n")
    # What a short form stands for is known of a valid file only.
    assert made == "name: 5\n\nsteps:\n  - {promt: hi, timeout: soon, depends_on: x}\n"


def test_a_file_that_cannot_be_read_is_refused_with_its_place() -> None:
    with pytest.raises(WorkflowInvalid) as caught:
        format_text('name: "a\n', file="w.yaml")
    assert (caught.value.problems[0].file, caught.value.problems[0].line) == ("w.yaml", 1)


def test_a_change_of_meaning_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(tree: Any) -> None:
        tree["name"] = "b"

    monkeypatch.setattr(formatter, "_workflow", spoil)
    with pytest.raises(GorgonError, match="would change what it means"):
        format_text("name: a\nsteps:\n  - {id: x, prompt: hi}\n")


# Any workflow, in any style of YAML

WORDS = st.text(alphabet="abc xyz:#'\"{}-é\n,", min_size=1, max_size=30)
SPANS = st.sampled_from([5, 90, "5m", "1h 30m", 0.5, "90s"])
STEPS = st.fixed_dictionaries(
    {"prompt": WORDS},
    optional={
        "timeout": SPANS,
        "depends_on": st.just("s0") | st.just(["s0"]),
        "retry": st.integers(0, 5) | st.fixed_dictionaries({"max": st.integers(0, 5)}, optional={"cap": SPANS}),
        "cache": SPANS | st.fixed_dictionaries({"ttl": SPANS}),
        "output": st.just({"a": {"type": "boolean"}, "b": {"type": "string", "description": "x"}}),
        "system": WORDS,
        "map": st.just({"over": ["a"], "on_item_failure": "continue", "min_success": 0.25}),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=1, max_size=4),
    last=WORDS,
    flow=st.sampled_from([None, True, False]),
    indent=st.integers(2, 6),
    backwards=st.booleans(),
)
def test_any_workflow_keeps_its_meaning(
    steps: list[dict[str, Any]], last: str, flow: bool | None, indent: int, backwards: bool
) -> None:
    data: dict[str, Any] = {"name": "a", "steps": [{**step, "id": f"s{i}"} for i, step in enumerate(steps)]}
    data |= {"metadata": {"note": last}}
    data = json.loads(json.dumps(data))  # nothing shared, or the dump has anchors
    if backwards:
        data = dict(reversed(data.items()))
    text = yaml.safe_dump(data, default_flow_style=flow, indent=indent, sort_keys=False, allow_unicode=True)
    made = format_text(text)
    assert Workflow.model_validate(read_document(made).data) == Workflow.model_validate(data)
    assert format_text(made) == made
