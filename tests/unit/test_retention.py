"""What may be deleted, and what stops every deletion."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import NonContiguous, RestoreError
from replicator.format.ltx import TXID, FileInfo
from replicator.levels import Files, History
from replicator.plan import plan_restore
from replicator.retention import due_retention, expired_files, safe_to_delete, untrusted_times

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NOW = NOON.timestamp()
DAY = 86400.0
Key = tuple[int, int, int]


def info(level: int, low: int, high: int, age_s: float = 0) -> FileInfo:
    return FileInfo(level, TXID(low), TXID(high), 100, NOON - timedelta(seconds=age_s))


def listing(*files: FileInfo) -> dict[int, list[FileInfo]]:
    found: dict[int, list[FileInfo]] = {}
    for file in files:
        found.setdefault(file.level, []).append(file)
    return {level: sorted(infos) for level, infos in found.items()}


def keys(files: list[FileInfo]) -> list[Key]:
    return [(file.level, file.min_txid, file.max_txid) for file in files]


def test_merged_raw_files_go_when_they_are_old_enough_and_the_newest_stays() -> None:
    raw = [info(0, n, n, age_s=1000 - n) for n in range(1, 6)]
    assert keys(expired_files(listing(*raw, info(1, 1, 5)), History(), NOW)) == [(0, n, n) for n in range(1, 5)]
    assert keys(expired_files(listing(*raw, info(1, 1, 3)), History(), NOW)) == [(0, n, n) for n in range(1, 4)]
    assert expired_files(listing(*raw), History(), NOW) == []
    assert expired_files(listing(*raw, info(1, 1, 5)), History(l0_retention_s=0), NOW) == []
    assert expired_files(listing(*raw, info(1, 1, 5)), History(retention_enabled=False), NOW) == []


def test_the_walk_stops_at_the_first_young_file_so_that_no_hole_appears() -> None:
    files = listing(info(0, 1, 1, 900), info(0, 2, 2, 10), info(0, 3, 3, 900), info(0, 4, 4, 0), info(1, 1, 4))
    assert keys(expired_files(files, History(), NOW)) == [(0, 1, 1)]


def test_the_newest_image_before_the_window_stays_as_the_base_of_its_first_moments() -> None:
    images = [info(9, 1, 10 * n, age_s=DAY * (5 - n) + 60) for n in range(1, 5)]  # ages: 4, 3, 2, 1 days and a minute
    merged = [info(1, 10 * n - 9, 10 * n, age_s=DAY * (5 - n) + 60) for n in range(1, 5)]
    files = listing(*images, *merged, info(0, 41, 41))
    assert keys(expired_files(files, History(), NOW)) == [(9, 1, 10), (9, 1, 20), (9, 1, 30), (1, 1, 10), (1, 11, 20)]
    two_days = History(snapshot_retention_s=2 * DAY)
    assert keys(expired_files(files, two_days, NOW)) == [(9, 1, 10), (9, 1, 20), (1, 1, 10)]


def test_raw_files_that_nobody_merged_go_with_the_images_before_them() -> None:
    images = [info(9, 1, 10 * n, age_s=DAY * (4 - n) + 60) for n in range(1, 4)]
    files = listing(*images, *[info(0, n, n, 2 * DAY) for n in range(1, 32)])
    assert keys(expired_files(files, History(), NOW)) == [(9, 1, 10), (9, 1, 20), *[(0, n, n) for n in range(1, 20)]]
    assert keys(expired_files(files, History(l0_retention_s=0), NOW)) == [(9, 1, 10), (9, 1, 20)]


def test_files_in_use_stay() -> None:
    files = listing(*[info(0, n, n, 900) for n in range(1, 5)], info(1, 1, 4))
    doomed = expired_files(files, History(), NOW)
    assert keys(safe_to_delete(files, doomed, {(0, 2, 2), (9, 1, 1)})) == [(0, 1, 1), (0, 3, 3)]


@pytest.mark.fault("F34")
def test_nothing_goes_when_the_rest_would_reach_less() -> None:
    """Level 1 has a hole where the raw files are old: its newest TXID says nothing about them."""
    files = listing(*[info(0, n, n, 900) for n in range(1, 9)], info(1, 1, 3), info(1, 6, 8))
    doomed = expired_files(files, History(), NOW)
    assert (0, 4, 4) in keys(doomed)
    with pytest.raises(NonContiguous):
        safe_to_delete(files, doomed)


def test_nothing_goes_when_the_newest_state_would_be_an_older_one() -> None:
    """No gap opens and no image is left to lead anywhere: only the end of the plan tells."""
    files = listing(info(0, 1, 1, 900), info(0, 2, 2, 900))
    with pytest.raises(NonContiguous):
        safe_to_delete(files, [info(0, 2, 2, 900)])


def test_nothing_goes_when_the_chain_is_broken_already() -> None:
    files = listing(info(0, 1, 1, 900), info(0, 2, 2, 900), info(0, 5, 5, 900), info(9, 1, 1, 900), info(1, 1, 1, 900))
    with pytest.raises(NonContiguous):
        safe_to_delete(files, [info(9, 1, 1, 900)])


def test_a_time_in_the_future_is_named() -> None:
    files = listing(info(0, 1, 1, 100), info(0, 2, 2, -3600))
    assert "0000000000000002-0000000000000002.ltx of level 0" in untrusted_times(files, NOW)
    assert untrusted_times(files, NOW + 3600) == ""


def test_due_times_are_those_of_the_files_and_none_without_a_reason() -> None:
    files = listing(info(0, 1, 1, 100), info(0, 2, 2, 50), info(1, 1, 2))
    assert due_retention(files, History(), NOW) == NOW + 210  # 200 s, up to the next quarter minute
    assert due_retention(files, History(retention_enabled=False), NOW) is None
    assert due_retention(listing(info(0, 1, 1, 1e6), info(0, 2, 2)), History(), NOW) is None
    assert due_retention(listing(info(9, 1, 1, 1e6), info(9, 1, 2, 3600)), History(), NOW) == NOW - 3600 + DAY + 15
    assert due_retention(listing(info(9, 1, 2, 1e6)), History(), NOW) is None


@st.composite
def histories(draw: st.DrawFn) -> dict[int, list[FileInfo]]:
    """Listings with overlaps, holes, and times in any order."""
    found: list[FileInfo] = []
    for level in (0, 1, 2, 9):
        low = 1
        for _ in range(draw(st.integers(0, 6))):
            low = 1 if level == 9 else max(1, low + draw(st.sampled_from([0, 0, 0, 0, -1, 1])))
            high = low + (0 if level == 0 else draw(st.integers(0, 8)))
            found.append(info(level, low, high, draw(st.floats(-1000, 4 * DAY))))
            low = high + 1
    return listing(*{(file.level, file.min_txid, file.max_txid): file for file in found}.values())


def reachable(files: Files) -> int:
    try:
        return int(plan_restore(files)[-1].max_txid)
    except RestoreError:
        return -1


@given(histories())
def test_deletion_never_makes_a_chain_worse(files: dict[int, list[FileInfo]]) -> None:
    history = History()
    try:
        going = keys(safe_to_delete(files, expired_files(files, history, NOW)))
    except RestoreError:
        return
    rest = {level: [item for item in infos if (level, item.min_txid, item.max_txid) not in going] for level, infos in files.items()}
    assert reachable(rest) == reachable(files)
    if going:
        assert reachable(rest) > 0
    for level in files:
        assert not files[level] or rest[level], "the newest of each level stays"
