"""The table in `tail.py`, row by row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from replicator.db import Database
from replicator.format.wal import FrameHeader, WALHeader
from replicator.tail import NO_WAL, Continue, Nothing, Resynchronise, WALPosition, decide

HEADER = WALHeader(False, 4096, 0, 1, 2, 30, 40)
RESTARTED = WALHeader(False, 4096, 1, 5, 6, 70, 80)
LAST = FrameHeader(3, 9, 1, 2, 50, 60)
POSITION = WALPosition((1, 2), 32 + 4120, (50, 60))


def decided(position=POSITION, header=HEADER, last=LAST, page_size=4096, proven=False):
    return decide(position, header, last, page_size=page_size, restart_proven=proven)


def test_an_intact_last_frame_continues() -> None:
    assert decided() == Continue(POSITION, restarted=False)


def test_a_position_before_the_first_frame_needs_no_last_frame() -> None:
    start = WALPosition((1, 2), 32, (30, 40))
    assert decided(start, last=None) == Continue(start, restarted=False)


@pytest.mark.fault("F12")
def test_an_overwritten_or_missing_last_frame_resynchronises() -> None:
    for last in (None, FrameHeader(3, 9, 1, 2, 50, 61), FrameHeader(3, 9, 1, 3, 50, 60)):
        assert isinstance(decided(last=last), Resynchronise)


@pytest.mark.fault("F10")
def test_other_salts_continue_only_when_the_restart_is_proven() -> None:
    assert isinstance(decided(header=RESTARTED), Resynchronise)
    assert decided(header=RESTARTED, proven=True) == Continue(WALPosition((5, 6), 32, (70, 80)), restarted=True)
    assert isinstance(decided(NO_WAL, RESTARTED, None), Resynchronise)
    assert isinstance(decided(NO_WAL, RESTARTED, None, proven=True), Continue)


def test_a_missing_wal_is_nothing_only_when_proven_or_never_there() -> None:
    assert isinstance(decided(header=None), Resynchronise)
    assert decided(header=None, proven=True) == Nothing()
    assert decided(NO_WAL, None, None) == Nothing()


def test_another_page_size_resynchronises() -> None:
    assert isinstance(decided(page_size=1024, proven=True), Resynchronise)


def test_a_proven_restart_between_two_reads_of_the_wal_continues() -> None:
    """A restart writes the header first and overwrites frames then. Read in the other order, old header and new frame look like damage."""

    class RestartedAfterTheFirstRead:
        reads = 0

        def header(self) -> WALHeader:
            self.reads += 1
            return HEADER if self.reads == 1 else RESTARTED

        def frame_header(self, offset: int) -> FrameHeader:
            assert offset == POSITION.offset - 4120
            self.reads += 1
            return LAST if self.reads == 1 else FrameHeader(7, 7, 5, 6, 7, 7)

    database = SimpleNamespace(page_size=4096, _attached=True, _restart_allowed=True)
    assert Database.observe(database, POSITION, RestartedAfterTheFirstRead()) == Continue(WALPosition((5, 6), 32, (70, 80)), restarted=True)
