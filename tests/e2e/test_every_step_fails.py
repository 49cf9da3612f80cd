"""Every step of every operation fails, once and for good, in turn. Whichever it was: the state is exact, and the next try succeeds."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import replicator
from replicator.chain import list_files
from replicator.cli.configured import load_config
from replicator.clock import Moment
from replicator.errors import ConfigError, LeaseHeld, NoBackups, OutputExists, ReplicatorError
from replicator.format.ltx import TXID, Header, encode_file
from replicator.lease import Lease
from replicator.outbox import OutFile
from replicator.replica import Replica, new_lineage
from replicator.storage.file import FileClient
from replicator.storage.s3 import S3Client
from replicator.storage.url import parse_s3_url
from replicator.testing import FailNth, How, Kind, each_failure
from tests.e2e.databases import checkpointed_bytes, connect, restored, rows
from tests.e2e.worlds import World, Worlds, aged, copies
from tests.servers import Server

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MEANT = (ReplicatorError, OSError, sqlite3.Error)
"""What an operation may fail with."""

EVERY = 3
"""Of the longer ways, each third step for each change, and each step now and then."""

ways = pytest.mark.parametrize(
    ("ever", "how", "every"),
    [
        pytest.param(False, How.REFUSED, 1, id="once"),
        pytest.param(False, How.SHORT, 1, id="short writes"),
        pytest.param(True, How.REFUSED, EVERY, id="for good", marks=pytest.mark.slow),
        pytest.param(False, How.UNKNOWN, EVERY, id="unknown", marks=pytest.mark.slow),
        pytest.param(True, How.REFUSED, 1, id="each for good", marks=pytest.mark.scheduled),
        pytest.param(False, How.UNKNOWN, 1, id="each unknown", marks=pytest.mark.scheduled),
    ],
)


@pytest.fixture
def worlds(tmp_path: Path) -> Worlds:
    return copies(tmp_path)


def check(world: World, failure: FailNth) -> None:
    """The restored database is a committed state, not older than what was acknowledged; the next try succeeds; nothing is left."""
    if not failure.ever and not any(".unlink" in what for what in failure.failed):
        assert world.temporary() == [], failure  # at once, not by the next process
    committed = rows(world.database)
    with contextlib.suppress(NoBackups):
        found = rows(restored(world.replica, world.folder))
        assert found == committed[: len(found)], failure
    if world.acknowledged:
        assert list_files(world.replica)[0][-1].max_txid >= world.acknowledged, failure
    if world.engine is not None:  # the same process goes on
        with contextlib.suppress(*MEANT) if failure.ever else contextlib.nullcontext():
            world.sync()
    world.close()
    world.sync()  # the next one
    world.commit(1)
    world.sync()
    assert rows(restored(world.replica, world.folder)) == rows(world.database), failure
    assert restored(world.replica, world.folder).read_bytes() == checkpointed_bytes(world.database, world.folder), failure
    left = world.end()
    assert left == [], (failure, left)
    assert failure.leaks() == [], (failure, failure.leaks())


@pytest.mark.fault("F1", "F24")
@ways
def test_sync(worlds: Worlds, ever: bool, how: How, every: int) -> None:
    for failure in each_failure(ever=ever, how=how, every=every):
        with worlds() as world:
            with failure, contextlib.suppress(*MEANT):
                world.sync()
            check(world, failure)
    assert failure.steps > (100 if how is not How.SHORT else 1)


@pytest.mark.fault("F1", "F23")
@ways
def test_staging_and_upload(worlds: Worlds, ever: bool, how: How, every: int) -> None:
    for failure in each_failure(ever=ever, how=how, every=every):
        with worlds() as world:
            engine = world.sync()
            world.commit(2)
            entry = engine.advance()
            assert entry is not None
            world.waiting = [entry]
            with failure, contextlib.suppress(*MEANT):
                staged = engine.stage(entry)
                assert staged is not None
                world.waiting = [staged]
                world.sync()
            check(world, failure)
    assert failure.steps > (20 if how is not How.SHORT else 0)


@pytest.mark.fault("F1", "F11")
@ways
def test_checkpoint(worlds: Worlds, ever: bool, how: How, every: int) -> None:
    for failure in each_failure(ever=ever, how=how, every=every):
        with worlds() as world:
            engine = world.sync()
            world.commit()
            with failure, contextlib.suppress(*MEANT):
                if engine.checkpoint():
                    world.sync()
            application = sqlite3.connect(world.database, timeout=0, isolation_level=None)
            application.execute("INSERT INTO t(v) VALUES('the application goes on at once')")
            application.close()
            check(world, failure)
    assert failure.steps > (20 if how is not How.SHORT else 0)


@pytest.mark.fault("F1", "F23")
@ways
def test_snapshot(worlds: Worlds, ever: bool, how: How, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.outbox.Spool.__init__.__kwdefaults__", {"limit_bytes": 1000})  # through a file
    for failure in each_failure(ever=ever, how=how, every=every):
        with worlds() as world:
            engine = world.sync()
            with failure, contextlib.suppress(*MEANT):
                out = engine.snapshot()
                try:
                    engine.replicas[0].add(out)
                finally:
                    out.discard()
            world.commit()
            check(world, failure)
            for info in list_files(world.replica)[9]:
                assert rows(restored(world.replica, world.folder, txid=info.max_txid)), failure
    assert failure.steps > (20 if how is not How.SHORT else 0)


@pytest.mark.fault("F1", "F34")
@ways
def test_compaction_and_retention(worlds: Worlds, ever: bool, how: How, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is due after an hour: merging, a full image, deletion of raw files."""
    monkeypatch.setattr("replicator.compactor.RESULT_BYTES", 1000)
    for failure in each_failure(ever=ever, how=how, every=every):
        with worlds() as world:
            for _ in range(2):
                world.commit(1)
                world.sync()
            keeper = aged(world, now=time.time() + 3600)
            with failure:
                for _ in range(10):
                    if not keeper.step():  # what fails is noted, and due later
                        break
            assert bool(keeper.problems) <= bool(failure.failed), failure
            check(world, failure)
            later = aged(world, now=time.time() + 7200)
            for _ in range(10):
                if not later.step():
                    break
            assert later.problems == {}, failure
            files = list_files(world.replica)
            assert [bool(files[1]), bool(files[9]), len(files[0])] == [True, True, 1], failure
            assert rows(restored(world.replica, world.folder)) == rows(world.database), failure
    assert failure.steps > (50 if how is not How.SHORT else 1)


