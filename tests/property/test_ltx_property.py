"""Properties of the LTX codec on generated files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import lz4.frame
import pytest
from fastcrc.crc64 import go_iso
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import FormatError
from replicator.format import ltx
from replicator.format.ltx import Decoder, Encoder, Header, Trailer, decode_file, encode_file
from replicator.format.pageindex import encode_index, frames
from replicator.testing import ltx_files

Pages = list[tuple[int, bytes]]


def fed(data: bytes, cuts: list[int]) -> tuple[Header | None, Pages, Trailer]:
    decoder = Decoder()
    edges = [0, *sorted(cuts), len(data)]
    pages = [(pgno, page) for a, b in pairwise(edges) for pgno, page, _ in decoder.feed(data[a:b])]
    trailer = decoder.close()
    return decoder.header, pages, trailer


@given(ltx_files())
def test_a_file_comes_back_as_it_was_written(file: tuple[Header, Pages]) -> None:
    header, pages = file
    got, found, trailer = decode_file(encode_file(header, pages))
    assert (got, found) == (header, pages)
    assert trailer.post_apply_checksum == 0


@given(ltx_files(), st.data())
def test_any_cutting_gives_the_same_values(file: tuple[Header, Pages], data: st.DataObject) -> None:
    raw = encode_file(*file)
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=30))
    assert fed(raw, cuts) == decode_file(raw)


@given(ltx_files(), st.data())
def test_early_frames_in_any_cutting_give_the_same_pages(file: tuple[Header, Pages], data: st.DataObject) -> None:
    """Files of early 0.5 versions: an LZ4 frame for each page, in every shape that the frame format allows."""
    header, pages = file
    options = {
        "content_checksum": data.draw(st.booleans()),
        "block_checksum": data.draw(st.booleans()),
        "store_size": data.draw(st.booleans()),
        "block_linked": data.draw(st.booleans()),
    }
    raw, hashed, entries = header.encode(), header.encode(), []
    for pgno, image in pages:
        frame = pgno.to_bytes(4, "big") + bytes(2) + lz4.frame.compress(image, **options)
        entries.append((pgno, len(raw), len(frame)))
        raw += frame
        hashed += frame[:6] + image
    index = encode_index(frames([pgno for pgno, _, _ in entries], [size for _, _, size in entries], 100)) + b"\0"
    end = bytes(6) + index + len(index).to_bytes(8, "big") + bytes(8)
    raw += end + (go_iso(hashed + end) | 1 << 63).to_bytes(8, "big")
    got, found, _ = fed(raw, data.draw(st.lists(st.integers(0, len(raw)), max_size=30)))
    assert (got, found) == (header, pages)


@given(ltx_files(), st.data())
def test_a_flipped_bit_is_refused_or_harmless(file: tuple[Header, Pages], data: st.DataObject) -> None:
    """Compressed bytes are not hashed, only what they stand for: a flip there survives when the page is the same."""
    header, pages = file
    raw = bytearray(encode_file(header, pages))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    try:
        got, found, _ = decode_file(bytes(raw))
    except FormatError:
        return
    assert (got, found) == (header, pages)
    assert bit // 8 >= 110


@given(ltx_files(), st.data())
def test_a_truncated_file_is_refused(file: tuple[Header, Pages], data: st.DataObject) -> None:
    raw = encode_file(*file)
    size = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(FormatError):
        decode_file(raw[:size])


@given(ltx_files())
def test_kept_blocks_make_the_same_file_again(file: tuple[Header, Pages]) -> None:
    header, pages = file
    raw = encode_file(header, pages)
    decoder = Decoder(keep_blocks=True)
    parts: list[bytes] = []
    encoder = Encoder(lambda data: parts.append(bytes(data)), header)
    encoder.blocks(decoder.feed(raw))
    done = encoder.close()
    assert b"".join(parts) == raw
    assert (done.size, done.file_checksum) == (len(raw), decoder.close().file_checksum)


@given(ltx_files(), st.integers(1, 9), st.integers(1, 3))
def test_pages_and_index_may_be_cut_into_batches_of_any_size(file: tuple[Header, Pages], size: int, index_batch: int) -> None:
    header, pages = file
    parts: list[bytes] = []
    encoder = Encoder(lambda data: parts.append(bytes(data)), header)
    for at in range(0, len(pages), size):
        encoder.pages(pages[at : at + size])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ltx, "INDEX_BATCH", index_batch)
        done = encoder.close()
    assert b"".join(parts) == encode_file(header, pages)
    assert (done.size, done.page_count) == (len(b"".join(parts)), len(pages))


@given(ltx_files(), st.integers(1, 2**63 - 1))
def test_two_headers_never_share_a_checksum_by_the_writer_alone(file: tuple[Header, Pages], node: int) -> None:
    header, pages = file
    other = replace(header, node_id=header.node_id ^ node)
    assert decode_file(encode_file(header, pages))[2].file_checksum != decode_file(encode_file(other, pages))[2].file_checksum
