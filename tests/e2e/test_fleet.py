"""Directories of databases under the daemon: found, parked, woken, renamed, replaced, restored."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.cli.control import ask_daemon
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, txids, until
from tests.e2e.test_daemon import Running, running


class Fleet:
    """A directory, its configuration, and questions to the daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.replica = folder, folder / "d", folder / "r"
        self.data.mkdir()
        self.socket = folder / "s.sock"

    def configure(self, *, park: str = "1s", more: str = "", pattern: str = "*.db", recursive: bool = True, watch: bool = True) -> Path:
        path = self.folder / "c.yml"
        path.write_text(
            f"addr: 127.0.0.1:0\nsocket: {{enabled: true, path: {self.socket}}}\nlevels: [{{interval: 1h}}]\n"
            f"pyrepl: {{park-after: {park}{more}}}\n"
            f"dbs:\n - dir: {self.data}\n   pattern: '{pattern}'\n   recursive: {str(recursive).lower()}\n   watch: {str(watch).lower()}\n"
            f"   replica: {{path: {self.replica}}}\n"
        )
        return path

    def create(self, *names: str, rows: int = 3) -> None:
        for name in names:
            (self.data / name).parent.mkdir(parents=True, exist_ok=True)
            connection = connect(self.data / name)
            insert(connection, rows)
            connection.close()

    def states(self) -> Counter[str]:
        answer, _ = ask_daemon(self.socket, "/debug/sync-status", timeout_s=30)
        del answer
        return Counter(self.state(line) for line in self.metrics() if line.startswith("pyrepl_database_state{") and line.endswith(" 1.0"))

    @staticmethod
    def state(line: str) -> str:
        return line.partition('state="')[2].partition('"')[0]

    def state_of(self, name: str) -> str:
        of = f'pyrepl_database_state{{db="{self.data / name}"'
        return next((self.state(line) for line in self.metrics() if line.startswith(of) and line.endswith(" 1.0")), "")

    def metrics(self) -> list[str]:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as answer:
            return answer.read().decode().splitlines()

    def metric(self, start: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in self.metrics() if line.startswith(start))

    def listening(self, process: Running) -> None:
        self.address = process.until("serving metrics on").partition("url=")[2].strip().removesuffix("/metrics")
        process.until("control socket listening")

    def sync(self, name: str) -> int:
        answer, _ = ask_daemon(self.socket, "/sync", {"path": str(self.data / name), "wait": True, "timeout": 20}, timeout_s=30)
        return int(answer["replicated_txid"])

    def is_exact(self, name: str) -> bool:
        copy = restored(f"file://{self.replica}/{name}", self.folder)
        return copy.read_bytes() == checkpointed_bytes(self.data / name, self.folder)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture
def started(fleet: Fleet) -> Iterator[Running]:
    fleet.create("a.db", "sub/b.db")
    with running("-config", fleet.configure()) as process:
        fleet.listening(process)
        yield process


@pytest.mark.slow
def test_two_hundred_databases_are_parked_woken_and_found_unchanged(fleet: Fleet) -> None:
    names = [f"{number % 10}/{number}.db" for number in range(200)]
    fleet.create(*names)
    with running("-config", fleet.configure()) as process:
        fleet.listening(process)
        until(lambda: fleet.states() == {"parked": 200}, 120)
        files, threads = (len(os.listdir(f"/proc/{process.process.pid}/{what}")) for what in ("fd", "task"))
        assert files < 40
        assert threads < 40
        requests = fleet.metric("litestream_replica_operation_total{")
        listed, _ = ask_daemon(fleet.socket, "/list", timeout_s=10)
        assert {(item["status"], "last_sync_at" in item) for item in listed["databases"]} == {("replicating", True)}
        assert fleet.metric("litestream_txid{") == fleet.metric("pyrepl_replica_txid{") == 200  # one each
        for name in names[::20]:
            connection = connect(fleet.data / name)
            insert(connection, 1)
            connection.close()
        until(lambda: fleet.metric("pyrepl_replica_txid{") >= 210, 60)
        until(lambda: fleet.states() == {"parked": 200}, 60)
        until(lambda: len(list(fleet.data.rglob("parked.json"))) == 200)
        assert fleet.metric("litestream_replica_operation_total{") < requests + 10 * 12  # those that were not written have cost nothing
        process.send(signal.SIGTERM)
        assert process.end() == 0
    assert all(fleet.is_exact(name) for name in names[::20])
    with running("-config", fleet.configure()) as process:
        fleet.listening(process)
        until(lambda: fleet.states() == {"parked": 200}, 30)
        until(lambda: fleet.metric("litestream_replica_operation_total{") == 200, 30)  # each replica was asked once
        assert not any("initialized db" in line for line in process.seen)
        process.send(signal.SIGTERM)
        assert process.end() == 0
    assert not any("initialized db" in line for line in process.seen)


