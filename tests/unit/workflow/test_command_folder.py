"""`cwd:` of a command, and the warning where one is missing."""

from __future__ import annotations

import pytest

from gorgon_common import errors
from gorgon_common.application.workflows import read as compile_text

FILE = "name: c\ninputs: {{folder: string}}\nsteps:\n  - {{id: a, run: {run}{more}}}\n"


def warnings(run: str, more: str = "") -> list[str]:
    _, problems = compile_text(FILE.format(run=run, more=more), file="f.yaml")
    assert all(problem.severity == "warning" for problem in problems)
    return [problem.message for problem in problems]


@pytest.mark.parametrize(
    ("run", "path"),
    [
        ("[cat, notes.txt]", "notes.txt"),
        ("[python, ./tool.py]", "./tool.py"),
        ("[pytest, -q, tests/test_a.py]", "tests/test_a.py"),
        ("[./build.sh]", "./build.sh"),
        ("[grep, -r, word, .]", "."),
        ('"wc -l notes.txt"', "notes.txt"),
    ],
)
def test_a_relative_path_without_a_folder_is_a_warning(run: str, path: str) -> None:
    (message,) = warnings(run)
    assert message == f"`{path}` is a relative path, and a command without `cwd:` starts in a new, empty folder"
    assert warnings(run, ", cwd: .") == []


@pytest.mark.parametrize(
    "run",
    [
        "[cat, /etc/hosts.conf]",
        "[pytest, -q]",
        "[echo, 'read notes.txt first']",
        "[curl, 'https://example.org/a.json']",
        "[jq, '.items[0].name']",
        '[cat, "{{inputs.folder}}/a.txt"]',
        '"echo hello > out.txt; cat out.txt"',
        '"cd /srv && cat notes.txt"',
        "[sed, s/a/b/]",
        "[sleep, '1.5']",
    ],
)
def test_what_is_no_relative_path_is_not(run: str) -> None:
    assert warnings(run) == []


def test_the_folder_comes_from_the_file_or_from_an_input() -> None:
    plan, _ = compile_text(FILE.format(run="[ls]", more=', cwd: "{{inputs.folder}}"'), file="f.yaml")
    assert plan.nodes[0].spec["cwd"] == "{{inputs.folder}}"
    text = FILE.format(run="[ls]", more="") + '  - {id: b, run: [ls], cwd: "{{a.stdout}}"}\n'
    with pytest.raises(errors.WorkflowInvalid) as caught:
        compile_text(text, file="f.yaml")
    (problem,) = caught.value.problems
    assert (problem.message, problem.line) == ("`a.stdout` may not decide the folder of a command", 5)


def test_it_belongs_to_commands() -> None:
    text = "name: c\nsteps:\n  - {id: a, role: planner, prompt: x, cwd: .}\n"
    with pytest.raises(errors.WorkflowInvalid, match="`cwd` has no meaning in a step with `prompt:`"):
        compile_text(text, file="f.yaml")
