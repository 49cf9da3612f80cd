"""Who may work on databases at once: so many, in the order in which they came, and nobody for ever."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import replicator.atomic
import replicator.gate
from replicator import Replicator
from replicator.engine import Engine
from replicator.format.ltx import FileInfo
from replicator.gate import Gate
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import connect, insert, until


class Visitor:
    """A thread that enters, says so, and stays until it may leave."""

    def __init__(self, gate: Gate, log: list[str], name: str, *, first: bool = False) -> None:
        self.leave, self.inside = threading.Event(), threading.Event()
        self._place = gate.first if first else gate
        self._log, self._name = log, name
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with self._place:
            self._log.append(self._name)
            self.inside.set()
            assert self.leave.wait(20)


def stand_in_line(gate: Gate, count: int) -> bool:
    return gate.waiting == count


def test_no_more_than_the_places_are_inside_and_those_who_wait_keep_their_order() -> None:
    gate, log = Gate(2, late_s=30), list[str]()
    visitors = []
    for at, name in enumerate("abcde"):
        visitors.append(Visitor(gate, log, name))
        if at < 2:
            assert visitors[at].inside.wait(10)
        else:
            until(partial(stand_in_line, gate, at - 1))
    assert log == ["a", "b"]
    for at in (1, 0, 2, 3, 4):
        visitors[at].leave.set()
        visitors[at].thread.join(10)
        until(lambda: len(log) + gate.waiting == 5)
    assert log == list("abcde")
    with gate:
        assert gate.is_inside
    assert not gate.is_inside


def test_a_place_that_was_left_goes_to_who_came_first_and_not_to_who_comes_now() -> None:
    gate, log = Gate(1, late_s=30), list[str]()
    first = Visitor(gate, log, "first")
    assert first.inside.wait(10)
    second = Visitor(gate, log, "second")
    until(lambda: gate.waiting == 1)
    first.leave.set()
    first.thread.join(10)  # from here on the place is the second's, whether it runs already or not
    third = Visitor(gate, log, "third")
    assert second.inside.wait(10)
    assert not third.inside.is_set()
    second.leave.set()
    assert third.inside.wait(10)
    third.leave.set()


def test_what_takes_too_long_keeps_nobody_out() -> None:
    gate, log = Gate(1, late_s=0.05), list[str]()
    slow = Visitor(gate, log, "slow")
    assert slow.inside.wait(10)
    other = Visitor(gate, log, "other")
    assert other.inside.wait(10)
    gate._late_s = 30.0
    slow.leave.set()
    slow.thread.join(10)  # its place was given away: leaving makes no second one
    third = Visitor(gate, log, "third")
    until(lambda: gate.waiting == 1)
    assert not third.inside.is_set()
    other.leave.set()
    third.leave.set()
    third.thread.join(10)
    assert log == ["slow", "other", "third"]


def test_what_ends_something_comes_before_all_that_would_begin_something() -> None:
    gate, log = Gate(1, late_s=30), list[str]()
    visitors = [Visitor(gate, log, "inside")]
    assert visitors[0].inside.wait(10)
    for count, (name, first) in enumerate([("begins", False), ("ends", True), ("begins too", False), ("ends too", True)], start=1):
        visitors.append(Visitor(gate, log, name, first=first))
        until(partial(stand_in_line, gate, count))
    for visitor in visitors:
        visitor.leave.set()
    for visitor in visitors:
        visitor.thread.join(10)
    assert log == ["inside", "ends", "ends too", "begins", "begins too"]


def test_who_waits_for_something_else_steps_aside() -> None:
    gate, log = Gate(1, late_s=30), list[str]()
    with gate:
        with gate.aside():
            assert not gate.is_inside
            other = Visitor(gate, log, "other")
            assert other.inside.wait(10)
            other.leave.set()
        assert gate.is_inside
    with gate.aside():  # who has no place gets none
        assert not gate.is_inside
    assert not gate.is_inside


class Hanging(MemoryClient):
    """A store that does not answer a put before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answer = threading.Event(), threading.Event()

    def put(self, level: int, *args: Any, **options: Any) -> FileInfo:
        if level == 0:
            self.asked.set()
            assert self.answer.wait(30)
        return super().put(level, *args, **options)


def test_a_store_that_hangs_holds_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator.gate, "_shared", Gate(1, late_s=30))
    hanging = Hanging()
    for name in ("slow", "fast"):
        connection = connect(tmp_path / f"{name}.db")
        insert(connection, 1)
        connection.close()
    with Replicator(tmp_path / "slow.db", hanging), Replicator(tmp_path / "fast.db", MemoryClient()) as fast:
        try:
            assert hanging.asked.wait(10)
            began = time.monotonic()
            assert fast.wait(timeout_s=20) == 1
            assert time.monotonic() - began < 10
        finally:
            hanging.answer.set()


def test_a_disk_that_hangs_holds_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator.gate, "_shared", Gate(1, late_s=30))
    asked, answer, inside, sync_file = threading.Event(), threading.Event(), list[bool](), replicator.atomic.sync_file

    def slow(file: int) -> None:
        if "/slow/ltx" in os.readlink(f"/proc/self/fd/{file}"):
            asked.set()
            assert answer.wait(30)
        if "/fast/ltx" in os.readlink(f"/proc/self/fd/{file}"):
            inside.append(replicator.gate.gate().is_inside)
        sync_file(file)

    monkeypatch.setattr(replicator.atomic, "sync_file", slow)
    for name in ("slow", "fast"):
        connection = connect(tmp_path / f"{name}.db")
        insert(connection, 1)
        connection.close()
    with Replicator(tmp_path / "slow.db", f"file://{tmp_path}/slow"), Replicator(tmp_path / "fast.db", f"file://{tmp_path}/fast") as fast:
        try:
            assert asked.wait(10)
            assert fast.wait(timeout_s=20) == 1
        finally:
            answer.set()
    assert inside
    assert not any(inside)


def test_writers_are_locked_out_only_by_who_has_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set[tuple[str, bool]]()

    def watch(name: str) -> None:
        inner = getattr(Engine, name)

        def watched(self: Engine, *args: object) -> object:
            found.add((name, replicator.gate.gate().is_inside))
            return inner(self, *args)

        monkeypatch.setattr(Engine, name, watched)

    for name in ("advance", "settled", "settle_pin", "checkpoint"):
        watch(name)
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(v)")
    with Replicator(tmp_path / "a.db", MemoryClient(), min_checkpoint_pages=5) as replicator_:
        for _ in range(8):
            connection.execute("INSERT INTO t VALUES(randomblob(9000))")
            replicator_.wait(timeout_s=20)
        until(lambda: replicator_.status().checkpoints)
    connection.close()
    assert found == {(name, True) for name in ("advance", "settled", "settle_pin", "checkpoint")}
