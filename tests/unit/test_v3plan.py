from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from replicator.errors import GenerationNotAvailable, MissingSegment, NoBackups, SnapshotNotAvailable, TimestampNotAvailable
from replicator.format.ltx import TXID, FileInfo
from replicator.format.v3 import SegmentInfo, SnapshotInfo
from replicator.v3plan import Generation, V3Plan, choose_format, plan_beside_ltx, plan_v3, timeline

A, B = "aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"
S = 10**9


def generation(name: str, snapshots: list[tuple[int, float]], segments: list[tuple[int, int, float]]) -> Generation:
    """Snapshots as (index, seconds), segments as (index, offset, seconds)."""
    return Generation(
        name,
        tuple(SnapshotInfo(name, index, 10, int(at * S)) for index, at in snapshots),
        tuple(SegmentInfo(name, index, offset, 10, int(at * S)) for index, offset, at in segments),
    )


def places(plan: V3Plan) -> tuple[str, int, list[tuple[int, int]]]:
    return plan.generation, plan.snapshot.index, [(info.index, info.offset) for info in plan.segments]


ONE = generation(A, [(0, 10), (2, 15)], [(0, 0, 11), (0, 100, 12), (1, 0, 13), (2, 0, 14), (2, 100, 16)])
TWO = generation(B, [(0, 20)], [(0, 0, 21), (0, 100, 22)])


def plan(*generations: Generation, **select: object) -> tuple[str, int, list[tuple[int, int]]]:
    return places(plan_v3("file:///r", generations, **select))


def test_the_newest_generation_is_the_one_with_the_newest_file() -> None:
    assert plan(TWO, ONE) == (B, 0, [(0, 0), (0, 100)])
    assert plan(generation("0" * 16, [(0, 1)], [(0, 0, 99)]), TWO) == ("0" * 16, 0, [(0, 0)])


def test_a_time_includes_the_file_of_that_very_nanosecond() -> None:
    assert plan(ONE, TWO, timestamp_ns=12 * S) == (A, 0, [(0, 0), (0, 100)])
    assert plan(ONE, TWO, timestamp_ns=12 * S - 1) == (A, 0, [(0, 0)])
    assert plan(ONE, TWO, timestamp_ns=10 * S) == (A, 0, [])


def test_a_later_snapshot_begins_at_its_own_index() -> None:
    assert plan(ONE, timestamp_ns=15 * S) == (A, 2, [(2, 0)])
    assert plan(ONE) == (A, 2, [(2, 0), (2, 100)])
    assert plan(ONE, index=1) == (A, 0, [(0, 0), (0, 100), (1, 0)])
    assert plan(ONE, TWO, generation=A, index=9) == (A, 2, [(2, 0), (2, 100)])


@pytest.mark.parametrize(("seconds", "select"), [(9.9, {}), (22.1, {}), (16.1, {"generation": A}), (19.9, {"generation": B})])
def test_times_outside_of_what_is_stored_are_refused(seconds: float, select: dict[str, str]) -> None:
    with pytest.raises(TimestampNotAvailable):
        plan(ONE, TWO, timestamp_ns=int(seconds * S), **select)


@pytest.mark.parametrize("seconds", [16.1, 19.9])
def test_between_generations_the_earlier_one_ends(seconds: float) -> None:
    at = int(seconds * S)
    assert plan(TWO, ONE, timestamp_ns=at) == plan(ONE) == (A, 2, [(2, 0), (2, 100)])
    assert plan(ONE, TWO, timestamp_ns=at) == places(plan_beside_ltx("", [ONE, TWO], timestamp_ns=at))
    older, headless = generation("c" * 16, [(0, 1)], [(0, 0, 15.5)]), generation("d" * 16, [], [(0, 0, 16.05)])
    assert plan(older, ONE, headless, TWO, timestamp_ns=at) == plan(ONE)


HEADLESS = generation("c" * 16, [(0, 22)], [(0, 0, 19), (0, 100, 23)])
"""0.3.13 has replaced its first snapshot by a later one of the same index."""


@pytest.mark.parametrize("seconds", [19, 21.9])
def test_before_its_first_snapshot_a_generation_has_not_begun(seconds: float) -> None:
    at = int(seconds * S)
    assert plan(HEADLESS, ONE, timestamp_ns=at) == plan(ONE) == places(plan_beside_ltx("", [ONE, HEADLESS], timestamp_ns=at))
    assert plan(HEADLESS, ONE, timestamp_ns=22 * S) == ("c" * 16, 0, [(0, 0)])
    with pytest.raises(SnapshotNotAvailable, match="at or before"):
        plan(HEADLESS, ONE, timestamp_ns=at, generation="c" * 16)


def test_a_generation_goes_on_until_the_next_one_has_its_snapshot() -> None:
    same_second = generation("c" * 16, [(0, 18)], [(0, 0, 16), (0, 100, 20)])
    assert plan(same_second, ONE, timestamp_ns=16 * S) == plan(ONE)
    assert plan(same_second, ONE, timestamp_ns=16 * S - 1) == plan(ONE, timestamp_ns=16 * S - 1) != plan(ONE)


