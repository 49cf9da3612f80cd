"""What `pyrepl` sets up for its own process stays there."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os
from replicator.process import environment_of_others, set_up
before = dict(os.environ)
set_up()
import numpy
print(len(os.listdir("/proc/self/task")), environment_of_others() == before)
"""


@pytest.mark.parametrize("own", ["", "2"])
def test_numpy_starts_no_threads_and_a_child_sees_nothing_of_that(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_DEFAULT_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OPENBLAS_DEFAULT_NUM_THREADS", own)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    threads, same = done.stdout.split()
    assert same == "True"
    assert own or threads == "1"
