"""A database with its replica in a directory, driven without threads, of which a test can have as many copies as it needs."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from replicator import livefile
from replicator.engine import Engine
from replicator.keeper import Keeper
from replicator.levels import History
from replicator.outbox import Entry, OutFile
from replicator.recent import RecentFiles
from replicator.replica import Replica
from replicator.storage.file import FileClient
from tests.e2e.databases import connect, engine_for

__all__ = ["World", "Worlds", "aged", "copies"]


class World:
    """A database with some transactions, a replica in a directory, and what was acknowledged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database, self.replica = folder / "a.db", FileClient(folder / "replica")
        self.engine: Engine | None = None
        self.is_open = False
        self.waiting: list[Entry] = []
        self.acknowledged = 0

    def commit(self, count: int = 3, size: int = 600) -> None:
        connection = connect(self.database, page_size=512, autocheckpoint=0)
        for _ in range(count):
            connection.execute("INSERT INTO t(v) VALUES(randomblob(?))", (size,))
        connection.close()

    def sync(self) -> Engine:
        """What the engine's thread and the uploader do: after an error the same entries come again."""
        if self.engine is None:
            self.engine = engine_for(self.database, self.replica, clock=lambda: time.time())  # not the function of now, which is replaced
        engine, replica = self.engine, self.engine.replicas[0]
        if not self.is_open:
            self.waiting, self.is_open = engine.open(), True
        while True:
            for entry in list(self.waiting):
                if entry.txid > replica.txid:
                    replica.store(entry.files, entry.txid)
                engine.settled(entry)
                engine.forget(entry)
                self.waiting.remove(entry)
                self.acknowledged = entry.txid
            if (fresh := engine.advance()) is None:
                return engine
            self.waiting.append(fresh)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        self.is_open, self.waiting = False, []
        self.replica = FileClient(self.folder / "replica")  # that of the next process, which sweeps what dead ones left

    def end(self) -> list[str]:
        """Close everything; return temporary files that are left."""
        self.close()
        found = self.database.stat()
        livefile.close_unused((found.st_dev, found.st_ino))
        while livefile._strays:  # kept open on purpose: closing them might drop locks of connections that somebody has
            os.close(livefile._strays.pop())
        return self.temporary()

    def temporary(self) -> list[str]:
        """Return the temporary files that are there."""
        return [str(path) for path in self.folder.rglob("*") if path.name.endswith((".tmp", ".restore")) or ".restore-" in path.name]


Worlds = Callable[[], contextlib.AbstractContextManager[World]]


def copies(folder: Path) -> Worlds:
    """Make a world in a folder, and return what makes copies of it, each for a block; nothing is open, or left, after it."""
    first = World(folder / "first")
    first.folder.mkdir()
    keeper = connect(first.database, page_size=512, autocheckpoint=0)  # or the last one to close would empty the WAL
    first.commit()
    first.sync()
    first.commit()
    first.close()
    shutil.copytree(first.folder, folder / "template", ignore=shutil.ignore_patterns("*-shm"))
    keeper.close()
    first.end()

    @contextlib.contextmanager
    def copy() -> Iterator[World]:
        shutil.copytree(folder / "template", folder / "world")
        world = World(folder / "world")
        try:
            yield world
        finally:
            world.end()
            shutil.rmtree(world.folder)

    return copy


def aged(world: World, *, now: float | None) -> Keeper:
    """A keeper of the world's replica, at some time; by the system's clocks when None."""
    history = History((1.0,), l0_retention_s=10.0, l0_retention_check_interval_s=1.0, snapshot_interval_s=20.0, snapshot_retention_s=30.0)
    replica = Replica(world.replica, writer=7)
    lineage = replica.open()
    assert lineage is not None
    replica.join(lineage, lineage, known_txid=replica.txid)
    engine = world.sync()

    @contextlib.contextmanager
    def image(newer_than: int) -> Iterator[OutFile]:
        out = engine.snapshot()
        try:
            yield out
        finally:
            out.discard()

    return Keeper(
        replica, history, scratch=engine.scratch, recent=RecentFiles(), take_snapshot=image,
        clock=lambda: time.time() if now is None else now, monotonic=lambda: time.monotonic() if now is None else now,
    )  # fmt: skip
