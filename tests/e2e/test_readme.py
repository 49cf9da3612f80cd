"""What the README shows works: its program, its configuration, its commands."""

from __future__ import annotations

import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from replicator import config
from replicator.cli import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text()
URL = "s3://bucket/app"


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


def test_the_program_runs_as_it_stands(tmp_path: Path, seaweed) -> None:
    program = block("python")
    assert program.count(URL) == 2
    subprocess.run([sys.executable, "-c", program.replace(URL, seaweed.url("readme-program"))], cwd=tmp_path, check=True, timeout=60)
    connection = sqlite3.connect(tmp_path / "copy.db")
    assert connection.execute("SELECT what FROM orders").fetchall() == [("tea",)]
    connection.close()


def test_the_shell_commands_run_as_they_stand(tmp_path: Path, seaweed) -> None:
    replicate, restore = re.findall(rf"^    pyrepl (.*{URL}.*)$", README, re.MULTILINE)
    connection = sqlite3.connect(tmp_path / "app.db")
    connection.execute("CREATE TABLE t(a)")
    connection.commit()
    connection.close()

    def command(line: str) -> list[str]:
        return [sys.executable, "-m", "replicator", *shlex.split(line.replace(URL, f"'{seaweed.url('readme-shell')}'"))]

    engine = subprocess.Popen(command(replicate), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    assert any("initialized db" in line for line in engine.stdout)  # the engine's own lines may come before it
    engine.send_signal(signal.SIGTERM)
    engine.stdout.read()
    assert engine.wait(60) == 0
    engine.stdout.close()
    subprocess.run(command(restore), cwd=tmp_path, check=True, timeout=60, stdout=subprocess.DEVNULL)
    connection = sqlite3.connect(tmp_path / "copy.db")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]
    connection.close()


def test_the_configuration_is_understood_without_a_warning() -> None:
    found = config.load(block("yaml"), environ={})
    [database] = found.databases
    assert found.warnings == ()
    assert database.verify_interval_s == 86400
    assert [replica.history.snapshot_retention_s for replica in database.replicas] == [72 * 3600, 24 * 3600]


def test_the_table_of_commands_has_all_of_them() -> None:
    listed = set(re.findall(r"^\| `pyrepl (\w+)", README, re.MULTILINE))
    assert listed == set(COMMANDS)
