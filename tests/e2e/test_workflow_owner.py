"""Who may run what: a host's lease, claims of runs, ids that two hosts start, engines that sleep and wake up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.errors import StorageUnavailable
from workflow import Engine, barrier, flow, receive, step
from workflow.errors import Conflict, FolderInUse, HostInUse

_ran: list[str] = []


@step
async def note(text: str) -> str:
    _ran.append(text)
    return text.upper()


@flow
async def noted(text: str) -> str:
    return await note(text)


@flow
async def asked(text: str) -> list[str]:
    first = await note(text)
    answer = await receive("answer", str)
    return [first, await note(answer or "")]


@flow
async def with_barrier(number: int) -> int:
    await barrier()
    return number


async def status_is(engine: Engine, id: str, wanted: str) -> None:
    async with asyncio.timeout(20):
        while await engine.run(id).status() != wanted:
            await asyncio.sleep(0.01)


def test_an_engine_of_the_same_host_is_refused_while_the_other_lives(tmp_path: Path) -> None:
    async def run() -> HostInUse:
        url = f"file://{tmp_path}/root"
        async with Engine(tmp_path / "a", replica=url, lease_ttl_s=1.0):
            with pytest.raises(HostInUse) as caught:
                async with Engine(tmp_path / "b", replica=url, lease_ttl_s=1.0):
                    pass
            with pytest.raises(FolderInUse):
                async with Engine(tmp_path / "a", replica=url, lease_ttl_s=1.0):
                    pass
        async with Engine(tmp_path / "b", replica=url, lease_ttl_s=1.0):  # after an orderly end, at once
            return caught.value

    error = asyncio.run(run())
    lock = json.loads((tmp_path / "root" / "_hosts" / "main" / "lock.json").read_bytes())
    assert (error.host, error.owner) == ("main", lock["owner"])
    assert error.until[:10] == lock["expires_at"][:10]
    assert str(os.getpid()) in str(error)


def test_after_its_death_another_engine_of_the_host_takes_over_within_the_leases_time(tmp_path: Path) -> None:
    async def run() -> tuple[object, float]:
        url = f"file://{tmp_path}/root"
        first = Engine(tmp_path / "a", replica=url, lease_ttl_s=1.0)
        await first.__aenter__()
        await first.start(asked, "one", id="it")
        await status_is(first, "it", "waiting")
        await first.crash()
        began = time.monotonic()
        async with Engine(tmp_path / "b", replica=url, lease_ttl_s=1.0) as second:
            waited = time.monotonic() - began
            await second.run("it").send("answer", "two")
            return await second.run("it").result(), waited

    _ran.clear()
    result, waited = asyncio.run(run())
    assert result == ["ONE", "TWO"]
    assert _ran == ["one", "two"]
    assert waited >= 0.9  # an object must be seen unchanged for its owner's whole time


def test_the_same_folder_comes_back_at_once_after_a_crash(tmp_path: Path) -> None:
    async def run() -> None:
        url = f"file://{tmp_path}/root"
        first = Engine(tmp_path / "a", replica=url, lease_ttl_s=600.0)
        await first.__aenter__()
        await first.crash()
        async with asyncio.timeout(30), Engine(tmp_path / "a", replica=url, lease_ttl_s=600.0) as second:
            assert await (await second.start(noted, "x")).result() == "X"

    asyncio.run(run())


def test_of_two_hosts_that_start_one_id_one_runs_it_and_both_have_its_result(tmp_path: Path) -> None:
    async def run() -> None:
        url = f"file://{tmp_path}/root"
        async with Engine(tmp_path / "a", replica=url, host="a") as a, Engine(tmp_path / "b", replica=url, host="b") as b:
            for round in range(3):
                _ran.clear()
                runs = await asyncio.gather(a.start(noted, "same", id=f"it{round}"), b.start(noted, "same", id=f"it{round}"))
                assert await asyncio.gather(*(run.result() for run in runs)) == ["SAME", "SAME"]
                assert _ran == ["same"]
            one, other = await a.start(noted, "mine", id="id"), await b.start(noted, "yours", id="id")
            results = await asyncio.gather(one.result(), other.result(), return_exceptions=True)
            assert {type(result) for result in results} == {str, Conflict}
            indexes = [{run.id for run in await engine.runs()} for engine in (a, b)]
            assert indexes[0].isdisjoint(indexes[1])
            assert indexes[0] | indexes[1] == {"it0", "it1", "it2", "id"}

    asyncio.run(run())


def test_a_run_that_another_host_has_claimed_is_refused_to_its_former_one(tmp_path: Path) -> None:
    async def run() -> object:
        url = f"file://{tmp_path}/root"
        async with Engine(tmp_path / "a", replica=url, host="a") as a, Engine(tmp_path / "b", replica=url, host="b") as b:
            await a.start(asked, "one", id="it")
            await status_is(a, "it", "waiting")
            async with asyncio.timeout(20):
                while not a.parked:
                    await asyncio.sleep(0.01)
            await b.take("it")
            await status_is(b, "it", "waiting")
            await a.run("it").send("answer", "two")  # to whoever has it: a finds out now that it is not a
            async with asyncio.timeout(20):
                while "it" in {run.id for run in await a.runs()}:
                    await asyncio.sleep(0.01)
            await b.run("it").send("answer", "three")
            assert (tmp_path / "a" / "it.db").exists() is False
            return await b.run("it").result(), await a.run("it").result()

    _ran.clear()
    mine, theirs = asyncio.run(run())  # type: ignore[misc]
    assert mine == theirs
    assert mine[0] == "ONE"
    assert mine[1] in ("TWO", "THREE")
    assert len(_ran) == 2


_claimed = asyncio.Event()


@step
async def until_claimed(number: int) -> int:
    if number >= 4:
        await _claimed.wait()
    return number


@flow
async def counts() -> list[int]:
    return [await until_claimed(number) for number in range(20)]


def test_a_run_that_is_claimed_while_it_runs_is_stopped_and_the_rest_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        _claimed.clear()
        url = f"file://{tmp_path}/root"
        async with Engine(tmp_path / "a", replica=url, host="a") as a, Engine(tmp_path / "b", replica=url, host="b") as b:
            mine, stays = await a.start(counts, id="it"), await a.start(counts, id="stays")
            async with asyncio.timeout(20):
                while len(await mine.steps()) < 4:
                    await asyncio.sleep(0.01)
            taken = await b.take("it")
            _claimed.set()
            assert await taken.result() == list(range(20))
            assert await mine.result() == list(range(20))  # a asks the replica
            assert await stays.result() == list(range(20))
            async with asyncio.timeout(20):
                while {run.id for run in await a.runs()} != {"stays"}:
                    await asyncio.sleep(0.01)
            assert a._lost is None

    asyncio.run(run())
    assert "run is another host's id=it owner=b" in caplog.text


@pytest.mark.parametrize("park_after_s", [3600.0, 0.0])
def test_no_body_begins_when_the_lease_is_over_and_all_go_on_when_it_is_renewed(tmp_path: Path, park_after_s: float) -> None:
    """The run waits in memory, or outside; the store that has the lease does not answer, the run's own does."""

    def is_away() -> None:
        raise StorageUnavailable("the store is away")

    async def run() -> None:
        async with Engine(tmp_path / "a", replica=f"file://{tmp_path}/root", lease_ttl_s=1.0, park_after_s=park_after_s) as engine:
            await engine.start(asked, "one", id="it")
            await status_is(engine, "it", "waiting" if not park_after_s else "running")
            async with asyncio.timeout(20):
                while _ran != ["one"] or (engine.parked == 0 and not park_after_s):
                    await asyncio.sleep(0.01)
            assert engine._replication is not None
            lease = engine._replication.ownership.lease
            lease.renew = is_away  # type: ignore[method-assign]
            async with asyncio.timeout(10):
                while lease.status().state == "held":
                    await asyncio.sleep(0.01)
            await engine.run("it").send("answer", "two")
            async with asyncio.timeout(10):
                while not engine._broken and not any(active.is_leaving for active in engine._active.values()):
                    assert _ran == ["one"]
                    await asyncio.sleep(0.01)
            assert _ran == ["one"]
            del lease.renew
            assert await engine.run("it").result() == ["ONE", "TWO"]
            assert _ran == ["one", "two"]

    _ran.clear()
    asyncio.run(run())


