"""Peak memory of a full image and of compaction, for a large database. Fails above the limit.

    python -m bench.memory [MEGABYTES] [LIMIT_MB]

Each step runs in a process of its own, whose peak resident size the kernel reports.
"""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_MB = 200
ROW = 64 << 10


def build(path: Path, megabytes: int) -> None:
    """Half of it compresses well, half does not at all."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
    rows = megabytes * (1 << 20) // ROW
    for start in range(0, rows, 256):
        connection.execute("BEGIN")
        for _ in range(start, min(start + 256, rows)):
            connection.execute("INSERT INTO t(v) VALUES(?)", (os.urandom(ROW // 2) + bytes(ROW // 2),))
        connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def step_replicate(path: str, url: str) -> None:
    """First upload, then a full image."""
    from replicator import Replicator

    with Replicator(path, url, history=None) as engine:
        engine.wait()
        connection = sqlite3.connect(path, isolation_level=None)
        for number in range(1, 40):
            connection.execute("UPDATE t SET v = randomblob(5000) WHERE id % 40 = ?", (number,))
            engine.wait()
        engine.snapshot()
        connection.close()


def step_compact(path: str, url: str) -> None:
    """Merge all raw files, the first of which is the whole database."""
    from replicator.chain import read_file
    from replicator.compactor import compact
    from replicator.outbox import Staging
    from replicator.storage import open_client

    client = open_client(url)
    files = list(client.list(0))
    done = compact(files, 1, lambda info: read_file(client, info), Staging(Path(path).parent / "scratch", limit_bytes=1 << 40))
    if done.taken != len(files):
        raise SystemExit(f"merged {done.taken} of {len(files)} files")


def step_restore(path: str, url: str) -> None:
    """Restore through the snapshot."""
    from replicator import restore

    restore(url, path + "-restored")


def main(megabytes: int, limit_mb: int) -> int:
    failed = False
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as name:
        path, url = Path(name) / "a.db", f"file://{name}/replica"
        build(path, megabytes)
        print(f"| step, {megabytes} MB | seconds | peak memory, MB |\n|---|---|---|")
        for step in ("replicate", "compact", "restore"):
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", "bench.memory", "--step", step, str(path), url], check=True)
            seconds = time.monotonic() - started
            peak = int((Path(name) / "peak").read_text())
            failed |= peak > limit_mb
            print(f"| {step} | {seconds:.1f} | {peak} |{' above the limit' if peak > limit_mb else ''}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        globals()[f"step_{sys.argv[2]}"](*sys.argv[3:5])
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        (Path(sys.argv[3]).parent / "peak").write_text(str(peak_mb))
    else:
        sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048, int(sys.argv[2]) if len(sys.argv) > 2 else LIMIT_MB))
