"""A primary and its hot standby under load; the primary is killed again and again.

    python -m bench.takeover [--kills 100] [--ttl 1.0] [--store file|seaweedfs|moto] [--handovers 10] [--requests 10]

Each node is a process that waits for the lease as a standby, then replicates, and inserts one row after another, each acknowledged by `wait()` before the next.
After each take-over and at the end every acknowledged row must be there. Printed are the times from the last row that the killed owner has
acknowledged to the first of the other node, the same for orderly hand-overs (SIGTERM), and for those that the standby has asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

START_S = 60.0
ROWS_BETWEEN = 5
PAUSE_S = 0.02


# -- a node ----------------------------------------------------------------------------------------------------------------------


def node(url: str, path: Path, ttl_s: float) -> None:
    """Wait for the lease, then write and acknowledge, until SIGTERM."""
    from replicator import Replicator
    from replicator.lease import Lease
    from replicator.standby import wait_until_owner
    from replicator.storage import open_client

    stopping: list[object] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    ask = threading.Event()
    threading.Thread(target=_wait_for_line, args=(ask,), daemon=True).start()
    client = open_client(url)
    lease = Lease(client, ttl_s=ttl_s)
    folder = path.with_name(f".{path.name}-litestream") / "pyrepl"
    print("waiting", flush=True)
    if not wait_until_owner(client, path, folder, lease, stop=threading.Event(), poll_s=0.1, interval_s=0.5, ask=ask):
        return
    lease.on_request(stopping.append)
    with Replicator(path, url, lease=lease, takeover=True) as replicator:
        connection = sqlite3.connect(path, isolation_level=None, timeout=30)
        print("present", *[row[0] for row in connection.execute("SELECT name FROM acknowledged")], flush=True)
        while not stopping:
            name = secrets.token_hex(6)
            connection.execute("INSERT INTO acknowledged(name, pad) VALUES(?, randomblob(200))", (name,))
            replicator.wait(timeout_s=60)
            print("row", name, flush=True)
            time.sleep(PAUSE_S)
        connection.close()
    lease.close()


def _wait_for_line(ask: threading.Event) -> None:
    if sys.stdin.readline():
        ask.set()


class Node:
    """A running node, and what it says."""

    def __init__(self, url: str, path: Path, ttl_s: float) -> None:
        command = [sys.executable, "-m", "bench.takeover", "--node", url, str(path), "--ttl", str(ttl_s)]
        self.path = path
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.Queue[tuple[float, list[str]]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        with self.process.stdin, self.process.stdout as lines:
            for line in lines:
                self.lines.put((time.monotonic(), line.split()))
        self.lines.put((time.monotonic(), ["end"]))

    def next(self, timeout_s: float = START_S) -> tuple[float, list[str]]:
        try:
            return self.lines.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"the node with {self.path} says nothing") from None

    def end(self, number: int) -> tuple[float, list[str]]:
        """Send a signal and wait for the end; returns what `ended` returns."""
        self.process.send_signal(number)
        return self.ended()

    def ask(self) -> None:
        """Let it ask for a hand-over."""
        assert self.process.stdin is not None
        self.process.stdin.write("ask\n")
        self.process.stdin.flush()

    def ended(self) -> tuple[float, list[str]]:
        """Wait for the end; returns when the last row was acknowledged, and those since it was last listened to."""
        began = time.monotonic()
        self.process.wait(START_S)
        rows: list[str] = []
        while True:
            when, said = self.next()
            if said == ["end"]:
                return began, rows
            if said[0] == "row":
                began = when
                rows.append(said[1])


# -- the pair --------------------------------------------------------------------------------------------------------------------


KILLED, HANDED_OVER, REQUESTED = "killed", "handed over", "handed over on request"


def run(
    url: str, folder: Path, *, kills: int, handovers: int, requests: int = 0, ttl_s: float, tell: bool = True
) -> dict[str, list[float]]:
    """Kill, and hand over, so many times; returns the seconds that each took. Raises `AssertionError` when something acknowledged is lost."""
    paths = [folder / "a.db", folder / "b.db"]
    create(paths[0])
    acknowledged: set[str] = set()
    times: dict[str, list[float]] = {KILLED: [], HANDED_OVER: [], REQUESTED: []}
    owner, other = Node(url, paths[0], ttl_s), None
    try:
        _listen(owner, acknowledged, 1)
        other = Node(url, paths[1], ttl_s)
        assert other.next()[1] == ["waiting"]
        for how in [KILLED] * kills + [HANDED_OVER] * handovers + [REQUESTED] * requests:
            _listen(owner, acknowledged, ROWS_BETWEEN)
            time.sleep(0.5)  # the standby comes near
            if how == REQUESTED:
                other.ask()
                began, rows = owner.ended()
            else:
                began, rows = owner.end(signal.SIGKILL if how == KILLED else signal.SIGTERM)
            acknowledged.update(rows)
            times[how].append(_listen(other, acknowledged, 1) - began)
            owner, other = other, Node(url, owner.path, ttl_s)
            assert other.next()[1] == ["waiting"]
            done = sum(map(len, times.values()))
            if tell and done % 10 == 0:
                print(f"{done} done, {len(acknowledged)} rows acknowledged", flush=True)
        acknowledged.update(owner.end(signal.SIGTERM)[1])
    finally:
        for item in (owner, other):
            if item is not None and item.process.poll() is None:
                item.process.kill()
                item.process.wait()
    check(url, folder / "restored.db", acknowledged)
    return times


def create(path: Path) -> None:
    """Make the database that the first node begins with."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE acknowledged(id INTEGER PRIMARY KEY, name TEXT UNIQUE, pad BLOB)")
    connection.close()