def test_what_changed_while_nobody_looked_is_found_at_the_start(fleet: Fleet) -> None:
    names = [f"{number}.db" for number in range(6)]
    fleet.create(*names)
    config = fleet.configure()
    with running("-config", config) as process:
        fleet.listening(process)
        until(lambda: fleet.states() == {"parked": 6}, 60)
        process.send(signal.SIGTERM)
        assert process.end() == 0
    insert(connect(fleet.data / "0.db", autocheckpoint=0), 1)
    connection = connect(fleet.data / "1.db")
    insert(connection, 50)
    connection.close()  # checkpointed, and without a WAL
    (fleet.data / "2.db").write_bytes((fleet.data / "0.db").read_bytes())
    for suffix in ("-wal", "-shm"):
        (fleet.data / f"2.db{suffix}").unlink(missing_ok=True)
    connection = sqlite3.connect(fleet.data / "3.db")
    assert connection.execute("PRAGMA journal_mode=DELETE").fetchone()[0] == "delete"
    connection.execute("INSERT INTO t(v) VALUES('in rollback mode')")
    connection.commit()
    connection.close()
    for file in (fleet.replica / "4.db" / "ltx" / "0").iterdir():  # another engine went on there
        data = bytearray(file.read_bytes())
        (file.parent / f"{2:016x}-{2:016x}.ltx").write_bytes(data)
    with running("-config", config) as process:
        fleet.listening(process)
        until(lambda: fleet.state_of("5.db") == "parked", 30)
        for name in ("0.db", "1.db", "2.db", "3.db"):  # without being asked
            until(lambda name=name: len(txids(f"file://{fleet.replica}/{name}")) >= 2)
            assert fleet.is_exact(name)
        process.until("/4.db", timeout_s=20)  # its replica does not end where the record says
        process.send(signal.SIGTERM)
        process.end()


def test_databases_come_and_go(fleet: Fleet, started: Running) -> None:
    started.until("directory scanned")
    fleet.create("c.db", "new/deep/d.db", "sub/e.db")
    (fleet.data / "late.db").write_bytes(b"")
    for name in ("c.db", "new/deep/d.db", "sub/e.db"):
        until(lambda name=name: fleet.state_of(name) in ("replicating", "parked"))
        fleet.sync(name)
        assert fleet.is_exact(name)
    until(lambda: 'reason="not a database"' in "".join(fleet.metrics()))
    fleet.create("late.db")
    until(lambda: fleet.state_of("late.db") in ("replicating", "parked"))
    for suffix in ("", "-wal", "-shm"):
        (fleet.data / f"c.db{suffix}").unlink(missing_ok=True)
    started.until("database is gone", "c.db")
    until(lambda: fleet.state_of("c.db") == "")
    assert (fleet.replica / "c.db").is_dir()
    until(lambda: fleet.state_of("sub/e.db") == "parked")
    (fleet.data / "sub").rename(fleet.folder / "elsewhere")
    until(lambda: (fleet.state_of("sub/b.db"), fleet.state_of("sub/e.db")) == ("", ""))
    fleet.create("sub/f.db")  # in a new folder of that name
    until(lambda: fleet.state_of("sub/f.db") in ("replicating", "parked"))
    started.send(signal.SIGTERM)
    assert started.end() == 0


def test_a_renamed_database_is_another_one_with_a_replica_of_its_own(fleet: Fleet, started: Running) -> None:
    until(lambda: fleet.state_of("a.db") == "parked")
    for suffix in ("", "-wal", "-shm"):
        if (fleet.data / f"a.db{suffix}").exists():
            (fleet.data / f"a.db{suffix}").rename(fleet.data / f"z.db{suffix}")
    until(lambda: fleet.state_of("a.db") == "" and fleet.state_of("z.db") in ("replicating", "parked"))
    fleet.sync("z.db")
    assert fleet.is_exact("z.db")
    started.send(signal.SIGTERM)
    assert started.end() == 0


