"""Several hosts on one root: a host that is gone is followed by the others, and one that comes back learns it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from workflow import Engine, flow, receive, step

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


def test_the_runs_of_a_host_that_died_are_divided_among_the_others_and_end_once(tmp_path: Path) -> None:
    ids = [f"it-{number}" for number in range(12)]

    async def run() -> None:
        a = await host(tmp_path, "a").__aenter__()
        async with host(tmp_path, "b") as b, host(tmp_path, "c") as c:
            for id in ids:
                await a.start(asks, id, id=id)

            async def all_wait() -> bool:
                return a.parked == len(ids)

            await until(all_wait)
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
            async with host(tmp_path, "a") as again:  # what it had is not its any more
                assert await again.runs() == []
                assert await again.run("it-0").result() == [1, "yes", 2]

    _ran.clear()
    asyncio.run(run())
    assert sorted(call for call in _ran if call[0] != "queued") == sorted((id, number) for id in ids for number in (1, 2))