def check(url: str, output: Path, acknowledged: set[str]) -> None:
    """Restore, and look for all that was acknowledged."""
    import replicator

    replicator.restore(url, output, integrity_check="full")
    connection = sqlite3.connect(output)
    present = {row[0] for row in connection.execute("SELECT name FROM acknowledged")}
    connection.close()
    assert acknowledged <= present, f"{len(acknowledged - present)} of {len(acknowledged)} rows are lost"


def _listen(node: Node, acknowledged: set[str], rows: int) -> float:
    """Listen until the node has acknowledged so many rows; returns when the first one was."""
    first = 0.0
    while rows:
        when, said = node.next()
        if said[0] == "present":
            lost = acknowledged - set(said[1:])
            assert not lost, f"{len(lost)} of {len(acknowledged)} rows are lost"
        elif said[0] == "row":
            first, rows = first or when, rows - 1
            acknowledged.add(said[1])
        elif said[0] == "end":
            raise AssertionError(f"the node with {node.path} has ended by itself")
    return first


@contextlib.contextmanager
def _store(kind: str, folder: Path) -> Iterator[str]:
    if kind == "file":
        yield f"file://{folder}/replica"
        return
    from tests.servers import ACCESS, SECRET, serve

    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    (folder / "server").mkdir()
    with serve(kind, folder / "server") as server:
        yield server.url("pair")


def _show(what: str, seconds: Sequence[float]) -> None:
    if seconds:
        ordered = sorted(seconds)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        print(f"{what}: {len(ordered)} times, p50 {ordered[len(ordered) // 2]:.2f} s, p99 {p99:.2f} s, max {ordered[-1]:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--handovers", type=int, default=10)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--ttl", type=float, default=1.0)
    parser.add_argument("--store", choices=("file", "seaweedfs", "moto"), default="file")
    parser.add_argument("--node", nargs=2, metavar=("URL", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        node(options.node[0], Path(options.node[1]), options.ttl)
        return
    with tempfile.TemporaryDirectory() as name, _store(options.store, Path(name)) as url:
        times = run(url, Path(name), kills=options.kills, handovers=options.handovers, requests=options.requests, ttl_s=options.ttl)
    print(f"store {options.store}, ttl {options.ttl:g} s; nothing that was acknowledged is lost")
    for how, seconds in times.items():
        _show(how, seconds)


if __name__ == "__main__":
    main()
