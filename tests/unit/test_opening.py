"""What opening a database makes, locks and syncs: no more than it needs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import replicator.atomic
from replicator import Replicator
from replicator.db import Database
from replicator.format.ltx import FileInfo
from replicator.outbox import DISK_RESERVE_BYTES, Staging
from replicator.storage.file import FileClient
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import connect, drain, engine_for, insert


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is brought to stable storage."""
    found, sync_file = list[str](), replicator.atomic.sync_file

    def sync(file: int) -> None:
        found.append(os.readlink(f"/proc/self/fd/{file}"))
        sync_file(file)

    monkeypatch.setattr(replicator.atomic, "sync_file", sync)
    return found


def test_each_folder_of_a_new_replica_is_synced_once(tmp_path: Path, syncs: list[str]) -> None:
    FileClient(tmp_path / "r").put(0, 1, 1, b"x", timestamp_ms=1)  # type: ignore[arg-type]
    folders = Counter(name for name in syncs if os.path.isdir(name))
    assert folders == {str(tmp_path): 1, f"{tmp_path}/r": 1, f"{tmp_path}/r/ltx": 1, f"{tmp_path}/r/ltx/0": 1}


def test_folders_that_were_there_are_synced_all_the_same(tmp_path: Path, syncs: list[str]) -> None:
    (tmp_path / "r" / "ltx" / "0").mkdir(parents=True)  # perhaps a moment before a power cut
    FileClient(tmp_path / "r").put(0, 1, 1, b"x", timestamp_ms=1)  # type: ignore[arg-type]
    folders = Counter(name for name in syncs if os.path.isdir(name))
    assert folders == {f"{tmp_path}/r": 1, f"{tmp_path}/r/ltx": 1, f"{tmp_path}/r/ltx/0": 1}


def test_what_a_dead_writer_left_is_swept_where_the_replica_was_there(tmp_path: Path) -> None:
    left = tmp_path / "r" / "ltx" / "0" / ".pyrepl-0123456789abcdef.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    FileClient(tmp_path / "r").put_control("pyrepl/lineage.json", b"x")
    assert not left.exists()


def test_a_folder_for_large_files_is_made_when_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging(tmp_path / "staged", limit_bytes=1 << 20)
    assert staging.files() == []
    assert not staging.is_full()
    staging.clear()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=DISK_RESERVE_BYTES - 1))
    assert staging.is_full()
    with pytest.raises(OSError, match="nearly full") as caught:
        staging.create("a")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    file, path = staging.create("a.ltx")
    assert staging.finish(file, path).parent == tmp_path / "staged"
    (tmp_path / "staged" / "b.tmp").touch()
    Staging(tmp_path / "staged", limit_bytes=1 << 20)
    assert [item.name for item in (tmp_path / "staged").iterdir()] == ["a.ltx"]


def test_a_database_without_a_wal_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, lock_writers = list[bool](), Database._lock_writers
    monkeypatch.setattr(Database, "_lock_writers", lambda self: locked.append(True) or lock_writers(self))  # type: ignore[func-returns-value]
    connection = connect(tmp_path / "a.db")
    insert(connection, 1)
    connection.close()
    with Replicator(tmp_path / "a.db", MemoryClient()) as replicator_:
        for _ in range(3):
            assert replicator_.wait(timeout_s=20) == 1
        assert not locked
        connection = connect(tmp_path / "a.db")
        insert(connection, 2)
        assert replicator_.wait(timeout_s=20) == 2
        replicator_.wait(timeout_s=20)
        assert locked  # the WAL has begun: the pin moves, so that others may copy
        insert(connection, 3)
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        assert replicator_.wait(timeout_s=20) == 3
        connection.close()


def test_connections_for_checkpoints_are_opened_for_the_first_one_and_the_wal_outlives_them(tmp_path: Path) -> None:
    connection = connect(tmp_path / "a.db")
    insert(connection, 1)
    database = Database(tmp_path / "a.db")
    database.open()
    connection.close()
    assert len(database._connections) == 2
    image = database.image()
    database.attached(image.position)
    result = database.checkpoint(image.position, lambda changes: None, copy_first=False)
    assert result.complete
    assert len(database._connections) == 3
    database.close()
    assert (tmp_path / "a.db-wal").exists()  # one that only reads was closed last
    database.open()
    assert len(database._connections) == 2
    database.close()


def test_that_nothing_is_stored_is_not_written_down(tmp_path: Path) -> None:
    connection = connect(tmp_path / "a.db")
    insert(connection, 1)
    client = MemoryClient()
    engine = engine_for(tmp_path / "a.db", client)
    engine.open()
    noted = engine.folder / "replicas.json"
    assert not noted.exists()
    drain(engine)
    assert json.loads(noted.read_bytes()) == {client.url: 1}
    engine.close()
    connection.close()


def test_entries_that_are_staged_before_anything_is_stored_survive(tmp_path: Path) -> None:
    """The note, that the replica belongs to this history, is there before the first entry that only this machine has."""
    connection = connect(tmp_path / "a.db")
    insert(connection, 1)

    class Away(MemoryClient):
        is_away = True

        def put(self, *args: Any, **options: Any) -> FileInfo:
            if self.is_away:
                raise OSError(errno.EIO, "away")
            return super().put(*args, **options)

    client = Away()
    with Replicator(tmp_path / "a.db", client) as replicator_:
        assert replicator_.capture(timeout_s=20) == 1
        known = tmp_path / ".a.db-litestream" / "pyrepl" / "replicas.json"
        assert json.loads(known.read_bytes()) == {client.url: 0}
        lineage = client.get_control("pyrepl/lineage.json").data
        client.is_away = False
        assert replicator_.wait(timeout_s=20) == 1
    assert client.get_control("pyrepl/lineage.json").data == lineage
    connection.close()
