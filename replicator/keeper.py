"""Keep the history of one replica: compaction, full images, retention. What is due is decided by `levels.py` and `retention.py`.

No request is made to find out what is due: the replica's listing was read at the start and is kept up to date. So a database that nobody
writes to costs nothing. The keeper has no thread and never waits; its owner calls `step` when `due` says so.

What cannot be done does not stop replication. It is logged once, shown in `problems`, and tried again later; deletion stops first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from replicator.chain import read_file
from replicator.compactor import compact
from replicator.errors import AccessDenied, CorruptReplica, NonContiguous, ObjectNotFound, ReplicatorError, RestoreError, StorageUnavailable
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, FileInfo
from replicator.levels import Compact, Files, History, due_compactions, due_snapshot, newest_txid
from replicator.outbox import OutFile, Staging
from replicator.plan import plan_restore
from replicator.recent import RecentFiles
from replicator.replica import Replica
from replicator.retention import due_retention, expired_files, safe_to_delete, untrusted_times

__all__ = ["HistoryCounts", "Keeper", "Task"]

RETRY_S = (1.0, 5.0, 15.0, 60.0, 300.0)
DENIED_RETRY_S = 3600.0
CLOCK_JUMP_S = 60.0
CLOCK_PAUSE_S = 600.0

log = logging.getLogger(__name__)

Key = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do: `name` for messages and retries, `due` in seconds since 1970."""

    due: float
    name: str
    run: Callable[[], None]


@dataclass(frozen=True, slots=True)
class HistoryCounts:
    """What was done since the start.

    Attributes:
        compactions, snapshots: files made of others, and full images.
        deleted: files that retention has deleted.
        failures: tries of one of these that failed and come again.
        unsound: compactions that met a stored file which was damaged, or gone.
    """

    compactions: int = 0
    snapshots: int = 0
    deleted: int = 0
    failures: int = 0
    unsound: int = 0


