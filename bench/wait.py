"""How long does it take until a commit is stored? `wait()` in process, our socket, and the released Litestream's `sync -wait`, side by side.

    python -m bench.wait [COMMITS]

One row of 200 bytes for each commit, 20 ms apart; what is measured is the time from the return of the commit to the return of the call. All ways
take turns, commit by commit, so that whatever else the machine does hits all of them alike. Once with replicas in directories of one disk, once in
one SeaweedFS on loopback (`weed mini`). The socket is asked over a connection of its own for each call, without starting a program; starting one
costs what `pyrepl sync` and `litestream sync` themselves need, which is not in these figures.

`commit` is no call: it is how long `sync="commit"` takes by itself, until the file is stored (by the loss window that it reports).
"""

from __future__ import annotations

import contextlib
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from replicator import Replicator
from replicator.cli.control import ask_daemon
from tests.servers import ACCESS, SECRET, serve, tool

GAP_S = 0.02
WARM_UP = 20


def database(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
    return connection


@contextlib.contextmanager
def daemon(command: list[str], folder: Path, path: Path, url: str, environment: dict[str, str]) -> Iterator[Path]:
    """A running daemon; yields its socket."""
    # Unix sockets have short names.
    where = Path(tempfile.mkdtemp(prefix="s-")) / "s"
    config = folder / f"{path.stem}.yml"
    config.write_text(f"socket: {{enabled: true, path: {where}}}\ndbs:\n  - path: {path}\n    replica: {{url: '{url}'}}\n")
    with (folder / f"{path.stem}.log").open("wb") as log:
        process = subprocess.Popen([*command, "replicate", "-config", str(config)], stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + 30
        while True:
            try:
                ask_daemon(where, "/sync", {"path": str(path), "wait": True, "timeout": 20}, timeout_s=25)
                break
            except Exception:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield where
    finally:
        process.terminate()
        process.wait(30)


def measure(folder: Path, url: Callable[[str], str], commits: int, environment: dict[str, str]) -> dict[str, list[float]]:
    names = ("wait() in process", "our socket, sync -wait", "Litestream's socket, sync -wait", 'sync="commit", no call')
    paths = [folder / f"{name}.db" for name in ("inside", "ours", "theirs", "commit")]
    connections = [database(path) for path in paths]
    times: dict[str, list[float]] = {name: [] for name in names}

    def ask(where: Path, path: Path) -> None:
        ask_daemon(where, "/sync", {"path": str(path), "wait": True, "timeout": 30}, timeout_s=60)

    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(Replicator(paths[0], url("inside")))
        at_once = stack.enter_context(Replicator(paths[3], url("commit"), sync="commit"))
        ours = stack.enter_context(daemon([sys.executable, "-m", "replicator"], folder, paths[1], url("ours"), environment))
        theirs = stack.enter_context(daemon([tool("litestream")], folder, paths[2], url("theirs"), environment))
        ways: list[Callable[[], object]] = [inside.wait, lambda: ask(ours, paths[1]), lambda: ask(theirs, paths[2])]
        before = 0
        for number in range(WARM_UP + commits):
            if number == WARM_UP:
                before = at_once.status().replicas[0].loss_window.total
            for name, connection, way in zip(names, connections, ways, strict=False):
                connection.execute("INSERT INTO t(v) VALUES(randomblob(200))")
                began = time.perf_counter()
                way()
                if number >= WARM_UP:
                    times[name].append(time.perf_counter() - began)
            connections[3].execute("INSERT INTO t(v) VALUES(randomblob(200))")
            time.sleep(GAP_S)
        at_once.wait()
        window = at_once.status().replicas[0].loss_window
        assert window.total > before
        times[names[3]] = [window.p50_s, window.p99_s, window.max_s]
    for connection in connections:
        connection.close()
    return times


def shown(times: dict[str, list[float]]) -> None:
    for name, values in times.items():
        ordered = sorted(values)
        if len(values) == 3:
            p50, p99, most = values
            p90 = float("nan")
        else:
            p50, p90, p99 = (ordered[int(len(ordered) * share)] for share in (0.5, 0.9, 0.99))
            most = ordered[-1]
        cells = ["-" if value != value else f"{value * 1000:.1f}" for value in (p50, p90, p99, most)]
        print(f"| {name} | {' | '.join(cells)} |")


def main(commits: int) -> int:
    # With AWS_CA_BUNDLE set the released Litestream cannot start.
    environment = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE" and not name.startswith("LITESTREAM_")}
    keys = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    environment.update(keys)
    os.environ.update(keys)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {commits} commits each, {os.cpu_count()} cores, Python {platform.python_version()}, ms\n")
    for title in ("directory", "SeaweedFS on loopback"):
        with tempfile.TemporaryDirectory(prefix="bench-wait-") as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            if title == "directory":
                found = measure(folder, lambda part, folder=folder: f"file://{folder}/r-{part}", commits, environment)  # type: ignore[misc]
            else:
                (folder / "weed").mkdir()
                server = stack.enter_context(serve("seaweed", folder / "weed"))
                found = measure(folder, server.url, commits, environment)
            print(f"{title}:\n\n| | p50 | p90 | p99 | max |\n|---|---|---|---|---|")
            shown(found)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300))
