"""The loop that asynchronous clients share."""

from __future__ import annotations

import asyncio
import threading

import pytest

from replicator.storage.background import Background


def test_all_share_one_loop_that_ends_with_the_last() -> None:
    before = set(threading.enumerate())
    first, second = Background(), Background()

    async def where() -> int:
        return id(asyncio.get_running_loop())

    assert first.run(where(), timeout_s=5) == second.run(where(), timeout_s=5)
    first.close()
    first.close()
    assert second.run(where(), timeout_s=5)
    second.close()
    assert set(threading.enumerate()) <= before


def test_a_step_that_takes_too_long_is_cancelled() -> None:
    background, ended = Background(), threading.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        background.run(slow(), timeout_s=0.01)
    assert ended.wait(5)
    background.close()


def test_what_a_library_cancels_is_a_lost_connection() -> None:
    background = Background()

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(ConnectionError):
        background.run(cancelled(), timeout_s=5)
    background.close()


def test_a_closed_one_runs_nothing() -> None:
    background = Background()
    background.close()
    with pytest.raises(RuntimeError, match="closed"):
        background.run(asyncio.sleep(0), timeout_s=5)


def test_what_still_runs_is_cancelled_at_the_end() -> None:
    background, ended = Background(), threading.Event()

    async def leave_behind() -> None:
        async def forever() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()

        tasks.append(asyncio.create_task(forever()))
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    background.run(leave_behind(), timeout_s=5)
    background.close()
    assert ended.is_set()
