"""SIGKILL of the daemon while databases of a directory are written, parked and woken: each is exact afterwards, nothing that was acknowledged is lost."""

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

DATABASES = 6


class Writer(threading.Thread):
    """Writes rows in bursts, with pauses in which the database is parked, in turn with its last connection closed and open."""

    def __init__(self, database: Path, socket: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.database, self.socket, self.stored = database, socket, 0
        self.chance = random.Random(seed)
        self.done = threading.Event()

    def run(self) -> None:
        number = 0
        connection = connect(self.database, autocheckpoint=20)
        while not self.done.is_set():
            for _ in range(self.chance.randrange(1, 30)):
                number += 1
                connection.execute("INSERT INTO t(id, v) VALUES(?, randomblob(700))", (number,))
            if self.chance.random() < 0.5:
                with contextlib.suppress(ReplicatorError):
                    ask_daemon(self.socket, "/sync", {"path": str(self.database), "wait": True, "timeout": 5}, timeout_s=10)
                    self.stored = number
            if self.chance.random() < 0.5:
                connection.close()
                connection = connect(self.database, autocheckpoint=20)
            self.done.wait(self.chance.choice([0.0, 0.05, 0.4, 2.7]))
        connection.close()


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=[pytest.mark.scheduled, pytest.mark.timeout(900)])])
def test_killed_while_parking_and_waking(tmp_path: Path, kills: int) -> None:
    data, replica, socket, config = tmp_path / "d", tmp_path / "r", tmp_path / "s.sock", tmp_path / "c.yml"
    data.mkdir()
    config.write_text(
        f"socket: {{enabled: true, path: {socket}}}\nlogging: {{level: debug}}\nlevels: [{{interval: 2s}}]\n"
        f"pyrepl: {{park-after: 100ms, max-hot: 4}}\n"
        f"dbs: [{{dir: {data}, pattern: '*.db', watch: true, replica: {{path: {replica}}}}}]\n"
    )
    command = [sys.executable, "-m", "replicator", "replicate", "-config", str(config)]
    chance = random.Random(7)
    names = [f"{number}.db" for number in range(DATABASES)]
    for name in names:
        connect(data / name).close()
    writers = [Writer(data / name, socket, number) for number, name in enumerate(names)]
    for writer in writers:
        writer.start()
    stored = [0] * DATABASES
    log = tmp_path / "log"
    for _ in range(kills):
        with log.open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        before = [writer.stored for writer in writers]
        end = time.monotonic() + 60
        while [writer.stored for writer in writers] == before:  # it works, whatever the last kill left behind
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(chance.random() * 3)  # the moment of the kill is what the test is about
        process.send_signal(signal.SIGKILL)
        process.wait()
        stored = [writer.stored for writer in writers]
    for name, count in zip(names, stored, strict=True):  # what was acknowledged, from the replica alone
        assert not count or len(rows(restored(f"file://{replica}/{name}", tmp_path))) >= count
    for writer in writers:
        writer.done.set()
        writer.join(30)
    text = log.read_text()
    assert 'msg="parked"' in text
    assert 'msg="wakes up"' in text
    assert "defect" not in text
    done = subprocess.run([*command, "-once"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done
    for name in names:
        assert restored(f"file://{replica}/{name}", tmp_path).read_bytes() == checkpointed_bytes(data / name, tmp_path)
