"""Databases with a lease: claim, takeover, salvage, several replicas, one lease for many, and stores that cannot do it."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.errors import (
    ConditionsIgnored,
    ConfigError,
    Fenced,
    LeaseHeld,
    LeaseLost,
    LineageMismatch,
    ReplicatorError,
    StorageUnavailable,
)
from replicator.format.lock import token_of
from replicator.format.ltx import decode_file, decode_header
from replicator.lease import Lease, LeaseTerms, release_lock
from replicator.standby import wait_until_owner
from replicator.storage import open_client
from replicator.storage.memory import MemoryClient
from replicator.store import Member, Prepared
from tests.e2e.databases import Flaky, checkpointed_bytes, connect, insert, restored, rows, until

TERMS = LeaseTerms(ttl_s=60.0)  # nothing here waits for it


def raw_files(client) -> list:
    """(header, pages) of each raw file."""
    found = []
    for info in client.list(0):
        with client.open(info) as stream:
            found.append(decode_file(stream.read())[:2])
    return found


def test_the_claim_is_the_next_txid_and_changes_nothing(tmp_path):
    client, database = MemoryClient.named("claim"), tmp_path / "a.db"
    connection = connect(database)
    insert(connection, 50)
    with Replicator(database, client, history=None):
        pass
    before = checkpointed_bytes(database, tmp_path)
    with Replicator(database, client, lease=TERMS, history=None) as replicator:
        assert replicator.status().txid == 2  # before anything was asked for
        assert replicator.status().lease is not None
        assert (replicator.status().lease.state, replicator.status().lease.generation) == ("held", 1)
    (first, _), (claim, pages) = raw_files(client)
    assert ([pgno for pgno, _ in pages], claim.commit) == ([1], first.commit)
    assert (claim.wal_offset, claim.wal_size) == (32, 0)
    assert (token_of(first.node_id), token_of(claim.node_id)) == (0, 1)
    assert restored(client, tmp_path).read_bytes() == before


def test_an_owner_that_starts_again_claims_again_and_loses_nothing(tmp_path):
    client, database = MemoryClient.named("again"), tmp_path / "a.db"
    connection = connect(database)
    for generation in (1, 2, 3):
        insert(connection, 5)
        with Replicator(database, client, lease=TERMS, history=None) as replicator:
            insert(connection, 5)
            replicator.wait(timeout_s=20)
            assert replicator.status().lease.generation == generation
    assert rows(restored(client, tmp_path)) == rows(connection)
    assert not list(tmp_path.glob("*salvage*"))


def test_an_owner_that_was_killed_goes_on_at_once_on_its_own_machine(tmp_path):
    client, database = MemoryClient.named("killed"), tmp_path / "a.db"
    insert(connect(database), 5)
    replicator = Replicator(database, client, lease=LeaseTerms(ttl_s=3600), history=None).start()
    replicator.wait(timeout_s=20)
    # What a kill does: threads end, locks go, and nothing is written any more.
    with replicator._board.changed:
        replicator._board.stop = True
        replicator._board.changed.notify_all()
    for thread in replicator._threads:
        thread.join(10)
    replicator._engine.close()
    replicator._lease.close(release=False)
    with Replicator(database, client, lease=LeaseTerms(ttl_s=3600), history=None) as again:
        assert again.status().lease.generation == 2


@pytest.mark.fault("F45")
@pytest.mark.parametrize("url", ["file", "seaweed"], indirect=True)
def test_takeover_restores_claims_and_keeps_the_old_owners_tail(url, tmp_path):
    client = open_client(url)
    theirs, mine = tmp_path / "old.db", tmp_path / "new.db"
    old = connect(theirs)
    insert(old, 20)
    owner = Replicator(theirs, url, lease=TERMS, history=None, sync_interval_s=3600).start()
    acknowledged = owner.wait(timeout_s=30)
    stored = rows(old)
    with pytest.raises(LeaseHeld, match="lease is held by"):
        Replicator(mine, url, lease=TERMS, takeover=True, lease_timeout_s=0).start()
    release_lock(client, force=True)  # as if its owner had been silent for its time
    with Replicator(mine, url, lease=TERMS, takeover=True, history=None, sync_interval_s=0) as replicator:
        new = connect(mine)
        assert rows(new) == stored
        assert replicator.status().txid == acknowledged + 1  # the claim
        insert(new, 3)
        replicator.wait(timeout_s=30)
        insert(old, 7)  # nobody has told its application yet
        with pytest.raises(ReplicatorError) as lost:
            owner.wait(timeout_s=30)
        assert isinstance(lost.value, (LeaseLost, Fenced))
        assert owner.status().state == "failed"
        with pytest.raises((LeaseLost, Fenced)):
            owner.close()
        assert rows(restored(client, tmp_path)) == rows(new)
    tail = rows(old)
    old.close()

    # It comes back: without takeover it is refused, and what only it had is kept.
    with pytest.raises(Fenced, match=r"generation 2\).*what only this machine had is in") as fenced:
        Replicator(theirs, url, lease=TERMS).start()
    assert "takeover" in fenced.value.hint
    (salvaged,) = tmp_path.glob("old.db-salvage-*.ltx")
    assert rows(theirs) == tail
    kept, pages, _ = decode_file(salvaged.read_bytes())
    assert kept.min_txid == acknowledged + 1

    # With takeover it goes on from the other's state, and the file stays as it was.
    before = salvaged.read_bytes()
    with Replicator(theirs, url, lease=TERMS, takeover=True, history=None, sync_interval_s=0) as replicator:
        old = connect(theirs)
        assert rows(old) == rows(new)
        insert(old, 1)
        replicator.wait(timeout_s=30)
        assert replicator.status().lease.generation == 4  # the refused start has had the lease, too
    assert [path.read_bytes() for path in tmp_path.glob("old.db-salvage-*.ltx")] == [before]
    assert rows(restored(client, tmp_path)) == rows(old)

    # What the documentation says about reading it: restore the TXID before, and put its pages in place.
    copy = restored(client, tmp_path, "before.db", txid=acknowledged)
    with copy.open("r+b") as file:
        for pgno, page in pages:
            file.seek((pgno - 1) * kept.page_size)
            file.write(page)
        file.truncate(kept.commit * kept.page_size)
    assert rows(copy) == tail


def test_takeover_restores_what_was_stored_without_a_lease_meanwhile_and_does_not_undo_it(tmp_path):
    client, mine, theirs = MemoryClient(), tmp_path / "mine.db", tmp_path / "theirs.db"
    insert(connect(mine), 10)
    with Replicator(mine, client, lease=TERMS, history=None) as replicator:
        replicator.wait(timeout_s=20)
    restored(client, tmp_path, "theirs.db")
    for count in (7, 2):
        with Replicator(theirs, client, history=None) as replicator:
            connection = connect(theirs)
            insert(connection, count)
            replicator.wait(timeout_s=20)
        with Replicator(mine, client, lease=TERMS, takeover=True, history=None) as replicator:
            assert rows(mine) == rows(connection)
            replicator.wait(timeout_s=20)
        assert rows(restored(client, tmp_path, f"{count}.db")) == rows(connection)
        connection.close()
        for path in (*tmp_path.glob("theirs.db*"), *tmp_path.glob("mine.db-*")):
            path.unlink()
        restored(client, tmp_path, "theirs.db")
        shutil.rmtree(tmp_path / ".theirs.db-litestream")
    assert not list(tmp_path.glob("*salvage*"))


def test_takeover_goes_on_after_a_kill_of_its_own_before_it_had_a_lease(tmp_path):
    """What it stored last and did not note any more is its own, although nothing says so: its pages are here."""
    client, database, pages = MemoryClient(), tmp_path / "a.db", tmp_path / ".a.db-litestream" / "pyrepl" / "pages"
    connection = connect(database)
    insert(connection, 10)
    with Replicator(database, client, history=None) as replicator:
        replicator.wait(timeout_s=20)
    before = pages.read_bytes()
    insert(connection, 3)
    with Replicator(database, client, history=None) as replicator:
        replicator.wait(timeout_s=20)
    pages.write_bytes(before)
    tail = rows(connection)
    with Replicator(database, client, lease=TERMS, takeover=True, history=None) as replicator:
        replicator.wait(timeout_s=20)
    assert rows(restored(client, tmp_path)) == rows(connection) == tail
    assert not list(tmp_path.glob("*salvage*"))


@pytest.mark.fault("F47")
@pytest.mark.parametrize("moment", ["after the restore", "at the claim"])
def test_a_late_write_of_the_old_owner_before_the_claim_is_taken_over_too(tmp_path, moment):
    """The lease is ours, and between the look at the replica and the claim a file arrives that the old owner sent before."""
    late: list[bytes] = []

    class Late(MemoryClient):
        def put(self, level, low, high, body, **options):
            if late and level == 0:
                self.arrive()
            return super().put(level, low, high, body, **options)

        def get_control(self, name):
            if late and "lineage" in name and moment == "after the restore":
                self.arrive()
            return super().get_control(name)

        def arrive(self):
            data = late.pop()
            super().put(0, decode_header(data).min_txid, decode_header(data).max_txid, data, timestamp_ms=0)

    client, theirs, mine = Late(), tmp_path / "old.db", tmp_path / "new.db"
    old = connect(theirs)
    insert(old, 20)
    owner = Replicator(theirs, client, lease=TERMS, history=None).start()
    owner.wait(timeout_s=20)
    # The next file as it would be, from a twin of the store.
    twin = Late()
    twin._store.files.update(client._store.files)
    twin._store.control.update(client._store.control)
    owner.close()
    shutil.copytree(tmp_path / ".old.db-litestream", tmp_path / ".twin.db-litestream")
    for suffix in ("", "-wal"):
        shutil.copy(f"{theirs}{suffix}", f"{tmp_path}/twin.db{suffix}")
    other = connect(tmp_path / "twin.db")
    insert(other, 2)
    with Replicator(tmp_path / "twin.db", twin, lease=TERMS, history=None):
        pass
    newest = max(twin.list(0), key=lambda info: info.max_txid)
    with twin.open(newest) as stream:
        late.append(stream.read())
    assert token_of(decode_header(late[0]).node_id) == 2

    with Replicator(mine, client, lease=TERMS, takeover=True, history=None, sync_interval_s=0) as replicator:
        assert rows(mine) == rows(other)
        assert replicator.status().txid == newest.max_txid + 1
        assert rows(restored(client, tmp_path)) == rows(other)


def test_a_new_owner_that_another_one_has_replaced_before_its_claim_does_not_claim(tmp_path):
    """Its clock says that the lease is its own; the claim of the other is among what it finds in the replica."""
    client, mine, theirs = MemoryClient(), tmp_path / "mine.db", tmp_path / "theirs.db"
    insert(connect(theirs), 5)
    lease = Lease(client, ttl_s=3600, owner="mine", background=False)
    lease.acquire()
    release_lock(client, force=True)
    with Replicator(theirs, client, lease=TERMS, history=None) as other:
        other.wait(timeout_s=20)
        before = [info.max_txid for info in client.list(0)]
        assert lease.status().state == "held"
        with pytest.raises(LeaseLost):
            Replicator(mine, client, lease=lease, takeover=True, history=None).start()
        assert [info.max_txid for info in client.list(0)] == before


def test_what_a_living_owner_stores_between_the_look_and_the_join_is_not_overwritten(tmp_path):
    """Two leases, one replica: the second writer looks at an empty replica, the first stores TXID 1, the second joins."""

    class Late(MemoryClient):
        looks = 0

        def list(self, level, **options):
            self.looks += level == 0
            if level == 0 and self.looks == 2:
                first.start().wait(timeout_s=20)
            return super().list(level, **options)

    client = MemoryClient.named("late")
    insert(connect(tmp_path / "a.db"), 7)
    insert(connect(tmp_path / "b.db"), 3)
    leases = [Lease(MemoryClient.named(name), ttl_s=60.0) for name in ("late-a", "late-b")]
    first = Replicator(tmp_path / "a.db", client, lease=leases[0], history=None)
    second = Replicator(tmp_path / "b.db", Late.named("late"), lease=leases[1], history=None)
    with pytest.raises(Fenced):
        second.start().wait(timeout_s=20)
    first.close()
    for lease in leases:
        lease.close()
    assert [header.min_txid for header, _ in raw_files(client)] == [1]
    assert len(rows(restored(client, tmp_path))) == 7


@pytest.mark.parametrize("has_lease", [True, False])
def test_an_empty_replica_keeps_its_lineage_where_a_lease_lets_the_first_file_decide(has_lease, tmp_path):
    """Another writer has recorded it and is about to store its first file."""
    client, recorded = MemoryClient.named(f"recorded-{has_lease}"), b'{"lineage": "000102030405060708090a0b0c0d0e0f"}\n'
    client.put_control("pyrepl/lineage.json", recorded)
    insert(connect(tmp_path / "a.db"), 3)
    with Replicator(tmp_path / "a.db", client, lease=TERMS if has_lease else False, history=None):
        pass
    assert (b"000102030405060708090a0b0c0d0e0f" in client.get_control("pyrepl/lineage.json").data) is has_lease


def test_a_replica_that_is_taken_for_empty_is_not_listed_and_one_that_is_not_is_refused(tmp_path):
    class Counting(MemoryClient):
        lists = 0

        def list(self, level, **options):
            self.lists += 1
            return super().list(level, **options)

    client = Counting.named("taken-for-empty")
    lease = Lease(MemoryClient.named("taken-for-empty-lease"), ttl_s=60.0)
    for name, count in (("a.db", 7), ("b.db", 3)):
        insert(connect(tmp_path / name), count)
    first = Replicator(tmp_path / "a.db", client, lease=lease, history=None)
    first.assume_empty()
    first.start().wait(timeout_s=20)
    first.close()
    assert client.lists == 0
    second = Replicator(tmp_path / "b.db", Counting.named("taken-for-empty"), lease=lease, history=None)
    second.assume_empty()
    with pytest.raises(LineageMismatch):
        second.start()
    lease.close()
    assert len(rows(restored(client, tmp_path))) == 7


def test_the_first_replica_decides_and_the_others_only_get_what_it_has(tmp_path):
    home, second = Flaky("home"), Flaky("second")
    database = tmp_path / "a.db"
    connection = connect(database)
    insert(connection, 10)
    with Replicator(database, home, second, lease=TERMS, history=None, sync_interval_s=0) as replicator:
        replicator.wait(timeout_s=20)
        home.down = True
        insert(connection, 1)
        with pytest.raises(ReplicatorError):
            replicator.wait(replicas=[second.url], timeout_s=0.5)
        assert len(second.names(0)) == len(home.names(0))
        home.down = False
        replicator.wait(timeout_s=40)
        assert second.names(0) == home.names(0)
        second.down = True
        insert(connection, 1)
        replicator.wait(replicas=[home.url], timeout_s=20)
        second.down = False
        replicator.wait(timeout_s=40)
    assert rows(restored(second, tmp_path)) == rows(connection)


def test_a_replica_that_was_longer_than_the_first_fills_it_before_the_claim(tmp_path):
    home, second = Flaky("home"), Flaky("second")
    database = tmp_path / "a.db"
    connection = connect(database)
    insert(connection, 10)
    with Replicator(database, home, second, history=None) as replicator:
        replicator.wait(timeout_s=20)
        home.down = True
        insert(connection, 3)
        replicator.wait(replicas=[second.url], timeout_s=20)
        with pytest.raises(ReplicatorError):
            replicator.close(0.5)
    home.down = False
    assert len(home.names(0)) < len(second.names(0))
    with Replicator(database, home, second, lease=TERMS, history=None) as replicator:
        replicator.wait(timeout_s=20)
    assert home.names(0) == second.names(0)
    assert rows(restored(home, tmp_path)) == rows(connection)


def test_one_lease_guards_many_databases_with_one_renewal(tmp_path):
    class Counting(MemoryClient):
        puts = 0

        def put_control(self, name, data, **conditions):
            Counting.puts += name == "lock.json"
            return super().put_control(name, data, **conditions)

    home = Counting()
    connections = [connect(tmp_path / f"{number}.db") for number in range(6)]
    stores = [MemoryClient() for _ in connections]
    with Lease(home, ttl_s=60) as lease:
        replicators = []
        for number, connection in enumerate(connections):
            insert(connection, 2)
            replicators.append(Replicator(tmp_path / f"{number}.db", stores[number], lease=lease, history=None).start())
        for replicator in replicators:
            replicator.wait(timeout_s=20)
        assert Counting.puts == 1
        lease.renew()
        assert Counting.puts == 2
        # A database that is closed and opened again in the same term has been claimed already.
        replicators[0].close()
        before = len(list(stores[0].list(0)))
        replicators[0] = Replicator(tmp_path / "0.db", stores[0], lease=lease, history=None).start()
        assert len(list(stores[0].list(0))) == before
        release_lock(home, force=True)
        with pytest.raises(LeaseLost):
            lease.renew()
        until(lambda: all(replicator.status().state == "failed" for replicator in replicators))
        for replicator in replicators:
            with pytest.raises(LeaseLost):
                replicator.close()


def test_a_shared_lease_stays_its_owners_when_a_database_is_closed_under_it(tmp_path):
    """It may be parked, or stopped by hand, in a process that lives and guards others."""
    home, store, database = MemoryClient(), MemoryClient(), tmp_path / "a.db"
    insert(connect(database), 2)
    with Lease(home, ttl_s=3600, owner="daemon:1") as lease:
        with Replicator(database, store, lease=lease, history=None) as replicator:
            replicator.wait(timeout_s=20)
        with pytest.raises(LeaseHeld, match="held by daemon:1"):
            Replicator(database, store, lease=Lease(home, ttl_s=3600, owner="cron:2"), history=None).start()
        lease.renew()
        assert lease.status().state == "held"


_OWNER = """
import sys, time
from replicator import Lease, Replicator
with Lease(sys.argv[1], ttl_s=3600, owner="daemon:1") as lease:
    for path in sys.argv[2:]:
        with Replicator(path, f"file://{path}-replica", lease=lease, history=None) as replicator:
            replicator.wait()
    print("guards", flush=True)
    time.sleep(60)
