"""How a fleet of hosts scales: a model in formulas, and a simulation of the fleet in virtual time that they are checked against.

    python -m bench.scaling --instances 1000 10000 100000 1000000

The simulation runs the code that decides (`workflow.placement`, `workflow.membership`, `replicator.tenure`) with as many hosts as are asked for, each with clocks and
looks of its own, over a store that counts requests and takes some time for each. Hosts die; what is measured is how many requests were made, how long it took until each
run of a dead host was in memory elsewhere, and how late runs were begun that were due. The same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from replicator.clock import Moment
from replicator.format.lock import LockRecord
from replicator.tenure import Sighting, sighted, wait_s
from workflow.fleet import RECORD_PART
from workflow.membership import GONE, UP, WATCHERS, HostRecord, Members
from workflow.placement import divide

__all__ = ["Fleet", "Outcome", "dollars", "lag_s", "requests_per_s", "simulate", "takeover_s"]

RENEW_PART = 1 / 3
PUT_USD, GET_USD = 0.005 / 1000, 0.0004 / 1000
"""S3 Standard in us-east-1; a LIST costs what a PUT does."""
MONTH_S = 30 * 86400


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a fleet is made of.

    Attributes:
        rate: how often in a second each instance wakes and runs a step. `replicated`: the part of the steps that wait for the replica.
        wake_s: seconds of one host's CPU for a wake: open or restore, claim, run, store, close.
        request_s: how long a request takes. `part_rows`: runs in one object that is handed to an heir.
    """

    instances: int = 1000
    hosts: int = 3
    rate: float = 0.001
    replicated: float = 1.0
    ttl_s: float = 30.0
    poll_s: float = 5.0
    inbox_s: float = 30.0
    wake_s: float = 0.02
    request_s: float = 0.03
    restore_s: float = 0.02
    part_rows: int = 2000


# -- formulas --------------------------------------------------------------------------------------------------------------------


def requests_per_s(fleet: Fleet) -> dict[str, float]:
    """Return the requests of a healthy fleet in a second. Those of hosts do not depend on the number of instances, those of steps not on the number of hosts.

    A host: a PUT for its lease and one for its record each third of the TTL; two LISTs for a look, one for the inbox; a GET of the lease and, when it has
    changed, of the record of each host that it watches. A wake: a LIST (is the end of its chain still ours), and a PUT for what it stores; a replicated
    step stores its intent before.
    """
    watched = min(WATCHERS, fleet.hosts - 1)
    wakes = fleet.instances * fleet.rate
    record_s = fleet.poll_s * math.ceil(fleet.ttl_s * RECORD_PART / fleet.poll_s)  # at the first look after a third of the TTL
    return {
        "host PUT": fleet.hosts * (1 / (fleet.ttl_s * RENEW_PART) + 1 / record_s),
        "host LIST": fleet.hosts * (2 / fleet.poll_s + 1 / fleet.inbox_s),
        "host GET": fleet.hosts * watched * (1 / fleet.poll_s + 1 / record_s),
        "step PUT": wakes * (1 + fleet.replicated),
        "step LIST": wakes,
    }


def dollars(fleet: Fleet) -> tuple[float, float]:
    """Return what a month of requests costs: (hosts, steps)."""
    found = requests_per_s(fleet)
    price = {name: (GET_USD if name.endswith("GET") else PUT_USD) * MONTH_S for name in found}
    hosts = sum(rate * price[name] for name, rate in found.items() if name.startswith("host"))
    return hosts, sum(rate * price[name] for name, rate in found.items() if name.startswith("step"))


def takeover_s(fleet: Fleet) -> tuple[float, float]:
    """Return (typical, bound) of the time from a host's death until all its runs are in the intakes of others.

    Its lease stays as it is for its TTL, counted from the look that first sees the last renewal: on average half of a renewal's interval before the death, and the look of
    the first of its watchers. Then the intake is restored and cut in parts; then its heirs look.
    """
    own = fleet.instances / fleet.hosts
    others = fleet.hosts - 1
    watched = min(WATCHERS, others)
    parts = others * math.ceil(own / others / fleet.part_rows)
    divide_s = (12 + others + parts) * fleet.request_s + own * 20e-6 + own * others * 2e-6
    heir_s = (2 + math.ceil(own / others / fleet.part_rows) * 3) * fleet.request_s
    # Each watcher acts at its first look after TTL since its own sighting: the earliest of them, in steps of a look.
    typical = fleet.ttl_s * (1 - RENEW_PART / 2) + fleet.poll_s / (watched + 1) + fleet.poll_s * others / (others + 1)
    return typical + divide_s + heir_s, fleet.ttl_s + 3 * fleet.poll_s + divide_s + heir_s


def lag_s(fleet: Fleet) -> float:
    """Return how late a run begins that is due, on average: one queue for each host, service of fixed length (Pollaczek-Khinchine); infinite when it is too much."""
    load = fleet.instances * fleet.rate / fleet.hosts * fleet.wake_s
    return load * fleet.wake_s / (2 * (1 - load)) if load < 1 else math.inf


