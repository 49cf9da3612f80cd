"""The protocol of leases, claims and appends, simulated: it holds, and each of seven mutants of it is caught."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from replicator import lease as lease_module
from replicator.errors import StorageUnavailable
from replicator.format.ltx import TXID
from replicator.replica import Replica
from replicator.testing.scheduler import Scheduler
from replicator.testing.simulation import Process, Violation, simulate

STEPS = 25_000


@pytest.mark.fault("F44", "F46")
@pytest.mark.parametrize("seed", range(1, 5))
def test_nothing_breaks_the_protocol(seed):
    report = simulate(seed, STEPS)
    assert report.steps >= STEPS
    assert report.acknowledged > 200
    assert report.owners > 3
    assert report.takeovers_s
    # Of each kind of trouble there was some.
    assert min(report.crashes, report.pauses, report.lost_messages, report.late_messages, report.merged) > 0


@pytest.mark.fault("F44", "F46")
@pytest.mark.scheduled
@pytest.mark.timeout(3600)
def test_nothing_breaks_the_protocol_in_a_million_events():
    steps, requests = 0, 0
    for seed in range(1000, 1020):
        report = simulate(seed, 50_000)
        steps, requests = steps + report.steps, requests + report.requests
    assert steps >= 1_000_000
    assert requests > 100


def test_a_seed_repeats_its_run():
    assert simulate(42, 4_000) == simulate(42, 4_000)


# -- mutants ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def skip_the_claim() -> Iterator[None]:
    """An owner by the lease alone: its first append is that of its first transaction."""

    with patch.object(Process, "_append_claim", lambda self, task, lease, replica: TXID(replica.txid + 1)):
        yield


@contextlib.contextmanager
def trust_the_local_clock() -> Iterator[None]:
    """The stored deadline against one's own wall clock."""

    def wait_s(sighting, now, predecessors=()):
        record = sighting.record
        return 0.0 if record.released or record.instance in predecessors else max(0.0, record.expires_at - now.wall)

    with patch.object(lease_module, "wait_s", wait_s):
        yield


@contextlib.contextmanager
def retry_blindly_after_a_timeout() -> Iterator[None]:
    """A name that is taken is one's own, stored by the try whose reply was lost."""
    with patch.object(Replica, "_holds", lambda self, file: True):
        yield


@contextlib.contextmanager
def no_reread_after_sleep() -> Iterator[None]:
    """After a pause everything goes on as if there had been none."""
    with patch.object(Replica, "_make_sure", lambda self, own: None):
        yield


@contextlib.contextmanager
def lease_without_append() -> Iterator[None]:
    """The lease decides, and files are written over whatever is there."""

    def store(self, file):
        self.client.put(file.level, file.min_txid, file.max_txid, file.body, timestamp_ms=file.timestamp_ms)

    with patch.object(Replica, "_store", store):
        yield


@contextlib.contextmanager
def acknowledge_before_it_is_stored() -> Iterator[None]:
    """A request that was sent will arrive."""
    original = Replica.store

    def store(self, files, txid):
        try:
            original(self, files, txid)
        except StorageUnavailable:
            self.txid = max(self.txid, txid)

    with patch.object(Replica, "store", store):
        yield


@contextlib.contextmanager
def claim_without_another_look_at_the_lease() -> Iterator[None]:
    """What the clock says is enough, although the replica was read since."""
    with patch.object(Process, "_reassure", lambda self, lease: None):
        yield


# What each one breaks, and a seed that notices it soon. (The others are tried, too: a change of the protocol changes all runs.)
MUTANTS = {
    skip_the_claim: (120, ("exclusive", "complete")),
    trust_the_local_clock: (65, ("patient",)),
    retry_blindly_after_a_timeout: (64, ("one writer", "nothing lost")),
    no_reread_after_sleep: (14, ("one writer", "nothing lost", "exclusive")),
    lease_without_append: (64, ("one writer", "nothing lost")),
    claim_without_another_look_at_the_lease: (238, ("exclusive",)),
    acknowledge_before_it_is_stored: (58, ("nothing lost", "one writer")),
}


def first_violation(seeds) -> str:
    """What the first seed that notices something says has broken."""
    for seed in seeds:
        try:
            simulate(seed, 10_000)
        except Violation as violation:
            return str(violation).partition(":")[0]
    raise AssertionError("no seed has noticed it")


@pytest.mark.fault("F65")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_of_the_protocol_is_caught(mutant):
    seed, breaks = MUTANTS[mutant]
    with mutant():
        assert first_violation((seed, *range(1, 81))) in breaks


# -- the scheduler ---------------------------------------------------------------------------------------------------------------


def test_tasks_run_one_at_a_time_in_virtual_time():
    scheduler, seen = Scheduler(), []

    def count(name, pause):
        def run(task):
            for _ in range(3):
                task.sleep(pause)
                seen.append((name, scheduler.now))

        return run

    scheduler.start(count("slow", 2.0))
    scheduler.start(count("quick", 1.0))
    scheduler.run(until=10.0)
    assert seen == [("quick", 1.0), ("slow", 2.0), ("quick", 2.0), ("quick", 3.0), ("slow", 4.0), ("slow", 6.0)]
    assert scheduler.now == 10.0


def test_a_killed_task_ends_where_it_is_and_an_error_in_one_is_raised():
    scheduler, ended = Scheduler(), []

    def waits(task):
        try:
            task.suspend()
        finally:
            ended.append(True)

    def fails(task):
        task.sleep(1.0)
        raise ValueError("as it should")

    task = scheduler.start(waits)
    scheduler.start(fails)
    with pytest.raises(ValueError, match="as it should"):
        scheduler.run(until=5.0)
    assert not ended
    task.kill()
    assert ended == [True]
    assert task.is_dead