def test_the_plan_stops_at_the_first_segment_that_is_too_new() -> None:
    odd = generation(A, [(0, 1)], [(0, 0, 2), (0, 100, 9), (0, 200, 3), (1, 0, 4)])
    assert plan(odd, timestamp_ns=5 * S) == (A, 0, [(0, 0)])


def test_lower_indexes_than_the_snapshots_do_not_matter() -> None:
    left = generation(A, [(2, 10)], [(0, 100, 1), (2, 0, 11)])
    assert plan(left) == (A, 2, [(2, 0)])
    assert plan(generation(A, [(2, 10)], [(0, 0, 1)])) == (A, 2, [])


@pytest.mark.fault("F64")
@pytest.mark.parametrize(
    ("segments", "missing"),
    [
        ([(0, 100, 2)], "00000000_00000000"),
        ([(1, 0, 2)], "00000000_00000000"),
        ([(0, 0, 2), (2, 0, 3)], "00000001_00000000"),
        ([(0, 0, 2), (1, 100, 3)], "00000001_00000000"),
    ],
)
def test_a_missing_beginning_is_named(segments: list[tuple[int, int, float]], missing: str) -> None:
    with pytest.raises(MissingSegment, match=missing):
        plan(generation(A, [(0, 1)], segments))


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(NoBackups):
        plan()
    with pytest.raises(GenerationNotAvailable, match=B):
        plan(ONE, generation=B)
    with pytest.raises(SnapshotNotAvailable, match="at or below index 00000001"):
        plan(generation(A, [(2, 1)], [(1, 0, 1), (2, 0, 2)]), index=1)
    with pytest.raises(SnapshotNotAvailable, match="at or before 1970-01-01T00:00:01"):
        plan(generation(A, [(2, 5)], [(2, 0, 1), (2, 100, 6)]), timestamp_ns=S)


def test_beside_ltx_the_newest_snapshot_decides() -> None:
    old = generation("0" * 16, [(0, 1)], [(0, 0, 99)])
    assert places(plan_beside_ltx("file:///r", [old, TWO])) == (B, 0, [(0, 0), (0, 100)])
    assert places(plan_beside_ltx("file:///r", [ONE, TWO], timestamp_ns=18 * S)) == (A, 2, [(2, 0), (2, 100)])
    with pytest.raises(SnapshotNotAvailable):
        plan_beside_ltx("file:///r", [TWO], timestamp_ns=19 * S)


def ltx(level: int, seconds: float) -> FileInfo:
    return FileInfo(level, TXID(1), TXID(1), 100, datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("files", "seconds", "expected"),
    [
        ({}, None, "0.3"),
        ({0: [ltx(0, 22)]}, None, "ltx"),  # equal times favour LTX
        ({0: [ltx(0, 21.999)]}, None, "0.3"),
        ({0: [ltx(0, 30)], 9: [ltx(9, 40)]}, 35.0, "0.3"),  # only level 9 counts
        ({0: [ltx(0, 30)], 9: [ltx(9, 40)]}, 40.0, "0.3"),  # and strictly before
        ({0: [ltx(0, 30)], 9: [ltx(9, 40)]}, 40.001, "ltx"),
        ({9: [ltx(9, 1)]}, 25.0, "0.3"),
        ({9: [ltx(9, 20)]}, 25.0, "ltx"),
    ],
)
def test_the_format_is_chosen_as_the_peer_does(files: dict[int, list[FileInfo]], seconds: float | None, expected: str) -> None:
    assert choose_format([TWO], files, timestamp_ns=None if seconds is None else int(seconds * S)) == expected
    assert choose_format([], files) == "ltx"


def test_a_timeline_leads_through_the_plan_of_every_moment() -> None:
    odd = generation("c" * 16, [(0, 30), (1, 33)], [(0, 0, 31), (0, 100, 35), (1, 0, 32), (1, 100, 36)])
    overlapping = generation("d" * 16, [(0, 12.5)], [(0, 0, 40)])
    same_second = generation("e" * 16, [(0, 18)], [(0, 0, 16), (0, 100, 20)])
    for generations in (
        [ONE],
        [ONE, TWO],
        [ONE, TWO, odd],
        [ONE, odd, overlapping, TWO],
        [ONE, HEADLESS, TWO],
        [HEADLESS, same_second, ONE],
    ):
        steps = timeline(generations)
        for tenths in range(90, 420):
            try:
                expected = plan_v3("", generations, timestamp_ns=tenths * S // 10)
            except (TimestampNotAvailable, SnapshotNotAvailable):
                continue
            reached: list[object] = []
            for step in steps:
                if step.time_ns <= tenths * S // 10:
                    reached = [*([] if step.snapshot else reached), *step.files]
            assert tuple(reached) == expected.files, tenths
