"""Restore from hostile and unsteady replicas, through a store in memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import tracemalloc
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import replicator
from replicator import chain
from replicator.chain import read_chain
from replicator.errors import (
    CorruptReplica,
    NoBackups,
    NonContiguous,
    ObjectNotFound,
    OutputExists,
    StorageUnavailable,
    TimestampNotAvailable,
)
from replicator.format.ltx import TXID, FileInfo, Header, encode_file, index_range
from replicator.restorer import restore_database
from replicator.storage.base import ReplicaClient, created_at
from replicator.storage.file import FileClient
from replicator.storage.memory import MemoryClient
from replicator.v3restore import newest_first

SIZE = 512


def page(pgno: int, version: int) -> bytes:
    return bytes([pgno % 256, version % 256]) * (SIZE // 2)


def store(client: ReplicaClient, level: int, low: int, high: int, commit: int, pgnos: list[int], *, page_size: int = SIZE) -> FileInfo:
    header = Header(page_size, commit, TXID(low), TXID(high), 1_800_000_000_000 + high)
    images = [(pgno, (page(pgno, high) * (page_size // SIZE))) for pgno in pgnos]
    data = encode_file(header, images)
    return client.put(level, TXID(low), TXID(high), data, timestamp_ms=header.timestamp_ms)


def chain_of_three(client: MemoryClient) -> None:
    store(client, 0, 1, 1, 4, [1, 2, 3, 4])
    store(client, 0, 2, 2, 6, [1, 3, 5, 6])
    store(client, 0, 3, 3, 5, [1, 5])


def restored(client: MemoryClient, folder: Path, **options: object) -> bytes:
    output = folder / "out.db"
    output.unlink(missing_ok=True)
    restore_database(client, output, **options)  # type: ignore[arg-type]
    return output.read_bytes()


def test_a_write_that_takes_only_a_part_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MemoryClient()
    chain_of_three(client)
    whole = restored(client, tmp_path)
    monkeypatch.setattr(os, "pwritev", lambda file, pages, at: os.pwrite(file, b"".join(pages)[: SIZE - 1], at))
    assert restored(client, tmp_path) == whole
    assert len(whole) == 5 * SIZE


def test_each_page_comes_from_the_newest_file_and_the_end_is_cut(tmp_path: Path) -> None:
    client = MemoryClient()
    chain_of_three(client)
    assert restored(client, tmp_path) == page(1, 3) + page(2, 1) + page(3, 2) + page(4, 1) + page(5, 3)
    assert restored(client, tmp_path, txid=TXID(2)) == page(1, 2) + page(2, 1) + page(3, 2) + page(4, 1) + page(5, 2) + page(6, 2)


@settings(max_examples=50)
@given(steps=st.lists(st.tuples(st.integers(1, 12), st.sets(st.integers(1, 12))), min_size=1, max_size=8))
def test_restoring_is_applying_all_files_in_order(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, set[int]]]) -> None:
    client, model, commit = MemoryClient(), {}, 0
    for txid, (size, changed) in enumerate(steps, start=1):
        pgnos = sorted(
            {n for n in changed if n <= size} | set(range(commit + 1, size + 1)) | (set(range(1, size + 1)) if txid == 1 else {1})
        )
        store(client, 0, txid, txid, size, pgnos)
        model = {n: image for n, image in model.items() if n <= size} | {n: page(n, txid) for n in pgnos}
        commit = size
    got = restored(client, tmp_path_factory.mktemp("model"), parallelism=3)
    assert got == b"".join(model[n] for n in range(1, commit + 1))


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    client, seen = MemoryClient(), []
    chain_of_three(client)
    restored(client, tmp_path, progress=seen.append)
    assert (seen[-1].files_done, seen[-1].bytes_done) == (3, seen[-1].bytes_total)


@pytest.mark.parametrize("kind", ["directory", "network"])
def test_files_that_no_network_is_waited_for_are_decoded_by_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Several at once would hand the interpreter lock around at each page: 100,000 times for 200 files of 20 pages.
    client = FileClient(tmp_path) if kind == "directory" else MemoryClient()
    noise = os.urandom(SIZE * 64)
    header = Header(SIZE, 64, TXID(1), TXID(1), 1_800_000_000_000)
    image = encode_file(header, [(pgno, noise[(pgno - 1) * SIZE : pgno * SIZE]) for pgno in range(1, 65)])
    client.put(0, TXID(1), TXID(1), image, timestamp_ms=header.timestamp_ms)
    for txid in range(2, 40):
        store(client, 0, txid, txid, 64, [txid])
    monkeypatch.setattr(chain, "SMALL_FILE_BYTES", len(image) - 1)
    writers: dict[int, str] = {}
    another = threading.Event()

    def write(first: int, pages: Sequence[bytes]) -> None:
        is_first, here = not writers, threading.current_thread().name
        writers.update(dict.fromkeys(range(first, first + len(pages)), here))
        if len(set(writers.values())) > 1:
            another.set()
        elif is_first:
            another.wait(0.3)  # time for others, if there are any

    read_chain(client, list(client.list(0)), write)
    assert sorted(writers) == list(range(1, 65))
    at_hand = range(1, 65) if kind == "directory" else range(2, 40)
    assert len({writers[pgno] for pgno in at_hand}) == 1


def test_an_empty_replica_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoBackups):
        restored(MemoryClient(), tmp_path)


def test_a_time_at_or_before_the_first_state_names_the_range(tmp_path: Path) -> None:
    client = MemoryClient()
    chain_of_three(client)
    first, last = created_at(1_800_000_000_001), created_at(1_800_000_000_003)
    for when in (first - timedelta(days=1), first, last + timedelta(days=1)):
        with pytest.raises(TimestampNotAvailable) as caught:
            restored(client, tmp_path, timestamp=when)
        assert (caught.value.oldest, caught.value.newest) == (first, last)
        assert f"stored: {first.isoformat()} to {last.isoformat()}" in str(caught.value)


def test_a_time_in_a_chain_without_a_beginning_does_not_promise_a_range(tmp_path: Path) -> None:
    client = MemoryClient()
    store(client, 0, 2, 2, 4, [1])
    store(client, 0, 3, 3, 4, [1])
    with pytest.raises(TimestampNotAvailable) as caught:
        restored(client, tmp_path, timestamp=created_at(1_800_000_000_003))
    assert (caught.value.oldest, caught.value.newest) == (None, None)
    with pytest.raises(NonContiguous) as gap:
        restored(client, tmp_path)
    assert "-txid" not in gap.value.hint


def test_the_range_begins_where_a_chain_does(tmp_path: Path) -> None:
    client = MemoryClient()
    store(client, 0, 2, 2, 4, [1])
    store(client, 9, 1, 3, 4, [1, 2, 3, 4])
    with pytest.raises(TimestampNotAvailable) as caught:
        restored(client, tmp_path, timestamp=created_at(1_800_000_000_003))
    assert caught.value.oldest == created_at(1_800_000_000_003)


def replace(client: MemoryClient, txid: int, data: bytes) -> None:
    client.put(0, TXID(txid), TXID(txid), data, timestamp_ms=1_800_000_000_000)


def read(client: MemoryClient, txid: int) -> bytes:
    [info] = [info for info in client.list(0) if info.max_txid == txid]
    with client.open(info) as stream:
        return stream.read()


def outcome(client: MemoryClient, folder: Path) -> tuple[bytes, CorruptReplica | None]:
    try:
        return restored(client, folder), None
    except CorruptReplica as error:
        return b"", error


@pytest.mark.fault("F51")
@pytest.mark.parametrize("txid", [1, 2, 3])
def test_every_damaged_byte_of_every_file_is_found(tmp_path: Path, txid: int) -> None:
    """Also in pages that a later file replaces, and for truncation at every length."""
    client = MemoryClient()
    chain_of_three(client)
    expected, good = restored(client, tmp_path), read(client, txid)
    for at in range(len(good)):
        for damaged in (good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :], good[:at]):
            replace(client, txid, damaged)
            got, error = outcome(client, tmp_path)
            if error is None:
                assert got == expected  # another encoding of the same page
                continue
            assert f"{txid:016x}-{txid:016x}.ltx" in str(error)
            assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("F51")
def test_an_index_that_lies_is_found(tmp_path: Path) -> None:
    """The index claims another page than the frames hold; a file that is read twice could show different contents, too."""
    client = MemoryClient()
    chain_of_three(client)
    data = bytearray(read(client, 3))
    offset, size = index_range(len(data), bytes(data[-24:]))
    at = data.index(5, offset, offset + size)
    data[at] = 4
    replace(client, 3, bytes(data))
    with pytest.raises(CorruptReplica, match="0000000000000003"):
        restored(client, tmp_path)


def test_mixed_page_sizes_are_refused(tmp_path: Path) -> None:
    client = MemoryClient()
    store(client, 0, 1, 1, 1, [1])
    store(client, 0, 2, 2, 1, [1], page_size=1024)
    with pytest.raises(CorruptReplica, match="mismatched page sizes"):
        restored(client, tmp_path)


def test_a_page_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    client = MemoryClient()
    store(client, 0, 1, 1, 1, [1])
    store(client, 0, 2, 2, 3, [3])
    with pytest.raises(CorruptReplica, match="page 2 of the database is in no file"):
        restored(client, tmp_path)


@pytest.mark.fault("F52")
def test_a_huge_commit_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    client = MemoryClient()
    store(client, 0, 1, 1, 1, [1])
    store(client, 0, 2, 2, 0xFFFFFFFF, [1])
    with contextlib.suppress(CorruptReplica):
        restored(client, tmp_path)  # so that everything is imported
    tracemalloc.start()
    try:
        with pytest.raises(CorruptReplica, match="is in no file"):
            restored(client, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


class Unsteady(MemoryClient):
    """Drops a connection after some bytes, as often as told."""

    def __init__(self, drops: int) -> None:
        super().__init__()
        self.drops = drops

    def open(self, info, *, offset=0, size=None):
        stream = super().open(info, offset=offset, size=size)
        if not self.drops:
            return stream
        outer, inner = self, stream.read
        given = threading.local()

        class Dropping(type(stream)):
            def read(self, size=-1, /):
                if getattr(given, "yes", False):
                    outer.drops -= 1
                    raise StorageUnavailable("dropped")
                given.yes = True
                return inner(60)

        return Dropping(stream.getvalue())


@pytest.mark.fault("F33")
def test_a_dropped_connection_is_resumed_at_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Unsteady(0)
    store(client, 0, 1, 1, 4, [1, 2, 3, 4])
    expected = restored(client, tmp_path)
    naps: list[float] = []
    client.drops = 3
    [info] = client.list(0)
    assert b"".join(chain.read_file(client, info, sleep=naps.append)) == read(client, 1)
    assert naps == [0.25, 0.5, 1.0]
    client.drops = 4
    with pytest.raises(StorageUnavailable):
        list(chain.read_file(client, info, sleep=naps.append))
    client.drops = 0
    assert restored(client, tmp_path) == expected


@pytest.mark.fault("F34")
def test_a_file_that_retention_deletes_meanwhile_is_planned_around(tmp_path: Path) -> None:
    class Pruning(MemoryClient):
        pruned = False

        def open(self, info, *, offset=0, size=None):
            if info.level == 0 and info.max_txid == 2 and not self.pruned:
                self.pruned = True
                self.delete([info for info in self.list(0) if info.max_txid <= 2])
                store(self, 1, 1, 2, 6, [1, 2, 3, 4, 5, 6])
                raise ObjectNotFound(info.name)
            return super().open(info, offset=offset, size=size)

    client = Pruning()
    chain_of_three(client)
    assert restored(client, tmp_path)[:SIZE] == page(1, 3)
    assert client.pruned


@pytest.mark.fault("F61")
def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    class Intruder(MemoryClient):
        def open(self, info, *, offset=0, size=None):
            (tmp_path / "out.db").write_text("mine")
            return super().open(info, offset=offset, size=size)

    client = Intruder()
    chain_of_three(client)
    with pytest.raises(OutputExists):
        restore_database(client, tmp_path / "out.db")
    assert [path.name for path in tmp_path.iterdir()] == ["out.db"]
    assert (tmp_path / "out.db").read_text() == "mine"


@pytest.mark.fault("F61")
def test_mode_is_kept_with_force_and_private_otherwise(tmp_path: Path) -> None:
    client = MemoryClient()
    chain_of_three(client)
    output = tmp_path / "out.db"
    restore_database(client, output)
    assert output.stat().st_mode & 0o777 == 0o600
    output.chmod(0o640)
    restore_database(client, output, force=True)
    assert output.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owner_is_kept_with_force(tmp_path: Path) -> None:
    client = MemoryClient()
    chain_of_three(client)
    output = tmp_path / "out.db"
    restore_database(client, output)
    os.chown(output, 1234, 2345)
    restore_database(client, output, force=True)
    assert (output.stat().st_uid, output.stat().st_gid) == (1234, 2345)


def test_what_a_killed_restore_left_is_swept_and_a_live_one_is_not_touched(tmp_path: Path) -> None:
    dead, suffix, live = (tmp_path / name for name in (".out.db.aa.restore", ".out.db.aa.restore-wal", ".out.db.bb.restore"))
    for path in (dead, suffix, live):
        path.write_bytes(b"half")
    client = MemoryClient()
    chain_of_three(client)
    with live.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        restore_database(client, tmp_path / "out.db")
    assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, "out.db"]


class Down(MemoryClient):
    def list(self, level, **options):
        raise StorageUnavailable("connection refused")


def damaged() -> MemoryClient:
    client = MemoryClient()
    chain_of_three(client)
    data = bytearray(read(client, 2))
    data[len(data) // 2] ^= 0x10
    replace(client, 2, bytes(data))
    return client


@pytest.mark.parametrize("bad", [Down(), MemoryClient(), damaged()], ids=["unreachable", "empty", "damaged"])
def test_the_next_replica_is_tried_and_the_bad_one_named(tmp_path: Path, bad: MemoryClient, caplog: pytest.LogCaptureFixture) -> None:
    good = MemoryClient()
    chain_of_three(good)
    bad.url, good.url = "memory://bad", "memory://good"
    result = replicator.restore([bad, good], tmp_path / "out.db")
    assert (result.txid, result.url) == (3, "memory://good")
    [record] = caplog.records
    assert "replica passed over" in record.getMessage()
    assert "replica=memory://bad error=" in record.getMessage()


def test_when_all_replicas_fail_the_error_of_the_one_that_leads_furthest_is_raised(tmp_path: Path) -> None:
    with pytest.raises(CorruptReplica, match="checksum mismatch"):
        replicator.restore([Down(), MemoryClient(), damaged()], tmp_path / "out.db")
    with pytest.raises(StorageUnavailable, match="connection refused"):
        replicator.restore([MemoryClient(), Down()], tmp_path / "out.db")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no replicas"):
        replicator.restore([], tmp_path / "out.db")


def test_of_several_replicas_the_one_that_leads_furthest_is_restored(tmp_path: Path) -> None:
    """A replica may have been away while another one acknowledged: what stands first is not what is newest."""
    behind, ahead = MemoryClient(), MemoryClient()
    behind.url, ahead.url = "memory://behind", "memory://ahead"
    chain_of_three(ahead)
    store(behind, 0, 1, 1, 4, [1, 2, 3, 4])
    assert replicator.restore([behind, ahead], tmp_path / "newest.db").url == "memory://ahead"
    when = datetime.fromtimestamp((1_800_000_000_000 + 1) / 1000, UTC) + timedelta(milliseconds=1)
    store(behind, 9, 1, 5, 4, [1, 2, 3, 4])  # filled by an image after an outage: what lies between is not there
    assert replicator.restore([behind, ahead], tmp_path / "image.db").url == "memory://behind"
    between = replicator.restore([behind, ahead], tmp_path / "between.db", timestamp=when + timedelta(milliseconds=1))
    assert (between.url, between.txid) == ("memory://ahead", 2)


def test_all_replicas_must_answer_before_a_lost_database_begins_anew(tmp_path: Path) -> None:
    client = MemoryClient()
    chain_of_three(client)
    assert newest_first([MemoryClient(), client], all_must_answer=True)[0] is client
    with pytest.raises(StorageUnavailable):
        newest_first([client, Down()], all_must_answer=True)


@pytest.mark.fault("F32")
def test_raw_files_are_listed_before_all_others() -> None:
    """What is merged and deleted between two listings is then found in the level above."""

    class Moving(MemoryClient):
        kind = "s3"
        listed: list[int] = []

        def list(self, level, **options):
            self.listed.append(level)
            return super().list(level, **options)

    client = Moving()
    chain.list_files(client)
    assert client.listed[0] == 0
    assert sorted(client.listed) == list(range(10))


@pytest.mark.fault("F31")
def test_an_object_that_is_shorter_than_it_was_listed_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MemoryClient()
    store(client, 0, 1, 1, 4, [1, 2, 3, 4])
    [info] = client.list(0)
    replace(client, 1, read(client, 1)[:100])
    with pytest.raises(CorruptReplica, match=f"{info.name}: the stream ended at 100 of {info.size} bytes"):
        list(chain.read_file(client, info, sleep=lambda _: None))


def test_an_existing_output_is_not_the_replicas_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = MemoryClient()
    chain_of_three(client)
    (tmp_path / "out.db").write_text("mine")
    with pytest.raises(OutputExists):
        replicator.restore([client, client], tmp_path / "out.db")
    assert caplog.records == []
