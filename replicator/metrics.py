"""Metrics, on prometheus_client. Imported only where something is measured: the package costs a tenth of a second.

What a store's databases are doing is read when somebody asks, so that measuring costs nothing in between. `litestream_*` are the peer's names and
labels, for the dashboards that people have (specification 0.5, section 6); `pyrepl_*` are ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from replicator.losses import BOUNDS_S as LOSS_BOUNDS_S

if TYPE_CHECKING:
    from replicator.storage.measured import Operations
    from replicator.store import Member, Store

__all__ = ["DRILLS", "DRILL_OK", "DRILL_SECONDS", "DRILL_TIME", "renderer"]

DRILLS = Counter("pyrepl_verify", "Drill restores, by result.", ["db", "replica", "result"])
DRILL_OK = Gauge("pyrepl_verify_ok", "1 when the last drill restore was healthy and was what had been replicated.", ["db", "replica"])
DRILL_TIME = Gauge("pyrepl_verify_timestamp_seconds", "When the last drill ended, since 1970.", ["db", "replica"])
DRILL_SECONDS = Gauge("pyrepl_verify_duration_seconds", "How long the last drill took.", ["db", "replica"])

# The library ends the names of counters in _total, which the peer does not do for these.
_BARE = re.compile(rb"^(# (?:HELP|TYPE) litestream_(?:\w+_(?:count|seconds)|total_wal_bytes|replica_operation_bytes))_total ", re.MULTILINE)


Summary = Iterable[tuple[Path, int, int, Mapping[str, int]]]
"""Of each directory: its path, its databases and folders, and paths that are skipped, by reason."""


def renderer(store: Store, operations: Operations, directories: Callable[[], Summary] = tuple) -> Callable[[], bytes]:
    """Return a function that makes the text of `/metrics`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(store, operations, directories))

    def render() -> bytes:
        return _BARE.sub(rb"\1 ", generate_latest(registry)) + generate_latest(REGISTRY)

    return render


class _Collector:
    def __init__(self, store: Store, operations: Operations, directories: Callable[[], Summary]) -> None:
        self._store, self._operations, self._directories = store, operations, directories

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        members = self._store.members()
        yield from _peers(members)
        yield from _ours(members)
        yield from _directories(self._directories())
        yield from _operations(self._operations)


def _counter(name: str, text: str) -> Metric:
    """A counter whose name is taken as it is."""
    return Metric(name, text, "counter")


def _peers(members: list[Member]) -> Iterator[Metric]:
    gauges = {
        name: GaugeMetricFamily(f"litestream_{name}", text, labels=["db"])
        for name, text in (
            ("db_size", "Size of the database file."),
            ("wal_size", "Logical size of the WAL."),
            ("txid", "Newest TXID that was read."),
            ("disk_full", "1 while replication waits for room on the local disk."),
        )
    }
    counters = {
        name: _counter(f"litestream_{name}", text)
        for name, text in (
            ("total_wal_bytes", "Bytes of the LTX files made of the WAL."),
            ("sync_count", "How often the database was looked at."),
            ("sync_error_count", "How often that failed."),
            ("sync_seconds", "Time that it took."),
            ("compaction_verify_error_count", "Compactions that met a stored file which was damaged, or gone."),
            ("checkpoint_count", "Checkpoints that were tried."),
            ("checkpoint_error_count", "Those that could not finish."),
            ("checkpoint_seconds", "Time that they took."),
        )
    }
    raw = GaugeMetricFamily("litestream_l0_retention_files_total", "Raw files, by what retention makes of them.", labels=["db", "status"])
    for member in members:
        replicator, db = member.replicator, str(member.path)
        if replicator is None:
            if member.is_parked:
                gauges["db_size"].add_metric([db], _size(db))
                gauges["txid"].add_metric([db], member.txid)
            continue
        status = replicator.status()
        counts = status.counts
        gauges["db_size"].add_metric([db], _size(db))
        gauges["wal_size"].add_metric([db], status.wal_size_bytes)
        gauges["txid"].add_metric([db], status.txid)
        gauges["disk_full"].add_metric([db], float("staging folder is full" in (status.error or "")))
        plain = {
            "total_wal_bytes": counts.wal_bytes,
            "sync_count": counts.syncs,
            "sync_error_count": counts.sync_errors,
            "sync_seconds": counts.sync_s,
            "compaction_verify_error_count": sum(item.history.unsound for item in status.replicas),
        }
        for name, value in plain.items():
            counters[name].add_sample(f"litestream_{name}", {"db": db}, value)
        if counts.checkpoint_tries:
            tried = {"count": counts.checkpoint_tries, "error_count": counts.checkpoint_failures, "seconds": counts.checkpoint_s}
            for name, value in tried.items():
                counters[f"checkpoint_{name}"].add_sample(f"litestream_checkpoint_{name}", {"db": db, "mode": "PASSIVE"}, value)
        for kind, count in replicator.raw_files().items():
            raw.add_metric([member.path.name, kind], count)
    yield from gauges.values()
    yield from counters.values()
    yield raw


