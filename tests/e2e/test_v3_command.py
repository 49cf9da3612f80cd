"""`pyrepl replicate` in the format of Litestream 0.3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.litestream03 import restore03
from tests.compat.v3history import generations
from tests.e2e.databases import checkpointed_bytes, connect, insert


def pyrepl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "replicator", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_once_stores_it_and_the_next_run_goes_on(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    for _ in range(2):
        insert(application, 20)
        done = pyrepl("replicate", "-once", "-format", "v0.3", database, url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert restore03(url, tmp_path / "theirs.db") == checkpointed_bytes(database, tmp_path)
    assert len(generations(url)) == 1
    assert not (tmp_path / "replica/ltx").exists()
    application.close()


def test_a_configuration_names_the_format_and_the_position_is_logged(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    config = tmp_path / "litestream.yml"
    config.write_text(f"dbs: [{{path: {database}, format: v0.3, replicas: [{{path: {tmp_path}/replica, snapshot-interval: 1h}}]}}]")
    application = connect(database)
    insert(application, 20)
    command = [sys.executable, "-m", "replicator", "replicate", "-config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    line = ""
    while "new generation" not in line:
        line = process.stdout.readline()
        assert line
    insert(application, 20)
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(60) == 0
    process.stdout.close()
    assert f"position={generations(url)[0]}/00000000:" in rest
    assert restore03(url, tmp_path / "theirs.db") == checkpointed_bytes(database, tmp_path)
    application.close()


def test_a_missing_database_is_restored_before_it_is_replicated_again(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    insert(application, 20)
    assert pyrepl("replicate", "-once", "-format", "v0.3", database, url).returncode == 0
    expected = checkpointed_bytes(database, tmp_path)
    application.close()
    for path in tmp_path.glob("a.db*"):
        path.unlink()
    done = pyrepl("replicate", "-once", "-format", "v0.3", "-restore-if-db-not-exists", database, url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert database.read_bytes() == expected
    assert restore03(url, tmp_path / "theirs.db") == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-format", "v0.4", "a.db", "file:///tmp/x"], "unknown format"),
        (["-format", "v0.3"], "-format goes with a database and URLs"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = pyrepl("replicate", *arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
