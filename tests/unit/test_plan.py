"""Each rule of the plan, by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from replicator.errors import NonContiguous, TXIDNotAvailable
from replicator.format.ltx import TXID, FileInfo
from replicator.plan import chain_end, plan_follow, plan_restore

START = datetime(2026, 1, 1, tzinfo=UTC)


def files(*specs: tuple[int, int, int] | tuple[int, int, int, int]) -> dict[int, list[FileInfo]]:
    """(level, min, max[, second]) to a listing."""
    found: dict[int, list[FileInfo]] = {}
    for level, low, high, *second in specs:
        when = START + timedelta(seconds=second[0] if second else high)
        found.setdefault(level, []).append(FileInfo(level, TXID(low), TXID(high), 100, when))
    return {level: sorted(infos) for level, infos in found.items()}


def plan(listing: dict[int, list[FileInfo]], **target: object) -> list[tuple[int, int, int]]:
    return [(info.level, info.min_txid, info.max_txid) for info in plan_restore(listing, **target)]  # type: ignore[arg-type]


L0 = [(0, n, n) for n in range(1, 7)]


def test_raw_files_alone() -> None:
    assert plan(files(*L0)) == L0


def test_the_newest_snapshot_is_the_base() -> None:
    assert plan(files((9, 1, 2), (9, 1, 4), *L0)) == [(9, 1, 4), (0, 5, 5), (0, 6, 6)]


def test_a_file_that_reaches_further_wins() -> None:
    assert plan(files((1, 1, 3), (2, 1, 2), *L0)) == [(1, 1, 3), (0, 4, 4), (0, 5, 5), (0, 6, 6)]


def test_of_equal_reach_the_larger_range_wins_then_the_higher_level() -> None:
    assert plan(files((1, 2, 3), (2, 1, 3), (0, 1, 1))) == [(2, 1, 3)]
    assert plan(files((1, 1, 3), (2, 1, 3))) == [(2, 1, 3)]


def test_txid_must_be_the_end_of_a_file() -> None:
    assert plan(files((1, 1, 3), (0, 4, 4)), txid=TXID(3)) == [(1, 1, 3)]
    with pytest.raises(TXIDNotAvailable):
        plan(files((1, 1, 3), (0, 4, 4)), txid=TXID(2))
    with pytest.raises(TXIDNotAvailable):
        plan(files(*L0), txid=TXID(7))


def test_a_snapshot_past_the_txid_is_not_used() -> None:
    assert plan(files((9, 1, 4), *L0), txid=TXID(3)) == L0[:3]
    assert plan(files((9, 1, 4), *L0), txid=TXID(4)) == [(9, 1, 4)]


def test_a_time_excludes_files_of_exactly_that_time() -> None:
    assert plan(files(*L0), timestamp=START + timedelta(seconds=3)) == L0[:2]
    assert plan(files(*L0), timestamp=START + timedelta(seconds=3.001)) == L0[:3]


def test_a_gap_is_an_error_for_the_newest_state_only() -> None:
    listing = files((0, 1, 1), (0, 2, 2), (0, 4, 4))
    with pytest.raises(NonContiguous) as caught:
        plan(listing)
    assert (caught.value.have, caught.value.next_txid) == (2, 4)
    assert plan(listing, txid=TXID(2)) == [(0, 1, 1), (0, 2, 2)]
    assert plan(listing, timestamp=START + timedelta(seconds=60)) == [(0, 1, 1), (0, 2, 2)]


def test_pruned_raw_files_are_bridged_by_a_level() -> None:
    assert plan(files((1, 1, 3), (1, 4, 5), (0, 6, 6))) == [(1, 1, 3), (1, 4, 5), (0, 6, 6)]


def test_chain_end() -> None:
    assert chain_end({}) == 0
    assert chain_end({0: []}) == 0
    assert chain_end(files(*L0)) == 6
    with pytest.raises(NonContiguous):
        chain_end(files((0, 2, 2)))


def onward(listing: dict[int, list[FileInfo]], current: int, image_of: int | None = None) -> list[tuple[int, int, int]]:
    found = plan_follow(listing, TXID(current), image_of=None if image_of is None else TXID(image_of))
    return [(info.level, info.min_txid, info.max_txid) for info in found]


def test_a_copy_goes_on_from_its_own_txid() -> None:
    assert onward(files((9, 1, 5), *L0), 3) == [(0, 4, 4), (0, 5, 5), (0, 6, 6)]
    assert onward(files(*L0), 6) == onward(files((9, 1, 6), *L0), 6) == []


def test_a_file_that_begins_before_the_copys_txid_and_ends_after_it_continues_it() -> None:
    assert onward(files((1, 2, 5), (0, 6, 6)), 3) == [(1, 2, 5), (0, 6, 6)]


def test_a_full_image_is_taken_only_when_nothing_else_leads_on_and_replaces_what_was_planned() -> None:
    assert onward(files((9, 1, 5), (1, 4, 6)), 3) == [(1, 4, 6)]
    assert onward(files((9, 1, 5), (0, 6, 6)), 3) == [(9, 1, 5), (0, 6, 6)]
    assert onward(files((0, 4, 4), (9, 1, 6), (0, 7, 7)), 3) == [(9, 1, 6), (0, 7, 7)]


def test_a_gap_after_the_copy_is_an_error_only_when_nothing_can_be_applied() -> None:
    assert onward(files((0, 4, 4), (0, 6, 6)), 3) == [(0, 4, 4)]
    with pytest.raises(NonContiguous, match="have up to 0000000000000004 but next file starts at 0000000000000006"):
        onward(files((0, 4, 4), (0, 6, 6)), 4)


def test_an_image_can_be_demanded() -> None:
    assert onward(files((9, 1, 5), *L0), 3, image_of=4) == [(9, 1, 5), (0, 6, 6)]
    with pytest.raises(NonContiguous):
        onward(files((9, 1, 3), *L0), 3, image_of=4)
