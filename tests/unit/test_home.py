"""Gorgon's folder is its owner's alone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from gorgon_common.errors import ConfigurationError
from gorgon_common.home import make_folder, protect


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_one_is_private(tmp_path: Path) -> None:
    protect(tmp_path / "a" / ".gorgon", make=True)
    assert mode(tmp_path / "a" / ".gorgon") == 0o700


def test_an_existing_one_is_corrected(tmp_path: Path) -> None:
    home = tmp_path / ".gorgon"
    home.mkdir(mode=0o755)
    for name in ("gorgon.db", "prices.yaml"):
        (home / name).write_text("x")
        (home / name).chmod(0o644)
    protect(home, make=False)
    assert (mode(home), mode(home / "gorgon.db"), mode(home / "prices.yaml")) == (0o700, 0o600, 0o600)


def test_a_folder_of_others_keeps_its_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for name in ("gorgon.db", "script.sh"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0o755)
    protect(tmp_path, make=True)
    assert (mode(tmp_path), mode(tmp_path / "script.sh"), mode(tmp_path / "gorgon.db")) == (0o777, 0o755, 0o600)


def test_what_is_missing_and_not_wanted_is_not_made(tmp_path: Path) -> None:
    protect(tmp_path / "no", make=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["file", "file/below", "a\0b"])
def test_what_cannot_be_made_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError) as failure:
        make_folder(tmp_path / name, "Gorgon's files")
    assert "cannot be made" in failure.value.message
    assert "GORGON_HOME" in failure.value.hint
