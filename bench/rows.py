"""What is measured: one class for each row of the table. `prepare` runs once, `measure` once for each engine and round."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from bench.engines import BOTO3, ENVIRONMENT, OURS, PEER, PEER03, Engine
from bench.fleetrows import FLEET_ROWS
from bench.processes import Cost, Meter, run, stop
from bench.row import Aim, Figures, Options, Row
from bench.workload import change_rows, make_database, newest_marker, start_writer
from tests.servers import ACCESS, BUCKET, SECRET, Server, serve

__all__ = ["ROWS"]

BARE, COPY, LZ4 = Engine("no replication"), Engine("cp"), Engine("lz4 -1")


class FirstUpload(Row):
    """A database that no replica has: from the start of the process until all of it is stored durably, or the file's name is there."""

    name = "first-upload"
    title = "first upload, directory"
    engines = (OURS, PEER, PEER03, COPY, LZ4)
    aims = (
        Aim("wall s", 0.33, "0.5.17"),
        Aim("CPU s", 0.33, "0.5.17"),
        Aim("peak MB", 120),
        Aim("wall s", 0.6, "0.3.13"),
    )

    def prepare(self) -> None:
        self.master = self.folder / "master.db"
        make_database(self.master, self.options.megabytes)

    def measure(self, engine: Engine) -> Figures:
        with _fresh(self.folder / "run") as folder:
            if engine is COPY:
                return _figures(run(["cp", str(self.master), str(folder / "copy")]))
            if engine is LZ4:
                return _figures(run(["lz4", "-q", "-1", str(self.master), str(folder / "copy.lz4")]))
            shutil.copy(self.master, folder / "a.db")
            config = engine.configure(folder, folder / "a.db", self.replica(engine, folder))
            return _figures(_first_upload_v3(engine, config, folder) if engine.v3 else run(engine.once(config)))

    def replica(self, engine: Engine, folder: Path) -> dict[str, Any]:
        return _directory(folder)


class Restore(Row):
    """One full image and many small files behind it, written by 0.5.17 for both; 0.3.13 restores what it has written itself."""

    name = "restore"
    title = "restore, a full image and 200 files, directory"
    engines = (OURS, PEER, PEER03, COPY, LZ4)
    aims = (
        Aim("wall s", 0.2, "0.5.17"),
        Aim("CPU s", 0.2, "0.5.17"),
        Aim("wall s", 0.7, "0.3.13"),
    )

    def prepare(self) -> None:
        self.database = self.folder / "a.db"
        make_database(self.database, self.options.megabytes)
        config = PEER.configure(self.folder, self.database, self.replica(PEER, self.folder))
        _with_files(PEER, config, self.database, self.options.files)
        subprocess.run(["lz4", "-q", "-1", str(self.database), str(self.folder / "copy.lz4")], check=True)
        if PEER03 in self.engines:
            old = self.folder / "old"
            old.mkdir()
            shutil.copy(self.database, old / "a.db")
            _first_upload_v3(PEER03, PEER03.configure(old, old / "a.db", _directory(old)), old)

    def measure(self, engine: Engine) -> Figures:
        with _fresh(self.folder / "run") as folder:
            output = folder / "restored.db"
            if engine is COPY:
                return _figures(run(["cp", str(self.database), str(output)]))
            if engine is LZ4:
                return _figures(run(["lz4", "-q", "-d", str(self.folder / "copy.lz4"), str(output)]))
            if engine.v3:
                old = self.folder / "old"
                config = engine.configure(folder, old / "a.db", _directory(old))
                return _figures(run(engine.restore(config, old / "a.db", output)))
            config = engine.configure(folder, self.database, self.replica(PEER, self.folder))
            cost = run(engine.restore(config, self.database, output))
            if output.stat().st_size != self.database.stat().st_size:
                raise RuntimeError(f"{engine.name} restored a file of another size")
            return _figures(cost)

    def replica(self, engine: Engine, folder: Path) -> dict[str, Any]:
        return _directory(folder)


