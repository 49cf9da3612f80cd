"""LTX codec: the worked example of the specification, the rules of the format, and what a damaged file is answered with."""

from __future__ import annotations

import importlib.util
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import lz4.block
import lz4.frame
import numpy as np
import pytest
from fastcrc.crc64 import go_iso

from replicator.errors import ChecksumMismatch, FormatError, Truncated
from replicator.format.checksum import CHECKSUM_FLAG, page_checksum
from replicator.format.ltx import (
    TXID,
    Decoder,
    Encoder,
    FileInfo,
    Header,
    Trailer,
    decode_file,
    decode_header,
    decode_trailer,
    encode_file,
    format_name,
    format_txid,
    index_range,
    parse_name,
    parse_txid,
)

# Written by Litestream 0.5.17: TXID 2, one page of 512 bytes (specification, section 1.9).
EXAMPLE = bytes.fromhex("""
    4c545831 00000002 00000200 00000004  00000000 00000002 00000000 00000002
    000001a2 08d91855 00000000 00000000  00000000 00000880 00000000 00000218
    a6aefc03 07317f51 00000000 00000000  00000000 00000000 00000000 00000000
    00000000 00000002 00010000 0021df0d  00000002 01f30001 fa01f300 0100ffd3
    e0000502 02134c54 58040102 11686900  00000000 0002642b 00000000 00000000
    04000000 00000000 00da890f ae331651  5c
""")
HEADER = Header(page_size=512, commit=4, min_txid=TXID(2), max_txid=TXID(2), timestamp_ms=1_795_444_774_997)
END = bytes(6)


def page(fill: int, size: int = 512) -> bytes:
    return bytes([fill]) * size


def sealed(body: bytes, page_bytes: bytes, post: int = 0) -> bytes:
    """A file around page frames `body`: hashed with `page_bytes`, which holds frame headers and pages as the checksum sees them."""
    start, frames = body[:100], body[100:]
    return start + frames + struct.pack(">QQ", post, CHECKSUM_FLAG | go_iso(start + page_bytes + struct.pack(">Q", post)))


def built(header: Header, frames: list[tuple[int, int, bytes, bytes]], *, post: int = 0, index: bytes | None = None) -> bytes:
    """A file put together by hand from (pgno, flags, stored bytes, page), so that it can break any rule."""
    out, hashed, entries = header.encode(), b"", []
    for pgno, flags, stored, image in frames:
        head = struct.pack(">IH", pgno, flags) + (struct.pack(">I", len(stored)) if flags & 1 else b"")
        entries.append((pgno, len(out), len(head) + len(stored)))
        out += head + stored
        hashed += head + image
    if index is None:
        index = b"".join(varint(value) for entry in entries for value in entry) + b"\0"
    end = END + index + struct.pack(">Q", len(index))
    return sealed(out + end, hashed + end, post)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def block(image: bytes) -> bytes:
    return bytes(lz4.block.compress(image, store_size=False))


def test_the_worked_example_decodes_to_its_published_fields() -> None:
    header, pages, trailer = decode_file(EXAMPLE)
    assert header == Header(
        page_size=512,
        commit=4,
        min_txid=TXID(2),
        max_txid=TXID(2),
        timestamp_ms=1_795_444_774_997,
        wal_offset=2176,
        wal_size=536,
        wal_salt1=0xA6AEFC03,
        wal_salt2=0x07317F51,
    )
    assert trailer == Trailer(0, 0xDA890FAE3316515C)
    [(pgno, image)] = pages
    assert pgno == 2
    start, end = bytes.fromhex("0d0000000201f30001fa01f3"), bytes.fromhex("000000050202134c5458040102116869")
    assert image == start + bytes(512 - len(start) - len(end)) + end
    assert page_checksum(2, image) == 0xE45D208CA0419C94