def _ours(members: list[Member]) -> Iterator[Metric]:
    state = GaugeMetricFamily("pyrepl_database_state", "1 for the state that a database is in.", labels=["db", "state"])
    pinned = GaugeMetricFamily("pyrepl_wal_age_seconds", "Age of the oldest frame that no checkpoint has finished.", labels=["db"])
    locked = GaugeMetricFamily("pyrepl_write_lock_max_seconds", "Longest time that writers waited for a checkpoint.", labels=["db"])
    finished = CounterMetricFamily("pyrepl_checkpoints", "Checkpoints after which the WAL begins anew.", labels=["db"])
    queue = GaugeMetricFamily("pyrepl_queue_entries", "TXIDs that are kept until every replica has them.", labels=["db"])
    queued = GaugeMetricFamily("pyrepl_queue_bytes", "Their bytes, in memory and staged on the disk.", labels=["db", "place"])
    synced = GaugeMetricFamily("pyrepl_synced_timestamp_seconds", "All older commits are on every replica, since 1970.", labels=["db"])
    held = GaugeMetricFamily("pyrepl_lease_held", "1 while the database's lease is this process's and in force.", labels=["db"])
    token = GaugeMetricFamily("pyrepl_lease_generation", "Fencing token of the lease's newest known owner.", labels=["db"])
    labels = ["db", "replica"]
    lag = GaugeMetricFamily("pyrepl_replica_lag_seconds", "Age of the oldest commit that a replica lacks.", labels=labels)
    window = HistogramMetricFamily("pyrepl_loss_window_seconds", "How long commits were on this machine alone, at most.", labels=labels)
    recent = GaugeMetricFamily("pyrepl_loss_window_recent_seconds", "The same, of the last TXIDs.", labels=[*labels, "quantile"])
    newest = GaugeMetricFamily("pyrepl_replica_txid", "Newest TXID on a replica.", labels=labels)
    failing = GaugeMetricFamily("pyrepl_replica_failing", "1 while uploads to a replica fail.", labels=labels)
    problems = GaugeMetricFamily("pyrepl_history_problems", "What cannot be done of compaction, images and retention.", labels=labels)
    sent_files = CounterMetricFamily("pyrepl_replica_sent_files", "Files stored on a replica.", labels=labels)
    sent_bytes = CounterMetricFamily("pyrepl_replica_sent_bytes", "Their bytes.", labels=labels)
    retries = CounterMetricFamily("pyrepl_replica_retries", "Tries to store something that failed and came again.", labels=labels)
    history = {
        name: CounterMetricFamily(f"pyrepl_history_{name}", text, labels=labels)
        for name, text in (
            ("compactions", "Files made of those of a lower level."),
            ("snapshots", "Full images taken."),
            ("deleted_files", "Files that retention has deleted."),
            ("failures", "Tries of compaction, images and retention that failed and came again."),
        )
    }
    for member in members:
        replicator, db = member.replicator, str(member.path)
        status = replicator.status() if replicator is not None else None
        now = "degraded" if status is not None and status.state == "degraded" else member.state
        for name in ("waiting", "replicating", "degraded", "parked", "failed", "stopped"):
            state.add_metric([db, name], float(name == now))
        if status is None:
            if member.is_parked:
                if (when := member.synced_at) is not None:
                    synced.add_metric([db], when.timestamp())
                for url in member.urls:  # it has all of them, or would not be parked
                    lag.add_metric([db, url], 0.0)
                    newest.add_metric([db, url], member.txid)
                    failing.add_metric([db, url], float(member.error is not None))
                    problems.add_metric([db, url], sum(text.startswith(f"{url}: ") for text in member.history_problems))
            continue
        pinned.add_metric([db], status.pinned_s)
        locked.add_metric([db], status.max_lock_s)
        finished.add_metric([db], status.checkpoints)
        entries, memory, staged = status.waiting
        queue.add_metric([db], entries)
        queued.add_metric([db, "memory"], memory)
        queued.add_metric([db, "disk"], staged)
        if status.lease is not None:
            held.add_metric([db], float(status.lease.state == "held"))
            token.add_metric([db], status.lease.generation)
        if status.synced_at is not None:
            synced.add_metric([db], status.synced_at.timestamp())
        for item in status.replicas:
            key = [db, item.url]
            lag.add_metric(key, item.lag_s)
            losses = item.loss_window
            if losses.count:
                window.add_metric(key, _buckets(LOSS_BOUNDS_S, losses.slots), losses.total_s)
                for quantile, value in (("0.5", losses.p50_s), ("0.99", losses.p99_s), ("1", losses.max_s)):
                    recent.add_metric([*key, quantile], value)
            newest.add_metric(key, item.txid)
            failing.add_metric(key, float(item.error is not None))
            problems.add_metric(key, len(item.problems))
            sent_files.add_metric(key, item.files_sent)
            sent_bytes.add_metric(key, item.bytes_sent)
            retries.add_metric(key, item.retries)
            done = item.history
            for name, count in zip(history, (done.compactions, done.snapshots, done.deleted, done.failures), strict=True):
                history[name].add_metric(key, count)
    yield from (
        state,
        pinned,
        locked,
        finished,
        queue,
        queued,
        synced,
        held,
        token,
        lag,
        window,
        recent,
        newest,
        failing,
        problems,
        sent_files,
        sent_bytes,
        retries,
    )
    yield from history.values()


