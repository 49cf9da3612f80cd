"""The engine, on a virtual clock: what a flow sees, what requests do, what becomes of bad input."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import sampleflows as sample
from workflow import (
    Artifact,
    Cancelled,
    Client,
    Engine,
    Fatal,
    OutcomeUnknown,
    Retry,
    StepFailed,
    barrier,
    flow,
    patched,
    receive,
    send,
    sleep,
    state,
    step,
)
from workflow import intake as ik
from workflow import journal as jr
from workflow.context import flows
from workflow.errors import BadId, Conflict, FolderInUse, MissingObject, NeedsReplica, NotJSON, Refused, RunFailed, Unreadable
from workflow.testing import VirtualClock, replay_recorded, virtual_engine


def engine_test(body: Callable[[Engine], Awaitable[None]]) -> Callable[[Path], None]:
    """Run a test's body with an engine on a virtual clock."""

    def test(tmp_path: Path) -> None:
        async def run() -> None:
            async with virtual_engine(tmp_path) as engine:
                await asyncio.wait_for(body(engine), 20)

        asyncio.run(run())

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


async def status_is(run: Any, wanted: str) -> None:
    async with asyncio.timeout(10):
        while await run.status() != wanted:
            await asyncio.sleep(0.002)


# -- what a flow sees --------------------------------------------------------------------------------------------------------------


def test_outside_a_run_steps_and_flows_are_plain_functions() -> None:
    assert sample.upper("a") == "A"
    assert asyncio.run(sample.add(1, 2)) == 3
    assert asyncio.run(sample.chain(1)) == 11
    assert len(step.key()) == 32
    step.usage(model="none")
    with pytest.raises(RuntimeError, match="flow that an engine runs"):
        sleep(1)


_bodies: list[str] = []
_second = threading.Event()


def _lingers(patience_s: float) -> str:
    """The first attempt ends after its time, or when the second one has begun."""
    number = 1 + sum(text.startswith("begin") for text in _bodies)
    _bodies.append(f"begin {number}")
    if number == 1:
        _second.wait(patience_s)
    else:
        _second.set()
    _bodies.append(f"end {number}")
    return f"attempt {number}"


@step(timeout=0.02, retry=Retry(attempts=20, first=0))
def keeps_its_place() -> str:
    return _lingers(0.2)


@step(timeout=0.02, retry=Retry(attempts=20, first=0), overlap=True)
def gives_way() -> str:
    return _lingers(10)


@flow
async def waits_for_its_thread() -> list[str]:
    return [await keeps_its_place(), await sample.upper("a")]


@flow
async def overlaps() -> list[str]:
    found = await gives_way()
    while "end 1" not in _bodies:
        await sample.slow(0.001)
    return [found, await sample.upper("a")]


@pytest.mark.parametrize("which", [waits_for_its_thread, overlaps], ids=["waits", "overlaps"])
def test_a_plain_body_after_its_time_keeps_its_place_unless_it_may_overlap_and_what_it_returns_late_is_noted_alone(
    which: Callable[..., Any], tmp_path: Path
) -> None:
    _bodies.clear()
    _second.clear()

    async def run() -> None:
        async with virtual_engine(tmp_path) as engine:
            found, _ = await (await engine.start(which, id="it")).result()
            assert found.startswith("attempt ")
            assert found != "attempt 1"

    asyncio.run(run())
    assert [text for text in _bodies if text[-1] == "1"] == ["begin 1", "end 1"]
    assert (_bodies.index("begin 2") < _bodies.index("end 1")) is (which is overlaps)
    columns, rows = jr.rows(tmp_path / "it.db", "wf_attempts")
    (first,) = [dict(zip(columns, row, strict=True)) for row in rows if row[columns.index("attempt")] == 1]
    assert first["outcome"] == "timeout"
    assert first["late"].endswith(" returned")


@flow
async def sees_failure() -> list[str]:
    try:
        await sample.boom("why")
    except StepFailed as error:
        first = f"{error.step}|{error.type_name}|{error.message}|{error.attempts}"
        cause = type(error.__cause__).__name__
    await sleep(100)
    return [first, cause]


@engine_test
async def test_a_failed_step_is_the_same_live_and_on_replay_but_for_its_cause(engine: Engine) -> None:
    run = await engine.start(sees_failure)
    assert await run.result() == ["boom#1|ValueError|why|1", "NoneType"]  # it parked in between: this is the replay's


@flow
async def writes_state_in_the_flow() -> None:
    state["a"] = 1


