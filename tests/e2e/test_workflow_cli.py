"""`pyrepl wf` over a folder with an engine, and without one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from replicator.cli import main
from tests import sampleflows as sample
from workflow import Engine
from workflow.testing import virtual_engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs that ended, one that waits."""

    async def run() -> None:
        async with virtual_engine(tmp_path / "agents") as engine:
            await (await engine.start(sample.chain, 1, id="done-1")).result()
            await (await engine.start(sample.transacts, id="done-2")).result()
            waiting = await engine.start(sample.waits, id="waits-1")
            while await waiting.status() != "waiting":
                await asyncio.sleep(0.005)

    asyncio.run(run())
    return tmp_path / "agents"


def wf(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["wf", *arguments, "-json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_reading_needs_no_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["id"]: row["status"] for row in wf(capsys, "list", str(folder))} == {
        "done-1": "done",
        "done-2": "done",
        "waits-1": "waiting",
    }
    assert [row["id"] for row in wf(capsys, "list", str(folder), "-status", "waiting")] == ["waits-1"]
    shown = wf(capsys, "show", str(folder), "waits-1")
    assert (shown["status"], shown["waits_for"]) == ("waiting", ["receive#1 (receive)"])
    steps = wf(capsys, "timeline", str(folder), "done-1")
    assert [(row["step"], row["result"]) for row in steps] == [(f"add#{n}", str(1 + sum(range(n)))) for n in range(1, 6)]
    assert wf(capsys, "calls", str(folder), "done-1") == wf(capsys, "decisions", str(folder), "done-1") == []
    assert [row["verdict"] for row in wf(capsys, "verify", str(folder))] == ["ok"] * 3
    assert main(["wf", "timeline", str(folder), "done-2"]) == 0
    assert "book#1" in capsys.readouterr().out


def test_requests_wait_for_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wf(capsys, "send", str(folder), "waits-1", "approval", "true", "-sender", "kim")
    wf(capsys, "fork", str(folder), "done-1", "add#3", "again")
    asked = wf(capsys, "cancel", str(folder), "done-1")
    assert (asked[0]["run"], asked[0]["kind"]) == ("done-1", "cancel")

    async def go_on() -> tuple[Any, Any]:
        async with Engine(folder, synchronous="OFF") as engine:
            return await engine.run("waits-1").result(), await engine.run("again").result()

    assert asyncio.run(go_on()) == ("True DONE", 11)
    (decision,) = wf(capsys, "decisions", str(folder), "waits-1")
    assert (decision["question"], decision["answer"], decision["by"]) == ("approval", "true", "kim")


def test_gc_deletes_what_ended_and_keeps_the_id(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wf(capsys, "gc", str(folder)) == []  # they ended just now: in 2030, by the virtual clock
    assert wf(capsys, "gc", str(folder), "-keep-days", "-10000") == [{"deleted": "done-1"}, {"deleted": "done-2"}]
    assert not (folder / "done-1.db").exists()
    assert (folder / "waits-1.db").exists()
    assert wf(capsys, "gc", str(folder), "-keep-days", "-10000") == []

    async def ask() -> str:
        async with Engine(folder, synchronous="OFF") as engine:
            with pytest.raises(Exception, match="its file was deleted") as error:
                await (await engine.start(sample.chain, 1, id="done-1")).result()
            return str(error.value)

    assert "done-1" in asyncio.run(ask())


def test_damage_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "done-1.db"
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 3 + 64] = b"\xff" * 64
    path.write_bytes(data)
    assert main(["wf", "verify", str(folder), "done-1"]) == 1
    assert "ok" not in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["list", "/nowhere"], "no engine ever ran there", 1),
        (["show", "FOLDER", "nobody"], "no such run", 1),
        (["show", "FOLDER", "../x"], "not a usable id", 1),
        (["send", "FOLDER", "waits-1", "approval", "yes"], "texts want quotes", 2),
        (["show", "FOLDER"], "show takes a folder or URL ID", 2),
        (["dance", "FOLDER"], "say one of list, show", 2),
        (["run", "FOLDER", "waits-1"], "-flows MODULE", 2),
        (["run", "FOLDER", "waits-1", "-flows", "no_such_module"], "cannot import the flows", 1),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], words: str, code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wf", *(str(folder) if item == "FOLDER" else item for item in arguments)]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("url", ["file", "seaweed"], indirect=True)