class _InStore(Row):
    """A row whose replica lies in SeaweedFS on loopback; the server's own CPU is not counted."""

    def __init__(self, folder: Path, options: Options) -> None:
        super().__init__(folder, options)
        self._stack = contextlib.ExitStack()
        data = folder / "weed"
        data.mkdir()
        self.server: Server = self._stack.enter_context(serve("seaweed", data))
        self._uploads = 0

    def close(self) -> None:
        self._stack.close()
        super().close()

    def object_store(self, path: str) -> dict[str, Any]:
        return {
            "type": "s3", "bucket": BUCKET, "path": path, "endpoint": self.server.endpoint, "region": "us-east-1",
            "access-key-id": ACCESS, "secret-access-key": SECRET, "force-path-style": True,
        }  # fmt: skip


class FirstUploadS3(_InStore, FirstUpload):
    name = "first-upload-s3"
    title = "first upload, SeaweedFS on loopback"
    engines = (OURS, BOTO3, PEER)
    aims = (Aim("wall s", 0.5, "0.5.17"), Aim("CPU s", 0.5, "0.5.17"))

    def replica(self, engine: Engine, folder: Path) -> dict[str, Any]:
        self._uploads += 1
        return self.object_store(f"{engine.name}-{self._uploads}")


class RestoreS3(_InStore, Restore):
    name = "restore-s3"
    title = "restore, a full image and 200 files, SeaweedFS on loopback"
    engines = (OURS, BOTO3, PEER)
    aims = (Aim("wall s", 0.3, "0.5.17"), Aim("CPU s", 0.3, "0.5.17"))

    def replica(self, engine: Engine, folder: Path) -> dict[str, Any]:
        return self.object_store("chain")


class RestoreSmall(Restore):
    """The whole process, so that imports count."""

    name = "restore-small"
    title = "restore of a 1 MB database, whole process"
    engines = (OURS, PEER)
    aims = (Aim("wall s", 0.25),)

    def __init__(self, folder: Path, options: Options) -> None:
        super().__init__(folder, Options(megabytes=1, files=1))


class Compaction(Row):
    """A start with a backlog of raw files to merge: CPU until the merged file is there, less that of a start with nothing to merge."""

    name = "compaction"
    title = "compaction of 1,000 raw files to level 1"
    aims = (Aim("CPU s", 0.5, "0.5.17"),)

    def prepare(self) -> None:
        for engine in self.engines:
            folder = self.folder / engine.name
            folder.mkdir()
            make_database(folder / "a.db", 50)
            config = engine.configure(folder, folder / "a.db", _directory(folder))
            _with_files(engine, config, folder / "a.db", self.options.compact_files)

    def measure(self, engine: Engine) -> Figures:
        busy = self._start(engine, "10s", lambda folder: any((folder / "replica" / "ltx" / "1").glob("*.ltx")), at_least_s=5)
        idle = self._start(engine, "24h", lambda folder: True, at_least_s=busy.wall_s)
        return {"CPU s": busy.cpu_s - idle.cpu_s, "peak MB": busy.peak_mb, "open files": busy.files}

    def _start(self, engine: Engine, merge_every: str, done: Callable[[Path], bool], *, at_least_s: float) -> Cost:
        kept = self.folder / engine.name
        moved = self.folder / "kept"
        shutil.copytree(kept, moved)
        try:
            config = engine.configure(kept, kept / "a.db", _directory(kept), merge_every=merge_every)
            began = time.monotonic()
            process = engine.start(config)
            meter = Meter(process.pid)
            try:
                _until(lambda: time.monotonic() > began + at_least_s and done(kept), 60, f"{engine.name} did not merge")
                return Cost(time.monotonic() - began, meter.cpu_s, meter.peak_mb, meter.files)
            finally:
                meter.close()
                stop(process)
        finally:
            shutil.rmtree(kept)
            moved.rename(kept)


