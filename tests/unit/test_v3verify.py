from __future__ import annotations

import pytest

from replicator.format.v3 import SnapshotInfo
from replicator.replay import Replayed
from replicator.tail import NO_WAL, WALPosition
from replicator.v3plan import V3Plan
from replicator.v3verify import _Found, _judge

SALTS, OTHERS = (1, 2), (3, 4)
PLAN = V3Plan(SnapshotInfo("a" * 16, 0, 1, 1), ())


@pytest.mark.parametrize(
    ("in_place", "past", "unexplained", "running", "wanted", "finding"),
    [
        (True, 0, 0, False, (SALTS, 200), "agrees"),
        (True, 0, 1, True, (SALTS, 200), "differs"),
        (True, 3, 1, True, (SALTS, 200), "differs"),
        (True, 3, 0, False, (SALTS, 200), "behind"),  # nobody sends them
        (True, 3, 0, True, (SALTS, 200), "agrees"),  # they came after the question
        (True, 3, 0, True, (SALTS, 201), "behind"),  # they were there before
        (True, 3, 0, True, (OTHERS, 900), "agrees"),  # the WAL of the question is all stored
        (False, 3, 0, True, (SALTS, 100), "behind"),
        (False, 0, 0, False, (OTHERS, 32), "agrees"),
        (False, 0, 1, True, (OTHERS, 32), "behind"),
        (False, 3, 1, False, (OTHERS, 32), "behind"),
    ],
)
def test_the_finding_follows_from_what_differs_where(
    in_place: bool, past: int, unexplained: int, running: bool, wanted: tuple[tuple[int, int], int], finding: str
) -> None:
    state = Replayed(512, 9, 4, WALPosition(SALTS, 200, (5, 6)))
    found = _Found(PLAN, state, in_place, past, unexplained)
    got, reason = _judge(found, running=running, wanted=WALPosition(*wanted, NO_WAL.checksum))
    assert got == finding
    assert (f"{'a' * 16}/00000004:200" in reason) == (finding != "agrees")
