"""`pyrepl restore -f` as a user runs it: outputs, exit codes, signals, and what an operator gets to read when it cannot go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import Replicator
from tests.e2e.databases import connect, insert, txids
from tests.e2e.test_cli import pyrepl, refused


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


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        child.kill()
        child.communicate()


def following(started: list[subprocess.Popen[str]], url: str, output: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "replicator", "restore", "-f", "-follow-interval", "10ms", *flags, "-o", str(output), url]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(child)
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_copy_is_followed_stopped_and_continued(tmp_path: Path, replica: tuple[Path, str], started, number: signal.Signals) -> None:
    database, url = replica
    output = tmp_path / "copy.db"
    child = following(started, url, output)
    first = child.stdout.readline()
    assert f'level=INFO msg="entering follow mode" replica=file output={output} txid={txids(url)[-1]:016x} interval=0.01s' in first
    application = connect(database)
    with Replicator(database, url) as engine:
        insert(application, 20)
        engine.wait(timeout_s=60)
    application.close()
    line = child.stdout.readline()
    assert 'msg="follow: applied updates" replica=file from_txid=' in line
    assert line.rstrip().endswith(f" to_txid={txids(url)[-1]:016x}")
    child.send_signal(number)
    rest, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, "")
    assert 'msg="follow mode stopped"' in rest
    child = following(started, url, output, "-json")
    assert 'msg="resuming follow mode"' in child.stderr.readline()
    child.send_signal(number)
    text, _ = child.communicate(timeout=60)
    document = json.loads(text)
    assert list(document) == ["db_path", "replica", "txid", "duration_ms", "integrity_check"]
    assert (child.returncode, document["replica"], document["txid"]) == (0, "file", f"{txids(url)[-1]:016x}")


def test_flags_that_exclude_each_other_have_the_peers_words(tmp_path: Path) -> None:
    output, url = tmp_path / "copy.db", f"file://{tmp_path}/replica"
    for flags, words in (
        (["-txid", "0000000000000001"], "cannot use follow mode with -txid"),
        (["-timestamp", "2026-01-01T00:00:00Z"], "cannot use follow mode with -timestamp"),
        (["-dry-run"], "cannot use -dry-run with -f"),
        (["-follow-interval", "0s"], "-follow-interval"),
        (["-follow-interval", "soon"], "-follow-interval"),
    ):
        refused(pyrepl("restore", "-f", *flags, "-o", output, url), words, code=2)


def test_what_cannot_begin_or_go_on_is_refused(tmp_path: Path, replica: tuple[Path, str]) -> None:
    _, url = replica
    output = tmp_path / "copy.db"
    refused(pyrepl("restore", "-f", "-o", output, f"file://{tmp_path}/nothing"), "no matching backup files available")
    assert pyrepl("restore", "-f", "-if-replica-exists", "-o", output, f"file://{tmp_path}/nothing").returncode == 0
    pyrepl("restore", "-o", output, url)
    done = pyrepl("restore", "-f", "-o", output, url)
    refused(done, "cannot resume follow mode: database exists but no -txid file found; delete the database to re-restore", str(output))
    assert pyrepl("restore", "-f", "-if-db-not-exists", "-o", output, url).returncode == 0


@pytest.mark.parametrize("what", ["gap", "damage"])
def test_a_gap_and_a_damaged_file_end_it_with_an_error(tmp_path: Path, replica: tuple[Path, str], started, what: str) -> None:
    _, url = replica
    output, folder = tmp_path / "copy.db", tmp_path / "replica/ltx/0"
    files = sorted(folder.iterdir())
    kept = {path: path.read_bytes() for path in files[2:]}
    for path in kept:
        path.unlink()
    child = following(started, url, output)
    assert "entering follow mode" in child.stdout.readline()
    data = bytearray(kept[files[-1]])
    data[len(data) // 2] ^= 0x10
    name = files[-1] if what == "gap" else files[2]
    temporary = tmp_path / "temporary"
    temporary.write_bytes(kept[files[-1]] if what == "gap" else bytes(data))
    temporary.rename(name)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert errors.startswith("Error: non-contiguous ltx files" if what == "gap" else "Error: corrupt file ")
    assert what == "gap" or files[2].name in errors


def test_a_bucket_is_followed(tmp_path: Path, started, seaweed) -> None:
    database, url, output = tmp_path / "a.db", seaweed.url("followed"), tmp_path / "copy.db"
    application = connect(database)
    with Replicator(database, url, sync_interval_s=0.05) as engine:
        insert(application, 20)
        engine.wait(timeout_s=60)
        child = following(started, url, output)
        assert "entering follow mode" in child.stdout.readline()
        insert(application, 20)
        engine.wait(timeout_s=60)
        assert "follow: applied updates" in child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0
    application.close()
