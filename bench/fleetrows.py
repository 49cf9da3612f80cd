"""Rows about many databases in one process: what they cost at rest, and how late their commits arrive."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from bench.engines import OURS, PEER, Engine
from bench.fleet import create, is_ready, parked, settle, stored, write
from bench.processes import Meter, stop
from bench.row import Aim, Figures, Row

__all__ = ["FLEET_ROWS"]

LONGEST_S, REST_S = 900.0, 20.0


class Daemon:
    """A running engine over the databases below `folder/d`, with replicas below `folder/r`."""

    def __init__(self, engine: Engine, folder: Path, count: int) -> None:
        self.folder, self._count = folder, count
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
            self._address = f"127.0.0.1:{server.getsockname()[1]}"
        # At rest nothing is due of a fleet's history: files are merged once a day here. Ours parks what was quiet for two seconds, not thirty.
        own = "pyrepl: {park-after: 2s}\n" if engine is OURS else ""
        (folder / "c.yml").write_text(
            f"addr: '{self._address}'\n{own}levels: [{{interval: 24h}}]\n"
            f"dbs:\n - dir: {folder}/d\n   pattern: '*.db'\n   recursive: true\n   watch: true\n   replica: {{path: {folder}/r}}\n"
        )
        self._began = time.monotonic()
        self._process = engine.start(folder / "c.yml")
        self.meter = Meter(self._process.pid)

    def until_stored(self) -> float:
        """Wait until each database has a file on its replica; returns the seconds since the start of the process."""
        return self._until(lambda: stored(self.folder / "r", self._count))

    def until_parked(self) -> float:
        """Wait until each database is watched, and closed; returns the seconds since the start of the process."""
        return self._until(lambda: parked(self._address) == self._count)

    def until_ready(self) -> float:
        """Wait until each is parked, or being replicated. (A question for all metrics would cost what is measured here.)"""
        return self._until(lambda: is_ready(self._address))

    def settle(self) -> None:
        """Wait until nothing is left to do: at most a minute."""
        settle(lambda: self.meter.cpu_s)

    def at_rest(self) -> Figures:
        before, began = self.meter.cpu_s, time.monotonic()
        time.sleep(REST_S)
        used = (self.meter.cpu_s - before) / (time.monotonic() - began)
        at = Path(f"/proc/{self._process.pid}")
        resident = int((at / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {"CPU at rest %": used * 100, "MB at rest": resident / 1e6, "open files": len(os.listdir(at / "fd"))}

    def close(self) -> None:
        self.meter.close()
        stop(self._process, timeout_s=120)

    def _until(self, holds: Callable[[], bool]) -> float:
        while not holds():
            if self._process.poll() is not None or time.monotonic() > self._began + LONGEST_S:
                raise RuntimeError(f"ended with {self._process.returncode}, or not within {LONGEST_S} s")
            time.sleep(0.1)
        return time.monotonic() - self._began


class Fleet(Row):
    """Databases of 100 KB in folders of their own: from the start of the process until each has a file on its replica; then at rest for 20 s."""

    name = "fleet"
    title = "1,000 databases, at rest"
    engines = (OURS, PEER)
    aims = (Aim("start s", 3), Aim("CPU at rest %", 0.5), Aim("MB at rest", 100), Aim("open files", 200))
    count: ClassVar[int] = 1000

    def prepare(self) -> None:
        self._fill(self.folder / "master" / "d")

    def measure(self, engine: Engine) -> Figures:
        with self._copy() as folder, contextlib.closing(Daemon(engine, folder, self.count)) as daemon:
            start, cpu = daemon.until_stored(), daemon.meter.cpu_s
            daemon.settle()
            return {"start s": start, "CPU s of the start": cpu, **daemon.at_rest()}

    def _fill(self, folder: Path) -> None:
        for number in range(self.count):
            create(folder / f"{number:05}" / "a.db")

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        folder = self.folder / "run"
        shutil.copytree(self.folder / "master", folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class FleetWritten(Fleet):
    """For 20 s, spread over the second. Writers, engine and the watcher of its files share the cores."""

    name = "fleet-written"
    title = "1,000 databases with a write a second each"
    aims = (Aim("lag p50 s", 0.5), Aim("lag p99 s", 2), Aim("CPU %", 100))

    def measure(self, engine: Engine) -> Figures:
        with self._copy() as folder, contextlib.closing(Daemon(engine, folder, self.count)) as daemon:
            daemon.until_stored()
            daemon.settle()
            databases = sorted((folder / "d").glob("*/a.db"))
            write(databases, folder, 5)  # the first round wakes them
            before, began = daemon.meter.cpu_s, time.monotonic()
            lags = write(databases, folder, round(REST_S))
            used = (daemon.meter.cpu_s - before) / (time.monotonic() - began)
            return {
                "lag p50 s": statistics.median(lags),
                "lag p99 s": lags[len(lags) * 99 // 100],
                "lag max s": lags[-1],
                "CPU %": used * 100,
                "peak MB": daemon.meter.peak_mb,
            }


class TenThousand(Fleet):
    """A start when everything was stored before: until all are watched. 0.5.17 is measured with 1,000, above."""

    name = "fleet-10000"
    title = "10,000 databases, at rest"
    engines = (OURS,)
    aims = (Aim("start s", 20), Aim("CPU at rest %", 0.5), Aim("MB at rest", 150))
    count = 10_000

    def prepare(self) -> None:
        self._fill(self.folder / "d")
        with contextlib.closing(Daemon(OURS, self.folder, self.count)) as daemon:
            daemon.until_parked()

    def measure(self, engine: Engine) -> Figures:
        with contextlib.closing(Daemon(engine, self.folder, self.count)) as daemon:
            start = daemon.until_ready()
            daemon.settle()
            return {"start s": start, **daemon.at_rest()}


FLEET_ROWS: tuple[type[Row], ...] = (Fleet, FleetWritten, TenThousand)
