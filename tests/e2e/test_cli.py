"""`pyrepl` as a user runs it: outputs, exit codes, and one clear line for each bad input."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replicator import Replicator
from tests.e2e.databases import checkpointed_bytes, connect, insert, txids


def pyrepl(*arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "replicator", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """One line that names the object, perhaps a next step, and nothing else."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert lines[0].startswith("Error: ")
    if code == 1:
        assert len(lines) <= 2
        assert len(lines) == 1 or lines[1].startswith("Try: ")
    for word in words:
        assert word in lines[0], done.stderr


@pytest.fixture
def replica(tmp_path: Path) -> tuple[Path, str]:
    """A database and a replica of five transactions."""
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    with Replicator(database, url) as engine:
        for _ in range(5):
            insert(application, 20)
            engine.wait(timeout_s=60)
    application.close()
    return database, url


def test_version_loads_nothing_heavy() -> None:
    code = (
        "import sys; from replicator.cli import main; main(['version']); "
        "print(sorted({'boto3','numpy','rich','watchdog','hypothesis','lz4','yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0.1.0\n[]\n"


def test_a_restore_from_a_directory_loads_what_it_needs(replica: tuple[Path, str], tmp_path: Path) -> None:
    """A restore in a quarter of a second leaves no time for more."""
    code = (
        f"import sys; from replicator.cli import main; main(['restore', '-o', {str(tmp_path / 'r.db')!r}, {replica[1]!r}]); "
        "print(sorted({'boto3','numpy','rich','watchdog','yaml','asyncio','ssl','replicator.config'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert (tmp_path / "r.db").exists()


def test_replicate_once_restore_and_list(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    insert(application, 20)
    done = pyrepl("replicate", "-once", "--force-snapshot", database, url)
    assert done.returncode == 0, done.stderr
    assert 'msg="initialized db" path=' in done.stdout
    assert pyrepl("restore", url, "-o", tmp_path / "r.db", "-integrity-check=full").returncode == 0
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    listing = pyrepl("ltx", "-level", "all", url).stdout.splitlines()
    assert listing[0].split() == ["level", "min_txid", "max_txid", "size", "created"]
    assert [line.split()[:3] for line in listing[1:]] == [["0", f"{1:016x}", f"{1:016x}"], ["9", f"{1:016x}", f"{1:016x}"]]
    document = json.loads(pyrepl("ltx", "-json", url).stdout)
    assert [list(item) for item in document] == [["level", "min_txid", "max_txid", "size", "timestamp"]]
    application.close()


def test_replicate_stops_on_sigterm_with_everything_stored(tmp_path: Path) -> None:
    database, url = tmp_path / "a.db", f"file://{tmp_path}/replica"
    application = connect(database)
    command = [sys.executable, "-m", "replicator", "replicate", str(database), url]
    engine = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    assert any("initialized db" in line for line in engine.stdout)  # the engine's own lines may come before it
    insert(application, 20)
    engine.send_signal(signal.SIGTERM)
    rest = engine.stdout.read()
    assert engine.wait(60) == 0
    engine.stdout.close()
    assert "replication stopped" in rest
    pyrepl("restore", "-o", tmp_path / "r.db", url)
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(database, tmp_path)
    application.close()


def test_restore_json_and_dry_run_have_the_peers_shapes(tmp_path: Path, replica: tuple[Path, str]) -> None:
    _, url = replica
    document = json.loads(pyrepl("restore", "-json", "-o", tmp_path / "r.db", url).stdout)
    assert list(document) == ["db_path", "replica", "txid", "duration_ms", "integrity_check"]
    assert (document["replica"], document["txid"]) == ("file", f"{txids(url)[-1]:016x}")
    document = json.loads(pyrepl("restore", "-json", "-dry-run", "-o", tmp_path / "x.db", url).stdout)
    assert list(document) == ["source", "target_path", "replica", "min_txid", "max_txid", "files"]
    assert list(document["files"][0]) == ["level", "name", "min_txid", "max_txid", "size", "timestamp"]
    assert not (tmp_path / "x.db").exists()


def test_conditional_flags(tmp_path: Path, replica: tuple[Path, str]) -> None:
    database, url = replica
    before = hashlib.sha256(database.read_bytes()).digest()
    assert pyrepl("restore", "-if-db-not-exists", "-o", database, url).returncode == 0
    assert hashlib.sha256(database.read_bytes()).digest() == before
    nothing = f"file://{tmp_path}/nothing"
    assert pyrepl("restore", "-if-replica-exists", "-o", tmp_path / "x.db", nothing).returncode == 0
    refused(pyrepl("restore", "-o", tmp_path / "x.db", nothing), "no matching backup files available", nothing)


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    for arguments in (
        ["nonsense"],
        ["restore", "-nonsense", "x"],
        ["replicate", "a.db"],
        ["restore", "file:///x"],
        ["ltx", "-level", "x", "y"],
    ):
        refused(pyrepl(*arguments), code=2)
    assert pyrepl().returncode == 2
    assert pyrepl("help").returncode == pyrepl("restore", "-h").returncode == 0


@pytest.mark.fault("F21")
@pytest.mark.parametrize("kind", ["missing", "directory", "text", "encrypted"])
def test_what_is_not_a_database_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.db"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"hello\n" * 1000 if kind == "text" else os.urandom(8192))
    before = path.read_bytes() if path.is_file() else None
    done = pyrepl("replicate", "-once", path, f"file://{tmp_path}/replica")
    refused(done, "does not exist" if kind == "missing" else "not an SQLite database", str(path))
    assert (path.read_bytes() if path.is_file() else None) == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ([] if kind == "missing" else ["a.db"])


def test_a_database_that_cannot_be_switched_to_wal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    application = sqlite3.connect(path, isolation_level=None)
    application.execute("CREATE TABLE t(a)")
    application.close()
    before = path.read_bytes()  # not later: closing this descriptor would drop the lock that the test needs
    application = sqlite3.connect(path, isolation_level=None)
    application.execute("BEGIN")
    application.execute("SELECT * FROM t").fetchall()
    refused(pyrepl("replicate", "-once", path, f"file://{tmp_path}/replica"), "cannot be switched to WAL", str(path))
    assert path.read_bytes() == before
    application.close()


def test_an_exclusive_application_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    application = connect(path)
    application.execute("PRAGMA locking_mode=EXCLUSIVE")
    insert(application, 1)
    done = pyrepl("replicate", "-once", path, f"file://{tmp_path}/replica")
    refused(done, "database is locked", str(path))
    assert "EXCLUSIVE" in done.stderr
    insert(application, 1)
    application.close()


def test_states_that_are_not_there_are_refused(tmp_path: Path, replica: tuple[Path, str]) -> None:
    _, url = replica
    out = tmp_path / "r.db"
    refused(pyrepl("restore", "-o", out, "-txid", "00000000000000ff", url), "00000000000000ff")
    refused(pyrepl("restore", "-o", out, "-txid", "xyz", url), "invalid txid")
    for offset in (-1, 1):
        when = (datetime.now(UTC) + timedelta(days=offset)).isoformat()
        refused(pyrepl("restore", "-o", out, "-timestamp", when, url), "timestamp does not exist")
    refused(pyrepl("restore", "-o", out, "-timestamp", "yesterday", url), "ISO 8601")
    out.write_bytes(b"precious")
    refused(pyrepl("restore", "-o", out, url), "already exists", str(out))
    assert out.read_bytes() == b"precious"
    assert pyrepl("restore", "-force", "-o", out, url).returncode == 0
    out.unlink()
    out.with_name("r.db-wal").write_bytes(b"stale")
    refused(pyrepl("restore", "-o", out, url), "r.db-wal")
    assert pyrepl("restore", "-force", "-o", out, url).returncode == 0
    assert not out.with_name("r.db-wal").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "gap", "header only"])
def test_a_damaged_replica_is_refused_by_file_name(tmp_path: Path, replica: tuple[Path, str], damage: str) -> None:
    _, url = replica
    victim = tmp_path / f"replica/ltx/0/{3:016x}-{3:016x}.ltx"
    data = bytearray(victim.read_bytes())
    if damage == "gap":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        victim.write_bytes({"flip": data, "truncate": data[:-20], "header only": data[:100]}[damage])
    done = pyrepl("restore", "-o", tmp_path / "r.db", url)
    refused(done, "non-contiguous" if damage == "gap" else victim.name)
    assert [path.name for path in tmp_path.iterdir() if "r.db" in path.name] == []


def test_an_unusable_replica_path_is_refused(tmp_path: Path) -> None:
    application = connect(tmp_path / "a.db")
    (tmp_path / "file").write_text("not a directory")
    refused(pyrepl("replicate", "-once", tmp_path / "a.db", f"file://{tmp_path}/file"), str(tmp_path / "file"))
    refused(pyrepl("replicate", "-once", tmp_path / "a.db", "ftp://host/x"), "unsupported scheme: ftp")
    application.close()


def test_wrong_credentials_and_missing_buckets_are_refused_without_secrets(
    tmp_path: Path, seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    application = connect(tmp_path / "a.db")
    missing = seaweed.url("x").replace("s3://bucket/", "s3://no-such-bucket/")
    refused(pyrepl("replicate", "-once", tmp_path / "a.db", missing), "bucket does not exist: no-such-bucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    for done in (
        pyrepl("replicate", "-once", tmp_path / "a.db", seaweed.url("x")),
        pyrepl("restore", "-o", tmp_path / "r.db", seaweed.url("x")),
    ):
        refused(done, "s3://bucket/x")
        assert "wrong-secret-value" not in done.stdout + done.stderr
    application.close()


def test_demo_passes(tmp_path: Path) -> None:
    done = pyrepl("demo", "-duration", "2s", f"file://{tmp_path}/replica", timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 wrong" in done.stdout
