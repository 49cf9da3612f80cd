"""Fuzz the WAL decoder: python fuzz/fuzz_wal.py [corpus folder] (needs atheris).

Invariant: for any bytes the header decoder raises `FormatError` or nothing; the frames that a scan returns are exactly the longest prefix that a
loop over single words accepts; and a scan never raises.
"""

from __future__ import annotations

import sys

from replicator.errors import FormatError
from replicator.format.checksum import wal_checksum
from replicator.format.wal import WAL_HEADER_SIZE, decode_frame_header, decode_wal_header, frame_size, scan_frames


def check(data: bytes) -> None:
    """Raise `AssertionError`, or what the decoder must not raise, when the invariant does not hold."""
    try:
        header = decode_wal_header(data)
        assert header.encode() == data[:WAL_HEADER_SIZE]
        page_size, salts, big_endian = header.page_size, (header.salt1, header.salt2), header.big_endian
        start = (header.checksum1, header.checksum2)
    except FormatError:
        # Nearly no input has a right checksum in its header: take the frames' expectations from the input, too.
        if len(data) < WAL_HEADER_SIZE:
            return
        page_size, big_endian, start = 512, bool(data[0] & 1), (data[1], data[2])
        salts = (int.from_bytes(data[8:12], "big"), int.from_bytes(data[12:16], "big"))
    size = frame_size(page_size)
    body = data[WAL_HEADER_SIZE:]
    expected, sums = [], start
    for at in range(0, len(body) - size + 1, size):
        frame = decode_frame_header(body, at)
        sums = wal_checksum(body[at : at + 8] + body[at + 24 : at + size], *sums, big_endian=big_endian)
        if frame.pgno == 0 or (frame.salt1, frame.salt2) != salts or (frame.checksum1, frame.checksum2) != sums:
            break
        expected.append((frame.pgno, frame.commit, *sums))
    found = scan_frames(body, page_size=page_size, salts=salts, checksum=start, big_endian=big_endian)
    got = [(p, c, *s) for p, c, s in zip(found.pgnos.tolist(), found.commits.tolist(), found.checksums.tolist(), strict=True)]
    assert got == expected
    commits = [index for index, row in enumerate(expected, 1) if row[1]]
    assert found.committed() == (commits[-1] if commits else 0)


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
