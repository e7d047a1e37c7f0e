"""Promises about the repository itself that no other tool checks."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gorgon", "gorgon_common", "gorgon_worker", "gorgon_api", "dashboard")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPANIONS = {"pydantic-core": "pydantic", "starlette": "fastapi"}  # pinned by, and of no use without
IMPORTS_LATE = {"gorgon_common/lazy.py", "gorgon_worker/providers/deferred.py"}
# written apart, so that this file does not name what it forbids
INDEX = re.compile(
    "|".join(
        [
            "pypi" + r"\.org",
            "python" + "hosted",
            r"(?<!no-emit-)index" + "-url",
            "/sim" + r"ple/?\b",
            "file" + ":///opt",
        ]
    )
)
MACHINE = re.compile(r"(?<![\w.])/(?:ro" + r"ot|wo" + r"rk|Us" + r"ers/\w+)/\w")


def files() -> list[Path]:
    """Every text file of the repository that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # an unpacked archive
        top = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in {"build", "dist"}]
        found = [path for entry in top for path in ([entry] if entry.is_file() else entry.rglob("*"))]
    return [path for path in found if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def offences(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def imported(path: Path) -> set[str]:
    """Top-level names that a module imports, through `lazy.load` too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            names |= {
                argument.value
                for argument in node.args
                if called == "load" and isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            }
    return {re.split(r"[.:]", name)[0] for name in names}


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=;!~]", line)[0].lower().replace("_", "-") for line in requirements}


def undeclared(paths: Iterator[Path], declared: set[str]) -> list[str]:
    known = packages_distributions()
    ours = {*PACKAGES, "tests", "bench", *sys.stdlib_module_names}
    found = []
    for path in paths:
        for name in sorted(imported(path) - ours):
            owners = {owner.lower().replace("_", "-") for owner in known.get(name, [])}
            owners |= {COMPANIONS[owner] for owner in owners if owner in COMPANIONS}
            if owners and not owners & declared:
                found.append(f"{path.relative_to(ROOT)} imports {name} of {', '.join(sorted(owners))}")
    return found


def test_no_package_index_is_named() -> None:
    assert offences(INDEX) == []


def test_no_path_of_a_machine_is_named() -> None:
    assert offences(MACHINE) == []


def test_locks_that_name_an_index_are_not_committed() -> None:
    names = {path.name for path in files()}
    assert not names & {"uv.lock", "pylock.toml", "poetry.lock", "Pipfile.lock"}


def test_the_lock_is_hashed_and_names_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    blocks = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) > 50
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_the_lock_has_everything_that_is_declared() -> None:
    locked = set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    declared = distributions(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert {name.replace(".", "-") for name in declared} <= {name.replace(".", "-") for name in locked}


def test_what_is_imported_is_declared() -> None:
    base = distributions(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    everything = base.union(*(distributions(lines) for lines in extras.values()))
    optional = base.union(*(distributions(lines) for name, lines in extras.items() if name != "dev"))
    assert undeclared(sources(*PACKAGES), optional) == []
    assert undeclared(sources("tests", "bench"), everything) == []


def test_imports_by_name_are_in_one_place() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        if re.search(r"\bimport_module\(|__import__\(", path.read_text(encoding="utf-8"))
    }
    assert found == IMPORTS_LATE


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_each_sdk_has_one_importer(sdk: str) -> None:
    found = {str(path.relative_to(ROOT)) for path in sources(*PACKAGES) if sdk in imported(path)}
    assert found == {f"gorgon_worker/providers/{sdk}.py"}


SEEDS = {
    "gorgon_common/utils.py": ("", "Inside the core imports go downwards"),
    "gorgon_common/costs/seed.py": ("from gorgon_common.engine import ports", "Inside the core imports go downwards"),
    "gorgon_common/engine/seed.py": ("import celery", "The core knows no broker, database, web or network library"),
    "gorgon_worker/seed.py": ("import gorgon_api.app", "The processes stand beside each other, above the core"),
    "gorgon_api/seed.py": ("import openai\nimport sqlalchemy", "Each SDK has one importer"),
    "gorgon_worker/providers/seed.py": ("import gorgon_common.persistence", "A provider knows neither Celery"),
    "gorgon_worker/providers/command.py": ("import gorgon_worker.providers.openai", "A provider knows no other"),
    "gorgon_api/sandbox/seed.py": ("import gorgon_common.errors", "The sandbox imports nothing of ours"),
    "dashboard/seed.py": ("import gorgon_common.persistence", "The dashboard sees only the client"),
}


def test_the_import_contracts_catch_seeded_violations(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, (line, _) in SEEDS.items():
        with (tmp_path / name).open("a", encoding="utf-8") as module:
            module.write(f"\n{line}\n")
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache", "--no-logo"], cwd=tmp_path, capture_output=True, text=True, env={"COLUMNS": "200"}
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken = {line for line in done.stdout.splitlines() if "BROKEN" in line}
    for name, (_, contract) in SEEDS.items():
        assert any(line.startswith(contract) for line in broken), f"{name} was not caught:\n{done.stdout}"
    assert "utils" in done.stdout
