"""The page index of LTX files, written in Python for few pages and with numpy for many, against varints made one by one."""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import FormatError
from replicator.format import pageindex
from replicator.format.pageindex import PageIndex, decode_index, encode_index, frames
from tests.unit.test_ltx import varint

Row = tuple[int, int, int]
both_ways = pytest.mark.parametrize("small", [0, 1 << 20], ids=["numpy", "python"])


def varints(rows: Iterable[Row]) -> bytes:
    return b"".join(varint(value) for row in rows for value in row)


def index_of(rows: Iterable[Row]) -> PageIndex:
    columns = [array("q", column) for column in zip(*rows, strict=True)] or [array("q")] * 3
    return PageIndex(*columns)


def decoded(data: bytes, *cuts: int) -> list[Row]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [data[start:stop] for start, stop in itertools.pairwise(places)]
    return [row for part in decode_index(pieces) for row in zip(part.pgnos, part.offsets, part.sizes, strict=True)]


@both_ways
@pytest.mark.parametrize(("data", "message"), [
    (b"", "zero byte"),
    (b"\x01", "zero byte"),
    (b"\x01\x64\0", "zero byte"),
    (b"\x01\x64\x80\0", "zero byte"),
    (b"\x01\x64\x2b\x01\0", "incomplete"),
    (b"\x02\x01\x01\x01\x01\x01\0", "ascending"),
    (b"\x02\x01\x01\x02\x01\x01\0", "ascending"),
    (b"\x00\x01\x01\0", "ascending"),
    (b"\xff\xff\xff\xff\xff\xff\xff\xff\x01\x01\x01\0", "too large"),
    (b"\xff" * 40 + b"\0", "too large"),
    (b"\x01\x64\x2b\0\0", "incomplete"),
])  # fmt: skip
def test_bytes_that_are_no_index_are_refused(data: bytes, message: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pageindex, "SMALL", small)
    for cuts in [(), range(len(data))]:
        with pytest.raises(FormatError, match=message):
            decoded(data, *cuts)


def test_an_index_of_many_batches_equals_one_written_value_by_value() -> None:
    pgnos, sizes = [7 * n for n in range(1, 50_001)], [n % 5000 + 11 for n in range(50_000)]
    index = frames(pgnos, sizes, 100)
    rows = list(zip(index.pgnos, index.offsets, index.sizes, strict=True))
    assert (rows[0], rows[1]) == ((7, 100, 11), (14, 111, 12))
    want = varints(rows)
    assert encode_index(index) == want
    assert decoded(want + b"\0", 1, 1000, 200_000) == rows


@both_ways
@pytest.mark.parametrize("value", [0, 0x7F, 0x80, 0x3FFF, 0x4000, (1 << 32) - 1, (1 << 42) + 1, (1 << 56) - 1])
def test_numbers_at_the_edges_of_a_byte_count(value: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pageindex, "SMALL", small)
    raw = varints([(1, value, value)])
    assert decoded(raw + b"\0") == [(1, value, value)]
    assert encode_index(index_of([(1, value, value)])) == raw


numbers = st.integers(0, 2**56 - 1)
tables = st.dictionaries(st.integers(1, 2**32 - 1), st.tuples(numbers, numbers), max_size=20)


@given(tables, st.lists(st.integers(0, 1000), max_size=9), st.booleans())
def test_an_index_comes_back_as_it_was_written(entries: dict[int, tuple[int, int]], cuts: list[int], small: bool) -> None:
    rows = [(pgno, *entries[pgno]) for pgno in sorted(entries)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pageindex, "SMALL", 1 << 20 if small else 0)
        raw = encode_index(index_of(rows))
        assert raw == varints(rows)
        assert decoded(raw + b"\0", *cuts) == rows


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_any_bytes_are_an_index_or_a_format_error_for_both_ways(data: bytes, cuts: list[int]) -> None:
    found: list[list[Row] | None] = []
    for small in (0, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pageindex, "SMALL", small)
            try:
                found.append(decoded(data, *cuts))
            except FormatError:
                found.append(None)
    assert found[0] == found[1]
    if found[0] is not None:
        assert all(pgno >= 1 and offset >= 0 and size >= 0 for pgno, offset, size in found[0])
        assert len(varints(found[0])) < len(data)


def test_few_pages_need_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)  # an import of numpy raises now
    index = frames(range(1, 251), [1234] * 250, 100)
    assert len(decoded(encode_index(index) + b"\0")) == 250
