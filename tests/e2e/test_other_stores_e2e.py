"""The main job on the stores other than S3, as a library and as a user runs it: by URL and by `litestream.yml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator import Replicator, restore
from replicator.errors import Fenced, ReplicaEmptied
from replicator.storage import open_store
from tests.e2e.databases import checkpointed_bytes, connect, insert
from tests.otherservers import PASSWORD, Place, config_entry, fresh_path

TIMEOUT_S = 60


def pyrepl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "replicator", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=dict(os.environ))


@pytest.mark.parametrize("name", ["sftp", "abs"])
def test_a_configured_replica_is_written_and_restored(other_store: Callable[[str], Place], name: str, tmp_path: Path) -> None:
    settings = other_store(name).settings(fresh_path())
    database, config = tmp_path / "a.db", tmp_path / "litestream.yml"
    config.write_text(json.dumps({"dbs": [{"path": str(database), "replica": config_entry(settings)}]}))
    application = connect(database)
    insert(application, 200)
    done = pyrepl("replicate", "-once", "-config", config)
    assert done.returncode == 0, done.stderr
    back = pyrepl("restore", "-config", config, "-o", tmp_path / "r.db", "-integrity-check", "full", database)
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    assert PASSWORD not in done.stdout + done.stderr + back.stdout + back.stderr
    application.close()


@pytest.mark.parametrize("url", ["sftp", "sftp-rclone", "webdav", "nats", "gs"], indirect=True)
def test_replicate_stop_continue_restore(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database)
    for _ in range(2):
        with Replicator(database, url, sync_interval_s=0.02, min_checkpoint_pages=30) as engine:
            for _ in range(3):
                insert(application, 40)
                engine.wait(timeout_s=TIMEOUT_S)
            engine.snapshot()
    restore(url, tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


@pytest.mark.parametrize("name", ["sftp", "webdav", "oss", "nats"])
def test_a_second_writer_is_stopped_where_files_are_created(other_store: Callable[[str], Place], name: str, tmp_path: Path) -> None:
    settings = other_store(name).settings(fresh_path())
    first, second = tmp_path / "1" / "a.db", tmp_path / "2" / "a.db"
    first.parent.mkdir()
    application = connect(first)
    insert(application, 50)
    with Replicator(first, open_store(settings)) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    second.parent.mkdir()
    restore(open_store(settings), second)
    other = connect(second)
    engine = Replicator(first, open_store(settings)).start()
    engine.wait(timeout_s=TIMEOUT_S)
    with Replicator(second, open_store(settings)) as rival:
        insert(other, 10)
        rival.wait(timeout_s=TIMEOUT_S)
        insert(application, 10)
        with pytest.raises(Fenced):
            engine.wait(timeout_s=TIMEOUT_S)
    with pytest.raises(Fenced):
        engine.close()
    application.close()
    other.close()


@pytest.mark.parametrize("name", ["sftp", "oss"])
def test_an_emptied_replica_begins_anew_where_nothing_is_replaced_on_a_condition(
    other_store: Callable[[str], Place], name: str, tmp_path: Path
) -> None:
    settings = other_store(name).settings(fresh_path())
    database = tmp_path / "a.db"
    application = connect(database)
    insert(application, 50)
    with Replicator(database, open_store(settings)) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    client = open_store(settings)
    for level in range(10):
        client.delete(list(client.list(level)))
    with pytest.raises(ReplicaEmptied):
        Replicator(database, open_store(settings)).start()
    with Replicator(database, open_store(settings), force_snapshot=True) as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    restore(client, tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()
