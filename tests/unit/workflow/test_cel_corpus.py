"""Our CEL beside cel-python: the same value where the semantics coincide, a stated one where they differ on purpose."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import parse

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import celpy
    import celpy.adapter
    import celpy.celtypes

NAMES: dict[str, Any] = {
    "plan": {"approved": True, "title": "Shop", "tasks": [{"id": "a", "n": 1}, {"id": "b", "n": 2}], "note": None},
    "tests": {"exit_code": 1, "stdout": "3 passed\n1 failed", "ratio": 0.75},
    "xs": [3, 1, 2],
    "empty": [],
    "name": "Ünïcode ✓",
}

SAME = [
    # arithmetic and precedence
    "1 + 2 * 3",
    "(1 + 2) * 3",
    "10 - 4 - 3",
    "7 / 2",
    "-7 / 2",
    "-7 % 3",
    "7 % -3",
    "2 * 3 % 4",
    "-xs[0] + 1",
    "1.5 * 2.0",
    "9.0 / 2.0",
    "0x1F + 1",
    "1e3",
    ".5 + .5",
    "-9223372036854775808",
    # strings
    "'a' + \"b\"",
    "'''tri'ple'''",
    r"r'a\nb'",
    r"'tab\tnew\nquote\'\x41\u00e9\101'",
    "'abc'.contains('b')",
    "'abc'.startsWith('ab')",
    "'abc'.endsWith('bc')",
    "size('abc')",
    "'abc'.size()",
    "size(name)",
    "'abc' < 'abd'",
    "'Z' < 'a'",
    # regular expressions
    "'task-42'.matches('[0-9]+')",
    "'task'.matches('^[0-9]+$')",
    "matches('abc', 'a.c')",
    # comparison
    "1 < 2",
    "2 <= 2",
    "3 > 4",
    "1.5 >= 1.5",
    "1 == 1",
    "'a' != 'b'",
    "true == true",
    "null == null",
    "[1, 2] == [1, 2]",
    "[1, 2] == [2, 1]",
    "{'a': 1} == {'a': 1}",
    # logic
    "true && false",
    "true || false",
    "!true",
    "!!true",
    "!(1 > 2)",
    "true || false && false",
    "false && (1 / 0 == 1)",
    "(1 / 0 == 1) && false",
    "true || (1 / 0 == 1)",
    "(1 / 0 == 1) || true",
    "1 < 2 ? 'yes' : 'no'",
    "false ? 1 : true ? 2 : 3",
    "false ? 1 / 0 : 7",
    "1 + 1 == 2 && 3 in xs || false",
    # lists and maps
    "[1, 2] + [3]",
    "[]",
    "{'a': {'b': [1]}}.a.b[0]",
    "xs[1]",
    "size(xs)",
    "2 in xs",
    "5 in xs",
    "'approved' in plan",
    "'nothing' in plan",
    "plan.tasks[1].id",
    "plan['title']",
    "plan.tasks[0]['n'] + 1",
    # macros
    "has(plan.title)",
    "has(plan.nothing)",
    "xs.all(x, x > 0)",
    "xs.all(x, x > 1)",
    "xs.exists(x, x == 2)",
    "empty.exists(x, x == 2)",
    "empty.all(x, false)",
    "xs.exists_one(x, x > 2)",
    "xs.exists_one(x, x > 1)",
    "xs.map(x, x * 2)",
    "xs.filter(x, x > 1)",
    "plan.tasks.map(t, t.id)",
    "plan.tasks.filter(t, t.n > 1).map(t, t.id)",
    "xs.map(x, xs.filter(y, y < x).size())",
    "plan.tasks.all(t, t.id in ['a', 'b'])",
    "{'a': 1, 'b': 2}.all(k, k in ['a', 'b'])",
    # conversions
    "int('42')",
    "int(3.9)",
    "int(-3.9)",
    "double('1.5')",
    "double(2)",
    "string(42)",
    "bool('true')",
    "timestamp('2026-05-01T12:00:00Z') < timestamp('2026-05-02T12:00:00Z')",
    "timestamp('2026-05-01T12:30:15Z').getHours()",
    "timestamp('2026-05-01T12:30:15Z').getMonth()",
    "timestamp('2026-05-01T12:00:00Z') + duration('1h') == timestamp('2026-05-01T13:00:00Z')",
    "duration('90s') == duration('1m30s')",
    "1 // a comment\n + 1",
]

DIFFERENT: list[tuple[str, Any, str]] = [
    ('"""a\nb"""', "a\nb", "as the specification has it; cel-python does not read the line break"),
    ("[1, 2,]", [1, 2], "as the specification has it; cel-python refuses the last comma"),
    ("string(true)", "true", "as the specification has it; cel-python says True"),
    ("1 + 1.5", 2.5, "integers and decimals mix in arithmetic"),
    ("3 * 0.5", 1.5, "integers and decimals mix in arithmetic"),
    ("7 / 2.0", 3.5, "a decimal makes a decimal"),
    ("1 < 1.5", True, "integers and decimals mix in comparison"),
    ("1 == 1.0", True, "numbers are equal by value"),
    ("tests.ratio > 0", True, "a decimal field beside an integer literal"),
    ("1 == '1'", False, "values of two types are unequal, not an error"),
    ("true == 1", False, "true is not a number"),
    ("[1] == [1.0]", True, "equality by value goes into lists"),
    ("5u + 1", 6, "unsigned integers are integers"),
    ("string(3.0)", "3", "whole decimals are written as JSON does"),
    ("has(plan.nothing.more)", False, "has() is false for the whole path, as default() is"),
    ("default(plan.nothing, 'x')", "x", "ours: default()"),
    ("default(plan.note, 'x')", "x", "default() takes null for missing"),
    ("default(plan.a.b.c, 1)", 1, "default() reaches through what is missing"),
    ("default(plan.title, 1 / 0)", "Shop", "default() is lazy"),
    ("json(plan.tasks)", json.dumps(NAMES["plan"]["tasks"]), "ours: json()"),
    ("lines(tests.stdout)", ["3 passed", "1 failed"], "ours: lines()"),
    ("split('a,b', ',')", ["a", "b"], "ours: split()"),
    ("'a,b'.split(',').size()", 2, "our functions are methods too"),
    ("join(xs, '-')", "3-1-2", "ours: join() takes any scalar"),
    ("truncate('abcdef', 4)", "abc…", "ours: truncate()"),
    ("string(duration('90s'))", "90s", "as the specification has it"),
    ("string(timestamp('2026-05-01T14:00:00+02:00'))", "2026-05-01T12:00:00Z", "timestamps are told in UTC"),
    ("timestamp(0) == timestamp('1970-01-01T00:00:00Z')", True, "seconds since 1970"),
    ("int(timestamp('1970-01-01T00:01:00Z'))", 60, "seconds since 1970"),
    ("timestamp('2026-05-01T12:00:00.123456789Z').getMilliseconds()", 123, "microseconds are kept"),
    ("timestamp('2026-05-01T12:00:00Z').getFullYear()", 2026, "UTC"),
    ("timestamp('2026-05-01T12:00:00Z').getDayOfWeek()", 5, "Sunday is 0"),
    ("timestamp('2026-05-01T12:00:00Z').getDayOfYear()", 120, "from 0"),
    ("timestamp('2026-05-01T12:00:00Z').getDate()", 1, "from 1"),
    ("timestamp('2026-05-01T12:00:00Z').getDayOfMonth()", 0, "from 0"),
    ("timestamp('2026-05-01T12:34:56Z').getMinutes()", 34, "UTC"),
    ("duration('1h30m').getMinutes()", 90, "the whole duration in minutes"),
    ("duration('1h30m').getHours()", 1, "whole hours"),
    ("duration('1.5s').getSeconds()", 1, "whole seconds"),
    ("string(timestamp('2026-05-02T00:00:00Z') - timestamp('2026-05-01T00:00:00Z'))", "86400s", "a difference"),
    ("string(-duration('2s') + duration('1s'))", "-1s", "durations have a sign"),
    ("uint('7') + uint(2.0)", 9, "unsigned integers are integers"),
    ("double('1e3')", 1000.0, "any decimal"),
    ("bool('FALSE')", False, "the spellings of the specification"),
    ("dyn(1) == 1", True, "dyn() changes nothing"),
    ("type(1.5)", "double", "a type is its name"),
    ("xs[1.0]", 1, "a whole decimal is an index"),
    ("truncate(plan.tasks, 3)", "[\n…", "truncate() takes anything"),
    ("truncate('abc', 0)", "", "nothing is left"),
    ("join(['a', true, null, 1.0])", "atruenull1", "join() without a separator"),
    ("'abc'.split('')", ["a", "b", "c"], "every character"),
    ("{'a': xs}['a'][0]", 3, "maps hold anything"),
    ("{1: 'x'}[1]", "x", "integers are keys"),
    ("size({'a': 1})", 1, "size of an object"),
    ("-(-1.5)", 1.5, "signs"),
    ("true && (nobody || true)", True, "a side that decides wins over an error"),
    ("plan.tasks.map(t, t.n > 1, t.id)", ["b"], "map() with a test"),
    ("'abc'.matches('(a+)+$')", False, "RE2: linear in the text"),
]

FAILING = [
    ("1 / 0", "division by zero"),
    ("1.0 / 0.0", "division by zero"),
    ("1 % 0", "division by zero"),
    ("9223372036854775807 + 1", "too large"),
    ("'a' + 1", "cannot join text and an integer"),
    ("1 < 'a'", "cannot join"),
    ("xs[7]", "has 3 items"),
    ("plan.nothing", "has no field `nothing`"),
    ("plan.note.x", "is null"),
    ("nobody", "there is no `nobody`"),
    ("1 && true", "where true or false is needed"),
    ("!1", "where true or false is needed"),
    ("'b' in 'abc'", "needs a list or an object"),
    ("int('x')", "not a 64-bit integer"),
    ("size(1)", "cannot take an integer"),
    ("'a'.matches('(')", "not a regular expression"),
    ("{'a': 1, 'a': 2}", "twice"),
    ("{true: 1}", "a key is a text or an integer"),
    ("-'a'", "needs a number"),
    ("-(-9223372036854775808)", "too large"),
    ("9223372036854775807 * 2", "too large"),
    ("int(1e308)", "not a 64-bit integer"),
    ("1e308 * 10.0", "too large for a decimal"),
    ("1e308 / 0.1", "too large for a decimal"),
    ("int(true)", "cannot take true"),
    ("uint(-1)", "below zero"),
    ("double('x')", "not a number"),
    ("double(null)", "cannot take null"),
    ("bool('yes')", "neither true nor false"),
    ("string([1])", "cannot take a list"),
    ("timestamp('yesterday')", "not a timestamp"),
    ("timestamp('2026-13-01T00:00:00Z')", "not a timestamp"),
    ("duration('soon')", "not a duration"),
    ("duration('9999999999999999h')", "too long"),
    ("duration('1s').getFullYear()", "cannot take a duration"),
    (
        "timestamp('2026-05-01T12:00:00Z') + timestamp('2026-05-01T12:00:00Z')",
        "cannot join a timestamp and a timestamp",
    ),
    ("truncate('abc', -1)", "0 or more"),
    ("truncate('abc', '1')", "cannot take text, text"),
    ("join('abc', ',')", "cannot take text, text"),
    ("1 % 2.0", "cannot join"),
    ("plan.title.x", "is text: it has no field `x`"),
    ("plan.tasks['a']", "its index is an integer"),
    ("plan.title[0]", "is text"),
    ("plan[1.5]", "a key is a text or an integer"),
    ("plan.note[0]", "is null"),
    ("plan['nothing']", "no field `nothing`"),
    ("xs.all(x, x.y)", "has no field `y`"),
    ("xs.exists(x, 1 / (x - 3) > 5)", "division by zero"),
    ("xs.filter(x, x)", "where true or false is needed"),
    ("1 ? 2 : 3", "where true or false is needed"),
    ("name.map(x, x)", "needs a list or an object"),
]


def reference(source: str) -> Any:
    """What cel-python gives."""
    environment = celpy.Environment()
    program = environment.program(environment.compile(source))
    return program.evaluate({name: celpy.json_to_cel(value) for name, value in NAMES.items()})


def plain(value: Any) -> Any:
    """cel-python's values as Python's."""
    if isinstance(value, celpy.celtypes.BoolType):
        return bool(value)
    if isinstance(value, celpy.celtypes.ListType):
        return [plain(item) for item in value]
    if isinstance(value, celpy.celtypes.MapType):
        return {plain(key): plain(entry) for key, entry in value.items()}
    for wide, narrow in ((int, int), (float, float), (str, str)):
        if isinstance(value, wide):
            return narrow(value)
    return value


@pytest.mark.parametrize("source", SAME)
def test_same_as_cel(source: str) -> None:
    ours = parse(source).evaluate(NAMES)
    theirs = plain(reference(source))
    assert ours == theirs
    assert isinstance(ours, bool) == isinstance(theirs, bool)


@pytest.mark.parametrize(("source", "value", "why"), DIFFERENT)
def test_different_on_purpose(source: str, value: Any, why: str) -> None:
    ours = parse(source).evaluate(NAMES)
    assert ours == value, why
    assert type(ours) is type(value)


@pytest.mark.parametrize(("source", "message"), FAILING)
def test_errors_say_what_is_wrong(source: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        parse(source).evaluate(NAMES)


def test_the_corpus_is_large_enough() -> None:
    assert len(SAME) + len(DIFFERENT) + len(FAILING) >= 60