@pytest.mark.parametrize("parked", [True, False])
def test_a_database_that_is_replaced(fleet: Fleet, parked: bool) -> None:
    fleet.create("a.db", "b.db")
    with running("-config", fleet.configure(park="1s" if parked else "1h")) as process:
        fleet.listening(process)
        until(lambda: fleet.state_of("a.db") == ("parked" if parked else "replicating"))
        if not parked:
            assert fleet.sync("a.db") == 1
        connection = connect(fleet.folder / "new.db")
        insert(connection, 40)
        connection.close()
        (fleet.folder / "new.db").rename(fleet.data / "a.db")
        for suffix in ("-wal", "-shm"):
            (fleet.data / f"a.db{suffix}").unlink(missing_ok=True)
        fleet.sync("b.db")
        until(lambda: fleet.sync("a.db") >= 2)
        assert fleet.is_exact("a.db")
        # And by what is no database: an error, and no busy loop.
        (fleet.folder / "none").write_bytes(b"no database" * 1000)
        (fleet.folder / "none").rename(fleet.data / "a.db")
        process.until("a.db", "not a", timeout_s=30)
        before = _cpu_s(process)
        insert(connect(fleet.data / "b.db"), 1)
        fleet.sync("b.db")
        assert fleet.is_exact("b.db")
        assert _cpu_s(process) - before < 5
        fleet.data.joinpath("a.db").unlink()
        fleet.create("a.db")
        until(lambda: fleet.state_of("a.db") in ("replicating", "parked"), 60)
        fleet.sync("a.db")
        assert fleet.is_exact("a.db")
        process.send(signal.SIGTERM)
        assert process.end() == 0


def _cpu_s(process: Running) -> float:
    fields = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_more_databases_than_may_be_open_take_turns(fleet: Fleet) -> None:
    names = [f"{number}.db" for number in range(12)]
    fleet.create(*names)
    with running("-config", fleet.configure(park="20s", more=", max-hot: 3, max-queued: 0")) as process:
        fleet.listening(process)
        until(lambda: fleet.metric("pyrepl_replica_txid{") >= 12, 90)
        seen = [0]
        for name in names:
            connection = connect(fleet.data / name)
            connection.execute("UPDATE t SET v = randomblob(300000) WHERE id = 1")
            connection.close()
            seen.append(fleet.states()["replicating"])

        def all_stored() -> bool:
            seen.append(fleet.states()["replicating"])
            return fleet.metric("pyrepl_replica_txid{") >= 24

        until(all_stored, 90)
        assert max(seen) <= 3
        process.send(signal.SIGTERM)
        assert process.end() == 0
    assert all(fleet.is_exact(name) for name in names)


def test_the_configuration_is_read_again(fleet: Fleet, started: Running) -> None:
    until(lambda: fleet.states() == {"parked": 2})
    fleet.create("only.sqlite")
    fleet.configure(pattern="*.sqlite")
    started.send(signal.SIGHUP)
    started.until("configuration reloaded")
    until(lambda: fleet.state_of("only.sqlite") in ("replicating", "parked"))
    assert fleet.state_of("a.db") == ""
    fleet.configure()
    started.send(signal.SIGHUP)
    started.until("configuration reloaded")
    until(lambda: fleet.state_of("a.db") == "parked")
    started.send(signal.SIGTERM)
    assert started.end() == 0