"""


def test_a_shared_lease_of_a_process_that_was_killed_is_free_at_once_on_its_own_machine(tmp_path):
    home, databases = f"file://{tmp_path}/home", [tmp_path / "a.db", tmp_path / "b.db"]
    for database in databases:
        insert(connect(database), 2)
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, home, *map(str, databases)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        with owner.stdout as lines:
            assert lines.readline() == "guards\n"
        lease = Lease(home, ttl_s=3600, owner="daemon:2")
        again = Replicator(databases[1], f"file://{databases[1]}-replica", lease=lease, history=None)
        with pytest.raises(LeaseHeld, match="held by daemon:1"):
            again.start()
    finally:
        owner.kill()
        owner.wait(20)
    with Replicator(databases[1], f"file://{databases[1]}-replica", lease=lease, history=None):
        assert lease.generation == 2
    lease.close()


def test_a_store_that_ignores_conditions_is_refused(rclone, tmp_path):
    database = tmp_path / "a.db"
    insert(connect(database), 1)
    url = rclone.url("lease-refused")
    with pytest.raises(ConditionsIgnored, match="ignores conditional writes"):
        Replicator(database, url, lease=True).start()
    with pytest.raises(ConditionsIgnored, match="ignores conditional writes"), Lease(MemoryClient(), ttl_s=60) as lease:
        Replicator(database, url, lease=lease).start()


def test_what_goes_together():
    with pytest.raises(ConfigError, match="takeover goes with a lease"):
        Replicator("/srv/app.db", MemoryClient(), takeover=True)
    with pytest.raises(ConfigError, match=r"format v0\.3 has no place for the claim"):
        Replicator("/srv/app.db", MemoryClient(), lease=True, format="v0.3")


def test_an_owner_that_could_not_store_everything_keeps_its_lease(tmp_path):
    class Full(MemoryClient):
        """Takes control objects, and no files while `full` is true."""

        full = False

        def put(self, *arguments, **options):
            if self.full:
                raise StorageUnavailable("no room")
            return super().put(*arguments, **options)

    client, database = Full(), tmp_path / "a.db"
    connection = connect(database)
    insert(connection, 5)
    replicator = Replicator(database, client, lease=TERMS, history=None).start()
    replicator.wait(timeout_s=20)
    client.full = True
    insert(connection, 5)
    with pytest.raises(ReplicatorError):
        replicator.close(0.3)
    client.full = False
    with pytest.raises(LeaseHeld):
        Replicator(tmp_path / "b.db", client, lease=TERMS, takeover=True, lease_timeout_s=0).start()
    with Replicator(database, client, lease=TERMS, history=None) as replicator:
        replicator.wait(timeout_s=20)
    assert rows(restored(client, tmp_path)) == rows(connection)


def test_a_copy_that_was_adopted_and_is_behind_again_has_nothing_to_salvage(tmp_path):
    client = MemoryClient()
    connection = connect(tmp_path / "a.db")
    insert(connection, 10)
    with Replicator(tmp_path / "a.db", client, lease=TERMS, history=None) as owner:
        txid = owner.wait(timeout_s=20)
        copy = restored(client, tmp_path, "b.db")
        other = Replicator(copy, client, lease=TERMS, takeover=True, history=None)
        other.adopt(txid)
        insert(connection, 1)
        owner.wait(timeout_s=20)
    with other:
        assert rows(copy) == rows(connection)
    assert not list(tmp_path.glob("*salvage*"))


def test_a_missing_database_is_restored_and_owned_without_takeover(tmp_path):
    client = MemoryClient()
    connection = connect(tmp_path / "a.db")
    insert(connection, 10)
    with Replicator(tmp_path / "a.db", client, lease=TERMS, history=None) as owner:
        txid = owner.wait(timeout_s=20)
    path = tmp_path / "b.db"
    member = Member(path, lambda: Prepared(Replicator(path, client, lease=TERMS, history=None), [client]), restore_missing=True)
    member.start()
    assert member.state == "replicating", member.error
    assert (member.txid, rows(path)) == (txid + 1, rows(connection))
    member.stop(20)


def test_a_database_whose_lease_is_held_waits_for_its_turn(tmp_path):
    client, path = MemoryClient(), tmp_path / "a.db"
    insert(connect(path), 1)
    other = Lease(client, ttl_s=60, background=False)
    other.acquire()
    member = Member(path, lambda: Prepared(Replicator(path, client, lease=TERMS, history=None), [client]))
    member.start()
    assert (member.state, type(member.error)) == ("waiting", LeaseHeld)
    assert 0 < member.retry_at - time.monotonic() <= 1.0
    other.release()
    member.start()
    assert member.state == "replicating"
    member.stop(20)


# -- standby ---------------------------------------------------------------------------------------------------------------------


def state_folder(database: Path) -> Path:
    return database.with_name(f".{database.name}-litestream") / "pyrepl"


def test_a_standby_follows_takes_over_and_downloads_nothing_twice(tmp_path):
    opened: list[str] = []

    class Watched(MemoryClient):
        def open(self, info, *, offset=0, size=None):
            opened.append(f"{info.level}/{info.name}" if size is None or size > 100 else "header")
            return super().open(info, offset=offset, size=size)

    client, primary, standby = Watched(), tmp_path / "a.db", tmp_path / "b.db"
    connection = connect(primary)
    insert(connection, 500)
    owner = Replicator(primary, client, lease=TERMS, history=None).start()
    owner.wait(timeout_s=20)
    lease, found = Lease(client, ttl_s=60, owner="b"), []
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: found.append(
            wait_until_owner(client, standby, state_folder(standby), lease, stop=stop, poll_s=0.02, interval_s=0.05)
        )
    )
    thread.start()
    until(lambda: (tmp_path / "b.db-txid").exists())
    insert(connection, 20)
    owner.close()  # an orderly end hands over
    thread.join(20)
    assert found == [True]
    assert not (tmp_path / "b.db-txid").exists()
    opened.clear()
    with Replicator(standby, client, lease=lease, takeover=True, history=None, sync_interval_s=0) as replicator:
        other = connect(standby)
        assert rows(other) == rows(connection)
        insert(other, 1)
        replicator.wait(timeout_s=20)
        newest = max(client.list(0), key=lambda info: info.max_txid)
        assert len([name for name in opened if name != "header"]) <= 2, opened  # the newest file, to compare
        assert newest.max_txid > 2
    lease.close()
    assert rows(restored(client, tmp_path)) == rows(other)
    assert not list(tmp_path.glob("*salvage*"))


def test_a_standby_that_was_the_owner_keeps_its_tail_and_follows(tmp_path):
    client, mine, theirs = MemoryClient(), tmp_path / "mine.db", tmp_path / "theirs.db"
    connection = connect(mine)
    insert(connection, 20)
    owner = Replicator(mine, client, lease=TERMS, history=None, sync_interval_s=3600).start()
    owner.wait(timeout_s=20)
    release_lock(client, force=True)
    with Replicator(theirs, client, lease=TERMS, takeover=True, history=None) as other:
        insert(connection, 4)
        with pytest.raises((LeaseLost, Fenced)):
            owner.close()
        connection.close()
        insert(connect(theirs), 2)
        other.wait(timeout_s=20)
        stop, lease = threading.Event(), Lease(client, ttl_s=60, owner="mine")
        thread = threading.Thread(
            target=lambda: wait_until_owner(client, mine, state_folder(mine), lease, stop=stop, poll_s=0.02, interval_s=0.05)
        )
        thread.start()
        until(lambda: (tmp_path / "mine.db-txid").exists())
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
        assert rows(mine) == rows(theirs)
    assert len(list(tmp_path.glob("mine.db-salvage-*.ltx"))) == 1


def test_a_standby_that_was_killed_while_it_left_its_own_database_follows_when_it_starts_again(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    client, mine, theirs = MemoryClient(), tmp_path / "mine.db", tmp_path / "theirs.db"
    connection = connect(mine)
    insert(connection, 20)
    with Replicator(mine, client, lease=TERMS, history=None) as owner:
        owner.wait(timeout_s=20)
    with Replicator(theirs, client, lease=TERMS, takeover=True, history=None) as other:
        insert(connect(theirs), 2)
        other.wait(timeout_s=20)
        unlink = Path.unlink

        def dies(path, **options):
            if path.name == "mine.db-wal":
                raise Killed
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", dies)
        with pytest.raises(Killed):
            wait_until_owner(client, mine, state_folder(mine), Lease(client), stop=threading.Event(), poll_s=0.02)
        monkeypatch.setattr(Path, "unlink", unlink)
        assert (tmp_path / "mine.db-wal").exists()
        stop = threading.Event()
        thread = threading.Thread(
            target=lambda: wait_until_owner(client, mine, state_folder(mine), Lease(client), stop=stop, poll_s=0.02, interval_s=0.05)
        )
        thread.start()
        until(lambda: (tmp_path / "mine.db-txid").exists() or not thread.is_alive())
        stop.set()
        thread.join(20)
        assert rows(mine) == rows(theirs)


def test_a_standby_that_is_stopped_leaves_a_copy_to_continue(tmp_path):
    client, primary, standby = MemoryClient(), tmp_path / "a.db", tmp_path / "b.db"
    connection = connect(primary)
    insert(connection, 5)
    with Replicator(primary, client, lease=TERMS, history=None) as owner:
        owner.wait(timeout_s=20)
        for _ in range(2):
            stop, found = threading.Event(), []
            thread = threading.Thread(
                target=lambda stop=stop, found=found: found.append(
                    wait_until_owner(client, standby, state_folder(standby), Lease(client), stop=stop, poll_s=0.02, interval_s=0.05)
                )
            )
            thread.start()
            until(lambda: (tmp_path / "b.db-txid").exists())
            stop.set()
            thread.join(20)
            assert found == [False]
    assert sqlite3.connect(standby).execute("PRAGMA integrity_check").fetchone() == ("ok",)
