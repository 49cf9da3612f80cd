"""Workflows against DBOS on SQLite, and bare `sqlite3` as the floor; all of them in turn, several times, each in a fresh process.

    python -m bench.workflow [-n ROUNDS] [CASE...]

Ten trivial async steps for each workflow, at `synchronous=FULL`. Cases:

    serial     one workflow after another
    fifty      50 at once
    steps      CPU of one step more: a thousand of them in one run, async and plain ones, against as many bare commits in one file, and against
               the *hop*: an event loop that lets a thread do those commits, and nothing else
    recover    100 that were interrupted in the middle, until all are finished; imports included, from bytecode, which an installed package has
    parked     memory of a parked run
    intake     durable starts with 16 callers
    queued     a queue of 2,000,000, and the time until the first of them runs      (`queued=N` for another number)
    asleep     50,000 parked runs, and a restart with them                          (`asleep=N`)
    replica    workflows/s and LTX files with replica= on a directory, 20 at once
    seaweed    workflows/s and requests with replica= on SeaweedFS, 20 at once

DBOS takes part where `import dbos` works (`pip install dbos==3.4.0`). The *floor* is a file for each workflow with 12 commits and nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import queue
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

STEPS = 10


def emit(**figures: float) -> None:
    print("RESULT " + json.dumps(figures), flush=True)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- ours ------------------------------------------------------------------------------------------------------------------------


def flows() -> Any:
    from workflow import flow, receive, step

    @step
    async def trivial(value: int) -> int:
        return value + 1

    @flow
    async def ten(value: int) -> int:
        for _ in range(STEPS):
            value = await trivial(value)
        return value

    @step
    def plain(value: int) -> int:
        return value + 1

    @flow
    async def thousand(count: int, is_plain: bool) -> int:
        value = 0
        for _ in range(count):
            value = await plain(value) if is_plain else await trivial(value)
        return value

    gate = asyncio.Event()

    @step
    async def stop() -> None:
        if os.environ.get("BENCH_STOP"):
            gate.set()
            await asyncio.sleep(3600)

    arrived = [0]

    @flow
    async def half(value: int) -> int:
        for _ in range(STEPS // 2):
            value = await trivial(value)
        arrived[0] += 1
        await stop()
        for _ in range(STEPS // 2):
            value = await trivial(value)
        return value

    @flow
    async def waits() -> None:
        await receive("never")

    return ten, half, waits, arrived, thousand


async def ours(folder: Path, case: str, count: int) -> None:
    from workflow import Engine

    ten, half, waits, arrived, thousand = flows()
    match case:
        case "serial" | "fifty" | "replica":
            replica = f"file://{folder}/root" if case == "replica" else None
            async with Engine(folder / "runs", replica=replica) as engine:
                await (await engine.start(ten, 0)).result()
                began, cpu = time.perf_counter(), time.process_time()
                if case == "serial":
                    for _ in range(count):
                        assert await (await engine.start(ten, 0)).result() == STEPS
                else:

                    async def one() -> None:
                        assert await (await engine.start(ten, 0)).result() == STEPS

                    await asyncio.gather(*(one() for _ in range(count)))
                took, used = time.perf_counter() - began, time.process_time() - cpu
            files = len([1 for _ in (folder / "root").rglob("*.ltx")]) / (count + 1) if replica else 0
            more = {"ltx_files_per_workflow": files} if replica else {}
            emit(workflows_per_s=count / took, cpu_ms_per_step=used / count / STEPS * 1e3, **more)
        case "steps":
            async with Engine(folder / "runs") as engine:
                figures = {}
                for name, is_plain in (("async", False), ("plain", True)):
                    await (await engine.start(thousand, 20, is_plain)).result()
                    cpu = time.process_time()
                    assert await (await engine.start(thousand, count, is_plain)).result() == count
                    figures[f"cpu_ms_per_{name}_step"] = (time.process_time() - cpu) / count * 1e3
                emit(**figures)
        case "seaweed":
            from bench.requests import Counting  # here, because memory and imports of the other cases count
            from tests.servers import ACCESS, BUCKET, SECRET, serve

            os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
            with serve("seaweed", folder) as server:
                counting = Counting(server.endpoint)
                url = f"s3://{BUCKET}/root?endpoint={counting.endpoint}&region=us-east-1&forcePathStyle=true"
                async with Engine(folder / "runs", replica=url) as engine:
                    await (await engine.start(ten, 0)).result()
                    counting.counts = {"_hosts": Counter(), "_inbox": Counter(), "/root": Counter()}
                    began = time.perf_counter()
                    runs = [await engine.start(ten, 0) for _ in range(count)]
                    for run in runs:
                        assert await run.result() == STEPS
                    took = time.perf_counter() - began
                    while engine._active:
                        await asyncio.sleep(0.01)
                    own = counting.counts["/root"]
                    emit(
                        workflows_per_s=count / took,
                        puts_per_workflow=own["PUT"] / count,
                        lists_and_gets_per_workflow=(own["LIST"] + own["GET"]) / count,
                    )
        case "interrupt":
            engine = await Engine(folder / "runs", concurrency=count).__aenter__()
            for number in range(count):
                await engine.start(half, 0, id=f"run-{number}")
            while arrived[0] < count:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            os._exit(0)
        case "recover":
            async with Engine(folder / "runs", concurrency=count) as engine:
                for number in range(count):
                    assert await engine.run(f"run-{number}").result() == STEPS
                emit(all_done_s=time.time() - float(os.environ["BENCH_BEGAN"]), cpu_s=time.process_time())
                os._exit(0)
        case "parked":
            async with Engine(folder / "runs", park_after_s=0.0, synchronous="OFF") as engine:
                await _all_parked(engine, waits, 200)
                gc.collect()
                before = rss_bytes()
                await _all_parked(engine, waits, count)
                gc.collect()
                emit(bytes_per_parked_run=(rss_bytes() - before) / count)
        case "asleep":
            async with Engine(folder / "runs", park_after_s=0.0, synchronous="OFF") as engine:
                await _all_parked(engine, waits, count)
                held = rss_bytes()
            began = time.perf_counter()
            async with Engine(folder / "runs") as engine:
                took = time.perf_counter() - began
                run = (await engine.runs())[0]
                assert run.status == "waiting"
                emit(restart_s=took, rss_mib=held / 2**20)
                os._exit(0)
        case "intake":
            async with Engine(folder / "runs", concurrency=0) as engine:
                began, cpu = time.perf_counter(), time.process_time()

                async def caller() -> None:
                    for _ in range(count // 16):
                        await engine.start(ten, 0)

                await asyncio.gather(*(caller() for _ in range(16)))
                done = count // 16 * 16
                emit(starts_per_s=done / (time.perf_counter() - began), cpu_ms_per_start=(time.process_time() - cpu) / done * 1e3)
        case "queued":
            async with Engine(folder / "runs", concurrency=0) as engine:
                await engine.start(ten, 0)
            db = sqlite3.connect(folder / "runs" / ".host" / "intake.db")
            request = db.execute("SELECT body, sent_at FROM wf_requests").fetchone()
            row = db.execute("SELECT input_sha256, created_at FROM wf_index").fetchone()
            with db:
                db.executemany(
                    "INSERT INTO wf_index(id, flow, status, arrival, input_sha256, created_at) VALUES(?, 'ten', 'queued', ?, ?, ?)",
                    ((f"q-{number}", number + 10, *row) for number in range(count)),
                )
                db.executemany(
                    "INSERT INTO wf_requests(id, instance, kind, body, sent_at) VALUES(?, ?, 'start', ?, ?)",
                    ((f"start:q-{number}", f"q-{number}", *request) for number in range(count)),
                )
            db.close()
            began = time.perf_counter()
            async with Engine(folder / "runs") as engine:
                await engine.run("q-0").result()
                first = time.perf_counter() - began
                await engine.run("q-500").result()
                emit(first_result_s=first, result_500_s=time.perf_counter() - began, rss_mib=rss_bytes() / 2**20)
                os._exit(0)


async def _all_parked(engine: Any, waits: Callable[[], Awaitable[None]], count: int) -> None:
    wanted = engine.parked + count
    for _ in range(count):
        await engine.start(waits)
    while engine.parked < wanted:
        await asyncio.sleep(0.05)


# -- the others ------------------------------------------------------------------------------------------------------------------


BARE = "INSERT INTO wf_steps(key, name, kind, status, input_sha256, output, started_at) VALUES(?, 'trivial', 'step', 'done', '', ?, '')"


def bare_file(path: Path, empty: bytes | None = None) -> sqlite3.Connection:
    from workflow import journal

    path.write_bytes(empty or journal.template())
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    return db


def floor(folder: Path, count: int) -> None:
    from workflow import journal

    empty = journal.template()
    began, cpu = time.perf_counter(), time.process_time()
    for number in range(count):
        db = bare_file(folder / f"{number}.db", empty)
        for step in range(STEPS + 2):
            db.execute(BARE, (f"trivial#{step}", str(step)))
        db.close()
    took = time.perf_counter() - began
    emit(workflows_per_s=count / took, cpu_ms_per_step=(time.process_time() - cpu) / count / STEPS * 1e3)


def floor_steps(folder: Path, count: int) -> None:
    db = bare_file(folder / "one.db")
    cpu = time.process_time()
    for step in range(count):
        db.execute(BARE, (f"trivial#{step}", str(step)))
    figure = (time.process_time() - cpu) / count * 1e3
    db.close()
    emit(cpu_ms_per_async_step=figure, cpu_ms_per_plain_step=figure)


async def hop_steps(folder: Path, count: int) -> None:
    """The same commits in a thread, each given by an event loop that does nothing else; for a plain step another thread does nothing before."""
    loop = asyncio.get_running_loop()
    reads, writes = os.pipe2(os.O_NONBLOCK)
    bodies: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
    commits: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()

    def work(given: queue.SimpleQueue[tuple[Any, ...] | None]) -> None:
        while (item := given.get()) is not None:
            item[0](*item[1:])
            os.write(writes, b"!")

    async def hops(count: int, is_plain: bool) -> float:
        db = bare_file(folder / f"{count}-{is_plain}.db")
        steps = ([(bodies, (int,))] if is_plain else []) + [(commits, (db.execute, BARE))]
        left = iter([(given, item, step) for step in range(count) for given, item in steps])
        done = loop.create_future()

        def go_on() -> None:
            given, item, step = next(left, (None, (), 0))
            if given is None:
                done.set_result(None)
            else:
                given.put((*item, (f"trivial#{step}", str(step))) if given is commits else item)

        def answer() -> None:
            os.read(reads, 64)
            go_on()

        loop.add_reader(reads, answer)
        cpu = time.process_time()
        go_on()
        await done
        used = time.process_time() - cpu
        db.close()
        return used / count * 1e3

    for given in (bodies, commits):
        threading.Thread(target=work, args=(given,)).start()
    figures = {}
    for name, is_plain in (("async", False), ("plain", True)):
        await hops(20, is_plain)
        figures[f"cpu_ms_per_{name}_step"] = await hops(count, is_plain)
    bodies.put(None)
    commits.put(None)
    loop.remove_reader(reads)
    emit(**figures)


def dbos(folder: Path, case: str, count: int) -> None:
    from dbos import DBOS, SetWorkflowID

    config: Any = {
        "name": "bench",
        "system_database_url": f"sqlite:///{folder}/dbos.sqlite",
        "log_level": "ERROR",
        "executor_id": "bench-0",
        "application_version": "v1",
        "notification_listener_polling_interval_sec": 0.01,
    }
    DBOS(config=config)

    @DBOS.step()
    async def trivial(value: int) -> int:
        return value + 1

    @DBOS.workflow()
    async def ten(value: int) -> int:
        for _ in range(STEPS):
            value = await trivial(value)
        return value

    arrived = [0]

    @DBOS.workflow()
    async def half(value: int) -> int:
        for _ in range(STEPS // 2):
            value = await trivial(value)
        arrived[0] += 1
        if os.environ.get("BENCH_STOP"):
            await asyncio.sleep(3600)
        for _ in range(STEPS // 2):
            value = await trivial(value)
        return value

    async def go() -> None:
        DBOS.launch()
        if case == "interrupt":
            for number in range(count):
                with SetWorkflowID(f"run-{number}"):
                    await DBOS.start_workflow_async(half, 0)
            while arrived[0] < count:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            os._exit(0)
        if case == "recover":
            for number in range(count):
                handle = await DBOS.retrieve_workflow_async(f"run-{number}")
                assert await handle.get_result() == STEPS
            emit(all_done_s=time.time() - float(os.environ["BENCH_BEGAN"]), cpu_s=time.process_time())
            os._exit(0)
        await ten(0)
        began, cpu = time.perf_counter(), time.process_time()
        if case == "serial":
            for _ in range(count):
                await ten(0)
        else:
            handles = [await DBOS.start_workflow_async(ten, 0) for _ in range(count)]
            await asyncio.gather(*(handle.get_result() for handle in handles))
        took = time.perf_counter() - began
        emit(workflows_per_s=count / took, cpu_ms_per_step=(time.process_time() - cpu) / count / STEPS * 1e3)
        os._exit(0)

    asyncio.run(go())


# -- in turn -----------------------------------------------------------------------------------------------------------------------

COUNTS = {
    "serial": 50, "fifty": 50, "recover": 100, "parked": 2000, "intake": 8000, "queued": 2_000_000, "asleep": 50_000, "replica": 20, "seaweed": 20,
    "steps": 1000,
}  # fmt: skip
RIVALS = {"serial": ("ours", "dbos", "floor"), "fifty": ("ours", "dbos"), "recover": ("ours", "dbos"), "steps": ("ours", "hop", "floor")}


def child(who: str, case: str, count: int, folder: Path) -> None:
    if who == "hop":
        asyncio.run(hop_steps(folder, count))
    elif who == "floor":
        (floor_steps if case == "steps" else floor)(folder, count)
    elif who == "dbos":
        dbos(folder, case, count)
    else:
        asyncio.run(ours(folder, case, count))


def measure(who: str, case: str, count: int, bytecode: Path) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="bench-workflow-"))
    try:
        if case == "recover":
            _process(who, "interrupt", count, folder, bytecode, BENCH_STOP="1")
        return _process(who, case, count, folder, bytecode, BENCH_BEGAN=str(time.time()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _process(who: str, case: str, count: int, folder: Path, bytecode: Path, **environ: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.workflow", "--child", who, case, str(count), str(folder)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ |= {"PYTHONPYCACHEPREFIX": str(bytecode)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=kept | environ, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines and case != "interrupt":
        raise RuntimeError(f"{who} {case}: exit code {done.returncode}: {done.stderr[-800:]}")
    return json.loads(lines[-1][7:]) if lines else {}


def main(arguments: list[str]) -> None:
    rounds = int(arguments[arguments.index("-n") + 1]) if "-n" in arguments else 3
    cases = [item for item in arguments if not item.startswith("-") and not item.isdigit()] or list(COUNTS)
    try:
        import dbos as _
    except ImportError:
        print("dbos is not installed: it takes no part")
        has_dbos = False
    else:
        has_dbos = True
    for item in cases:
        case, _, number = item.partition("=")
        count = int(number) if number else COUNTS[case]
        whos = [who for who in RIVALS.get(case, ("ours",)) if who != "dbos" or has_dbos]
        found: dict[str, list[dict[str, float]]] = {who: [] for who in whos}
        with tempfile.TemporaryDirectory(prefix="bench-workflow-bytecode-") as bytecode:
            for _ in range(1 if case in ("queued", "asleep") else rounds):
                for who in whos:
                    found[who].append(measure(who, case, count, Path(bytecode)))
        for who, rows in found.items():
            for figure in rows[0]:
                values = sorted(row[figure] for row in rows)
                print(
                    f"{case:8} {who:6} {figure:24} median {statistics.median(values):12.2f}   min {values[0]:12.2f}   max {values[-1]:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
    else:
        main(sys.argv[1:])
