"""`pyrepl top` on a terminal, while its daemon goes away and comes back; and with Litestream's daemon."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.databases import connect, insert, until
from tests.servers import tool

TOP = [sys.executable, "-m", "replicator", "top"]


class Terminal:
    """A command on a terminal of its own; `seen` is what it has written."""

    def __init__(self, *command: str, columns: int = 120, lines: int = 30) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        environ = {**os.environ, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command, stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True, env=environ
        )
        self.seen = ""

    def until(self, pattern: str, timeout_s: float = 30) -> None:
        """Read until what was written since the last call matches; a frame that was drawn before is not looked at again."""
        fresh, end = "", time.monotonic() + timeout_s
        while not re.search(pattern, fresh):
            left = end - time.monotonic()
            assert left > 0, f"{pattern} did not come: {fresh[-3000:]}"
            if select.select([self.master], [], [], left)[0]:
                text = os.read(self.master, 65536).decode(errors="replace")
                fresh, self.seen = fresh + text, self.seen + text

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        """Wait for the end, reading what is written."""
        while self.process.poll() is None:
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        return self.process.returncode

    @property
    def is_restored(self) -> bool:
        """Whether the terminal is as it was: its settings, its first screen, its cursor."""
        pairs = [("\x1b[?1049h", "\x1b[?1049l"), ("\x1b[?25l", "\x1b[?25h")]
        is_drawn_back = all(0 <= self.seen.rfind(on) < self.seen.rfind(off) for on, off in pairs)
        return is_drawn_back and termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    found = Terminal(*command)
    try:
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def daemon(config: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    path = config.with_name("s.sock")
    with (config.parent / "daemon.log").open("ab") as log:
        process = subprocess.Popen([*command, "replicate", "-config", str(config)], stdout=log, stderr=log)
    try:
        until(
            lambda: (
                path.exists()
                and "replicating" in subprocess.run([*TOP[:3], "list", "-socket", path], capture_output=True, text=True).stdout
            )
        )
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    connection = connect(tmp_path / "a.db")
    insert(connection, 3)
    connection.close()
    path = tmp_path / "c.yml"
    path.write_text(
        f"socket: {{enabled: true, path: {tmp_path}/s.sock}}\ndbs: [{{path: {tmp_path}/a.db, replica: {{path: {tmp_path}/r}}}}]"
    )
    return path


def test_on_a_terminal_through_the_end_of_its_daemon_and_a_new_one(config: Path) -> None:
    where = ["-socket", str(config.with_name("s.sock")), "-interval", "100ms"]
    with terminal(*TOP, *where) as top:
        top.until("the daemon does not answer; trying again")  # it may be started first
        with daemon(config, *TOP[:3]) as process:
            top.until(rf"pid {process.pid} .* 1 replicating")
            top.until("a.db +replicating")
            top.type("s")
            top.until("1 of 1, by lag")
            top.type("/none")
            top.until(r"search: none_ +\(0 found")
            top.type("\x1b")
            top.until("1 of 1, by lag")
            process.kill()
            process.wait()
            top.until("does not answer, last heard of at .*(?:.|\n)*a.db")
        with daemon(config, *TOP[:3]) as process:
            top.until(rf"pid {process.pid} ")
            top.type("q")
            assert top.end() == 0
        assert top.is_restored
        # Between its first and its last line it draws over what is there, and never clears it.
        assert top.seen.count("\x1b[2J") <= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signals_leave_the_terminal_as_it_was(config: Path, number: int, code: int) -> None:
    with daemon(config, *TOP[:3]), terminal(*TOP, "-socket", str(config.with_name("s.sock"))) as top:
        top.until("a.db +replicating")
        top.process.send_signal(number)
        assert top.end() == code
        assert top.is_restored


@pytest.mark.parametrize("name", ["pyrepl", "litestream"])
def test_json_for_scripts_of_our_daemon_and_of_litestreams(config: Path, name: str) -> None:
    where = ["-socket", str(config.with_name("s.sock"))]
    command = TOP[:3] if name == "pyrepl" else [tool("litestream")]
    with daemon(config, *command) as process:
        writer = connect(config.with_name("a.db"))
        insert(writer, 3)
        subprocess.run([*TOP[:3], "sync", "-wait", *where, config.with_name("a.db")], check=True, stdout=subprocess.DEVNULL, timeout=60)
        done = subprocess.run([*TOP, *where, "-json", "-n", "2", "-interval", "100ms"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done
        _, found = map(json.loads, done.stdout.splitlines())
        (row,) = found["databases"]
        assert (found["daemon"]["pid"], found["daemon"]["name"].lower()) == (process.pid, name)
        assert (row["path"], row["state"]) == (f"{config.parent}/a.db", "replicating")
        assert row["wal_bytes"] > 0 or name == "litestream"  # which may just have emptied it
        assert row["txid"] >= 1
        assert (row["bytes_per_second"] is None) == (name == "litestream")
        lines = subprocess.run(
            [*TOP, *where, "-once", "-interval", "100ms"], capture_output=True, text=True, timeout=60
        ).stdout.splitlines()
        assert lines[3].startswith(f"{config.parent}/a.db  replicating")
        writer.close()