# -- simulation ------------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What was seen. Takeovers: from each death until the last of its runs was in an intake; `resumed_s`: until each run could go on."""

    seconds: float
    requests: Counter[str]
    takeovers_s: list[float]
    resumed_s: list[float]
    lags_s: np.ndarray
    lost: int
    twice: int
    spread: float
    """The largest share of a host's runs over the mean, at the end."""

    def rate(self, name: str) -> float:
        """Return requests of a kind in a second."""
        return self.requests[name] / self.seconds


@dataclass
class Host:
    """A simulated host."""

    name: str
    members: Members = field(default_factory=Members)
    sightings: dict[str, Sighting] = field(default_factory=dict)
    written_at: float = -math.inf
    alive: bool = True
    runs: set[str] = field(default_factory=set)
    died_at: float = 0.0


class World:
    """The store, and the hosts around it."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet, self.rng = fleet, random.Random(seed)
        self.requests: Counter[str] = Counter()
        self.locks: dict[str, LockRecord] = {}
        self.records: dict[str, tuple[int, HostRecord]] = {}
        self.handed: dict[str, list[tuple[str, list[str]]]] = {}
        self.hosts: dict[str, Host] = {}
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.count = itertools.count()
        self.takeovers: dict[str, float] = {}
        self.open: dict[str, set[str]] = {}
        self.resumed: list[float] = []
        for number in range(fleet.hosts):
            self.add(f"host-{number}", self.rng.uniform(0, fleet.poll_s))
        names = list(self.hosts)
        for number in range(fleet.instances):
            self.hosts[names[number % len(names)]].runs.add(f"it-{number}")

    def at(self, when: float, what: Callable[[float], None]) -> None:
        """Let something happen."""
        heapq.heappush(self.events, (when, next(self.count), what))

    def add(self, name: str, when: float) -> None:
        """Start a host."""
        host = self.hosts[name] = Host(name)
        self.locks[name] = LockRecord(1, when + self.fleet.ttl_s, name, name, 1, self.fleet.ttl_s)
        self.at(when, lambda now: self.renew(host, now))
        self.at(when, lambda now: self.look(host, now))

    def renew(self, host: Host, now: float) -> None:
        """Renew a lease, each third of the TTL."""
        if not host.alive:
            return
        self.requests["host PUT"] += 1
        lock = self.locks[host.name]
        self.locks[host.name] = replace(lock, serial=lock.serial + 1, expires_at=now + self.fleet.ttl_s)
        self.at(now + self.fleet.ttl_s * RENEW_PART, lambda later: self.renew(host, later))

    def look(self, host: Host, now: float) -> None:
        """Do what `workflow.fleet.Fleet.look_at_fleet` does."""
        if not host.alive:
            return
        fleet = self.fleet
        self.at(now + fleet.poll_s, lambda later: self.look(host, later))
        if now - host.written_at >= fleet.ttl_s * RECORD_PART:
            host.written_at = now
            self.requests["host PUT"] += 1
            record = HostRecord(host.name, at="now", ttl_s=fleet.ttl_s, places=100, flows=("one",), counts={"waiting": len(host.runs)})
            self.records[host.name] = (self.records.get(host.name, (0, record))[0] + 1, record)
        self.requests["host LIST"] += 2
        members = host.members
        fresh = set(members.changed({name: version for name, (version, _) in self.records.items()}, now))
        for name in fresh - {name for name, record in members.records.items() if record.state == UP}:
            self.read(host, name, "first GET")
        for name in members.watched(host.name, now):
            if name in fresh:
                self.read(host, name, "host GET")
            if members.records[name].state == GONE:
                host.sightings.pop(name, None)
                continue
            self.requests["host GET"] += 1
            lock = self.locks[name]
            moment = Moment(now, now)
            host.sightings[name] = sighted(host.sightings.get(name), str(lock.serial), lock, moment)
            if wait_s(host.sightings[name], moment) <= 0:
                self.take_over(host, name, now)
        for dead, ids in self.handed.pop(host.name, ()):
            took_s = 2 * fleet.request_s + 3 * fleet.request_s * math.ceil(len(ids) / fleet.part_rows)
            self.at(now + took_s, lambda later, dead=dead, ids=ids: self.take_in(host, dead, ids, later))  # type: ignore[misc]

    def read(self, host: Host, name: str, kind: str) -> None:
        """Read a record."""
        self.requests[kind] += 1
        host.members.records[name] = self.records[name][1]

    def take_over(self, host: Host, name: str, now: float) -> None:
        """Do what `workflow.handing.hand_over` does."""
        fleet, dead = self.fleet, self.hosts[name]
        lock = self.locks[name]
        self.locks[name] = replace(lock, generation=lock.generation + 1, serial=lock.serial + 1, owner=host.name)
        heirs = [replace(self.records[record.host][1]) for record in host.members.living(now) if record.host != name]
        shares = divide([(id, "one") for id in dead.runs], [record.candidate() for record in heirs])
        parts = sum(math.ceil(len(ids) / fleet.part_rows) for ids in shares.values())
        self.requests["takeover"] += 12 + len(heirs) + parts
        self.records[name] = (self.records[name][0] + 1, HostRecord(name, GONE, at="now"))
        took_s = (12 + len(heirs) + parts) * fleet.request_s + len(dead.runs) * (20e-6 + 2e-6 * len(heirs))
        self.at(now + took_s, lambda _: self.hand(name, shares))

    def hand(self, name: str, shares: dict[str | None, list[str]]) -> None:
        """Store what heirs get."""
        dead = self.hosts[name]
        dead.runs = set()
        self.open[name] = {id for ids in shares.values() for id in ids}
        for heir, ids in shares.items():
            assert heir is not None
            self.handed.setdefault(heir, []).append((name, ids))

    def take_in(self, host: Host, dead: str, ids: list[str], now: float) -> None:
        """An heir has its share; it restores one run after another."""
        host.runs |= set(ids)
        died_at = self.hosts[dead].died_at
        self.resumed += [now - died_at + self.fleet.restore_s * (number + 1) for number in range(len(ids))]
        self.open[dead] -= set(ids)
        if not self.open[dead]:
            self.takeovers[dead] = now - died_at

    def die(self, now: float) -> None:
        """Kill a host, and start another with a new name a little later."""
        host = self.rng.choice(sorted((host for host in self.hosts.values() if host.alive), key=lambda host: host.name))
        host.alive, host.died_at = False, now
        self.add(f"host-{len(self.hosts)}", now + self.fleet.poll_s)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        while self.events and self.events[0][0] <= seconds:
            when, _, what = heapq.heappop(self.events)
            what(when)


def lags(fleet: Fleet, share: int, seed: int) -> np.ndarray:
    """Return how late each wake of a host with so many runs begins: one queue, wakes at random, each taking `wake_s`."""
    rng = np.random.default_rng(seed)
    count = max(1000, min(2_000_000, int(share * fleet.rate * 36000)))
    due = np.cumsum(rng.exponential(1 / (share * fleet.rate), count))
    order = np.arange(count)
    begin = fleet.wake_s * order + np.maximum.accumulate(due - fleet.wake_s * order)
    return begin - due


def simulate(fleet: Fleet, *, seconds: float, deaths: int, seed: int = 1) -> Outcome:
    """Let a fleet run in virtual time while hosts die, far enough apart that each is taken over before the next."""
    world = World(fleet, seed)
    gap = seconds / (deaths + 1)
    for number in range(deaths):
        world.at(gap * (number + 0.5) + world.rng.uniform(0, fleet.ttl_s), world.die)
    world.run(seconds)
    where = Counter(id for host in world.hosts.values() if host.alive for id in host.runs)
    alive = [len(host.runs) for host in world.hosts.values() if host.alive]
    return Outcome(
        seconds,
        world.requests,
        list(world.takeovers.values()),
        world.resumed,
        lags(fleet, fleet.instances // fleet.hosts, seed),
        lost=fleet.instances - len(where),
        twice=sum(count > 1 for count in where.values()),
        spread=max(alive) / statistics.mean(alive),
    )


# -- the table -------------------------------------------------------------------------------------------------------------------

HEAD = (
    "instances", "hosts", "host requests/s", "simulated", "step requests/s", "USD a month: hosts", "steps",
    "takeover typical", "bound", "simulated p50", "max", "resumed p99", "lag", "simulated lag",
)  # fmt: skip


def sized(instances: int) -> Fleet:
    """Return a fleet of 10,000 instances for each host, and three hosts at least."""
    return Fleet(instances=instances, hosts=max(3, instances // 10_000))


def row(instances: int, *, deaths: int = 8, seed: int = 1) -> list[str]:
    """Return the figures of a size."""
    fleet = sized(instances)
    seconds = (deaths + 1) * 150.0
    seen = simulate(fleet, seconds=seconds, deaths=deaths, seed=seed)
    assert (seen.lost, seen.twice) == (0, 0)
    model = requests_per_s(fleet)
    hosts = model["host PUT"] + model["host LIST"] + model["host GET"]
    inbox = fleet.hosts / fleet.inbox_s
    simulated = seen.rate("host PUT") + seen.rate("host LIST") + seen.rate("host GET") + inbox
    money, typical = dollars(fleet), takeover_s(fleet)
    return [
        f"{instances:,}", str(fleet.hosts), f"{hosts:.2f}", f"{simulated:.2f}", f"{model['step PUT'] + model['step LIST']:.1f}",
        f"{money[0]:.0f}", f"{money[1]:,.0f}", f"{typical[0]:.1f} s", f"{typical[1]:.1f} s", f"{statistics.median(seen.takeovers_s):.1f} s",
        f"{max(seen.takeovers_s):.1f} s", f"{float(np.percentile(seen.resumed_s, 99)):.1f} s", f"{lag_s(fleet) * 1000:.1f} ms",
        f"{float(seen.lags_s.mean()) * 1000:.1f} ms",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for instances in options.instances:
        began = time.monotonic()
        print("| " + " | ".join(row(instances)) + " |", flush=True)
        print(f"  {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
