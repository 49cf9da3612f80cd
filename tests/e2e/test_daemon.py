"""`pyrepl replicate` as a daemon: its child, its signals, its configuration read again, its listeners, and what a broken database does to all that."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, rows, txids, until


class Running:
    """`pyrepl replicate`, and its log lines."""

    def __init__(self, *arguments: object) -> None:
        self._start([sys.executable, "-m", "replicator", "replicate", *map(str, arguments)])

    @classmethod
    def of(cls, command: list[str]) -> Running:
        """Run another command, which comes to the same."""
        found = cls.__new__(cls)
        found._start(command)
        return found

    def _start(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.seen: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, *words: str, timeout_s: float = 30) -> str:
        """Read log lines up to the one with all of the words."""
        while True:
            try:
                line = self._lines.get(timeout=timeout_s)
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no line with {words}: {self.seen}")
            self.seen.append(line)
            if all(word in line for word in words):
                return line

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = 30) -> int:
        """Wait for the end; returns the exit code. All lines are in `seen` then."""
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        while (line := self._lines.get(timeout=10)) is not None:
            self.seen.append(line)
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # its application, too, or the pipe stays open
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[Running]:
    found = Running(*arguments)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(tmp_path / "a.db")
    insert(connection, 5)
    yield connection
    connection.close()


def configure(folder: Path, *names: str, top: str = "", **keys: str) -> Path:
    """A configuration with these databases; `keys` are further lines for one of them."""
    path = folder / "c.yml"
    entries = [f"  - path: {folder}/{name}.db\n    replica: {{path: {folder}/r-{name}}}\n{keys.get(name, '')}" for name in names]
    path.write_text(f"{top}\ndbs:\n" + "".join(entries) if entries else top)
    return path


def is_exact(folder: Path, name: str = "a") -> bool:
    """Whether the replica gives back the database, byte for byte."""
    return restored(f"file://{folder}/r-{name}", folder).read_bytes() == checkpointed_bytes(folder / f"{name}.db", folder)


def python(code: str) -> str:
    return f"{sys.executable} -c '{code}'"


# -- the child -------------------------------------------------------------------------------------------------------------------


WRITES = 'import sqlite3; c = sqlite3.connect("{}"); c.execute("INSERT INTO t(v) VALUES(7)"); c.commit(); c.close(); raise SystemExit({})'


@pytest.mark.parametrize("code", [0, 3])
def test_what_the_application_wrote_last_is_stored_and_its_exit_code_is_ours(
    tmp_path: Path, database: sqlite3.Connection, code: int
) -> None:
    config = configure(tmp_path, "a")
    with running("-config", config, "-exec", python(WRITES.format(tmp_path / "a.db", code))) as daemon:
        assert daemon.end() == code
    assert rows(restored(f"file://{tmp_path}/r-a", tmp_path))[-1][1] == 7
    assert is_exact(tmp_path)


def test_exec_of_the_configuration_and_of_a_database_with_a_url(tmp_path: Path, database: sqlite3.Connection) -> None:
    with running("-config", configure(tmp_path, "a", top="exec: sh -c 'exit 4'")) as daemon:
        assert daemon.end() == 4
    with running("-exec", "sh -c 'exit 5'", tmp_path / "a.db", f"file://{tmp_path}/r-a") as daemon:
        assert daemon.end() == 5
    assert is_exact(tmp_path)


def test_the_application_may_make_the_database(tmp_path: Path) -> None:
    code = f'import sqlite3; c = sqlite3.connect("{tmp_path}/a.db"); c.execute("CREATE TABLE t(v)"); c.commit(); input()'
    with running("-config", configure(tmp_path, "a"), "-exec", python(code)) as daemon:
        daemon.until("initialized db")
        assert daemon.process.stdin is not None
        daemon.process.stdin.close()  # lets the application end
        daemon.end()
    assert restored(f"file://{tmp_path}/r-a", tmp_path).exists()


def test_a_database_that_the_application_made_just_before_its_end_is_stored_and_restored(tmp_path: Path) -> None:
    code = (
        f'import sqlite3; c = sqlite3.connect("{tmp_path}/a.db"); c.execute("CREATE TABLE IF NOT EXISTS t(v)");'
        ' c.execute("INSERT INTO t VALUES(1)"); c.commit(); raise SystemExit(c.execute("SELECT count(*) FROM t").fetchone()[0])'
    )
    for count in (1, 2, 3):  # each time on an empty disk
        with running("-restore-if-db-not-exists", "-exec", python(code), tmp_path / "a.db", f"file://{tmp_path}/r-a") as daemon:
            assert daemon.end() == count
        for path in [*tmp_path.glob("a.db*"), *(tmp_path / ".a.db-litestream/pyrepl").glob("pages")]:
            path.unlink()


def test_signals_are_passed_on_and_what_the_application_makes_of_them_counts(tmp_path: Path, database: sqlite3.Connection) -> None:
    code = (
        "import signal, sys, time\n"
        'def stop(n, f): print("child got", n, flush=True); sys.exit(9)\n'
        'signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGUSR1, lambda n, f: print("child got", n, flush=True))\n'
        'print("child is ready", flush=True)\n'
        "while True: signal.pause()\n"
    )
    with running("-config", configure(tmp_path, "a"), "-exec", python(code)) as daemon:
        daemon.until("child is ready")
        daemon.send(signal.SIGUSR1)
        daemon.until("child got 10")
        insert(database, 2)
        daemon.send(signal.SIGTERM)
        daemon.until("child got 15")
        assert daemon.end() == 9
    assert is_exact(tmp_path)


def test_a_second_signal_ends_an_application_that_ignores_the_first(tmp_path: Path, database: sqlite3.Connection) -> None:
    code = (
        "import signal\n"
        'signal.signal(signal.SIGTERM, lambda n, f: print("not yet", flush=True))\n'
        'print("child is ready", flush=True)\n'
        "while True: signal.pause()\n"
    )
    with running("-config", configure(tmp_path, "a"), "-exec", python(code)) as daemon:
        pid = int(daemon.until("application started").split("pid=")[1])
        daemon.until("child is ready")
        daemon.send(signal.SIGTERM)
        daemon.until("not yet")
        daemon.send(signal.SIGTERM)
        assert daemon.end(5) == 128 + signal.SIGTERM
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()  # nobody may be there to reap it


def test_an_application_that_was_killed(tmp_path: Path, database: sqlite3.Connection) -> None:
    with running("-config", configure(tmp_path, "a"), "-exec", "sh -c 'kill -9 $$'") as daemon:
        assert daemon.end() == 137


@pytest.mark.parametrize(
    ("command", "words"), [("no-such-program x", "cannot start exec command: no-such-program"), ("a; b", "; outside of quotes")]
)
def test_applications_that_cannot_be_started(tmp_path: Path, database: sqlite3.Connection, command: str, words: str) -> None:
    with running("-config", configure(tmp_path, "a"), "-exec", command) as daemon:
        assert daemon.end() == 1
    assert any(line.startswith("Error: ") and words in line for line in daemon.seen)


def test_the_application_starts_after_the_restore(tmp_path: Path, database: sqlite3.Connection) -> None:
    config = configure(tmp_path, "a")
    with running("-once", "-config", config) as daemon:
        assert daemon.end() == 0
    expected = rows(database)
    database.close()
    for path in tmp_path.glob("a.db*"):
        path.unlink()
    count = f'import sqlite3; raise SystemExit(sqlite3.connect("{tmp_path}/a.db").execute("SELECT count(*) FROM t").fetchone()[0])'
    with running("-restore-if-db-not-exists", "-config", config, "-exec", python(count)) as daemon:
        assert daemon.end() == len(expected)


def test_no_application_on_an_empty_database_where_the_replica_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "r-a").write_text("not a directory")
    config = configure(tmp_path, "a", a="    restore-if-db-not-exists: true\n")
    with running("-config", config, "-exec", f"touch {tmp_path}/started") as daemon:
        assert daemon.end() == 1
    assert not (tmp_path / "started").exists()
    assert any(line.startswith("Error: ") and "r-a" in line for line in daemon.seen)


# -- stopping --------------------------------------------------------------------------------------------------------------------


def test_the_first_signal_stores_everything_promptly(tmp_path: Path, database: sqlite3.Connection) -> None:
    with running("-config", configure(tmp_path, "a")) as daemon:
        daemon.until("initialized db")
        insert(database, 50)
        began = time.monotonic()
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
        assert time.monotonic() - began < 5
    assert is_exact(tmp_path)


@pytest.mark.fault("F7")
def test_what_did_not_get_through_is_said_and_the_exit_code_is_not_zero(tmp_path: Path, database: sqlite3.Connection) -> None:
    config = configure(tmp_path, "a", top="shutdown-sync-timeout: 2s")
    with running("-config", config) as daemon:
        daemon.until("initialized db")
        until_stored(tmp_path, 1)
        (tmp_path / "r-a").rename(tmp_path / "away")
        (tmp_path / "r-a").write_text("not a directory")
        insert(database, 1)
        until(lambda: [*tmp_path.glob(".a.db-litestream/pyrepl/staged/*.ltx")])  # it is read, and the engine waits for nothing
        began = time.monotonic()
        daemon.send(signal.SIGINT)
        assert daemon.end() == 1
        assert time.monotonic() - began < 25  # 30 s is what it has when nothing is said
    (line,) = [line for line in daemon.seen if "not everything was stored" in line]
    assert f"db={tmp_path}/a.db" in line
    assert "lacks TXID 0000000000000002 (it has 0000000000000001" in line
    (tmp_path / "r-a").unlink()
    (tmp_path / "away").rename(tmp_path / "r-a")
    with running("-once", "-config", config) as daemon:
        assert daemon.end() == 0
    assert is_exact(tmp_path)


def test_a_second_signal_leaves_at_once(tmp_path: Path, database: sqlite3.Connection) -> None:
    with running("-config", configure(tmp_path, "a")) as daemon:
        daemon.until("initialized db")
        until_stored(tmp_path, 1)
        (tmp_path / "r-a").rename(tmp_path / "away")
        (tmp_path / "r-a").write_text("not a directory")
        insert(database, 1)
        daemon.send(signal.SIGTERM)
        daemon.until("signal received")
        daemon.send(signal.SIGTERM)
        assert daemon.end(5) == 128 + signal.SIGTERM


def test_a_replica_that_comes_back_during_the_stop_gets_everything(tmp_path: Path, database: sqlite3.Connection) -> None:
    with running("-config", configure(tmp_path, "a", top="shutdown-sync-interval: 50ms")) as daemon:
        daemon.until("initialized db")
        until_stored(tmp_path, 1)
        (tmp_path / "r-a").rename(tmp_path / "away")
        (tmp_path / "r-a").write_text("not a directory")
        insert(database, 1)
        daemon.until("upload failed")
        daemon.send(signal.SIGTERM)
        daemon.until("signal received")
        (tmp_path / "r-a").unlink()
        (tmp_path / "away").rename(tmp_path / "r-a")
        assert daemon.end() == 0
    assert is_exact(tmp_path)


def until_stored(folder: Path, txid: int, name: str = "a") -> None:
    end = time.monotonic() + 20
    while txid not in txids(f"file://{folder}/r-{name}"):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("by", ["configuration", "arguments"])
def test_when_the_only_database_has_failed_for_good_the_process_ends(tmp_path: Path, database: sqlite3.Connection, by: str) -> None:
    arguments = ["-config", configure(tmp_path, "a")] if by == "configuration" else [tmp_path / "a.db", f"file://{tmp_path}/r-a"]
    with running(*arguments) as daemon:
        until_stored(tmp_path, 1)
        folder = tmp_path / "r-a/ltx/0"
        (folder / f"{2:016x}-{2:016x}.ltx").write_bytes((folder / f"{1:016x}-{1:016x}.ltx").read_bytes())  # another writer's
        insert(database, 1)
        daemon.until("replication stopped", "level=ERROR")
        assert daemon.end() == 1


# -- reading the configuration again ---------------------------------------------------------------------------------------------


def test_a_changed_configuration_is_taken_over_at_sighup(tmp_path: Path, database: sqlite3.Connection) -> None:
    others = [connect(tmp_path / f"{name}.db") for name in "bc"]
    config = configure(tmp_path, "a", "b")
    with running("-config", config) as daemon:
        for _ in "ab":
            daemon.until("initialized db")
        configure(tmp_path, "a", "c")
        daemon.send(signal.SIGHUP)
        daemon.until("configuration reloaded", "unchanged=1", "stopped=1", "started=1")
        if not any("initialized db" in line and "c.db" in line for line in daemon.seen):
            daemon.until("initialized db", "c.db")
        for connection in (database, *others):
            insert(connection, 3)
        for bad in ("dbs: [", "dbs: [{path: x}]", "dbs: []"):
            config.write_text(bad)
            daemon.send(signal.SIGHUP)
            daemon.until("configuration not reloaded")
        configure(tmp_path, "a", "c", c="    checkpoint-interval: 5m\n")
        daemon.send(signal.SIGHUP)
        daemon.until("configuration reloaded", "unchanged=1", "stopped=1", "started=1")
        config.unlink()
        daemon.send(signal.SIGHUP)
        daemon.until("configuration not reloaded", "config file not found")
        insert(database, 3)
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
    assert is_exact(tmp_path, "a")
    assert is_exact(tmp_path, "c")
    assert len(rows(restored(f"file://{tmp_path}/r-b", tmp_path))) == 0  # from before it was taken out
    for connection in others:
        connection.close()


# -- listeners -------------------------------------------------------------------------------------------------------------------


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics_url(daemon: Running) -> str:
    return daemon.until("serving metrics on").split("url=")[1].strip().removesuffix("/metrics")


def test_metrics_and_health_with_one_broken_database(tmp_path: Path, database: sqlite3.Connection) -> None:
    (tmp_path / "b.db").write_bytes(b"no database" * 1000)
    with running("-config", configure(tmp_path, "a", "b", top="addr: 127.0.0.1:0")) as daemon:
        url = metrics_url(daemon)
        until_stored(tmp_path, 1)
        insert(database, 3)
        until_stored(tmp_path, 2)
        a, b = f'db="{tmp_path}/a.db"', f'db="{tmp_path}/b.db"'
        at_rest = f'pyrepl_replica_lag_seconds{{{a},replica="file://{tmp_path}/r-a"}} 0.0'
        until(lambda: at_rest in get(f"{url}/metrics")[1])  # a file is there a moment before it is counted
        status, text = get(f"{url}/metrics")
        assert status == 200
        for line in (
            f"litestream_txid{{{a}}} 2.0",
            "# TYPE litestream_sync_count counter",
            f'pyrepl_database_state{{{a},state="replicating"}} 1.0',
            f'pyrepl_database_state{{{b},state="waiting"}} 1.0',
            at_rest,
            f'pyrepl_loss_window_seconds_count{{{a},replica="file://{tmp_path}/r-a"}} 2.0',
        ):
            assert line in text.splitlines()
        assert f'pyrepl_loss_window_seconds_bucket{{{a},le="+Inf",replica="file://{tmp_path}/r-a"}} 2.0' in text.splitlines()
        quantiles = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"pyrepl_loss_window_recent_seconds{{{a},")]
        assert len(quantiles) == 3
        assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2] < 60
        assert 'litestream_replica_operation_total{operation="PUT",replica_type="file"}' in text
        assert get(f"{url}/healthz") == (200, "ok\n")
        status, text = get(f"{url}/readyz")
        assert status == 503
        states = {item["path"]: item for item in json.loads(text)["databases"]}
        assert states[f"{tmp_path}/a.db"] == {"path": f"{tmp_path}/a.db", "state": "replicating"}
        assert "not an SQLite database" in states[f"{tmp_path}/b.db"]["error"]
        assert get(f"{url}/nothing")[0] == 404
        for suffix in ("", "-wal", "-shm"):
            (tmp_path / f"b.db{suffix}").unlink(missing_ok=True)
        connect(tmp_path / "b.db").close()
        daemon.until("initialized db", "b.db")
        assert get(f"{url}/readyz")[0] == 200
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0


def test_an_address_in_use(tmp_path: Path, database: sqlite3.Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running("-config", configure(tmp_path, "a", top=f"addr: 127.0.0.1:{port}")) as daemon:
            assert daemon.end() == 1
    assert any(f"Error: cannot listen on 127.0.0.1:{port}: address already in use" in line for line in daemon.seen)
    assert not (tmp_path / "r-a").exists()


def test_the_control_socket_is_ours_alone_and_its_place_is_checked(tmp_path: Path, database: sqlite3.Connection) -> None:
    path = tmp_path / "s.sock"
    config = configure(tmp_path, "a", top=f"socket: {{enabled: true, path: {path}, permissions: 0640}}")
    path.write_text("precious")
    with running("-config", config) as daemon:
        assert daemon.end() == 1
    assert any(f"socket path exists but is not a socket: {path}" in line for line in daemon.seen)
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with running("-config", config) as daemon:
        daemon.until("control socket listening")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        with running("-config", config) as second:
            assert second.end() == 1
        assert any(f"another process serves the control socket: {path}" in line for line in second.seen)
        assert path.exists()
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
    assert not path.exists()


def test_without_databases_a_control_socket_is_enough(tmp_path: Path, database: sqlite3.Connection) -> None:
    config = configure(tmp_path, top=f"socket: {{enabled: true, path: {tmp_path}/s.sock}}")
    with running("-config", config) as daemon:
        daemon.until("control socket listening")
        command = [sys.executable, "-m", "replicator"]
        where = ["-socket", f"{tmp_path}/s.sock"]
        done = subprocess.run([*command, "list", *where], capture_output=True, text=True)
        assert done.stdout == "No databases configured\n"
        done = subprocess.run([*command, "register", *where, "-replica", f"file://{tmp_path}/r-a", "a.db"], cwd=tmp_path, timeout=60)
        assert done.returncode == 0
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
    assert is_exact(tmp_path)


# -- once, logs ------------------------------------------------------------------------------------------------------------------


def test_once_with_enforce_retention_does_what_is_due_of_the_history(tmp_path: Path, database: sqlite3.Connection) -> None:
    top = "levels: [{interval: 10ms}]\nsnapshot: {interval: 10ms}\nl0-retention: 1ms\nl0-retention-check-interval: 1ms"
    config = configure(tmp_path, "a", top=top)
    url = f"file://{tmp_path}/r-a"
    for count in (1, 2, 3):
        with running("-once", "-config", config) as daemon:
            assert daemon.end() == 0
        assert txids(url) == [*range(1, count + 1)]
        insert(database, 1)
    assert (txids(url, 1), txids(url, 9)) == ([], [])
    with running("-once", "-enforce-retention", "-config", config) as daemon:
        assert daemon.end() == 0
    assert txids(url, 9)[-1] == txids(url, 1)[-1] == 4
    assert len(txids(url)) < 4  # merged, and old enough
    assert is_exact(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-once", "-exec", "true"], "cannot specify -once flag with -exec"),
        (["-enforce-retention"], "-enforce-retention requires -once"),
    ],
)
def test_flags_that_exclude_each_other(tmp_path: Path, flags: list[str], words: str) -> None:
    with running("-config", configure(tmp_path, "a"), *flags) as daemon:
        assert daemon.end() == 2
    assert any(words in line for line in daemon.seen)


def test_log_lines_are_json_where_that_is_asked_for(tmp_path: Path, database: sqlite3.Connection) -> None:
    with running("-once", "-config", configure(tmp_path, "a", "b", top="logging: {type: json}")) as daemon:
        assert daemon.end() == 1
    lines = [json.loads(line) for line in daemon.seen]
    assert {line["level"] for line in lines} == {"INFO", "ERROR"}
    (error,) = [line for line in lines if line["level"] == "ERROR"]
    assert error.keys() == {"time", "level", "msg", "db", "error"}
    assert (error["msg"], error["db"]) == ("cannot replicate", f"{tmp_path}/b.db")
    assert error["error"] == f"database does not exist: {tmp_path}/b.db"


def test_each_commit_is_stored_at_once_and_status_shows_the_loss_window(tmp_path: Path, database: sqlite3.Connection) -> None:
    config = configure(tmp_path, "a", top=f"socket: {{enabled: true, path: {tmp_path}/s.sock}}", a="    sync: commit\n")
    config.write_text(config.read_text().replace(f"{{path: {tmp_path}/r-a}}", f"{{path: {tmp_path}/r-a, sync-interval: 1h}}"))
    with running("-config", config) as daemon:
        until_stored(tmp_path, 1)
        for txid in (2, 3):
            insert(database, 3)
            until_stored(tmp_path, txid)
        command = [sys.executable, "-m", "replicator", "status", "-config", str(config)]

        def status(*flags: str) -> str:
            return subprocess.run([*command, *flags], capture_output=True, text=True, check=True, timeout=30).stdout

        [row] = json.loads(status("-json"))
        window = row["loss_window"][f"file://{tmp_path}/r-a"]
        assert window["txids"] == 3
        assert 0 < window["p50_seconds"] <= window["p99_seconds"] <= window["max_seconds"] < 60
        assert "On this machine alone" in status()
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
        assert "On this machine alone" not in status()
        assert "loss_window" not in status("-json")