@pytest.mark.fault("F1", "F23", "F18")
@pytest.mark.parametrize("place", ["nothing", "a database with a WAL"])
@ways
def test_restore(worlds: Worlds, place: str, ever: bool, how: How, every: int) -> None:
    """Either the output is the restored database, or it is what was there before: with `-force` a database, and its WAL with half of the rows."""
    with worlds() as world:
        world.sync()
        new = rows(world.database)
        old = new[:2]
        for failure in each_failure(ever=ever, how=how, every=every):
            folder = world.folder / "out"
            folder.mkdir()
            output = folder / "r.db"
            if place != "nothing":
                before = connect(output, page_size=512, autocheckpoint=0)
                before.execute("INSERT INTO t VALUES(?, ?)", old[0])
                before.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                before.execute("INSERT INTO t VALUES(?, ?)", old[1])
                for suffix in ("", "-wal"):
                    shutil.copy(f"{output}{suffix}", f"{output}{suffix}.kept")
                before.close()
                for suffix in ("", "-wal"):
                    os.replace(f"{output}{suffix}.kept", f"{output}{suffix}")
            restored_at = None
            with failure, contextlib.suppress(*MEANT):
                restored_at = replicator.restore(world.replica, output, force=place != "nothing", integrity_check="quick")
            assert failure.leaks() == [], (failure, failure.leaks())
            if restored_at is not None:
                assert rows(output) == new, failure
            elif place == "nothing":
                assert not output.exists() or rows(output) == new, failure
            else:
                if ever:  # what a failing disk kept from being put back is put back by the next one
                    with pytest.raises(OutputExists):
                        replicator.restore(world.replica, output)
                assert rows(output) in (old, new), failure
            replicator.restore(world.replica, output, force=True)
            assert rows(output) == new, failure
            assert [path.name for path in folder.iterdir() if not path.name.startswith("r.db")] == [], failure
            shutil.rmtree(folder)
    assert failure.steps > (30 if how is not How.SHORT else 1)


