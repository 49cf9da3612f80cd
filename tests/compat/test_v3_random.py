"""Anything in any order: what the released 0.3.13 restores is what the database was, at every time and index."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from replicator.v3engine import V3Engine
from tests.compat.litestream03 import restore03
from tests.compat.v3history import integrity, restore05, rfc3339, stored
from tests.e2e.databases import checkpointed_bytes, connect, drain, insert, restored
from tests.e2e.v3databases import Away, v3_engine_for


class World:
    def __init__(self, folder: Path, source: random.Random) -> None:
        self.folder, self.source = folder, source
        self.database, self.store = folder / "a.db", Away(folder / "replica")
        page_size = source.choice([512, 1024, 4096])
        self.options = {
            "page_size": page_size,
            "auto_vacuum": source.choice(["NONE", "FULL"]),
            "autocheckpoint": source.choice([0, 5, 1000]),
        }
        self.application = connect(self.database, **self.options)
        self.reader: sqlite3.Connection | None = None
        self.engine: V3Engine | None = None
        self.states: list[tuple[int, bytes]] = []

    def write(self) -> None:
        what = self.source.randrange(5)
        if what < 3:
            insert(self.application, self.source.randrange(1, 20))
        elif what == 3:
            self.application.execute("DELETE FROM t WHERE id % ? = 0", (self.source.randrange(2, 5),))
        else:
            self.application.execute("UPDATE t SET v = randomblob(200) WHERE id % 7 = 1")

    def vacuum(self) -> None:
        if self.reader is None:
            self.application.execute("VACUUM")

    def foreign_checkpoint(self) -> None:
        self.application.execute("PRAGMA busy_timeout=0")
        self.application.execute(f"PRAGMA wal_checkpoint({self.source.choice(['PASSIVE', 'FULL', 'RESTART', 'TRUNCATE'])})")
        self.application.execute("PRAGMA busy_timeout=30000")

    def checkpoint(self) -> None:
        if self.engine:
            self.engine.checkpoint()

    def read(self) -> None:
        if self.reader is None:
            self.reader = connect(self.database)
            self.reader.execute("BEGIN")
            self.reader.execute("SELECT count(*) FROM t").fetchone()
        else:
            self.reader.close()
            self.reader = None

    def start_or_stop(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        else:
            self.engine = v3_engine_for(self.database, self.store, writer=self.source.randrange(1, 10**6))
            self.engine.open()

    def reopen(self) -> None:
        """Alone, it is the last to close: SQLite deletes the WAL."""
        self.application.close()
        self.application = connect(self.database, **self.options)

    def snapshot(self) -> None:
        if self.engine is not None:
            self.sync()
            self.engine.replicas[0].add(self.engine.snapshot())

    def sync(self) -> None:
        if self.engine is None:
            self.start_or_stop()
        assert self.engine is not None
        drain(self.engine)
        self.engine.settle_pin()
        expected = checkpointed_bytes(self.database, self.folder)
        if not self.states or self.states[-1][1] != expected:
            assert restore03(self.store.url, self.folder / "theirs.db") == expected
            self.states.append((stored(self.store.url)[-1].created_ns, expected))

    def close(self) -> None:
        for each in (self.engine, self.reader, self.application):
            if each is not None:
                each.close()


def play(folder: Path, seed: int, steps: int) -> None:
    world = World(folder, random.Random(seed))
    moves = {
        world.write: 10, world.sync: 6, world.checkpoint: 4, world.foreign_checkpoint: 2, world.read: 2, world.snapshot: 1,
        world.start_or_stop: 2, world.vacuum: 1, world.reopen: 1,
    }  # fmt: skip
    try:
        for _ in range(steps):
            (move,) = world.source.choices(list(moves), list(moves.values()))
            move()
        world.sync()
        url = world.store.url
        for created_ns, expected in world.states[::3]:
            assert restore03(url, folder / "then.db", "-timestamp", rfc3339(created_ns)) == expected
        assert restore05(url, folder / "theirs05.db") == world.states[-1][1]
        assert integrity(folder / "theirs05.db") == "ok"
        assert restored(url, folder, "ours.db").read_bytes() == world.states[-1][1]
    finally:
        world.close()


@pytest.mark.parametrize("seed", range(4))
def test_every_state_of_a_random_history_comes_back(tmp_path: Path, seed: int) -> None:
    play(tmp_path, seed, 40)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed < 105 else pytest.mark.scheduled) for seed in range(100, 140)]
)
def test_every_state_of_a_long_random_history_comes_back(tmp_path: Path, seed: int) -> None:
    play(tmp_path, seed, 150)
