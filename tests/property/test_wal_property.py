"""Properties of the WAL codec on generated logs."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from replicator.format.checksum import wal_checksum
from replicator.format.wal import newest_frames, scan_frames

SIZE = 536
SALTS = (0x01020304, 0xFFFFFFFF)
words = st.integers(0, 2**32 - 1)
rows = st.lists(st.tuples(st.integers(1, 2**32 - 1), st.one_of(st.just(0), words), st.binary(min_size=1, max_size=8)), max_size=12)


def log(frames: list[tuple[int, int, bytes]], sums: tuple[int, int], big_endian: bool) -> bytes:
    out = b""
    for pgno, commit, fill in frames:
        image = (fill * 512)[:512]
        head = struct.pack(">II", pgno, commit)
        sums = wal_checksum(head + image, *sums, big_endian=big_endian)
        out += head + struct.pack(">4I", *SALTS, *sums) + image
    return out


@given(rows, words, words, st.booleans())
def test_frames_come_back_as_they_were_written(frames: list[tuple[int, int, bytes]], s0: int, s1: int, big_endian: bool) -> None:
    found = scan_frames(log(frames, (s0, s1), big_endian), page_size=512, salts=SALTS, checksum=(s0, s1), big_endian=big_endian)
    assert list(zip(found.pgnos.tolist(), found.commits.tolist(), strict=True)) == [frame[:2] for frame in frames]
    commits = [index + 1 for index, frame in enumerate(frames) if frame[1]]
    assert found.committed() == (commits[-1] if commits else 0)


@given(rows.filter(bool), st.booleans(), st.data())
def test_a_flipped_bit_ends_the_log_at_its_frame(frames: list[tuple[int, int, bytes]], big_endian: bool, data: st.DataObject) -> None:
    raw = bytearray(log(frames, (1, 2), big_endian))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    found = scan_frames(bytes(raw), page_size=512, salts=SALTS, checksum=(1, 2), big_endian=big_endian)
    assert len(found) == bit // 8 // SIZE


@given(rows, st.booleans(), st.data())
def test_a_scan_in_two_parts_gives_the_same_frames(frames: list[tuple[int, int, bytes]], big_endian: bool, data: st.DataObject) -> None:
    raw = log(frames, (5, 6), big_endian)
    at = data.draw(st.integers(0, len(frames)))
    cut = at * SIZE + data.draw(st.integers(0, SIZE - 1))
    first = scan_frames(raw[:cut], page_size=512, salts=SALTS, checksum=(5, 6), big_endian=big_endian)
    assert len(first) == min(at, len(frames))
    sums = tuple(first.checksums[-1].tolist()) if len(first) else (5, 6)
    rest = scan_frames(raw[len(first) * SIZE :], page_size=512, salts=SALTS, checksum=sums, big_endian=big_endian)
    assert first.pgnos.tolist() + rest.pgnos.tolist() == [frame[0] for frame in frames]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 25))
def test_newest_frames_equals_a_dict(pgnos: list[int], limit: int) -> None:
    model = {pgno: index for index, pgno in enumerate(pgnos) if pgno <= limit}
    distinct, index = newest_frames(np.array(pgnos, dtype=np.uint32), limit)
    assert list(zip(distinct.tolist(), index.tolist(), strict=True)) == sorted(model.items())
