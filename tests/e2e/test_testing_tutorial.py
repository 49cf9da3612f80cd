"""The tutorial of docs/testing.md works as it stands there, and finds the mistakes that it speaks of."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from replicator import Replicator

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def run(folder: Path, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_shop.py").write_text(program)
    (folder / "conftest.py").write_text(blocks()[1])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def test_the_application_of_the_tutorial_passes_in_40_lines(tmp_path: Path) -> None:
    program = blocks()[0]
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    done = run(tmp_path, program, "--replicator-seed", "3", "--replicator-steps", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_transaction_cut_in_two_is_found(tmp_path: Path) -> None:
    program = blocks()[0]
    second = '            connection.execute("INSERT INTO orders(item, pieces) VALUES(?, -50)", (item,))\n'
    assert second in program
    quick = program.replace("import settings", "import Phase, settings").replace("deadline=None", "deadline=None, phases=[Phase.generate]")
    done = run(tmp_path, quick.replace(second, ""))
    assert done.returncode == 1
    assert "AssertionError" in done.stdout
    assert re.search(r"state\.deliver\(", done.stdout)


def test_the_examples_with_a_store_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    connection = sqlite3.connect("app.db")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(v)")
    exec(blocks()[2], {})
    connection.close()
    assert "lost reply" in capsys.readouterr().out


def test_the_example_in_which_every_step_fails_runs(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "app.db")
    connection.execute("CREATE TABLE t(v)")
    connection.close()
    replicate_once(tmp_path / "app.db", f"file://{tmp_path}/replica")
    [program] = [block for block in blocks() if "def test_every_step(" in block]
    names: dict[str, Any] = {}
    exec(program.replace("file:///srv/replica", f"file://{tmp_path}/replica"), names)
    (tmp_path / "out").mkdir()
    names["test_every_step"](tmp_path / "out")
    outputs = [path.name for path in (tmp_path / "out").iterdir()]
    assert len([name for name in outputs if name.endswith(".db")]) >= 2
    assert len([name for name in outputs if name.endswith(".restore")]) <= 1  # that which could not be deleted


def replicate_once(database: Path, url: str) -> None:
    with Replicator(database, url) as replicator:
        replicator.wait()
