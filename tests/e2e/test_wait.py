"""`wait`: what it promises, to threads and to tasks, and what many of them cost; and uploads at each commit."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.errors import ConfigError, DatabaseStateError, WaitTimeout
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import Flaky, checkpointed_bytes, connect, insert, restored, until

TIMEOUT_S = 60


@pytest.fixture(autouse=True)
def _nothing_is_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits at a gate would be staged after a second, and the engine would go on: on a busy machine one cannot count then."""
    monkeypatch.setattr("replicator.loop.STAGE_AFTER_S", TIMEOUT_S)


class Gate(MemoryClient):
    """A store whose raw files wait at a gate, and are counted."""

    def __init__(self, name: str = "gate") -> None:
        super().__init__()
        self.url = f"memory://{name}"
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.arrived = threading.Event()
        self.puts = 0

    def put(self, level, *args, **options):
        if level == 0:
            self.puts += 1
            self.arrived.set()
            assert self.open_gate.wait(TIMEOUT_S)
        return super().put(level, *args, **options)

    def hold(self) -> None:
        self.arrived.clear()
        self.open_gate.clear()


def in_threads(count: int, function: Callable[[int], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=function, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_a_hundred_threads_that_wait_cost_one_upload(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Gate()
    application, lock = connect(database), threading.Lock()
    with Replicator(database, client, sync_interval_s=3600, history=None, checkpoint_interval_s=0) as engine:
        insert(application, 1)
        before = engine.wait(timeout_s=TIMEOUT_S)
        client.hold()
        insert(application, 1)
        first = in_threads(1, lambda _: engine.wait(timeout_s=TIMEOUT_S) and None)
        assert client.arrived.wait(TIMEOUT_S)  # an upload is under way, and what follows cannot be in it
        puts, committed, stored = client.puts, threading.Barrier(101), list[int]()

        def commit_and_wait(number: int) -> None:
            with lock:
                insert(application, 1)
            committed.wait(TIMEOUT_S)
            stored.append(engine.wait(timeout_s=TIMEOUT_S))

        threads = in_threads(100, commit_and_wait)
        committed.wait(TIMEOUT_S)
        until(lambda: len(engine._board._waiters) == 101)
        client.open_gate.set()
        for thread in first + threads:
            thread.join()
        assert stored == [before + 2] * 100
        assert client.puts == puts + 1
        assert not engine._board._waiters
    application.close()


def test_wait_returns_only_when_the_replicas_asked_for_have_it(tmp_path: Path) -> None:
    database, near, far = tmp_path / "a.db", Gate("near"), Gate("far")
    application = connect(database)
    with Replicator(database, near, far, history=None, names=["local", "offsite"]) as engine:
        insert(application, 1)
        before = engine.wait(timeout_s=TIMEOUT_S)
        far.hold()
        insert(application, 1)
        assert engine.wait(replicas="any", timeout_s=TIMEOUT_S) == before + 1
        assert engine.wait(replicas=["memory://near"], timeout_s=TIMEOUT_S) == before + 1
        assert engine.wait(replicas="local", timeout_s=TIMEOUT_S) == before + 1
        for replicas in ("all", ["offsite"], ["memory://far", "local"]):
            with pytest.raises(WaitTimeout, match=rf"memory://far lacks TXID {before + 1:016x} \(it has {before:016x}\)") as caught:
                engine.wait(replicas=replicas, timeout_s=0.05)
            assert "near" not in str(caught.value)
        with pytest.raises(WaitTimeout, match=rf"near lacks TXID {before + 9:016x}.*far lacks"):
            engine.wait(before + 9, timeout_s=0)
        far.open_gate.set()
        assert engine.wait(replicas=["offsite"], timeout_s=TIMEOUT_S) == before + 1
        assert engine.wait(before, timeout_s=0) == before
        assert engine.status().synced_at is not None
    application.close()


def test_replicas_that_are_not_there_are_named(tmp_path: Path) -> None:
    application = connect(tmp_path / "a.db")
    with Replicator(tmp_path / "a.db", Gate("one"), Gate("two"), history=None) as engine:
        with pytest.raises(ConfigError, match=r"no such replica: 's3'; there are memory \(memory://one\), memory \(memory://two\)"):
            engine.wait(replicas=["s3"])
        with pytest.raises(ConfigError, match="several replicas are named 'memory'"):
            engine.wait(replicas="memory")
        with pytest.raises(ConfigError, match="no replica at all"):
            engine.wait(replicas=[])
    with pytest.raises(ConfigError, match="1 replicas, but 2 names"):
        Replicator(tmp_path / "a.db", Gate(), names=["a", "b"])
    application.close()


def test_a_thousand_tasks_wait_without_a_thread_and_the_loop_goes_on(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Gate()
    application = connect(database)

    async def run(engine: Replicator, before: int) -> None:
        threads = set(threading.enumerate())
        client.hold()
        insert(application, 1)
        tasks = [asyncio.create_task(engine.wait_async(timeout_s=TIMEOUT_S)) for _ in range(1000)]
        beats = 0
        while not (client.arrived.is_set() and len(engine._board._waiters) == 1000):
            beats += 1
            await asyncio.sleep(0)
        for _ in range(100):
            beats += 1
            await asyncio.sleep(0)
        assert beats > 100
        assert not any(task.done() for task in tasks)
        assert set(threading.enumerate()) <= threads
        client.open_gate.set()
        # The first asked before the WAL was read and the last may have asked afterwards: nothing is new for them.
        assert await asyncio.gather(*tasks) == [before + 1] * 1000

    with Replicator(database, client, sync_interval_s=3600, history=None) as engine:
        insert(application, 1)
        asyncio.run(run(engine, engine.wait(timeout_s=TIMEOUT_S)))
        assert client.puts == 2
    application.close()


def test_a_task_that_is_cancelled_or_out_of_time_leaves_nothing_behind(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Gate()
    application = connect(database)

    async def run(engine: Replicator, before: int) -> None:
        client.hold()
        insert(application, 1)
        cancelled = asyncio.create_task(engine.wait_async())
        patient = asyncio.create_task(engine.wait_async(timeout_s=TIMEOUT_S))
        with pytest.raises(WaitTimeout, match="memory://gate"):
            await engine.wait_async(timeout_s=0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        with pytest.raises(TimeoutError):  # somebody else's limit stays somebody else's
            async with asyncio.timeout(0.01):
                await engine.wait_async(timeout_s=TIMEOUT_S)
        assert len(engine._board._waiters) == 1
        client.open_gate.set()
        assert await patient == before + 1
        assert await engine.wait_async(before + 1) == before + 1

    with Replicator(database, client, history=None) as engine:
        insert(application, 1)
        asyncio.run(run(engine, engine.wait(timeout_s=TIMEOUT_S)))
        assert not engine._board._waiters
    application.close()


def test_who_waits_when_replication_ends_is_told(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Flaky()
    application = connect(database)
    engine = Replicator(database, client, history=None).start()
    insert(application, 1)
    engine.wait(timeout_s=TIMEOUT_S)
    client.down = True
    insert(application, 1)
    told: list[Exception] = []

    def wait(_: int) -> None:
        try:
            engine.wait()
        except Exception as error:
            told.append(error)

    threads = in_threads(3, wait)
    until(lambda: len(engine._board._waiters) == 3)
    with pytest.raises(WaitTimeout, match="out of reach"):
        engine.close(timeout_s=0.2)
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert [type(error) for error in told] == [DatabaseStateError] * 3
    application.close()


def test_wait_returns_with_the_store_and_not_with_the_page_table(tmp_path: Path) -> None:
    """What counts is the stored file."""
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    engine = Replicator(database, url, history=None, sync_interval_s=3600).start()
    insert(application, 1)
    engine.wait(timeout_s=TIMEOUT_S)
    until(lambda: not engine._board.is_asked)
    settled, reached = threading.Event(), threading.Event()
    settle = engine._engine.settled
    engine._engine.settled = lambda entry: (reached.set(), settled.wait(TIMEOUT_S), settle(entry))  # type: ignore[assignment,func-returns-value]
    insert(application, 5)
    stored = engine.wait(timeout_s=TIMEOUT_S)
    assert reached.wait(TIMEOUT_S)
    assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(database, tmp_path)
    settled.set()
    engine.close()
    with Replicator(database, url, history=None) as engine:
        assert engine.wait(timeout_s=TIMEOUT_S) == stored
    application.close()


# -- sync="commit" ---------------------------------------------------------------------------------------------------------------


def test_each_commit_is_uploaded_at_once_and_a_database_at_rest_is_left_alone(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Gate()
    application = connect(database)
    with Replicator(database, client, sync="commit", history=None) as engine:
        insert(application, 1)
        before = engine.wait(timeout_s=TIMEOUT_S)
        until(lambda: engine._loop._watch.armed)
        for number in range(1, 21):
            insert(application, 1)
            engine.wait(before + number, timeout_s=TIMEOUT_S)  # asks for nothing
        assert engine._board._asked == engine._board._answered == 1
        window = engine.status().replicas[0].loss_window
        assert window.total == before + 20
        assert window.p50_s < 0.5  # at the default interval for a store elsewhere it would be a second
        looks = engine.status().counts.syncs
        time.sleep(0.5)
        assert engine.status().counts.syncs - looks < 10  # it looks at events, not at a clock
        quiet = until_quiet(engine)
        time.sleep(0.5)
        assert engine.status().counts.syncs == quiet
    application.close()


def test_a_commit_now_and_then_is_looked_at_once_and_a_busy_writer_at_a_pace(tmp_path: Path) -> None:
    application = connect(tmp_path / "a.db")
    with Replicator(tmp_path / "a.db", MemoryClient(), history=None) as engine:
        insert(application, 1)
        txid = engine.wait(timeout_s=TIMEOUT_S)
        until(lambda: engine._loop._watch.armed)
        until_quiet(engine)
        looks = engine.status().counts.syncs
        for number in range(1, 6):
            insert(application, 1)
            engine.wait(txid + number, timeout_s=TIMEOUT_S)  # asks for nothing
            time.sleep(0.25)  # more than ARM_S: now and then
            assert engine._loop._watch.armed
        assert engine.status().counts.syncs - looks <= 10  # with the watch given up after each it is 20
        end = time.monotonic() + TIMEOUT_S
        while engine._loop._watch.armed and time.monotonic() < end:
            insert(application, 1)
            time.sleep(0.01)
        assert not engine._loop._watch.armed
        until(lambda: engine._loop._watch.armed)
    application.close()


def test_events_of_a_busy_writer_wake_nobody_at_a_slow_pace_either(tmp_path: Path) -> None:
    application = connect(tmp_path / "a.db")
    with Replicator(tmp_path / "a.db", MemoryClient(), history=None, sync_interval_s=0.3) as engine:
        until(lambda: engine._loop._watch.armed)
        end = time.monotonic() + TIMEOUT_S
        while engine._loop._watch.armed and time.monotonic() < end:
            insert(application, 1)
            time.sleep(0.01)
        assert not engine._loop._watch.armed
        until(lambda: engine._loop._watch.armed)  # when it is quiet
    application.close()


def test_a_busy_writer_is_not_listened_to_until_the_next_look_at_a_slow_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    application = connect(tmp_path / "a.db")
    with Replicator(tmp_path / "a.db", MemoryClient(), history=None, sync_interval_s=0.3) as engine:
        until(lambda: engine._loop._watch.armed)
        with monkeypatch.context() as patch:
            patch.setattr(engine._loop, "_next_due", lambda now, last_sync, last_news: now + TIMEOUT_S)
            looks, end = engine.status().counts.syncs, time.monotonic() + TIMEOUT_S / 2
            while engine._loop._watch.armed and time.monotonic() < end:
                insert(application, 1)
                time.sleep(0.01)
            assert not engine._loop._watch.armed
            assert engine.status().counts.syncs == looks
        engine.wait(timeout_s=TIMEOUT_S)  # it looks when it is asked
        until(lambda: engine._loop._watch.armed)
    application.close()


def until_quiet(engine: Replicator) -> int:
    """Wait until no look follows for a moment; returns how many there were."""
    seen = [-1]

    def is_quiet() -> bool:
        last, seen[0] = seen[0], engine.status().counts.syncs
        time.sleep(0.2)
        return engine.status().counts.syncs == seen[0] == last

    until(is_quiet)
    return seen[0]


def test_what_is_committed_during_an_upload_goes_with_the_next_one(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Gate()
    application = connect(database)
    with Replicator(database, client, sync="commit", history=None, checkpoint_interval_s=0) as engine:
        insert(application, 1)
        before = engine.wait(timeout_s=TIMEOUT_S)
        client.hold()
        insert(application, 1)
        assert client.arrived.wait(TIMEOUT_S)
        for _ in range(20):
            insert(application, 1)
        client.open_gate.set()
        engine.wait(before + 2, timeout_s=TIMEOUT_S)
        assert engine.wait(timeout_s=TIMEOUT_S) == before + 2
    application.close()


def test_an_open_transaction_that_writes_a_lot_is_looked_at_ever_more_rarely(tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", Gate()
    application = connect(database)
    with Replicator(database, client, sync="commit", history=None) as engine:
        insert(application, 1)
        before = engine.wait(timeout_s=TIMEOUT_S)
        until(lambda: engine._loop._watch.armed)
        looks = until_quiet(engine)
        wal = os.open(f"{database}-wal", os.O_RDWR)  # touched again and again without a commit, as spilled pages do
        end, touches = time.monotonic() + 1, 0
        try:
            while time.monotonic() < end:
                os.utime(wal)
                os.pwrite(wal, b"", 0)
                os.pwrite(wal, os.pread(wal, 1, 0), 0)
                touches += 1
                time.sleep(0.001)
        finally:
            os.close(wal)
        assert touches > 100
        assert engine.status().counts.syncs - looks < 60
        insert(application, 1)
        engine.wait(before + 1, timeout_s=TIMEOUT_S)
    application.close()


def test_pacing_that_says_two_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sync_interval_s goes with"):
        Replicator(tmp_path / "a.db", Gate(), sync="commit", sync_interval_s=1)
    with pytest.raises(ConfigError, match="interval or commit, not 'always'"):
        Replicator(tmp_path / "a.db", Gate(), sync="always")  # type: ignore[arg-type]


# -- the loss window --------------------------------------------------------------------------------------------------------------


def test_the_loss_window_is_no_shorter_than_the_time_a_store_takes(tmp_path: Path) -> None:
    """Measured against the application's own clock, which the engine does not see."""
    database, client = tmp_path / "a.db", Gate()
    application = connect(database)
    with Replicator(database, client, sync="commit", history=None) as engine:
        insert(application, 1)
        before = engine.wait(timeout_s=TIMEOUT_S)
        until(lambda: engine._loop._watch.armed)
        until_quiet(engine)
        client.hold()
        insert(application, 1)
        committed = time.monotonic()
        assert client.arrived.wait(TIMEOUT_S)
        time.sleep(0.3)
        held_s = time.monotonic() - committed
        client.open_gate.set()
        engine.wait(before + 1, timeout_s=TIMEOUT_S)
        window = engine.status().replicas[0].loss_window
        assert held_s <= window.max_s < held_s + 5
        assert sum(window.slots) == window.total == before + 1
    application.close()
