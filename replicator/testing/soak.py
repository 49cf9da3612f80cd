"""A soak: python -m replicator.testing.soak --minutes 30 --seed 1

Each cycle, chosen by the seed:

1. A process writes to a database and replicates it to a directory, with checkpoints, compaction and full images; it says what was acknowledged. It is killed.
2. While nobody runs, others use the database: they write, checkpoint, vacuum; or local state is damaged, or deleted.
3. The replica is restored: `integrity_check`, every row is what was written, nothing acknowledged is missing.
4. In a copy of the replica one file gets a flipped bit or loses its end. A restore must refuse it, or yield the same bytes.
5. A process replicates what is there and ends in order. The restored bytes must be those that SQLite makes of database and WAL.

It ends with figures, or at the first thing that does not hold: then the folder stays for whoever looks into it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from replicator.api import Replicator
from replicator.errors import ReplicatorError
from replicator.levels import History
from replicator.recover import restore

__all__ = ["Figures", "SoakFailure", "main", "soak"]

WRITE_S = 1.5
"""So long the writing process lives, at most."""
START_S = 60.0
MAX_LEFT = 10
HISTORY = History(
    level_intervals_s=(0.5, 2.0), l0_retention_s=1.0, l0_retention_check_interval_s=0.5, snapshot_interval_s=3.0, snapshot_retention_s=6.0
)


class SoakFailure(AssertionError):
    """Something does not hold."""


@dataclass
class Figures:
    """What a soak did."""

    seed: int
    cycles: int = 0
    seconds: float = 0.0
    acknowledged: int = 0
    rows: int = 0
    restores: int = 0
    restore_max_s: float = 0.0
    bytes_compared: int = 0
    happened: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        happened = " ".join(f"{name.replace(' ', '_')}={count}" for name, count in sorted(self.happened.items()))
        return (
            f"seed={self.seed} cycles={self.cycles} seconds={self.seconds:.0f} acknowledged={self.acknowledged} rows={self.rows} restores={self.restores} "
            f"restore_max_s={self.restore_max_s:.2f} bytes_compared={self.bytes_compared} {happened}"
        )


def soak(seconds: float, seed: int, folder: Path) -> Figures:
    """Run cycles for so many seconds, one at least.

    Raises:
        SoakFailure: the first thing that does not hold.
    """
    figures, source, began = Figures(seed), random.Random(seed), time.monotonic()
    run = _Soak(folder, source, figures)
    while not figures.cycles or time.monotonic() - began < seconds:
        run.cycle()
        figures.cycles += 1
        figures.seconds = time.monotonic() - began
    return figures


class _Soak:
    def __init__(self, folder: Path, source: random.Random, figures: Figures) -> None:
        self._folder, self._random, self._figures = folder, source, figures
        self._database, self._replica = folder / "source.db", folder / "replica"
        with contextlib.closing(_connect(self._database)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, size INT, v BLOB)")

    def cycle(self) -> None:
        acknowledged = self._write_and_kill()
        self._meddle()
        self._check_restored(acknowledged)
        self._check_damage()
        self._finish()

    def _write_and_kill(self) -> int:
        command = [
            sys.executable,
            "-m",
            "replicator.testing.soak",
            "--child",
            str(self._database),
            "--seed",
            str(self._random.randrange(1 << 30)),
        ]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        try:
            first = child.stdout.readline()
            if not first:
                raise SoakFailure(f"the writing process ended by itself, exit code {child.wait()}")
            time.sleep(self._random.random() * WRITE_S)
        finally:
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read()
            child.wait()
            child.stdout.close()
        told = [int(line) for line in (first + rest).split("\n")[:-1]]
        self._figures.happened["kills"] += 1
        self._figures.acknowledged += len(told)
        return max(told, default=0)

    def _meddle(self) -> None:
        what = self._random.choice(["nothing", "writes", "checkpoint", "vacuum", "damaged state", "deleted state"])
        self._figures.happened[what] += 1
        meta = self._database.with_name(f".{self._database.name}-litestream")
        match what:
            case "damaged state":
                files = sorted(path for path in meta.rglob("pages") if path.is_file() and path.stat().st_size)
                for path in files:
                    _flip(path, self._random)
            case "deleted state":
                shutil.rmtree(meta, ignore_errors=True)
            case "nothing":
                pass
            case _:
                with contextlib.closing(_connect(self._database)) as connection:
                    if what == "writes":
                        for _ in range(self._random.randrange(1, 200)):
                            _insert(connection, self._random)
                    elif what == "vacuum":
                        connection.execute("DELETE FROM t WHERE id % 7 = 0 AND id < (SELECT max(id) FROM t)")
                        connection.execute("VACUUM")
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _check_restored(self, acknowledged: int) -> None:
        copy = self._restore(self._replica)
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            newest = 0
            for number, size, value in connection.execute("SELECT id, size, v FROM t ORDER BY id"):
                if value != _value(number, size):
                    raise SoakFailure(f"row {number} of the restored database is not what was written")
                newest = number
        if newest < acknowledged:
            raise SoakFailure(f"row {acknowledged} was acknowledged, and the restored database ends at {newest}")
        self._figures.rows = newest

    def _check_damage(self) -> None:
        good = self._restore(self._replica).read_bytes()
        damaged = self._folder / "damaged"
        shutil.copytree(self._replica, damaged)
        try:
            path = self._random.choice(sorted(damaged.rglob("*.ltx")))
            if self._random.random() < 0.5:
                _flip(path, self._random)
            else:
                os.truncate(path, self._random.randrange(path.stat().st_size))
            try:
                found = self._restore(damaged).read_bytes()
            except ReplicatorError as error:
                if path.name not in str(error):
                    raise SoakFailure(f"damage to {path.name} was refused without its name: {error}") from error
                self._figures.happened["damage refused"] += 1
            else:
                if found != good:
                    raise SoakFailure(f"damage to {path.name} was restored")
                self._figures.happened["damage without effect"] += 1
        finally:
            shutil.rmtree(damaged)

    def _finish(self) -> None:
        command = [sys.executable, "-m", "replicator.testing.soak", "--child", str(self._database), "--once"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S * 2, check=False)
        if done.returncode:
            raise SoakFailure(f"replication does not begin again: {done.stderr[-2000:]}")
        expected = self._folder / "expected.db"
        for suffix in ("", "-wal"):
            side = self._database.with_name(self._database.name + suffix)
            expected.with_name(expected.name + suffix).unlink(missing_ok=True)
            if side.exists():
                shutil.copy(side, expected.with_name(expected.name + suffix))
        with contextlib.closing(sqlite3.connect(expected)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        want, got = expected.read_bytes(), self._restore(self._replica).read_bytes()
        if want != got:
            raise SoakFailure("the restored bytes are not those of the source")
        self._figures.bytes_compared += len(want)
        # A folder is swept by the next process that writes into it, so that a few may be there; they must not pile up.
        left = [str(path.relative_to(self._folder)) for path in self._folder.rglob("*.tmp")]
        if len(left) > MAX_LEFT:
            raise SoakFailure(f"temporary files stay: {left}")

    def _restore(self, replica: Path) -> Path:
        copy, began = self._folder / "restored.db", time.monotonic()
        copy.unlink(missing_ok=True)
        restore(f"file://{replica}", copy, integrity_check="full")
        self._figures.restores += 1
        self._figures.restore_max_s = max(self._figures.restore_max_s, time.monotonic() - began)
        return copy


def _write(database: Path, seed: int) -> None:
    """Body of the process that is killed: commit, and print each row that is acknowledged."""
    source = random.Random(seed)
    with _replicator(database) as replicator, contextlib.closing(_connect(database)) as connection:
        while True:
            for _ in range(source.randrange(1, 8)):
                number = _insert(connection, source)
            if source.random() < 0.1:
                connection.execute("DELETE FROM t WHERE id = ?", (source.randrange(1, number + 1),))
            replicator.wait(timeout_s=START_S)
            print(number, flush=True)


def _replicator(database: Path) -> Replicator:
    return Replicator(database, f"file://{database.with_name('replica')}", sync_interval_s=0.01, min_checkpoint_pages=20, history=HISTORY)


def _insert(connection: sqlite3.Connection, source: random.Random) -> int:
    size = source.choice([0, 10, 300, 5000])
    connection.execute("BEGIN IMMEDIATE")
    number = int(connection.execute("SELECT coalesce(max(id), 0) + 1 FROM t").fetchone()[0])
    connection.execute("INSERT INTO t VALUES(?, ?, ?)", (number, size, _value(number, size)))
    connection.execute("COMMIT")
    return number


def _value(number: int, size: int) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(size)


def _flip(path: Path, source: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.write_bytes(data)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    connection.execute("PRAGMA journal_mode=WAL")
    return connection


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m replicator.testing.soak", description="write, kill, damage, restore and compare in cycles"
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child is not None:
        if not given.once:
            _write(given.child, given.seed)
        with _replicator(given.child) as replicator:
            replicator.wait(timeout_s=START_S)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="pyrepl-soak-"))
    try:
        figures = soak(given.minutes * 60, given.seed, folder)
    except (SoakFailure, ReplicatorError, sqlite3.Error) as error:
        print(f"FAILED seed={given.seed} folder={folder}: {error}", flush=True)
        return 1
    shutil.rmtree(folder)
    print(figures, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
