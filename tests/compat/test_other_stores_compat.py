"""The released Litestream 0.5.17 reads what we write to each of the other stores, and we read what it writes there, at the same URLs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replicator import Replicator, restore
from replicator.storage import open_store
from tests.e2e.databases import checkpointed_bytes, connect, insert
from tests.otherservers import OTHER_STORES, Place, config_entry, fresh_path
from tests.servers import tool

TIMEOUT_S = 60


class Judge:
    """Litestream with a configuration for one database and one replica."""

    def __init__(self, database: Path, replica: dict[str, object], folder: Path) -> None:
        self.database, self.config = database, folder / "litestream.yml"
        self.config.write_text(json.dumps({"dbs": [{"path": str(database), "replica": replica}]}))

    def __call__(self, command: str, *arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LITESTREAM_")}
        done = subprocess.run(
            [tool("litestream"), command, *arguments], capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def replicate(self) -> None:
        self("replicate", "-once", "-config", str(self.config))

    def restore(self, output: Path, *flags: str) -> bytes:
        self("restore", "-config", str(self.config), "-o", str(output), "-integrity-check", "full", *flags, str(self.database))
        return output.read_bytes()

    def count(self) -> int:
        """Return how many files of level 0 it lists."""
        return len(re.findall(r"^0\s", self("ltx", "-config", str(self.config), "-level", "0", str(self.database)), re.MULTILINE))


# WsgiDAV answers a PROPFIND of a missing folder before it has read the request, and the rest of it on the same connection as another one:
# Litestream's library does not survive that.
@pytest.mark.parametrize("name", [name for name in OTHER_STORES if name != "webdav-wsgidav"])
def test_each_reads_what_the_other_wrote(other_store: Callable[[str], Place], name: str, tmp_path: Path) -> None:
    place, path = other_store(name), fresh_path()
    settings = place.settings(path)
    database = tmp_path / "a.db"
    judge = Judge(database, config_entry(settings), tmp_path)
    application = connect(database)
    insert(application, 30)

    judge.replicate()
    expected = checkpointed_bytes(database, tmp_path)
    client = open_store(settings)
    assert len(list(client.list(0))) >= 1
    restore(client, tmp_path / "ours-of-theirs.db", integrity_check="full")
    assert (tmp_path / "ours-of-theirs.db").read_bytes() == expected

    with Replicator(database, client) as engine:
        for _ in range(3):
            insert(application, 20)
            engine.wait(timeout_s=TIMEOUT_S)
        engine.snapshot()
    expected = checkpointed_bytes(database, tmp_path)
    assert judge.restore(tmp_path / "theirs-of-ours.db") == expected

    fresh = open_store(settings)
    files = list(fresh.list(0, accurate_times=True))
    assert judge.count() == len(files)
    chosen = files[-2]
    fresh.close()
    restored = judge.restore(tmp_path / "theirs-then.db", "-txid", f"{chosen.max_txid:016x}")
    last = open_store(settings)
    restore(last, tmp_path / "ours-then.db", txid=chosen.max_txid)
    assert (tmp_path / "ours-then.db").read_bytes() == restored
    moment = datetime.fromtimestamp(chosen.created_at.timestamp() + 0.0005, UTC)
    restore(last, tmp_path / "ours-by-time.db", timestamp=moment)
    assert (tmp_path / "ours-by-time.db").read_bytes() == restored
    last.close()
    application.close()