class Resync(Row):
    """While nobody replicated, 1 % of the rows changed and the WAL was checkpointed away."""

    name = "resync"
    title = "resync after downtime, 1 % changed"
    aims = (Aim("wall s", 0.3, "0.5.17"), Aim("MB sent", 0.015, "0.5.17"))

    def prepare(self) -> None:
        self.master = self.folder / "master.db"
        make_database(self.master, self.options.resync_megabytes)

    def measure(self, engine: Engine) -> Figures:
        with _fresh(self.folder / "run") as folder:
            database, replica = folder / "a.db", folder / "replica"
            shutil.copy(self.master, database)
            config = engine.configure(folder, database, _directory(folder))
            run(engine.once(config))
            connection = sqlite3.connect(database, isolation_level=None)
            rows = connection.execute("SELECT max(id) FROM t").fetchone()[0]
            # Neighbours, as far as pages go: 1 % of the rows are 1 % of the pages.
            connection.execute("UPDATE t SET at = at + 1 WHERE id BETWEEN ? AND ?", (rows // 2, rows // 2 + rows // 100))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            connection.close()
            before = _stored_bytes(replica)
            cost = run(engine.once(config))
            return {**_figures(cost), "MB sent": (_stored_bytes(replica) - before) / 1e6}


class Lag(Row):
    """From commit to the file's name on the replica, at 200 transactions a second; the engines' defaults."""

    name = "lag"
    title = "lag at 200 transactions/s, directory"
    engines = (OURS, PEER)
    aims = (Aim("p50 ms", 60), Aim("p99 ms", 200), Aim("CPU %", 3))
    pace: ClassVar[Mapping[str, Any]] = {}

    def measure(self, engine: Engine) -> Figures:
        with _fresh(self.folder / "run") as folder:
            database = folder / "a.db"
            make_database(database, 2)
            config = engine.configure(folder, database, {**_directory(folder), **self.pace})
            process = engine.start(config)
            meter = Meter(process.pid)
            try:
                raw = folder / "replica" / "ltx" / "0"
                _until(lambda: any(raw.glob("*.ltx")), 30, f"{engine.name} did not start")
                time.sleep(1)
                before = meter.cpu_s
                seconds = self.options.lag_s
                written = start_writer(database, rate=200, seconds=seconds).result()
                time.sleep(2)
                cpu = meter.cpu_s - before
            finally:
                meter.close()
                stop(process)
            lags = sorted(_lags(raw, written.commits))
            return {
                "p50 ms": statistics.median(lags) * 1000,
                "p99 ms": lags[int(len(lags) * 0.99)] * 1000,
                "CPU %": cpu / (seconds + 2) * 100,
                "peak MB": meter.peak_mb,
                "open files": meter.files,
            }


class LagAtOneSecond(Lag):
    name = "lag-1s"
    title = "the same, both at a pace of one second"
    aims = (Aim("CPU %", 1.5, "0.5.17"),)
    pace: ClassVar[Mapping[str, Any]] = {"sync-interval": "1s"}


class FlatOut(Row):
    """A writer that commits as fast as it can, with SQLite's own automatic checkpoints."""

    name = "flat-out"
    title = "writer flat out, SQLite's defaults"
    engines = (OURS, PEER, PEER03, BARE)
    aims = (Aim("commits/s", 0.9, BARE.name, at_least=True), Aim("longest stall ms", 50))
    autocheckpoint: ClassVar[int] = 1000

    def measure(self, engine: Engine) -> Figures:
        with _fresh(self.folder / "run") as folder:
            database = folder / "a.db"
            make_database(database, 2)
            process = None
            if engine is not BARE:
                config = engine.configure(folder, database, _directory(folder))
                process = engine.start(config)
                _until(lambda: any((folder / "replica").rglob("*.l*")), 30, f"{engine.name} did not start")
                time.sleep(1)
            try:
                meter = Meter(process.pid) if process is not None else None
                before = meter.cpu_s if meter is not None else 0.0
                written = start_writer(database, rate=0, seconds=self.options.write_s, autocheckpoint=self.autocheckpoint).result()
                figures = {"commits/s": written.count / written.seconds, "longest stall ms": written.longest_ms}
                if meter is not None:
                    figures["CPU %"] = (meter.cpu_s - before) / self.options.write_s * 100
                    meter.close()
                    figures["peak MB"] = meter.peak_mb
                return figures
            finally:
                if process is not None:
                    stop(process)


class FlatOutNoCheckpoints(FlatOut):
    name = "flat-out-no-autocheckpoint"
    title = "writer flat out, its automatic checkpoints off"
    aims = (Aim("commits/s", 0.95, BARE.name, at_least=True), Aim("longest stall ms", 30))
    autocheckpoint: ClassVar[int] = 0


ROWS: Mapping[str, type[Row]] = {
    row.name: row
    for row in (
        FirstUpload, Restore, FirstUploadS3, RestoreS3, RestoreSmall, Compaction, Resync, Lag, LagAtOneSecond, FlatOut, FlatOutNoCheckpoints,
        *FLEET_ROWS,
    )
}  # fmt: skip


def _figures(cost: Cost) -> Figures:
    return {"wall s": cost.wall_s, "CPU s": cost.cpu_s, "peak MB": cost.peak_mb, "open files": cost.files}


def _directory(folder: Path) -> dict[str, Any]:
    return {"type": "file", "path": str(folder / "replica")}


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _until(done: Callable[[], bool], seconds: float, message: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(message)
        time.sleep(0.02)


def _first_upload_v3(engine: Engine, config: Path, folder: Path) -> Cost:
    """0.3.13 has no `-once`: until the snapshot's name is there."""
    began = time.monotonic()
    process = engine.start(config)
    meter = Meter(process.pid)
    try:
        _until(lambda: any((folder / "replica").rglob("*.snapshot.lz4")), 300, "0.3.13 took no snapshot")
        return Cost(time.monotonic() - began, meter.cpu_s, meter.peak_mb, meter.files)
    finally:
        meter.close()
        stop(process)


def _with_files(engine: Engine, config: Path, database: Path, count: int) -> None:
    """Store a full image, then `count` small raw files."""
    run(engine.once(config))
    process = engine.start(config)
    try:
        sync = [*engine.command, "sync", "-wait", "-socket", str(config.with_name("s.sock")), str(database)]
        _until(lambda: subprocess.run(sync, capture_output=True, env=ENVIRONMENT).returncode == 0, 60, f"{engine.name} did not start")
        connection = sqlite3.connect(database, isolation_level=None, timeout=30)
        connection.execute("PRAGMA synchronous=OFF")
        rows = connection.execute("SELECT max(id) FROM t").fetchone()[0]
        for number in range(count):
            change_rows(connection, number, 20, rows)
            _sync(config.with_name("s.sock"), database)
        connection.close()
    finally:
        stop(process)


def _sync(socket_path: Path, database: Path) -> None:
    """`sync -wait` without the price of a process."""
    import http.client
    import json
    import socket

    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    connection.sock.connect(os.fspath(socket_path))
    body = json.dumps({"path": str(database), "wait": True, "timeout": 60})
    connection.request("POST", "/sync", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    if reply.status != 200:
        raise RuntimeError(f"sync failed: {text.decode(errors='replace')[:300]}")


def _stored_bytes(replica: Path) -> int:
    return sum(path.stat().st_size for path in replica.rglob("*.ltx"))


def _lags(raw: Path, commits: Sequence[tuple[int, float]]) -> Iterator[float]:
    """Yield the seconds from each commit to the first file that has it. A file's name is the last that happens to it, which its ctime says."""
    seen = sorted((path.stat().st_ctime, newest_marker(path.read_bytes())) for path in raw.glob("*.ltx"))
    at = 0
    for marker, committed in commits:
        while at < len(seen) and seen[at][1] < marker:
            at += 1
        if at == len(seen):
            raise RuntimeError(f"row {marker} was not replicated")
        yield seen[at][0] - committed
