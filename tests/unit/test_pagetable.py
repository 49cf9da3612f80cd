"""The page table: blocks behind every byte of it, and no entry where the database has no page."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from replicator import pagetable
from replicator.format.ltx import TXID
from replicator.pagetable import ENTRIES_AT, ENTRY_SIZE, MAX_GROWTH, PageTable
from replicator.tail import NO_WAL

LINEAGE = bytes(range(16))


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint32)


def sums(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def apply(table: PageTable, txid: int, pgnos: np.ndarray, checksums: np.ndarray, commit: int) -> None:
    table.apply(TXID(txid), pgnos, checksums, commit=commit, timestamp_ms=1, position=NO_WAL)


def test_the_file_has_no_holes_so_that_a_full_disk_cannot_kill_the_process(tmp_path: Path) -> None:
    table = PageTable.create(tmp_path / "pages", lineage=LINEAGE, page_size=512)
    before = os.stat(tmp_path / "pages")
    assert before.st_blocks * 512 >= before.st_size
    pages = MAX_GROWTH // ENTRY_SIZE + 1
    apply(table, 1, numbers(pages), sums(7), pages)
    after = os.stat(tmp_path / "pages")
    assert after.st_blocks * 512 >= after.st_size > before.st_size
    table.close()


@pytest.mark.fault("F23")
def test_a_disk_that_is_full_when_the_table_grows_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    table = PageTable.create(tmp_path / "pages", lineage=LINEAGE, page_size=512)
    apply(table, 1, numbers(1, 2), sums(5, 6), 2)
    pages = MAX_GROWTH // ENTRY_SIZE + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            apply(table, 2, numbers(pages), sums(7), pages)
    assert (table.state.txid, table.state.commit, table.is_intact) == (1, 2, True)
    apply(table, 2, numbers(pages), sums(7), pages)
    assert (table.state.txid, table.get(pages, 1).tolist()) == (2, [7])
    table.close()


@pytest.mark.parametrize("grows_by", ["apply", "repair"])
def test_entries_that_a_crash_left_beyond_the_end_do_not_come_back_when_the_database_grows(tmp_path: Path, grows_by: str) -> None:
    path = tmp_path / "pages"
    table = PageTable.create(path, lineage=LINEAGE, page_size=512)
    apply(table, 1, numbers(1, 2), sums(5, 6), 2)
    table.close()
    with path.open("r+b") as file:  # an update to four pages that was cut short, and is not the one that is stored now
        file.seek(ENTRIES_AT + 2 * ENTRY_SIZE)
        file.write((99).to_bytes(8, "little") * 2)
    reopened = PageTable.open(path)
    assert reopened is not None
    if grows_by == "apply":
        apply(reopened, 2, numbers(4), sums(8), 4)
    else:
        stored = reopened._store

        def cut_short(*args: object) -> None:
            raise KeyboardInterrupt

        reopened._store = cut_short  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            apply(reopened, 2, numbers(4), sums(8), 4)
        reopened._store = stored  # type: ignore[method-assign]
        assert reopened.repair(TXID(2), numbers(4), sums(8), 4, 1)
    assert reopened.get(1, 4).tolist() == [5, 6, 0, 8]
    assert reopened.is_intact
    assert reopened.state.xor == 5 ^ 6 ^ 8
    reopened.close()


def test_the_announced_state_is_that_which_the_update_leads_to(tmp_path: Path) -> None:
    table = PageTable.create(tmp_path / "pages", lineage=LINEAGE, page_size=512)
    apply(table, 1, numbers(1, 2, 3, 4), sums(1, 2, 4, 8), 4)
    assert table.xor_after(numbers(2), sums(16), commit=3) == 1 ^ 16 ^ 4
    apply(table, 2, numbers(2), sums(16), 3)
    assert table.state.xor == 1 ^ 16 ^ 4
    assert table.is_intact
    assert table.get(1, 5).tolist() == [1, 16, 4, 0, 0]
    table.close()


@pytest.mark.parametrize("damage", ["entry", "both slots", "cut off"])
def test_damage_is_found_when_the_table_is_opened(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "pages"
    table = PageTable.create(path, lineage=LINEAGE, page_size=512)
    apply(table, 1, numbers(1, 2), sums(5, 6), 2)
    table.close()
    data = bytearray(path.read_bytes())
    if damage == "entry":
        data[ENTRIES_AT] ^= 1
    elif damage == "both slots":
        data[20] ^= 1
        data[256 + 20] ^= 1
    path.write_bytes(data[:ENTRIES_AT] if damage == "cut off" else data)
    found = PageTable.open(path)
    assert found is None or not found.is_intact
    if found is not None:
        found.close()


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_any_batch_size_leads_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(pagetable, "BATCH", batch)
    table = PageTable.create(tmp_path / "pages", lineage=LINEAGE, page_size=512)
    apply(table, 1, numbers(1, 2, 3, 4, 5), sums(11, 12, 13, 14, 15), 5)
    apply(table, 2, numbers(2, 5, 6), sums(22, 25, 26), 6)
    apply(table, 3, numbers(1), sums(31), 4)
    assert table.get(1, 6).tolist() == [31, 22, 13, 14, 0, 0]
    assert (table.state.xor, table.is_intact) == (31 ^ 22 ^ 13 ^ 14, True)
    table.close()


def test_a_few_pages_lead_to_the_same_table_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        (numbers(1, 2, 3, 5), sums(11, 22, 33, 55), 5),
        (numbers(2, 7), sums(23, 77), 7),
        (numbers(1), sums(12), 3),  # smaller
        (numbers(2, 4), sums(24, 44), 6),
        (numbers(), sums(), 6),
    ]
    found = []
    for few in (16, -1):
        monkeypatch.setattr(pagetable, "FEW_PAGES", few)
        table = PageTable.create(tmp_path / f"pages{few}", lineage=LINEAGE, page_size=512)
        states = []
        for txid, (pgnos, checksums, commit) in enumerate(steps, start=1):
            apply(table, txid, pgnos, checksums, commit)
            states.append((table.state.xor, table.get(1, commit).tolist(), table.is_intact))
        table.close()
        found.append(states)
    assert found[0] == found[1]
    assert found[0][3][:2] == (12 ^ 24 ^ 44 ^ 33, [12, 24, 33, 44, 0, 0])
    assert all(intact for _, _, intact in found[0])
