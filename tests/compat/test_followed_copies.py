"""Follow replicas that the released Litestream writes, and go on with copies that it has followed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from replicator.follow import Follower, follow, read_txid, txid_path
from replicator.inplace import InPlace
from replicator.storage import open_client
from tests.compat.litestream import replicate_once
from tests.compat.litestream import restore as litestream_restore
from tests.e2e.databases import connect, insert, txids
from tests.servers import tool

NEVER = threading.Event()


def plain(path: Path) -> bytes:
    data = path.read_bytes()
    return data[:18] + data[20:24] + data[28:]


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_a_replica_of_the_released_version_is_followed(tmp_path: Path, page_size: int) -> None:
    database, url, output = tmp_path / "a.db", f"file://{tmp_path}/replica", tmp_path / "copy.db"
    application, client = connect(database, page_size=page_size), open_client(url)
    insert(application, 50)
    replicate_once(database, url, tmp_path)
    stop = threading.Event()
    follow(client, output, stop=stop, applied=lambda _: stop.set())
    for step in range(5):
        insert(application, 30)
        if step == 2:
            application.execute("DELETE FROM t WHERE id > 20")
            application.execute("VACUUM")
        replicate_once(database, url, tmp_path)
        txid = read_txid(output)
        assert txid is not None
        with InPlace(output) as copy:  # a resume each time
            Follower(client, copy, txid).tick(NEVER)
        assert read_txid(output) == txids(url)[-1]
        litestream_restore(url, tmp_path / f"theirs-{step}.db")
        assert plain(output) == plain(tmp_path / f"theirs-{step}.db")
    application.close()


def test_a_copy_that_the_released_version_followed_is_continued(tmp_path: Path) -> None:
    database, url, output = tmp_path / "a.db", f"file://{tmp_path}/replica", tmp_path / "copy.db"
    application, client = connect(database), open_client(url)
    insert(application, 50)
    replicate_once(database, url, tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LITESTREAM_")}
    command = [tool("litestream"), "restore", "-f", "-o", str(output), url]
    peer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert peer.stdout is not None
    assert "entering follow mode" in peer.stdout.readline()
    peer.send_signal(signal.SIGTERM)
    peer.communicate(timeout=60)
    assert output.read_bytes()[18:20] == b"\2\2"
    assert txid_path(output).read_text() == f"{txids(url)[-1]:016x}\n"
    insert(application, 30)
    replicate_once(database, url, tmp_path)
    stop = threading.Event()
    assert follow(client, output, stop=stop, interval_s=0.01, applied=lambda _: stop.set()) == txids(url)[-1]
    litestream_restore(url, tmp_path / "theirs.db")
    assert plain(output) == plain(tmp_path / "theirs.db")
    assert output.read_bytes()[18:20] == b"\1\1"
    application.close()
