"""`pyrepl demo`: the main job in miniature, with real processes.

A writer process commits rows and reports each one after its COMMIT; `pyrepl replicate` replicates; the writer is killed; the database is
deleted and restored, and every row that had been reported must be there.

*Lag* is measured from outside: for each reported row, the time from its report until the replica held a file that contains it. Which
row a file contains is read from the restored copies of two neighbouring moments no more than once: the demo polls the replica's newest TXID
every few milliseconds and restores that TXID's row count at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from replicator.format.ltx import TXID
from replicator.recover import restore
from replicator.storage import open_client, redact
from replicator.storage.base import ReplicaClient

__all__ = ["run"]

POLL_S = 0.005
SAMPLES = 15


def run(url: str | None, *, seconds: float = 5.0, keep: bool = False) -> int:
    """Run the demo for about `seconds` of writing; returns 0 only if everything that was acknowledged came back."""
    folder = Path(tempfile.mkdtemp(prefix="pyrepl-demo-"))
    replica = url or f"file://{folder}/replica"
    try:
        return _run(folder, replica, seconds)
    finally:
        if keep:
            print(f"kept      {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, url: str, seconds: float) -> int:
    database = folder / "app.db"
    _create(database)
    print(f"database  {database}\nreplica   {redact(url)}")
    client = open_client(url)
    if any(True for level in (0, 9) for _ in client.list(level)):
        print("Error: the replica is not empty: the demo wants a path of its own", file=sys.stderr)
        return 1
    engine = subprocess.Popen([sys.executable, "-m", "replicator", "replicate", str(database), url], stdout=subprocess.DEVNULL)
    writer = None
    try:
        writer = subprocess.Popen([sys.executable, "-m", "replicator.demo", str(database)], stdout=subprocess.PIPE, text=True)
        print(f"started   pyrepl replicate (pid {engine.pid}), a writer (pid {writer.pid})")
        acknowledged: dict[int, float] = {}
        stored: list[tuple[float, TXID]] = []
        done = threading.Event()
        threads = [
            threading.Thread(target=_collect, args=(writer, acknowledged), daemon=True),
            threading.Thread(target=_watch, args=(client, stored, done), daemon=True),
        ]
        for thread in threads:
            thread.start()
        _wait_for(lambda: bool(stored) and bool(acknowledged), 30, "the first rows")
        time.sleep(seconds / 2)
        # Everything that was acknowledged now and is stored a moment later belongs to this moment.
        before = max(acknowledged)
        reached = len(stored)
        _wait_for(lambda: len(stored) > reached, 30, "the next file")
        time.sleep(1.1)  # S3 listings know whole seconds
        moment = datetime.now(UTC)
        print(f"moment    {moment:%H:%M:%S.%f} noted, {before} rows acknowledged before it")
        time.sleep(max(0.2, seconds / 2))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        threads[0].join()
        print(f"killed    the writer with SIGKILL after {len(acknowledged)} acknowledged rows")
    finally:
        for process in (writer, engine):
            if process is not None and process.poll() is None:
                process.terminate()
        code = engine.wait(60)
    done.set()
    threads[1].join()
    print(f"stopped   pyrepl replicate, exit code {code}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            (folder / f"app.db{suffix}").unlink()
    print("deleted   the database")
    result = restore(url, database, integrity_check="full")
    print(f"restored  {result.files} files, {result.commit} pages in {result.duration_s:.2f} s; integrity_check ok")
    rows = _rows(database)
    lost = [number for number in acknowledged if number not in rows]
    wrong = [number for number, (payload, digest) in rows.items() if hashlib.sha256(payload).hexdigest() != digest]
    print(f"compared  {len(acknowledged)} acknowledged rows with {len(rows)} restored ones: {len(lost)} lost, {len(wrong)} wrong")
    earlier = folder / "earlier.db"
    restore(url, earlier, timestamp=moment, integrity_check="full")
    past = _rows(earlier)
    prefix = sorted(past) == list(range(1, len(past) + 1)) and before <= len(past) <= len(rows)
    print(f"restored  the moment: {len(past)} rows, {'a prefix of the history' if prefix else 'NOT the expected state'}")
    lags = _lags(url, folder, acknowledged, stored)
    size = sum(info.size for level in range(10) for info in client.list(level))
    client.close()
    ok = code == 0 and not lost and not wrong and prefix
    _figures(
        [
            ("rows acknowledged", f"{len(acknowledged):,}"),
            ("bytes stored", f"{size:,}"),
            ("lag p50 / p99, commit to stored", f"{_share(lags, 0.5) * 1000:.0f} / {_share(lags, 0.99) * 1000:.0f} ms"),
            ("restore", f"{result.duration_s * 1000:.0f} ms"),
            ("result", "every acknowledged row came back" if ok else "FAILED"),
        ]
    )
    return 0 if ok else 1


def _create(database: Path) -> None:
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE rows(id INTEGER PRIMARY KEY, payload BLOB, digest TEXT)")
    connection.close()


def _write(database: str) -> None:
    """The writer process: commit rows until killed, printing each id after its COMMIT."""
    connection = sqlite3.connect(database, isolation_level=None, timeout=30)
    for number in range(1, 1_000_000):
        payload = os.urandom(200)
        row = (number, payload, hashlib.sha256(payload).hexdigest())
        connection.execute("INSERT INTO rows VALUES(?, ?, ?)", row)
        print(number, flush=True)
        time.sleep(0.004)


def _collect(writer: subprocess.Popen[str], acknowledged: dict[int, float]) -> None:
    assert writer.stdout is not None
    for line in writer.stdout:
        acknowledged[int(line)] = time.monotonic()


def _watch(client: ReplicaClient, stored: list[tuple[float, TXID]], done: threading.Event) -> None:
    """Note when each TXID became visible on the replica."""
    newest = TXID(0)
    while not done.is_set():
        for info in client.list(0, seek=TXID(newest + 1)):
            newest = info.max_txid
            stored.append((time.monotonic(), newest))
        done.wait(POLL_S)


def _lags(url: str, folder: Path, acknowledged: dict[int, float], stored: list[tuple[float, TXID]]) -> list[float]:
    """For a sample of the stored files: the age of the rows that came with it, at the time it was seen."""
    step = max(1, len(stored) // SAMPLES)
    lags: list[float] = []
    probe = folder / "probe.db"
    for at in range(step, len(stored), step):
        counts = []
        for _, txid in stored[at - 1 : at + 1]:
            restore(url, probe, txid=txid, force=True)
            counts.append(len(_rows(probe)))
        seen = stored[at][0]
        lags += [max(0.0, seen - acknowledged[number]) for number in range(counts[0] + 1, counts[1] + 1) if number in acknowledged]
    return sorted(lags)


def _share(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def _rows(database: Path) -> dict[int, tuple[bytes, str]]:
    connection = sqlite3.connect(database)
    try:
        return {number: (payload, digest) for number, payload, digest in connection.execute("SELECT * FROM rows")}
    finally:
        connection.close()


def _wait_for(holds: object, timeout_s: float, what: str) -> None:
    assert callable(holds)
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.01)


def _figures(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    _write(sys.argv[1])
