"""The page index near the end of an LTX file: for each page the varints page number, offset, size, pages ascending; then a zero byte.

A file may have millions of pages, so both directions go in batches. Small ones are done in Python, which takes less time than importing numpy.

Source: specification, section 1.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from replicator.errors import FormatError

__all__ = ["PageIndex", "decode_index", "encode_index", "frames"]

BATCH = 1 << 13
SMALL = 1 << 10
MAX_NUMBER_BYTES = 8


@dataclass(frozen=True, slots=True)
class PageIndex:
    """Where the frames of some pages lie: page numbers ascending; offsets and sizes in bytes, headers included. Type code "q"."""

    pgnos: array[int]
    offsets: array[int]
    sizes: array[int]


def frames(pgnos: Iterable[int], sizes: Iterable[int], offset: int) -> PageIndex:
    """Return the entries of frames that follow each other from `offset` on."""
    own = array("q", sizes)
    offsets = array("q", accumulate(own, initial=offset))
    offsets.pop()
    return PageIndex(array("q", pgnos), offsets, own)


def encode_index(index: PageIndex) -> bytes:
    """Return the entries, without the zero byte behind the last one."""
    if len(index.pgnos) <= SMALL:
        small = bytearray()
        for entry in zip(index.pgnos, index.offsets, index.sizes, strict=True):
            for value in entry:
                while value > 0x7F:
                    small.append(value & 0x7F | 0x80)
                    value >>= 7
                small.append(value)
        return bytes(small)
    import numpy as np

    columns = [np.frombuffer(column, dtype=np.int64) for column in (index.pgnos, index.offsets, index.sizes)]
    parts = []
    for start in range(0, len(columns[0]), BATCH):
        values = np.stack([column[start : start + BATCH] for column in columns], axis=1).reshape(-1)
        groups = values[:, None] >> np.arange(0, 63, 7)
        used = groups != 0
        used[:, 0] = True
        groups &= 0x7F
        groups[:, :-1] |= used[:, 1:].astype(np.int64) << 7
        parts.append(groups.astype(np.uint8)[used].tobytes())
    return b"".join(parts)


def decode_index(pieces: Iterable[bytes]) -> Iterator[PageIndex]:
    """Decode an index with its zero byte, which comes in pieces, and yield its entries in batches.

    Raises:
        FormatError: for anything that is not exactly an index; maybe after some batches.
    """
    rest, newest = b"", 0
    for piece in pieces:
        data = rest + piece
        values, used = _numbers(data)
        rest = data[used:]
        if len(rest) > 3 * MAX_NUMBER_BYTES:
            raise FormatError("page index has a number that is too large")
        if values:
            index = PageIndex(values[0::3], values[1::3], values[2::3])
            before = array("q", [newest])
            before.extend(index.pgnos[:-1])
            if any(map(operator.le, index.pgnos, before)):
                raise FormatError("page index is not in ascending order")
            newest = index.pgnos[-1]
            yield index
    if rest != b"\0":
        raise FormatError("page index has an incomplete entry" if rest.endswith(b"\0") else "page index does not end with a zero byte")


def _numbers(data: bytes) -> tuple[array[int], int]:
    """Return the numbers of all complete entries, and the bytes that they take."""
    values, used = array("q"), 0
    if len(data) <= 3 * SMALL:
        value = shift = 0
        for at, byte in enumerate(data):
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                values.append(value)
                value = shift = 0
                if len(values) % 3 == 0:
                    used = at + 1
            elif shift == 7 * MAX_NUMBER_BYTES:
                raise FormatError("page index has a number that is too large")
        del values[len(values) // 3 * 3 :]
        return values, used
    import numpy as np

    raw = np.frombuffer(data, dtype=np.uint8)
    ends = (raw < 0x80).nonzero()[0]
    ends = ends[: len(ends) // 3 * 3]
    for start in range(0, len(ends), BATCH):
        last = ends[start : start + BATCH]
        first = np.concatenate([[used], last[:-1] + 1])
        longest = int((last - first).max()) + 1
        if longest > MAX_NUMBER_BYTES:
            raise FormatError("page index has a number that is too large")
        part = np.zeros(len(last), dtype=np.int64)
        for place in range(longest):
            here = first + place
            part |= np.where(here <= last, raw[np.minimum(here, last)] & 0x7F, 0).astype(np.int64) << (7 * place)
        values.frombytes(part.tobytes())
        used = int(last[-1]) + 1
    return values, used
