"""Parking in one process: what happens at the worst moments, without events, and beside databases that hang."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import replicator.engine
from replicator import livefile, parked
from replicator.api import Replicator
from replicator.errors import LeaseError
from replicator.lease import Lease, release_lock
from replicator.member import Limits, Member, Prepared
from replicator.storage import open_client
from replicator.storage.base import ReplicaClient
from replicator.storage.memory import MemoryClient
from replicator.store import Store
from replicator.watch import Watcher
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, until


@pytest.fixture(autouse=True)
def grain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of this machine's file systems are finer than those of all that there are."""
    for module in ("parking", "member"):
        monkeypatch.setattr(f"replicator.{module}.RACY_NS", 300_000_000)


def member(database: Path, make: Callable[[], ReplicaClient] | None = None) -> Member:
    url = f"file://{database.parent}/r-{database.stem}"

    def prepare() -> Prepared:
        client = make() if make is not None else open_client(url)
        return Prepared(Replicator(database, client, history=None), [client])

    return Member(database, prepare, urls=[url], folder=database.with_name(f".{database.name}-litestream") / "pyrepl")


@contextmanager
def storing(*members: Member, park_after_s: float = 0.1, hot: int = 1000) -> Iterator[Store]:
    store = Store(members, limits=Limits(park_after_s=park_after_s, hot=hot))
    store.start()
    try:
        yield store
    finally:
        assert store.close(20) == {}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    connection = connect(tmp_path / "a.db", autocheckpoint=0)
    insert(connection, 5)
    connection.close()
    return tmp_path / "a.db"


def is_exact(database: Path) -> bool:
    copy = restored(f"file://{database.parent}/r-{database.stem}", database.parent)
    return copy.read_bytes() == checkpointed_bytes(database, database.parent)


def open_below(folder: Path) -> list[str]:
    """Return the files below a folder that this process has open."""
    found = []
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{file}"))
    return [name for name in found if name.startswith(str(folder))]


def record_of(database: Path) -> bool:
    return parked.read_record(database.with_name(f".{database.name}-litestream") / "pyrepl") is not None


def test_a_parked_database_has_nothing_open(database: Path) -> None:
    found = member(database)
    with storing(found):
        until(lambda: found.state == "parked" and record_of(database))
        status = os.stat(database)
        until(lambda: not open_below(database.parent))  # the record itself is closed a moment after it has its name
        assert (status.st_dev, status.st_ino) not in livefile._descriptors
        assert found.synced_at is not None
        assert found.txid == 1


