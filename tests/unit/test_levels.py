"""When levels are merged, and from which files."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from replicator.errors import ConfigError
from replicator.format.ltx import TXID, FileInfo
from replicator.levels import Compact, History, compaction_inputs, due_compactions, due_snapshot, next_boundary, previous_boundary

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NOW = NOON.timestamp()


def info(level: int, low: int, high: int, second: float = 0) -> FileInfo:
    return FileInfo(level, TXID(low), TXID(high), 100, NOON + timedelta(seconds=second))


def ranges(files: tuple[FileInfo, ...]) -> list[tuple[int, int]]:
    return [(file.min_txid, file.max_txid) for file in files]


@pytest.mark.parametrize(
    ("when", "interval", "before"),
    [
        (datetime(2026, 1, 1, 12, 0, 44, tzinfo=UTC), 30, datetime(2026, 1, 1, 12, 0, 30, tzinfo=UTC)),
        (datetime(2026, 1, 1, 12, 0, 30, tzinfo=UTC), 30, datetime(2026, 1, 1, 12, 0, 30, tzinfo=UTC)),
        (datetime(2026, 1, 1, 12, tzinfo=UTC), 86400, datetime(2026, 1, 1, tzinfo=UTC)),
        # Seven days, counted from the year 1, begin on Mondays (from 1970 they would begin on Thursdays).
        (datetime(2026, 1, 1, 12, tzinfo=UTC), 7 * 86400, datetime(2025, 12, 29, tzinfo=UTC)),
    ],
)
def test_boundaries_are_counted_from_the_year_one(when: datetime, interval: float, before: datetime) -> None:
    assert previous_boundary(when.timestamp(), interval) == before.timestamp()
    assert next_boundary(when.timestamp(), interval) == before.timestamp() + interval


def test_everything_past_the_newest_merged_file_is_merged_at_once() -> None:
    raw = [info(0, n, n) for n in range(1, 9)]
    assert ranges(compaction_inputs(raw, [info(1, 1, 3), info(1, 4, 5)])) == [(6, 6), (7, 7), (8, 8)]
    assert ranges(compaction_inputs(raw, [])) == [(n, n) for n in range(1, 9)]
    assert compaction_inputs(raw, [info(1, 1, 8)]) == ()


def test_a_gap_ends_the_inputs_and_what_lies_inside_another_file_is_left_out() -> None:
    assert ranges(compaction_inputs([info(1, 1, 4), info(1, 2, 3), info(1, 4, 6), info(1, 8, 9)], [])) == [(1, 4), (4, 6)]
    assert ranges(compaction_inputs([info(1, 8, 9)], [info(2, 1, 5)])) == [(8, 9)]


def test_a_file_is_merged_at_the_first_boundary_after_it_was_made() -> None:
    history = History(level_intervals_s=(30, 300))
    files = {0: [info(0, 4, 4, 31), info(0, 5, 5, 45)], 1: [info(1, 1, 2, -400), info(1, 3, 3, 10)], 2: [info(2, 1, 2, -400)]}
    assert due_compactions(files, history, NOW + 50) == [
        (NOW + 60, Compact(1, (files[0][0], files[0][1]))),
        (NOW + 300, Compact(2, (files[1][1],))),
    ]


def test_what_is_late_is_due_in_the_past_and_a_future_time_is_due_now() -> None:
    late = due_compactions({0: [info(0, 1, 1, -3600)]}, History(), NOW)
    assert late[0][0] == NOW - 3600 + 30
    early = due_compactions({0: [info(0, 1, 1, 86400 * 365)]}, History(), NOW)
    assert early[0][0] == NOW


def test_nothing_is_due_for_a_replica_without_news() -> None:
    files = {level: [info(level, 1, 5, -100000)] for level in range(4)}
    assert due_compactions(files, History(), NOW) == []
    assert due_snapshot({9: [info(9, 1, 5)]}, History(), NOW, head=TXID(5)) is None
    assert due_snapshot({}, History(), NOW, head=TXID(0)) is None


def test_a_full_image_is_due_at_the_first_boundary_after_the_last_one() -> None:
    files = {0: [info(0, 1, 1), info(0, 2, 2)], 9: []}
    midnight = datetime(2026, 1, 2, tzinfo=UTC).timestamp()
    assert due_snapshot(files, History(), NOW + 5, head=TXID(2)) == midnight  # the first raw file holds everything
    files[9] = [info(9, 1, 1, -3 * 86400)]
    assert due_snapshot(files, History(), NOW + 5, head=TXID(2)) == midnight - 3 * 86400
    assert due_snapshot(files, History(snapshot_interval_s=0), NOW, head=TXID(2)) is None


def test_a_replica_without_a_beginning_gets_a_full_image_at_once() -> None:
    assert due_snapshot({0: [info(0, 7, 7)]}, History(), NOW, head=TXID(7)) == NOW


@pytest.mark.parametrize(
    "wrong",
    [
        {"level_intervals_s": ()},
        {"level_intervals_s": (1.0,) * 9},
        {"level_intervals_s": (30, 0)},
        {"snapshot_interval_s": -1},
        {"snapshot_retention_s": 0},
        {"l0_retention_s": -1},
        {"l0_retention_check_interval_s": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        History(**wrong)  # type: ignore[arg-type]
