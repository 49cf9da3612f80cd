"""Jobs of many databases: none that hangs holds up the others."""

from __future__ import annotations

import threading
import time

from replicator.pool import Pool


def test_what_hangs_does_not_count_after_a_while() -> None:
    pool, release, done = Pool("test", at_once=2, stuck_s=0.05), threading.Event(), threading.Event()
    for _ in range(2):
        pool.submit(lambda: release.wait(20))
    end = time.monotonic() + 10
    while pool.room() < 2:  # both places are free again
        assert time.monotonic() < end
        time.sleep(0.005)
    pool.submit(done.set)
    assert done.wait(10)
    release.set()


def test_threads_have_a_bound_whatever_happens() -> None:
    pool, release = Pool("test", at_once=2, most=3, stuck_s=0.0), threading.Event()
    for left in (3, 2, 1):
        assert pool.room() == min(2, left)
        begun = threading.Event()
        pool.submit(lambda begun=begun: (begun.set(), release.wait(20)))  # type: ignore[misc]
        assert begun.wait(10)
        time.sleep(0.001)  # longer than a job may take before it counts as stuck
    assert pool.room() <= 0
    release.set()


def test_a_thread_is_used_again() -> None:
    pool, names = Pool("test", at_once=4), set[int]()
    for _ in range(20):
        done = threading.Event()
        pool.submit(lambda done=done: (names.add(threading.get_ident()), done.set()))  # type: ignore[misc]
        assert done.wait(10)
        while pool.room() < 4:
            time.sleep(0.001)
    assert len(names) <= 4
