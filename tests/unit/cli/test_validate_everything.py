"""`gorgon validate` tells typing errors and wrong references together."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from gorgon_common.cli import build

BAD = """\
name: Bad
steps:
  - id: plan
    rol: planner
    prompt: "{{inputs.x}}"
  - id: build
    role: bilder
    depends_on: [plam]
    prompt: "Use {{plan.taks}}"
"""


def test_every_problem_of_a_file_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    result = CliRunner().invoke(build(), ["validate", "--json", str(tmp_path / "bad.yaml")])
    assert result.exit_code == 2
    problems = json.loads(result.stdout)["problems"]
    assert [problem["line"] for problem in problems] == [4, 5, 7, 8, 9]
