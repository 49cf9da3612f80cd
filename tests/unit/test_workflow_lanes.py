"""Threads beside the event loop, and how their answers come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from replicator.testing import FailNth, Kind
from workflow.lanes import Lanes, Pool, _end_threads
from workflow.recording import go_on

PATIENCE_S = 10.0


def lanes_test(body: Callable[[Lanes], Awaitable[None]]) -> Callable[[], None]:
    """Run a test's body with two lanes."""

    def test() -> None:
        async def run() -> None:
            lanes = Lanes(2)
            try:
                await asyncio.wait_for(body(lanes), PATIENCE_S)
            finally:
                await lanes.close()

        asyncio.run(run())

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


@lanes_test
async def test_a_lane_works_in_order_also_where_it_is_given_more_by_an_answer(lanes: Lanes) -> None:
    lane, order, done = lanes.next(), list[str](), asyncio.Event()

    def more(_: Any, __: BaseException | None) -> None:
        lane.give(end, order.append, "third")

    def end(_: Any, __: BaseException | None) -> None:
        done.set()

    lane.give(more, order.append, "first")
    lane.give(lambda *_: None, order.append, "second")
    await done.wait()
    assert order == ["first", "second", "third"]


@lanes_test
async def test_a_lane_begins_when_the_turn_is_over_with_all_that_it_was_given(lanes: Lanes) -> None:
    lane, began = lanes.next(), threading.Event()
    answer = lane.submit(began.set)
    assert not began.wait(0.05)  # this task is in the way
    await answer
    assert began.is_set()


@lanes_test
async def test_answers_that_have_answers_do_not_keep_others_from_their_turn(lanes: Lanes) -> None:
    others, count = asyncio.Event(), 0

    def again(_: Any, __: BaseException | None) -> None:
        nonlocal count
        count += 1
        if count < 1000 and not others.is_set():
            lanes.answer(again, None, None)

    lanes.answer(again, None, None)
    asyncio.get_running_loop().call_later(0, others.set)
    await others.wait()
    await asyncio.sleep(0.01)
    assert count < 1000


def test_an_answer_that_fails_does_not_take_the_others_along(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        lanes, there = Lanes(1), asyncio.Event()

        def fails(_: Any, __: BaseException | None) -> None:
            raise ValueError("a bug")

        lanes.answer(fails, None, None)
        lanes.answer(lambda *_: there.set(), None, None)
        await asyncio.wait_for(there.wait(), PATIENCE_S)
        await lanes.close()

    asyncio.run(run())
    assert "a bug" in caplog.text


def test_a_body_that_ends_after_the_lanes_writes_into_nobodys_file() -> None:
    async def run() -> list[bytes]:
        lanes = Lanes(1)
        pool = Pool(lanes.answer, asyncio.get_running_loop(), 1, "body")
        ended, gate = threading.Event(), threading.Event()
        work = pool.submit(gate.wait, PATIENCE_S)
        await lanes.close()
        pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(4)]  # the first has the numbers of the pipe that is gone
        pool.give(lambda *_: None, ended.set)
        gate.set()
        assert await asyncio.to_thread(ended.wait, PATIENCE_S)
        pool.close()
        found = []
        for reads, writes in pipes:
            with contextlib.suppress(BlockingIOError):
                found.append(os.read(reads, 10))
            os.close(reads)
            os.close(writes)
        assert not work.done()
        return found

    assert asyncio.run(run()) == []


@lanes_test
async def test_a_pool_makes_a_thread_when_all_it_has_are_at_work_and_no_more_than_it_may(lanes: Lanes) -> None:
    pool = Pool(lanes.answer, asyncio.get_running_loop(), 2, "body")
    for _ in range(5):
        assert await pool.submit(threading.current_thread) is await pool.submit(threading.current_thread)
    gates = [threading.Event() for _ in range(4)]
    begun = [asyncio.Event() for _ in gates]
    loop = asyncio.get_running_loop()

    def body(number: int) -> threading.Thread:
        loop.call_soon_threadsafe(begun[number].set)
        gates[number].wait(PATIENCE_S)
        return threading.current_thread()

    answers = [pool.submit(body, number) for number in range(4)]
    await begun[0].wait()
    await begun[1].wait()
    assert not begun[2].is_set()
    gates[1].set()
    await begun[2].wait()
    assert not answers[0].done()
    for gate in gates:
        gate.set()
    assert len(set(await asyncio.gather(*answers))) == 2
    pool.close()
    with pytest.raises(RuntimeError, match="body: the pool is closed"):
        pool.submit(int)


@lanes_test
async def test_a_process_that_ends_lets_bodies_end(lanes: Lanes) -> None:
    pool, gate, ended = Pool(lanes.answer, asyncio.get_running_loop(), 2, "body"), threading.Event(), list[str]()

    def body() -> None:
        gate.wait(PATIENCE_S)
        ended.append("body")

    def end() -> None:
        _end_threads()
        ended.append("process")

    bodies = [pool.submit(body), pool.submit(body)]
    ending = threading.Thread(target=end)
    ending.start()
    gate.set()
    await asyncio.to_thread(ending.join, PATIENCE_S)
    assert ended == ["body", "body", "process"]
    await asyncio.gather(*bodies)


@lanes_test
async def test_a_task_goes_on_at_once_and_not_in_the_next_turn(lanes: Lanes) -> None:
    wait, seen = asyncio.get_running_loop().create_future(), list[str]()

    async def waits() -> None:
        seen.append(await wait)

    task = asyncio.ensure_future(waits())
    await asyncio.sleep(0)
    left = asyncio.get_running_loop().create_future()

    def answer() -> None:
        go_on(wait, "turn")
        left.set_result(list(seen))

    asyncio.get_running_loop().call_soon(answer)
    assert await left == ["turn"]
    await task


@lanes_test
async def test_who_does_not_wait_as_a_task_is_answered_in_the_next_turn(lanes: Lanes) -> None:
    wait = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(go_on, wait, "turn")
    done, _ = await asyncio.wait({wait})
    assert done == {wait}
    assert await wait == "turn"
    late = asyncio.get_running_loop().create_future()
    go_on(late, "before anybody waits")
    assert await late == "before anybody waits"


@lanes_test
async def test_where_no_thread_can_be_had_those_that_are_there_do_the_work_and_without_any_it_is_an_error(lanes: Lanes) -> None:
    loop, gate = asyncio.get_running_loop(), threading.Event()
    some, none = Pool(lanes.answer, loop, 2, "body"), Pool(lanes.answer, loop, 2, "body")
    first = some.submit(gate.wait, PATIENCE_S)
    with FailNth(0, kinds={Kind.THREADS}, packages=("workflow",), ever=True) as failure:
        second = some.submit(str, "second")
        with pytest.raises(RuntimeError):
            none.submit(str, "none")
    assert len(failure.failed) == 2
    gate.set()
    assert (await first, await second) == (True, "second")
    assert await none.submit(str, "again") == "again"
    some.close()
    none.close()
