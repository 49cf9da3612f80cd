"""Every table and view of a run and of a folder's index opens in the `sqlite3` shell and in Datasette, with the rows that Python sees; the README's pictures are true.

Two shells: APSW's, which pip installs and which takes the commands of SQLite's own, always; and `sqlite3` itself, where the machine has it.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasette.app import Datasette

from tests import sampleflows as sample
from tests.e2e.test_workflow_docs import block
from workflow import Client, Engine, Retry, flow, receive, step
from workflow.errors import Refused
from workflow.testing import virtual_engine

APSW = [sys.executable, "-m", "apsw"]
SHELLS = [APSW, *([["sqlite3"]] if shutil.which("sqlite3") else [])]
README = (Path(__file__).parents[2] / "README.md").read_text()


@step(kind="llm", retry=Retry(attempts=2, first=0))
async def asks_a_model() -> str:
    step.usage(model="a-model", input_tokens=1, output_tokens=2)
    return "answer" if sample._fails_first(1) else ""


@flow
async def fills_all_tables() -> None:
    await asks_a_model()
    await sample.remember("a", 1)
    await sample.render(10)
    await sample.book("tea")
    await receive("approval", bool)
    await receive("never")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rows in every table and view, and an index with rows in all of its own."""
    folder = tmp_path_factory.mktemp("viewers") / "agents"

    async def run() -> None:
        async with virtual_engine(folder) as engine:
            run = await engine.start(fills_all_tables, id="full")
            await run.send("approval", True)
            for wanted in ("waiting", "paused"):
                async with asyncio.timeout(10):
                    while await run.status() != wanted:
                        await asyncio.sleep(0.002)
                if wanted == "waiting":
                    await run.pause()
            await run.send("never")  # it waits in the intake while the run is paused
            with pytest.raises(Refused):
                await engine.run("nobody").send("approval", True)

    asyncio.run(run())
    with sqlite3.connect(folder / ".host" / "intake.db") as intake:  # rows that only hosts have which others have followed
        for name in ("wf_inherited", "wf_shares"):
            columns = [name for _, name, *_ in intake.execute(f"PRAGMA table_info({name})")]
            intake.execute(f"INSERT INTO {name} VALUES({', '.join('?' * len(columns))})", [f"a-{column}" for column in columns])
    intake.close()
    return folder


def tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of all tables and views."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        return {name: [dict(row) for row in connection.execute(f"SELECT * FROM {name}")] for name in names}
    finally:
        connection.close()


def files(folder: Path) -> list[Path]:
    return [folder / "full.db", folder / ".host" / "intake.db"]


def without_bodies(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no bytes, and the time that a step takes until now is another one each time."""
    return [{name: value for name, value in row.items() if name not in ("body", "seconds")} for row in rows]


def test_the_run_and_the_index_have_rows_everywhere(folder: Path) -> None:
    found = {name: len(rows) for path in files(folder) for name, rows in tables(path).items()}
    assert {name for name, count in found.items() if not count} == set()
    assert set(found) == {
        "bookings", "wf_api_calls", "wf_attempts", "wf_control", "wf_decisions", "wf_inbox", "wf_index", "wf_inherited", "wf_instance",
        "wf_objects", "wf_refused", "wf_requests", "wf_runs", "wf_shares", "wf_state", "wf_state_now", "wf_step_objects", "wf_steps", "wf_timeline", "wf_waiting",
    }  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[-1])
def test_every_table_and_view_opens_in_the_shell(shell: list[str], folder: Path) -> None:
    for path in files(folder):
        wanted = tables(path)
        script = ".mode json\n"
        for name, rows in wanted.items():
            script += f"SELECT {', '.join(without_bodies(rows)[0])} FROM {name};\n"
        done = subprocess.run([*shell, str(path)], input=script, capture_output=True, text=True, timeout=60, check=True)
        decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
        while text:
            rows, end = decoder.raw_decode(text)
            found.append(rows)
            text = text[end:].strip()
        assert dict(zip(wanted, found, strict=True)) == {name: without_bodies(rows) for name, rows in wanted.items()}


def test_every_table_and_view_opens_in_datasette(folder: Path) -> None:
    async def look() -> None:
        site = Datasette([str(path) for path in files(folder)])
        for path in files(folder):
            page = (await site.client.get(f"/{path.stem}.json")).json()
            listed = {item["name"] for item in [*page["tables"], *page["views"]]}
            assert listed == set(tables(path))
            for name, rows in tables(path).items():
                answer = await site.client.get(f"/{path.stem}/{name}.json?_shape=array&_size=max")
                assert answer.status_code == 200, name
                assert _sorted(without_bodies(answer.json())) == _sorted(without_bodies(rows)), name
                assert (await site.client.get(f"/{path.stem}/{name}")).status_code == 200

    asyncio.run(look())


def _sorted(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps({name: value for name, value in row.items() if name != "rowid"}, sort_keys=True) for row in rows)


def test_what_the_readme_shows_is_what_a_user_sees(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "research"}
    exec(compile(block("async def make_plan"), "research.py", "exec", dont_inherit=True), scope)

    async def run() -> None:
        async with Engine(tmp_path / "agents", poll_s=0.01) as engine:
            handle = await engine.start(scope["research"], "otters", id="otters-1")
            await Client(tmp_path / "agents", sender="kim").run("otters-1").send("approval", {"approved": True, "by": "kim"})
            await handle.result()

    asyncio.run(run())
    section = README.partition("## Workflows in any SQLite viewer")[2].partition("## Replica URLs")[0]
    shown = re.findall(r"^    \$ (.*)\n((?:    [^$].*\n)+)", section, re.MULTILINE)
    assert [command.split()[0] for command, _ in shown] == ["sqlite3", "sqlite3", "datasette"]
    for command, output in shown:
        line = shlex.split(command)
        if line[0] == "sqlite3":
            with sqlite3.connect(tmp_path / line[2]) as connection:
                rows = [tuple(map(str, row)) for row in connection.execute(line[3])]
            connection.close()
            assert [tuple(cell.strip() for cell in text.split("│")[1:-1]) for text in output.splitlines() if "│" in text][1:] == rows
        else:
            done = subprocess.run([sys.executable, "-m", *line], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
            assert done.stdout.strip() == output.strip()
