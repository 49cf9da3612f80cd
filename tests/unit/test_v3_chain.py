"""Where a stored generation ends, and when it must not be continued."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.errors import FormatError
from replicator.format.v3 import SegmentInfo, SnapshotInfo, V3Info, encode_frame
from replicator.storage.memory import MemoryClient
from replicator.storage.v3 import V3Client
from replicator.tail import WALPosition
from replicator.v3chain import WALChain, newest_generation, read_tip

G = "0123456789abcdef"
FRAME = 24 + 512


@pytest.fixture(scope="module")
def wal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The WAL of a database with pages of 512 bytes and several transactions."""
    path = tmp_path_factory.mktemp("wal") / "a.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA page_size=512")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(v)")
    for _ in range(5):
        connection.execute("INSERT INTO t VALUES(randomblob(2000))")
    data = Path(f"{path}-wal").read_bytes()
    connection.close()
    return data


def offsets_of_commits(wal: bytes) -> list[int]:
    return [at + FRAME for at in range(32, len(wal), FRAME) if wal[at + 4 : at + 8] != bytes(4)]


class Stored:
    """A generation in memory, cut at commits."""

    def __init__(self, wal: bytes, *, last: int = 1) -> None:
        self.client = V3Client(MemoryClient())
        self.infos: list[V3Info] = [self.client.put_snapshot(G, 0, encode_frame(b"x"))]
        for index in range(last + 1):
            for start, end in zip([0, *offsets_of_commits(wal)], offsets_of_commits(wal), strict=False):
                self.infos.append(self.client.put_segment(G, index, start, encode_frame(wal[start:end])))

    def segments(self, index: int) -> list[SegmentInfo]:
        return [info for info in self.infos if isinstance(info, SegmentInfo) and info.index == index]

    def replace(self, info: SegmentInfo, content: bytes) -> None:
        self.client.put_segment(G, info.index, info.offset, encode_frame(content))


def test_the_tip_is_the_end_of_the_newest_index(wal: bytes) -> None:
    stored = Stored(wal)
    tip = read_tip(stored.client, G, stored.infos)
    assert (tip.index, tip.wal.offset) == (1, len(wal))
    assert tip.wal.checksum == (int.from_bytes(wal[-512 - 8 : -512 - 4], "big"), int.from_bytes(wal[-512 - 4 : -512], "big"))
    assert str(tip.position) == f"{G}/00000001:{len(wal)}"


def test_a_snapshot_alone_has_no_place_in_a_wal(wal: bytes) -> None:
    stored = Stored(wal)
    tip = read_tip(stored.client, G, stored.infos[:1])
    assert not tip.begun
    assert tip.header is None


def without_snapshot(stored: Stored, wal: bytes) -> None:
    del stored.infos[0]


def without_an_index(stored: Stored, wal: bytes) -> None:
    stored.infos = [info for info in stored.infos if not (isinstance(info, SegmentInfo) and info.index == 0)]


def without_a_start(stored: Stored, wal: bytes) -> None:
    stored.infos.remove(stored.segments(0)[0])


def with_a_gap(stored: Stored, wal: bytes) -> None:
    stored.infos.remove(stored.segments(1)[2])


def with_a_flipped_bit(stored: Stored, wal: bytes) -> None:
    info, following = stored.segments(1)[1:3]
    content = bytearray(wal[info.offset : following.offset])
    content[100] ^= 1
    stored.replace(info, bytes(content))


def with_another_end(stored: Stored, wal: bytes) -> None:
    info = stored.segments(1)[-1]
    stored.replace(info, wal[info.offset : -FRAME])


def with_half_a_frame(stored: Stored, wal: bytes) -> None:
    info = stored.segments(1)[-1]
    stored.replace(info, wal[info.offset : -7])


def with_something_else(stored: Stored, wal: bytes) -> None:
    info = stored.segments(1)[-1]
    stored.client.put_segment(G, info.index, info.offset, b"no frame at all")


BREAKS = [
    without_snapshot, without_an_index, without_a_start, with_a_gap, with_a_flipped_bit, with_another_end, with_half_a_frame, with_something_else,
]  # fmt: skip


@pytest.mark.parametrize("change", BREAKS)
def test_what_is_not_whole_is_not_continued(wal: bytes, change: Callable[[Stored, bytes], None]) -> None:
    stored = Stored(wal)
    change(stored, wal)
    with pytest.raises(FormatError):
        read_tip(stored.client, G, stored.infos)


def test_what_is_before_the_newest_snapshot_does_not_matter(wal: bytes) -> None:
    stored = Stored(wal)
    without_an_index(stored, wal)
    stored.infos.append(SnapshotInfo(G, 1, 1, 1))
    assert read_tip(stored.client, G, stored.infos).index == 1


@pytest.mark.parametrize("size", [1, 31, 33, 535, 5000])
def test_any_way_of_cutting_gives_the_same_end(wal: bytes, size: int) -> None:
    chain = WALChain()
    for at in range(0, len(wal), size):
        chain.feed(wal[at : at + size])
    chain.end_segment()
    assert chain.end == WALPosition(chain.end.salts, len(wal), chain.end.checksum)
    assert chain.commit


def test_the_newest_generation_is_that_of_the_newest_file() -> None:
    other = "f" * 16
    stored = {G: [SnapshotInfo(G, 0, 1, 5)], other: [SnapshotInfo(other, 0, 1, 4), SegmentInfo(other, 0, 0, 1, 6)], "0" * 16: []}
    assert newest_generation(stored) == other
    assert newest_generation({}) is None
