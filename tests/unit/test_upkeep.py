"""Whose history is looked after when: at its time, when something has come, a few at once, and nobody after the end."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from replicator.board import Board
from replicator.format.ltx import TXID
from replicator.gate import gate
from replicator.levels import History
from replicator.upkeep import Keeping, Upkeep
from tests.e2e.databases import until


class Stub(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


class Keeper:
    """Does what it is told: `dues` are what it answers in turn, the last one for ever."""

    def __init__(self, *dues: float | None) -> None:
        self.dues = list(dues)
        self.progress = 0
        self.asked: list[int] = []
        self.steps = 0
        self.problems: dict[str, str] = {}
        self.at_step: Callable[[], object] = lambda: None
        self.at_due: Callable[[], object] = lambda: None

    def due(self) -> float | None:
        self.asked.append(self.progress)
        found = self.dues.pop(0) if len(self.dues) > 1 else self.dues[0]
        self.at_due()
        return found

    def step(self) -> None:
        self.steps += 1
        self.at_step()


def keeping(keeper: Keeper, upkeep: Upkeep, *, state: str = "replicating", kind: str = "memory") -> tuple[Keeping, Board]:
    replica = Stub(txid=TXID(0), online=True, url=f"{kind}:///r", client=Stub(kind=kind))
    board = Board(Path("/d/a.db"), [replica], staging_limit_bytes=1)  # type: ignore[list-item]
    board.state = state  # type: ignore[assignment]
    made: Any = keeper
    found = Keeping(lambda: made, replica, History(), board, upkeep)  # type: ignore[arg-type]
    found.start()
    return found, board


def test_what_is_due_is_done_at_its_time_and_then_it_is_at_rest() -> None:
    keeper = Keeper(time.time() + 0.1, time.time() + 0.1, None)
    upkeep = Upkeep()
    began = time.time()
    found, _ = keeping(keeper, upkeep)
    until(lambda: keeper.steps)
    assert time.time() - began >= 0.1
    until(lambda: found.rests_until == math.inf)
    assert found.is_up_to_date
    assert keeper.steps == 1
    found.join(10)
    assert not found.is_alive()


def test_no_thread_is_left_with_the_last_one_and_another_one_starts_them_again() -> None:
    before, upkeep = set(threading.enumerate()), Upkeep()
    for _ in range(3):
        several = [keeping(Keeper(None), upkeep)[0] for _ in range(4)]
        until(lambda several=several: all(found.rests_until == math.inf for found in several))
        for found in several[1:]:
            found.join(10)
        assert set(threading.enumerate()) > before
        several[0].join(10)
        assert set(threading.enumerate()) <= before


def test_nothing_begins_before_the_database_is_open() -> None:
    keeper, upkeep = Keeper(None), Upkeep()
    found, board = keeping(keeper, upkeep, state="starting")
    other, _ = keeping(Keeper(None), upkeep)
    until(lambda: other.rests_until == math.inf)  # who came later was visited, so was the first
    assert keeper.asked == []
    board.begin([], TXID(0))
    until(lambda: found.rests_until == math.inf)
    for item in (found, other):
        item.join(10)


def test_a_file_that_comes_while_it_looks_is_looked_at() -> None:
    keeper, upkeep = Keeper(None), Upkeep()

    def come() -> None:
        keeper.progress, keeper.at_due = 7, lambda: None  # the listing was read before it

    keeper.at_due = come
    found, _ = keeping(keeper, upkeep)
    until(lambda: keeper.asked == [0, 7])
    found.join(10)


def test_a_file_that_comes_later_is_looked_at_when_it_may_be_due_before_all_else() -> None:
    keeper, upkeep = Keeper(time.time() + 3600.0), Upkeep()
    found, board = keeping(keeper, upkeep)
    until(lambda: found.rests_until)
    keeper.dues = [time.time() + 0.01]  # sooner than it seemed
    keeper.progress = 1
    board.tidy()
    until(lambda: len(keeper.asked) >= 2)
    keeper.dues = [None]
    found.join(10)
    asked = len(keeper.asked)
    keeper.progress = 2
    board.tidy()
    found._tell()
    assert len(keeper.asked) == asked
    assert board.changed.told == []


def test_no_more_than_two_at_once_unless_they_hang_and_the_end_waits_for_a_visit() -> None:
    upkeep, inside, most, leave = Upkeep(at_once=2), list[int](), list[int](), threading.Event()

    def stay() -> None:
        inside.append(1)
        most.append(len(inside))
        leave.wait(20)
        inside.pop()

    upkeep._pool._stuck_s = 60.0
    keepers = [Keeper(time.time() - 1, None) for _ in range(6)]
    for keeper in keepers:
        keeper.at_step = stay
    all_of_them = [keeping(keeper, upkeep)[0] for keeper in keepers]
    until(lambda: len(inside) == 2)
    first = next(item for item, keeper in zip(all_of_them, keepers, strict=True) if keeper.steps)
    first.join(0.05)
    assert first.is_alive()
    leave.set()
    first.join(10)
    assert not first.is_alive()
    until(lambda: sum(keeper.steps for keeper in keepers) == 6)
    assert max(most) == 2
    for item in all_of_them:
        item.join(10)


def test_work_on_a_directory_has_a_place_and_what_waits_for_a_store_has_none() -> None:
    upkeep, inside = Upkeep(), dict[str, bool]()
    for kind in ("file", "s3"):
        keeper = Keeper(time.time() - 1, None)
        keeper.at_step = lambda kind=kind: inside.update({kind: gate().is_inside})  # type: ignore[misc]
        found, _ = keeping(keeper, upkeep, kind=kind)
        until(lambda keeper=keeper: keeper.steps)  # type: ignore[misc]
        found.join(10)
    assert inside == {"file": True, "s3": False}


def test_a_defect_is_told_and_ends_this_one_alone() -> None:
    upkeep, broken, sound = Upkeep(at_once=1), Keeper(time.time() - 1), Keeper(time.time() - 1, None)

    def fail() -> None:
        raise AssertionError("broken")

    broken.at_step = fail
    one, _ = keeping(broken, upkeep)
    other, _ = keeping(sound, upkeep)
    until(lambda: other.rests_until == math.inf)
    assert broken.steps == 1
    assert "internal error" in broken.problems["keeper"]
    for item in (one, other):
        item.join(10)


def test_due_times_that_do_not_count_any_more_are_forgotten() -> None:
    upkeep = Upkeep()
    first, _ = keeping(Keeper(time.time() + 3600.0), upkeep)
    for _ in range(200):
        found, _ = keeping(Keeper(time.time() + 3600.0), upkeep)
        until(lambda found=found: found.rests_until)  # type: ignore[misc]
        found.join(10)
    assert len(upkeep._heap) < 100
    first.join(10)
    until(lambda: upkeep._thread is None)
