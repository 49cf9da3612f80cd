"""`litestream.yml` as a user runs it, and the same file in the released binary."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from replicator.storage import open_client
from tests.compat.litestream import litestream
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored, txids


def pyrepl(*arguments: object, environ: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "replicator", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **(environ or {})}, cwd=cwd)


def refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]


@contextlib.contextmanager
def running(config: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], queue.Queue[str]]]:
    """`pyrepl replicate`, and its log lines."""
    command = [sys.executable, "-m", "replicator", "replicate", "-config", str(config), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    reader = threading.Thread(target=lambda stream=process.stdout: [lines.put(line) for line in stream], daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def until(lines: queue.Queue[str], *words: str) -> list[str]:
    """Read log lines up to the one with all of the words."""
    seen = []
    while True:
        try:
            seen.append(lines.get(timeout=60))
        except queue.Empty:
            raise AssertionError(f"no line with {words}: {seen}") from None
        if all(word in seen[-1] for word in words):
            return seen


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two databases, of which b.db is not there; a.db has two replicas."""
    path = tmp_path / "litestream.yml"
    path.write_text(
        f"""
mcp-addr: ":9090"
dbs:
  - path: {tmp_path}/a.db
    replicas:
      - path: {tmp_path}/replicas/a1
        retention: 72h
      - url: file://{tmp_path}/replicas/a2
  - path: $FOLDER/b.db
    meta-path: {tmp_path}/meta-b
    replica: {{path: {tmp_path}/replicas/b}}
""".replace("$FOLDER", str(tmp_path))
    )
    return path


def test_once_stores_what_can_be_stored_and_fails_for_the_rest(tmp_path: Path, config: Path) -> None:
    application = connect(tmp_path / "a.db")
    insert(application, 10)
    done = pyrepl("replicate", "-once", "-config", config)
    assert done.returncode == 1
    assert f"database does not exist: {tmp_path}/b.db" in done.stdout
    assert "config warning" in done.stdout
    assert "line=2" in done.stdout
    for name in ("a1", "a2"):
        assert restored(f"file://{tmp_path}/replicas/{name}", tmp_path).read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)
    connect(tmp_path / "b.db").close()
    assert pyrepl("replicate", "-once", "-config", config).returncode == 0
    assert txids(f"file://{tmp_path}/replicas/b") == [1]
    assert (tmp_path / "meta-b/pyrepl").is_dir()
    application.close()


def test_a_database_that_is_missing_or_broken_stops_nobody_and_joins_later(tmp_path: Path, config: Path) -> None:
    application = connect(tmp_path / "a.db")
    insert(application, 10)
    (tmp_path / "c.db").write_bytes(b"no database" * 1000)
    config.write_text(config.read_text() + f"  - path: {tmp_path}/c.db\n    replica: {{path: {tmp_path}/replicas/c}}\n")
    with running(config) as (process, lines):
        seen = until(lines, "initialized db", "a.db")
        while not any("cannot replicate" in line and "b.db" in line for line in seen):
            seen += until(lines, "cannot replicate")
        other = connect(tmp_path / "b.db")
        insert(other, 5)
        until(lines, "initialized db", "b.db")
        insert(application, 10)
        process.send_signal(signal.SIGTERM)
        until(lines, "replication stopped")
        assert process.wait(60) == 1  # c.db was never replicated
    for name in ("a", "b"):
        url = f"file://{tmp_path}/replicas/{'a1' if name == 'a' else name}"
        assert restored(url, tmp_path).read_bytes() == checkpointed_bytes(tmp_path / f"{name}.db", tmp_path)
    assert not (tmp_path / "replicas/c").exists()
    application.close()
    other.close()


