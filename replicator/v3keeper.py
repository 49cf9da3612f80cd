"""Keep the history of one replica of format 0.3: snapshots and retention. What is due is decided by `v3retention.py`."""

from __future__ import annotations

import logging

from replicator.errors import ReplicatorError
from replicator.format.ltx import TXID
from replicator.keeper import Keeper, Task
from replicator.restores import planned_generations
from replicator.v3replica import V3Replica
from replicator.v3retention import due_snapshot, due_v3_retention, expired_v3, spare, untrusted_time

__all__ = ["V3Keeper"]

log = logging.getLogger(__name__)


class V3Keeper(Keeper):
    """As `Keeper`, for a `V3Replica`: no levels, hence nothing to merge."""

    @property
    def progress(self) -> object:
        end = self._v3.end
        return (end.generation, end.index) if end else None

    def _tasks(self) -> list[Task]:
        replica, now = self._v3, self._clock()
        if replica.end is None or not replica.listed:
            return []
        stored, tasks = replica.stored(), []
        if (when := due_snapshot(stored, replica.end.generation, replica.end.index, self.history)) is not None:
            tasks.append(Task(max(when, now + self._wait("snapshot")), "snapshot", self._snapshot))
        if (when := due_v3_retention(stored, replica.end.generation, self.history, now)) is not None:
            tasks.append(Task(max(when, now + self._wait("retention")), "retention", self._retain))
        return tasks

    @property
    def _v3(self) -> V3Replica:
        assert isinstance(self.replica, V3Replica)
        return self.replica

    def _snapshot(self) -> None:
        with self._take_snapshot(TXID(0)) as out:
            self.replica.add(out)
        self.snapshots += 1
        log.info("snapshot complete replica=%s position=%s size=%d", self.replica.url, self.replica.position, out.size)

    def _retain(self) -> None:
        now, replica = self._clock(), self._v3
        self._not_before["retention"] = self._monotonic() + self.history.l0_retention_check_interval_s
        if why := self._clock_jumped(now):
            raise ReplicatorError(f"nothing is deleted: {why}")
        replica.relist()  # others may write here, too
        stored = replica.stored()
        if why := untrusted_time(stored, now):
            raise ReplicatorError(f"nothing is deleted: {why}")
        assert replica.end is not None
        doomed = spare(expired_v3(stored, replica.end.generation, self.history, now), planned_generations(replica.url))
        # Snapshots first: a restore must not find one whose WAL is going.
        replica.delete(doomed.objects)
        for generation in doomed.generations:
            replica.delete([info for info in stored[generation] if info.name.endswith(".snapshot.lz4")])
            replica.delete_generation(generation)
        count = len(doomed.objects) + sum(len(stored[generation]) for generation in doomed.generations)
        self.deleted += count
        log.debug("deleted replica=%s files=%d", replica.url, count)
