"""What may go of a replica in format 0.3, and when a snapshot is due."""

from __future__ import annotations

from replicator.format.v3 import SegmentInfo, SnapshotInfo, V3Info
from replicator.levels import History
from replicator.v3retention import Expired, due_snapshot, due_v3_retention, expired_v3, snapshot_every_s, spare, untrusted_time

A, B = "a" * 16, "b" * 16
HOUR = 3600
DAY = History(snapshot_interval_s=6 * HOUR, snapshot_retention_s=24 * HOUR)


def snapshot(generation: str, index: int, hour: float) -> SnapshotInfo:
    return SnapshotInfo(generation, index, 1, int(hour * HOUR * 10**9))


def segment(generation: str, index: int, hour: float, offset: int = 0) -> SegmentInfo:
    return SegmentInfo(generation, index, offset, 1, int(hour * HOUR * 10**9))


def history_of(*infos: V3Info) -> dict[str, list[V3Info]]:
    found: dict[str, list[V3Info]] = {}
    for info in infos:
        found.setdefault(info.generation, []).append(info)
    return found


ONE_GENERATION = history_of(
    *(snapshot(A, 2 * n, 6 * n) for n in range(8)), *(segment(A, n, 3 * n + 1, offset) for n in range(16) for offset in (0, 4152))
)


def test_the_newest_snapshot_before_the_window_stays_with_the_wal_of_its_own_index() -> None:
    expired = expired_v3(ONE_GENERATION, A, DAY, now=43 * HOUR)  # the window begins at 19:00, the base is of 18:00
    assert expired.generations == ()
    assert sorted({info.index for info in expired.objects if isinstance(info, SnapshotInfo)}) == [0, 2, 4]
    assert sorted({info.index for info in expired.objects if isinstance(info, SegmentInfo)}) == [0, 1, 2, 3, 4, 5]


def test_snapshots_are_deleted_before_the_segments_that_lead_on_from_them() -> None:
    kinds = [type(info) for info in expired_v3(ONE_GENERATION, A, DAY, now=43 * HOUR).objects]
    assert kinds == sorted(kinds, key=lambda kind: kind is SegmentInfo)


def test_nothing_goes_before_a_later_snapshot_is_out_of_the_window() -> None:
    assert not expired_v3(ONE_GENERATION, A, DAY, now=29.9 * HOUR)
    assert expired_v3(ONE_GENERATION, A, DAY, now=30 * HOUR)


def test_the_only_snapshot_stays_for_ever() -> None:
    assert not expired_v3(history_of(snapshot(A, 0, 0), segment(A, 0, 0)), A, DAY, now=10**6 * HOUR)


def test_a_generation_goes_whole_once_another_one_is_the_base() -> None:
    stored = history_of(snapshot(A, 0, 0), segment(A, 3, 5), snapshot(B, 0, 6), segment(B, 0, 7))
    assert not expired_v3(stored, B, DAY, now=29 * HOUR)
    assert expired_v3(stored, B, DAY, now=31 * HOUR) == Expired((), (A,))


def test_a_generation_that_somebody_still_wrote_to_after_the_base_stays() -> None:
    stored = history_of(snapshot(A, 0, 0), segment(A, 3, 6.5), snapshot(B, 0, 6), segment(B, 0, 7))
    assert not expired_v3(stored, B, DAY, now=31 * HOUR)


def test_the_current_generation_stays_whatever_the_times_say() -> None:
    stored = history_of(snapshot(A, 0, 0), segment(A, 3, 5), snapshot(B, 0, 6), segment(B, 0, 7))
    assert not expired_v3(stored, A, DAY, now=31 * HOUR).generations


def test_what_a_restore_reads_is_spared() -> None:
    expired = Expired((snapshot(A, 0, 0), snapshot(A, 2, 1), segment(A, 1, 1), segment(A, 2, 1)), (B,))
    assert spare(expired, {}) == expired
    assert spare(expired, {A: 2}) == Expired((snapshot(A, 0, 0), segment(A, 1, 1)), (B,))
    assert spare(expired, {B: 0}) == Expired(expired.objects, ())


def test_without_retention_nothing_goes() -> None:
    off = History(retention_enabled=False)
    assert not expired_v3(ONE_GENERATION, A, off, now=10**6 * HOUR)
    assert due_v3_retention(ONE_GENERATION, A, off, now=10**6 * HOUR) is None


def test_retention_is_due_when_the_next_snapshot_leaves_the_window() -> None:
    kept = history_of(*(snapshot(A, n, 6 * n) for n in range(2)))
    assert due_v3_retention(kept, A, DAY, now=12 * HOUR) == 24 * HOUR
    assert due_v3_retention(kept, A, DAY, now=25 * HOUR) == 30 * HOUR
    assert due_v3_retention(kept, A, DAY, now=31 * HOUR) == 31 * HOUR
    assert due_v3_retention(history_of(snapshot(A, 0, 0)), A, DAY, now=10**6 * HOUR) is None


def test_a_snapshot_is_due_an_interval_after_the_newest_when_the_index_has_moved_on() -> None:
    stored = history_of(snapshot(A, 0, 0), snapshot(A, 4, 6), segment(A, 5, 7))
    assert due_snapshot(stored, A, 5, DAY) == 12 * HOUR
    assert due_snapshot(stored, A, 4, DAY) is None
    assert due_snapshot(history_of(segment(A, 0, 1)), A, 3, DAY) is None


def test_where_no_snapshots_are_asked_for_retention_needs_them() -> None:
    assert snapshot_every_s(History(snapshot_interval_s=0, snapshot_retention_s=7)) == 7
    assert snapshot_every_s(History(snapshot_interval_s=0, retention_enabled=False)) == 0


def test_times_in_the_future_decide_nothing() -> None:
    assert untrusted_time(ONE_GENERATION, 0.0)
    assert not untrusted_time(ONE_GENERATION, 100 * HOUR)