class Keeper:
    """The history of one replica. `due` and `step` are called by one thread."""

    def __init__(
        self,
        replica: Replica,
        history: History,
        *,
        scratch: Staging,
        recent: RecentFiles,
        take_snapshot: Callable[[TXID], AbstractContextManager[OutFile]],
        in_use: Callable[[str], Collection[Key]] = lambda url: (),
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            scratch: folder for results that are too large for memory.
            take_snapshot: gives a full image that is newer than a TXID and that the replica's raw files have reached.
            in_use: the (level, min TXID, max TXID) that restores on this machine have planned, by the replica's URL.
            stopping: True when what is under way must end soon.
            clock, monotonic: seconds; the first since 1970.
        """
        self.replica = replica
        self.history = history
        self.problems: dict[str, str] = {}
        self.compactions = self.snapshots = self.deleted = self.failures = self.unsound = 0
        self._scratch = scratch
        self._recent = recent
        self._take_snapshot = take_snapshot
        self._in_use = in_use
        self._stopping = stopping
        self._clock = clock
        self._monotonic = monotonic
        self._damaged: set[Key] = set()
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._clocks = clock(), monotonic()
        self._is_sound = False
        if not replica.client.can_read:
            log.warning(
                "files cannot be read back without identities, so they are not merged; full images bound them replica=%s", replica.url
            )

    @property
    def progress(self) -> object:
        """Something that changes when the replica has got what may make something due earlier."""
        return self.replica.txid

    @property
    def counts(self) -> HistoryCounts:
        return HistoryCounts(self.compactions, self.snapshots, self.deleted, self.failures, self.unsound)

    def due(self) -> float | None:
        """Return when the next thing is due, in seconds since 1970; None when nothing is before the next upload."""
        return min((task.due for task in self._tasks()), default=None)

    def step(self) -> bool:
        """Do what is due first; False when nothing is due now."""
        tasks = self._tasks()
        now = self._clock()  # after them: what is due at once is due at the time of their making
        task = min((task for task in tasks if task.due <= now), key=lambda task: task.due, default=None)
        if task is None:
            return False
        try:
            task.run()
        except (ReplicatorError, OSError) as error:
            self._failed(task.name, error)
        else:
            self._failures.pop(task.name, None)
            if self.problems.pop(task.name, None):
                log.info("history is kept again replica=%s task=%s", self.replica.url, task.name)
        return True

    def _tasks(self) -> list[Task]:
        """All that will be due without new files. Of what is due at the same time compaction comes first, from the lowest level up."""
        now, files = self._clock(), self._sound(self.replica.listing())
        tasks: list[Task] = []
        for due, compaction in due_compactions(files, self.history, now) if self.replica.client.can_read else ():
            name = f"compaction into level {compaction.level}"
            tasks.append(Task(max(due, now + self._wait(name)), name, partial(self._compact, compaction)))
        if (when := self._snapshot_due(files, now)) is not None:
            tasks.append(Task(max(when, now + self._wait("snapshot")), "snapshot", self._snapshot))
        if self._can_tell_age(files, now) and (when := due_retention(files, self.history, now)) is not None:
            tasks.append(Task(max(when, now + self._wait("retention")), "retention", self._retain))
        return tasks

    def _wait(self, name: str) -> float:
        return max(0.0, self._not_before.get(name, 0.0) - self._monotonic())

    def _sound(self, files: Files) -> Files:
        if not self._damaged:
            return files
        return {level: [info for info in infos if _key(info) not in self._damaged] for level, infos in files.items()}

    def _failed(self, name: str, error: Exception) -> None:
        if self._stopping():
            return  # what was cut short is done by the next start
        self.failures += 1
        count = self._failures[name] = self._failures.get(name, 0) + 1
        delay = DENIED_RETRY_S if isinstance(error, AccessDenied) else RETRY_S[min(count, len(RETRY_S)) - 1]
        self._not_before[name] = max(self._not_before.get(name, 0.0), self._monotonic() + delay)
        if self.problems.get(name) != str(error):
            log.warning("history is not kept replica=%s task=%s error=%r; replication goes on", self.replica.url, name, str(error))
        self.problems[name] = str(error)

    # -- compaction --------------------------------------------------------------------------------------------------------------

    def _compact(self, task: Compact) -> None:
        try:
            done = compact(task.inputs, task.level, self._read, self._scratch)
        except ObjectNotFound:
            self.unsound += 1
            self.replica.relist()  # somebody else deletes here, too
            self._is_sound = False
            self._check_chain()
            raise
        except CorruptReplica as error:
            self.unsound += 1
            self._set_aside(task.inputs, error)
            raise
        size = done.out.size  # while the file is there
        try:
            key = (task.level, done.out.min_txid, done.out.max_txid)
            if key in self._damaged:  # its inputs are still there: it is made again in its own place
                self.replica.client.delete([info for info in self.replica.listing().get(task.level, ()) if _key(info) == key])
            self.replica.add(done.out)
            self._damaged.discard(key)
            if isinstance(done.out.body, bytes):
                self._recent.add(task.level, done.out.min_txid, done.out.max_txid, done.out.body)
        finally:
            done.out.discard()
        self.compactions += 1
        log.debug(
            "compacted replica=%s level=%d min_txid=%016x max_txid=%016x files=%d size=%d",
            self.replica.url, task.level, done.out.min_txid, done.out.max_txid, done.taken, size,
        )  # fmt: skip

    def _read(self, info: FileInfo) -> Iterator[bytes]:
        body = self._recent.get(info)
        for piece in [body] if body is not None else read_file(self.replica.client, info):
            if self._stopping():
                raise StorageUnavailable("replication stops")
            yield piece

    def _set_aside(self, inputs: Iterable[FileInfo], error: CorruptReplica) -> None:
        """Leave a damaged file out from now on."""
        for info in inputs:
            if f"level {info.level} {info.name}" == error.name:
                self._damaged.add(_key(info))
                log.error("stored file is damaged replica=%s level=%d name=%s", self.replica.url, info.level, info.name)
        self._check_chain()

    # -- full images -------------------------------------------------------------------------------------------------------------

    def _check_chain(self) -> None:
        """Find out whether the newest state can be restored. Where it cannot, a full image is due at once, and until then it is a problem."""
        try:
            plan_restore(self._sound(self.replica.listing()))
        except RestoreError as error:
            if self.problems.get("chain") != str(error):
                log.error("the newest state cannot be restored, a full image follows replica=%s error=%r", self.replica.url, str(error))
            self.problems["chain"] = str(error)
        else:
            self.problems.pop("chain", None)

    def _snapshot_due(self, files: Files, now: float) -> float | None:
        if "chain" in self.problems:
            return 0.0  # before everything else
        return due_snapshot(files, self.history, now, head=self.replica.txid)

    def _snapshot(self) -> None:
        broken = "chain" in self.problems
        # A broken chain needs one even where an image of the newest TXID is listed: it is the damaged one then.
        newest = newest_txid(self.replica.listing().get(SNAPSHOT_LEVEL, ()))
        with self._take_snapshot(TXID(min(newest, self.replica.txid - 1)) if broken else newest) as out:
            size = out.size  # while the file is there
            self.replica.add(out)
        self._damaged.discard((SNAPSHOT_LEVEL, out.min_txid, out.max_txid))
        self.snapshots += 1
        log.info("snapshot complete replica=%s txid=%016x size=%d", self.replica.url, out.max_txid, size)
        if broken:
            self._check_chain()

    # -- retention ---------------------------------------------------------------------------------------------------------------

    def _retain(self) -> None:
        now, files = self._clock(), self.replica.listing()
        self._not_before["retention"] = self._monotonic() + self.history.l0_retention_check_interval_s
        if why := self._clock_jumped(now):
            raise ReplicatorError(f"nothing is deleted: {why}")
        doomed = expired_files(files, self.history, now)
        try:
            doomed = safe_to_delete(self._sound(files), doomed, self._in_use(self.replica.url), is_sound=self._is_sound)
            self._is_sound = True
        except NonContiguous as error:
            self._check_chain()
            raise ReplicatorError(f"nothing is deleted, because the chain would be worse: {error}") from error
        if not doomed:
            return
        # Full images first: what leads from an image to later states must not go before it.
        doomed.sort(key=lambda info: (info.level != SNAPSHOT_LEVEL, info.level, info.min_txid))
        self.replica.client.delete(doomed)
        self.replica.forget(doomed)
        self._damaged.difference_update(map(_key, doomed))
        self.deleted += len(doomed)
        log.debug("deleted replica=%s files=%d", self.replica.url, len(doomed))

    def _can_tell_age(self, files: Files, now: float) -> bool:
        """False, and said once, while stored files are dated in the future."""
        why = untrusted_times(files, now) if self.history.retention_enabled else ""
        if why and why != self.problems.get("age"):
            log.warning("nothing is deleted replica=%s reason=%r", self.replica.url, why)
        if why:
            self.problems["age"] = why
        else:
            self.problems.pop("age", None)
        return not why

    def _clock_jumped(self, now: float) -> str:
        """Return a text when the wall clock ran differently from the monotonic one: what is old cannot be told for a while."""
        wall, steady = self._clocks
        jump = (now - wall) - (self._monotonic() - steady)
        self._clocks = now, self._monotonic()
        if abs(jump) < CLOCK_JUMP_S:
            return ""
        self._not_before["retention"] = self._monotonic() + CLOCK_PAUSE_S
        at = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        return f"the clock jumped by {jump:+.0f} s, to {at}; deletion waits {CLOCK_PAUSE_S:.0f} s"


def _key(info: FileInfo) -> Key:
    return info.level, info.min_txid, info.max_txid
