"""Runs on a replica: what is there when, and going on from it elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import pytest

from replicator import restore
from tests import sampleflows as sample
from workflow import Engine, barrier, flow, receive, step
from workflow import journal as jr
from workflow.errors import Refused


async def status_is(engine: Engine, id: str, wanted: str) -> None:
    async with asyncio.timeout(20):
        while await engine.run(id).status() != wanted:
            await asyncio.sleep(0.01)


def replicated_rows(root: Path, id: str, folder: Path) -> list[tuple[str, str]]:
    """Return (key, status) of the steps that the replica has."""
    target = folder / f"copy-{len(list(folder.glob('copy-*')))}.db"
    restore(f"file://{root}/{id}", target)
    return [(record.key, record.status) for record in jr.read(target).records]


_seen: list[list[tuple[str, str]]] = []
_places: list[Path] = []


@step(durability="replicated")
async def looks_at_the_replica() -> str:
    _seen.append(await asyncio.to_thread(replicated_rows, _places[0], "it", _places[1]))
    return "looked"


@step
async def local_step() -> int:
    return 1


@flow
async def careful() -> int:
    await local_step()
    await looks_at_the_replica()
    _seen.append(await asyncio.to_thread(replicated_rows, _places[0], "it", _places[1]))
    await local_step()
    await barrier()
    _seen.append(await asyncio.to_thread(replicated_rows, _places[0], "it", _places[1]))
    return 1


def test_intent_before_the_body_and_result_before_the_caller_are_on_the_replica(tmp_path: Path) -> None:
    _seen.clear()
    _places[:] = [tmp_path / "root", tmp_path]

    async def run() -> None:
        async with Engine(tmp_path / "a", replica=f"file://{tmp_path}/root", sync_interval_s=3600) as engine:
            assert await (await engine.start(careful, id="it")).result() == 1

    asyncio.run(run())
    assert _seen == [
        [("local_step#1", "done"), ("looks_at_the_replica#1", "started")],
        [("local_step#1", "done"), ("looks_at_the_replica#1", "done")],
        [("local_step#1", "done"), ("looks_at_the_replica#1", "done"), ("local_step#2", "done"), ("barrier#1", "done")],
    ]


@flow
async def with_report(text: str) -> list[object]:
    first = await sample.upper(text)
    report = await sample.render((1 << 20) + 7)
    verdict = await receive("approval", bool)
    return [first, verdict, await sample.measure(report)]


def test_another_machine_goes_on_from_the_replica_alone(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"

    async def on_a() -> None:
        async with Engine(tmp_path / "a", replica=url) as engine:
            await engine.start(with_report, "hello", id="it")
            await (await engine.start(sample.parent, id="family")).result()
            await status_is(engine, "it", "waiting")

    async def on_b() -> tuple[object, object]:
        async with Engine(tmp_path / "b", replica=url) as engine:
            assert await engine.run("it").status() == "waiting"
            await engine.run("it").send("approval", True)
            return await engine.run("it").result(), await engine.run("family").result()

    asyncio.run(on_a())
    shutil.rmtree(tmp_path / "a")
    sample.take_ran()
    assert asyncio.run(on_b()) == (["HELLO", True, (1 << 20) + 7], [101, 102, 103])
    assert [key.rpartition("/")[2] for key in sample.take_ran()] == ["measure#1"]


def test_a_start_that_was_lost_with_a_machine_finds_its_run_on_the_replica(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"

    async def on(folder: Path, *, approve: bool) -> object:
        async with Engine(folder, replica=url) as engine:
            run = await engine.start(with_report, "hello", id="it")
            if approve:
                await run.send("approval", True)
                return await run.result()
            return await status_is(engine, "it", "waiting")

    asyncio.run(on(tmp_path / "a", approve=False))
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "root" / "_hosts" / "main" / "ltx")  # what the intake had not stored yet
    sample.take_ran()
    assert asyncio.run(on(tmp_path / "b", approve=True)) == ["HELLO", True, (1 << 20) + 7]
    assert [key.rpartition("/")[2] for key in sample.take_ran()] == ["measure#1"]


def test_a_folder_that_was_overtaken_is_moved_aside_and_not_mixed_in(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"

    async def begin(folder: Path) -> None:
        async with Engine(folder, replica=url) as engine:
            await engine.start(with_report, "hello", id="it")
            await status_is(engine, "it", "waiting")

    async def finish(folder: Path) -> object:
        async with Engine(folder, replica=url) as engine:
            await engine.run("it").send("approval", True)
            return await engine.run("it").result()

    async def ask(folder: Path) -> tuple[str, object]:
        async with Engine(folder, replica=url) as engine:
            return await engine.run("it").status(), await engine.run("it").result()

    asyncio.run(begin(tmp_path / "a"))
    expected = asyncio.run(finish(tmp_path / "b"))
    assert asyncio.run(ask(tmp_path / "a")) == ("done", expected)
    (aside,) = (tmp_path / "a" / ".host").glob("overtaken-*")
    with sqlite3.connect(aside / "it.db") as db:
        assert db.execute("SELECT status FROM wf_instance").fetchone() == ("waiting",)
    db.close()


def test_a_killed_machine_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """SIGKILL in the middle of a body, the folder deleted: a replicated step that had ended is not run again, anywhere."""
    program = tmp_path / "machine.py"
    program.write_text(
        textwrap.dedent(
            """
            import asyncio, os, signal, sys
            from workflow import Engine, flow, step

            def note(text):
                with open(sys.argv[3], "a") as file:
                    file.write(text + "\\n")

            @step(durability="replicated")
            async def pay() -> str:
                note(f"pay {step.key()}")
                return "paid"

            @step
            async def then() -> str:
                note("then")
                if sys.argv[4] == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                return "then"

            @flow
            async def order() -> list[str]:
                return [await pay(), await then()]

            async def main():
                async with Engine(sys.argv[1], replica=sys.argv[2], lease_ttl_s=1.0) as engine:
                    print(await (await engine.start(order, id="it")).result())

            asyncio.run(main())
            """
        )
    )

    def machine(name: str, what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(program), str(tmp_path / name), f"file://{tmp_path}/root", str(tmp_path / "log"), what]
        return subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)

    assert machine("a", "die").returncode == -9
    shutil.rmtree(tmp_path / "a")
    second = machine("b", "live")
    assert second.stdout == "['paid', 'then']\n", second.stderr
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert [line.split()[0] for line in lines] == ["pay", "then", "then"]


@flow
async def books() -> list[int]:
    await sample.add(1, 1)
    first = await sample.book("tea")
    await sample.upper("between")
    second = await sample.book("cake")
    return [first, second, await sample.add(2, 2)]


def test_a_fork_before_changes_of_tables_comes_from_the_state_of_that_moment(tmp_path: Path) -> None:
    """Where each step is replicated there is a TXID for each; where all of it went up at once there is none but the first."""

    def lines(id: str) -> list[tuple[str]]:
        with sqlite3.connect(tmp_path / "a" / f"{id}.db") as db:
            return db.execute("SELECT what FROM bookings ORDER BY rowid").fetchall()

    async def run() -> None:
        async with Engine(tmp_path / "a", replica=f"file://{tmp_path}/root", sync_interval_s=3600) as engine:
            exact = await engine.start(books, id="exact", durability="replicated")
            assert await exact.result() == [1, 2, 4]
            sample.take_ran()
            middle = await exact.fork(step="upper", id="middle")
            assert await middle.result() == [1, 2, 4]
            assert [key.rpartition("/")[2] for key in sample.take_ran()] == ["upper#1", "book#2", "add#2"]
            assert lines("middle") == [("tea",), ("cake",)]
            first = await exact.fork(step="add#1", id="first")
            assert await first.result() == [1, 2, 4]
            assert lines("first") == [("tea",), ("cake",)]
            vague = await engine.start(books, id="vague")
            assert await vague.result() == [1, 2, 4]
            with pytest.raises(Refused, match="first step after the last of them is add#2"):
                await (await vague.fork(step="upper")).result()
            assert await (await vague.fork(step="add#1", id="whole")).result() == [1, 2, 4]

    asyncio.run(run())


def test_the_end_of_life_leaves_the_id_taken_on_all_hosts(tmp_path: Path) -> None:
    """Replica, file and objects go, in that order; after a failure between two of them all goes the next time."""
    root = tmp_path / "root"

    async def run() -> None:
        url = f"file://{root}"
        async with Engine(tmp_path / "a", replica=url, host="a", keep=None) as engine:
            it = await engine.start(with_report, "hello", id="it")
            await it.send("approval", True)
            await it.result()
            async with asyncio.timeout(20):
                while engine._active:
                    await asyncio.sleep(0.01)
            objects = list((root / "_objects" / "generations" / "it").iterdir())
            assert len(objects) == 1
            seen = []
            real = engine._objects.delete

            def fails(home: str) -> None:
                seen.append((list((root / home / "ltx").rglob("*.ltx")), (tmp_path / "a" / f"{home}.db").exists(), objects[0].exists()))
                raise OSError("the store is away")

            engine._objects.delete = fails  # type: ignore[method-assign]
            with pytest.raises(OSError, match="away"):
                await engine.sweep(timedelta(days=-1))
            assert seen == [([], False, True)]
            engine._objects.delete = real  # type: ignore[method-assign]
            assert await engine.sweep(timedelta(days=-1)) == ["it"]
            assert not objects[0].exists()
            assert await engine.sweep(timedelta(days=-1)) == []
        async with Engine(tmp_path / "b", replica=url, host="b", keep=None) as other:
            again = await other.start(with_report, "hello", id="it")
            with pytest.raises(Refused, match="its file was deleted"):
                await again.result()

    asyncio.run(run())


@pytest.mark.parametrize("url", ["seaweed"], indirect=True)
def test_the_same_in_an_s3_store(url: str, tmp_path: Path) -> None:
    async def on(folder: Path, *, begin: bool) -> object:
        async with Engine(folder, replica=url) as engine:
            if begin:
                await engine.start(with_report, "hello", id="it")
                return await status_is(engine, "it", "waiting")
            await engine.run("it").send("approval", False)
            return await engine.run("it").result()

    asyncio.run(on(tmp_path / "a", begin=True))
    assert asyncio.run(on(tmp_path / "b", begin=False)) == ["HELLO", False, (1 << 20) + 7]
