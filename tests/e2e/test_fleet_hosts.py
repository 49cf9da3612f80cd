"""Several hosts on one root: a host that is gone is followed by the others, and one that comes back learns it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from replicator.errors import StorageUnavailable
from workflow import Client, Engine, flow, receive, sleep, step
from workflow.handing import Handed, HostRecords
from workflow.intake import indexed, sql_read
from workflow.membership import Part
from workflow.placement import shard_of
from workflow.report import HostLook, look

TTL_S = 1.0
POLL_S = 0.1

_ran: list[tuple[str, int]] = []


@step(durability="replicated")
async def kept(id: str, number: int) -> int:
    _ran.append((id, number))
    return number


@flow
async def asks(id: str) -> list[Any]:
    before = await kept(id, 1)
    answer = await receive("answer", str)
    return [before, answer, await kept(id, 2)]


def host(tmp_path: Path, name: str, **settings: Any) -> Engine:
    given = {"inbox_poll_s": 0.05, "sync_interval_s": 0.05, "lease_ttl_s": TTL_S, "fleet_poll_s": POLL_S, "park_after_s": 0.05} | settings
    return Engine(tmp_path / name, replica=f"file://{tmp_path}/root", host=name, fleet=True, **given)


async def until(holds: Any, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.02)


async def start_and_park(engine: Engine, ids: list[str]) -> None:
    """Start runs, and let them wait for their answers."""
    for id in ids:
        await engine.start(asks, id, id=id)

    async def are_parked() -> bool:
        return engine.parked == len(ids)

    await until(are_parked)


def test_the_runs_of_a_host_that_died_are_divided_among_the_others_and_end_once(tmp_path: Path) -> None:
    ids = [f"it-{number}" for number in range(12)]

    async def run() -> None:
        a = await host(tmp_path, "a").__aenter__()
        async with host(tmp_path, "b") as b, host(tmp_path, "c") as c:
            await start_and_park(a, ids)
            await a.start(asks, "queued", id="queued", durability="replicated")
            await a.crash()

            async def all_moved() -> bool:
                return len(await b.runs()) + len(await c.runs()) == len(ids) + 1

            await until(all_moved)
            mine, theirs = {run.id for run in await b.runs()}, {run.id for run in await c.runs()}
            assert mine.isdisjoint(theirs)
            assert abs(len(mine) - len(theirs)) <= 1
            for id in [*ids, "queued"]:
                await c.run(id).send("answer", "yes")
            results = await asyncio.gather(*((b if id in mine else c).run(id).result() for id in ids))
            assert results == [[1, "yes", 2]] * len(ids)
            seen = {found.record.host: found for found in await asyncio.to_thread(lambda: look(f"file://{tmp_path}/root").hosts)}
            assert (seen["a"].record.state, seen["a"].record.by in "bc", seen["a"].record.left) == ("gone", True, 0)
            assert sum(found.record.taken_over for found in seen.values()) == 1
            async with host(tmp_path, "a") as again:  # what it had is not its any more
                assert await again.runs() == []
                assert await again.run("it-0").result() == [1, "yes", 2]

    _ran.clear()
    asyncio.run(run())
    assert sorted(call for call in _ran if call[0] != "queued") == sorted((id, number) for id in ids for number in (1, 2))


FLOWS = textwrap.dedent(
    """
    import asyncio, os
    from workflow import flow, step

    @step(durability="replicated")
    async def beat(id: str, number: int) -> int:
        with open(os.environ["BEATS"], "a") as file:
            file.write(f"{os.environ['NAME']} {id} {number}\\n")
        await asyncio.sleep(0.1)
        return number

    @flow
    async def beats(name: str, count: int) -> int:
        return sum([await beat(name, number) for number in range(count)])
    """
)


class Process:
    """A host with a folder of its own, as a container would be."""

    def __init__(self, tmp_path: Path, name: str) -> None:
        self.name, self._err = name, tmp_path / f"{name}.err"
        line = f"wf host file://{tmp_path}/root -flows beating -host {name} -folder {tmp_path}/{name}"
        line += " -lease-ttl 3s -poll 200ms -inbox-poll 100ms"
        with self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "replicator", *line.split()], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err,
                env=os.environ | {"NAME": name, "BEATS": f"{tmp_path}/beats"},
            )  # fmt: skip

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def err(self) -> str:
        return self._err.read_text()


@pytest.mark.slow
def test_of_three_processes_one_is_killed_and_one_sleeps_and_every_run_ends_once(tmp_path: Path) -> None:
    """Steps are `replicated`: one that the flow has gone on from is never run again, and one that sleeps past its lease begins no body."""
    (tmp_path / "beating.py").write_text(FLOWS)
    log, url = tmp_path / "beats", f"file://{tmp_path}/root"
    log.touch()
    ids = [f"it-{number}" for number in range(9)]
    hosts = {name: Process(tmp_path, name) for name in "abc"}

    def lines() -> list[list[str]]:
        return [line.split() for line in log.read_text().splitlines()]

    async def run() -> tuple[list[int], list[list[str]]]:
        client = Client(url)

        async def all_are_up() -> bool:
            return {host.record.host for host in await asyncio.to_thread(lambda: look(url).hosts)} == set("abc")

        await until(all_are_up, 40)
        runs = [await client.start("beats", id=id, name=id, count=12) for id in ids]

        async def all_are_at_work() -> bool:
            at_work, count = {line[0] for line in lines()}, len(lines())
            if at_work != set("abc") and count > 6 * len(ids) and len(ids) < 40:
                ids.append(f"it-{len(ids)}")  # a host that is slow to look leaves what would be its to the others
                runs.append(await client.start("beats", id=ids[-1], name=ids[-1], count=12))
            return at_work == set("abc") and count > 20

        await until(all_are_at_work, 40)
        hosts["a"].send(signal.SIGKILL)
        hosts["b"].send(signal.SIGSTOP)
        results = list(await asyncio.wait_for(asyncio.gather(*(run.result() for run in runs)), 60))
        before = lines()
        hosts["b"].send(signal.SIGCONT)
        await asyncio.to_thread(hosts["b"].process.wait, 20)
        found = await asyncio.to_thread(look, url)
        hosts["c"].send(signal.SIGTERM)
        await asyncio.to_thread(hosts["c"].process.wait, 20)
        client.close()
        assert {host.record.host: (host.record.state, host.record.by) for host in found.hosts} == {
            "a": ("gone", "c"), "b": ("gone", "c"), "c": ("up", ""),
        }  # fmt: skip
        return results, before

    try:
        results, before = asyncio.run(run())
    finally:
        for host in hosts.values():
            host.process.kill()
            host.process.wait()
    assert results == [sum(range(12))] * len(ids), hosts["c"].err
    assert lines() == before  # not one body on the host that woke up
    for id in ids:
        numbers = [int(line[2]) for line in before if line[1] == id]
        assert sorted(set(numbers)) == list(range(12))
        assert numbers == sorted(numbers)  # repeated at most what was cut short
        assert len(numbers) <= 12 + 2
    assert hosts["b"].process.returncode == 1
    assert "this engine has stopped" in hosts["b"].err
    assert f"lease is lost to {os.uname().nodename}:{hosts['c'].process.pid}" in hosts["b"].err
    assert hosts["c"].process.returncode == 0


def test_a_host_that_ends_in_order_is_followed_at_once_and_runs_wait_for_a_host_that_has_what_they_need(tmp_path: Path) -> None:
    async def run() -> None:
        url = f"file://{tmp_path}/root"

        def seen() -> dict[str, HostLook]:
            return {found.record.host: found for found in look(url).hosts}

        async def left() -> bool:
            found = (await asyncio.to_thread(seen)).get("a")
            return found is not None and (found.record.state, found.record.left) == ("gone", 1)

        async with host(tmp_path, "b", lease_ttl_s=60.0) as b:
            async with host(tmp_path, "a", lease_ttl_s=60.0, resources={"gpu": 1}) as a:
                await a.start(needs_gpu, id="heavy")
                await a.start(asks, "light", id="light")

                async def both_wait() -> bool:
                    return a.parked == 2

                await until(both_wait)
            await until(left)  # long before its lease would have been over

            async def has_the_other() -> bool:
                return [run.id for run in await b.runs()] == ["light"]

            await until(has_the_other)
            await Client(url).run("heavy").send("answer", "kept")
        async with host(tmp_path, "c", resources={"gpu": 1}) as c:  # the first to come, and so the one that takes over what is left

            async def has_it() -> bool:
                return [run.id for run in await c.runs() if run.id == "heavy"] == ["heavy"]

            await until(has_it)
            assert await c.run("heavy").result() == "kept"

    asyncio.run(run())


@flow(needs={"gpu": 1})
async def needs_gpu() -> str | None:
    return await receive("answer", str)


def test_the_command_shows_hosts_as_a_table_and_as_json(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"

    async def run() -> None:
        async with host(tmp_path, "a", resources={"gpu": 2}) as a:
            await a.start(asks, "x", id="x")
            await a.start(nap, id="y")

            async def is_told() -> bool:
                return look(url).hosts != () and look(url).hosts[0].record.counts.get("waiting") == 2

            await until(is_told)
            command = [sys.executable, "-m", "replicator", "wf", "fleet", url]
            shown = await asyncio.to_thread(subprocess.check_output, [*command, "-json"], text=True)
            [found] = json.loads(shown)["hosts"]
            assert (found["host"], found["state"], found["lease"], found["unfinished"]) == ("a", "up", "held", 2)
            assert found["resources"] == {"gpu": 2}
            assert found["shards"][shard_of("x")] == [1, None]
            assert found["shards"][shard_of("y")] == [1, found["next_wake"]]
            shown = await asyncio.to_thread(subprocess.check_output, command, text=True)
            assert shown.splitlines()[-1].split()[:3] == ["a", "up", "held"]
            with subprocess.Popen([*command, "-live", "-poll", "50ms"], text=True, stdout=subprocess.PIPE) as live:
                assert live.stdout is not None
                await a.start(nap, id="z")
                cells: list[str] = []
                async with asyncio.timeout(20):
                    while cells[:1] != ["a"] or "3" not in cells[6:9]:  # so many wait
                        cells = (await asyncio.to_thread(live.stdout.readline)).split()
                live.send_signal(signal.SIGINT)
                assert await asyncio.to_thread(live.wait, 20) == 0

    asyncio.run(run())


@flow
async def nap() -> None:
    await sleep(timedelta(days=1))


def test_of_two_heirs_of_one_run_one_goes_on_with_it(tmp_path: Path) -> None:
    """What happens when who takes over is killed in the middle, and the next one divides otherwise."""

    async def run() -> None:
        url = f"file://{tmp_path}/root"
        a = await host(tmp_path, "a", lease_ttl_s=600.0).__aenter__()  # nobody takes it over by itself
        await a.start(asks, "it", id="it")

        async def waits() -> bool:
            return a.parked == 1

        await until(waits)
        await a.crash()
        rows = tuple(sql_read(tmp_path / "a" / ".host" / "intake.db", indexed))
        with contextlib.closing(Handed(url)) as handed:
            for heir in "bc":
                handed.put(heir, "a.2.1", Part("a", rows, ()))
        async with host(tmp_path, "b") as b, host(tmp_path, "c") as c:

            async def both_have_it() -> bool:
                return bool(await b.runs()) and bool(await c.runs())

            await until(both_have_it)
            await asyncio.gather(b.run("it").send("answer", "yes"), c.run("it").send("answer", "yes"))
            assert await asyncio.gather(b.run("it").result(), c.run("it").result()) == [[1, "yes", 2]] * 2

            async def one_has_it() -> bool:
                return len(await b.runs()) + len(await c.runs()) == 1

            await until(one_has_it)

    _ran.clear()
    asyncio.run(run())
    assert _ran == [("it", 1), ("it", 2)]


def test_a_run_that_a_host_had_in_its_own_queue_when_it_inherited_it_is_not_forgotten(tmp_path: Path) -> None:
    """Both had accepted its start, as hosts do that are busy. The dead one had begun it, and this one must not leave it to that."""

    async def run() -> None:
        url = f"file://{tmp_path}/root"
        a = await host(tmp_path, "a", lease_ttl_s=600.0).__aenter__()
        await a.start(asks, "it", id="it")

        async def waits() -> bool:
            return a.parked == 1

        await until(waits)
        await a.crash()
        rows = tuple(sql_read(tmp_path / "a" / ".host" / "intake.db", indexed))
        async with host(tmp_path, "b", concurrency=0) as b:
            await b.start(asks, "it", id="it")
            with contextlib.closing(Handed(url)) as handed:
                handed.put("b", "a.2.1", Part("a", rows, ()))

                async def is_taken_in() -> bool:
                    return handed.names("b") == []

                await until(is_taken_in)
            assert await b.run("it").status() == "queued"
        async with host(tmp_path, "b") as b:
            await b.run("it").send("answer", "yes")
            assert await b.run("it").result() == [1, "yes", 2]

    _ran.clear()
    asyncio.run(run())
    assert _ran == [("it", 1), ("it", 2)]


@pytest.mark.slow
def test_a_takeover_that_breaks_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    puts = []
    real = Handed.put

    def put(self: Handed, heir: str, name: str, part: Part) -> None:
        puts.append(heir)
        if len(puts) == 2:
            raise StorageUnavailable("the store is away")
        real(self, heir, name, part)

    monkeypatch.setattr(Handed, "put", put)
    ids = [f"it-{number}" for number in range(6)]

    async def run() -> None:
        a = await host(tmp_path, "a").__aenter__()
        async with host(tmp_path, "b") as b, host(tmp_path, "c") as c:
            await start_and_park(a, ids)
            await a.crash()

            async def all_moved() -> bool:
                return {run.id for engine in (b, c) for run in await engine.runs()} == set(ids)

            await until(all_moved)
            for id in ids:
                await Client(f"file://{tmp_path}/root").run(id).send("answer", "yes")
            assert await asyncio.gather(*(b.run(id).result() for id in ids)) == [[1, "yes", 2]] * len(ids)

    _ran.clear()
    asyncio.run(run())
    assert len(puts) > 2
    assert sorted(_ran) == sorted((id, number) for id in ids for number in (1, 2))


@pytest.mark.slow
def test_when_the_store_was_away_nobody_is_dead_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lease of the other host stood still as long as nobody could have renewed it; it is renewed a little after the first look that gets through."""

    def is_away(*_: object) -> Any:
        raise StorageUnavailable("the store is away")

    async def run() -> None:
        ttl_s = 2.0
        async with host(tmp_path, "a", lease_ttl_s=ttl_s) as a, host(tmp_path, "b", lease_ttl_s=ttl_s) as b:

            async def both_watch() -> bool:
                return set(a._watched) == {"b"} and set(b._watched) == {"a"}

            await until(both_watch)
            assert a._replication is not None
            lease = a._replication.ownership.lease
            real = HostRecords.versions
            monkeypatch.setattr(HostRecords, "versions", is_away)
            monkeypatch.setattr(lease, "renew", is_away)
            await asyncio.sleep(ttl_s + 0.3)  # b's own lease is renewed
            monkeypatch.setattr(HostRecords, "versions", real)

            async def b_watches() -> bool:
                return set(b._watched) == {"a"}

            await until(b_watches)
            await asyncio.sleep(0.5)  # some looks of b, none of which may take the lease
            monkeypatch.undo()

            async def is_renewed() -> bool:
                return lease.status().state == "held"

            await until(is_renewed)
            await asyncio.sleep(ttl_s)
            assert lease.status().state == "held"
            assert a._lost is None
            assert await (await a.start(asks, "it", id="it")).status() in ("queued", "running", "waiting")
            assert "host is gone" not in caplog.text  # b ends before a, which may take its runs then

    asyncio.run(run())


def test_a_run_of_which_a_step_was_acknowledged_is_found_although_its_start_was_only_local(tmp_path: Path) -> None:
    """The index of the host is uploaded once an hour here, unless somebody waits for it. What counts is the bucket as it is when the flow has gone on."""

    async def run() -> None:
        a = await host(tmp_path, "a", sync_interval_s=3600.0).__aenter__()
        it = await a.start(asks, "it", id="it")
        async with asyncio.timeout(20):
            while [record.status for record in await it.steps()] != ["done", "waiting"]:  # the flow has gone on
                await asyncio.sleep(0.02)
        shutil.copytree(tmp_path / "root", tmp_path / "then" / "root")
        await a.crash()
        async with host(tmp_path / "then", "b") as b:

            async def has_it() -> bool:
                return [run.id for run in await b.runs()] == ["it"]

            await until(has_it)
            await b.run("it").send("answer", "yes")
            assert await b.run("it").result() == [1, "yes", 2]

    _ran.clear()
    asyncio.run(run())
    assert _ran == [("it", 1), ("it", 2)]
