"""Flows for crash tests, and scenarios that run them. Bodies note the idempotency key that they ran under in `ran`."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from workflow import (
    Artifact,
    Cancelled,
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
from workflow.testing import Scenario, start

ran: list[str] = []
_lock = threading.Lock()


def note() -> None:
    with _lock:
        ran.append(step.key())


def take_ran() -> list[str]:
    with _lock:
        found, ran[:] = list(ran), []
    return found


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Plan:
    topic: str
    queries: list[str]
    colour: Colour = Colour.RED


@step
async def add(left: int, right: int) -> int:
    note()
    return left + right


@step
def upper(text: str) -> str:
    note()
    return text.upper()


@step
async def plan(topic: str, count: int = 3) -> Plan:
    note()
    return Plan(topic, [f"{topic} {number}" for number in range(count)], Colour.BLUE)


@step
async def ticket() -> str:
    note()
    return step.key().rpartition("/")[2]


@step
async def boom(text: str = "no") -> None:
    note()
    raise ValueError(text)


@step
async def slow(seconds: float = 0.003) -> str:
    note()
    await asyncio.sleep(seconds)
    return "slow"


_tries: dict[str, int] = {}


def _fails_first(times: int) -> int:
    """Fail so many attempts of each step key; counted by process, as a remote service would."""
    with _lock:
        tries = _tries[step.key()] = _tries.get(step.key(), 0) + 1
    if tries <= times:
        raise ConnectionError(f"try {tries}")
    return tries


@step(retry=Retry(attempts=4, first=5, factor=3, cap=60))
async def flaky() -> str:
    _fails_first(2)
    note()
    return "came"


@step(retry=Retry(attempts=3, first=5, jitter=False))
def flaky_thread() -> str:
    _fails_first(1)
    note()
    return "thread"


@step(retry=Retry(attempts=2, first=1))
async def hopeless() -> None:
    raise ConnectionError("never")


@step(retry=Retry(attempts=5, first=1))
async def fatal() -> None:
    note()
    raise Fatal("stop it")


@step(tx=True)
def book(db: sqlite3.Connection, what: str) -> int:
    note()
    db.execute("CREATE TABLE IF NOT EXISTS bookings(n INTEGER PRIMARY KEY, what TEXT)")
    db.execute("INSERT INTO bookings(what) VALUES(?)", (what,))
    found: int = db.execute("SELECT count(*) FROM bookings").fetchone()[0]
    return found


@step(tx=True)
def book_and_fail(db: sqlite3.Connection) -> None:
    note()
    db.execute("CREATE TABLE IF NOT EXISTS bookings(n INTEGER PRIMARY KEY, what TEXT)")
    db.execute("INSERT INTO bookings(what) VALUES('lost')")
    raise ValueError("rolled back")


@step
async def remember(name: str, value: int) -> int:
    note()
    state[name] = state.get(name, 0) + value
    return value


@step
async def render(size: int) -> Artifact:
    note()
    return Artifact.of(b"x" * size, media_type="text/plain")


@step
def measure(report: Artifact) -> int:
    note()
    return len(report.read())


@step
async def long_text(size: int) -> str:
    note()
    return "y" * size


# -- flows -----------------------------------------------------------------------------------------------------------------------


@flow
async def one_step() -> int:
    return await add(1, 2)


@flow
async def no_steps(value: int) -> int:
    return value * 2


@flow
async def chain(value: int) -> int:
    for number in range(5):
        value = await add(value, number)
    return value


@flow
async def typed(topic: str) -> list[str]:
    found = await plan(topic)
    assert isinstance(found, Plan)
    assert found.colour is Colour.BLUE
    return found.queries


@flow
async def fan_out(topic: str) -> list[str]:
    found = await plan(topic)
    return list(await asyncio.gather(*(upper(query) for query in found.queries)))


async def _branch(text: str) -> str:
    return f"{await upper(text)}:{await ticket()}:{await upper(text + '!')}"


@flow
async def branches() -> list[str]:
    return list(await asyncio.gather(_branch("a"), _branch("b"), _branch("c")))


async def _nest(text: str, depth: int) -> str:
    if depth == 0:
        return await _branch(text)
    async with asyncio.TaskGroup() as group:
        left, right = group.create_task(_nest(text + "l", depth - 1)), group.create_task(_nest(text + "r", depth - 1))
    return f"({left.result()} {right.result()})"


@flow
async def nested() -> str:
    return await _nest("t", 2)


@flow
async def without_arguments() -> list[str]:
    return [*await asyncio.gather(ticket(), ticket()), await ticket()]


@flow
async def shared_list() -> list[str]:
    """The order in which branches finish is part of the result: it must be the recorded one on replay."""
    order: list[str] = []

    async def racer(name: str, seconds: float) -> None:
        await slow(seconds)
        order.append(name)
        await upper(name)
        order.append(name)

    await asyncio.gather(racer("a", 0.004), racer("b", 0.0), racer("c", 0.002))
    return [await upper("".join(order))] + sorted(order)


@flow
async def first_of_several() -> int:
    """`as_completed` over steps replays, because results come one at a time in the recorded order."""
    found = 0
    for done in asyncio.as_completed([slow(0.003), slow(0.001), slow(0.0)]):
        found += len(await done)
        await add(found, 1)
    return found


@flow
async def retried() -> str:
    return await flaky() + flaky_name(await flaky_thread())


def flaky_name(text: str) -> str:
    return f"+{text}"


@flow
async def gives_up() -> str:
    try:
        await hopeless()
    except StepFailed as error:
        return f"{error.step} {error.type_name} {error.attempts}"
    return "?"


@flow
async def ends_at_once() -> None:
    await fatal()


@flow
async def fails() -> None:
    await add(1, 1)
    await boom("out")


@flow
async def group_fails() -> str:
    """A failing branch cancels its siblings, which are not run again."""
    await add(0, 0)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_then_boom())
            group.create_task(_long_way())
    except* StepFailed as errors:
        found = str(errors.exceptions[0])
    return found + await upper("after")


async def _then_boom() -> None:
    await add(1, 1)
    await boom("group")


async def _long_way() -> None:
    for _ in range(20):
        await slow(0.01)


@flow
async def sleeps() -> str:
    await sleep(timedelta(days=3))
    first = await upper("a")
    await sleep(60)
    return first + await upper("b")


@flow
async def sleeps_in_parallel() -> list[str]:
    async def later(days: int) -> str:
        await sleep(timedelta(days=days))
        return await upper(f"day {days}")

    return list(await asyncio.gather(later(3), later(1), later(2)))


@flow
async def waits() -> str:
    verdict = await receive("approval", bool)
    return f"{verdict} {await upper('done')}"


@flow
async def waits_in_vain() -> str:
    verdict = await receive("approval", bool, timeout=timedelta(days=3))
    return f"{verdict} {await upper('late')}"


@flow
async def asks_twice() -> list[int | None]:
    first, second = await asyncio.gather(receive("number", int), receive("number", int))
    return [first, second, await add(first, second)]


@flow
async def transacts() -> list[int]:
    found = [await book("tea"), await book("cake")]
    try:
        await book_and_fail()
    except StepFailed as error:
        found.append(error.attempts)
    return [*found, await book("bread")]


@flow
async def stateful() -> list[int]:
    await remember("sum", 3)
    seen = [state["sum"]]
    await asyncio.gather(remember("left", 1), remember("right", 2))
    await remember("sum", 4)
    return [*seen, state["sum"], state["left"], state["right"], len(state)]


@flow
async def artifacts() -> list[int]:
    small, large = await asyncio.gather(render(10), render((1 << 20) + 1))
    return [small.size, await measure(small), await measure(large)]


@flow
async def large_values() -> int:
    text = await long_text(100_000)
    await upper(text)
    return len(text)


@flow
async def child(value: int) -> int:
    await sleep(1)
    return await add(value, 100)


@flow
async def bad_child() -> None:
    await boom("child")


@flow
async def parent() -> list[int]:
    return [await child(1), *await asyncio.gather(child(2), child(3))]


@flow
async def parent_of_bad() -> str:
    try:
        await bad_child()
    except StepFailed as error:
        return f"{error.type_name}: {await upper('caught')}"
    return "?"


@flow
def plain(count: int) -> str:
    found = plan("p", count)
    sleep(30)
    return "".join(upper(query) for query in found.queries)


@flow
async def versioned() -> str:
    await add(1, 1)
    return await upper("new") if patched("change") else "old"


@flow
async def listener() -> list[str]:
    return [await receive("word", str), await receive("word", str)]


@flow
async def talker() -> None:
    await send("listener", "word", "hello")
    await add(1, 1)
    await send("listener", "word", "again")


@flow
async def cleans_up() -> str:
    try:
        await receive("never")
    except Cancelled:
        await upper("cleaning")
        raise
    finally:
        await upper("finally")
    return "?"


@flow
async def cancelled_in_branches() -> str:
    try:
        await asyncio.gather(_waiting("a"), _waiting("b"))
    finally:
        await upper("all gone")
    return "?"


async def _waiting(name: str) -> None:
    try:
        await receive("never")
    finally:
        await upper(name)


@step(durability="replicated")
async def acknowledged(text: str) -> str:
    note()
    return text.upper()


@flow
async def replicates() -> list[str]:
    await add(1, 1)
    first = await acknowledged("a")
    both = await asyncio.gather(acknowledged("b"), acknowledged("c"))
    await add(2, 2)
    await barrier()
    return [first, *both, await child_text("d")]


@flow
async def child_text(text: str) -> str:
    return await acknowledged(text)


@step(repeat=False)
async def at_most_once() -> str:
    note()
    return "once"


@flow
async def once_or_unknown() -> str:
    await add(1, 1)
    try:
        return await at_most_once()
    except OutcomeUnknown:
        return "unknown"


def _two(engine_events: bool = False) -> Scenario:
    async def scenario(engine: Engine) -> object:
        first = await engine.start(listener, id="listener")
        await engine.start(talker, id="talker")
        return await first.result()

    return scenario


def _cancelled(which: object) -> Scenario:
    run = start(which, id="it")  # type: ignore[arg-type]

    async def scenario(engine: Engine) -> object:
        handle = await engine.start(which, id="it")  # type: ignore[arg-type]
        await engine.cancel_run("please", "it", "test")
        await asyncio.sleep(0)
        return (await run(engine)), await handle.status()

    return scenario


SCENARIOS: dict[str, Scenario] = {
    "one_step": start(one_step),
    "no_steps": start(no_steps, 4),
    "chain": start(chain, 1),
    "typed": start(typed, "x"),
    "fan_out": start(fan_out, "x"),
    "branches": start(branches),
    "nested": start(nested),
    "without_arguments": start(without_arguments),
    "first_of_several": start(first_of_several),
    "retried": start(retried),
    "gives_up": start(gives_up),
    "ends_at_once": start(ends_at_once),
    "fails": start(fails),
    "group_fails": start(group_fails),
    "sleeps": start(sleeps),
    "sleeps_in_parallel": start(sleeps_in_parallel),
    "waits": start(waits, events=(("approval", True),)),
    "waits_wrong_type_first": start(waits, events=(("approval", "maybe"), ("approval", False))),
    "waits_in_vain": start(waits_in_vain),
    "asks_twice": start(asks_twice, events=(("number", 1), ("other", 5), ("number", 2))),
    "transacts": start(transacts),
    "stateful": start(stateful),
    "artifacts": start(artifacts),
    "large_values": start(large_values),
    "parent": start(parent),
    "parent_of_bad": start(parent_of_bad),
    "plain": start(plain, 3),
    "versioned": start(versioned),
    "talk": _two(),
    "cleans_up": _cancelled(cleans_up),
    "cancelled_in_branches": _cancelled(cancelled_in_branches),
}


@contextmanager
def counting() -> Iterator[None]:
    take_ran()
    yield
    take_ran()
