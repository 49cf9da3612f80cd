"""Merging files is applying them in order; whatever is wrong with an input is found before there is a result."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import compactor
from replicator.compactor import FAN_IN, GATHER_BYTES, compact
from replicator.errors import CorruptReplica, ObjectNotFound
from replicator.format.ltx import TXID, FileInfo, Header, decode_file, encode_file
from replicator.format.sqlite import lock_pgno
from replicator.outbox import OutFile, Staging
from replicator.storage.memory import MemoryClient

SIZE = 512
both_ways = pytest.mark.parametrize("gather_bytes", [0, GATHER_BYTES], ids=["side by side", "gathered"])


def page(pgno: int, version: int, size: int = SIZE) -> bytes:
    return bytes([pgno % 256, version % 256]) * (size // 2)


def put(client: MemoryClient, low: int, high: int, commit: int, pgnos: Iterable[int], *, page_size: int = SIZE) -> FileInfo:
    header = Header(page_size, commit, TXID(low), TXID(high), 1_800_000_000_000 + high, wal_offset=32, wal_salt1=7, node_id=9)
    data = encode_file(header, [(pgno, page(pgno, high, page_size)) for pgno in pgnos])
    return client.put(0, TXID(low), TXID(high), data, timestamp_ms=header.timestamp_ms)


def reading(client: MemoryClient):
    def read(info: FileInfo) -> Iterator[bytes]:
        with client.open(info) as stream:
            while data := stream.read(100):
                yield data

    return read


def body(out: OutFile) -> bytes:
    return out.body if isinstance(out.body, bytes) else out.body.read_bytes()


@pytest.fixture
def scratch(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "scratch", limit_bytes=1 << 30)


def test_the_result_is_the_peers_field_by_field(scratch: Staging) -> None:
    client = MemoryClient()
    files = [put(client, 5, 5, 4, [1, 3]), put(client, 6, 8, 6, [1, 5, 6]), put(client, 9, 9, 5, [2, 5])]
    done = compact(files, 1, reading(client), scratch)
    header, pages, trailer = decode_file(body(done.out))
    assert header == Header(SIZE, 5, TXID(5), TXID(9), 1_800_000_000_009)
    assert pages == [(1, page(1, 8)), (2, page(2, 9)), (3, page(3, 5)), (5, page(5, 9))]
    assert trailer.post_apply_checksum == 0
    assert (done.taken, done.out.level, done.out.min_txid, done.out.max_txid) == (3, 1, 5, 9)
    assert done.out.timestamp_ms == 1_800_000_000_009


@given(
    steps=st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(1, 9))), min_size=1, max_size=3 * FAN_IN),
    first=st.sampled_from([1, 7]),
    gather_bytes=st.sampled_from([0, 700, GATHER_BYTES]),
    small_bytes=st.sampled_from([200, 300, compactor.SMALL_FILE_BYTES]),
)
def test_merging_is_applying_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, set[int]]], first: int, gather_bytes: int, small_bytes: int
) -> None:
    client, model, files, commit = MemoryClient(), {}, [], 0
    for txid, (size, changed) in enumerate(steps, start=first):
        grown = set(range(commit + 1, size + 1)) if txid == 1 or txid > first else set()
        pgnos = sorted({n for n in changed if n <= size} | grown)
        files.append(put(client, txid, txid, size, pgnos))
        model = {n: image for n, image in model.items() if n <= size} | {n: page(n, txid) for n in pgnos}
        commit = size
    folder = tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compactor, "SMALL_FILE_BYTES", small_bytes)
        done = compact(files, 2, reading(client), Staging(folder, limit_bytes=1 << 30), gather_bytes=gather_bytes)
    header, pages, _ = decode_file(body(done.out))
    assert (header.commit, header.min_txid, header.max_txid) == (commit, first, first + len(steps) - 1)
    assert dict(pages) == model
    assert done.taken == len(steps)
    assert [path for path in folder.iterdir() if path != done.out.body] == []


@pytest.mark.parametrize(("count", "gather_bytes"), [(3, 0), (3, GATHER_BYTES), (2 * FAN_IN + 3, 0)])
def test_each_damaged_input_is_named_and_nothing_is_left(scratch: Staging, count: int, gather_bytes: int) -> None:
    client = MemoryClient()
    files = [put(client, n, n, 4, [1, 2, 3, 4] if n == 1 else [2]) for n in range(1, count + 1)]
    expected = decode_file(body(compact(files, 1, reading(client), scratch, gather_bytes=gather_bytes).out))[1]
    for victim in (files[0], files[-1]):
        with client.open(victim) as stream:
            good = stream.read()
        for at in range(len(good)):
            damaged = good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :]
            client.put(0, victim.min_txid, victim.max_txid, damaged, timestamp_ms=1)
            try:
                done = compact(files, 1, reading(client), scratch, gather_bytes=gather_bytes)
            except CorruptReplica as error:
                assert victim.name in error.name  # noqa: PT017
            else:
                assert decode_file(body(done.out))[1] == expected  # another encoding of the same page
        client.put(0, victim.min_txid, victim.max_txid, good, timestamp_ms=1)
    assert list(scratch.folder.iterdir()) == []


def test_a_file_that_is_gone_is_an_error_and_leaves_nothing(scratch: Staging) -> None:
    client = MemoryClient()
    files = [put(client, n, n, 1, [1]) for n in range(1, 2 * FAN_IN)]
    client.delete([files[-1]])
    with pytest.raises(ObjectNotFound):
        compact(files, 1, reading(client), scratch)
    assert list(scratch.folder.iterdir()) == []


@pytest.mark.fault("F71")
@pytest.mark.parametrize("change", [1, 5, FAN_IN, FAN_IN + 1, 2 * FAN_IN])
@both_ways
def test_merging_never_crosses_a_change_of_the_page_size(scratch: Staging, change: int, gather_bytes: int) -> None:
    client = MemoryClient()
    files = [
        put(client, n, n, 2, [1, 2] if n in (1, change + 1) else [1], page_size=SIZE if n <= change else 1024)
        for n in range(1, 2 * FAN_IN + 5)
    ]
    done = compact(files, 1, reading(client), scratch, gather_bytes=gather_bytes)
    assert (done.taken, done.out.max_txid) == (change, change)
    rest = compact(files[done.taken :], 1, reading(client), scratch, gather_bytes=gather_bytes)
    assert (rest.out.min_txid, rest.out.max_txid) == (change + 1, 2 * FAN_IN + 4)
    assert decode_file(body(rest.out))[0].page_size == 1024
    assert [path for path in scratch.folder.iterdir() if path not in (done.out.body, rest.out.body)] == []


def test_gaps_and_wrong_names_are_refused(scratch: Staging) -> None:
    client = MemoryClient()
    files = [put(client, 1, 1, 1, [1]), put(client, 3, 3, 1, [1])]
    with pytest.raises(CorruptReplica, match="do not follow each other"):
        compact(files, 1, reading(client), scratch)
    with client.open(files[0]) as stream:
        wrong = client.put(0, TXID(2), TXID(2), stream.read(), timestamp_ms=1)
    with pytest.raises(CorruptReplica, match="not those of the name"):
        compact([files[0], wrong], 1, reading(client), scratch)


def test_the_lock_page_stays_out(scratch: Staging) -> None:
    client = MemoryClient()
    lock = lock_pgno(65536)
    files = [
        put(client, 2, 2, lock + 1, [lock - 1, lock + 1], page_size=65536),
        put(client, 3, 3, lock + 2, [lock + 1, lock + 2], page_size=65536),
    ]
    done = compact(files, 1, reading(client), scratch)
    assert [pgno for pgno, _ in decode_file(body(done.out))[1]] == [lock - 1, lock + 1, lock + 2]


@pytest.mark.fault("F25")
@both_ways
def test_memory_does_not_grow_with_what_compresses_well(scratch: Staging, gather_bytes: int) -> None:
    """Pages of zeros: the files are small, but all their pages together are 64 MB each."""
    client = MemoryClient()
    zeros, files = bytes(65536), []
    for txid in range(1, 9):
        header = Header(65536, 1000, TXID(txid), TXID(txid), 1)
        files.append(client.put(0, TXID(txid), TXID(txid), encode_file(header, [(n, zeros) for n in range(1, 1001)]), timestamp_ms=1))
    tracemalloc.start()
    done = compact(files, 1, reading_whole(client), scratch, gather_bytes=gather_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.taken == 8
    assert peak < 100 << 20


def test_damage_is_named_as_the_caller_knows_the_file_whatever_the_store_calls_it(scratch: Staging) -> None:
    client = MemoryClient()
    files = [put(client, 1, 1, 1, [1]), put(client, 2, 2, 1, [1])]

    def read(info: FileInfo) -> Iterator[bytes]:
        if info.max_txid == 2:
            raise CorruptReplica("age+somewhere/else", "not to be decrypted")
        yield from reading(client)(info)

    with pytest.raises(CorruptReplica, match="not to be decrypted") as caught:
        compact(files, 1, read, scratch)
    assert caught.value.name == f"level 0 {files[1].name}"


@both_ways
def test_many_runs_do_not_stay_in_memory(scratch: Staging, gather_bytes: int) -> None:
    client = MemoryClient()
    noise = [random.Random(n).randbytes(65536) for n in range(3)]
    files = []
    for txid in range(1, 40 * FAN_IN):
        header = Header(65536, 3, TXID(txid), TXID(txid), 1)
        body = encode_file(header, [(n + 1, noise[(n + txid) % 3]) for n in range(3 if txid == 1 else 1)])
        files.append(client.put(0, TXID(txid), TXID(txid), body, timestamp_ms=1))
    tracemalloc.start()
    done = compact(files, 1, reading_whole(client), scratch, gather_bytes=gather_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.taken == len(files)
    assert peak < 40 << 20
    assert list(scratch.folder.iterdir()) == []


def reading_whole(client: MemoryClient):
    def read(info: FileInfo) -> Iterator[bytes]:
        with client.open(info) as stream:
            yield stream.read()

    return read
