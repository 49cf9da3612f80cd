"""DECISIONS of a fleet: which host gets which run, and who watches whom. Pure functions of names and numbers: every host that knows the same comes to the same.

Rendezvous hashing: each pair of host and run has a score, and the highest wins. When a host goes, only what was its moves. Shares are bounded as well: of the
runs of a dead host each heir gets so many that all are filled to the same level, in runs for each place in memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256

__all__ = ["ANY", "Candidate", "divide", "first", "rooms", "shard_of", "watchers"]

ANY = ""
"""A flow that every host may take: what is known of a run is its id alone."""
SHARDS = 64
_TOP = float(1 << 64)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host that may be given runs. `places`: how many it runs at once; `load`: how many unfinished ones it has; `flows`: what it has the code, and the resources, for."""

    name: str
    places: int
    load: int
    flows: frozenset[str]

    def takes(self, flow: str) -> bool:
        """Say whether it can run a flow."""
        return flow == ANY or flow in self.flows


def score(host: str, id: str, weight: float = 1.0) -> float:
    """Return how much a host is the one for a run: weighted rendezvous hashing."""
    drawn = (int.from_bytes(blake2b(f"{host}/{id}".encode(), digest_size=8).digest(), "big") + 0.5) / _TOP
    return -weight / math.log(drawn) if drawn < 1.0 else math.inf


def first(id: str, flow: str, hosts: Iterable[Candidate]) -> str | None:
    """Return the host that should begin a run; None when no host can."""
    able = [host for host in hosts if host.takes(flow)]
    return max(able, key=lambda host: (score(host.name, id, max(1, host.places)), host.name)).name if able else None


def rooms(count: int, hosts: Sequence[Candidate]) -> dict[str, int]:
    """Return how many of `count` runs each host gets at most, so that all are filled to one level; together at least `count`, and at most one more each."""
    low, high = 0.0, max((host.load / max(1, host.places) for host in hosts), default=0.0) + count
    for _ in range(64):
        middle = (low + high) / 2
        if sum(max(0.0, middle * max(1, host.places) - host.load) for host in hosts) < count:
            low = middle
        else:
            high = middle
    return {host.name: math.ceil(max(0.0, high * max(1, host.places) - host.load)) for host in hosts}


def divide(runs: Iterable[tuple[str, str]], hosts: Sequence[Candidate]) -> dict[str | None, list[str]]:
    """Give runs to hosts.

    Args:
        runs: (id, flow), in any order.

    Returns:
        The ids of each host, each once; under None those that no host can run.
    """
    ordered = sorted(set(runs))
    room = rooms(len(ordered), hosts)
    given: dict[str | None, list[str]] = {host.name: [] for host in hosts}
    for id, flow in ordered:
        able = [host for host in hosts if host.takes(flow)]
        free = [host for host in able if len(given[host.name]) < room[host.name]]
        if free:
            name: str | None = max(free, key=lambda host: (score(host.name, id), host.name)).name
        elif able:  # those who can are full, because others cannot
            name = min(able, key=lambda host: ((host.load + len(given[host.name])) / max(1, host.places), host.name)).name
        else:
            name = None
        given.setdefault(name, []).append(id)
    return {name: ids for name, ids in given.items() if ids}


def watchers(host: str, others: Collection[str], count: int) -> list[str]:
    """Return the hosts that watch a host, best first: `count` of the others, so that the requests of a fleet grow with its hosts, not with their square."""
    return sorted((other for other in others if other != host), key=lambda other: (score(other, host), other), reverse=True)[:count]


def shard_of(id: str) -> str:
    """Return which of the 64 shards of a bucket's folders a run is in, two digits: the one of its oldest ancestor, so that a family is in one."""
    return f"{sha256(id.partition('.')[0].encode()).digest()[0] % SHARDS:02d}"
