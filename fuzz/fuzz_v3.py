"""Fuzz what reads the 0.3 format: python fuzz/fuzz_v3.py [corpus folder] (needs atheris).

Invariant: for any bytes as names, as LZ4 frames and as WAL segments nothing but the errors of `replicator.errors` is raised; names that are accepted
are those that are written; and a frame cut in any way, like a WAL cut into any segments, gives the same bytes or is refused like the whole.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from replicator.errors import CorruptReplica, FormatError, MissingSegment
from replicator.format.v3 import (
    FrameDecoder,
    SegmentInfo,
    SnapshotInfo,
    encode_frame,
    parse_position,
    parse_segment_name,
    parse_snapshot_name,
    segment_name,
    snapshot_name,
)
from replicator.replay import Replay

GENERATION = "00112233445566ff"
MAX_BYTES = 1 << 24


def check(data: bytes) -> None:
    """Raise `AssertionError`, or what must not be raised, when the invariant does not hold."""
    check_names(data)
    check_frame(data)
    check_wal(data)


def check_names(data: bytes) -> None:
    text = data.decode("latin-1")
    index = parse_snapshot_name(text)
    assert index is None or snapshot_name(index) == text
    place = parse_segment_name(text)
    assert place is None or segment_name(*place) == text
    with contextlib.suppress(FormatError):
        assert str(parse_position(text)).partition(":")[0] == text.partition(":")[0]


def check_frame(data: bytes) -> None:
    cut = data[0] % 7 + 1 if data else 1
    assert _decoded(data, len(data) or 1) == _decoded(data, cut)


def check_wal(data: bytes) -> None:
    """The first byte says where to cut, the rest is a WAL."""
    if not data:
        return
    rest = data[1:]
    cut = len(rest) * data[0] // 255
    whole = _restored([(0, rest)])
    parts = _restored([(0, rest[:cut]), (cut, rest[cut:])] if 0 < cut < len(rest) else [(0, rest)])
    assert parts == whole


def _decoded(data: bytes, cut: int) -> bytes | None:
    decoder = FrameDecoder(piece_bytes=4096, max_bytes=MAX_BYTES)
    out = b""
    try:
        for at in range(0, len(data), cut):
            for piece in decoder.feed(data[at : at + cut]):
                assert 0 < len(piece) <= 4096
                out += piece
        decoder.close()
    except FormatError:
        return None
    return out


def _restored(segments: list[tuple[int, bytes]]) -> bytes | None:
    with tempfile.TemporaryFile() as file, Replay(file.fileno(), "fuzz", folder=Path(tempfile.gettempdir())) as replay:
        try:
            replay.snapshot(SnapshotInfo(GENERATION, 0, 0, 0), [encode_frame(b"")])
            for offset, content in segments:
                replay.segment(SegmentInfo(GENERATION, 0, offset, 0, 0), [encode_frame(content)])
            replay.finish()
        except (CorruptReplica, MissingSegment):
            return None
        return os.pread(file.fileno(), MAX_BYTES, 0)


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
