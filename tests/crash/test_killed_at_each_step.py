"""SIGKILL at each step of each operation, in a child process: the next process finds an exact state, goes on, and leaves nothing behind.

A process of its own forks the children: it has no threads, and everything is imported there already.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import replicator
from replicator.clock import SYSTEM, Moment
from replicator.errors import LeaseHeld, OutputExists
from replicator.lease import Lease
from replicator.storage.file import FileClient
from replicator.testing import FailNth, How
from tests.e2e.databases import checkpointed_bytes, connect, restored, rows
from tests.e2e.worlds import World, aged, copies

STRIDE = 7
FORKING = """
import os, sys, traceback
from pathlib import Path
from tests.crash.test_killed_at_each_step import act
for line in sys.stdin:
    what, n, folder = line.split()
    child = os.fork()
    if not child:
        try:
            act(what, int(n), Path(folder))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def act(what: str, n: int, folder: Path) -> None:
    """In the child: do it, and die at a step. Exit code 0 when there is no such step."""
    world = World(folder)
    engine = world.sync() if what in ("checkpoint", "staging", "snapshot", "history") else None
    if what in ("checkpoint", "staging"):
        world.commit(2)
    keeper = aged(world, now=time.time() + 3600) if what == "history" else None
    with FailNth(n, how=How.KILLED) as failure:
        match what:
            case "sync":
                world.sync()
            case "checkpoint":
                assert engine is not None
                engine.checkpoint()
                world.sync()
            case "staging":
                assert engine is not None
                entry = engine.advance()
                assert entry is not None
                staged = engine.stage(entry)
                assert staged is not None
                world.waiting = [staged]
                world.sync()
            case "snapshot":
                assert engine is not None
                out = engine.snapshot()
                engine.replicas[0].add(out)
                out.discard()
            case "history":
                assert keeper is not None
                while keeper.step():
                    pass
            case "restore":
                replicator.restore(world.replica, folder / "out" / "r.db", force=True, integrity_check="quick")
            case "lease":
                lease = Lease(world.replica, owner="dead", ttl_s=1.0, background=False)
                lease.acquire()
                lease.renew()
                lease.release()
    assert failure.steps > 5
    os._exit(0)


@contextlib.contextmanager
def forking() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


def old_database(folder: Path, old: list[tuple[object, ...]]) -> None:
    """A database whose newest row is in its WAL."""
    folder.mkdir()
    connection = connect(folder / "first.db", page_size=512, autocheckpoint=0)
    connection.execute("INSERT INTO t VALUES(?, ?)", old[0])
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.execute("INSERT INTO t VALUES(?, ?)", old[1])
    for suffix in ("", "-wal"):
        shutil.copy(folder / f"first.db{suffix}", folder / f"r.db{suffix}")
    connection.close()
    (folder / "first.db").unlink()


def check_restored(world: World, old: list[tuple[object, ...]], new: list[tuple[object, ...]]) -> None:
    output = world.folder / "out" / "r.db"
    with pytest.raises(OutputExists):  # the next one puts back what a dead one had moved aside, before anything else
        replicator.restore(world.replica, output)
    assert rows(output) in (old, new)
    replicator.restore(world.replica, output, force=True)
    assert rows(output) == new
    assert {path.name for path in output.parent.iterdir()} <= {"r.db", "r.db-wal", "r.db-shm"}


class Ahead:
    """The clocks of this machine, so many seconds later."""

    seconds = 0.0

    def now(self) -> Moment:
        now = SYSTEM.now()
        return Moment(now.steady + self.seconds, now.wall + self.seconds)


def check_lease(world: World) -> None:
    """The next owner has it at once, or when the time of the dead one is over: here its clock moves, and nobody waits."""
    clock = Ahead()
    lease = Lease(world.replica, owner="next", ttl_s=1.0, background=False, clock=clock)
    with contextlib.suppress(LeaseHeld):
        lease.acquire()
        lease.release()
        return
    with pytest.raises(LeaseHeld):
        lease.acquire()
    clock.seconds += 30
    lease.acquire()
    lease.release()


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    "every",
    [STRIDE, pytest.param(3, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.scheduled)],
    ids=["some steps", "many steps", "each step"],
)
@pytest.mark.parametrize("what", ["sync", "checkpoint", "staging", "snapshot", "history", "restore", "lease"])
def test_killed(tmp_path: Path, what: str, every: int) -> None:
    worlds = copies(tmp_path)
    with forking() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for n in range(2 if every == STRIDE else 0, 1000, every):
            with worlds() as world:
                new = [] if what != "restore" else rows(restored(world.replica, world.folder))
                if what == "restore":
                    old_database(world.folder / "out", new[:2])
                process.stdin.write(f"{what} {n} {world.folder}\n")
                process.stdin.flush()
                code = int(process.stdout.readline())
                assert code in (0, -signal.SIGKILL), (n, code)
                committed = rows(world.database)
                found = rows(restored(world.replica, world.folder))
                assert found == committed[: len(found)]
                assert found
                if what == "restore":
                    check_restored(world, new[:2], new)
                elif what == "lease":
                    check_lease(world)
                application = sqlite3.connect(world.database, timeout=0, isolation_level=None)
                application.execute("INSERT INTO t(v) VALUES('the application goes on at once')")
                application.close()
                world.sync()
                assert restored(world.replica, world.folder).read_bytes() == checkpointed_bytes(world.database, world.folder), n
                for level in (1, 9):
                    for info in FileClient(world.folder / "replica").list(level):
                        restored(world.replica, world.folder, txid=info.max_txid)
                assert world.end() == [], n
            if code == 0:
                break
    assert n > 20