def test_a_commit_during_the_last_look_is_not_lost(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, application, raced = member(database), connect(database, autocheckpoint=0), threading.Event()
    rest = Replicator.rest

    def racing(self: Replicator, *, quiet_s: float) -> object:
        advance = self._engine.advance

        def late() -> object:
            if self._board.stop and not raced.is_set():
                raced.set()
                insert(application, 1)
            return advance()

        self._engine.advance = late  # type: ignore[method-assign, assignment]
        return rest(self, quiet_s=quiet_s)

    monkeypatch.setattr(Replicator, "rest", racing)
    with storing(found):
        assert raced.wait(20)
        until(lambda: found.state == "parked" and found.txid == 2 and record_of(database))
    assert is_exact(database)
    application.close()


@pytest.mark.parametrize("closes", [False, True])
def test_a_commit_after_the_last_look_and_before_the_files_are_looked_at_is_found(
    database: Path, monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    """Everything that is compared later shows the state after that commit: only the WAL's content, or its absence, can tell."""
    found, applications, raced = member(database), [connect(database, autocheckpoint=0)], threading.Event()
    insert(applications[0], 1)
    close = replicator.engine.Engine.close

    def closing(self: replicator.engine.Engine) -> None:
        close(self)
        if not raced.is_set():
            raced.set()
            insert(applications[0], 1)
            if closes:  # checkpoints, and removes the WAL
                applications.pop().close()

    monkeypatch.setattr(replicator.engine.Engine, "close", closing)
    monkeypatch.setattr("replicator.member.Member._seen", lambda self, name, mask: None)  # and no event comes
    with storing(found):
        assert raced.wait(20)
        until(lambda: found.state == "parked" and found.txid == 2 and record_of(database))
    assert is_exact(database)
    for application in applications:
        application.close()


@pytest.mark.parametrize(("reread_s", "requests"), [(150.0, ["PUT"]), (0.0, ["LIST", "PUT", "LIST"])])
def test_waking_needs_no_listing_and_one_upload(
    database: Path, monkeypatch: pytest.MonkeyPatch, reread_s: float, requests: list[str]
) -> None:
    """After a sleep of more than half of the time for which raw files are kept, another writer's may have come and gone: then it looks."""
    monkeypatch.setattr("replicator.replica.REREAD_S", reread_s)
    client = MemoryClient()
    counts: list[str] = []
    listing, putting = client.list, client.put
    client.list = lambda *args, **options: counts.append("LIST") or listing(*args, **options)  # type: ignore[method-assign, func-returns-value]
    client.put = lambda *args, **options: counts.append("PUT") or putting(*args, **options)  # type: ignore[method-assign, func-returns-value]
    found = member(database, lambda: client)
    with storing(found):
        until(lambda: found.state == "parked" and record_of(database))
        counts.clear()
        connection = connect(database)
        insert(connection, 1)
        connection.close()
        until(lambda: found.txid == 2 and found.state == "parked")
    assert counts == requests
    assert restored(client, database.parent).read_bytes() == checkpointed_bytes(database, database.parent)


class Silent:
    """A source of events that has none, or cannot be had."""

    def __init__(self, failure: int = 0) -> None:
        self.failure, self.ended = failure, threading.Event()
        self.number = 0

    def add(self, folder: bytes) -> int:
        if self.failure:
            raise OSError(self.failure, os.strerror(self.failure))
        self.number += 1
        return self.number

    def remove(self, watch: int) -> None:
        pass

    def run(self, seen: Callable[[int, int, bytes], None]) -> None:
        self.ended.wait(60)

    def stop(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("failure", [0, errno.ENOSPC])
def test_a_change_is_found_without_events(database: Path, monkeypatch: pytest.MonkeyPatch, failure: int) -> None:
    monkeypatch.setattr("replicator.watch._shared", Watcher(lambda: Silent(failure)))
    monkeypatch.setattr("replicator.store.SWEEP_S", 1.0)
    found = member(database)
    with storing(found):
        until(lambda: found.state == "parked" and record_of(database))
        assert found.is_watched is (failure == 0)
        connection = connect(database)
        insert(connection, 1)
        connection.close()
        until(lambda: found.txid == 2)
    assert is_exact(database)


def test_databases_that_hang_delay_nobody(tmp_path: Path) -> None:
    release = threading.Event()

    class Hanging(MemoryClient):
        def list(self, *args, **options):
            release.wait(30)
            return super().list(*args, **options)

    databases = [tmp_path / f"{number}.db" for number in range(30)]
    for database in databases:
        connect(database).close()
    members = [member(database, Hanging if number < 15 else None) for number, database in enumerate(databases)]
    with storing(*members):
        until(lambda: all(item.state == "parked" for item in members[15:]), 30)
        assert all(item.state == "waiting" for item in members[:15])
        connection = connect(databases[-1])
        insert(connection, 1)
        connection.close()
        until(lambda: members[-1].txid == 2)
        release.set()
        until(lambda: all(item.was_tried for item in members), 30)


def test_a_parked_database_whose_replica_was_emptied_says_so_at_the_next_start(database: Path) -> None:
    first = member(database)
    with storing(first):
        until(lambda: record_of(database))
    for file in (database.parent / "r-a").rglob("*.ltx"):
        file.unlink()
    again = member(database)
    store = Store([again], limits=Limits(park_after_s=0.1))
    store.start()
    until(lambda: again.state == "failed")
    assert "has lost files" in str(again.error) or "lost" in str(again.error)
    store.close(5)


def test_a_replica_that_does_not_answer_leaves_it_parked_and_is_asked_again(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.e2e.databases import Flaky

    client = Flaky()
    monkeypatch.setattr("replicator.member.RETRY_S", 0.05)
    with storing(member(database, lambda: client)):
        until(lambda: record_of(database))
    client.down = True
    again = member(database, lambda: client)
    with storing(again):
        until(lambda: again.problem)
        assert again.state == "parked"
        assert "out of reach" in str(again.problem)
        client.down = False
        until(lambda: not again.problem)
        assert (again.state, again.checked) == ("parked", True)


def test_somebody_who_asks_wakes_it(database: Path) -> None:
    found = member(database)
    with storing(found):
        until(lambda: found.state == "parked")
        with found.awake(10) as engine:
            assert engine is not None
            assert engine.wait(timeout_s=10) == 1
            time.sleep(0.5)
            assert found.state == "replicating"  # as long as it is in use
        until(lambda: found.state == "parked")


def test_a_shared_lease_lets_databases_park_and_another_owner_in_the_meantime_is_found(database: Path) -> None:
    """The lease alone says nothing: by this owner's clock it is still its own."""
    home, client = MemoryClient(), MemoryClient()
    lease = Lease(home, owner="one", background=False)

    def prepare() -> Prepared:
        return Prepared(Replicator(database, client, history=None, lease=lease), [client])

    found = Member(database, prepare, folder=database.with_name(f".{database.name}-litestream") / "pyrepl")
    store = Store([found], limits=Limits(park_after_s=0.1))
    store.start()
    try:
        until(lambda: found.state == "parked" and record_of(database))
        application = connect(database)
        insert(application, 1)
        until(lambda: found.txid == 2 and found.state == "parked")
        release_lock(home, force=True)
        copy = database.with_name("copy.db")
        with Lease(home, owner="two", background=False) as other:
            with Replicator(copy, client, history=None, lease=other, takeover=True) as second:
                insert(connect(copy), 1)
                second.wait(timeout_s=20)
            theirs = {info: client.open(info).read() for info in client.list(0)}
            insert(application, 1)
            until(lambda: found.state == "failed")
            assert isinstance(found.error, LeaseError)
            assert {info: client.open(info).read() for info in client.list(0)} == theirs
        application.close()
    finally:
        store.close(5)
        lease.close()


def test_a_large_database_is_not_parked(database: Path) -> None:
    found = member(database)
    store = Store([found], limits=Limits(park_after_s=0.05, park_max_bytes=4096))
    store.start()
    until(lambda: found.state == "replicating")
    time.sleep(0.5)
    assert found.state == "replicating"
    store.close(10)


def test_the_end_leaves_a_record_where_that_takes_no_waiting(database: Path) -> None:
    found = member(database)
    with storing(found, park_after_s=1000):
        until(lambda: found.state == "replicating" and found.txid == 1)
        until(lambda: found.replicator is not None and found.replicator.is_at_rest(0.5))
    assert record_of(database)
    again = member(database)
    with storing(again, park_after_s=1000):
        until(lambda: again.checked and again.was_tried)
        assert again.state == "parked"


def test_another_process_that_has_it_open_keeps_its_locks(database: Path) -> None:
    """The descriptor is closed while no connection of this process is open; the application is another process."""
    found, application = member(database), sqlite3.connect(database, isolation_level=None)
    application.execute("BEGIN IMMEDIATE")
    application.execute("INSERT INTO t(v) VALUES(1)")
    with storing(found):
        until(lambda: found.state == "parked")
        application.execute("COMMIT")
        until(lambda: found.txid == 2)
    assert is_exact(database)
    application.close()
