"""Runs asked for, and looked at, from machines that have nothing but the URL of the replica."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from replicator import open_client
from tests import sampleflows as sample
from workflow import Artifact, Client, Engine, flow, receive, send, step
from workflow.bucket import Marks, open_objects
from workflow.errors import Conflict, Refused, RunFailed
from workflow.inbox import MAX_BYTES, Inbox, encode_request
from workflow.intake import Request
from workflow.placement import shard_of

BOTH = pytest.mark.parametrize("url", ["file", "seaweed"], indirect=True)


@step
async def shout(text: str) -> str:
    return text.upper()


@flow
async def conversation(text: str) -> tuple[str, str, Artifact]:
    first = await shout(text)
    report = await sample.render((1 << 20) + 7)
    answer = await receive("answer", str)
    return first, await shout(answer or "nothing"), report


@flow
async def tells(other: str) -> None:
    await send(other, "answer", "from a flow")


def engine(folder: Path, url: str, **settings: Any) -> Engine:
    return Engine(folder, replica=url, inbox_poll_s=0.05, sync_interval_s=0.05, **settings)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await holds():
            await asyncio.sleep(0.02)


async def is_(client: Client, id: str, wanted: str) -> None:
    async def holds() -> bool:
        try:
            return await client.run(id).status() == wanted
        except Refused:
            return False

    await until(holds)


def waiting_objects(url: str) -> list[str]:
    store = open_objects(url, "_inbox")
    try:
        return [
            f"{shard}/{item.name}" for shard in store.list_folders("generations") for item in store.list_objects(f"generations/{shard}")
        ]
    finally:
        store.close()


@BOTH
def test_everything_that_can_be_asked_for_from_another_machine(url: str, tmp_path: Path) -> None:
    async def run() -> None:
        client = Client(url, sender="kim")
        started = await client.start(conversation, "hello", id="it")  # before there is any engine
        async with engine(tmp_path / "a", url):
            await is_(client, "it", "waiting")
            assert await started.status() == "waiting"
            await client.run("it").pause()
            await is_(client, "it", "paused")
            await client.run("it").send("answer", "ahoy", id="only-once")
            await client.run("it").send("answer", "ahoy", id="only-once")
            await client.run("it").resume()
            first, second, report = await started.result()
            assert (first, second, await asyncio.to_thread(lambda: len(report.read()))) == ("HELLO", "AHOY", (1 << 20) + 7)
            assert [record.key for record in await started.steps()] == ["shout#1", "render#1", "receive#1", "shout#2"]

            fork = await client.run("it").fork(step="receive", id="fork")
            assert (await fork.result())[:2] == ("HELLO", "AHOY")  # the event that was consumed later is released

            await client.start(conversation, "again", id="other")
            await is_(client, "other", "waiting")
            await client.run("other").cancel()
            with pytest.raises(RunFailed, match="cancelled"):
                await client.run("other").result()
            assert {run.id: run.status for run in await client.runs()}.items() >= {"it": "done", "fork": "done"}.items()

            async def is_empty() -> bool:
                return not waiting_objects(url)

            await until(is_empty)
        client.close()

    asyncio.run(run())


def test_refusals_are_recorded_and_told(tmp_path: Path) -> None:
    async def run() -> None:
        url = f"file://{tmp_path}/root"
        client = Client(url)
        async with engine(tmp_path / "a", url) as owner:
            done = await owner.start(sample.chain, 1, id="done")
            await done.result()
            await client.run("done").send("answer", "late", id="late")
            await client.run("nobody").send("answer", "lost", id="lost")
            await client.start("no_such_flow", id="flowless")
            with pytest.raises(Refused, match="there is no such run"):
                await client.run("nobody").result()
            desk = client.desk
            for request, why in (("late", "the run is done"), ("lost", "there is no such run")):

                async def is_refused(request: str = request) -> bool:
                    return await desk.refusal(request) is not None

                await until(is_refused)
                assert why in str(await desk.refusal(request))
                with pytest.raises(Refused, match=why):  # an exact repetition has the same answer
                    await client.run("done" if request == "late" else "nobody").send("answer", "late", id=request)
            with pytest.raises(Refused, match="knows no flow 'no_such_flow'"):
                await (await client.start("no_such_flow", id="flowless")).result()
            with pytest.raises(Conflict):
                await (await client.start(sample.chain, 2, id="done")).result()
            fork = await client.run("done").fork(step="nothing", id="forked")
            with pytest.raises(Refused, match="called no step 'nothing'"):
                await fork.result()
        client.close()

    asyncio.run(run())


def test_what_a_finished_run_got_is_not_refused_when_it_comes_again(tmp_path: Path) -> None:
    async def run() -> None:
        url = f"file://{tmp_path}/root"
        client = Client(url)
        async with engine(tmp_path / "a", url) as owner:
            it = await owner.start(conversation, "hello", id="it")
            await client.run("it").send("answer", "ahoy", id="mine")
            await it.result()

            async def is_empty() -> bool:
                return not waiting_objects(url)

            await until(is_empty)
            await client.run("it").send("answer", "ahoy", id="mine")
            await until(is_empty)
            assert await client.desk.refusal("mine") is None
        client.close()

    asyncio.run(run())


def test_a_request_stays_in_the_inbox_until_the_replica_has_it(tmp_path: Path) -> None:
    """Killed after it took a request in and before the run's replica had it; the machine is lost: the next one finds the object again."""

    async def run() -> object:
        url = f"file://{tmp_path}/root"
        client = Client(url)
        first = Engine(tmp_path / "a", replica=url, inbox_poll_s=0.05, sync_interval_s=3600, lease_ttl_s=1.0)
        await first.__aenter__()
        it = await first.start(conversation, "hello", id="it", durability="replicated")

        async def waits() -> bool:
            return await it.status() == "waiting" and first.parked == 1

        await until(waits)
        await it.pause()
        await until(lambda: _is_paused(first))
        await client.run("it").send("answer", "ahoy", id="mine")

        async def has_taken_it() -> bool:
            assert first._post is not None
            return bool(first._post.taken)

        await until(has_taken_it)
        assert len(waiting_objects(url)) == 1
        await first.crash()
        async with engine(tmp_path / "b", url, lease_ttl_s=1.0) as second:
            await second.run("it").resume()
            return (await second.run("it").result())[1]

    assert asyncio.run(run()) == "AHOY"


