"""`pyrepl demo workflow` comes to its good end."""

from __future__ import annotations

import subprocess
import sys


def test_the_recovery_story_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "replicator", "demo", "workflow"], text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as if nothing had happened" in done.stdout
    assert "error, error, done" in done.stdout
