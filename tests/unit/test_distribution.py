"""The wheel and the sdist: built, looked into, and used from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {"gorgon", "gorgon_common", "gorgon_worker", "gorgon_api"}
BUNDLED = "gorgon_common/_bundled"
NOT_INSTALLED = {"gorgon_common/persistence/migrations/script.py.mako"}
SUBCLASSED = {"celery", "kombu", "typer", "httpx2", "httpcore2", "sqlalchemy"}
"""Distributions whose internals are used: their next minor version may break us."""


def build(source: Path, kind: str, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel is unpacked, as an installer would."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, "sdist", folder / "built")) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.name != "built")
    return unpacked


def sources(folder: str) -> set[str]:
    """Files of a folder of the repository, as paths from the root."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_claims_no_common_top_level_name(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert names == {*PACKAGES, f"gorgon-{version('gorgon')}.dist-info"}


def test_the_wheel_has_what_it_needs_and_nothing_else(installed: Path) -> None:
    expected = set().union(*(sources(package) for package in PACKAGES)) - NOT_INSTALLED
    expected |= {f"{BUNDLED}/{path}" for folder in ("workflows", "dashboard") for path in sources(folder)}
    found = {path for path in contents(installed) if ".dist-info/" not in path}
    assert found == expected


def test_every_package_says_that_it_is_typed(installed: Path) -> None:
    assert {package for package in PACKAGES if (installed / package / "py.typed").is_file()} == PACKAGES


def test_the_sdist_builds_the_same_wheel(sdist: Path, installed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(sdist, "wheel", tmp_path / "built")) as archive:
        assert set(archive.namelist()) == contents(installed)
        for name in archive.namelist():
            if not name.endswith("/RECORD"):
                assert archive.read(name) == (installed / name).read_bytes(), name


def test_the_sdist_has_what_a_packager_needs_and_nothing_else(sdist: Path) -> None:
    folders = {*PACKAGES, "dashboard", "workflows", "tests", "bench", "docs"}
    files = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "requirements.lock"}
    always = {"pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {path.name for path in sdist.iterdir()} == folders | files | always
    assert [path for path in contents(sdist) if "__pycache__" in path or "/results/" in path] == []


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the unpacked wheel before everything else on its path, from an empty folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "GORGON_SANDBOX_LATENCY": "1ms"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)  # every module is compiled first
def test_the_wheel_finds_its_workflows_and_runs_one(installed: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    program = "from gorgon_common import bundled; print(bundled.folder('workflows'), bundled.folder('dashboard'))"
    where = run(installed, empty, "-c", program)
    assert where.stdout.split() == [str(installed / BUNDLED / name) for name in ("workflows", "dashboard")], (
        where.stderr
    )
    ran = run(installed, empty, "-m", "gorgon_common.cli", "run", "parallel-analysis", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads(ran.stdout)["status"] == "succeeded"


@pytest.mark.parametrize("where", ["repository", "wheel"])
def test_workflows_of_another_distribution_is_theirs(where: str, installed: Path, tmp_path: Path) -> None:
    """llama-index-workflows is imported as `workflows`; Gorgon may come before it on the path."""
    theirs = tmp_path / "theirs"
    (theirs / "workflows").mkdir(parents=True)
    (theirs / "workflows" / "__init__.py").write_text("OWNER = 'llama-index'\n", encoding="utf-8")
    ours = ROOT if where == "repository" else installed
    program = (
        "import gorgon, workflows; from gorgon_common.workflow import catalogue; "
        "print(workflows.OWNER, catalogue.source('bug-fix')[:1])"
    )
    done = run(Path(f"{ours}{os.pathsep}{theirs}"), tmp_path, "-c", program)
    assert done.stdout == "llama-index #\n", done.stderr


def required(names: list[str]) -> set[str]:
    """The distributions that an installer brings for these requirements, by normalised name."""
    found: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(name) for name in names]
    while queue:
        entry = queue.pop()
        key = canonicalize_name(entry.name), frozenset(entry.extras)
        if key in found:
            continue
        found.add(key)
        for line in requires(entry.name) or []:
            further = Requirement(line)
            extras = ["", *entry.extras]
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(further)
    return {name for name, _ in found}


IMPORT_ALL = """
import importlib, json, pkgutil, sys

missing = set(json.loads(sys.argv[1]))

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
for package in ("gorgon", "gorgon_common", "gorgon_worker", "gorgon_api"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith((".__main__", "gorgon_worker.app")) and ".migrations" not in module.name:
            importlib.import_module(module.name)
for name in ("celery.concurrency.thread", "celery.worker", "sqlalchemy.dialects.postgresql.psycopg", "uvicorn.config"):
    importlib.import_module(name)
print(len(sys.modules))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_can_be_imported_without_the_development_extra() -> None:
    """What a dependency of ours imports without requiring it has to be required by us (kombu's Redis transport)."""
    runtime = required(PROJECT["dependencies"])
    missing = [
        name
        for name, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & {*runtime, "gorgon"}
    ]
    assert {"pytest", "psutil", "hatchling"} <= set(missing)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(missing)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500


def test_what_is_needed_has_an_upper_bound() -> None:
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["flower"]
    unbounded = [line for line in lines if not any(part.operator == "<" for part in Requirement(line).specifier)]
    assert unbounded == []


@pytest.mark.parametrize("line", PROJECT["dependencies"], ids=lambda line: Requirement(line).name)
def test_the_bounds_admit_what_is_tested_and_no_later_internals(line: str) -> None:
    needed = Requirement(line)
    tested = version(needed.name)
    assert needed.specifier.contains(tested)
    major, minor = (int(part) for part in tested.split(".")[:2])
    assert not needed.specifier.contains(f"{major + 2}.0")
    if needed.name in SUBCLASSED:
        assert needed.specifier.contains(f"{major}.{minor}.99")
        assert not needed.specifier.contains(f"{major}.{minor + 1}.0")
