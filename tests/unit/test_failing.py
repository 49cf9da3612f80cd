"""`FailNth` makes exactly the step fail that it was asked for, and leaves everything as it was."""

from __future__ import annotations

import builtins
import contextlib
import io
import mmap
import os
import socket
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest

from replicator import atomic
from replicator.db import Database
from replicator.testing import FailNth, How, Kind, each_failure


def write(folder: Path) -> None:
    atomic.write_file(folder / "file", b"new" * 1000)


def test_each_step_fails_once_and_then_none(tmp_path: Path) -> None:
    seen: list[str] = []
    for failure in each_failure():
        (tmp_path / "file").write_bytes(b"old")
        error = None
        with failure:
            try:
                write(tmp_path)
            except OSError as found:
                error = found
        seen += failure.failed
        assert len(failure.failed) <= 1
        assert (tmp_path / "file").read_bytes() in (b"old", b"new" * 1000)
        assert (
            error is None
            or (tmp_path / "file").read_bytes() == b"old"
            or failure.failed[0].startswith(("posix.fsync", "os.fsync", "os.close"))
        )
        assert failure.leaks() == []
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new" * 1000
    names = [what.partition(" ")[0] for what in seen]
    assert names == ["os.open", "os.open", "fcntl.flock", "os.fstat", "os.write", "os.fsync", "os.rename", "os.fsync", "os.close"]
    some = []
    for failure in each_failure(every=4):
        with failure, contextlib.suppress(OSError):
            write(tmp_path)
        some += failure.failed
    assert [what.partition(" ")[0] for what in some] == names[::4]


def test_a_writer_that_forgets_to_clean_up_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_unlink_missing_ok", lambda name, directory: None)
    left = []
    for failure in each_failure():
        with failure, contextlib.suppress(OSError):
            write(tmp_path)
        left += [path for path in tmp_path.iterdir() if path.name != "file"]
    assert left


def test_an_open_file_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.AtomicFile, "_close", lambda self: None)
    with FailNth(10**6) as failure:
        write(tmp_path)
    assert failure.leaks() == [str(tmp_path), str(tmp_path / "file")]
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}") in failure.leaks():
                os.close(number)


def test_for_good(tmp_path: Path) -> None:
    with FailNth(4, ever=True) as failure, pytest.raises(OSError, match="Input/output"):
        write(tmp_path)
    assert [what.partition(" ")[0] for what in failure.failed] == ["os.write", "os.unlink", "os.close"]


@pytest.mark.parametrize(("how", "size"), [(How.REFUSED, 0), (How.UNKNOWN, 1500), (How.SHORT, 1500)])
def test_how_a_write_fails(tmp_path: Path, how: How, size: int) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with FailNth(0, how=how), contextlib.suppress(OSError):
        atomic.os.write(file, bytes(3000))  # not a step: it is the test that calls
        assert os.fstat(file).st_size == 3000
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        atomic.write_all(file, bytes(3000))
    assert os.fstat(file).st_size == (3000 if how is How.SHORT else size)
    os.close(file)


def test_a_connection_that_is_older_than_the_failure_fails_too(tmp_path: Path) -> None:
    connect, seen = sqlite3.connect, []
    connect(tmp_path / "a.db").close()
    for failure in each_failure(kinds={Kind.SQLITE}):
        database = Database(tmp_path / "a.db")
        database.open()
        database.frames_in_index()  # opens the connection
        with failure, contextlib.suppress(sqlite3.OperationalError):
            database.frames_in_index()
        seen += failure.failed
        database.close()
    assert seen == ["execute PRAGMA wal_checkpoint(PASSIVE)"]
    assert sqlite3.connect is connect


def test_only_the_packages_under_test_count(tmp_path: Path) -> None:
    with FailNth(0) as failure:
        (tmp_path / "other").write_bytes(b"x")
        with sqlite3.connect(tmp_path / "a.db") as connection:
            connection.execute("CREATE TABLE t(v)")
        connection.close()
    assert (failure.steps, failure.failed) == (0, [])


def test_everything_is_as_before(tmp_path: Path) -> None:
    places = (os, builtins, io, mmap, socket.socket, socket, threading.Thread, subprocess.Popen, sqlite3, time)
    before = [dict(vars(place)) for place in places]
    with FailNth(0, kinds=set(Kind)), pytest.raises(RuntimeError), FailNth(0):
        pass
    assert [dict(vars(place)) for place in places] == before


def test_a_failure_that_is_not_entered_and_work_without_end_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="entered"):
        for _ in each_failure():
            pass
    rounds = each_failure(limit=3)
    for _ in range(3):
        with next(rounds), contextlib.suppress(OSError):
            write(tmp_path)
    with pytest.raises(RuntimeError, match="no end after 3"):
        next(rounds)