@flow
async def step_in_a_step() -> int:
    return await outer_step()


@step
async def outer_step() -> int:
    return await sample.add(1, 1)


@flow
async def sleeps_in_a_step() -> None:
    await sleeping_step()


@step
async def sleeping_step() -> None:
    await sleep(1)


@engine_test
async def test_what_belongs_elsewhere_says_so(engine: Engine) -> None:
    with pytest.raises(RunFailed, match="state is written in steps"):
        await (await engine.start(writes_state_in_the_flow)).result()
    with pytest.raises(RunFailed, match="not into the body of a step"):
        await (await engine.start(sleeps_in_a_step)).result()
    run = await engine.start(step_in_a_step)
    assert await run.result() == 2
    assert [record.key for record in await run.steps()] == ["outer_step#1"]


@step(timeout=0.01)
async def hangs() -> None:
    await asyncio.sleep(30)


gate = threading.Event()


@step(timeout=0.01, retry=Retry(attempts=2, first=0))
def hangs_in_thread() -> str:
    gate.wait(0.1)
    return "late"


@step(timeout=0.01, repeat=False)
async def hangs_once() -> None:
    await asyncio.sleep(30)


@flow
async def times_out(which: str) -> str:
    steps = {"task": hangs, "thread": hangs_in_thread, "once": hangs_once}
    try:
        await steps[which]()
    except StepFailed as error:
        return f"{error.type_name} {error.attempts}"
    except OutcomeUnknown:
        return "unknown"
    return "?"


@engine_test
async def test_a_timeout_ends_an_attempt_and_makes_an_unrepeatable_one_unknown(engine: Engine) -> None:
    assert await (await engine.start(times_out, "task")).result() == "TimeoutError 1"
    assert await (await engine.start(times_out, "thread", id="thread")).result() == "TimeoutError 2"
    assert await (await engine.start(times_out, "once", id="once")).result() == "unknown"
    assert [record.status for record in await engine.run("once").steps()] == ["unknown"]
    columns, rows = jr.rows(engine.folder / "thread.db", "wf_attempts")
    assert [row[columns.index("outcome")] for row in rows] == ["timeout", "timeout"]


@flow
async def raced() -> str:
    try:
        async with asyncio.timeout(0.01):
            await sample.slow(30)
    except TimeoutError:
        return "timed out"
    return "?"


@flow
async def raced_by_wait_for() -> str:
    try:
        return await asyncio.wait_for(sample.slow(30), 0.01)
    except TimeoutError:
        return "timed out"


@flow
async def clock_inside_a_body() -> str:
    return await uses_a_clock()


@step
async def uses_a_clock() -> str:
    try:
        async with asyncio.timeout(0.001):
            await asyncio.sleep(30)
    except TimeoutError:
        return "fine"
    return "?"


@engine_test
async def test_a_clock_around_steps_is_an_error_that_says_what_to_use(engine: Engine) -> None:
    for which in (raced, raced_by_wait_for):
        with pytest.raises(RunFailed, match="cannot be replayed; use @step") as error:
            await (await engine.start(which)).result()
        assert error.value.status == "diverged"
    assert await (await engine.start(clock_inside_a_body)).result() == "fine"


@flow
async def transaction_limits() -> list[str]:
    found = []
    for number in range(len(FORBIDDEN)):
        try:
            await forbidden(number)
            found.append("allowed")
        except StepFailed as error:
            found.append(error.type_name)
    return found


FORBIDDEN = (
    "COMMIT",
    "SAVEPOINT a",
    "ATTACH ':memory:' AS other",
    "UPDATE wf_instance SET status = 'done'",
    "DELETE FROM WF_STEPS",
    "CREATE TRIGGER t AFTER INSERT ON wf_steps BEGIN SELECT 1; END",
    "DROP TABLE wf_inbox",
    "CREATE TABLE wf_more(a)",
    "PRAGMA synchronous = OFF",
    "CREATE TABLE mine(a)",
    "INSERT INTO mine VALUES(1)",
)


@step(tx=True)
def forbidden(db: sqlite3.Connection, number: int) -> None:
    db.execute(FORBIDDEN[number])


@engine_test
async def test_a_transaction_step_may_not_touch_what_is_ours(engine: Engine) -> None:
    run = await engine.start(transaction_limits)
    assert await run.result() == ["DatabaseError"] * 9 + ["allowed"] * 2


@step(tx=True, timeout=0.02)
def endless(db: sqlite3.Connection) -> int:
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    return int(db.execute(sql).fetchone()[0])