def test_all_of_it_straight_on_a_bucket(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder anywhere: started through the inbox, run to its wait by a process that leaves nothing behind, asked, run to its end, forked, swept."""
    (tmp_path / "bucketflows.py").write_text(
        textwrap.dedent(
            """
            from workflow import flow, receive, step

            @step(kind="tool")
            def greet(name: str) -> str:
                return f"hello {name}"

            @flow
            async def greets(first: str) -> list[str]:
                return [await greet(first), await greet(await receive("name", str))]
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    from workflow import Client

    client = Client(url)
    asyncio.run(client.start("greets", first="lee", id="g"))
    assert wf(capsys, "run", url, "g", "-flows", "bucketflows") == [{"run": "g", "status": "waiting"}]
    assert [(row["id"], row["status"]) for row in wf(capsys, "list", url)] == [("g", "waiting")]
    shown = wf(capsys, "show", url, "g")
    assert (shown["status"], shown["owner"], shown["waits_for"]) == ("waiting", "main", ["receive#1 (receive)"])
    wf(capsys, "send", url, "g", "name", '"kim"', "-sender", "lee")
    assert wf(capsys, "run", url, "g", "-flows", "bucketflows") == [{"run": "g", "status": "done"}]
    assert [row["step"] for row in wf(capsys, "timeline", url, "g")] == ["greet#1", "receive#1", "greet#2"]
    assert [row["name"] for row in wf(capsys, "calls", url, "g")] == ["greet", "greet"]
    assert [(row["question"], row["by"]) for row in wf(capsys, "decisions", url, "g")] == [("name", "lee")]
    assert wf(capsys, "verify", url) == [{"id": "g", "verdict": "ok"}]
    assert asyncio.run(client.run("g").result()) == ["hello lee", "hello kim"]
    wf(capsys, "fork", url, "g", "receive", "h")
    assert wf(capsys, "run", url, "h", "-flows", "bucketflows") == [{"run": "h", "status": "done"}]
    for request in ("pause", "resume", "cancel"):
        assert wf(capsys, request, url, "h")[0]["kind"] == request
    assert wf(capsys, "gc", url, "-keep-days", "-1") == [{"deleted": "g"}, {"deleted": "h"}]
    assert main(["wf", "show", url, "g"]) == 1
    assert "no such run" in capsys.readouterr().err
    assert [row["status"] for row in wf(capsys, "list", url)] == ["done", "done"]  # the ids stay taken
    client.close()
    assert list(temporary.iterdir()) == []


def test_one_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Started by a client, run to its wait, sent an event, run to its end: each time by a process that exits."""
    (tmp_path / "myflows.py").write_text(
        textwrap.dedent(
            """
            from workflow import flow, receive, step

            @step
            def greet(name: str) -> str:
                return f"hello {name}"

            @flow
            async def greeting() -> str:
                return greet.function(await receive("name", str)) + "!"
            """
        )
    )
    folder = tmp_path / "agents"

    async def make() -> None:
        async with Engine(folder, concurrency=0):
            pass

    asyncio.run(make())

    def pyrepl(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "replicator", "wf", *arguments]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60, check=False)

    from workflow import Client

    asyncio.run(Client(folder).start("greeting", id="g"))
    first = pyrepl("run", str(folder), "g", "-flows", "myflows", "-json")
    assert (first.returncode, json.loads(first.stdout)) == (0, [{"run": "g", "status": "waiting"}]), first.stderr
    assert pyrepl("send", str(folder), "g", "name", '"kim"').returncode == 0
    second = pyrepl("run", str(folder), "g", "-flows", "myflows", "-json")
    assert json.loads(second.stdout) == [{"run": "g", "status": "done"}], second.stderr
    assert asyncio.run(Client(folder).run("g").result()) == "hello kim!"


def test_without_a_replica_nothing_of_replicas_is_imported() -> None:
    code = "import sys, workflow; print(sorted(name for name in sys.modules if name.startswith('replicator') or name in ('boto3', 'lz4', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=30, check=True)
    assert done.stdout == "['replicator', 'replicator.errors']\n"
