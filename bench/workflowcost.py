"""What do a thousand runs of a workflow cost in requests? Counted by a proxy before a real S3 server (SeaweedFS), a run after the other.

    python -m bench.workflowcost [RUNS]

Trivial steps, so that a run is shorter than a sync interval: a run that takes longer stores more often, at most once for each interval. What the host stores for all its runs
(its intake, at most once a second while runs start or end; its lease, one PUT each ten seconds; its inbox, one LIST each five) depends on time, not on runs, and is shown apart.

Prices are those of S3 Standard in us-east-1 (see bench/requests.py).
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.requests import PRICES, Counting
from tests.servers import ACCESS, BUCKET, SECRET, serve
from workflow import Engine, flow, step

KINDS = ("PUT", "LIST", "GET", "HEAD", "DELETE")


@step
async def one(number: int) -> int:
    return number


@flow
async def steps(count: int) -> int:
    for number in range(count):
        await one(number)
    return count


async def case(
    url: str, folder: Path, counting: Counting, count: int, durability: str, runs: int, *, chosen: bool
) -> tuple[Counter[str], Counter[str], float]:
    """Return the requests for the runs' own files, those for the host, and how long it took."""
    async with Engine(folder, replica=url) as engine:
        await asyncio.sleep(1.5)
        counting.counts = {"_hosts": Counter(), "_inbox": Counter()}
        began = time.perf_counter()
        for number in range(runs):
            id = f"run-{number}" if chosen else None
            run = await engine.start(steps, count, id=id, durability="replicated" if durability == "replicated" else "local")
            assert await run.result() == count
        took = time.perf_counter() - began
        while engine._active:
            await asyncio.sleep(0.01)
        host = counting.counts["_hosts"] + counting.counts["_inbox"]
        own = sum((found for name, found in counting.counts.items() if name not in ("_hosts", "_inbox")), Counter())
        return own, host, took


def main(runs: int, folder: Path) -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    (folder / "weed").mkdir()
    print(f"for 1,000 runs (measured: {runs})   | " + " | ".join(f"{kind:>7}" for kind in KINDS) + " |    USD | the host meanwhile")
    with serve("seaweed", folder / "weed") as server:
        counting = Counting(server.endpoint)
        for name, count, durability, chosen in (
            ("local, 10 steps", 10, "local", False),
            ("local, 50 steps", 50, "local", False),
            ("local, 10 steps, chosen id", 10, "local", True),
            ("replicated, 10 steps", 10, "replicated", False),
            ("replicated, 50 steps", 50, "replicated", False),
        ):
            slug = name.replace(",", "").replace(" ", "-")
            url = f"s3://{BUCKET}/{slug}?endpoint={counting.endpoint}&region=us-east-1&forcePathStyle=true"
            own, host, took = asyncio.run(case(url, folder / slug, counting, count, durability, runs, chosen=chosen))
            thousand = {kind: own[kind] * 1000 / runs for kind in KINDS}
            usd = sum(PRICES[kind] * number for kind, number in thousand.items())
            meanwhile = " ".join(f"{number} {kind}" for kind, number in sorted(host.items()))
            print(
                f"{name:33} | " + " | ".join(f"{thousand[kind]:7,.0f}" for kind in KINDS) + f" | {usd:6.3f} | {meanwhile} in {took:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bench-workflowcost-") as found:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, Path(found))
