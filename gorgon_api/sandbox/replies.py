"""Generates replies from the role, the schema and the words of the prompt."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any

from gorgon_api.sandbox.calls import ModelCall, without_triggers
from gorgon_api.sandbox.schema_faker import MISSING, Impossible, Path, instance, wrong_instance

_WORD = re.compile(r"[^\W\d_][\w'-]{3,30}", re.UNICODE)
_DULL_TEXT = """
    about above after again against also analyze asked been before being below between both cannot could does doing
    done down each else every following from given have having here into itself just like make many more most must
    need needs only other output over please prompt result results role same shall should some step such sure tell
    than that their them then there these they this those through under until upon using very want well were what
    when where which while whom will with within without would write your yours review create implement produce
    answer return task work none null true false json text string
"""
_DULL = frozenset(_DULL_TEXT.split())

GOOD = (
    "approved",
    "passed",
    "pass",
    "success",
    "succeeded",
    "completed",
    "complete",
    "done",
    "ok",
    "ready",
    "low",
    "info",
)
"""Enumeration values that let a workflow continue, preferred ones first."""

_BAD = re.compile(
    r"error|fail|block|reject|vulnerab|critical|duplicate|truncated|urgent|^(needs|requires|is_spam)|breaking"
)
_EMPTY_LISTS = frozenset(("questions", "open_questions", "errors", "failures", "blockers", "missing"))
_NUMBERS: dict[str, tuple[float, float]] = {
    "score": (0.9, 88),
    "confidence": (0.9, 0.9),
    "probability": (0.8, 0.8),
    "accuracy": (0.92, 0.92),
    "coverage": (0.91, 91),
    "percentage": (0.87, 87),
    "rating": (0.9, 4),
    "priority": (0.0, 1),
    "line": (0.1, 42),
    "failed": (0.0, 0),
    "errors": (0.0, 0),
    "error_count": (0.0, 0),
    "tests_failed": (0.0, 0),
    "failures": (0.0, 0),
    "exit_code": (0.0, 0),
}
_VERBS = ("Clarify", "Design", "Build", "Test", "Document")

PYTHON = '''def {name}(items: list[str]) -> dict[str, int]:
    """Count the {noun}, most frequent first."""
    counts: dict[str, int] = {{}}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
'''
TEST = """def test_{name}_counts_each_item() -> None:
    assert {name}(["a", "b", "a"]) == {{"a": 2, "b": 1}}


def test_{name}_of_nothing_is_empty() -> None:
    assert {name}([]) == {{}}
