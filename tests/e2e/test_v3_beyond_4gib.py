"""A WAL of more than 4 GiB: names with nine digits, joins and refusals there, in little memory and on little disk.

All but its end are the pages of one state of a real database again and again, so that it compresses 250 times. Its checksums are made here, by a
rule of their own: what a frame does to the running pair of sums is one matrix and one addition, the same each time it comes. SQLite itself is asked
about a shorter WAL of that making.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from replicator.cli import main
from replicator.format.v3 import FrameEncoder
from tests.v3data import GENERATION

PAGE = 65536
FRAME = PAGE + 24
FOUR_GIB = 1 << 32
SALTS = (0x5EED0001, 0x5EED0002)
MEMORY_MB, DISK_BYTES = 160, 32 << 20
RESTORE = """
import resource, sys
from replicator.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
code = main(["restore", "-integrity-check", "full", "-o", sys.argv[2], sys.argv[3]])
# Not ru_maxrss: that begins with what the parent had.
print("peak", int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) // 1024)
sys.exit(code)
"""

Pair = tuple[int, int]


def add(data: bytes, sums: Pair, byte_order: str = "<") -> Pair:
    s0, s1 = sums
    for x0, x1 in struct.iter_unpack(f"{byte_order}2I", data):
        s0 = s0 + x0 + s1 & 0xFFFFFFFF
        s1 = s1 + x1 + s0 & 0xFFFFFFFF
    return s0, s1


class Frame:
    """A page image in a WAL, and what it does to the sums: `sums -> linear * sums + own`."""

    linear: tuple[Pair, Pair] = (add(bytes(8 + PAGE), (1, 0)), add(bytes(8 + PAGE), (0, 1)))

    def __init__(self, pgno: int, image: bytes, commit: int) -> None:
        self.start, self.image = struct.pack(">2I", pgno, commit), image
        self.own = add(self.start + image, (0, 0))

    def after(self, sums: Pair) -> tuple[bytes, Pair]:
        """Return the frame's bytes, and the sums after it."""
        (a, c), (b, d) = self.linear
        s0, s1 = sums
        sums = (a * s0 + b * s1 + self.own[0] & 0xFFFFFFFF, c * s0 + d * s1 + self.own[1] & 0xFFFFFFFF)
        return self.start + struct.pack(">4I", *SALTS, *sums) + self.image, sums


def wal(old: bytes, new: bytes, *, copies: int) -> Iterator[bytes]:
    """Yield the header, then frames: transactions of all pages of `old`, as many as `copies`, and one transaction with those of `new`."""
    start = struct.pack(">6I", 0x377F0682, 3007000, PAGE, 0, *SALTS)
    sums = add(start, (0, 0), "<")
    yield start + struct.pack(">2I", *sums)
    for database, times in ((old, copies), (new, 1)):
        pages = len(database) // PAGE
        frames = [Frame(pgno, database[(pgno - 1) * PAGE : pgno * PAGE], pages if pgno == pages else 0) for pgno in range(1, pages + 1)]
        for _ in range(times):
            for frame in frames:
                data, sums = frame.after(sums)
                yield data


def states(folder: Path) -> tuple[bytes, bytes]:
    """Two states of a database in WAL mode."""
    path = folder / "made.db"
    found = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size={PAGE}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
        for number in range(2):
            connection.executemany("INSERT INTO t(v) VALUES(?)", [(bytes([65 + number]) * 40_000,)] * 3)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            found.append(path.read_bytes())
    return found[0], found[1]


def store(folder: Path, cuts: list[int], old: bytes, new: bytes, copies: int) -> list[Path]:
    """Store a snapshot of `old` and the WAL, cut at these numbers of frames; return the segments' paths."""
    root = folder / "generations" / GENERATION
    (root / "snapshots").mkdir(parents=True)
    (root / "wal").mkdir()
    encoder = FrameEncoder()
    (root / "snapshots/00000000.snapshot.lz4").write_bytes(encoder.feed(old) + encoder.close())
    paths: list[Path] = []
    encoder, offset = FrameEncoder(), 0
    for number, data in enumerate(wal(old, new, copies=copies)):
        if number - 1 in cuts or not paths:
            if paths:
                with paths[-1].open("ab") as file:
                    file.write(encoder.close())
                encoder = FrameEncoder()
            paths.append(root / f"wal/00000000_{offset:08x}.wal.lz4")
        if piece := encoder.feed(data):
            with paths[-1].open("ab") as file:
                file.write(piece)
        offset += len(data)
    with paths[-1].open("ab") as file:
        file.write(encoder.close())
    return paths


def test_sqlite_itself_accepts_such_a_wal(tmp_path: Path) -> None:
    old, new = states(tmp_path)
    database = tmp_path / "asked.db"
    database.write_bytes(old)
    (tmp_path / "asked.db-wal").write_bytes(b"".join(wal(old, new, copies=3)))
    with closing(sqlite3.connect(database)) as connection:
        frames = 3 * (len(old) // PAGE) + len(new) // PAGE
        assert connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone() == (0, frames, frames)
    assert database.read_bytes() == new != old


@pytest.mark.slow
def test_segments_beyond_four_gib_are_restored_and_missed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = states(tmp_path)
    pages = len(old) // PAGE
    copies = FOUR_GIB // FRAME // pages + 4
    last = copies * pages  # frames before the last transaction
    whole = tmp_path / "whole"
    # Inside transactions: across 4 GiB, right behind it, and in the last one.
    *_, before, far, farther, end = store(whole, [last // 3 + 1, last - 2 * pages + 1, last - 1, last + 2], old, new, copies)
    offsets = [int(path.name[9:].partition(".")[0], 16) for path in (before, far, farther, end)]
    assert offsets[0] < FOUR_GIB < offsets[1] < offsets[2] < offsets[3] == 32 + (last + 2) * FRAME
    assert main(["wal", str(whole)]) == 0
    assert [int(line.split()[3]) for line in capsys.readouterr().out.splitlines()[-3:]] == offsets[1:]

    hole, torn = tmp_path / "hole", tmp_path / "torn"
    for copy in (hole, torn):
        shutil.copytree(whole, copy)
    (hole / farther.relative_to(whole)).unlink()
    os.truncate(torn / end.relative_to(whole), end.stat().st_size - 40)
    running = {
        folder: subprocess.Popen(
            [sys.executable, "-c", RESTORE, str(DISK_BYTES), str(tmp_path / f"{folder.name}.db"), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in (whole, hole, torn)
    }
    texts = {folder: "".join(process.communicate(timeout=280)) for folder, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 1, 1], texts
    assert (tmp_path / "whole.db").read_bytes() == new
    assert f"missing wal segment file://{hole} generations/{GENERATION}/wal/{farther.name}" in texts[hole]
    assert f"generations/{GENERATION}/wal/{end.name}: the LZ4 frame ends too early" in texts[torn]
    assert sorted(path.name for path in tmp_path.glob("*.db*")) == ["made.db", "whole.db"]
    for text in texts.values():
        assert int(text.rpartition("peak ")[2].split()[0]) < MEMORY_MB, text
