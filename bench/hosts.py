"""Hosts of one root that are killed and paused at random, with many runs in flight: does every run end once, and how long does a takeover take?

    python -m bench.hosts --instances 500 --minutes 10 --store seaweedfs

Each host is a process (`pyrepl wf host`) with a folder of its own, as a container is; one that was killed, or has found that it lost its runs, is followed by one with a new name and an
empty folder. Every step is `replicated`. Its body notes when it begins and ends, so that afterwards it can be said for each run which bodies ran, where, and when:

* every run ends once, with the right result;
* the steps of a run begin in their order: one that the flow has gone on from, and so was acknowledged, never begins again.

Two figures for each kill: until the runs of the dead host are in the intakes of its heirs, and until a body that was cut short begins again elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from workflow import Client
from workflow.handing import Handed, HostRecords
from workflow.membership import GONE

FLOWS = textwrap.dedent(
    """
    import asyncio, os, random, time
    from workflow import flow, sleep, step

    def note(what, name, number):
        with open(os.environ["BEATS"], "a") as file:
            file.write(f"{time.time():.3f} {os.environ['NAME']} {what} {name} {number}\\n")

    @step(durability="replicated")
    async def beat(name: str, number: int) -> int:
        note("begin", name, number)
        await asyncio.sleep(random.uniform(0.1, 1.0))
        note("end", name, number)
        return number

    @flow
    async def beats(name: str, count: int, between_s: float) -> int:
        total = 0
        for number in range(count):
            total += await beat(name, number)
            await sleep(between_s * (0.5 + hash_of(name, number)))
        return total

    def hash_of(name, number):
        return random.Random(f"{name} {number}").random()
    """
)


@dataclass
class Loss:
    """A host that was killed, or paused beyond its lease. `handed_s`: until its runs were in the intakes of others."""

    host: str
    at: float
    how: str
    handed_s: float | None = None


@dataclass
class Chaos:
    """The processes, and what was done to them."""

    folder: Path
    url: str
    ttl_s: float
    poll_s: float
    concurrency: int
    count: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopped: dict[str, float] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    fenced: int = 0
    said_so: int = 0

    def start(self) -> None:
        """Start one more host."""
        self.count += 1
        name = f"host-{self.count}"
        line = ["wf", "host", self.url, "-flows", "beating", "-host", name, "-folder", str(self.folder / name)]
        line += ["-lease-ttl", f"{self.ttl_s:g}s", "-poll", f"{self.poll_s:g}s", "-inbox-poll", "1s", "-concurrency", str(self.concurrency)]
        with (self.folder / f"{name}.err").open("wb") as err:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "replicator", *line], cwd=self.folder, stdout=subprocess.DEVNULL, stderr=err,
                env=os.environ | {"NAME": name, "BEATS": str(self.folder / "beats")},
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """End a host at once."""
        self.losses.append(Loss(name, time.time(), "killed"))
        self.processes[name].kill()

    def stop(self, name: str, seconds: float) -> None:
        """Let a host sleep."""
        if seconds > self.ttl_s:
            self.losses.append(Loss(name, time.time(), "paused"))
        self.processes[name].send_signal(signal.SIGSTOP)
        self.stopped[name] = time.time() + seconds

    def tend(self) -> None:
        """Wake those whose sleep is over; follow those that ended."""
        for name in [name for name, until in self.stopped.items() if until < time.time()]:
            del self.stopped[name]
            self.processes[name].send_signal(signal.SIGCONT)
        for name, process in list(self.processes.items()):
            if process.poll() is None:
                continue
            del self.processes[name]
            if process.returncode > 0:
                self.fenced += 1
                self.said_so += "this engine has stopped" in (self.folder / f"{name}.err").read_text()
            self.start()

    def end(self) -> None:
        """End all: in order first."""
        for name, process in self.processes.items():
            if name in self.stopped:
                process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def percentile(values: list[float], part: float) -> float:
    """Return a value of a sorted list; NaN for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else float("nan")


def watch(chaos: Chaos, records: HostRecords, handed: Handed) -> None:
    """See which of the lost hosts were divided, and whether the heirs have taken that in."""
    waiting = [loss for loss in chaos.losses if loss.handed_s is None]
    if not waiting:
        return
    pending = {name.split(".")[0] for heir in handed.heirs() for name in handed.names(heir)}
    for loss in waiting:
        record = records.read(loss.host)
        if record is not None and record.state == GONE and loss.host not in pending:
            loss.handed_s = time.time() - loss.at


def resumed(losses: list[Loss], lines: list[list[str]]) -> list[float]:
    """Return for each body that a loss has cut short how long it took until it began again elsewhere."""
    found = []
    for loss in losses:
        open_bodies = {}
        for at, host, what, name, number in lines:
            if host == loss.host and float(at) <= loss.at:
                if what == "begin":
                    open_bodies[name, number] = at
                else:
                    open_bodies.pop((name, number), None)
        for at, host, what, name, number in lines:
            if what == "begin" and host != loss.host and float(at) > loss.at and open_bodies.pop((name, number), None):
                found.append(float(at) - loss.at)
    return found