"""


SENTENCES = (
    "the {} part is covered and behaves as asked.",
    "keep {} small and check it on its own.",
    "what matters most here is {}; the rest follows from it.",
    "{} works for the normal case and for an empty input.",
    "for {}, the simplest way that can be measured was taken.",
    "the risk lies in {}: a test has to show that it holds.",
)


class Topic:
    """The words of a prompt that a reply can mention."""

    def __init__(self, prompt: str) -> None:
        text = without_triggers(prompt)[:4000]
        words = (word for word in _WORD.findall(text) if word.lower() not in _DULL)
        self.words = list(dict.fromkeys(word.lower() for word in words))[:24] or ["request"]

    def word(self, index: int) -> str:
        """Return the next word, in rotation."""
        return str(self.words[index % len(self.words)])

    def phrase(self, index: int = 0) -> str:
        """Return two words that were near each other."""
        start = 2 * index % len(self.words)
        return " ".join(self.words[start : start + 2])

    def name(self) -> str:
        """Return a name for code."""
        letters = [re.sub(r"[^a-z0-9_]", "", word) for word in self.words[:2]]
        return "_".join(["count", *filter(None, letters)])


class Hints:
    """Plausible values for well-known names of fields; see `schema_faker.Hint`."""

    def __init__(self, role: str, topic: Topic, rng: random.Random) -> None:
        self.role = role
        self.topic = topic
        self.rng = rng

    def __call__(self, path: Path, kind: str, siblings: Mapping[str, Any]) -> Any:
        """Return a value for this path, MISSING without a preference."""
        name = next((str(part).lower() for part in reversed(path) if isinstance(part, str)), "")
        match kind:
            case "boolean":
                return not _BAD.search(name)
            case "enum":
                return GOOD
            case "array":
                return self.count(name, path)
            case "integer" | "number":
                return self.number(name, siblings)
            case "string":
                return self.string(name, path)
            case _:
                return MISSING

    def count(self, name: str, path: Path) -> int:
        """Return how many items a list of this name has."""
        if name in _EMPTY_LISTS:
            return 0
        if name in ("depends_on", "dependencies", "needs"):
            index = self.index(path)
            return 0 if index == 0 else 2 if index == 3 else 1
        if name == "tasks":
            return 4 + self.rng.randrange(2)
        if name in ("findings", "issues", "caveats", "gaps", "notes", "files"):
            return 1 + self.rng.randrange(2)
        return 2 + self.rng.randrange(2)

    @staticmethod
    def index(path: Path) -> int:
        """Return the number of the innermost list item, 0 outside of lists."""
        return next((part for part in reversed(path) if isinstance(part, int)), 0)

    def number(self, name: str, siblings: Mapping[str, Any]) -> Any:
        """Return (share of the range, value without a range), or a number that agrees with its neighbours."""
        if name in ("tests_run", "tests_passed", "total", "count"):
            lists = [value for value in siblings.values() if isinstance(value, list)]
            return len(lists[-1]) if lists else 6
        if name in _NUMBERS:
            return _NUMBERS[name]
        return (0.3 + 0.4 * self.rng.random(), self.rng.randint(2, 40))

    def string(self, name: str, path: Path) -> Any:
        """Return a text for a field of this name."""
        index = self.index(path)
        if name == "id" or (name in ("depends_on", "dependencies", "needs") and path):
            return self.identifier(name, path, index)
        maker = getattr(self, f"_{name}", None)
        if name in _FIELDS and maker is not None:
            return maker(index)
        return self.sentence(index, name)

    @staticmethod
    def identifier(name: str, path: Path, index: int) -> str:
        """Return t1, t2 … for tasks, f1 … for findings; for dependencies the ids of earlier items."""
        numbers = [part for part in path if isinstance(part, int)]
        names = [str(part) for part in path if isinstance(part, str)]
        if name == "id":
            return f"{names[-2][0] if len(names) > 1 else 'i'}{index + 1}"
        item = numbers[0] if len(numbers) > 1 else 1
        first = {1: 1, 2: 1, 3: 2}.get(item, item)
        return f"{names[-2][0] if len(names) > 1 else 't'}{min(first + index, item)}"

    def sentence(self, index: int, about: str = "") -> str:
        """Return a sentence that mentions the prompt."""
        subject = self.topic.phrase(index)
        chance = self.rng.random()
        text = SENTENCES[(index + int(chance * 1000)) % len(SENTENCES)].format(subject)
        text = text[0].upper() + text[1:]
        return f"{about.replace('_', ' ').capitalize()}: {text}" if about and chance < 0.2 else text

    def _title(self, index: int) -> str:
        return f"{_VERBS[index % len(_VERBS)]} {self.topic.phrase(index)}"

    def _name(self, index: int) -> str:
        return f"{self.topic.word(index)} {('count', 'rate', 'check', 'share')[index % 4]}"

    def _summary(self, index: int) -> str:
        return f"{self.topic.phrase(0).capitalize()}: done in small steps that can be checked alone. " + self.sentence(
            1
        )

    def _description(self, index: int) -> str:
        return f"{self.sentence(index)} Done when a test shows it."

    def _path(self, index: int) -> str:
        return f"{('src', 'tests', 'docs')[index % 3]}/{self.topic.name()}{('.py', '_test.py', '.md')[index % 3]}"

    _file = _filename = _path

    def _location(self, index: int) -> str:
        return f"src/{self.topic.name()}.py:{12 + 7 * index}"

    def _code(self, index: int) -> str:
        source = TEST if self.role == "tester" else PYTHON
        return source.format(name=self.topic.name(), noun=self.topic.phrase())

    def _content(self, index: int) -> str:
        if self.role in ("documenter", "reporter", ""):
            return self._report(index)
        return (PYTHON, TEST)[index % 2].format(name=self.topic.name(), noun=self.topic.phrase())

    def _report(self, index: int) -> str:
        points = "\n".join(f"- {self.sentence(number)}" for number in range(3))
        return f"# {self.topic.phrase().capitalize()}\n\n{self._summary(0)}\n\n## What was found\n\n{points}\n"

    def _command(self, index: int) -> str:
        return f"python -m pytest tests/{self.topic.name()}_test.py"

    def _severity(self, index: int) -> str:
        return "low"

    def _category(self, index: int) -> str:
        return ("clarity", "tests", "performance")[index % 3]

    def _status(self, index: int) -> str:
        return "completed"

    def _language(self, index: int) -> str:
        return "python"

    def _type(self, index: int) -> str:
        return ("string", "integer", "timestamp")[index % 3]

    def _value(self, index: int) -> str:
        return str(12 + 17 * index + self.rng.randrange(10))

    def _unit(self, index: int) -> str:
        return ("of 80 requests", "ms", "%")[index % 3]

    def _data(self, index: int) -> str:
        rows = "\n".join(f"{self.topic.word(number)},{3 * number + self.rng.randrange(9)}" for number in range(4))
        return f"name,count\n{rows}\n"

    def _spec(self, index: int) -> str:
        values = [{"name": self.topic.word(number), "count": 3 * number + 2} for number in range(4)]
        encoding = {"x": {"field": "name", "type": "nominal"}, "y": {"field": "count", "type": "quantitative"}}
        return json.dumps({"mark": "bar", "data": {"values": values}, "encoding": encoding})

    def _email(self, index: int) -> str:
        return f"person{index + 1}@example.com"

    def _url(self, index: int) -> str:
        return f"https://example.com/{self.topic.word(index)}"

    _uri = _url

    def _version(self, index: int) -> str:
        return f"1.{index}.0"

    def _date(self, index: int) -> str:
        return f"2026-03-{2 + index % 26:02d}"


_FIELDS = frozenset(name[1:] for name in vars(Hints) if name.startswith("_") and not name.startswith("__"))


def hints_for(call: ModelCall, rng: random.Random) -> Hints:
    """Return the hints for one call."""
    return Hints(call.role(), Topic(call.prompt or call.system), rng)


def structured(schema: Mapping[str, Any], hints: Hints, rng: random.Random, *, wrong: bool = False) -> Any:
    """Return an instance of `schema`, or with `wrong` a value that does not fit it."""
    if wrong:
        return wrong_instance(schema, rng, hints)
    try:
        return instance(schema, rng, hints)
    except Impossible:
        return {}


def free_text(hints: Hints) -> str:
    """Return text that reads like the work of the role."""
    topic = hints.topic
    opening = f"## {topic.phrase().capitalize()}\n\n{hints.sentence(0)} {hints.sentence(1)}\n"
    code = f"\n```python\n{PYTHON.format(name=topic.name(), noun=topic.phrase())}```\n"
    test = f"\n```python\n{TEST.format(name=topic.name())}```\n"
    points = "".join(f"- {hints.sentence(number)}\n" for number in range(3))
    match hints.role:
        case "builder" | "devops" | "migrator" | "model_builder" | "data_engineer":
            return f"{opening}{code}\nNotes:\n{points}"
        case "tester":
            return f"{opening}{test}\nAll {2 + hints.rng.randrange(4)} checks passed.\n{points}"
        case "planner":
            tasks = "".join(f"{number + 1}. {hints._title(number)}\n" for number in range(4))
            return f"{opening}\n{tasks}\nRisk: {hints.sentence(2)}\n"
        case "reviewer" | "security" | "security_auditor" | "security_analyst":
            return f"{opening}\nFindings:\n{points}\nVerdict: approved, score {84 + hints.rng.randrange(12)}.\n"
        case _:
            return f"{opening}\n{points}"


def repeated(sentence: str, size: int) -> str:
    """Return `size` bytes of text."""
    return (sentence * (size // len(sentence.encode()) + 1)).encode()[:size].decode(errors="ignore")


def swollen(value: Any, size: int, sentence: str) -> Any:
    """Return the value with its first text made `size` bytes long."""
    done = False

    def grow(node: Any) -> Any:
        nonlocal done
        if done:
            return node
        if isinstance(node, str):
            done = True
            return repeated(sentence + " ", size)
        if isinstance(node, dict):
            return {key: grow(item) for key, item in node.items()}
        if isinstance(node, list):
            return [grow(item) for item in node]
        return node

    grown = grow(value)
    return grown if done else {"text": repeated(sentence + " ", size)}
