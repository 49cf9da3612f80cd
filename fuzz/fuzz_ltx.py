"""Fuzz the LTX decoder: python fuzz/fuzz_ltx.py [corpus folder] (needs atheris).

Invariant: for any bytes the decoder raises `FormatError` or nothing, says the same whether the bytes come at once or in pieces, never returns a
page of another size than the header's, and what it accepts comes back equal when it is encoded and decoded again.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from replicator.errors import FormatError
from replicator.format.ltx import NO_CHECKSUM, Decoder, Header, Trailer, decode_file, encode_file, index_range
from replicator.format.pageindex import decode_index

Result = tuple[Header | None, list[tuple[int, bytes]], Trailer] | None


def _decode(data: bytes, step: int) -> Result:
    decoder = Decoder()
    pages: list[tuple[int, bytes]] = []
    try:
        for at in range(0, len(data), step):
            pages += [(pgno, page) for pgno, page, _ in decoder.feed(data[at : at + step])]
        return decoder.header, pages, decoder.close()
    except FormatError:
        return None


def check(data: bytes) -> None:
    """Raise `AssertionError`, or what the decoder must not raise, when the invariant does not hold."""
    try:
        offset, size = index_range(len(data), data[-24:])
        list(decode_index([data[offset : offset + size]]))
    except FormatError:
        pass
    whole = _decode(data, max(len(data), 1))
    assert whole == _decode(data, 1 + len(data) % 61)
    if whole is None:
        return
    header, pages, _ = whole
    assert header is not None
    assert all(len(page) == header.page_size for _, page in pages)
    plain = replace(header, flags=NO_CHECKSUM, pre_apply_checksum=0)
    assert decode_file(encode_file(plain, pages))[:2] == (plain, pages)


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