def test_the_worked_example_is_written_again_byte_for_byte_from_its_block() -> None:
    decoder = Decoder(keep_blocks=True)
    [(pgno, image, stored)] = decoder.feed(EXAMPLE)
    decoder.close()
    assert decoder.header is not None
    parts: list[bytes] = []
    encoder = Encoder(lambda data: parts.append(bytes(data)), decoder.header)
    encoder.blocks([(pgno, image, stored)])
    done = encoder.close()
    assert b"".join(parts) == EXAMPLE
    assert (done.size, done.file_checksum, done.page_count) == (177, 0xDA890FAE3316515C, 1)


def test_the_index_of_the_worked_example_is_found_from_the_end() -> None:
    assert index_range(len(EXAMPLE), EXAMPLE[-24:]) == (0x95, 4)
    assert EXAMPLE[0x95:0x99] == b"\x02\x64\x2b\0"  # page 2 lies at 100, in 43 bytes


@pytest.mark.fault("F51")
def test_every_truncation_of_the_worked_example_is_refused() -> None:
    for size in range(len(EXAMPLE)):
        with pytest.raises(FormatError):
            decode_file(EXAMPLE[:size])


@pytest.mark.fault("F51")
def test_every_flipped_bit_of_the_worked_example_is_refused() -> None:
    _, pages, _ = decode_file(EXAMPLE)
    for at in range(len(EXAMPLE) * 8):
        damaged = bytearray(EXAMPLE)
        damaged[at // 8] ^= 1 << at % 8
        try:
            _, survived, _ = decode_file(damaged)
        except FormatError:
            continue
        # Compressed bytes are not hashed, only what they stand for.
        assert 110 <= at // 8 < 143
        assert survived == pages


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(FormatError):
        decode_file(EXAMPLE + b"\0")


def test_a_wrong_file_checksum_names_both_values() -> None:
    damaged = EXAMPLE[:-1] + b"\x5d"
    with pytest.raises(ChecksumMismatch, match="file checksum mismatch") as caught:
        decode_file(damaged)
    assert (caught.value.expected, caught.value.got) == (0xDA890FAE3316515D, 0xDA890FAE3316515C)


def test_frames_of_early_versions_are_read_in_any_cutting() -> None:
    pages = [(1, page(1)), (3, bytes(range(256)) * 2)]
    frames = [(n, 0, lz4.frame.compress(image, content_checksum=True), image) for n, image in pages]
    data = built(HEADER, frames)
    assert decode_file(data)[1] == pages
    decoder = Decoder()
    got = [(pgno, image) for at in range(len(data)) for pgno, image, _ in decoder.feed(data[at : at + 1])]
    decoder.close()
    assert got == pages


def test_a_kept_block_of_an_early_frame_is_a_block_of_the_same_page() -> None:
    decoder = Decoder(keep_blocks=True)
    [(_, image, stored)] = decoder.feed(built(HEADER, [(1, 0, lz4.frame.compress(page(7), content_checksum=True), page(7))]))
    assert lz4.block.decompress(stored, uncompressed_size=512) == image == page(7)


def test_a_frame_with_a_wrong_content_checksum_is_refused() -> None:
    stored = bytearray(lz4.frame.compress(page(1), content_checksum=True))
    stored[-1] ^= 1
    with pytest.raises(FormatError, match="does not decompress"):
        decode_file(built(HEADER, [(1, 0, bytes(stored), page(1))]))


@pytest.mark.fault("F53")
def test_a_frame_that_grows_beyond_the_page_is_refused() -> None:
    with pytest.raises(FormatError, match="513 bytes, expecting 512"):
        decode_file(built(HEADER, [(1, 0, lz4.frame.compress(bytes(1 << 16), content_checksum=True), page(0))]))


@pytest.mark.fault("F53")
@pytest.mark.parametrize("size", [511, 513, 1 << 22])
def test_a_block_of_another_size_than_the_page_is_refused(size: int) -> None:
    with pytest.raises(FormatError):
        decode_file(built(HEADER, [(1, 1, block(bytes(size)), bytes(size))]))


@pytest.mark.fault("F53")
def test_a_block_longer_than_any_page_needs_is_refused_before_it_arrives() -> None:
    decoder = Decoder()
    with pytest.raises(FormatError, match="block of 4294967295 bytes"):
        decoder.feed(HEADER.encode() + struct.pack(">IHI", 1, 1, 0xFFFFFFFF))


def test_an_index_that_never_ends_is_refused() -> None:
    decoder = Decoder()
    with pytest.raises(FormatError, match="page index is too large"):
        decoder.feed(HEADER.encode() + END + b"\x01" * 100)


def one(pgno: int, flags: int = 1) -> tuple[int, int, bytes, bytes]:
    return pgno, flags, block(page(pgno % 251)), page(pgno % 251)


SNAPSHOT = replace(HEADER, min_txid=TXID(1))


@pytest.mark.fault("F52")
@pytest.mark.parametrize(
    ("header", "frames", "message"),
    [
        (HEADER, [one(0)], "page number required"),
        (HEADER, [one(1, 3)], "invalid page header flags"),
        (HEADER, [one(2), one(1)], "out-of-order page numbers"),
        (HEADER, [one(2), one(2)], "out-of-order page numbers"),
        (HEADER, [one(5)], "out-of-bounds for commit size 4"),
        (replace(HEADER, commit=1 << 22), [one(0x40000000 // 512 + 1)], "cannot encode lock page: pgno=2097153"),
        (SNAPSHOT, [one(1), one(3)], "nonsequential page numbers in snapshot transaction"),
        (SNAPSHOT, [one(2)], "nonsequential page numbers in snapshot transaction"),
        (SNAPSHOT, [one(1), one(2)], "snapshot transaction ends at page 2 of 4"),
    ],
)
def test_pages_that_break_a_rule_are_refused_with_the_peers_words(
    header: Header, frames: list[tuple[int, int, bytes, bytes]], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        decode_file(built(header, frames))


@pytest.mark.parametrize(
    ("header", "pages", "message"),
    [
        (HEADER, [(0, page(1))], "page number required"),
        (HEADER, [(2, page(1)), (2, page(1))], "out-of-order page numbers: 2,2"),
        (HEADER, [(5, page(1))], "out-of-bounds for commit size 4"),
        (HEADER, [(1, page(1, 511))], "invalid page buffer size: 511, expecting 512"),
        (replace(HEADER, commit=1 << 22), [(2097153, page(1))], "cannot encode lock page: pgno=2097153"),
        (replace(HEADER, commit=1 << 22), [(2097152, page(1)), (2097153, page(1))], "cannot encode lock page: pgno=2097153"),
        (SNAPSHOT, [(2, page(1))], "nonsequential page numbers in snapshot transaction"),
        (SNAPSHOT, [(1, page(1)), (3, page(1))], "nonsequential page numbers in snapshot transaction"),
        (SNAPSHOT, [(1, page(1))], "snapshot transaction ends at page 1 of 4"),
    ],
)
def test_the_encoder_refuses_what_the_decoder_would(header: Header, pages: list[tuple[int, bytes]], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encode_file(header, pages)


@pytest.mark.fault("F20")
@pytest.mark.parametrize("beyond", [1, 2])
def test_a_snapshot_passes_over_the_lock_page(beyond: int) -> None:
    lock = 0x40000000 // 65536 + 1
    image = page(1, 65536)
    stored = block(image)
    parts: list[bytes] = []
    commit = lock - 1 + beyond
    encoder = Encoder(lambda data: parts.append(bytes(data)), Header(65536, commit, TXID(1), TXID(1), 0))
    for pgno in range(1, commit + 1):
        if pgno != lock:
            encoder.blocks([(pgno, image, stored)])
    encoder.close()
    decoder = Decoder()
    seen = [pgno for part in parts for pgno, _, _ in decoder.feed(part)]
    decoder.close()
    assert seen == [pgno for pgno in range(1, commit + 1) if pgno != lock]


@pytest.mark.fault("F52")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": 1}, "invalid flags: 0x00000001"),
        ({"flags": 6}, "invalid flags: 0x00000006"),
        ({"page_size": 1000}, "invalid page size: 1000"),
        ({"page_size": 131072}, "invalid page size: 131072"),
        ({"min_txid": 0}, "minimum transaction id required"),
        ({"min_txid": 3}, "transaction ids out of order"),
        ({"wal_offset": -1}, "negative wal offset or size"),
        ({"wal_size": 1}, "wal offset required"),
        ({"wal_salt2": 1}, "wal offset required"),
        ({"pre_apply_checksum": 1}, "pre-apply checksum not allowed"),
        ({"min_txid": 1, "pre_apply_checksum": 1}, "pre-apply checksum must be zero on snapshots"),
        ({"flags": 0}, "pre-apply checksum required"),
        ({"flags": 0, "pre_apply_checksum": 5}, "pre-apply checksum required"),
    ],
)
def test_a_header_that_means_nothing_is_refused(change: dict[str, int], message: str) -> None:
    header = decode_header(replace(HEADER, **change).encode())  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        header.validate()
    with pytest.raises(FormatError, match=message):
        Decoder().feed(header.encode())


@pytest.mark.parametrize(("data", "error", "message"), [
    (b"", Truncated, "0 bytes, minimum 100"),
    (bytes(100), FormatError, "invalid LTX file"),
    (b"LTX2" + bytes(96), FormatError, "invalid version"),
])  # fmt: skip
def test_bytes_that_are_no_header_are_refused(data: bytes, error: type[FormatError], message: str) -> None:
    with pytest.raises(error, match=message):
        decode_header(data)


def tracked(pages: list[tuple[int, bytes]]) -> int:
    total = CHECKSUM_FLAG
    for pgno, image in pages:
        total = CHECKSUM_FLAG | (total ^ page_checksum(pgno, image))
    return total


@pytest.mark.fault("F54")
def test_a_tracked_snapshot_is_read_when_its_checksum_is_that_of_its_pages() -> None:
    header = replace(SNAPSHOT, flags=0, commit=2)
    frames = [one(1), one(2)]
    post = tracked([(1, page(1)), (2, page(2))])
    assert decode_file(built(header, frames, post=post))[2].post_apply_checksum == post
    with pytest.raises(ChecksumMismatch, match="post-apply"):
        decode_file(built(header, frames, post=post ^ 1))
    with pytest.raises(FormatError, match="post-apply checksum required"):
        decode_file(built(header, frames))


@pytest.mark.fault("F54")
def test_a_post_apply_checksum_without_tracking_is_refused() -> None:
    with pytest.raises(FormatError, match="post-apply checksum not allowed"):
        decode_file(built(HEADER, [one(1)], post=CHECKSUM_FLAG | 1))


@pytest.mark.fault("F54")
def test_files_with_tracking_are_not_written() -> None:
    with pytest.raises(FormatError):
        Encoder(lambda _: None, replace(HEADER, flags=0, pre_apply_checksum=CHECKSUM_FLAG | 1))


@pytest.mark.parametrize("index", [b"\0", b"\x02\x64\x2a\0", b"\x02\x65\x2b\0", b"\x01\x64\x2b\0", b"\x02\x64\x2b\x03\x01\x01\0"])
def test_an_index_that_disagrees_with_the_pages_is_refused(index: bytes) -> None:
    header, _, _ = decode_file(EXAMPLE)
    _, pages, _ = decode_file(EXAMPLE)
    stored = EXAMPLE[110:143]
    assert built(header, [(2, 1, stored, pages[0][1])]) == EXAMPLE
    with pytest.raises(FormatError, match="page index"):
        decode_file(built(header, [(2, 1, stored, pages[0][1])], index=index))


@pytest.mark.parametrize(("size", "stated"), [(177, 0), (177, 48), (177, 1 << 63), (130, 1)])
def test_an_index_outside_the_file_is_refused(size: int, stated: int) -> None:
    with pytest.raises(FormatError):
        index_range(size, struct.pack(">Q", stated) + bytes(16))


def test_a_trailer_has_sixteen_bytes() -> None:
    assert decode_trailer(bytes(7) + b"\1" + bytes(7) + b"\2") == Trailer(1, 2)
    with pytest.raises(Truncated):
        decode_trailer(bytes(15))


def test_names_and_txids() -> None:
    assert format_txid(0x1F) == "000000000000001f"
    assert parse_txid("00000000000000FF") == 255
    assert format_name(1, 0xFF) == "0000000000000001-00000000000000ff.ltx"
    assert parse_name("0000000000000001-00000000000000ff.ltx") == (1, 255)


@pytest.mark.parametrize("name", [
    "0000000000000001-00000000000000ff.ltx.tmp",
    "0000000000000001-00000000000000FF.ltx",
    "000000000000001-00000000000000ff.ltx",
    "0000000000000002-0000000000000001.ltx",
    "0000000000000000-0000000000000001.ltx",
    "0000000000000001-00000000000000ff.ltx\n",
    "",
])  # fmt: skip
def test_other_names_are_nothing(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize("text", ["", "1", "000000000000000g", "00000000000000001", "+000000000000001", "\u0660" * 16])
def test_other_texts_are_no_txid(text: str) -> None:
    with pytest.raises(FormatError, match="invalid txid"):
        parse_txid(text)


def test_files_are_ordered_by_their_txids_alone() -> None:
    when = datetime(2026, 1, 1, tzinfo=UTC)
    files = [FileInfo(0, TXID(2), TXID(3), 1, when), FileInfo(9, TXID(1), TXID(9), 5, when), FileInfo(1, TXID(1), TXID(2), 9, when)]
    assert [file.name[15:33:17] for file in sorted(files)] == ["12", "19", "23"]


def test_the_time_of_a_header_is_exact_to_the_millisecond() -> None:
    assert HEADER.created_at == datetime(2026, 11, 23, 14, 39, 34, 997000, tzinfo=UTC)


@pytest.mark.parametrize("timestamp", [-(1 << 63), (1 << 63) - 1])
def test_a_time_that_no_calendar_has_is_a_format_error(timestamp: int) -> None:
    with pytest.raises(FormatError, match="invalid timestamp"):
        _ = replace(HEADER, timestamp_ms=timestamp).created_at


def test_writes_are_batched() -> None:
    writes: list[int] = []
    encoder = Encoder(lambda data: writes.append(len(data)), replace(HEADER, page_size=4096, commit=1000))
    image = np.random.default_rng(1).bytes(4096)
    for pgno in range(1, 1001):
        encoder.pages([(pgno, image)])
    assert sum(writes) + (1 << 18) > encoder.close().size - 10_000
    assert len(writes) < 20


def _views(data: bytes) -> list[Callable[[], bytes | bytearray | memoryview]]:
    return [lambda: data, lambda: bytearray(data), lambda: memoryview(data)]


def test_any_kind_of_buffer_is_taken() -> None:
    files = {encode_file(HEADER, [(1, view())]) for view in _views(page(9))}
    assert len(files) == 1
    results = [decode_file(view()) for view in _views(files.pop())]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", ["checksum", "sqlite", "wal", "ltx"])
def test_importing_a_codec_does_not_import_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec(f"replicator.format.{name}")
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setitem(sys.modules, "numpy", None)  # an import of numpy raises now
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)


def test_a_stated_index_size_that_is_wrong_is_refused_under_a_right_checksum() -> None:
    entries = b"\0"
    end = END + entries + struct.pack(">Q", len(entries) + 1)
    with pytest.raises(FormatError, match="page index size 2, but 1 bytes are there"):
        decode_file(sealed(HEADER.encode() + end, end))