@flow
async def endless_transaction() -> str:
    try:
        await endless()
    except StepFailed as error:
        return f"{error.type_name} {await sample.book('tea')}"
    return "?"


@engine_test
async def test_a_transaction_that_takes_too_long_is_rolled_back(engine: Engine) -> None:
    assert await (await engine.start(endless_transaction)).result() == "TimeoutError 1"


@step(tx=True)
def books_and_says(db: sqlite3.Connection, what: str) -> int:
    db.execute("CREATE TABLE bookings(what TEXT)")
    step.usage(cost=3)
    return db.execute("INSERT INTO bookings VALUES(?)", (what,)).rowcount


@flow
async def transaction_with_usage() -> int:
    return int(await books_and_says("tea"))


def test_what_a_transaction_used_is_committed_with_it(tmp_path: Path) -> None:
    seen: list[tuple[int, list[tuple[str, str]]]] = []

    def after(id: str, when: str) -> None:
        if when == "after" and id:
            with contextlib.closing(sqlite3.connect(tmp_path / f"{id}.db")) as db:
                (count,) = db.execute("SELECT count(*) FROM wf_steps WHERE kind = 'tx' AND status = 'done'").fetchone()
                seen.append((count, db.execute("SELECT outcome, usage FROM wf_attempts").fetchall()))

    async def run() -> None:
        async with virtual_engine(tmp_path, faults=after) as engine:
            assert await (await engine.start(transaction_with_usage)).result() == 1

    asyncio.run(run())
    assert seen[0] == (1, [("done", '{"cost":3}')])  # its first commit; the next is the run's end


@step
def runs_out() -> int:
    return next(iter(list[int]()))


@flow
async def stops_iteration() -> str:
    try:
        await runs_out()
    except StepFailed as error:
        return f"{error.type_name}: {error.args[0]}"
    return "?"


@engine_test
async def test_a_plain_body_that_raises_what_no_future_takes_has_failed(engine: Engine) -> None:
    assert "RuntimeError" in await (await engine.start(stops_iteration)).result()


