"""Following a replica in memory, tick by tick: every state is the source's, and what cannot be followed is an error."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import random
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from replicator import atomic, follow, inplace, publish, restorer, restores, standby
from replicator.errors import (
    CannotResume,
    CopyChanged,
    CorruptReplica,
    LineageMismatch,
    NonContiguous,
    ObjectNotFound,
    OutputExists,
    ReplicaEmptied,
    StorageUnavailable,
)
from replicator.follow import Follower, read_txid, txid_path
from replicator.format.ltx import TXID, FileInfo, Header, encode_file
from replicator.inplace import InPlace
from replicator.storage.memory import MemoryClient
from tests.disk import Death, Dying

NEVER = threading.Event()


@dataclass(frozen=True)
class History:
    """The states 1, 2, ... of a database, and their page sizes."""

    images: list[bytes]
    sizes: list[int]

    def page(self, txid: int, pgno: int) -> bytes:
        size = self.sizes[txid - 1]
        return self.images[txid - 1][(pgno - 1) * size : pgno * size]

    def commit(self, txid: int) -> int:
        return len(self.images[txid - 1]) // self.sizes[txid - 1] if txid else 0

    def changed(self, txid: int) -> set[int]:
        if txid == 1 or self.sizes[txid - 1] != self.sizes[txid - 2]:
            return set(range(1, self.commit(txid) + 1))
        return {pgno for pgno in range(1, self.commit(txid) + 1) if self.page(txid, pgno) != self.page(txid - 1, pgno)}

    def file(self, low: int, high: int, *, without: frozenset[int] = frozenset()) -> bytes:
        pgnos = set().union(*(self.changed(txid) for txid in range(low, high + 1)))
        pages = [(pgno, self.page(high, pgno)) for pgno in sorted(pgnos - without) if pgno <= self.commit(high)]
        return encode_file(Header(self.sizes[high - 1], self.commit(high), TXID(low), TXID(high), 1_800_000_000_000 + high), pages)

    def put(self, client: MemoryClient, level: int, low: int, high: int) -> FileInfo:
        return client.put(level, TXID(low), TXID(high), self.file(low, high), timestamp_ms=1_800_000_000_000 + high)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Thirty states of a database that changes, grows and shrinks."""
    return made(tmp_path_factory.mktemp("source"), steps=29)


def made(folder: Path, *, steps: int, new_page_size_at: int = 0) -> History:
    source, path = random.Random(3), folder / "source.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA page_size=512")
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
    connection.execute("INSERT INTO t(id, v) VALUES(1, randomblob(100))")
    images, sizes = [path.read_bytes()], [512]
    for step in range(steps):
        if step + 2 == new_page_size_at:
            connection.execute("PRAGMA page_size=1024")
            connection.execute("VACUUM")
        elif step % 7 == 6:
            connection.execute("DELETE FROM t WHERE id % 2")
            connection.execute("VACUUM")
        else:
            connection.executemany("INSERT INTO t(v) VALUES(randomblob(?))", [(source.randrange(900),)] * source.randrange(1, 9))
        connection.execute("UPDATE t SET v = randomblob(50) WHERE id = (SELECT min(id) FROM t)")
        images.append(path.read_bytes())
        sizes.append(connection.execute("PRAGMA page_size").fetchone()[0])
    connection.close()
    return History(images, sizes)


def plain(data: bytes) -> bytes:
    """Without what a copy may have of its own: journal mode and change counter."""
    return data[:18] + data[20:24] + data[28:]


def is_at(output: Path, history: History, txid: int) -> bool:
    return plain(output.read_bytes()) == plain(history.images[txid - 1]) and read_txid(output) == txid


