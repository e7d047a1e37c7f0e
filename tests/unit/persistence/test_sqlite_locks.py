"""Several databases of one process on the same SQLite file, beside other processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sqlalchemy import text

from gorgon_common.persistence.database import Database

OTHER = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); print(*c.execute(sys.argv[2]).fetchall()); c.close()"


def elsewhere(file: Path, statement: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", OTHER, str(file), statement], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_second_database_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    first = Database(f"sqlite:///{file}")
    with first.write() as connection:
        connection.execute(text("CREATE TABLE notes (note text)"))
    second = Database(f"sqlite:///{file}")
    assert elsewhere(file, "SELECT count(*) FROM notes") == "(0,)"
    assert Path(f"{file}-wal").exists(), "the log is in use: a process that leaves must not delete it"
    with first.write() as connection:
        connection.execute(text("INSERT INTO notes VALUES ('kept')"))
    assert elsewhere(file, "SELECT note FROM notes") == "('kept',)"
    first.close()
    second.close()
