"""What a host's own file says of runs that it was given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from workflow import intake as ik
from workflow.intake import Indexed, Request

ROW = Indexed("it", "one", "queued", None, 0, 1, "0" * 64, None, None, "2026-11-30T15:00:00Z", None)
START = Request("start:it", "it", "start", "{}", None, "2026-11-30T15:00:00Z")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[object]:
    with contextlib.closing(ik.connect(tmp_path / "intake.db")) as found:
        yield found


def from_a(id: str) -> tuple[str, ...]:
    return ("a",)


def test_a_run_that_was_inherited_is_not_left_to_the_host_that_is_gone(db) -> None:  # type: ignore[no-untyped-def]
    ik.add_start(db, ROW, START)
    assert ik.inherit(db, [replace(ROW, status="running")], [START], from_a) == ([], [])  # here already
    assert ik.inherited(db) == {"it": {"a"}}
    assert not ik.drop(db, "it", "a")
    assert ik.one(db, "it") == ROW
    assert ik.requests_of(db, "it") == [START]
    assert ik.drop(db, "it", "c")  # but to an heir that was faster
    assert (ik.one(db, "it"), ik.inherited(db), ik.requests_of(db, "it")) == (None, {}, [])


def test_taking_in_again_changes_nothing(db) -> None:  # type: ignore[no-untyped-def]
    event = Request("e", "it", "event", "{}", None, "2026-11-30T15:00:00Z")
    assert ik.inherit(db, [ROW], [START, event], from_a) == ([ROW], [START, event])
    assert ik.inherit(db, [ROW], [START, event], from_a) == ([], [event])
    assert ik.requests_of(db, "it") == [event, START]
    ik.claimed(db, "it")
    assert ik.inherited(db) == {}
    over = replace(ROW, id="over", status="done", finished_at="2026-11-30T16:00:00Z")
    assert ik.inherit(db, [over], [], from_a)[0] == [over]
    assert ik.inherited(db) == {}  # nobody will claim it


def test_what_was_given_away_is_forgotten_and_the_rest_stays(db) -> None:  # type: ignore[no-untyped-def]
    rows = [replace(ROW, id=id) for id in ("x", "y", "z")]
    ik.inherit(db, rows, [replace(START, id=row.id, instance=row.id) for row in rows], from_a)
    ik.set_shares(db, {"x": "b", "y": "c"})
    assert ik.shares(db) == {"x": "b", "y": "c"}
    ik.keep_only(db, {"z"})
    assert [row.id for row in ik.indexed(db)] == ["z"]
    assert [item.instance for item in ik.all_requests(db)] == ["z"]
    assert (ik.inherited(db), ik.shares(db)) == ({"z": {"a"}}, {})
    assert ik.counts(db) == ({"queued": 1}, [])