def test_databases_restore_and_ltx_by_path(tmp_path: Path, config: Path) -> None:
    application = connect(tmp_path / "a.db")
    insert(application, 10)
    pyrepl("replicate", "-once", "-config", config)
    application.close()
    expected = checkpointed_bytes(tmp_path / "a.db", tmp_path)
    environ = {"LITESTREAM_CONFIG": str(config)}
    listed = json.loads(pyrepl("databases", "-json", environ=environ).stdout)
    assert listed == [{"path": f"{tmp_path}/a.db", "replica": "file,file"}, {"path": f"{tmp_path}/b.db", "replica": "file"}]
    rows = pyrepl("ltx", "-config", config, "sqlite://a.db", cwd=tmp_path).stdout.splitlines()
    assert len(rows) == 1 + len(txids(f"file://{tmp_path}/replicas/a1"))
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"a.db{suffix}").unlink(missing_ok=True)
    done = pyrepl("restore", tmp_path / "a.db", environ=environ)
    assert done.returncode == 0, done
    assert (tmp_path / "a.db").read_bytes() == expected
    refused(pyrepl("restore", "a.db", environ=environ, cwd=tmp_path), f"output path already exists and is not empty: {tmp_path}/a.db")


@pytest.mark.parametrize("first", ["empty", "unreachable"])
def test_restore_takes_the_next_replica_where_the_first_is_of_no_use(tmp_path: Path, config: Path, first: str) -> None:
    application = connect(tmp_path / "a.db")
    insert(application, 10)
    pyrepl("replicate", "-once", "-config", config)
    files = sorted((tmp_path / "replicas/a1/ltx").rglob("*.ltx"))
    for path in files:
        path.unlink()
    if first == "unreachable":
        (tmp_path / "replicas/a1").rename(tmp_path / "replicas/gone")
        (tmp_path / "replicas/a1").write_text("not a directory")
    done = pyrepl("restore", "-config", config, "-o", tmp_path / "out.db", tmp_path / "a.db")
    assert done.returncode == 0, done
    assert "replica passed over" in done.stdout
    assert f"{tmp_path}/replicas/a1" in done.stdout
    assert (tmp_path / "out.db").read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)
    application.close()


def test_an_unreachable_replica_is_not_an_empty_one(tmp_path: Path, config: Path) -> None:
    (tmp_path / "replicas").mkdir()
    arguments = ["restore", "-if-replica-exists", "-config", config, "-o", tmp_path / "out.db", tmp_path / "a.db"]
    assert pyrepl(*arguments).returncode == 0
    (tmp_path / "replicas/a1").write_text("not a directory")
    refused(pyrepl(*arguments), "replicas/a1")


def test_restore_if_db_not_exists(tmp_path: Path, config: Path) -> None:
    application = connect(tmp_path / "a.db")
    insert(application, 10)
    pyrepl("replicate", "-once", "-config", config)
    application.close()
    expected = checkpointed_bytes(tmp_path / "a.db", tmp_path)
    for path in tmp_path.glob("a.db*"):
        path.unlink()
    config.write_text(config.read_text().replace("a.db\n", "a.db\n    restore-if-db-not-exists: true\n"))
    done = pyrepl("replicate", "-once", "-config", config)
    assert "restored db" in done.stdout
    assert checkpointed_bytes(tmp_path / "a.db", tmp_path) == expected
    assert not (tmp_path / "b.db").exists()
    done = pyrepl("replicate", "-once", "-restore-if-db-not-exists", "-config", config)
    assert "nothing to restore" in done.stdout
    assert "database does not exist" in done.stdout


@pytest.mark.fault("F35")
def test_a_missing_database_does_not_begin_anew_while_its_replica_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("not a directory")
    config = tmp_path / "c.yml"
    config.write_text(f"dbs: [{{path: {tmp_path}/a.db, restore-if-db-not-exists: true, replica: {{path: {tmp_path}/r}}}}]")
    done = pyrepl("replicate", "-once", "-config", config)
    assert done.returncode == 1
    assert "nothing to restore" not in done.stdout
    assert str(tmp_path / "r") in done.stdout


