"""What the board tells of the loss window and of the moment up to which everything is stored."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from replicator.board import Board
from replicator.errors import ReplicatorError
from replicator.format.ltx import TXID
from replicator.losses import LossWindow
from tests.e2e.databases import until


class Stub(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def board(*replicas: Stub, **options: object) -> Board:
    found = Board(Path("/d/a.db"), replicas, staging_limit_bytes=1 << 20, **options)  # type: ignore[arg-type]
    found.begin([], TXID(0))
    return found


def entry(txid: int) -> Stub:
    return Stub(txid=TXID(txid), memory_bytes=10, staged_bytes=0)


def test_the_loss_window_begins_with_the_commit_and_counts_each_txid_once() -> None:
    replica, slow = Stub(txid=TXID(0), online=True), Stub(txid=TXID(0), online=True)
    found = board(replica, slow)
    now = time.monotonic()
    for txid in (1, 2, 3):
        found.put(entry(txid), now - txid)  # type: ignore[arg-type]
    replica.txid = TXID(2)
    found.note_stored(replica)  # type: ignore[arg-type]
    found.note_stored(replica)  # type: ignore[arg-type]
    window = found.loss_window(replica)  # type: ignore[arg-type]
    assert (window.count, window.total, round(window.p50_s), round(window.max_s)) == (2, 2, 1, 2)
    assert found.loss_window(slow) == LossWindow()  # type: ignore[arg-type]
    assert round(found.lag_s(slow)) == 3  # type: ignore[arg-type]
    assert found.waiting() == (3, 30, 0)


def test_synced_is_the_look_after_which_every_replica_had_everything() -> None:
    replica, slow = Stub(txid=TXID(1), online=True), Stub(txid=TXID(0), online=True)
    found = board(replica, slow)
    found.read(found.question(), TXID(1))
    assert found.synced_at is None
    slow.txid = TXID(1)
    found.note_stored(slow)  # type: ignore[arg-type]
    first = found.synced_at
    assert first is not None
    slow.online = False
    found.read(found.question(), TXID(1))
    assert found.synced_at == first
    slow.online = True
    found.read(found.question(), TXID(1))
    assert found.synced_at is not None
    assert found.synced_at > first


def test_what_is_committed_after_the_look_began_is_not_promised() -> None:
    replica = Stub(txid=TXID(1), online=True)
    found = board(replica)
    question = found.question()
    began = datetime.now(UTC)
    found.read(question, TXID(1))
    assert found.synced_at is not None
    assert found.synced_at <= began


def test_failure_is_told_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    told: list[ReplicatorError] = []
    found = board(Stub(txid=TXID(0), online=True), on_failure=told.append)
    error = ReplicatorError("over", hint="look at it")
    found.fail(error)
    found.fail(ReplicatorError("again"))
    assert told == [error]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "replication stopped db=/d/a.db error='over' hint='look at it'"


def test_an_entry_wakes_the_replicas_and_a_file_event_only_the_engine() -> None:
    found, woken, over = board(Stub(txid=TXID(0), online=True)), list[str](), list[bool]()

    def sleep(name: str, condition: threading.Condition) -> None:
        with found.changed:
            while not over:
                condition.wait()
                woken.append(name)

    conditions = {"engine": found.engine, "uploads": found.uploads, "others": found.changed}
    threads = [threading.Thread(target=sleep, args=item, daemon=True) for item in conditions.items()]
    for thread in threads:
        thread.start()
    until(lambda: all(condition._waiters for condition in conditions.values()))  # type: ignore[attr-defined]
    found.put(entry(1))  # type: ignore[arg-type]
    until(lambda: len(woken) == 2 and all(condition._waiters for condition in conditions.values()))  # type: ignore[attr-defined]
    assert sorted(woken) == ["others", "uploads"]
    found.wait_for([], any_of_them=False, txid=None)
    until(lambda: len(woken) == 3 and found.engine._waiters)  # type: ignore[attr-defined]
    assert woken[2] == "engine"
    with found.changed:
        over.append(True)
        found.changed.notify_all()
    for thread in threads:
        thread.join(10)
    assert len(woken) == 6