PROGRAM = textwrap.dedent(
    """
    import asyncio, logging, sys
    from workflow import Engine, flow, sleep, step

    logging.basicConfig(level="ERROR", stream=sys.stderr)

    def said(text):
        with open(sys.argv[3], "a") as file:
            file.write(sys.argv[4] + " " + text + "\\n")

    @step
    async def beat(number: int) -> int:
        said(f"beat {number}")
        if sys.argv[4] == "a" or number < 40:
            await asyncio.sleep(0.1)
        return number

    @flow
    async def beats() -> int:
        for number in range(60):
            await beat(number)
        return 60

    async def main():
        async with Engine(sys.argv[1], replica=sys.argv[2], lease_ttl_s=1.0) as engine:
            run = await engine.start(beats, id="it")
            print(await run.result())

    asyncio.run(main())
    """
)


def until(holds: Callable[[], bool], timeout_s: float = 40.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_engine_that_sleeps_past_its_lease_is_refused_and_says_so(tmp_path: Path) -> None:
    program, log = tmp_path / "machine.py", tmp_path / "log"
    program.write_text(PROGRAM)
    log.touch()

    def machine(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(program), str(tmp_path / name), f"file://{tmp_path}/root", str(log), name]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    a = machine("a")
    try:
        until(lambda: "a beat 4\n" in log.read_text())
        a.send_signal(signal.SIGSTOP)
        b = machine("b")
        out, err = b.communicate(timeout=60)
        assert out == "60\n", err
        before = log.read_text()
        a.send_signal(signal.SIGCONT)
        out, err = a.communicate(timeout=60)
    finally:
        a.kill()
        a.wait()
    assert out == ""
    assert a.returncode == 1
    assert "NotOwner" in err
    assert "this engine has stopped" in err
    assert f"lease is lost to {os.uname().nodename}:{b.pid}" in err
    assert log.read_text() == before  # not one body after it woke up
    assert [line for line in before.splitlines() if line == "b beat 1"] == []


def test_a_store_that_is_away_is_no_crash_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try ends in an error of the barrier; after many more than `max_crashes` the run goes on as if nothing had been."""
    from workflow import running as module
    from workflow.durability import Replication

    away, tries = [True], []
    real = Replication.barrier

    async def barrier(self: Replication, id: str) -> None:
        if away[0]:
            tries.append(id)
            raise OSError("the store is away")
        await real(self, id)

    async def run() -> object:
        async with Engine(tmp_path / "a", replica=f"file://{tmp_path}/root", max_crashes=3) as engine:
            it = await engine.start(with_barrier, 5, id="it")
            async with asyncio.timeout(30):
                while len(tries) < 8:
                    await asyncio.sleep(0.01)
            away[0] = False
            return await it.result()

    monkeypatch.setattr(module, "BROKEN_RETRY_S", (0.01, 0.01))
    monkeypatch.setattr(Replication, "barrier", barrier)
    assert asyncio.run(run()) == 5