def _directories(summary: Summary) -> Iterator[Metric]:
    databases = GaugeMetricFamily("pyrepl_directory_databases", "Databases of a directory.", labels=["dir"])
    folders = GaugeMetricFamily("pyrepl_directory_folders", "Folders of it that are looked at for changes.", labels=["dir"])
    skipped = GaugeMetricFamily("pyrepl_directory_skipped", "Paths in it that are none, or cannot be read.", labels=["dir", "reason"])
    for path, count, watched, reasons in summary:
        databases.add_metric([str(path)], count)
        folders.add_metric([str(path)], watched)
        for reason, number in sorted(reasons.items()):
            skipped.add_metric([str(path), reason], number)
    yield from (databases, folders, skipped)


def _operations(operations: Operations) -> Iterator[Metric]:
    from replicator.storage.measured import BUCKETS_S

    total = CounterMetricFamily("litestream_replica_operation", "Operations on replicas.", labels=["replica_type", "operation"])
    sizes = _counter("litestream_replica_operation_bytes", "Their bytes.")
    times = HistogramMetricFamily(
        "litestream_replica_operation_duration_seconds", "How long they took.", labels=["replica_type", "operation"]
    )
    errors = CounterMetricFamily("litestream_replica_operation_errors", "Those that failed.", labels=["replica_type", "operation", "code"])
    for (backend, kind), item in sorted(operations.kinds().items()):
        total.add_metric([backend, kind], item.count)
        sizes.add_sample("litestream_replica_operation_bytes", {"replica_type": backend, "operation": kind}, item.size_bytes)
        times.add_metric([backend, kind], _buckets(BUCKETS_S, item.slots), item.seconds)
        for code, count in sorted(item.errors.items()):
            errors.add_metric([backend, kind, code], count)
    yield from (total, sizes, times, errors)


def _buckets(bounds: Sequence[float], slots: Sequence[int]) -> list[tuple[str, float]]:
    """Return the buckets of a histogram, each with all that does not exceed its bound."""
    return list(zip([*(f"{bound:g}" for bound in bounds), "+Inf"], map(float, accumulate(slots)), strict=True))


def _size(path: str) -> float:
    try:
        return float(os.stat(path).st_size)
    except OSError:
        return 0.0