@flow
async def races(seconds: list[float]) -> list[str]:
    """What each branch sees of the others becomes input of its next step: on replay that must be the same, or the run diverges."""
    seen: list[int] = []

    async def branch(number: int, wait: float) -> None:
        for _ in range(3):
            await sample.slow(wait)
            seen.append(number)
            await sample.upper(str(seen))

    await asyncio.gather(*(branch(number, wait) for number, wait in enumerate(seconds)))
    late = [asyncio.ensure_future(sample.slow(wait * 50)) for wait in seconds]
    done, _ = await asyncio.wait(late, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait(late)
    await sample.upper(str(len(done)))
    await sleep(60)
    return [await sample.upper(str(seen))]


@engine_test
async def test_races_between_branches_replay_in_the_recorded_order(engine: Engine) -> None:
    for number, seconds in enumerate(([0.0, 0.0, 0.0, 0.0], [0.004, 0.002, 0.001, 0.0], [0.001, 0.0, 0.001, 0.0])):
        run = await engine.start(races, seconds, id=f"race-{number}")
        assert len(await run.result()) == 1


# -- names and values ----------------------------------------------------------------------------------------------------------------


@flow
async def takes_anything(value: Any) -> str:
    return type(value).__name__


@step
async def returns_a_socket() -> object:
    return threading.Lock()


@flow
async def returns_nonsense() -> None:
    await returns_a_socket()


@engine_test
async def test_values_that_are_not_json_are_refused_at_the_call(engine: Engine) -> None:
    for bad in (b"bytes", {1, 2}, float("nan"), object(), datetime(2030, 1, 1)):
        with pytest.raises(NotJSON):
            await engine.start(takes_anything, bad)
    assert await (await engine.start(takes_anything, (1, 2))).result() == "list"
    with pytest.raises(RunFailed, match="NotJSON") as error:
        await (await engine.start(returns_nonsense)).result()
    assert "returns_a_socket" in str(error.value)


@engine_test
async def test_hostile_ids_are_refused(engine: Engine) -> None:
    for bad in ("", ".", "..", "../x", "a/b", "a\0", "a b", "x" * 121, "-a", "a.db", "a-wal", "ä"):
        with pytest.raises(BadId):
            await engine.start(sample.one_step, id=bad)
        if len(bad) < 100:  # ids of children are longer
            with pytest.raises(BadId):
                engine.run(bad)
    assert os.listdir(engine.folder) == [".host"]


@engine_test
async def test_an_id_is_one_run_and_other_input_is_a_conflict(engine: Engine) -> None:
    first, second = await asyncio.gather(engine.start(sample.chain, 1, id="same"), engine.start(sample.chain, 1, id="same"))
    assert await first.result() == await second.result() == 11
    other = await engine.start(sample.chain, 2, id="same")
    with pytest.raises(Conflict, match="same"):
        await other.result()
    assert await first.result() == 11


@flow
async def missing_artifact() -> int:
    report = await sample.render((1 << 20) + 1)
    await receive("go")
    return await sample.measure(report)


@engine_test
async def test_a_missing_or_damaged_artifact_is_a_loud_error(engine: Engine) -> None:
    for number, damage in enumerate((lambda path: path.unlink(), lambda path: path.write_bytes(b"other"))):
        run = await engine.start(missing_artifact, id=f"run-{number}")
        await status_is(run, "waiting")
        (path,) = (engine.folder / ".objects" / run.id).iterdir()
        damage(path)
        await run.send("go")
        with pytest.raises(RunFailed, match=r"MissingObject.*missing or damaged"):
            await run.result()


def test_an_artifact_belongs_to_a_run() -> None:
    with pytest.raises(MissingObject):
        Artifact("0" * 64, 1, "text/plain").read()


@engine_test
async def test_replicated_steps_need_a_replica_at_the_start(engine: Engine) -> None:
    with pytest.raises(NeedsReplica):
        await engine.start(sample.one_step, durability="replicated")
    with pytest.raises(NeedsReplica, match="step careful_step"):
        await engine.start(uses_careful_step)
    with pytest.raises(RunFailed, match="NeedsReplica"):
        await (await engine.start(uses_barrier)).result()


@step(durability="replicated")
async def careful_step() -> None: ...


@flow
async def uses_careful_step() -> None:
    await careful_step()


@flow
async def uses_barrier() -> None:
    await barrier()


# -- waiting, parking, requests --------------------------------------------------------------------------------------------------------


@engine_test
async def test_parked_runs_hold_no_file_and_come_back(engine: Engine) -> None:
    runs = [await engine.start(sample.waits, id=f"run-{number}") for number in range(20)]
    for run in runs:
        await status_is(run, "waiting")
    open_files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    assert not [name for name in open_files if "run-" in name]
    for run in runs:
        await run.send("approval", True)
    assert {await run.result() for run in runs} == {"True DONE"}


@engine_test
async def test_requests_for_unknown_and_ended_runs_are_refused_on_the_record(engine: Engine) -> None:
    with pytest.raises(Refused, match="there is no such run"):
        await engine.run("nobody").send("approval", True)
    run = await engine.start(sample.one_step, id="over")
    await run.result()
    with pytest.raises(Refused, match="the run is done"):
        await run.send("approval", True)
    await run.cancel()
    await run.pause()
    assert await run.status() == "done"
    with contextlib.closing(sqlite3.connect(engine.folder / ".host" / "intake.db")) as db:
        rows = db.execute("SELECT instance, kind, reason FROM wf_refused ORDER BY instance").fetchall()
    assert rows == [("nobody", "event", "there is no such run"), ("over", "event", "the run is done")]
    with pytest.raises(ValueError, match="not a type"):
        await run.send("child:x", True)


@engine_test
async def test_an_event_sent_twice_under_an_id_comes_once(engine: Engine) -> None:
    run = await engine.start(sample.asks_twice)
    for _ in range(3):
        await run.send("number", 1, id="one")
    await status_is(run, "waiting")
    await run.send("number", 2, id="two")
    assert await run.result() == [1, 2, 3]


@engine_test
async def test_pause_holds_timers_and_events_until_resume(engine: Engine) -> None:
    run = await engine.start(sample.waits)
    await status_is(run, "waiting")
    await run.pause()
    await status_is(run, "paused")
    await run.send("approval", True)
    await asyncio.sleep(0.05)
    assert await run.status() == "paused"
    await run.resume()
    assert await run.result() == "True DONE"


def test_a_pause_that_the_index_does_not_know_yet_holds_after_a_crash(tmp_path: Path) -> None:
    async def first() -> None:
        async with virtual_engine(tmp_path) as engine:
            run = await engine.start(sample.waits, id="it")
            await status_is(run, "waiting")
            await run.pause()
            await status_is(run, "paused")

    async def second() -> str:
        async with virtual_engine(tmp_path) as engine:
            await status_is(engine.run("it"), "paused")
            await engine.run("it").send("approval", True)
            await engine.run("it").resume()
            return str(await engine.run("it").result())

    asyncio.run(first())
    with contextlib.closing(sqlite3.connect(tmp_path / ".host" / "intake.db")) as db:
        db.execute("UPDATE wf_index SET status = 'running'")
        db.commit()
    assert asyncio.run(second()) == "True DONE"


@engine_test
async def test_cancel_wakes_a_parked_run_and_lets_it_clean_up(engine: Engine) -> None:
    run = await engine.start(sample.cleans_up)
    await status_is(run, "waiting")
    await run.cancel()
    with pytest.raises(RunFailed) as error:
        await run.result()
    assert error.value.status == "cancelled"
    assert [record.input for record in await run.steps() if record.name == "upper"] == ['{"text":"cleaning"}', '{"text":"finally"}']


@flow(grace=0.0)
async def clings() -> None:
    try:
        await receive("never")
    finally:
        await sample.slow(20)


@engine_test
async def test_after_the_grace_a_cancelled_run_is_ended(engine: Engine) -> None:
    run = await engine.start(clings)
    await status_is(run, "waiting")
    await run.cancel()
    with pytest.raises(RunFailed, match="cancelled"):
        await run.result()


@flow
async def parent_of_waiting() -> str:
    return await sample.waits()


@engine_test
async def test_cancelling_a_parent_cancels_its_children(engine: Engine) -> None:
    run = await engine.start(parent_of_waiting, id="top")
    await status_is(run, "waiting")
    child = engine.run("top.waits-1")
    await status_is(child, "waiting")
    await run.cancel()
    for handle in (run, child):
        with pytest.raises(RunFailed, match="cancelled"):
            await handle.result()


@flow
async def sees_cancel() -> str:
    try:
        await receive("never")
    except Cancelled:
        return "went on"
    return "?"


@engine_test
async def test_a_run_may_return_after_it_was_cancelled(engine: Engine) -> None:
    run = await engine.start(sees_cancel)
    await status_is(run, "waiting")
    await run.cancel()
    assert await run.result() == "went on"


class JumpingClock(VirtualClock):
    def jump(self, by: timedelta) -> None:
        """Set the wall clock; the monotonic one does not hear of it."""
        self._start += by


def test_a_jump_of_the_clock_forward_ends_no_sleep_in_a_living_process_and_all_that_are_due_after_a_restart(tmp_path: Path) -> None:
    async def first() -> None:
        clock = JumpingClock()
        async with Engine(tmp_path, clock=clock, park_after_s=0, synchronous="OFF") as engine:
            run = await engine.start(sample.sleeps, id="it")  # three days, then a minute
            await status_is(run, "waiting")
            clock.jump(timedelta(days=3650))
            engine.timers.fire()
            assert [record.status for record in await run.steps()] == ["waiting"]
            clock.advance(3 * 86400.0)
            engine.timers.fire()
            async with asyncio.timeout(60):
                while len(await run.steps()) < 3 or await run.status() != "waiting":  # the second sleep
                    await asyncio.sleep(0.002)
            clock.jump(timedelta(days=3650))
            engine.timers.fire()
            assert [record.status for record in await run.steps()] == ["done", "done", "waiting"]

    async def second() -> None:
        clock = VirtualClock(datetime(2060, 1, 1, tzinfo=UTC))
        async with Engine(tmp_path, clock=clock, synchronous="OFF") as engine:
            engine.timers.fire()
            assert await asyncio.wait_for(engine.run("it").result(), 60) == "AB"

    asyncio.run(first())
    asyncio.run(second())


def test_a_jump_of_the_clock_back_never_makes_a_sleep_longer_than_it_was(tmp_path: Path) -> None:
    async def first() -> None:
        clock = VirtualClock(datetime(2030, 6, 1, tzinfo=UTC))
        async with Engine(tmp_path, clock=clock, park_after_s=0, synchronous="OFF") as engine:
            await status_is(await engine.start(sample.sleeps, id="it"), "waiting")

    async def second() -> None:
        clock = VirtualClock(datetime(2020, 1, 1, tzinfo=UTC))  # ten years back; the first sleep was three days
        async with Engine(tmp_path, clock=clock, park_after_s=0, synchronous="OFF") as engine:
            run = engine.run("it")
            await status_is(run, "waiting")
            for _ in range(200):
                await asyncio.sleep(0.005)
                if clock.now() - datetime(2020, 1, 1, tzinfo=UTC) > timedelta(days=4) or await run.status() == "done":
                    break
                clock.advance(3600)
                engine.timers.fire()
            await asyncio.wait_for(run.result(), 5)

    asyncio.run(first())
    asyncio.run(second())


# -- limits ----------------------------------------------------------------------------------------------------------------------------

_inside, _most = 0, 0


@step
async def busy() -> None:
    global _inside, _most
    _inside += 1
    _most = max(_most, _inside)
    await asyncio.sleep(0.005)
    _inside -= 1


@flow(concurrency=2)
async def narrow() -> None:
    await busy()


order: list[int] = []


@step
async def note_order(number: int) -> None:
    order.append(number)


@flow(concurrency=1)
async def in_order(number: int) -> None:
    await note_order(number)


@flow(rate=(2, 60.0))
async def slowly(number: int) -> None:
    await note_order(number)


@engine_test
async def test_concurrency_priority_and_rate_of_a_flow_hold(engine: Engine) -> None:
    runs = [await engine.start(narrow) for _ in range(10)]
    for run in runs:
        await run.result()
    assert _most == 2
    order.clear()
    blocker = await engine.start(in_order, 0)
    runs = [blocker, *[await engine.start(in_order, number, priority=number) for number in (1, 3, 2)]]
    for run in runs:
        await run.result()
    assert order[-2:] in ([2, 1], [1, 2])
    assert order.index(3) < order.index(2)
    order.clear()
    runs = [await engine.start(slowly, number) for number in range(5)]
    began = engine.timers.clock.monotonic()
    for run in runs:
        await run.result()
    assert [set(order[:2]), set(order[2:4]), order[4]] == [{0, 1}, {2, 3}, 4]
    assert engine.timers.clock.monotonic() - began >= 120


@engine_test
async def test_places_that_are_kept_for_runs_of_one_flow_are_not_taken_from_another(engine: Engine) -> None:
    engine._reserved["narrow"] = 1  # as while its runs are taken from the queue
    try:
        assert engine._has_place(flows["in_order"])
        engine._reserved["in_order"] = 1
        assert not engine._has_place(flows["in_order"])
        engine._reserved["in_order"] = 0
        engine._reserved["narrow"] = engine._concurrency
        assert not engine._has_place(flows["in_order"])
    finally:
        engine._reserved.clear()


@flow(concurrency=1)
async def waits_alone() -> None:
    await receive("go")


def test_a_run_that_has_not_begun_has_no_steps(tmp_path: Path) -> None:
    async def run() -> None:
        async with Engine(tmp_path, park_after_s=3600.0) as engine:
            await status_is(await engine.start(waits_alone, id="first"), "running")
            second = await engine.start(waits_alone, id="second")
            assert not (tmp_path / "second.db").exists()
            assert await second.steps() == await Client(tmp_path).run("second").steps() == []
            async with asyncio.timeout(10):
                while await engine._intake.do(lambda db: ik.is_to_begin(db, "first")):
                    await asyncio.sleep(0.002)
            (tmp_path / "first.db").unlink()  # a file that was there and is missing is another matter
            for desk in (engine, Client(tmp_path)):
                with pytest.raises(Unreadable):
                    await desk.run("first").steps()

    asyncio.run(run())


# -- crashes, damage, change -------------------------------------------------------------------------------------------------------------


def test_an_unrepeatable_step_that_a_crash_cut_short_is_unknown_for_good(tmp_path: Path) -> None:
    async def crashing() -> None:
        engine = await Engine(tmp_path, synchronous="OFF").__aenter__()
        await engine.start(crashes_in_careful, id="it")
        await asyncio.wait_for(began.wait(), 5)
        await engine.crash()

    async def resumed() -> list[str]:
        async with virtual_engine(tmp_path) as engine:
            return list(await engine.run("it").result())

    began = _began = asyncio.Event()
    _events["began"] = _began
    asyncio.run(crashing())
    assert asyncio.run(resumed()) == ["unknown", "unknown"]


_events: dict[str, asyncio.Event] = {}


@step(repeat=False)
async def cut_short() -> None:
    _events["began"].set()
    await asyncio.sleep(30)


@flow
async def crashes_in_careful() -> list[str]:
    found = []
    try:
        await cut_short()
    except OutcomeUnknown:
        found.append("unknown")
    await sleep(60)  # parks: what follows is a replay
    return found * 2


def test_a_poisoned_run_is_quarantined_and_the_rest_go_on(tmp_path: Path) -> None:
    async def crashing() -> None:
        engine = await Engine(tmp_path, synchronous="OFF").__aenter__()
        _events["began"] = asyncio.Event()
        await engine.start(poison, id="poison")
        await asyncio.wait_for(_events["began"].wait(), 5)
        await engine.crash()

    for _ in range(5):
        asyncio.run(crashing())

    async def last() -> str:
        async with virtual_engine(tmp_path) as engine:
            assert await (await engine.start(sample.one_step)).result() == 3
            with pytest.raises(RunFailed, match="5 times"):
                await engine.run("poison").result()
            return await engine.run("poison").status()

    assert asyncio.run(last()) == "quarantined"


@step
async def takes_the_process_down() -> None:
    _events["began"].set()
    await asyncio.sleep(30)


@flow
async def poison() -> None:
    await takes_the_process_down()


@pytest.mark.parametrize("damage", ["garbage", "foreign", "newer", "missing"])
def test_a_file_that_cannot_be_read_is_quarantined_alone(damage: str, tmp_path: Path) -> None:
    async def first() -> None:
        async with virtual_engine(tmp_path) as engine:
            for id in ("bad", "good"):
                await status_is(await engine.start(sample.waits, id=id), "waiting")

    async def second() -> str:
        async with virtual_engine(tmp_path) as engine:
            for id in ("bad", "good"):
                await engine.run(id).send("approval", True)
            assert await engine.run("good").result() == "True DONE"
            with pytest.raises(RunFailed) as error:
                await engine.run("bad").result()
            assert error.value.status == "quarantined"
            return error.value.message

    asyncio.run(first())
    path = tmp_path / "bad.db"
    match damage:
        case "garbage":
            path.write_bytes(path.read_bytes()[:4096] + os.urandom(8192))
        case "foreign":
            path.unlink()
            sqlite3.connect(path).execute("CREATE TABLE other(a)")
        case "newer":
            connection = sqlite3.connect(path)
            connection.execute("PRAGMA user_version = 99")
            connection.close()
        case "missing":
            path.unlink()
    expected = {"garbage": "cannot read", "foreign": "not an instance file", "newer": "use a newer release", "missing": "file is missing"}
    assert expected[damage] in asyncio.run(second())


def test_two_engines_do_not_share_a_folder(tmp_path: Path) -> None:
    async def run() -> None:
        async with Engine(tmp_path):
            with pytest.raises(FolderInUse):
                await Engine(tmp_path).__aenter__()

    asyncio.run(run())


def recorded_run(folder: Path, name: str = "changing") -> Path:
    @flow(name=name)
    async def changing() -> str:
        await sample.add(1, 1)
        return await sample.upper("old")

    async def run() -> None:
        async with virtual_engine(folder) as engine:
            await (await engine.start(changing, id="it")).result()

    asyncio.run(run())
    return folder / "it.db"


def test_changed_code_is_found_to_diverge_from_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflow.worker.STARVED_S", 0.05)
    path = recorded_run(tmp_path / "recorded")

    @flow(name="changing")
    async def same() -> str:
        return f"{await sample.add(1, 1) and await sample.upper('old')}"

    @flow(name="changing")
    async def other_input() -> str:
        await sample.add(1, 2)
        return await sample.upper("old")

    @flow(name="changing")
    async def a_step_before() -> str:
        await sample.upper("first")
        await sample.add(1, 1)
        return "x"

    @flow(name="changing")
    async def guarded() -> str:
        await sample.add(1, 1)
        return await sample.upper("new" if patched("change") else "old")

    assert replay_recorded(path, same, tmp_path / "1") == ("done", None)
    assert replay_recorded(path, guarded, tmp_path / "2") == ("done", None)
    for number, changed in enumerate((other_input, a_step_before)):
        status, error = replay_recorded(path, changed, tmp_path / f"changed-{number}")
        assert status == "diverged", changed
        assert error is not None
        assert "recorded" in error


# -- forks -------------------------------------------------------------------------------------------------------------------------------


@flow
async def forkable() -> list[Any]:
    first = await sample.remember("sum", 1)
    verdict = await receive("approval", str)
    second = await sample.remember("sum", 10)
    report = await sample.render((1 << 20) + 5)
    return [first, verdict, second, state["sum"], await sample.measure(report), await key_of_step()]


@step
async def key_of_step() -> str:
    return step.key()


@engine_test
async def test_a_fork_goes_on_from_the_first_call_of_a_step(engine: Engine) -> None:
    run = await engine.start(forkable, id="origin")
    await run.send("approval", "yes")
    result = await run.result()
    sample.take_ran()
    late = await run.fork(step="measure", id="late")
    assert await late.result() == [*result[:5], result[5].replace(result[5].partition("/")[0], (await late.result())[5].partition("/")[0])]
    assert [key.partition("/")[2] for key in sample.take_ran()] == ["measure#1"]
    assert (await late.result())[5] != result[5]
    early = await run.fork(step="receive", id="early")
    assert (await early.result())[:4] == [1, "yes", 10, 11]  # the event was released, and state rolled back
    assert [key.partition("/")[2] for key in sample.take_ran()] == ["remember#2", "render#1", "measure#1"]
    with pytest.raises(Refused, match="no step 'nonsense'"):
        await (await run.fork(step="nonsense")).result()


@engine_test
async def test_a_fork_that_several_find_at_once_is_made_once(engine: Engine) -> None:
    run = await engine.start(forkable, id="origin")
    await run.send("approval", "yes")
    await run.result()
    request = ik.Request("fork:twin", "origin", "fork", '{"id": "twin", "step": "measure"}', None, engine._now())
    await engine._intake.do(lambda db: ik.add_request(db, request))
    sample.take_ran()
    await asyncio.gather(*(engine._dispatch(request) for _ in range(3)))
    assert (await engine.run("twin").result())[:4] == [1, "yes", 10, 11]
    assert [key.partition("/")[2] for key in sample.take_ran()] == ["measure#1"]
    assert await engine._intake.do(ik.open_requests) == []


@engine_test
async def test_a_fork_that_a_full_disk_prevents_is_made_later(engine: Engine) -> None:
    run = await engine.start(forkable, id="origin")
    await run.send("approval", "yes")
    await run.result()
    copy, failures = engine._copy, [sqlite3.OperationalError("database or disk is full"), OSError(28, "No space left on device")]

    def fails_twice(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return copy(*args)

    engine._copy = fails_twice  # type: ignore[method-assign]
    assert (await (await run.fork(step="measure", id="later")).result())[:4] == [1, "yes", 10, 11]
    assert failures == []


@flow
async def forkable_with_tables() -> int:
    await sample.add(1, 1)
    await sample.book("tea")
    await sample.upper("between")
    return await sample.add(2, 2)


@engine_test
async def test_a_fork_before_changes_of_tables_is_refused_and_names_the_next_possible_step(engine: Engine) -> None:
    run = await engine.start(forkable_with_tables)
    await run.result()
    fork = await run.fork(step="add#1")
    with pytest.raises(Refused, match="first step after the last of them is upper#1"):
        await fork.result()
    assert await (await run.fork(step="upper")).result() == 4


# -- other processes ---------------------------------------------------------------------------------------------------------------------


@engine_test
async def test_a_client_beside_the_engine_starts_sends_and_asks(engine: Engine) -> None:
    client = Client(engine.folder, sender="kim")
    run = await client.start(sample.waits, id="remote")
    await status_is(run, "waiting")
    await run.send("approval", True)
    assert await run.result() == "True DONE"
    assert jr.rows(engine.folder / "remote.db", "wf_decisions")[1][0][3] == "kim"
    by_name = await client.start("chain", value=1)
    assert await by_name.result() == 11
    with pytest.raises(Conflict):
        await (await client.start(sample.waits_in_vain, id="remote")).result()
    assert {item.id: item.status for item in await client.runs()}["remote"] == "done"


def test_a_client_of_a_folder_that_no_engine_knows_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="no engine ever ran there"):
        asyncio.run(Client(tmp_path).run("x").status())


@engine_test
async def test_a_step_by_name_runs_any_function_once(engine: Engine) -> None:
    assert await (await engine.start(calls_by_name)).result() == [3, 3]


@flow
async def calls_by_name() -> list[int]:
    return [await step.call("maximum", max, 1, 3), await step.call("maximum", max, 1, 3)]


@flow
async def fatal_flow() -> None:
    raise Fatal("on purpose")


@flow
async def says_hello() -> None:
    await send("nobody", "word", 1)


@engine_test
async def test_ends_are_recorded_as_they_were(engine: Engine) -> None:
    with pytest.raises(RunFailed, match="failed: Fatal: on purpose"):
        await (await engine.start(fatal_flow)).result()
    assert await (await engine.start(says_hello)).result() is None  # sending to nobody is refused where it arrives