class Clocks:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> Moment:
        return Moment(self.seconds, 1_790_000_000.0 + self.seconds)


@pytest.mark.fault("F1", "F46")
@ways
def test_lease(tmp_path: Path, ever: bool, how: How, every: int) -> None:
    """Taken, renewed and given back while steps fail: never two owners, and another one has it at the latest when its time is over."""
    for failure in each_failure(ever=ever, how=how, every=every):
        clock = Clocks()
        one, two = (Lease(FileClient(tmp_path / "home"), owner=name, ttl_s=10.0, clock=clock, background=False) for name in ("one", "two"))
        with failure, contextlib.suppress(*MEANT):
            first = one.acquire()
            clock.seconds += 5
            one.renew()
            assert one.confirm() == first
        try:
            one.confirm()
            owner = True
        except ReplicatorError:
            owner = False
        try:
            two.acquire()
            assert not owner, failure
        except LeaseHeld:
            for _ in range(2):
                clock.seconds += 30
                with contextlib.suppress(LeaseHeld):
                    two.acquire()
        second = two.confirm()
        with pytest.raises(ReplicatorError):
            one.confirm()
        assert second > one.generation, failure
        two.release()
        assert failure.leaks() == [], failure
        assert [path.name for path in (tmp_path / "home").rglob("*.tmp")] == [], failure
        shutil.rmtree(tmp_path / "home")
    assert failure.steps > (30 if how is not How.SHORT else 1)


@pytest.mark.fault("F1")
@pytest.mark.parametrize("ever", [False, True], ids=["once", "for good"])
def test_loading_the_configuration(tmp_path: Path, ever: bool) -> None:
    """All of it, or an error that names the file."""
    path = tmp_path / "pyrepl.yml"
    path.write_text("dbs:\n  - path: /srv/a.db\n    replicas:\n      - url: file:///srv/replica\n" * 1)
    whole = load_config({"config": str(path)})
    for failure in each_failure(ever=ever):
        found, why = None, ""
        with failure:
            try:
                found = load_config({"config": str(path)})
            except ConfigError as error:
                why = str(error)
        assert found or str(path) in why, failure
        assert found in (None, whole), failure
        assert (found is None) <= bool(failure.failed), failure
        assert failure.leaks() == [], failure
    assert failure.steps >= 2


@pytest.mark.fault("F9", "F24")
@pytest.mark.parametrize("ever", [False, True], ids=["once", "for good"])
def test_no_more_threads(worlds: Worlds, ever: bool) -> None:
    """Starting is refused, and everything is let go again; or it works with fewer threads."""
    before = set(threading.enumerate())
    for failure in each_failure(kinds={Kind.THREADS}, ever=ever):
        with worlds() as world:
            one = replicator.Replicator(world.database, world.replica)
            why = ""
            with failure:
                try:
                    one.start()
                except OSError as error:
                    why = str(error)
                else:
                    one.wait(timeout_s=60)
                    one.close()
            assert not why or "cannot start a thread" in why, failure
            assert [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("pyrepl a.db")] == [], (
                failure
            )
            with replicator.Replicator(world.database, FileClient(world.folder / "replica")) as two:
                two.wait(timeout_s=60)
            assert rows(restored(world.replica, world.folder)) == rows(world.database), failure
            world.end()
            assert [name for name in failure.leaks() if str(world.folder) in name] == [], failure
    assert failure.steps >= 3


@pytest.mark.parametrize("jump_s", [-86400.0, 86400.0], ids=["back", "forward"])
@pytest.mark.parametrize("ever", [False, True], ids=["once", "from then on"])
def test_a_clock_that_jumps(worlds: Worlds, ever: bool, jump_s: float) -> None:
    """Whichever reading of it is wrong: what was stored stays restorable, and history is kept again."""
    for failure in each_failure(kinds={Kind.CLOCK}, ever=ever, jump_s=jump_s):
        with worlds() as world:
            with failure:
                world.sync()
                keeper = aged(world, now=None)
                for _ in range(3):
                    world.commit(1)
                    world.sync()
                    keeper.step()
            assert rows(restored(world.replica, world.folder)) == rows(world.database), failure
            check(world, failure)
    assert failure.steps > 10


