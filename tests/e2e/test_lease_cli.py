"""`pyrepl lease`, `replicate -lease -takeover` and `standby`, as processes."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.cli import main
from replicator.cli.control import ask_daemon
from replicator.format.ltx import TXID
from replicator.storage import open_client
from tests.e2e.databases import connect, insert, restored, rows
from tests.servers import free_port


class Running:
    """A command, and what it prints."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "replicator", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.seen: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)

    def until(self, words: str, timeout_s: float = 40) -> None:
        """Read lines up to the next one with these words."""
        while True:
            try:
                self.seen.append(self._lines.get(timeout=timeout_s))
            except queue.Empty:
                raise AssertionError(f"no line with {words!r}: {self.seen}") from None
            if words in self.seen[-1]:
                return

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(40)


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[Running]:
    started = Running(*arguments)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait(10)
        started.reader.join(10)


def lease(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object]]:
    code = main(["lease", *map(str, arguments), "-json"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}


def sync(socket: Path, database: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "replicator", "sync", "-wait", "-socket", str(socket), str(database)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_a_standby_takes_over_when_the_primary_ends_and_the_primary_comes_back_as_one(tmp_path, capsys):
    url, primary, standby, socket = f"file://{tmp_path}/replica", tmp_path / "a.db", tmp_path / "b.db", tmp_path / "s"
    connection = connect(primary)
    insert(connection, 10)
    assert lease(capsys, "show", url) == (0, {"url": f"{url}/lock.json", "state": "none"})
    with (
        running("replicate", "-lease", "-lease-ttl", "60s", primary, url) as one,
        running("standby", "-poll", "50ms", "-socket", socket, url, standby) as two,
    ):
        one.until("replicating to")
        two.until("entering follow mode")
        code, shown = lease(capsys, "show", url)
        assert (code, shown["state"], shown["generation"], shown["ttl_seconds"]) == (0, "held", 1, 60.0)
        assert str(shown["owner"]).endswith(f":{one.process.pid}")
        assert main(["lease", "release", url]) == 1  # its time is not over
        assert "lease is held by" in capsys.readouterr().err
        insert(connection, 5)
        assert one.end(signal.SIGTERM) == 0
        began = time.monotonic()
        two.until("replicating to")
        assert time.monotonic() - began < 20
        assert lease(capsys, "show", url)[1]["generation"] == 2
        other = connect(standby)
        assert rows(other) == rows(connection)
        insert(other, 3)
        sync(socket, standby)
        assert rows(restored(url, tmp_path)) == rows(other)
        connection.close()
        with running("standby", "-poll", "50ms", url, primary) as again:
            again.until("entering follow mode")
            assert rows(primary) == rows(other)
            assert again.end(signal.SIGTERM) == 0
        assert two.end(signal.SIGTERM) == 0
    assert lease(capsys, "show", url)[1]["state"] == "released"


def test_a_standby_asks_for_it_and_the_primary_hands_over(tmp_path, capsys):
    """The primary is asked through the store alone, and ends in good order; its last commits are there."""
    url, primary, standby, socket = f"file://{tmp_path}/replica", tmp_path / "a.db", tmp_path / "b.db", tmp_path / "s"
    connection = connect(primary)
    insert(connection, 10)
    assert main(["replicate", "-once", str(primary), url]) == 0
    capsys.readouterr()
    with running("replicate", "-lease", "-lease-ttl", "3s", "-sync-interval", "1h", primary, url) as one:
        one.until("replicating to")
        insert(connection, 5)  # not stored before it ends
        with running("standby", "-lease-ttl", "60s", "-socket", socket, url, standby) as two:
            two.until("entering follow mode")
            two.process.send_signal(signal.SIGUSR1)
            two.until("asking for a hand-over")
            one.until("a hand-over is asked for, shutting down")
            one.until("lease released")
            assert one.process.wait(30) == 0
            two.until("replicating to")
            assert lease(capsys, "show", url)[1]["generation"] == 2
            assert rows(standby) == rows(connection)
            assert not list(tmp_path.glob("*salvage*"))
            # And back again, asked for by a flag: what took over is an owner as any other.
            connection.close()
            with running("standby", "-handover", "-socket", tmp_path / "t", url, primary) as three:
                three.until("asking for a hand-over")
                code, shown = lease(capsys, "show", url)
                assert (code, str(shown["wanted_by"]).rpartition(":")[2]) == (0, str(three.process.pid))
                assert three.end(signal.SIGTERM) == 0  # it does not want it any more
                assert "wanted_by" not in lease(capsys, "show", url)[1]
            assert two.end(signal.SIGTERM) == 0


def test_of_several_databases_only_the_one_that_is_asked_for_is_handed_over(tmp_path, capsys):
    for name in ("a", "b"):
        insert(connect(tmp_path / f"{name}.db"), 10)
    config, socket = tmp_path / "c.yml", tmp_path / "s"
    config.write_text(
        f"socket: {{enabled: true, path: {socket}}}\nlease: {{ttl: 1s}}\ndbs:\n"
        + "".join(f"  - {{path: {tmp_path}/{name}.db, lease: true, replica: {{path: {tmp_path}/r-{name}}}}}\n" for name in ("a", "b"))
    )
    with running("replicate", "-config", config) as one:
        one.until("replicating to")
        one.until("replicating to")
        with running("standby", "-handover", f"file://{tmp_path}/r-b", tmp_path / "copy.db") as two:
            one.until("a hand-over is asked for, stopping")
            two.until("replicating to")
            answer, _ = ask_daemon(socket, "/list", timeout_s=10)
            assert [item["status"] for item in answer["databases"]] == ["replicating", "stopped"]
            assert two.end(signal.SIGTERM) == 0
        assert one.end(signal.SIGTERM) == 0


def test_another_writer_is_seen_everywhere_and_said_once(tmp_path, capsys):
    connections = {name: connect(tmp_path / f"{name}.db") for name in ("a", "b")}
    for connection in connections.values():
        insert(connection, 5)
    config, socket, port, database = tmp_path / "c.yml", tmp_path / "s", free_port(), tmp_path / "b.db"
    config.write_text(
        f"addr: 127.0.0.1:{port}\nsocket: {{enabled: true, path: {socket}}}\ndbs:\n"
        + "".join(f"  - {{path: {tmp_path}/{name}.db, replica: {{path: {tmp_path}/r-{name}}}}}\n" for name in ("a", "b"))
    )

    def ask(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with running("replicate", "-config", config) as one:
        one.until("control socket listening")
        for name in ("a", "b"):
            sync(socket, tmp_path / f"{name}.db")
        client = open_client(f"file://{tmp_path}/r-b")
        client.put(0, TXID(2), TXID(2), b"of another writer", timestamp_ms=1)
        insert(connections["b"], 1)
        one.until("replication stopped")
        insert(connections["a"], 1)
        sync(socket, tmp_path / "a.db")  # that one goes on
        said = "another writer owns the replica"
        assert ask("healthz")[0] == 200  # the process is well
        code, text = ask("readyz")
        assert (code, text.count(said)) == (503, 1)
        text = ask("metrics")[1]
        assert f'pyrepl_database_state{{db="{database}",state="failed"}} 1.0' in text
        assert main(["status", "-config", str(config)]) == 0
        assert f"The daemon reports:\n{database}: {said}" in capsys.readouterr().out
        assert main(["status", "-json", "-config", str(config)]) == 0
        assert [said in row.get("error", "") for row in json.loads(capsys.readouterr().out)] == [False, True]
        assert main(["top", "-once", "-socket", str(socket)]) == 0
        out = capsys.readouterr().out
        assert "1 failed, 1 replicating" in out
        assert f"{database}: {said}" in out
        answer, _ = ask_daemon(socket, "/list", timeout_s=10)
        assert [item["status"] for item in answer["databases"]] == ["replicating", "stopped"]
        assert main(["sync", "-wait", "-socket", str(socket), str(database)]) == 1
        assert said in capsys.readouterr().err
        assert one.end(signal.SIGTERM) == 1
        one.until(f'"replication stopped" path={tmp_path}/a.db')
        assert sum('"replication stopped" db=' in line for line in one.seen) == 1


def test_an_owner_whose_lease_is_released_from_outside_ends_with_an_error(tmp_path, capsys):
    url, database = f"file://{tmp_path}/replica", tmp_path / "a.db"
    insert(connect(database), 10)
    with running("replicate", "-lease", "-lease-ttl", "1s", database, url) as one:
        one.until("replicating to")
        code, released = lease(capsys, "release", "-force", url)
        assert (code, released["state"]) == (0, "released")
        assert one.process.wait(30) == 1
        one.until("Error: lease is lost to nobody, it was released from outside")
        assert sum('msg="replication stopped" db=' in line for line in one.seen) == 1


def test_one_lease_for_all_databases_of_a_configuration_and_takeover_waits_for_it(tmp_path, capsys):
    for name in ("a", "b"):
        insert(connect(tmp_path / f"{name}.db"), 10)
    config, socket, port = tmp_path / "c.yml", tmp_path / "s", free_port()
    home = f"file://{tmp_path}/host"
    config.write_text(
        f"addr: 127.0.0.1:{port}\nsocket: {{enabled: true, path: {socket}}}\n"
        f"lease: {{url: '{home}', ttl: 2s, takeover: true}}\ndbs:\n"
        + "".join(f"  - {{path: {tmp_path}/{name}.db, replica: {{path: {tmp_path}/r-{name}}}}}\n" for name in ("a", "b"))
    )
    with running("replicate", "-config", config) as one:
        one.until("replicating to")
        one.until("replicating to")
        assert lease(capsys, "show", home)[1]["state"] == "held"
        assert not (tmp_path / "r-a" / "lock.json").exists()
        answer, _ = ask_daemon(socket, "/debug/sync-status", timeout_s=10)
        (shown, _) = (item["lease"] for item in answer["databases"])
        assert (shown["state"], shown["generation"]) == ("held", 1)
        assert shown["owner"].endswith(f":{one.process.pid}")
        assert main(["status", "-config", str(config), "-json"]) == 0
        assert [row["lease"]["owner"] for row in json.loads(capsys.readouterr().out)] == [shown["owner"]] * 2
        assert main(["status", "-config", str(config)]) == 0
        assert f"{tmp_path}/b.db  held   {shown['owner']}  1 " in capsys.readouterr().out
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        assert f'pyrepl_lease_held{{db="{tmp_path}/a.db"}} 1.0' in text
        assert f'pyrepl_lease_generation{{db="{tmp_path}/b.db"}} 1.0' in text
        other = tmp_path / "other.yml"
        other.write_text(config.read_text().replace(".db,", "-2.db,").partition("lease:")[2].join(["lease:", ""]))
        with running("replicate", "-config", other) as two:
            two.until("lease is held by")
            one.end(signal.SIGKILL)
            two.until("replicating to")
            assert lease(capsys, "show", home)[1]["generation"] == 2
            assert rows(tmp_path / "a-2.db") == rows(tmp_path / "a.db")
            assert two.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lease"], "give show or release"),
        (["lease", "steal", "file:///srv/x"], "give show or release"),
        (["standby", "file:///srv/x"], "give the URL of the replica, and the path"),
        (["standby", "-poll", "0s", "file:///srv/x", "/srv/a.db"], "must be above zero"),
        (["replicate", "-takeover", "/srv/a.db", "file:///srv/x"], "-takeover goes with -lease"),
        (["replicate", "-lease"], "-lease goes with a database and URLs"),
    ],
)
def test_wrong_usage_is_said(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
