"""The tutorial of docs/workflow.md, as it stands there."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "workflow.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def block(words: str) -> str:
    (found,) = [text for text in BLOCKS if words in text]
    return str(found)


def test_the_tutorial_survives_a_kill_and_ends_with_an_approval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "research.py").write_text(block("async def make_plan"))

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "research.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    def timeline() -> list[tuple[str, str]]:
        try:
            with sqlite3.connect(f"file:{tmp_path}/agents/otters-1.db?mode=ro", uri=True) as db:
                return db.execute("SELECT step, status FROM wf_timeline").fetchall()
        except sqlite3.OperationalError:
            return []

    first = begin()
    end = time.monotonic() + 30
    while ("receive#1", "waiting") not in timeline():
        assert time.monotonic() < end
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()  # type: ignore[union-attr]
    before = timeline()
    second = begin()
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile("async def send():\n" + _indented(block("from workflow import Client")), "docs", "exec"), scope)
    asyncio.run(scope["send"]())
    output, _ = second.communicate(timeout=30)
    assert output == "52 bytes, approved by kim\n"
    assert second.returncode == 0
    assert timeline()[:-1] == before[:-1]
    listed = re.findall(r"^    (\w+#\d)\|done\|", DOCS.read_text(), re.MULTILINE)
    assert listed == [step for step, _ in timeline()]
    command = [sys.executable, "-m", "replicator", "wf", "decisions", "agents", "otters-1"]
    shown = subprocess.run(
        command, cwd=tmp_path, text=True, capture_output=True, timeout=30, check=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert "approval" in shown.stdout


def test_the_tests_of_the_tutorial_pass(tmp_path: Path) -> None:
    (tmp_path / "research.py").write_text(block("async def make_plan"))
    (tmp_path / "test_research.py").write_text("from research import research\n" + block("crash_everywhere"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_research.py"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
