"""Checksums: the published check value, continuation, and the vectorised WAL sum against a naive loop."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from replicator.format.checksum import CHECKSUM_FLAG, crc64, frame_checksums, page_checksum, page_checksums, wal_checksum


def naive_crc64(data: bytes) -> int:
    """Bit by bit, from the parameters of CRC-64/GO-ISO: polynomial 0x1B reflected, all ones before and after."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xD800000000000000 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


def naive_sums(frames: bytes, count: int, page_size: int, s0: int, s1: int, order: str) -> list[tuple[int, int]]:
    """The loop of SQLite's file format document, section 4.2."""
    out = []
    size = 24 + page_size
    for at in range(0, count * size, size):
        summed = frames[at : at + 8] + frames[at + 24 : at + size]
        for x0, x1 in struct.iter_unpack(f"{order}II", summed):
            s0 = (s0 + x0 + s1) % 2**32
            s1 = (s1 + x1 + s0) % 2**32
        out.append((s0, s1))
    return out


def test_the_published_check_value() -> None:
    assert crc64(b"123456789") == 0xB90956C775A41001


def test_checksums_of_many_pages_are_those_of_each() -> None:
    pages = [(7, b"a" * 512), (8, memoryview(b"b" * 512)), (1 << 31, bytearray(512))]
    assert page_checksums(pages) == [page_checksum(pgno, page) for pgno, page in pages]


def test_a_crc_continues_over_any_kind_of_buffer() -> None:
    assert crc64(memoryview(b"56789"), crc64(bytearray(b"1234"))) == crc64(b"123456789")
    assert crc64(b"") == 0
    assert crc64(b"", crc64(b"x")) == crc64(b"x")


def test_the_crc_equals_one_computed_bit_by_bit() -> None:
    data = np.random.default_rng(3).bytes(300)
    assert crc64(data) == naive_crc64(data)


def test_a_page_checksum_covers_the_page_number_and_carries_the_flag() -> None:
    image = bytes(range(256)) * 2
    want = naive_crc64(b"\0\0\1\2" + image) | 1 << 63
    assert page_checksum(258, image) == page_checksum(258, memoryview(image)) == want
    assert CHECKSUM_FLAG == 0x8000000000000000


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_sum_of_a_header_equals_the_naive_loop(order: str) -> None:
    data = np.random.default_rng(4).bytes(24)
    s0, s1 = 0xFFFFFFFF, 0xFFFFFFFE
    for x0, x1 in struct.iter_unpack(f"{order}II", data):
        s0 = (s0 + x0 + s1) % 2**32
        s1 = (s1 + x1 + s0) % 2**32
    assert wal_checksum(data, 0xFFFFFFFF, 0xFFFFFFFE, big_endian=order == ">") == (s0, s1)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("page_size", [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536])
def test_sums_of_frames_equal_the_naive_loop(page_size: int, order: str) -> None:
    count = max(3, 6 - page_size // 16384)
    frames = np.random.default_rng(page_size).bytes(count * (24 + page_size)) + b"tail"
    want = naive_sums(frames, count, page_size, 0xDEADBEEF, 0xFFFFFFFF, order)
    for some in range(count + 1):
        got = frame_checksums(memoryview(frames), some, page_size, 0xDEADBEEF, 0xFFFFFFFF, big_endian=order == ">")
        assert got.dtype == np.uint32
        assert got.shape == (some, 2)
        assert [tuple(row) for row in got.tolist()] == want[:some]


def test_sums_run_on_across_batches() -> None:
    """More than 1 MiB of frames: the sums of the whole equal those of its halves, chained."""
    frames = memoryview(np.random.default_rng(5).bytes(4000 * 536))
    whole = frame_checksums(frames, 4000, 512, 1, 2, big_endian=False)
    middle = [int(value) for value in whole[1233]]
    rest = frame_checksums(frames[1234 * 536 :], 2766, 512, middle[0], middle[1], big_endian=False)
    assert (whole[1234:] == rest).all()
    assert tuple(whole[-1].tolist()) == naive_sums(bytes(frames[3999 * 536 :]), 1, 512, *whole[-2].tolist(), "<")[0]


def test_frames_may_start_at_an_odd_address() -> None:
    frames = np.random.default_rng(6).bytes(1 + 8 * 536)
    got = frame_checksums(memoryview(frames)[1:], 8, 512, 0, 0, big_endian=True)
    assert [tuple(row) for row in got.tolist()] == naive_sums(frames[1:], 8, 512, 0, 0, ">")