class Session:
    """A follower on a copy, driven by hand; `with` opens and closes it."""

    def __init__(self, client: MemoryClient, folder: Path, **options: bool) -> None:
        self.client, self.folder, self.output, self.options = client, folder, folder / "copy.db", options

    def __enter__(self) -> Follower:
        notes = self.folder / "notes"
        txid = follow._find_txid(self.output, self.options.get("force", False))
        if txid is None:
            txid = follow._begin(self.client, self.output, self.options.get("force", False), "none", 2, lambda _: None, notes)
        self.copy = InPlace(self.output)
        assert self.copy.leave_wal_mode(NEVER)
        return Follower(self.client, self.copy, txid, restores_folder=notes)

    def __exit__(self, *_: object) -> None:
        self.copy.close()


def started(history: History, folder: Path, txid: int = 5) -> MemoryClient:
    """A replica with a snapshot and level 0 up to `txid`, and a copy that has followed it so far."""
    client = MemoryClient()
    history.put(client, 9, 1, 3)
    for number in range(1, txid + 1):
        history.put(client, 0, number, number)
    with Session(client, folder) as follower:
        follower.tick(NEVER)
        assert follower.txid == txid
    assert is_at(folder / "copy.db", history, txid)
    return client


def prune(client: MemoryClient, level: int, last: int) -> None:
    client.delete([info for info in client.list(level) if info.max_txid <= last])