async def _is_paused(engine: Engine) -> bool:
    return await engine.run("it").status() == "paused"


def test_hosts_of_one_bucket_reach_each_others_runs(tmp_path: Path) -> None:
    async def run() -> None:
        url = f"file://{tmp_path}/root"
        client = Client(url)
        async with engine(tmp_path / "a", url, host="a") as a, engine(tmp_path / "b", url, host="b") as b:
            await a.start(conversation, "hello", id="of-a")
            await is_(client, "of-a", "waiting")
            await (await b.start(tells, "of-a")).result()
            first, second, _ = await b.run("of-a").result()
            assert (first, second) == ("HELLO", "FROM A FLOW")
            from_outside = [await client.start(sample.chain, number, id=f"start-{number}") for number in range(4)]
            assert await asyncio.gather(*(run.result() for run in from_outside)) == [number + 10 for number in range(4)]
            owners = [{run.id for run in await engine.runs()} & {f"start-{number}" for number in range(4)} for engine in (a, b)]
            assert owners[0].isdisjoint(owners[1])
            assert len(owners[0] | owners[1]) == 4
        client.close()

    asyncio.run(run())


def put(url: str, name: str, data: bytes) -> None:
    store = open_objects(url, "_inbox")
    store.put_object(name, data)
    store.close()


def test_what_is_no_request_is_skipped_and_counted_and_harms_nothing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"
    good = Request("01HZZZZZZZZZZZZZZZZZZZZZZZ", "it", "event", '{"type":"answer","payload":"\\"x\\""}', None, "2026-01-01T00:00:00Z")

    def with_(**changes: object) -> bytes:
        fields = json.loads(encode_request(good)) | changes
        return json.dumps(fields).encode()

    shard = f"generations/{shard_of('it')}"
    name = f"{good.id}.it.json"
    bad = [
        b"no json", b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b"x" * (MAX_BYTES + 1),
        with_(instance="../../etc/passwd"), with_(instance="a/b"), with_(instance=7), with_(instance="it-wal"), with_(kind="drop"),
        with_(id=""), with_(id="y" * 501), with_(body="[1]"), with_(body="{"), with_(body='{"a":' * 5000), with_(sender=["kim"]),
        with_(id="\ud800"), with_(extra=1), with_(id="another"),
    ]  # fmt: skip
    for number, data in enumerate(bad):
        put(url, f"{shard}/{number:02d}-{name}", data)
    put(url, "generations/etc/passwd", encode_request(good))
    (tmp_path / "root" / "_inbox" / "generations" / shard_of("it") / "with space").write_bytes(encode_request(good))
    inbox = Inbox(url)
    assert inbox.look() == {}
    assert inbox.skipped == len(bad) + 2
    assert inbox.look() == {}
    assert inbox.skipped == len(bad) + 2  # each once
    put(url, f"{shard}/{name}", encode_request(good))
    assert list(inbox.look().values()) == [good]
    inbox.close()


def test_a_flood_of_requests_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflow.inbox.MOST", 10)
    inbox = Inbox(f"file://{tmp_path}/root")
    for number in range(25):
        inbox.submit(Request(f"request-{number}", f"it-{number}", "cancel", "{}", None, "2026-01-01T00:00:00Z"))
    seen: dict[str, Request] = {}
    sizes = []
    while found := inbox.look(seen):
        sizes.append(len(found))
        seen |= found
    assert sizes == [10, 10, 5]
    assert {request.instance for request in seen.values()} == {f"it-{number}" for number in range(25)}
    inbox.delete(seen)
    assert inbox.look() == {}
    inbox.close()


