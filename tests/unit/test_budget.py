"""Memory that many databases share: never more than the bound, given back by itself, and what has no room is a file with the same bytes."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from replicator.budget import MemoryBudget
from replicator.compactor import compact
from replicator.format.ltx import TXID, FileInfo, Header
from replicator.outbox import FREE_BYTES, OutFile, Staging, encode
from replicator.storage.memory import MemoryClient

PAGES, SIZE = 100, 4096
NOISE = random.Random(7).randbytes(PAGES * SIZE)


def made(staging: Staging, txid: int = 1) -> OutFile:
    header = Header(SIZE, PAGES, TXID(txid), TXID(txid), 1_800_000_000_000)
    pages = [(number + 1, NOISE[number * SIZE : (number + 1) * SIZE]) for number in range(PAGES)]
    return encode(staging, 0, header, pages, unique=True)[0]


def body(out: OutFile) -> bytes:
    return out.body if isinstance(out.body, bytes) else out.body.read_bytes()


def test_threads_never_take_more_than_there_is() -> None:
    budget, most = MemoryBudget(10), [0]

    def work() -> None:
        for _ in range(300):
            if budget.take(3):
                most.append(budget.held_bytes)
                budget.give(3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 3 <= max(most) <= 9
    assert budget.held_bytes == 0
    assert not budget.take(11)


def test_what_has_no_room_goes_through_the_disk_until_others_have_let_go(tmp_path: Path) -> None:
    budget = MemoryBudget(PAGES * SIZE * 3 // 2)  # incompressible, and what the format adds
    one, other = (Staging(tmp_path / name, limit_bytes=1 << 30, memory=budget) for name in ("one", "other"))
    first = made(one)
    assert isinstance(first.body, bytes)
    assert len(first.body) - FREE_BYTES - (1 << 18) <= budget.held_bytes <= budget.limit_bytes
    second = made(other)
    assert isinstance(second.body, Path)
    assert body(first) == body(second)
    kept = first.body
    del first
    assert budget.held_bytes == 0
    assert isinstance(made(other).body, bytes)
    assert kept


def test_a_file_that_cannot_be_made_takes_nothing(tmp_path: Path) -> None:
    budget = MemoryBudget(1 << 20)
    staging = Staging(tmp_path, limit_bytes=1 << 30, memory=budget)

    def pages() -> object:
        yield from ((number + 1, NOISE[:SIZE]) for number in range(PAGES - 1))
        raise OSError("cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        encode(staging, 0, Header(SIZE, PAGES, TXID(1), TXID(1), 0), pages())  # type: ignore[arg-type]
    assert budget.held_bytes == 0


def test_small_files_need_no_room(tmp_path: Path) -> None:
    """Else one database whose replica is away could make all others slower."""
    staging = Staging(tmp_path, limit_bytes=1 << 30, memory=MemoryBudget(0))
    out, _ = encode(staging, 0, Header(SIZE, 1, TXID(1), TXID(1), 0), [(1, NOISE[:SIZE])])
    assert isinstance(out.body, bytes)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_merging_gives_the_same_with_and_without_room(tmp_path: Path, limit: int) -> None:
    client, budget = MemoryClient(), MemoryBudget(limit)
    infos: list[FileInfo] = []
    for txid in (1, 2, 3):
        out = made(Staging(tmp_path / "made", limit_bytes=1 << 30), txid)
        infos.append(client.put(0, out.min_txid, out.max_txid, body(out), timestamp_ms=out.timestamp_ms))

    def read(info: FileInfo) -> object:
        with client.open(info) as stream:
            while data := stream.read(1 << 16):
                yield data

    done = compact(infos, 1, read, Staging(tmp_path / "scratch", limit_bytes=1 << 30, memory=budget))  # type: ignore[arg-type]
    plain = compact(infos, 1, read, Staging(tmp_path / "plain", limit_bytes=1 << 30))  # type: ignore[arg-type]
    assert body(done.out) == body(plain.out)
    assert isinstance(done.out.body, bytes) == (limit > 0)
    del done
    assert budget.held_bytes == 0