def check(ids: list[str], steps: int, lines: list[list[str]], statuses: Counter[tuple[str, str]]) -> list[str]:
    """Return what is wrong."""
    wrong = [f"{id}: {statuses[id, 'done']} ends" for id in ids if statuses[id, "done"] != 1]
    for id in ids:
        numbers = [int(line[4]) for line in lines if line[3] == id and line[2] == "begin"]
        if sorted(set(numbers)) != list(range(steps)):
            wrong.append(f"{id}: lacks steps: {numbers}")  # where it has not ended that is all
        if numbers != sorted(numbers):
            wrong.insert(0, f"{id}: an acknowledged step began again: {numbers}")
    return wrong


async def run(options: argparse.Namespace, folder: Path, url: str) -> int:
    """Run it; returns the exit code."""
    rng = random.Random(options.seed)
    (folder / "beating.py").write_text(FLOWS)
    log = folder / "beats"
    log.touch()
    chaos = Chaos(folder, url, options.ttl, options.poll, options.concurrency)
    client, records, handed = Client(url), HostRecords(url), Handed(url)
    ids = [f"it-{number}" for number in range(options.instances)]
    between_s = options.minutes * 60 / options.steps * 0.4
    try:
        for _ in range(options.hosts):
            chaos.start()
        runs = [await client.start("beats", id=id, name=id, count=options.steps, between_s=between_s) for id in ids]
        began, next_loss = time.time(), time.time() + 15
        end, done = began + options.minutes * 60, 0
        while done < len(ids) and time.time() < end + options.grace:
            await asyncio.sleep(0.2)
            chaos.tend()
            await asyncio.to_thread(watch, chaos, records, handed)
            if time.time() > next_loss and time.time() < end:
                next_loss = time.time() + rng.uniform(2 * options.ttl, 5 * options.ttl)
                awake = [name for name in chaos.processes if name not in chaos.stopped]
                if len(awake) > 1:
                    victim = rng.choice(sorted(awake))
                    if rng.random() < 0.5:
                        chaos.kill(victim)
                    else:
                        chaos.stop(victim, rng.uniform(0.5, 3.0) * options.ttl)
            if int(time.time()) % 5 == 0:
                done = len({item.name for shard in range(64) for item in _listed(client, shard)})
        while True:  # indexes follow the marks: at their own pace, or when the last dead host has heirs
            statuses = Counter((row.id, row.status) for row in await client.runs())
            if all(statuses[id, "done"] == 1 for id in ids) or time.time() > end + options.grace:
                break
            await asyncio.sleep(1.0)
            chaos.tend()
        results = Counter([await asyncio.wait_for(item.result(), 60) for item in runs]) if done == len(ids) else Counter()
    finally:
        chaos.end()
    lines = [line.split() for line in log.read_text().splitlines()]
    wrong = check(ids, options.steps, lines, statuses)
    if results != Counter({sum(range(options.steps)): len(ids)}):
        wrong.append(f"results: {dict(results)}")
    report(options, chaos, lines, done, wrong, time.time() - began)
    client.close()
    records.close()
    handed.close()
    return int(bool(wrong))


def _listed(client: Client, shard: int) -> list:  # type: ignore[type-arg]
    return client.desk._done._store.list_objects(f"generations/{shard:02d}")  # type: ignore[union-attr]


def report(options: argparse.Namespace, chaos: Chaos, lines: list[list[str]], done: int, wrong: list[str], took_s: float) -> None:
    """Print what was seen."""
    killed = [loss for loss in chaos.losses if loss.how == "killed"]
    handed = [loss.handed_s for loss in killed if loss.handed_s is not None]
    again = resumed(killed, lines)
    begins = sum(line[2] == "begin" for line in lines)
    print(
        f"{options.instances} runs of {options.steps} replicated steps, {options.hosts} hosts, lease {options.ttl:g} s, look {options.poll:g} s"
    )
    print(
        f"{took_s:.0f} s; {done} ended; {len(killed)} kills, {len(chaos.losses) - len(killed)} pauses beyond the lease; hosts: {chaos.count}"
    )
    print("kills:", ", ".join(f"{loss.host} {loss.handed_s:.1f}" if loss.handed_s is not None else f"{loss.host} never" for loss in killed))
    print(f"hosts that found their runs lost: {chaos.fenced}, of which {chaos.said_so} said so")
    print(f"bodies: {begins}, {begins - options.instances * options.steps} of them repeated after they were cut short")
    for name, values in (("until the heirs had the runs", handed), ("until a body cut short began again", again)):
        if values:
            print(
                f"{name}: n={len(values)} p50={statistics.median(values):.1f} s p99={percentile(values, 0.99):.1f} s max={max(values):.1f} s"
            )
    print("; ".join(wrong[:20]) if wrong else "every run ended once; no acknowledged step began again, none is missing")


@contextlib.contextmanager
def store(name: str, folder: Path) -> Iterator[str]:
    """Give the URL of an empty root."""
    if name == "file":
        yield f"file://{folder}/root"
        return
    from tests.servers import ACCESS, SECRET, serve

    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    (folder / "weed").mkdir()
    with serve("seaweed", folder / "weed") as server:
        yield server.url("hosts")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=500)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--grace", type=float, default=120.0, help="seconds to finish in after the last loss")
    parser.add_argument("--ttl", type=float, default=5.0)
    parser.add_argument("--poll", type=float, default=1.0)
    parser.add_argument("--concurrency", type=int, default=20, help="runs in memory, for each host")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", choices=("file", "seaweedfs"), default="file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-hosts-") as name, store(options.store, Path(name)) as url:
        return asyncio.run(run(options, Path(name), url))


if __name__ == "__main__":
    raise SystemExit(main())
