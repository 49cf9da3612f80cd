"""The hosts of a root: what each says of itself, and which of them show signs of life. Formats and decisions; no I/O.

    <root>/_hosts/generations/all/<host>              what a host says of itself, rewritten each third of its lease's time
    <root>/_handed/generations/<heir>/<host>.<...>    runs that an heir gets of a host that is gone

One LIST of the records says for all hosts when each was rewritten. That is a hint, for whom to give runs to; who is dead is said by leases alone.

The record has an index of wake times: for each of the 64 shards how many runs wait there, and when the first of them is due. So a scheduler outside, or one that wants to
start a host when there is something to do, reads one small object for each host, and not a prefix for each run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from workflow.intake import Indexed, Request
from workflow.placement import Candidate, watchers
from workflow.state import check_id

__all__ = ["GONE", "KEPT_TAKEOVERS", "UP", "WATCHERS", "HostRecord", "Members", "Part", "Takeover", "parts"]

UP, GONE = "up", "gone"
LIVE_PART = 0.8
"""A host that has not rewritten its record for this part of its lease's time is given nothing."""
PART_BYTES = 1 << 20
KEPT_TAKEOVERS = 10
WATCHERS = 3
"""So many others watch each host."""


@dataclass(frozen=True, slots=True)
class Takeover:
    """A host that this one has taken over: its runs were divided among all that lived. `took_s`: from the moment its lease was free."""

    host: str
    at: str
    runs: int
    took_s: float