def test_each_file_leads_to_the_next_state(tmp_path: Path, history: History) -> None:
    client = MemoryClient()
    history.put(client, 0, 1, 1)
    with Session(client, tmp_path) as follower:
        assert is_at(tmp_path / "copy.db", history, 1)
        for txid in range(2, 31):
            history.put(client, 0, txid, txid)
            follower.try_tick(NEVER)
            assert is_at(tmp_path / "copy.db", history, txid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.db", "copy.db-txid", "notes"]
    assert txid_path(tmp_path / "copy.db").read_bytes() == b"000000000000001e\n"


@pytest.mark.parametrize("memory", [0, 20000, 1 << 20])
def test_many_files_become_few_changes(tmp_path: Path, history: History, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MEMORY_BYTES", max(1, memory))
    monkeypatch.setattr(follow, "MERGE_BYTES", memory)
    client = started(history, tmp_path)
    for txid in range(6, 31):
        history.put(client, 0, txid, txid)
    seen: list[int] = []
    with Session(client, tmp_path) as follower:
        follower._applied = seen.append
        follower.tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 30)
    assert seen == sorted(seen)
    assert (len(seen) == 25) if memory == 0 else (len(seen) == 1) if memory == 1 << 20 else (1 < len(seen) < 25)


def test_a_merged_change_has_no_page_beyond_its_end(history: History) -> None:
    client, merged = MemoryClient(), follow._Merged()
    shrunk = next(txid for txid in range(3, 31) if history.commit(txid) < history.commit(txid - 1))
    for txid in (shrunk - 1, shrunk):
        info = history.put(client, 0, txid, txid)
        file = follow._fetch(client, info, 512, history.commit(txid - 1), Path(), NEVER)
        merged.add(file)
        file.close()
    pgnos = [pgno for pgno, _ in merged.pages()]
    assert pgnos == sorted(pgnos)
    assert pgnos[-1] <= merged.commit == history.commit(shrunk)


def test_a_fresh_copy_is_in_rollback_mode_and_private(tmp_path: Path, history: History) -> None:
    client = MemoryClient()
    wal = History([image[:18] + b"\2\2" + image[20:] for image in history.images], history.sizes)
    wal.put(client, 0, 1, 1)
    output = tmp_path / "copy.db"
    follow._begin(client, output, False, "none", 2, lambda _: None, tmp_path / "notes")
    assert output.read_bytes()[18:20] == b"\1\1"
    assert output.stat().st_mode & 0o777 == txid_path(output).stat().st_mode & 0o777 | 0o600 == 0o600
    connection = sqlite3.connect(output)
    connection.execute("SELECT count(*) FROM t").fetchone()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.db", "copy.db-txid", "notes"]
    connection.close()
    wal.put(client, 0, 2, 2)
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
    assert output.read_bytes()[18:20] == b"\1\1"


def test_a_copy_of_the_peers_that_still_says_wal_is_continued(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    output = tmp_path / "copy.db"
    data = output.read_bytes()
    output.write_bytes(data[:18] + b"\2\2" + data[20:])
    for suffix in ("-wal", "-shm"):
        output.with_name(output.name + suffix).write_bytes(b"")
    history.put(client, 0, 6, 6)
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
    assert is_at(output, history, 6)
    assert not output.with_name("copy.db-wal").exists()


@pytest.mark.parametrize("snapshot", [2, 5, 7, 8])
def test_resuming_works_whatever_the_newest_snapshot_is(tmp_path: Path, history: History, snapshot: int) -> None:
    client = started(history, tmp_path)
    client.delete(list(client.list(9)))
    history.put(client, 9, 1, snapshot)
    for txid in range(6, 9):
        history.put(client, 0, txid, txid)
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
        follower.tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 8)


def test_compacted_files_bridge_a_gap(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    history.put(client, 1, 4, 9)
    history.put(client, 2, 10, 14)
    for txid in range(18, 21):
        history.put(client, 0, txid, txid)
    history.put(client, 1, 15, 17)
    prune(client, 0, 10)
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 20)


def test_a_late_file_of_a_former_owner_in_a_slot_that_was_free_again_is_not_applied(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    history.put(client, 1, 4, 9)  # the raw ones were merged and are gone
    history.put(client, 0, 10, 10)
    prune(client, 0, 9)
    stray = encode_file(
        Header(history.sizes[5], history.commit(5), TXID(6), TXID(6), 0),
        [(pgno, bytes(history.sizes[5])) for pgno in range(1, history.commit(5) + 1)],
    )
    client.put(0, TXID(6), TXID(6), stray, timestamp_ms=0)
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
        assert follower.txid == 10
    assert is_at(tmp_path / "copy.db", history, 10)


def test_a_full_image_is_applied_in_place_when_nothing_else_leads_on(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    prune(client, 0, 99)
    history.put(client, 9, 1, 21)
    for txid in range(22, 25):
        history.put(client, 0, txid, txid)
    inode = (tmp_path / "copy.db").stat().st_ino
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 24)
    assert (tmp_path / "copy.db").stat().st_ino == inode


def test_an_empty_level_0_does_not_hide_newer_levels(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    prune(client, 0, 99)
    history.put(client, 1, 4, 9)
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
        assert follower.txid == 9
        history.put(client, 1, 10, 12)
        for _ in range(follow.LOOK_TICKS):
            follower.tick(NEVER)
        assert follower.txid == 12
    assert is_at(tmp_path / "copy.db", history, 12)


def test_an_idle_tick_is_one_listing(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    levels: list[int] = []
    listing = client.list
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
        client.list = lambda level, **rest: levels.append(level) or listing(level, **rest)  # type: ignore[method-assign]
        for _ in range(10):
            follower.tick(NEVER)
    assert levels == [0] * 10


def test_a_gap_is_an_error_after_three_ticks(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    history.put(client, 0, 7, 7)
    with Session(client, tmp_path) as follower:
        follower.try_tick(NEVER)
        follower.try_tick(NEVER)
        with pytest.raises(NonContiguous, match="have up to 0000000000000005 but next file starts at 0000000000000007"):
            follower.try_tick(NEVER)
    with Session(client, tmp_path) as follower:
        follower.try_tick(NEVER)
        follower.try_tick(NEVER)
        history.put(client, 0, 6, 6)
        follower.try_tick(NEVER)
        assert follower.txid == 7
    assert is_at(tmp_path / "copy.db", history, 7)


def test_a_replica_that_ends_before_the_copy_is_an_error(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    client.delete([info for level in (0, 9) for info in client.list(level)])
    history.put(client, 0, 1, 1)
    with Session(client, tmp_path) as follower:
        follower.try_tick(NEVER)
        follower.try_tick(NEVER)
        with pytest.raises(ReplicaEmptied):
            follower.try_tick(NEVER)


def test_another_lineage_is_an_error_before_anything_is_applied(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    client.put_control("pyrepl/lineage.json", b'{"lineage": "' + b"a" * 32 + b'"}')
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
        client.put_control("pyrepl/lineage.json", b'{"lineage": "' + b"b" * 32 + b'"}')
        history.put(client, 0, 6, 6)
        follower._ticks = follow.LINEAGE_TICKS
        with pytest.raises(LineageMismatch):
            follower.try_tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 5)


def test_another_lineage_is_an_error_after_a_restart_too(tmp_path: Path, history: History) -> None:
    """A history that began anew under the same URL: its TXIDs go on where the copy stands, and mean something else."""
    client = started(history, tmp_path)
    client.put_control("pyrepl/lineage.json", b'{"lineage": "' + b"a" * 32 + b'"}')
    with Session(client, tmp_path) as follower:
        follower.tick(NEVER)
    client.put_control("pyrepl/lineage.json", b'{"lineage": "' + b"b" * 32 + b'"}')
    history.put(client, 0, 6, 6)
    with Session(client, tmp_path) as follower, pytest.raises(LineageMismatch):
        follower.try_tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 5)
    follow.lineage_path(tmp_path / "copy.db").write_text("nonsense")
    with pytest.raises(CannotResume, match="-lineage"), Session(client, tmp_path):
        pass


def outcome(follower: Follower) -> str:
    try:
        follower.try_tick(NEVER)
    except CorruptReplica as error:
        return str(error)
    return ""


def test_damage_names_the_file_and_what_leads_up_to_it_is_applied(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    good = history.file(7, 7)
    for at in range(0, len(good), 23):
        for damaged in (good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :], good[:at]):
            for suffix in ("", "-txid"):
                (tmp_path / f"copy.db{suffix}").unlink(missing_ok=True)
            client = started(history, tmp_path)
            history.put(client, 0, 6, 6)
            client.put(0, TXID(7), TXID(7), damaged, timestamp_ms=1)
            with Session(client, tmp_path) as follower:
                message = outcome(follower)
            if message:
                assert "0000000000000007-0000000000000007.ltx" in message
                assert is_at(tmp_path / "copy.db", history, 6)
            else:
                assert is_at(tmp_path / "copy.db", history, 7)  # another encoding of the same page


def test_growth_that_is_not_in_the_file_is_refused(tmp_path: Path, history: History) -> None:
    grown = next(txid for txid in range(6, 30) if history.commit(txid) > history.commit(txid - 1) + 1)
    client = started(history, tmp_path, grown - 1)
    data = history.file(grown, grown, without=frozenset({history.commit(grown) - 1}))
    client.put(0, TXID(grown), TXID(grown), data, timestamp_ms=1)
    with Session(client, tmp_path) as follower, pytest.raises(CorruptReplica, match="grows by"):
        follower.try_tick(NEVER)
    huge = encode_file(Header(512, 0xFFFFFFFF, TXID(grown), TXID(grown), 1), [(1, history.page(1, 1))])
    client.put(0, TXID(grown), TXID(grown), huge, timestamp_ms=1)
    with Session(client, tmp_path) as follower, pytest.raises(CorruptReplica, match="grows by"):
        follower.try_tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, grown - 1)


@pytest.mark.parametrize("image", ["level 0 is whole", "level 9", "level 9 of a later state"])
def test_a_new_page_size_is_applied_in_place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, image: str) -> None:
    history = made(tmp_path_factory.mktemp("source"), steps=12, new_page_size_at=8)
    client = started(history, tmp_path)
    for txid in range(6, 12):
        history.put(client, 0, txid, txid)
    if image != "level 0 is whole":
        header = Header(1024, history.commit(8), TXID(8), TXID(8), 1)
        client.put(0, TXID(8), TXID(8), encode_file(header, [(1, history.page(8, 1))]), timestamp_ms=1)
    with Session(client, tmp_path) as follower:
        if image != "level 0 is whole":
            follower.try_tick(NEVER)
            assert is_at(tmp_path / "copy.db", history, 7)
            history.put(client, 9, 1, 8 if image == "level 9" else 10)
        follower.try_tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 11)


def test_an_outage_is_told_once_and_ends_by_itself(tmp_path: Path, history: History, caplog: pytest.LogCaptureFixture) -> None:
    client = started(history, tmp_path)
    history.put(client, 0, 6, 6)
    listing = client.list

    def down(level: int, **rest: object) -> None:
        raise StorageUnavailable("connection refused")

    caplog.set_level(logging.INFO)
    with Session(client, tmp_path) as follower:
        client.list = down  # type: ignore[assignment, method-assign]
        for _ in range(10):
            follower.try_tick(NEVER)
        client.list = listing  # type: ignore[method-assign]
        follower.try_tick(NEVER)
    told = [record.getMessage().split(" replica=")[0] for record in caplog.records]
    assert told.count("follow: replica is unavailable, trying again") == told.count("follow: replica is available again") == 1
    assert is_at(tmp_path / "copy.db", history, 6)


def test_the_wait_between_tries_grows(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)

    class Stop(threading.Event):
        waits: list[float] = []

        def wait(self, timeout: float | None = None) -> bool:
            self.waits.append(timeout or 0.0)
            return len(self.waits) > 9

    def down(level: int, **rest: object) -> None:
        raise StorageUnavailable("connection refused")

    with Session(client, tmp_path) as follower:
        client.list = down  # type: ignore[assignment, method-assign]
        follower.run(Stop(), 1.0)
    assert Stop.waits == [0, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def merged_at_the_first_read(history: History, folder: Path) -> MemoryClient:
    """A replica that is four files ahead of its copy; the first one to be read is merged and deleted at that moment."""
    client = started(history, folder)
    for txid in range(6, 10):
        history.put(client, 0, txid, txid)
    opening = client.open

    def compacted_meanwhile(info: FileInfo, **rest: int) -> object:
        client.open = opening  # type: ignore[method-assign]
        history.put(client, 1, 4, 9)
        prune(client, 0, 8)
        raise ObjectNotFound(info.name)

    client.open = compacted_meanwhile  # type: ignore[assignment, method-assign]
    return client


def test_a_standby_that_has_the_lease_plans_around_a_file_that_is_gone(
    tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = merged_at_the_first_read(history, tmp_path)
    monkeypatch.setattr(standby, "CATCH_UP_RETRY_S", 0.0)
    newest = standby._catch_up(client, tmp_path / "copy.db", NEVER)
    assert newest is not None
    assert newest[0].max_txid == 9
    assert is_at(tmp_path / "copy.db", history, 9)


def test_a_file_that_is_gone_is_planned_around(tmp_path: Path, history: History) -> None:
    client = merged_at_the_first_read(history, tmp_path)
    with Session(client, tmp_path) as follower:
        follower.try_tick(NEVER)
        follower.try_tick(NEVER)
    assert is_at(tmp_path / "copy.db", history, 9)


def test_what_is_read_is_announced(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    history.put(client, 0, 6, 6)
    opening, seen = client.open, []

    def look(info: FileInfo, **rest: int) -> object:
        seen.append(restores.planned(client.url, folder=tmp_path / "notes"))
        return opening(info, **rest)

    with Session(client, tmp_path) as follower:
        client.open = look  # type: ignore[assignment, method-assign]
        follower.tick(NEVER)
    assert seen == [{(0, 6, 6)}]
    assert restores.planned(client.url, folder=tmp_path / "notes") == set()


def test_a_copy_without_its_txid_is_refused_with_the_peers_words(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    txid_path(tmp_path / "copy.db").unlink()
    with pytest.raises(CannotResume, match="cannot resume follow mode: database exists but no -txid file found"), Session(client, tmp_path):
        pass
    assert plain((tmp_path / "copy.db").read_bytes()) == plain(history.images[4])
    history.put(client, 0, 6, 6)
    with Session(client, tmp_path, force=True):
        pass
    assert is_at(tmp_path / "copy.db", history, 6)


@pytest.mark.parametrize("text", [b"", b"5", b"0000000000000000\n", b"000000000000000G\n", b"0000000000000005\n\n", b"\xff" * 1000])
def test_an_unreadable_txid_is_refused(tmp_path: Path, history: History, text: bytes) -> None:
    client = started(history, tmp_path)
    txid_path(tmp_path / "copy.db").write_bytes(text)
    with pytest.raises(CannotResume, match="not readable"), Session(client, tmp_path):
        pass


def test_a_stale_txid_beside_no_copy_is_not_believed(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    (tmp_path / "copy.db").unlink()
    txid_path(tmp_path / "copy.db").write_bytes(b"00000000000000ff\n")
    with Session(client, tmp_path) as follower:
        assert follower.txid == 5
    (tmp_path / "copy.db").unlink()
    (tmp_path / "copy.db-journal").write_bytes(b"something")
    with pytest.raises(OutputExists), Session(client, tmp_path):
        pass
    assert not txid_path(tmp_path / "copy.db").exists()


def test_a_copy_that_was_written_to_is_an_error(tmp_path: Path, history: History) -> None:
    client = started(history, tmp_path)
    history.put(client, 0, 6, 6)
    with Session(client, tmp_path) as follower:
        with (tmp_path / "copy.db").open("ab") as file:
            file.write(bytes(512))
        with pytest.raises(CopyChanged):
            follower.try_tick(NEVER)


def test_a_death_at_any_call_is_survived(tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to the first copy, two changes and an image in place; SQLite judges copies, and the next start goes on."""
    outcomes: set[int | None] = set()
    for death in range(1000):
        folder = tmp_path / str(death)
        folder.mkdir()
        with monkeypatch.context() as patch:
            fake = Dying(death)
            for module in (inplace, atomic, publish, restorer, pathlib):
                patch.setattr(module, "os", fake)
            with contextlib.suppress(Death):
                run_all(folder, history)
        outcomes.add(judge(folder, history))
        run_all(folder, history)
        assert is_at(folder / "copy.db", history, 20)
        assert sorted(path.name for path in folder.iterdir()) == ["copy.db", "copy.db-txid", "notes"], death
        if not fake.dead:
            break
    assert death > 60
    assert outcomes == {None, 3, 4, 5, 20}


def run_all(folder: Path, history: History) -> None:
    client = MemoryClient()
    for txid in range(1, 4):
        history.put(client, 0, txid, txid)
    with Session(client, folder) as follower:
        # The replica may be behind a copy that an earlier run left; each step brings it further.
        for low, high, level in ((4, 4, 0), (5, 5, 0), (1, 20, 9)):
            history.put(client, level, low, high)
            if level == 9:
                prune(client, 0, 99)
            if follower.txid < high:
                follower._ticks = 0
                follower.tick(NEVER)


def judge(folder: Path, history: History) -> int | None:
    """Let SQLite open a copy of what is left, and return which state it finds; the file that says the TXID may say an older one."""
    judged = folder.parent / "judged.db"
    for suffix in ("", "-journal"):
        target, source = judged.with_name(judged.name + suffix), folder / f"copy.db{suffix}"
        target.unlink(missing_ok=True)
        if source.exists():
            target.write_bytes(source.read_bytes())
    if not judged.exists():
        return None
    connection = sqlite3.connect(judged)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    states = [txid for txid in (3, 4, 5, 20) if plain(judged.read_bytes()) == plain(history.images[txid - 1])]
    assert states
    said = read_txid(folder / "copy.db")
    assert said is None or said <= states[-1]
    return states[-1]