WITHOUT_OVERRIDE = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: also root needs the permissions then
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "replicator", *sys.argv[1:]])
"""


def test_a_folder_that_loses_its_permissions_is_skipped_and_its_databases_are_kept(fleet: Fleet) -> None:
    fleet.create("a.db", "sub/b.db", "closed/c.db")
    arguments = ["replicate", "-config", str(fleet.configure(park="1h"))]
    process = Running.of([sys.executable, "-c", WITHOUT_OVERRIDE, *arguments])
    try:
        fleet.listening(process)
        until(lambda: fleet.state_of("sub/b.db") == fleet.state_of("closed/c.db") == "replicating")
        os.chmod(fleet.data / "closed", 0)
        (fleet.data / "sub" / "x").mkdir(mode=0)
        until(lambda: 'reason="folder cannot be read: permission denied"' in "".join(fleet.metrics()))
        insert(connect(fleet.data / "sub" / "b.db"), 1)
        fleet.sync("sub/b.db")
        assert fleet.is_exact("sub/b.db")
        before = _cpu_s(process)
        fleet.sync("a.db")
        assert _cpu_s(process) - before < 2
        assert fleet.state_of("closed/c.db") != ""
        os.chmod(fleet.data / "closed", 0o755)
        until(lambda: fleet.state_of("closed/c.db") == "replicating", 60)
        fleet.create("sub/x/d.db")  # this process may
        os.chmod(fleet.data / "sub" / "x", 0o755)
        until(lambda: fleet.state_of("sub/x/d.db") == "replicating")
    finally:
        os.chmod(fleet.data / "closed", 0o755)
        process.close()


# -- restoring -------------------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "replicator", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_directory_is_restored_as_it_was_replicated(fleet: Fleet, tmp_path: Path) -> None:
    names = ["a.db", "sub/b.db", "we ird%20[x].db"]
    fleet.create(*names)
    config = fleet.configure()
    assert command("replicate", "-once", "-config", config).returncode == 0
    expected = {name: checkpointed_bytes(fleet.data / name, tmp_path) for name in names}

    done = command("restore", "-config", config, "-o", tmp_path / "one", fleet.data)
    assert done.returncode == 0, done
    done = command("restore", "-recursive", "-o", tmp_path / "two", "-json", fleet.replica)
    assert done.returncode == 0, done
    assert {item["db_path"] for item in json.loads(done.stdout)} == {str(tmp_path / "two" / name) for name in names}
    fleet.data.rename(tmp_path / "lost")
    done = command("restore", "-config", config, fleet.data)  # where they were
    assert done.returncode == 0, done
    for folder in (tmp_path / "one", tmp_path / "two", fleet.data):
        assert {name: (folder / name).read_bytes() for name in names} == expected
    assert command("restore", "-config", config, fleet.data).returncode == 1  # they are there
    assert command("restore", "-config", config, "-if-db-not-exists", fleet.data).returncode == 0
    rows = command("restore", "-config", config, "-dry-run", "-json", "-o", "/srv/x", fleet.data)
    assert {item["db_path"] for item in json.loads(rows.stdout)} == {f"/srv/x/{name}" for name in names}


@pytest.mark.parametrize("url", ["seaweed", "moto", "sftp"], indirect=True)
def test_a_directory_is_restored_from_a_store(fleet: Fleet, tmp_path: Path, url: str) -> None:
    names = ["a.db", "sub/b.db", "we ird%20.db"]
    fleet.create(*names)
    config = fleet.configure()
    config.write_text(config.read_text().replace(f"{{path: {fleet.replica}}}", f"{{url: '{url}'}}"))
    done = command("replicate", "-once", "-config", config)
    assert done.returncode == 0, done
    for arguments in (["-config", config, fleet.data], ["-recursive", url]):
        output = tmp_path / f"out{len(arguments)}"
        done = command("restore", "-o", output, *arguments)
        assert done.returncode == 0, done
        assert {name: (output / name).read_bytes() for name in names} == {
            name: checkpointed_bytes(fleet.data / name, tmp_path) for name in names
        }


def test_one_damaged_replica_does_not_keep_the_others(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create("a.db", "b.db")
    assert command("replicate", "-once", "-config", fleet.configure()).returncode == 0
    for file in (fleet.replica / "a.db" / "ltx" / "0").iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    done = command("restore", "-recursive", "-o", tmp_path / "out", fleet.replica)
    assert done.returncode == 1
    assert "databases=1 skipped=0 failed=1" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.db"]


def test_commands_know_the_databases_of_a_directory(fleet: Fleet) -> None:
    fleet.create("a.db", "sub/b.db")
    config = fleet.configure()
    listed = json.loads(command("databases", "-json", "-config", config).stdout)
    assert [item["path"] for item in listed] == [str(fleet.data / "a.db"), str(fleet.data / "sub/b.db")]
    assert "ok: 0 databases, 1 directories, 0 warnings" in command("config", "check", "-config", config).stdout
    assert command("replicate", "-once", "-config", config).returncode == 0
    states = json.loads(command("status", "-json", "-config", config).stdout)
    assert {(Path(item["database"]).name, item["status"]) for item in states} == {("a.db", "ok"), ("b.db", "ok")}
    assert "0000000000000001" in command("ltx", "-config", config, fleet.data / "sub/b.db").stdout
