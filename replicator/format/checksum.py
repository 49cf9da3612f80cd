"""CRC-64 of LTX files and pages, and the rolling checksum of the WAL.

CRC-64/GO-ISO (polynomial 0x1B, reflected, initial value and final XOR all ones) comes from fastcrc. A stored CRC carries
`CHECKSUM_FLAG`, so that a checksum that is there is never 0.

The WAL's checksum is a pair (s0, s1) that starts with the header's and runs through all frames. For each pair of 32-bit words (x0, x1):
`s0 += x0 + s1; s1 += x1 + s0`, modulo 2**32. That is linear, so the sums of n words are a matrix product: `frame_checksums` computes
what each frame adds on its own with numpy, for many frames at once, and chains the results in a short loop.

Source: specification, sections 1.5 and 3.6; SQLite file format, section 4.2.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastcrc.crc64 import go_iso

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CHECKSUM_FLAG", "crc64", "frame_checksums", "page_checksum", "page_checksums", "wal_checksum"]

CHECKSUM_FLAG = 1 << 63
Bytes = bytes | bytearray | memoryview
_MASK = 0xFFFFFFFF
_BATCH_BYTES = 1 << 20
_FEW_FRAMES = 24
_PGNO = struct.Struct(">I").pack


def crc64(data: Bytes, crc: int = 0) -> int:
    """Return the CRC of `data`, continuing from the CRC of what came before; without the flag bit."""
    return go_iso(data, crc)


def page_checksum(pgno: int, page: Bytes) -> int:
    """Return the checksum of one page at its place, with the flag bit."""
    return CHECKSUM_FLAG | go_iso(page, go_iso(_PGNO(pgno)))


def page_checksums(pages: Iterable[tuple[int, Bytes]]) -> list[int]:
    """Return the checksum of each page, given as (pgno, page)."""
    return [CHECKSUM_FLAG | go_iso(page, go_iso(_PGNO(pgno))) for pgno, page in pages]


def wal_checksum(data: Bytes, s0: int, s1: int, *, big_endian: bool) -> tuple[int, int]:
    """Continue the WAL's checksum over `data`, whose length is a multiple of 8. One word at a time: for headers."""
    words = struct.unpack(f"{'>' if big_endian else '<'}{len(data) // 4}I", data)
    for x0, x1 in zip(words[::2], words[1::2], strict=True):
        s0 = (s0 + x0 + s1) & _MASK
        s1 = (s1 + x1 + s0) & _MASK
    return s0, s1


def frame_checksums(frames: memoryview, count: int, page_size: int, s0: int, s1: int, *, big_endian: bool) -> NDArray[np.uint32]:
    """Return the running checksum after each of `count` whole frames, as an array of shape (count, 2).

    Args:
        frames: at least `count` frames of 24 + `page_size` bytes, from a frame boundary on.
        s0, s1: the checksum before the first of them.
    """
    import numpy as np

    size = 24 + page_size
    weights, (a, b, c, d) = _coefficients(page_size)
    words = np.frombuffer(frames, dtype=">u4" if big_endian else "<u4", count=count * (size // 4)).reshape(count, size // 4)
    batch = max(1, _BATCH_BYTES // size)
    result: list[tuple[int, int]] = []
    for start in range(0, count, batch):
        part = words[start : start + batch].astype(np.uint32, copy=False)
        own = np.einsum("ij,kj->ik", part, weights) if len(part) > _FEW_FRAMES else part @ weights.T  # the first takes longer to begin
        for x, y in own.tolist():
            s0, s1 = (a * s0 + b * s1 + x) & _MASK, (c * s0 + d * s1 + y) & _MASK
            result.append((s0, s1))
    return np.array(result, dtype=np.uint32).reshape(count, 2)


@functools.cache
def _coefficients(page_size: int) -> tuple[NDArray[np.uint32], tuple[int, int, int, int]]:
    """What each word of a frame adds to (s0, s1), with zeros for the 16 header bytes that are not summed; and the matrix of a whole frame."""
    import numpy as np

    words = (8 + page_size) // 4
    first, second = [0] * words, [0] * words
    a, b, c, d = 1, 0, 0, 1  # the matrix of all pairs behind the one at hand
    for at in range(words - 2, -1, -2):
        # x0 enters s0, and through it s1; x1 enters s1 alone.
        first[at], second[at] = (a + b) & _MASK, (c + d) & _MASK
        first[at + 1], second[at + 1] = b, d
        a, b, c, d = (a + b) & _MASK, (a + 2 * b) & _MASK, (c + d) & _MASK, (c + 2 * d) & _MASK
    rows = [row[:2] + [0, 0, 0, 0] + row[2:] for row in (first, second)]
    return np.array(rows, dtype=np.uint32), (a, b, c, d)
