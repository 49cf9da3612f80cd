"""Snapshots on a schedule and retention in format 0.3; what is in the window stays restorable with the released 0.3.13."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.format.ltx import TXID
from replicator.format.v3 import SegmentInfo, SnapshotInfo, parse_position
from replicator.levels import History as Wanted
from replicator.outbox import OutFile, Staging
from replicator.recent import RecentFiles
from replicator.restores import announce
from replicator.v3keeper import V3Keeper
from replicator.v3replica import V3Replica
from tests.compat.litestream03 import litestream03, restore03
from tests.compat.v3history import TIMEOUT_S, History, generations, rfc3339, stored
from tests.e2e.databases import checkpointed_bytes, connect, drain, insert, until
from tests.e2e.v3databases import Away, v3_engine_for


@pytest.fixture
def store(tmp_path: Path) -> Away:
    return Away(tmp_path / "replica")


def age(store: Away, seconds: float) -> None:
    """Let everything that is stored be older."""
    for path in (store.root / "generations").rglob("*.lz4"):
        at = path.stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(at, at))


def keeper_for(store: Away, replica: V3Replica, folder: Path, wanted: Wanted) -> V3Keeper:
    @contextlib.contextmanager
    def no_image(newer_than: TXID) -> Iterator[OutFile]:
        raise AssertionError("no snapshot is due")
        yield

    scratch = Staging(folder / "scratch", limit_bytes=1 << 20)
    return V3Keeper(replica, wanted, scratch=scratch, recent=RecentFiles(), take_snapshot=no_image)


def test_retention_deletes_only_what_no_moment_of_the_window_needs(tmp_path: Path, store: Away) -> None:
    database = tmp_path / "a.db"
    states: list[tuple[int, bytes]] = []
    application = connect(database)
    for run in range(2):
        engine = v3_engine_for(database, store, force_snapshot=True)
        engine.open()
        for step in range(6):
            for _ in range(2):
                insert(application, 10)
                drain(engine)
                age(store, 600)
                states = [(created_ns - 600 * 10**9, state) for created_ns, state in states]
                states.append((stored(store.url)[-1].created_ns, checkpointed_bytes(database, tmp_path)))
            assert engine.checkpoint()
            if step % 2:
                insert(application, 1)
                drain(engine)
                engine.replicas[0].add(engine.snapshot())
        if run == 0:
            engine.close()
    replica = engine.replicas[0]
    assert isinstance(replica, V3Replica)
    replica.relist()
    before = len(stored(store.url))
    retention_s = 600 * 8 + 300  # within the second generation
    keeper = keeper_for(store, replica, tmp_path, Wanted(snapshot_interval_s=0, snapshot_retention_s=retention_s))
    first, _ = generations(store.url)
    with announce() as announcement:  # somebody restores the first generation
        announcement.plan_generation(store.url, first, 0)
        assert keeper.step()
        assert first in generations(store.url)
    keeper = keeper_for(store, replica, tmp_path, keeper.history)
    assert keeper.step()
    assert not keeper.problems
    assert len(generations(store.url)) == 1
    assert before - len(stored(store.url)) > 10
    assert not keeper.step()
    edge_ns = time.time_ns() - int(retention_s * 1e9)
    kept = [state for state in states if state[0] >= edge_ns]
    assert 5 < len(kept) < len(states)
    for created_ns, expected in kept:
        assert restore03(store.url, tmp_path / "then.db", "-timestamp", rfc3339(created_ns)) == expected
    assert restore03(store.url, tmp_path / "newest.db") == checkpointed_bytes(database, tmp_path)
    gone = litestream03("restore", "-o", str(tmp_path / "gone.db"), "-timestamp", rfc3339(states[0][0]), store.url)
    assert gone.returncode != 0
    insert(application, 3)
    drain(engine)
    assert restore03(store.url, tmp_path / "newest.db") == checkpointed_bytes(database, tmp_path)
    engine.close()
    application.close()


def test_nothing_is_deleted_while_times_are_in_the_future(tmp_path: Path, store: Away) -> None:
    with closing(connect(tmp_path / "a.db")) as application:
        for _ in range(2):
            engine = v3_engine_for(tmp_path / "a.db", store, force_snapshot=True)
            engine.open()
            insert(application, 1)
            drain(engine)
            engine.close()
    replica = engine.replicas[0]
    assert isinstance(replica, V3Replica)
    keeper = keeper_for(store, replica, tmp_path, Wanted(snapshot_retention_s=0.001))
    age(store, -3600)
    assert keeper.step()
    assert "in the future" in keeper.problems["retention"]
    assert len(generations(store.url)) == 2


def test_snapshots_are_taken_on_schedule_and_old_ones_go(tmp_path: Path, store: Away) -> None:
    database = tmp_path / "a.db"
    history = History(database, store.url, tmp_path)
    wanted = Wanted(snapshot_interval_s=0.5, snapshot_retention_s=1.0, l0_retention_check_interval_s=0.1)
    with closing(connect(database)) as application:
        with Replicator(database, store, format="v0.3", min_checkpoint_pages=5, history=wanted) as engine:
            started = time.monotonic()

            def has_moved_on() -> bool:
                insert(application, 10)
                engine.wait(timeout_s=TIMEOUT_S)
                kept = [info for info in stored(store.url) if isinstance(info, SnapshotInfo)]
                return bool(kept) and kept[0].index > 0 and len(kept) > 1

            until(has_moved_on)
            assert time.monotonic() - started > 0.5
            history.note(engine)
            assert not engine.status().replicas[0].problems
        history.check_newest()
        infos = stored(store.url)
        first = min(info.index for info in infos if isinstance(info, SnapshotInfo))
        assert min(info.index for info in infos if isinstance(info, SegmentInfo)) == first
        assert parse_position(history.states[-1][0]).index > first
