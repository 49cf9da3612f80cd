"""Run the released Litestream, which judges what we write."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.servers import tool

VERSION = "0.5.17"


def litestream(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of this machine's settings; does not raise."""
    program = tool("litestream")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LITESTREAM_") and key != "AWS_CA_BUNDLE"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=timeout_s)


def restore(url: str, output: Path, *flags: str) -> None:
    """Restore with the released binary, integrity check included."""
    done = litestream("restore", "-o", str(output), "-integrity-check", "full", *flags, url)
    assert done.returncode == 0, done.stdout + done.stderr


def replicate_once(database: Path, url: str, folder: Path) -> None:
    """Let Litestream sync a database to a file replica, then stop."""
    config = folder / "litestream.yml"
    config.write_text(json.dumps({"dbs": [{"path": str(database), "replica": {"url": url}}]}))
    done = litestream("replicate", "-once", "-config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
