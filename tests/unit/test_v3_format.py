from __future__ import annotations

import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import FormatError, Truncated
from replicator.format.v3 import (
    FrameDecoder,
    FrameEncoder,
    Position,
    SegmentInfo,
    SnapshotInfo,
    encode_frame,
    is_generation,
    parse_index,
    parse_position,
    parse_segment_name,
    parse_snapshot_name,
    segment_name,
    segments_folder,
    snapshot_name,
)

GENERATION = "0123456789abcdef"


def decode(frame: bytes, cut: int = 1 << 20, **limits: int) -> bytes:
    decoder = FrameDecoder(**limits)
    pieces = [piece for at in range(0, len(frame), cut) for piece in decoder.feed(frame[at : at + cut])]
    decoder.close()
    return b"".join(pieces)


@given(index=st.integers(0, 0xFFFFFFFF), offset=st.integers(0, (1 << 64) - 1))
def test_names_come_back(index: int, offset: int) -> None:
    assert parse_snapshot_name(snapshot_name(index)) == index
    assert parse_segment_name(segment_name(index, offset)) == (index, offset)


def test_names_are_litestreams() -> None:
    assert SnapshotInfo(GENERATION, 0x2A, 0, 0).name == f"generations/{GENERATION}/snapshots/0000002a.snapshot.lz4"
    assert SegmentInfo(GENERATION, 1, 24752, 0, 0).name == f"generations/{GENERATION}/wal/00000001_000060b0.wal.lz4"
    assert segment_name(1, 0x123456789) == "00000001_123456789.wal.lz4"


@pytest.mark.parametrize(
    "name",
    [
        "0000000A.snapshot.lz4",
        "00000000.snapshot.lz4.tmp",
        "0.snapshot.lz4",
        "00000000_0000000.wal.lz4",
        "00000000_000000000.wal.lz4",
        "00000000_00000000.wal.lz4\n",
        "00000000_00000000000000000.wal.lz4",
        "",
    ],
)
def test_other_names_are_none(name: str) -> None:
    assert parse_snapshot_name(name) is None
    assert parse_segment_name(name) is None


def test_only_sixteen_small_hex_digits_are_a_generation() -> None:
    assert is_generation(GENERATION)
    for name in (GENERATION.upper(), GENERATION[:-1], GENERATION + "0", "../" + GENERATION[3:], GENERATION[:-1] + "\n"):
        assert not is_generation(name)
        with pytest.raises(ValueError, match="not a generation"):
            segments_folder(name)


def test_positions_order_and_come_back() -> None:
    position = Position(GENERATION, 10, 24752)
    assert str(position) == f"{GENERATION}/0000000a:24752"
    assert parse_position(str(position)) == position
    assert Position(GENERATION, 9, 1 << 40) < position < Position(GENERATION, 10, 24753)
    for text in ("", f"{GENERATION}/a:0", f"{GENERATION}/0000000a:-1", f"{GENERATION}/0000000A:0"):
        with pytest.raises(FormatError):
            parse_position(text)


def test_an_index_is_hex_without_prefix() -> None:
    assert parse_index("1f") == 0x1F
    for text in ("", "0x1f", "-1", "123456789", "1g"):
        with pytest.raises(FormatError):
            parse_index(text)


@pytest.mark.parametrize("size", [0, 1, 100, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 9 << 20])
def test_frames_begin_as_litestream_writes_them(size: int) -> None:
    data = (b"some text " * (size // 10 + 1))[:size]
    encoder = FrameEncoder()
    frame = b"".join([encoder.feed(data[at : at + 1_000_003]) for at in range(0, size, 1_000_003)]) + encoder.close()
    assert frame[:7] == bytes.fromhex("04224d186470b9")
    assert frame == encode_frame(data)
    assert decode(frame) == data


@given(st.binary(max_size=3000), st.integers(1, 100), st.integers(1, 300))
def test_any_way_of_cutting_gives_the_same_bytes(data: bytes, cut: int, piece: int) -> None:
    assert decode(encode_frame(data), cut, piece_bytes=piece) == data


@pytest.mark.fault("F53")
def test_a_bomb_comes_out_in_bounded_pieces() -> None:
    frame = encode_frame(bytes(256 << 20))
    assert len(frame) < 2 << 20
    decoder, total, largest = FrameDecoder(), 0, 0
    tracemalloc.start()
    for piece in decoder.feed(frame):
        total, largest = total + len(piece), max(largest, len(piece))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    decoder.close()
    assert (total, largest) == (256 << 20, 1 << 20)
    assert peak < 8 << 20


def test_more_than_the_limit_is_refused() -> None:
    frame = encode_frame(bytes(1000))
    assert decode(frame, max_bytes=1000) == bytes(1000)
    with pytest.raises(FormatError, match="more than it may"):
        decode(frame, max_bytes=999)


def test_every_flip_and_every_cut_is_found() -> None:
    frame = encode_frame(os.urandom(200) + b"text " * 20)
    for at in range(len(frame)):
        flipped = bytearray(frame)
        flipped[at] ^= 0x10
        with pytest.raises(FormatError):
            decode(bytes(flipped))
        with pytest.raises(Truncated):
            decode(frame[:at])


@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_bytes_after_the_frame_are_refused(cut: int) -> None:
    with pytest.raises(FormatError, match="after the end"):
        decode(encode_frame(b"x" * 100) + b"\0", cut)


def test_what_is_no_frame_is_named() -> None:
    with pytest.raises(FormatError, match="not an LZ4 frame"):
        decode(b"SQLite format 3\0")
    with pytest.raises(FormatError, match="encrypted with age"):
        decode(b"age-encryption.org/v1\n-> X25519")
