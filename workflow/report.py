"""The hosts of a root as a table and as JSON: who lives, what each has to do, what was taken over. Reads the bucket alone."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from replicator import open_client
from replicator.errors import LeaseError
from replicator.lease import read_lock
from workflow.handing import Handed, HostRecords
from workflow.membership import GONE, HostRecord
from workflow.ownership import below

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FleetLook", "HostLook", "look", "table"]


@dataclass(frozen=True, slots=True)
class HostLook:
    """A host as it was seen. `lease`: "held", "expired" or "released", as far as the wall clock of whoever looks can tell; "none", "unreadable"."""

    record: HostRecord
    lease: str
    owner: str
    generation: int
    lease_left_s: float | None
    age_s: float | None
    handed: int

    @property
    def next_wake(self) -> str | None:
        """When the first of its waiting runs is due."""
        return min((wake for _, wake in self.record.shards.values() if wake is not None), default=None)

    def facts(self) -> dict[str, Any]:
        """Return what is shown as JSON."""
        return asdict(self.record) | {
            "lease": self.lease, "owner": self.owner, "lease_generation": self.generation, "lease_left_s": self.lease_left_s,
            "age_s": self.age_s, "handed": self.handed, "unfinished": self.record.unfinished, "next_wake": self.next_wake,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class FleetLook:
    """All hosts of a root. `unmarked`: those that joined no fleet, and hold runs all the same."""

    url: str
    at: str
    hosts: tuple[HostLook, ...]
    unmarked: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return what is shown as JSON."""
        return {"url": self.url, "at": self.at, "hosts": [host.facts() for host in self.hosts], "outside": list(self.unmarked)}


def look(url: str, now: datetime | None = None) -> FleetLook:
    """Look at all hosts: two LISTs, and two GETs for each host.

    Args:
        url: the root.
        now: the wall clock, for tests.

    Raises:
        ConfigError: a malformed URL.
        StorageError: it cannot be read.
    """
    now = now or datetime.now(UTC)
    with contextlib.closing(HostRecords(url)) as records, contextlib.closing(Handed(url)) as handed:
        heirs, found, outside = set(handed.heirs()), [], []
        for name in sorted(records.versions()):
            record = records.read(name)
            if record is None:
                outside.append(name)
            else:
                found.append(_looked_at(url, record, len(handed.names(name)) if name in heirs else 0, now))
        shown = url.partition("?")[0]
    return FleetLook(shown, now.isoformat(), tuple(found), tuple(outside))


def _looked_at(url: str, record: HostRecord, handed: int, now: datetime) -> HostLook:
    age_s = round((now - datetime.fromisoformat(record.at)).total_seconds(), 1)
    with contextlib.closing(open_client(below(url, f"_hosts/{record.host}"))) as client:
        try:
            found = read_lock(client)
        except LeaseError:
            return HostLook(record, "unreadable", "", 0, None, age_s, handed)
    if found is None:
        return HostLook(record, "none", "", 0, None, age_s, handed)
    lock = found[1]
    left_s = round(lock.expires_at - now.timestamp(), 1)
    state = "released" if lock.released else "held" if left_s > 0 else "expired"
    return HostLook(record, state, lock.owner, lock.generation, left_s if state == "held" else None, age_s, handed)


COLUMNS = (
    "host", "state", "lease", "left", "seen", "token", "running", "waiting", "paused", "queued", "in memory", "places", "next wake", "handed", "taken over",
)  # fmt: skip


def row(host: HostLook) -> list[str]:
    """Return a host's cells."""
    record = host.record
    state = record.state if record.state != GONE else f"gone, by {record.by}" + (f", {record.left} left" if record.left else "")
    counts = [str(record.counts.get(status, 0)) for status in ("running", "waiting", "paused", "queued")]
    left = f"{host.lease_left_s:.0f}s" if host.lease_left_s is not None else ""
    seen = f"{host.age_s:.0f}s ago" if host.age_s is not None else ""
    taken = ", ".join(f"{item.host} ({item.runs})" for item in record.takeovers[-3:])
    if record.taken_over > 3:
        taken = f"{record.taken_over}: ... {taken}"
    return [
        record.host, state, host.lease, left, seen, str(host.generation), *counts, str(record.active), str(record.places), host.next_wake or "",
        str(host.handed or ""), taken,
    ]  # fmt: skip


def table(found: FleetLook) -> Table:
    """Return the table."""
    from rich.table import Table

    living = sum(host.record.state != GONE for host in found.hosts)
    runs = sum(host.record.unfinished for host in found.hosts)
    title = f"{found.url}: {living} hosts, {runs} unfinished runs" + (
        f"; outside the fleet: {', '.join(found.unmarked)}" if found.unmarked else ""
    )
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        made.add_column(
            column, no_wrap=True, justify="left" if column in ("host", "state", "lease", "taken over", "next wake") else "right"
        )
    for host in found.hosts:
        made.add_row(*row(host), style="dim" if host.record.state == GONE else "red" if host.lease != "held" else "")
    return made
