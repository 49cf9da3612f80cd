"""Run a process and tell what it cost: wall and CPU seconds of all its tree, peak memory, most open files. Linux."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.engines import ENVIRONMENT

__all__ = ["Cost", "Meter", "run", "stop"]

SAMPLE_S = 0.02
TICK = os.sysconf("SC_CLK_TCK")
HIGH_WATER = re.compile(r"VmHWM:\s+(\d+) kB")


@dataclass(frozen=True, slots=True)
class Cost:
    wall_s: float
    cpu_s: float
    peak_mb: float
    files: int


def run(command: Sequence[str], *, timeout_s: float = 900) -> Cost:
    """Run a command to its end. Raises `RuntimeError` with its output when it fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    output: list[bytes] = []
    reader = threading.Thread(target=lambda: output.append(process.stdout.read() if process.stdout else b""))
    reader.start()
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    meter = Meter(process.pid)
    # The kernel's own account is exact, and counts children that were waited for.
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    meter.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{b''.join(output).decode(errors='replace')[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, meter.peak_mb, meter.files)


class Meter:
    """Watches a running process and its children. `cpu_s` is what they have used until now."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self.peak_mb, self.files = 0.0, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def cpu_s(self) -> float:
        return sum(_cpu_s(pid) for pid in _tree(self._pid))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            pids = _tree(self._pid)
            self.peak_mb = max(self.peak_mb, sum(_peak_mb(pid) for pid in pids))
            self.files = max(self.files, sum(_open_files(pid) for pid in pids))
            self._stop.wait(SAMPLE_S)


def stop(process: subprocess.Popen[bytes], *, timeout_s: float = 30) -> None:
    """End a process that was started here."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / TICK
    return 0.0


def _peak_mb(pid: int) -> float:
    """The most that a process had resident. (`ru_maxrss` counts the memory of the process that started it, too.)"""
    with contextlib.suppress(OSError):
        found = HIGH_WATER.search(Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0  # a process that has ended has none
    return 0.0


def _open_files(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0
