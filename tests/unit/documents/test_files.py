"""The bytes of the files that people name."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

import pytest

from gorgon_common.documents import is_stream, read_text
from gorgon_common.errors import InputInvalid, NotFound


def test_a_pipe_is_a_file(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(b"name: a\n"))
    writer.start()
    assert is_stream(str(fifo))
    assert read_text(str(fifo), limit=100) == "name: a\n"
    writer.join()
    assert not is_stream(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfname", "name"),
        ("name ü".encode("utf-16"), "name ü"),
        (b"a\r\nb", "a\r\nb"),
    ],
)
def test_byte_order_marks_are_not_text(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "f").write_bytes(data)
    assert read_text(str(tmp_path / "f"), limit=100) == text


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfabc")))
    assert read_text("-", limit=3 + 3) == "abc"
    with pytest.raises(InputInvalid, match="The standard input is empty"):
        read_text("-", limit=3)


def test_too_much_is_refused_and_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x" * 1_000_001)
    with pytest.raises(InputInvalid, match="is larger than 1 MB"):
        read_text(str(tmp_path / "f"), limit=1_000_000)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 1_000_001)))
    with pytest.raises(InputInvalid, match="<stdin> is larger than 1 MB"):
        read_text("-", limit=1_000_000)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="There is no file nowhere"):
        read_text("nowhere", limit=1)
    with pytest.raises(InputInvalid, match="is a directory"):
        read_text(str(tmp_path), limit=1)
    (tmp_path / "f").write_bytes(b"ab\xff")
    with pytest.raises(InputInvalid, match=r"is not UTF-8 text \(byte 2\)"):
        read_text(str(tmp_path / "f"), limit=10)
