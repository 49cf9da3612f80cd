"""`pyrepl status`, `reset` and `config`: this machine's own state, without asking anybody."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import replicator
from tests.compat.litestream import litestream
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, txids


def pyrepl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "replicator", *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(tmp_path / "a.db")
    insert(connection, 50)
    yield connection
    connection.close()


@pytest.fixture
def config(tmp_path: Path, database: sqlite3.Connection) -> Path:
    path = tmp_path / "c.yml"
    path.write_text(
        f"dbs:\n  - {{path: {tmp_path}/a.db, replica: {{path: {tmp_path}/r}}}}\n"
        f"  - {{path: {tmp_path}/b.db, meta-path: {tmp_path}/meta, replica: {{path: {tmp_path}/rb}}}}\n"
    )
    return path


def status(config: Path, *arguments: object) -> list[dict[str, str]]:
    done = pyrepl("status", "-json", "-config", config, *arguments)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def test_status_has_the_shape_of_the_released_one(tmp_path: Path, config: Path) -> None:
    theirs = litestream("status", "-json", "-config", str(config))
    assert status(config) == json.loads(theirs.stdout)  # not initialized, and no database
    for client in (pyrepl, litestream):
        client("replicate", "-once", "-config", str(config))
        ours, others = status(config), json.loads(litestream("status", "-json", "-config", str(config)).stdout)
        assert [row.keys() for row in ours] == [row.keys() for row in others]
        assert [row["wal_size"] for row in ours] == [row["wal_size"] for row in others]
    assert [(row["status"], row["local_txid"]) for row in status(config)] == [("ok", f"{1:016x}"), ("no database", "-")]
    assert [row["database"] for row in status(config, tmp_path / "b.db")] == [f"{tmp_path}/b.db"]
    assert pyrepl("status", "-config", config).stdout.splitlines()[0].split("  ")[0] == "database"


def test_reset_moves_state_aside_and_the_replica_goes_on_where_it_was(tmp_path: Path, config: Path, database: sqlite3.Connection) -> None:
    assert pyrepl("replicate", "-once", "-config", config).returncode == 1  # b.db is not there
    folder = tmp_path / ".a.db-litestream/pyrepl"
    (folder / "pages").write_bytes(b"damaged" * 1000)
    before = sorted(path.name for path in folder.iterdir())
    done = pyrepl("reset", "-dry-run", "-config", config, tmp_path / "a.db")
    assert f"Would move aside: {folder}/pages" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == before
    done = pyrepl("reset", tmp_path / "a.db")
    assert done.returncode == 0, done
    (aside,) = folder.glob("reset-*")
    assert (aside / "pages").read_bytes() == b"damaged" * 1000
    assert sorted(path.name for path in folder.iterdir() if path != aside) == ["lock", "replicas.json"]
    insert(database, 1)
    pyrepl("replicate", "-once", "-config", config)
    assert txids(f"file://{tmp_path}/r") == [1, 2]
    assert restored(f"file://{tmp_path}/r", tmp_path).read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)


def test_an_emptied_replica_is_noticed_after_a_reset_too(tmp_path: Path, config: Path) -> None:
    pyrepl("replicate", "-once", "-config", config)
    assert pyrepl("reset", tmp_path / "a.db").returncode == 0
    (tmp_path / "r").rename(tmp_path / "away")
    done = pyrepl("replicate", "-once", "-config", config)
    assert f'msg="cannot replicate" db={tmp_path}/a.db' in done.stdout
    assert not (tmp_path / "r/ltx").exists()


def test_reset_refuses(tmp_path: Path, config: Path, database: sqlite3.Connection) -> None:
    done = pyrepl("reset", tmp_path / "none.db")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"Error: database does not exist: {tmp_path}/none.db")
    assert pyrepl("reset").returncode == 2
    with replicator.Replicator(tmp_path / "a.db", f"file://{tmp_path}/r") as engine:
        engine.wait()
        done = pyrepl("reset", tmp_path / "a.db")
        assert done.returncode == 1
        assert str(tmp_path / "a.db") in done.stderr
        assert (tmp_path / ".a.db-litestream/pyrepl/pages").exists()


def test_config_show_hides_secrets_and_shows_what_holds(tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text(
        f"addr: ':9090'\nsocket: {{enabled: true, permissions: 0660}}\nsecret-access-key: TOPSECRET\naccess-key-id: AKID\n"
        f"heartbeat-url: https://alarm.example.com/TOPSECRET\n"
        f"dbs: [{{path: {tmp_path}/a.db, replica: {{url: 's3://bucket/a?endpoint=http://127.0.0.1:1', sync-interval: 3s}}}}]\n"
    )
    text = pyrepl("config", "show", "-config", config).stdout
    assert "TOPSECRET" not in text
    assert "AKID" not in text
    shown = yaml.safe_load(text)
    assert shown == json.loads(pyrepl("config", "show", "-json", "-config", config).stdout)
    assert shown["daemon"]["address"] == ["", 9090]
    assert shown["daemon"]["heartbeat_url"] == "(hidden)"
    assert shown["daemon"]["socket"]["permissions"] == "0660"
    (replica,) = shown["databases"][0]["replicas"]
    assert replica["sync_interval_s"] == 3.0
    assert replica["s3"]["secret_access_key"] == "(hidden)"
    assert replica["history"]["l0_retention_s"] == 300


def test_config_check(tmp_path: Path, config: Path) -> None:
    done = pyrepl("config", "check", "-config", config)
    assert (done.returncode, done.stdout) == (0, "ok: 2 databases, 0 warnings\n")
    config.write_text("mcp-addr: x\n" + config.read_text())
    done = pyrepl("config", "check", "-config", config)
    assert done.stdout.splitlines()[0].startswith("warning: line 1, column 1: mcp-addr")
    for text, words in (
        ("dbs: []", "no databases"),
        ("dbz: []", "unknown key"),
        ("dbs: [{path: a, replica: {path: r, age: {recipients: [age1x]}}}]", "age recipient 1 is not valid"),
    ):
        config.write_text(text)
        done = pyrepl("config", "check", "-config", config)
        assert done.returncode == 1
        assert words in done.stderr
    assert pyrepl("config").returncode == pyrepl("config", "frobnicate").returncode == 2
