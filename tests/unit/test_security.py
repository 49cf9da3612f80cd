"""What docs/security.md promises and no other test shows."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import replicator
from replicator import Replicator, atomic, inplace, publish
from replicator.errors import IntegrityCheckFailed
from replicator.server import listen_unix
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import drain, engine_for
from tests.storage.scripted import s3_error, scripted

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3tOfNobodyElse0123456789"


@pytest.fixture(autouse=True)
def usual_mask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.fault("F61")
def test_a_file_is_private_from_its_first_moment(tmp_path: Path) -> None:
    with atomic.AtomicFile(tmp_path / "file") as file:
        assert mode(file.temporary_path) == 0o600
        file.write(b"x")
    assert mode(tmp_path / "file") == 0o600


@pytest.mark.fault("F61")
@pytest.mark.parametrize("where", ["atomic", "restore"])
def test_a_link_that_was_planted_under_the_temporary_name_is_not_followed(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    output = tmp_path / "folder" / "output"
    if where == "atomic":
        monkeypatch.setattr(atomic, "_temporary_name", lambda: ".pyrepl-0.tmp")
        (tmp_path / "folder" / ".pyrepl-0.tmp").symlink_to(victim)
        with pytest.raises(FileExistsError):
            atomic.write_file(output, b"evil")
    else:
        monkeypatch.setattr(publish.secrets, "token_hex", lambda size: "0")
        (tmp_path / "folder" / ".output.0.restore").symlink_to(victim)
        with pytest.raises(FileExistsError):
            publish._create_temporary(output)
    assert victim.read_bytes() == b"precious"
    assert not output.exists()


@pytest.mark.fault("F61")
def test_a_link_at_the_output_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    victim, output = tmp_path / "victim", tmp_path / "output"
    victim.write_bytes(b"precious")
    output.symlink_to(victim)
    atomic.write_file(output, b"new")
    assert (victim.read_bytes(), output.read_bytes(), output.is_symlink()) == (b"precious", b"new", False)


@pytest.mark.fault("F60")
def test_a_restored_database_is_checked_without_trusting_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*args, **options):
        connection = connect(*args, **options)
        connection.set_trace_callback(statements.append)
        return connection

    database, client = tmp_path / "a.db", MemoryClient()
    application = connect(database, isolation_level=None)
    application.execute("PRAGMA journal_mode=WAL")
    application.execute("CREATE TABLE t(v)")
    with Replicator(database, client, history=None) as running:
        running.wait(timeout_s=20)
    application.close()
    monkeypatch.setattr(publish.sqlite3, "connect", traced)
    replicator.restore(client, tmp_path / "copy.db", integrity_check="full")
    check = next(number for number, text in enumerate(statements) if "integrity_check" in text)
    before = "\n".join(statements[:check])
    for setting in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
        assert setting in before


@pytest.mark.fault("F60")
def test_no_connection_of_the_engine_trusts_a_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who restores a database may replicate it next, or follow it."""
    statements: dict[sqlite3.Connection, list[str]] = {}
    connect = sqlite3.connect
    application = connect(tmp_path / "a.db", isolation_level=None)
    application.execute("PRAGMA journal_mode=WAL")
    application.execute("CREATE TABLE t(v)")
    copy = connect(tmp_path / "copy.db")
    copy.execute("CREATE TABLE t(v)")
    copy.close()

    def traced(*args, **options):
        connection = connect(*args, **options)
        connection.set_trace_callback(statements.setdefault(connection, []).append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    engine = engine_for(tmp_path / "a.db", MemoryClient())
    engine.open()
    drain(engine)
    assert engine.checkpoint()
    application.execute("INSERT INTO t VALUES(1)")
    drain(engine)
    engine.settle_pin()
    engine.close()
    assert len(statements) == 4
    (tmp_path / "copy.db-journal").write_bytes(b"hot")
    inplace.recover(tmp_path / "copy.db")
    assert len(statements) == 5
    assert {texts[0] for texts in statements.values()} == {"PRAGMA trusted_schema=OFF"}
    application.close()


def test_a_view_with_a_function_that_acts_does_not_run_in_the_check(tmp_path: Path) -> None:
    path = tmp_path / "evil.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t(v)")
    connection.execute("CREATE INDEX i ON t(abs(v))")
    connection.execute("INSERT INTO t VALUES(1)")
    connection.commit()
    connection.execute("PRAGMA writable_schema=ON")
    connection.execute("UPDATE sqlite_master SET sql = 'CREATE INDEX i ON t(load_extension(v))' WHERE name = 'i'")
    connection.commit()
    connection.close()
    with pytest.raises(IntegrityCheckFailed):
        publish._check(path, "full")


@pytest.mark.fault("F61")
def test_the_control_socket_is_private_before_anybody_can_connect(tmp_path: Path) -> None:
    listening = listen_unix(tmp_path / "socket", 0o600)
    assert mode(tmp_path / "socket") == 0o600
    listening.close()


@pytest.mark.fault("F59")
def test_a_run_at_debug_level_prints_no_secret(tmp_path: Path) -> None:
    (tmp_path / "a.db").touch()
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(v)")
    connection.commit()
    connection.close()
    config, printed = tmp_path / "pyrepl.yml", ""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AWS_SESSION_TOKEN": f"{SECRET}-token"}
    with scripted(lambda request: s3_error(403, "AccessDenied", SECRET)) as store:
        config.write_text(f"""
logging: {{level: debug}}
access-key-id: {SECRET}-id
secret-access-key: {SECRET}-key
dbs:
  - path: {tmp_path}/a.db
    replicas:
      - url: s3://bucket/path?endpoint={store.endpoint}
      - path: {tmp_path}/replica
""")
        for arguments in ("replicate -once -config", "databases -config", "config show -config", "config check -config"):
            command = [sys.executable, "-m", "replicator", *arguments.split(), str(config)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            printed += done.stdout + done.stderr
    assert "access denied" in printed
    assert store.requests
    assert SECRET not in printed


def test_no_module_logs_an_object_that_may_hold_secrets() -> None:
    # Settings hide their secrets in repr(); their fields do not.
    shows = re.compile(r"log\.\w+\([^)]*(secret_access_key|sse_customer_key|age_identities|access_key_id)")
    for path in (ROOT / "replicator").rglob("*.py"):
        assert not shows.search(path.read_text()), path
    assert logging.getLogger("replicator").level == logging.NOTSET