@pytest.mark.fault("F29", "F33")
@pytest.mark.parametrize("how", [How.REFUSED, How.UNKNOWN])
def test_storing_and_reading_over_the_network(how: How, moto: Server) -> None:
    """Without the client's own second tries, so that the engine sees each failure."""
    client = S3Client(parse_s3_url(moto.url(f"steps-{how}")), max_attempts=1)
    replica = Replica(client, writer=7)
    replica.join(new_lineage(), replica.open(), known_txid=TXID(0))
    for failure in each_failure(kinds={Kind.NETWORK}, how=how):
        txid = TXID(replica.txid + 1)
        data = encode_file(Header(512, 1, txid, txid, 1_790_000_000_000 + txid), [(1, txid.to_bytes(8, "big") * 64)])
        read = None
        with failure, contextlib.suppress(*MEANT):
            replica.store([OutFile(0, txid, txid, 1_790_000_000_000 + txid, data)], txid)
            [stored] = client.list(0, seek=txid)
            with client.open(stored) as stream:
                read = stream.read()
        assert read in (None, data), failure
        assert read is not None or failure.failed, failure
        replica.store([OutFile(0, txid, txid, 1_790_000_000_000 + txid, data)], txid)
        [stored] = client.list(0, seek=txid)
        with client.open(stored) as stream:
            assert stream.read() == data, failure
    client.close()
    assert failure.steps >= 6


class LosingSync:
    """`fsync` fails once, and what was not synced before is lost, as Linux does it: the next `fsync` of that file would succeed, and prove nothing."""

    def __init__(self, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left, self.lost, self._dirty = n, "", set[tuple[int, int]]()
        for name in ("write", "pwrite", "pwritev"):
            monkeypatch.setattr(os, name, self._writing(getattr(os, name)))
        self._real, self._pwrite = os.fsync, os.pwrite
        monkeypatch.setattr(os, "fsync", self._sync)

    def _writing(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(file: int, *arguments: object) -> int:
            found = os.fstat(file)
            self._dirty.add((found.st_dev, found.st_ino))
            return real(file, *arguments)

        return call

    def _sync(self, file: int) -> None:
        found = os.fstat(file)
        key, self._left = (found.st_dev, found.st_ino), self._left - 1
        if self._left == -1:
            self.lost = os.readlink(f"/proc/self/fd/{file}")
            if key in self._dirty:
                self._pwrite(file, bytes(found.st_size), 0)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._dirty.discard(key)
        self._real(file)


@pytest.mark.fault("F3")
def test_an_fsync_that_fails_once_is_an_unknown_outcome_and_is_not_asked_again(worlds: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that it left is taken for stored: not under a final name, not by a second `fsync`."""
    lost = []
    for n in itertools.count():
        with FailNth(10**6) as nothing:
            pass
        with worlds() as world:
            engine = world.sync()
            world.commit(2)
            entry = engine.advance()
            assert entry is not None
            world.waiting = [entry]
            with monkeypatch.context() as patches:
                disk = LosingSync(n, patches)
                for _ in range(2):  # the second time as after an error
                    with contextlib.suppress(*MEANT):
                        if not world.waiting[0].is_staged:
                            staged = engine.stage(world.waiting[0])
                            assert staged is not None
                            world.waiting = [staged]
                        world.sync()
                        break
                for _ in range(2):
                    with contextlib.suppress(*MEANT):
                        engine.replicas[0].add(engine.snapshot())
                        break
                for _ in range(2):
                    with contextlib.suppress(*MEANT):
                        replicator.restore(world.replica, world.folder / "copy.db")
                        break
            assert rows(world.folder / "copy.db") == rows(world.database), disk.lost
            assert rows(restored(world.replica, world.folder)) == rows(world.database), disk.lost
            check(world, nothing)
            for info in list_files(world.replica)[9]:
                assert rows(restored(world.replica, world.folder, txid=info.max_txid)), disk.lost
        if not disk.lost:
            break
        lost.append(disk.lost)
    assert len(lost) > 8
    assert {"staged", "9"} <= {Path(name).parent.name for name in lost}
