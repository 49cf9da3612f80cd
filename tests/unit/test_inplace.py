"""Changes in place: whole after a death at each system call and after a power cut, with SQLite itself as the judge."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from replicator import atomic, inplace
from replicator.errors import CopyChanged, CopyInUse
from replicator.format.sqlite import lock_pgno
from replicator.inplace import InPlace, recover
from tests.disk import Death, Dying, after_power_cut

NEVER = threading.Event()


@dataclass(frozen=True)
class State:
    """One state of a database: its bytes, and the rows that SQLite finds in it."""

    data: bytes
    page_size: int
    rows: list[tuple[int, bytes]]

    def page(self, pgno: int) -> bytes:
        return self.data[(pgno - 1) * self.page_size : pgno * self.page_size]

    @property
    def commit(self) -> int:
        return len(self.data) // self.page_size


@dataclass(frozen=True)
class To:
    """The change from one state to another: the pages that differ, without page 1 if told so."""

    old: State
    new: State
    with_first: bool = True

    @property
    def page_size(self) -> int:
        return self.new.page_size

    @property
    def commit(self) -> int:
        return self.new.commit

    def pages(self) -> Iterator[tuple[int, bytes]]:
        same_size = self.old.page_size == self.new.page_size
        for pgno in range(1, self.commit + 1):
            differs = not same_size or self.old.page(pgno) != self.new.page(pgno)
            if differs and (pgno > 1 or self.with_first):
                yield pgno, self.new.page(pgno)


def states(folder: Path) -> list[State]:
    """Rows change, the database grows, shrinks, and gets another page size."""
    path = folder / "source.db"
    connection = sqlite3.connect(path, isolation_level=None)
    found = []
    for statements in (
        ["PRAGMA page_size=512", "CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)", *["INSERT INTO t(v) VALUES(randomblob(300))"] * 20],
        ["UPDATE t SET v = randomblob(300) WHERE id % 3 = 0"],
        ["INSERT INTO t(v) SELECT randomblob(300) FROM t"],
        ["DELETE FROM t WHERE id > 9", "VACUUM"],
        ["PRAGMA page_size=1024", "VACUUM"],
        ["INSERT INTO t(v) SELECT randomblob(300) FROM t"],
        ["PRAGMA page_size=512", "VACUUM"],
    ):
        for statement in statements:
            connection.execute(statement)
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        rows = connection.execute("SELECT id, v FROM t ORDER BY id").fetchall()
        found.append(State(path.read_bytes(), size, rows))
    connection.close()
    return found


def plain(data: bytes) -> bytes:
    """Without what a copy may have of its own: journal mode and change counter."""
    return data[:18] + data[20:24] + data[28:]


def seen_by_sqlite(path: Path) -> list[tuple[int, bytes]]:
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return connection.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    finally:
        connection.close()


def copied(folder: Path, target: Path) -> Path:
    """A copy of the database with its journal, for SQLite to open."""
    for suffix in ("", "-journal"):
        target.with_name(target.name + suffix).unlink(missing_ok=True)
        source = folder / f"copy.db{suffix}"
        if source.exists():
            target.with_name(target.name + suffix).write_bytes(source.read_bytes())
    return target


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch):
    def install(death: int | None) -> Dying:
        fake = Dying(death)
        monkeypatch.setattr(inplace, "os", fake)
        monkeypatch.setattr(atomic, "os", fake)
        return fake

    yield install
    monkeypatch.undo()


def test_each_change_leads_to_the_source_and_leaves_no_file(tmp_path: Path) -> None:
    chain = states(tmp_path)
    path = tmp_path / "copy.db"
    path.write_bytes(chain[0].data)
    for old, new in pairwise(chain):
        with InPlace(path) as copy:
            assert copy.apply(To(old, new), NEVER)
        assert plain(path.read_bytes()) == plain(new.data)
        assert seen_by_sqlite(path) == new.rows
        assert not path.with_name("copy.db-journal").exists()


@pytest.mark.fault("F1")
@pytest.mark.parametrize("step", range(6))
def test_a_death_at_any_call_leaves_the_old_state_or_the_new_one(tmp_path: Path, dying, step: int) -> None:
    old, new = states(tmp_path)[step : step + 2]
    path, judged = tmp_path / "copy.db", tmp_path / "judged.db"
    outcomes = set()
    for death in range(1000):
        path.with_name("copy.db-journal").unlink(missing_ok=True)
        path.write_bytes(old.data)
        copy = InPlace(path)
        fake = dying(death)
        try:
            copy.apply(To(old, new), NEVER)
        except Death:
            pass
        finally:
            copy.close()
        dying(None)
        rows = seen_by_sqlite(copied(tmp_path, judged))
        assert rows in (old.rows, new.rows)
        outcomes.add(rows == new.rows)
        recover(path)
        assert plain(path.read_bytes()) == plain(judged.read_bytes())
        with InPlace(path) as copy:
            assert copy.apply(To(old, new), NEVER)
        assert plain(path.read_bytes()) == plain(new.data)
        if not fake.dead:
            break
    assert death > 10
    assert True in outcomes
    assert False in outcomes or old.rows == new.rows


@pytest.mark.fault("F2")
def test_a_power_cut_at_any_call_leaves_the_old_state_or_the_new_one(tmp_path: Path, dying) -> None:
    chain = states(tmp_path)
    source = random.Random(11)
    path, judged = tmp_path / "copy.db", tmp_path / "judged.db"
    rolled_back = 0
    for number, (old, new) in enumerate(pairwise(chain)):
        path.write_bytes(old.data)
        before = {"copy.db": (path.stat().st_ino, old.data)}
        copy = InPlace(path)
        fake = dying(None)
        copy.apply(To(old, new), NEVER)
        dying(None)
        copy.close()
        log = fake.log
        for cut in range(len(log) + 1):
            for _ in range(8):
                disk = after_power_cut(log[:cut], before, tmp_path.stat().st_ino, source)
                assert set(disk) <= {"copy.db", "copy.db-journal"}
                judged.with_name("judged.db-journal").unlink(missing_ok=True)
                judged.write_bytes(disk["copy.db"])
                if "copy.db-journal" in disk:
                    judged.with_name("judged.db-journal").write_bytes(disk["copy.db-journal"])
                    rolled_back += disk["copy.db-journal"][:1] == b"\xd9"
                rows = seen_by_sqlite(judged)
                assert rows in (old.rows, new.rows), (number, cut)
                if cut == len(log):
                    assert rows == new.rows
    assert rolled_back > 50


def test_a_reader_with_a_cache_sees_a_change_without_page_1(tmp_path: Path) -> None:
    old, new = states(tmp_path)[:2]
    path = tmp_path / "copy.db"
    path.write_bytes(old.data)
    # In another process: a sqlite3 connection in this one would drop the locks.
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1])\n"
        "for _ in sys.stdin: print(c.execute('SELECT hex(group_concat(hex(v))) FROM t').fetchone()[0], flush=True)"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin is not None
    assert reader.stdout is not None

    def ask() -> str:
        reader.stdin.write("\n")
        reader.stdin.flush()
        return reader.stdout.readline()

    before = ask()
    change = To(old, new, with_first=False)
    with InPlace(path) as copy:
        copy.apply(change, NEVER)
        after = ask()
    reader.stdin.close()
    fresh = subprocess.run([sys.executable, "-c", code, str(path)], input="\n", capture_output=True, text=True).stdout
    reader.stdout.close()
    assert reader.wait(30) == 0
    assert after == fresh != before


def test_a_change_that_is_there_already_writes_nothing(tmp_path: Path, dying) -> None:
    old, new = states(tmp_path)[:2]
    path = tmp_path / "copy.db"
    path.write_bytes(old.data)
    with InPlace(path) as copy:
        copy.apply(To(old, new), NEVER)
    before = path.read_bytes()
    with InPlace(path) as copy:
        fake = dying(None)
        assert copy.apply(To(old, new), NEVER)
    assert [call.kind for call in fake.log if call.kind in ("write", "truncate")] == []
    assert path.read_bytes() == before


def test_an_error_in_the_middle_puts_the_old_state_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = states(tmp_path)[:2]
    path = tmp_path / "copy.db"
    path.write_bytes(old.data)

    def full(file: int) -> None:
        if os.fstat(file).st_ino == path.stat().st_ino:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(inplace, "sync_file", full)
    with pytest.raises(OSError, match="No space"), InPlace(path) as copy:
        copy.apply(To(old, new), NEVER)
    assert path.read_bytes() == old.data
    assert not path.with_name("copy.db-journal").exists()


@pytest.mark.parametrize("how", ["written", "replaced", "deleted", "hot journal"])
def test_a_copy_that_somebody_changed_is_refused(tmp_path: Path, how: str) -> None:
    old, new = states(tmp_path)[:2]
    path = tmp_path / "copy.db"
    path.write_bytes(old.data)
    with InPlace(path) as copy:
        if how == "written":
            code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('DELETE FROM t WHERE id = 1'); c.commit()"
            subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        elif how == "replaced":
            other = tmp_path / "other"
            other.write_bytes(old.data)
            other.rename(path)
        elif how == "deleted":
            path.unlink()
        else:
            path.with_name("copy.db-journal").write_bytes(b"\xd9" * 100)
        with pytest.raises(CopyChanged, match=how if how != "written" else "another process wrote"):
            copy.apply(To(old, new), NEVER)


def test_one_file_has_one_writer_in_this_process_and_in_all(tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    path.write_bytes(states(tmp_path)[0].data)
    code = "import sys; from pathlib import Path; from replicator.inplace import InPlace; InPlace(Path(sys.argv[1]))"
    with InPlace(path):
        with pytest.raises(CopyInUse):
            InPlace(path)
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert "CopyInUse" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


def test_waiting_for_a_reader_ends_when_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = states(tmp_path)[:2]
    path = tmp_path / "copy.db"
    path.write_bytes(old.data)
    monkeypatch.setattr(inplace, "PATIENCE_S", 0.02)
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN'); "
        "c.execute('SELECT count(*) FROM t').fetchone(); print(flush=True); sys.stdin.read(); c.execute('COMMIT')"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.readline()
    stop = threading.Event()
    with InPlace(path) as copy:
        threading.Timer(0.1, stop.set).start()
        assert not copy.apply(To(old, new), stop)
        assert path.read_bytes() == old.data
        reader.communicate()
        assert copy.apply(To(old, new), NEVER)
    assert seen_by_sqlite(path) == new.rows


def test_a_copy_that_somebody_writes_to_in_wal_mode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    path.write_bytes(states(tmp_path)[0].data)
    path.with_name("copy.db-wal").write_bytes(b"frames")
    with pytest.raises(CopyChanged, match="-wal"):
        InPlace(path)


@pytest.mark.parametrize(("old_size", "new_size"), [(65536, 65536), (4096, 65536), (65536, 4096)])
def test_a_change_and_its_journal_leave_out_the_lock_page(tmp_path: Path, old_size: int, new_size: int) -> None:
    """Sparse databases of one gibibyte and a little; a record of the lock page would end a rollback early."""
    path = tmp_path / "copy.db"
    first = states(tmp_path)[0].data[:100]
    commit = lock_pgno(old_size) + 2
    with path.open("wb") as file:
        file.write(first[:16] + (old_size % 65535).to_bytes(2, "big") + first[18:])
        file.seek(lock_pgno(old_size) * old_size)
        file.write(b"behind the lock page")
        file.truncate(commit * old_size)
    with InPlace(path) as copy:
        numbers: list[int] = []

        class Journal(inplace._Journal):
            def add(self, pgno: int) -> None:
                numbers.append(pgno)
                self.records += 1

        class Change:
            page_size, commit = new_size, 3

            def pages(self) -> Iterator[tuple[int, bytes]]:
                return ((pgno, first.ljust(new_size, b"\0") if pgno == 1 else b"x" * new_size) for pgno in (1, 2, 3))

        real, inplace._Journal = inplace._Journal, Journal  # type: ignore[misc]
        try:
            assert copy.apply(Change(), NEVER)
        finally:
            inplace._Journal = real  # type: ignore[misc]
    assert lock_pgno(old_size) not in numbers
    assert sorted(numbers) == [pgno for pgno in range(1, commit + 1) if pgno != lock_pgno(old_size)]