def test_wrong_command_lines(tmp_path: Path, config: Path) -> None:
    refused(pyrepl("replicate", "-config", tmp_path / "no.yml"), f"config file not found: {tmp_path}/no.yml")
    refused(pyrepl("databases", "-config", "no.yml", cwd=tmp_path), f"config file not found: {tmp_path}/no.yml")
    refused(pyrepl("replicate", environ={"LITESTREAM_CONFIG": "/no.yml"}), "config file not found: /no.yml")
    refused(pyrepl("replicate", "-config", config, "a.db", "file:///x"), "cannot specify a replica URL and the -config flag", code=2)
    refused(pyrepl("replicate", "a.db"), "must specify at least one replica URL for a.db", code=2)
    for command in ("restore", "ltx"):
        refused(pyrepl(command, "-config", config, "file:///x"), "cannot specify a replica URL and the -config flag")
        refused(pyrepl(command, "-config", config, tmp_path / "x.db"), f"database not found in config: {tmp_path}/x.db")
    (tmp_path / "empty.yml").write_text("")
    refused(pyrepl("replicate", "-config", tmp_path / "empty.yml"), "no databases specified in configuration")
    (tmp_path / "binary.yml").write_bytes(b"a: 1\nb: \xff\n")
    refused(pyrepl("databases", "-config", tmp_path / "binary.yml"), f"{tmp_path}/binary.yml:2: not valid UTF-8")
    refused(pyrepl("databases", "-config", tmp_path), "is a directory")


def test_unknown_keys_are_refused_unless_lenient(tmp_path: Path, config: Path) -> None:
    config.write_text(config.read_text().replace("retention: 72h", "retentoin: 72h"))
    refused(pyrepl("databases", "-config", config), f"{config}:7:9: unknown key", "retentoin (did you mean retention?)")
    done = pyrepl("databases", "-lenient", "-config", config)
    assert done.returncode == 0
    assert "retentoin" in done.stderr


def test_encryption_with_a_wrong_key_is_refused_and_nothing_is_stored(tmp_path: Path, config: Path) -> None:
    connect(tmp_path / "a.db").close()
    config.write_text(config.read_text().replace("retention: 72h", "age: {recipients: [age1abc]}"))
    done = pyrepl("replicate", "-once", "-config", config)
    refused(done, "age recipient 1 is not valid")
    assert not (tmp_path / "replicas").exists()
    refused(pyrepl("restore", "-config", config, tmp_path / "a.db"), "age recipient 1 is not valid")


def test_a_replica_with_age_keys_is_stored_encrypted_and_restored(tmp_path: Path) -> None:
    secret = pyrage.x25519.Identity.generate()
    application = connect(tmp_path / "a.db")
    application.execute("INSERT INTO t(v) VALUES(?)", ("find me if you can " * 20,))
    config = tmp_path / "c.yml"
    config.write_text(
        f"dbs: [{{path: {tmp_path}/a.db, replica: {{path: {tmp_path}/r, age: {{recipients: [$PUBLIC], identities: [$SECRET]}}}}}}]"
    )
    environ = {"PUBLIC": str(secret.to_public()), "SECRET": str(secret)}
    assert pyrepl("replicate", "-once", "-config", config, environ=environ).returncode == 0
    stored = list((tmp_path / "r").rglob("*.ltx.age"))
    assert len(stored) == 1
    assert not any(b"find me" in path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())
    done = pyrepl("restore", "-config", config, "-o", tmp_path / "r.db", tmp_path / "a.db", environ=environ)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)
    application.close()


@pytest.mark.fault("F59")
def test_secrets_of_the_file_show_nowhere(tmp_path: Path) -> None:
    connect(tmp_path / "a.db").close()
    config = tmp_path / "c.yml"
    config.write_text(
        f"access-key-id: AKxxHIDDEN\nsecret-access-key: $KEY\ndbs: [{{path: {tmp_path}/a.db, "
        "replica: {type: s3, bucket: bkt, path: x, endpoint: 'http://127.0.0.1:9', force-path-style: true}}]"
    )
    environ = {"KEY": "SKxxHIDDEN"}
    for arguments in (
        ["replicate", "-once", "-timeout", "500ms", "-log-level", "debug"],
        ["databases", "-json"],
    ):
        done = pyrepl(*arguments, "-config", config, environ=environ)
        assert "HIDDEN" not in done.stdout + done.stderr
        assert done.returncode == (1 if "replicate" in arguments else 0)


