"""The main job against three S3 servers, one of which ignores conditions."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicator import Replicator, restore
from tests.e2e.databases import checkpointed_bytes, connect, insert

TIMEOUT_S = 60


@pytest.mark.parametrize("store", ["seaweed", "moto", "rclone"])
def test_replicate_stop_continue_restore(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> None:
    database, url = tmp_path / "a.db", request.getfixturevalue(store).url(f"job-{store}")
    application = connect(database)
    for _ in range(2):
        with Replicator(database, url, sync_interval_s=0.02, min_checkpoint_pages=30) as engine:
            for _ in range(6):
                insert(application, 40)
                engine.wait(timeout_s=TIMEOUT_S)
            engine.snapshot()
            insert(application, 5)
    restore(url, tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    restore(url, tmp_path / "r3.db", txid=3, integrity_check="full")
    application.close()
