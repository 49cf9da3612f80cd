"""Ten thousand databases in one process: start-up, memory, open files, idle CPU, and the lag of a hundred of them that are written.

    python -m bench.fleet                                     # 10,000, and Litestream beside it with 1,000
    python -m bench.fleet --databases 1000 --written 1000     # as many for both

Each database has 100 KB and a folder of its own; replicas are directories. The first start uploads all of them and merges once, then it is stopped. The
second one is measured: until all databases are watched, at rest for a minute, and while some are written once a second. For Litestream, which keeps no
state of a database at rest, the first start is measured. CPU is that of the process, all its threads included, in per cent of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from replicator.inotify import Inotify

REST_S = 31
"""Once in so long what a request for all metrics has taken is given back."""
TICK = os.sysconf("SC_CLK_TCK")


class Process:
    """The daemon that is measured."""

    def __init__(self, command: Sequence[str], log: Path, environ: dict[str, str]) -> None:
        self.began = time.monotonic()
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environ)
        self._folder = Path(f"/proc/{self._process.pid}")

    def cpu_s(self) -> float:
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def facts(self) -> str:
        status = dict(line.split(":", 1) for line in (self._folder / "status").read_text().splitlines())
        files = len(os.listdir(self._folder / "fd"))
        return f"{int(status['VmRSS'].split()[0]) / 1000:.0f} MB (peak {int(status['VmHWM'].split()[0]) / 1000:.0f}), {files} files, {status['Threads'].strip()} threads"

    def until(self, holds: Callable[[], bool], timeout_s: float) -> float:
        """Wait for a condition; returns the seconds since the start."""
        while not holds():
            if self._process.poll() is not None:
                raise RuntimeError(f"it ended with {self._process.returncode}")
            if time.monotonic() > self.began + timeout_s:
                raise RuntimeError(f"not within {timeout_s} s")
            time.sleep(0.25)
        return time.monotonic() - self.began

    def stop(self) -> float:
        began = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--databases", type=int, default=10_000)
    parser.add_argument("--written", type=int, default=100, help="so many are written, once a second")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--peer", type=int, default=1000, help="databases for Litestream; 0 leaves it out")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pyrepl-fleet-"))
    try:
        measure("pyrepl", folder / "ours", given.databases, given.written, given.seconds)
        if given.peer:
            measure("litestream", folder / "theirs", given.peer, given.written, given.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(name: str, folder: Path, count: int, written: int, seconds: int) -> None:
    ours = name == "pyrepl"
    databases = [folder / "d" / f"{number:05}" / "a.db" for number in range(count)]
    for database in databases:
        create(database)
    print(f"\n{name}, {count} databases")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    config = folder / "litestream.yml"
    # What is measured at rest is a fleet at rest: nothing is due of its history for an hour.
    history = "levels: [{interval: 5s}]\nl0-retention: 5s\nl0-retention-check-interval: 5s\npyrepl: {park-after: 2s}\n" if ours else ""
    entry = f"dbs:\n - dir: {folder}/d\n   pattern: '*.db'\n   recursive: true\n   watch: true\n   replica: {{path: {folder}/r}}\n"
    config.write_text(f"addr: '{address}'\n{history}{entry}")
    command = [sys.executable, "-m", "replicator"] if ours else ["litestream"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "LITESTREAM_"))}
    process = Process([*command, "replicate", "-config", str(config)], folder / "log", environ)
    try:
        took = process.until(lambda: stored(folder / "r", count), 3600)
        print(f"  first start, all stored: {took:.1f} s, {process.cpu_s():.1f} s CPU, {process.facts()}", flush=True)
        if ours:
            process.until(lambda: parked(address) == count, 3600)
            print(
                f"  all parked after {time.monotonic() - process.began:.0f} s, {process.cpu_s():.1f} s CPU, {process.facts()}", flush=True
            )
            print(f"  stopped in {process.stop():.1f} s")
            config.write_text(config.read_text().replace(history, ""))
            process = Process([*command, "replicate", "-config", str(config)], folder / "log", environ)
            took = process.until(lambda: is_ready(address), 600)
            print(f"  start, all watched: {took:.1f} s, {process.cpu_s():.1f} s CPU, {process.facts()}", flush=True)
        settle(process.cpu_s)
        if ours:
            print(f"  {parked(address)} of them are parked after {time.monotonic() - process.began:.0f} s", flush=True)
        requests = operations(address)
        time.sleep(REST_S)
        before, began = process.cpu_s(), time.monotonic()
        time.sleep(seconds)
        used = (process.cpu_s() - before) / (time.monotonic() - began)
        print(f"  at rest for {seconds} s: {used:.2%} CPU, {operations(address) - requests} requests, {process.facts()}", flush=True)
        chosen = databases[:: max(1, count // written)][:written]
        for last in (False, True):  # the first round wakes them
            before, began = process.cpu_s(), time.monotonic()
            lags = write(chosen, folder, seconds if last else 5)
            used = (process.cpu_s() - before) / (time.monotonic() - began)
            if not lags:
                print("  nothing arrived")
                continue
            p50, p99 = lags[len(lags) // 2], lags[len(lags) * 99 // 100]
            label = f"{written} written once a second, {'then' if last else 'first 5 s'}"
            print(
                f"  {label}: lag p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, max {lags[-1] * 1000:.0f} ms, {used:.1%} CPU, {process.facts()}",
                flush=True,
            )
    finally:
        process.stop()


def create(database: Path) -> None:
    database.parent.mkdir(parents=True)
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
    connection.execute("INSERT INTO t(v) VALUES(randomblob(90000))")
    connection.close()


def stored(replica: Path, count: int) -> bool:
    """Whether each database has a raw file on its replica."""
    found = 0
    for folder in replica.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found += any(name.endswith(".ltx") for name in os.listdir(folder / "a.db" / "ltx" / "0"))
    return found >= count


def scrape(address: str) -> Iterator[str]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        yield from answer.read().decode().splitlines()


def parked(address: str) -> int:
    try:
        return sum(
            line.startswith("pyrepl_database_state{") and 'state="parked"' in line and line.endswith(" 1.0") for line in scrape(address)
        )
    except OSError:
        return -1


def is_ready(address: str) -> bool:
    """Whether each database is parked, or being replicated: one request that costs less than all metrics."""
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=60) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def operations(address: str) -> int:
    return int(sum(float(line.split()[-1]) for line in scrape(address) if line.startswith("litestream_replica_operation_total{")))


def settle(cpu_s: Callable[[], float]) -> None:
    """Wait until a process, of which this tells the CPU seconds, has nothing left to do: at most a minute."""
    for _ in range(12):
        before = cpu_s()
        time.sleep(5)
        if cpu_s() - before < 0.15:
            return


def write(databases: Sequence[Path], folder: Path, seconds: int) -> list[float]:
    """Commit to each once a second, spread over it; returns how long each took to arrive as a file on its replica, in order of length.

    A commit counts as arrived with the first file that appears for its database after it. Several commits may share one.
    """
    inotify, watches = Inotify(), {}
    for number, database in enumerate(databases):
        watches[inotify.add(os.fsencode(folder / "r" / database.parent.name / "a.db" / "ltx" / "0"))] = number
    waiting: list[list[float]] = [[] for _ in databases]
    lags: list[float] = []
    done = threading.Event()
    lock = threading.Lock()

    def listen() -> None:
        while not done.is_set():
            for event in inotify.read():
                if event.name.endswith(b".ltx") and event.mask & 0x180 and event.watch in watches:  # created, or moved to here
                    now = time.monotonic()
                    with lock:
                        lags.extend(now - made for made in waiting[watches[event.watch]])
                        waiting[watches[event.watch]].clear()
            time.sleep(0.002)

    listener = threading.Thread(target=listen)
    listener.start()
    connections = [sqlite3.connect(database, isolation_level=None, timeout=10) for database in databases]
    try:
        began = time.monotonic()
        for turn in range(seconds):
            for number, connection in enumerate(connections):
                due = began + turn + number / len(databases)
                time.sleep(max(0.0, due - time.monotonic()))
                with lock:  # before the commit: its file may be there before this thread goes on
                    waiting[number].append(time.monotonic())
                connection.execute("INSERT OR REPLACE INTO t VALUES(2, randomblob(100))")
        time.sleep(5)
    finally:
        done.set()
        listener.join()
        inotify.close()
        for connection in connections:
            connection.close()
    missing = sum(map(len, waiting))
    if missing:
        print(f"  {missing} commits had not arrived 5 s after the last one")
    return sorted(lags)


if __name__ == "__main__":
    main()