@dataclass(frozen=True, slots=True)
class HostRecord:
    """What a host says of itself.

    Attributes:
        state: "up", or "gone": taken over by `by`, all but `left` runs, whose flows no living host had the code for.
        counts: unfinished runs by status. `active`: in memory.
        shards: for each shard that has waiting runs how many, and when the first is due (None: not before an event).
        takeovers: the newest; `taken_over` counts all.
    """

    host: str
    state: str = UP
    machine: str = ""
    at: str = ""
    generation: int = 0
    ttl_s: float = 30.0
    places: int = 0
    active: int = 0
    flows: tuple[str, ...] = ()
    resources: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    shards: Mapping[str, tuple[int, str | None]] = field(default_factory=dict)
    takeovers: tuple[Takeover, ...] = ()
    taken_over: int = 0
    by: str = ""
    left: int = 0

    def encode(self) -> bytes:
        """Return the object."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, name: str, data: bytes) -> HostRecord | None:
        """Read an object. None for what is no record of that host, or of one that joined no fleet."""
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict) or fields.get("host") != name or not fields.get("at"):
                return None  # without a time it is the mark of a host that joined no fleet
            check_id(name)
            known = {key: value for key, value in fields.items() if key in cls.__dataclass_fields__}
            record = cls(**known)
            return replace(
                record,
                ttl_s=float(record.ttl_s), places=int(record.places), active=int(record.active), left=int(record.left),
                generation=int(record.generation), taken_over=int(record.taken_over),
                flows=tuple(str(item) for item in record.flows),
                resources={str(key): float(value) for key, value in record.resources.items()},
                counts={str(key): int(value) for key, value in record.counts.items()},
                shards={str(key): (int(count), None if wake is None else str(wake)) for key, (count, wake) in record.shards.items()},
                takeovers=tuple(
                    Takeover(str(item["host"]), str(item["at"]), int(item["runs"]), float(item["took_s"]))
                    for item in fields.get("takeovers", ())
                ),
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None

    @property
    def unfinished(self) -> int:
        """How many runs it has to finish."""
        return sum(self.counts.values())

    def candidate(self) -> Candidate:
        """Return what placement needs to know."""
        return Candidate(self.host, self.places, self.unfinished, frozenset(self.flows))


@dataclass(slots=True)
class Members:
    """The records that were seen, and since when each is as it is, on the steady clock of who looks."""

    records: dict[str, HostRecord] = field(default_factory=dict)
    _seen: dict[str, tuple[object, float]] = field(default_factory=dict)
    _watched: tuple[frozenset[str], frozenset[str], list[str]] = (frozenset(), frozenset(), [])

    def changed(self, listed: Mapping[str, object], now: float) -> list[str]:
        """Take note of a listing (the version of each record); returns which must be read again. Those that are not listed are forgotten."""
        for name in [name for name in self._seen if name not in listed]:
            del self._seen[name]
            self.records.pop(name, None)
        fresh = [name for name, version in listed.items() if name not in self._seen or self._seen[name][0] != version]
        for name in fresh:
            self._seen[name] = (listed[name], now)
        return fresh

    def age_s(self, name: str, now: float) -> float:
        """Return for how long a record has not been rewritten, as far as is known here."""
        return now - self._seen[name][1] if name in self._seen else float("inf")

    def living(self, now: float) -> list[HostRecord]:
        """Return the hosts that may be given runs."""
        return [
            record
            for name, record in sorted(self.records.items())
            if record.state == UP and self.age_s(name, now) < record.ttl_s * LIVE_PART
        ]

    def watched(self, me: str, now: float) -> list[str]:
        """Return the hosts that `me` is to watch; the same as before while the same hosts live."""
        names, living = frozenset(self.records), frozenset(record.host for record in self.living(now)) | {me}
        if self._watched[:2] != (names, living):
            self._watched = names, living, [name for name in sorted(names) if me in watchers(name, living, WATCHERS)]
        return self._watched[2]


@dataclass(frozen=True, slots=True)
class Part:
    """Some runs of a host that is gone, for one heir: rows of its index, and what waited for them in its intake.

    `owners`: for runs that the host had inherited itself, whose else their files may say that they are.
    """

    host: str
    rows: tuple[Indexed, ...]
    requests: tuple[Request, ...]
    owners: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def owners_of(self, id: str) -> tuple[str, ...]:
        """Return the hosts from which a run may be claimed."""
        return (self.host, *self.owners.get(id, ()))

    def encode(self) -> bytes:
        """Return the object."""
        return json.dumps(
            {
                "host": self.host,
                "rows": [asdict(row) for row in self.rows],
                "requests": [asdict(item) for item in self.requests],
                "owners": self.owners,
            },
            ensure_ascii=False,
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> Part:
        """Read an object. Raises `ValueError`, or `BadId`: it is none."""
        try:
            fields = json.loads(data)
            part = cls(
                check_id(fields["host"]),
                tuple(Indexed(**row) for row in fields["rows"]),
                tuple(Request(**item) for item in fields["requests"]),
                {str(id): tuple(check_id(host) for host in hosts) for id, hosts in fields["owners"].items()},
            )
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"no part of a host's runs: {error}") from error
        for row in part.rows:
            check_id(row.id, longest=200)
        for item in part.requests:
            check_id(item.instance, longest=200)
        return part


def parts(host: str, rows: Iterable[Indexed], requests: Mapping[str, list[Request]], owners: Mapping[str, tuple[str, ...]]) -> list[Part]:
    """Cut what one heir gets into objects of about a mebibyte; a run and what waits for it stay together. `requests`: by run, also those for runs of other hosts."""
    left = dict(requests)
    whole: list[tuple[tuple[Indexed, ...], tuple[Request, ...]]] = [((row,), tuple(left.pop(row.id, ()))) for row in rows]
    whole += [((), tuple(items)) for items in left.values()]
    found: list[Part] = []
    some: list[Indexed] = []
    waiting: list[Request] = []
    size = 0

    def cut() -> None:
        if some or waiting:
            found.append(Part(host, tuple(some), tuple(waiting), {row.id: owners[row.id] for row in some if row.id in owners}))
            some.clear()
            waiting.clear()

    for its_rows, its_requests in whole:
        more = 500 * len(its_rows) + sum(len(item.body) + 500 for item in its_requests)
        if size + more > PART_BYTES:
            cut()
            size = 0
        some += its_rows
        waiting += its_requests
        size += more
    cut()
    return found
