"""SIGKILL of the daemon again and again, while two databases are written: nothing that a client was told is stored is lost, nothing is torn."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from replicator.cli.control import ask_daemon
from replicator.errors import ReplicatorError
from tests.e2e.databases import checkpointed_bytes, connect, restored, rows


class Writer(threading.Thread):
    """Writes numbered rows, and asks the daemon now and then to store them: `stored` is the last number that it said it has."""

    def __init__(self, database: Path, socket: Path) -> None:
        super().__init__(daemon=True)
        self.database, self.socket, self.stored, self.asked = database, socket, 0, 0
        self.done = threading.Event()

    def run(self) -> None:
        connection = connect(self.database, autocheckpoint=50)
        number = 0
        while not self.done.is_set():
            for _ in range(20):
                number += 1
                connection.execute("INSERT INTO t(id, v) VALUES(?, randomblob(700))", (number,))
            with contextlib.suppress(ReplicatorError):
                self.asked += 1
                ask_daemon(self.socket, "/sync", {"path": str(self.database), "wait": True, "timeout": 5}, timeout_s=10)
                self.stored = number
        connection.close()


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    "kills",
    [
        10,
        pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param(200, marks=[pytest.mark.scheduled, pytest.mark.timeout(900)]),
    ],
)
def test_killed_under_load(tmp_path: Path, kills: int) -> None:
    socket = tmp_path / "s.sock"
    names = ("a", "b")
    entries = "".join(f"  - path: {tmp_path}/{name}.db\n    replica: {{path: {tmp_path}/r-{name}}}\n" for name in names)
    config = tmp_path / "c.yml"
    config.write_text(f"socket: {{enabled: true, path: {socket}}}\nlevels: [{{interval: 1s}}, {{interval: 3s}}]\ndbs:\n{entries}")
    command = [sys.executable, "-m", "replicator", "replicate", "-config", str(config)]
    chance = random.Random(20)
    for name in names:
        connect(tmp_path / f"{name}.db").close()
    writers = [Writer(tmp_path / f"{name}.db", socket) for name in names]
    for writer in writers:
        writer.start()
    stored = [0, 0]
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = [writer.stored for writer in writers]
        end = time.monotonic() + 30
        while [writer.stored for writer in writers] == before:  # it works, whatever the last kill left behind
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)  # the moment of the kill is what the test is about
        process.send_signal(signal.SIGKILL)
        process.wait()
        stored = [writer.stored for writer in writers]
    for name, count in zip(names, stored, strict=True):  # what was acknowledged, from the replica alone
        assert len(rows(restored(f"file://{tmp_path}/r-{name}", tmp_path))) >= count > 0
    for writer in writers:
        writer.done.set()
        writer.join(30)
    done = subprocess.run([*command, "-once"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    for name in names:
        assert restored(f"file://{tmp_path}/r-{name}", tmp_path).read_bytes() == checkpointed_bytes(tmp_path / f"{name}.db", tmp_path)
        assert not list((tmp_path / f"r-{name}").rglob("*.tmp*"))
