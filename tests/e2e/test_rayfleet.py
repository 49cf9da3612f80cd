"""A fleet on a Ray cluster of several nodes, of which one is lost and one is drained. Needs the extra `ray`: `pytest -m scheduled -n0 tests/e2e/test_rayfleet.py`."""

from __future__ import annotations

import asyncio
import os
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from workflow import Client
from workflow.rayfleet import RayFleet, resources_of

RUNS, STEPS = 100, 6
TTL_S, POLL_S = 6.0, 0.5

FLOWS = textwrap.dedent(
    """
    import asyncio, os, time
    from workflow import flow, receive, sleep, step

    def note(what, name, number):
        with open(os.environ["BEATS"], "a") as file:
            file.write(f"{time.time():.3f} {os.getpid()} {what} {name} {number}\\n")

    @step(durability="replicated")
    async def beat(name: str, number: int) -> int:
        note("begin", name, number)
        while number == 2 and not os.path.exists(os.environ["BEATS"] + ".go"):
            await asyncio.sleep(0.1)
        note("end", name, number)
        return number

    @flow
    async def beats(name: str, count: int) -> int:
        total = 0
        for number in range(count):
            total += await beat(name, number)
        return total

    @flow(needs={"rare": 1})
    async def needs_rare() -> str:
        return await receive("answer", str)
    """
)


def test_resources_of_a_node_have_the_names_of_flows() -> None:
    total = {"CPU": 8.0, "GPU": 1.0, "memory": 16.0 * (1 << 30), "object_store_memory": 1e9, "node:10.0.0.1": 1.0, "rare": 2.0}
    assert resources_of(total) == {"cpu": 8.0, "gpu": 1.0, "memory_gib": 16.0, "rare": 2.0}


async def until(holds: Any, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.2)


@pytest.mark.scheduled
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_node_is_lost_with_a_hundred_runs_in_flight_and_another_is_drained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    (tmp_path / "beating.py").write_text(FLOWS)
    log, url = tmp_path / "beats", f"file://{tmp_path}/root"
    log.touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    monkeypatch.setenv("BEATS", str(log))

    def lines() -> list[list[str]]:
        return [line.split() for line in log.read_text().splitlines()]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, resources={"rare": 1} if number == 2 else {}) for number in range(3)]
    ray.init(address=cluster.address, log_to_driver=False)

    async def run() -> None:
        fleet = RayFleet(url, ["beating"], lease_ttl_s=TTL_S, fleet_poll_s=POLL_S, inbox_poll_s=0.5)
        client = Client(url)
        await fleet.begin()

        async def all_stand() -> bool:
            return set((await fleet.where()).values()) == {node.node_id for node in nodes}

        await until(all_stand, 120)
        assert await fleet.start("needs_rare", id="rare") == f"ray-{nodes[2].node_id[:16]}"
        ids = [f"it-{number}" for number in range(RUNS)]
        runs = [await client.start("beats", id=id, name=id, count=STEPS) for id in ids]

        async def all_are_in_flight() -> bool:
            inside = {line[3]: line[1] for line in lines() if line[4] == "2"}
            return len(inside) == RUNS and len(set(inside.values())) == 3

        await until(all_are_in_flight, 240)
        cluster.remove_node(nodes[0], allow_graceful=False)
        lost_at = time.time()
        before = lines()
        (tmp_path / "beats.go").touch()

        async def has_moved() -> bool:
            return nodes[0].node_id not in (await fleet.where()).values() and len({row.id for row in await client.runs()}) >= RUNS

        await until(has_moved, 120)
        results = await asyncio.wait_for(asyncio.gather(*(item.result() for item in runs)), 300)
        assert results == [sum(range(STEPS))] * RUNS
        after = lines()
        for id in ids:
            numbers = [int(line[4]) for line in after if line[3] == id and line[2] == "begin"]
            assert numbers == sorted(numbers)
            assert sorted(set(numbers)) == list(range(STEPS))
        cut_short = {}
        for _, pid, what, name, number in before:
            if what == "begin":
                cut_short[name, number] = pid
            else:
                cut_short.pop((name, number), None)
        times = [
            float(at) - lost_at
            for at, pid, what, name, number in after
            if what == "begin" and float(at) > lost_at and cut_short.get((name, number), pid) != pid
        ]
        assert len(times) > RUNS / 6
        print(
            f"\ncut short by the loss of a node: {len(times)} bodies; again after p50 {statistics.median(times):.1f} s, max {max(times):.1f} s"
        )

        await fleet.drain(nodes[2].node_id)
        assert nodes[2].node_id not in (await fleet.where()).values()
        await client.run("rare").send("answer", "yes")
        await fleet.end()
        client.close()

    try:
        asyncio.run(run())
    finally:
        ray.shutdown()
        cluster.shutdown()
