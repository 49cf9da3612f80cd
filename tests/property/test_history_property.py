"""The moments computed in one pass are those that `plan_restore` reaches one by one, whatever files are stored."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from replicator.errors import NonContiguous, TXIDNotAvailable
from replicator.format.ltx import TXID, FileInfo
from replicator.history import Moment, describe, restorable_moments
from replicator.plan import plan_restore

START = datetime(2026, 1, 1, tzinfo=UTC)
LAST = 16


@st.composite
def stored(draw: st.DrawFn) -> dict[int, list[FileInfo]]:
    """Any files on any levels: a chain with holes cut into it, or wholly random ranges (snapshots of parts among them)."""
    ranges: set[tuple[int, int, int]] = set()
    if draw(st.booleans()):
        length = draw(st.integers(1, LAST))
        for level in range(draw(st.integers(1, 4))):
            low = 1
            while low <= length:
                high = min(length, low + (draw(st.integers(0, 5)) if level else 0))
                ranges.add((level, low, high))
                low = high + 1
        ranges |= {(9, 1, high) for high in draw(st.sets(st.integers(1, length), max_size=3))}
        ranges -= draw(st.sets(st.sampled_from(sorted(ranges)), max_size=len(ranges) - 1))
    free = st.tuples(st.integers(0, 9), st.integers(1, LAST), st.integers(0, 6)).map(lambda spec: (spec[0], spec[1], spec[1] + spec[2]))
    full = st.tuples(st.just(9), st.just(1), st.integers(1, LAST))
    ranges |= draw(st.sets(st.one_of(free, full), min_size=0 if ranges else 1, max_size=14))
    listing: dict[int, list[FileInfo]] = {}
    for number, (level, low, high) in enumerate(sorted(ranges)):
        when = START + timedelta(seconds=draw(st.integers(0, 30)))
        listing.setdefault(level, []).append(FileInfo(level, TXID(low), TXID(high), 1 << number, when))
    return listing


@given(stored())
def test_the_moments_are_those_of_plan_restore(files: dict[int, list[FileInfo]]) -> None:
    expected = []
    for txid in range(1, LAST + 8):
        try:
            plan = plan_restore(files, txid=TXID(txid))
        except TXIDNotAvailable:
            continue
        # Sizes are different powers of two, so that equal sums mean the same files.
        size = sum(info.size for info in plan)
        expected.append(Moment(TXID(txid), plan[-1].created_at, len(plan), size, plan[-1].level))
    assert restorable_moments(files)[0] == expected


@given(stored())
def test_a_gap_that_nothing_bridges_is_that_of_plan_restore(files: dict[int, list[FileInfo]]) -> None:
    timeline = describe(files, now=START)
    last = timeline.gaps[-1] if timeline.gaps else None
    event("broken" if timeline.broken else "bridged gap" if last else "no gap")
    if timeline.broken is None:
        assert last is None or last.resumes is not None
        plan = plan_restore(files)
        assert timeline.moments[-1].txid == plan[-1].max_txid
        assert timeline.moments[-1].bytes == sum(info.size for info in plan)
        return
    assert last is not None
    with pytest.raises(NonContiguous) as caught:
        plan_restore(files)
    assert (last.after, last.before, last.resumes) == (caught.value.have, caught.value.next_txid, None)


@given(stored())
def test_each_file_of_a_level_ends_at_a_moment_or_in_a_gap(files: dict[int, list[FileInfo]]) -> None:
    timeline = describe(files, now=START)
    moments = {moment.txid for moment in timeline.moments}
    stranded = [info for level, infos in files.items() if level != 9 for info in infos if info.max_txid not in moments]
    assert len(stranded) == sum(gap.files for gap in timeline.gaps)
    for gap in timeline.gaps:
        assert gap.after in moments or gap.after == 0
        assert gap.before > gap.after + 1
        assert gap.resumes is None or gap.resumes in moments