def test_requests_with_hostile_bodies_are_refused_and_the_engine_goes_on(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/root"
    start = {"flow": "conversation", "input": '{"text": "hello"}', "priority": 0}
    bodies: list[tuple[str, dict[str, object]]] = [
        ("event", {}), ("event", {"type": "answer"}), ("event", {"type": "answer", "payload": "no json"}),
        ("event", {"type": "answer", "payload": "[" * 10_000}), ("fork", {}), ("fork", {"id": "../x", "step": "shout"}), ("fork", {"id": "x", "step": 7}),
        ("start", {}), ("start", start | {"priority": 10**30}), ("start", start | {"input": "{"}), ("start", start | {"input": "[" * 10_000}),
        ("start", start | {"flow": 7}),
    ]  # fmt: skip

    async def run() -> None:
        client = Client(url)
        async with engine(tmp_path / "a", url) as owner:
            it = await owner.start(conversation, "hello", id="it")
            for number, (kind, body) in enumerate(bodies):
                instance = f"new-{number}" if kind == "start" else "it"
                await client.desk.submit(Request(f"bad-{number}", instance, kind, json.dumps(body), None, "2026-01-01T00:00:00Z"))
            for number in range(len(bodies)):

                async def is_refused(number: int = number) -> bool:
                    return await client.desk.refusal(f"bad-{number}") is not None

                await until(is_refused)
            await client.run("it").send("answer", "ahoy")
            assert (await it.result())[:2] == ("HELLO", "AHOY")
            assert {run.id for run in await owner.runs()} == {"it"}
        client.close()

    asyncio.run(run())


@BOTH
def test_requests_that_a_quiet_inbox_a_status_and_a_result_cost(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the clients: one LIST for a quiet inbox however many runs there are; a status that has not changed one LIST; an end one GET."""
    calls: list[str] = []
    kinds = {type(open_client(url))}

    def counted(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            calls.append(name)
            return real(self, *args, **options)

        monkeypatch.setattr(kind, name, call)

    async def run() -> None:
        client = Client(url)
        async with Engine(tmp_path / "a", replica=url, inbox_poll_s=3600) as owner:
            for number in range(5):
                await owner.start(conversation, "hello", id=f"it-{number}")
            await is_(client, "it-0", "waiting")
            await asyncio.sleep(0.1)
            for kind in kinds:
                for name in ("list", "list_folders", "list_objects", "open", "open_object", "get_control", "put_object"):
                    counted(kind, name)
            inbox = Inbox(url)
            assert inbox.look() == {}
            assert [name for name in calls if name != "list_objects"] == ["list_folders"]
            inbox.close()
            await client.run("it-0").status()
            calls.clear()
            assert await client.run("it-0").status() == "waiting"
            assert calls == ["list", "open_object"]  # is there anything new, and is it quarantined
            calls.clear()
            await client.run("it-0").cancel()
            assert sorted(calls) == ["open_object", "put_object"]  # refused before? and the request
        client.close()

    asyncio.run(run())


@step
async def one(number: int) -> int:
    return number


@flow
async def some(count: int) -> int:
    for number in range(count):
        await one(number)
    return count


@BOTH
@pytest.mark.parametrize(("count", "durability"), [(10, "local"), (50, "local"), (10, "replicated")])
def test_a_local_run_costs_three_puts_and_no_list_and_a_replicated_one_two_more_for_each_step(
    count: int, durability: Literal["local", "replicated"], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what the host stores for all its runs: its intake and its lease. These are the figures of docs/workflow.md."""
    calls: list[str] = []
    kind = type(open_client(url))

    def counted(name: str) -> None:
        real = getattr(kind, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            if f"{url.partition('?')[0]}/_hosts" not in self.url:
                calls.append(name)
            return real(self, *args, **options)

        monkeypatch.setattr(kind, name, call)

    async def run() -> None:
        async with Engine(tmp_path / "a", replica=url, inbox_poll_s=3600, sync_interval_s=60.0) as engine:
            await asyncio.sleep(0.5)
            for name in ("list", "list_folders", "list_objects", "open", "open_object", "get_control", "put", "put_control", "put_object"):
                counted(name)
            assert await (await engine.start(some, count, durability=durability)).result() == count

            async def is_over() -> bool:
                return not engine._active

            await until(is_over)
        uploads = 1 if durability == "local" else 1 + 2 * count  # intent and result; and the end
        assert calls == ["put_control", *["put"] * uploads, "put_object"]  # its lineage, its file, and its mark

    asyncio.run(run())


def test_marks_are_deleted_by_age(tmp_path: Path) -> None:
    marks = Marks(f"file://{tmp_path}/root", "_refused")
    for number in range(5):
        marks.put(f"it-{number}", {"reason": "no"})
    marks.put("it-0", {"reason": "other"})
    assert marks.get("it-0") == {"reason": "no"}  # the first one stays
    assert marks.get("nothing") is None
    assert marks.delete_before(1) == 0
    assert marks.delete_before(1 << 62) == 5
    assert marks.get("it-0") is None
    marks.close()
