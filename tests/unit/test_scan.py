"""Which pages of a state differ from the page table, against asking for one page at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.format.checksum import page_checksum
from replicator.format.sqlite import lock_pgno
from replicator.scan import all_pages, differing_pages

SIZE = 512


class Chunks:
    """A database that is read in pieces of `step` pages, from page `first` on."""

    def __init__(self, pages: list[bytes], step: int, first: int = 1) -> None:
        self._pages, self._step, self._first = pages, step, first

    def chunks(self, image: object) -> Iterator[tuple[int, bytearray]]:
        for at in range(0, len(self._pages), self._step):
            yield self._first + at, bytearray(b"".join(self._pages[at : at + self._step]))


class Table:
    def __init__(self, known: dict[int, int]) -> None:
        self._known = known

    def get(self, first: int, count: int) -> np.ndarray:
        return np.array([self._known.get(pgno, 0) for pgno in range(first, first + count)], dtype=np.uint64)


def image(page_size: int = SIZE) -> Any:
    return SimpleNamespace(page_size=page_size)


@given(versions=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["same", "other", "unknown"])), max_size=30), step=st.integers(1, 7))
def test_exactly_the_pages_differ_whose_checksum_is_not_the_tables(versions: list[tuple[int, str]], step: int) -> None:
    pages = [bytes([version]) * SIZE for version, _ in versions]
    known = {}
    for pgno, (version, state) in enumerate(versions, start=1):
        if state != "unknown":
            known[pgno] = page_checksum(pgno, bytes([version + (state == "other")]) * SIZE)
    found = [(pgno, bytes(page)) for pgno, page in differing_pages(Chunks(pages, step), Table(known), image())]  # type: ignore[arg-type]
    assert found == [(pgno, pages[pgno - 1]) for pgno, (_, state) in enumerate(versions, start=1) if state != "same"]


@pytest.mark.parametrize("known", [{}, {1: 1}], ids=["empty table", "another page known"])
def test_the_lock_page_is_passed_over(known: dict[int, int]) -> None:
    lock = lock_pgno(65536)
    known = {lock - 2 + pgno: checksum for pgno, checksum in known.items()}
    pages = [bytes([n]) * 65536 for n in range(4)]
    database = Chunks(pages, 4, first=lock - 1)
    expected = [(lock - 1, pages[0]), (lock + 1, pages[2]), (lock + 2, pages[3])]
    assert [(n, bytes(page)) for n, page in all_pages(database, image(65536))] == expected  # type: ignore[arg-type]
    assert [(n, bytes(page)) for n, page in differing_pages(database, Table(known), image(65536))] == expected  # type: ignore[arg-type]