def test_the_released_binary_lists_the_same_databases(tmp_path: Path) -> None:
    config = tmp_path / "litestream.yml"
    config.write_text(
        f"""
mcp-addr: ":9090"
access-key-id: key
secret-access-key: secret
snapshot: {{interval: 6h, retention: 72h}}
levels: [{{interval: 30s}}, {{interval: 5m}}]
l0-retention: 0
x-common: &common
  sync-interval: 5s
dbs:
  - path: ~/a.db
    replica:
      <<: *common
      url: file:///tmp/never-written
  - path: sqlite://{tmp_path}/b$NAME.db
    meta-path: {tmp_path}/meta
    checkpoint-interval: 0
    monitor-interval: 1s
    busy-timeout: 2s
    min-checkpoint-page-count: 500
    replica: {{type: s3, bucket: bkt, path: p, endpoint: "127.0.0.1:9", part-size: 10MB, force-path-style: yes}}
  - path: /c.db
    replicas: [{{url: "s3://bkt/x?endpoint=http://127.0.0.1:9", retention: 72h, retention-check-interval: 1h, snapshot-interval: 24h}}]
  - path: 010
    replica: {{path: "${{NOTHING:-x}}r", validation-interval: 1h, name: n, max-sync-ltx-files: 8}}
"""
    )
    flags = ["-config", str(config)]
    for more in ([], ["-json"], ["-no-expand-env"], ["-no-expand-env", "-json"]):
        theirs = litestream("databases", *flags, *more)
        assert theirs.returncode == 0, theirs
        ours = pyrepl("databases", *flags, *more)
        assert (ours.returncode, ours.stdout) == (0, theirs.stdout)
    config.write_text("")
    assert pyrepl("databases", *flags, "-json").stdout == litestream("databases", *flags, "-json").stdout == "[]\n"


def test_the_released_binary_and_we_share_a_file_and_its_replica(tmp_path: Path) -> None:
    config = tmp_path / "litestream.yml"
    config.write_text(f"dbs: [{{path: {tmp_path}/a.db, replica: {{path: {tmp_path}/r, sync-interval: 1s}}}}]")
    flags = ["-config", str(config)]
    application = connect(tmp_path / "a.db")
    for round_ in range(2):
        insert(application, 5)
        assert pyrepl("replicate", "-once", *flags).returncode == 0
        insert(application, 5)
        done = litestream("replicate", "-once", *flags)
        assert done.returncode == 0, done
        for run in (pyrepl, litestream):
            assert run("restore", *flags, "-o", str(tmp_path / "out.db"), str(tmp_path / "a.db")).returncode == 0
            assert (tmp_path / "out.db").read_bytes()[:16] == b"SQLite format 3\0"
            (tmp_path / "out.db").unlink()
        assert len(list(open_client(f"{tmp_path}/r").list(0))) >= 2 * (round_ + 1)
    application.close()


def test_the_keys_that_the_released_binary_and_we_use_in_a_bucket_are_the_same(tmp_path: Path, moto) -> None:
    application = connect(tmp_path / "a.db")
    config = tmp_path / "litestream.yml"
    for path in ("p/q", "/p/q", "p//q/"):
        replica = {"type": "s3", "bucket": "bucket", "path": path, "endpoint": moto.endpoint, "access-key-id": "testaccess"}
        replica["secret-access-key"] = "testsecret0123456789"
        config.write_text(json.dumps({"dbs": [{"path": str(tmp_path / "a.db"), "replica": replica}]}))
        insert(application, 1)
        done = litestream("replicate", "-once", "-config", str(config))
        assert done.returncode == 0, done
        theirs = litestream("ltx", "-config", str(config), str(tmp_path / "a.db"))
        ours = pyrepl("ltx", "-config", config, tmp_path / "a.db")
        assert (ours.returncode, ours.stdout) == (0, theirs.stdout)
        assert len(ours.stdout.splitlines()) >= 2
    application.close()
