"""DECISIONS about a lease: who may take it, who still has it, when to renew. No I/O, no clock of its own.

What a writer knows, and what it may do then:

| it has seen | it may |
|---|---|
| no object | create one: generation 1, or one above the highest it remembers |
| an object marked as released, or of a predecessor that is certainly dead | replace it (If-Match), generation + 1 |
| somebody's object, unchanged for that owner's whole TTL on *its own* steady clock | the same |
| somebody's object, for a shorter time | wait |
| its own object | act for 0.8 TTL after *sending* the request that wrote it; renew each third of the TTL |

Stored deadlines are hints. Neither side compares its wall clock with another's: an owner counts from before its request was sent, an observer from after it
had the reply, each by a clock that nobody sets. So an owner has stopped before an observer begins as long as their clocks run at the same speed
within a fifth. And if all that fails, the appends decide (`replica.py`): the lease says who should write, the append says who did.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from replicator.clock import Moment, longest_s
from replicator.format.lock import LockRecord

__all__ = ["Sighting", "Term", "is_in_force", "renewal_due_in_s", "sighted", "successor", "wait_s"]

MARGIN = 0.2
RENEW_AFTER = 1 / 3


@dataclass(frozen=True, slots=True)
class Sighting:
    """Somebody else's lease object, and since when it was seen unchanged."""

    etag: str
    record: LockRecord
    since: Moment


@dataclass(frozen=True, slots=True)
class Term:
    """Our own lease: the object as it is stored, and when the request that stored it was sent."""

    etag: str
    record: LockRecord
    sent: Moment


def sighted(before: Sighting | None, etag: str, record: LockRecord, now: Moment) -> Sighting:
    """Take note of an object that was read; `now`: when the reply had arrived.

    Somebody who asks for a hand-over changes the object, and not since when its owner has not been heard of.
    """
    if before is None or not ((before.etag, before.record) == (etag, record) or before.record.is_same_write(record)):
        return Sighting(etag, record, now)
    return before if before.etag == etag else replace(before, etag=etag, record=record)


def wait_s(sighting: Sighting, now: Moment, predecessors: Collection[str] = ()) -> float:
    """Return for how long an object must still stay as it is before it may be replaced; 0 for now.

    Args:
        predecessors: instances that are certainly dead.
    """
    record = sighting.record
    if record.released or (record.instance and record.instance in predecessors):
        return 0.0
    return max(0.0, record.ttl_s - (now.steady - sighting.since.steady))


def successor(before: LockRecord | None, *, floor: int, owner: str, instance: str, ttl_s: float, now: Moment) -> LockRecord:
    """Return the first record of a new owner. `floor`: the highest generation that it remembers."""
    generation = max(floor, before.generation if before is not None else 0) + 1
    return LockRecord(generation, now.wall + ttl_s, owner, instance, 1, ttl_s)


def is_in_force(term: Term, now: Moment) -> bool:
    """Say whether an owner may act without asking."""
    return longest_s(term.sent, now) < term.record.ttl_s * (1 - MARGIN)


def renewal_due_in_s(term: Term, now: Moment) -> float:
    """Return when to renew; 0 for now."""
    return max(0.0, term.record.ttl_s * RENEW_AFTER - longest_s(term.sent, now))
