"""`pyrepl demo workflow`: the recovery story, with real processes.

An agent of three steps (a plan from an API that fails at first, a report of 40 MB, publication after an approval) runs on "machine A": a process
and a folder, replicated to a third place. A is killed in the middle of a step and its folder deleted. "Machine B" has the replica and nothing else: it
takes over, repeats no finished step, is approved by a third process, and finishes. Then a fork goes on from the second step.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from workflow import Artifact, Client, Engine, Fatal, Retry, flow, receive, step
from workflow import journal as jr

__all__ = ["run"]

REPORT_BYTES = 40 << 20
ID = "otters-1"


def _note(what: str) -> None:
    with open(os.environ["DEMO_LOG"], "a") as file:
        file.write(f"{os.environ['DEMO_MACHINE']} {what}\n")


@step(kind="http", retry=Retry(attempts=5, first=0.2, cap=1.0), timeout=10)
def make_plan(topic: str) -> list[str]:
    with urllib.request.urlopen(f"{os.environ['DEMO_API']}/plan?topic={topic}", timeout=5) as answer:
        plan: list[str] = json.loads(answer.read())
    _note("plan")
    return plan


@step(durability="replicated")
def render(plan: list[str]) -> Artifact:
    _note("render")
    return Artifact.of(" ".join(plan).encode().ljust(REPORT_BYTES, b"."), media_type="application/pdf")


@step
async def check(report: Artifact) -> int:
    _note("check begins")
    if os.environ["DEMO_MACHINE"] == "A":
        await asyncio.sleep(3600)  # this is where A is killed
    _note("check")
    return len(await asyncio.to_thread(report.read))


@flow
async def research(topic: str) -> str:
    plan = await make_plan(topic)
    report = await render(plan)
    size = await check(report)
    if not await receive("approval", bool):
        raise Fatal("not approved")
    return f"published {size:,} bytes on {topic}"


class _Flaky(http.server.BaseHTTPRequestHandler):
    """An API that is down for its first two requests."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        failing = self.requests <= 2
        self.send_response(503 if failing else 200)
        self.end_headers()
        if not failing:
            self.wfile.write(b'["rivers", "seas", "zoos"]')

    def log_message(self, *_: object) -> None:
        pass


def run(arguments: Sequence[str], *, keep: bool = False) -> int:
    """Run the demo, with a replica at a URL or beside the folders; returns 0 only if all went as told."""
    base = Path(tempfile.mkdtemp(prefix="pyrepl-demo-workflow-"))
    url = arguments[0] if arguments else f"file://{base}/bucket"
    api = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Flaky)
    threading.Thread(target=api.serve_forever, daemon=True).start()
    environ = {"DEMO_LOG": str(base / "log"), "DEMO_API": f"http://127.0.0.1:{api.server_port}"}
    try:
        return _run(base, url, environ)
    finally:
        api.shutdown()
        if keep:
            print(f"kept      {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)


def _run(base: Path, url: str, environ: dict[str, str]) -> int:
    from replicator import open_client

    with_name = open_client(url)
    print(f"replica   {with_name.url}")
    with_name.close()
    log = base / "log"

    def said() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    def machine(name: str, *what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "workflow.demo", str(base / name), url, *what]
        return subprocess.Popen(command, env={**os.environ, **environ, "DEMO_MACHINE": name}, stdout=subprocess.PIPE, text=True)

    first = machine("A", "start")
    print(f"started   machine A (pid {first.pid}): plan, report of 40 MB, check, approval")
    _wait_for(lambda: "A check begins" in said(), first, "the third step on A")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    shutil.rmtree(base / "A")
    print("killed    A with SIGKILL in the middle of its third step, and deleted its folder")
    began = time.monotonic()
    second = machine("B", "resume")
    _wait_for(lambda: "B check" in said(), second, "the third step on B")
    resumed_s = time.monotonic() - began
    print(f"resumed   on machine B (pid {second.pid}), from the replica alone, in {resumed_s:.2f} s; no recorded step ran again")
    approver = [sys.executable, "-m", "replicator", "wf", "send", str(base / "B"), ID, "approval", "true", "-sender", "kim"]
    subprocess.run(approver, check=True, stdout=subprocess.DEVNULL)
    print("approved  by a third process: pyrepl wf send B otters-1 approval true")
    result, _ = second.communicate(timeout=60)
    print(f"finished  {result.strip()}")
    subprocess.run([sys.executable, "-m", "replicator", "wf", "timeline", str(base / "B"), ID], check=True)
    resumed = said()
    third = machine("B", "fork")
    forked, _ = third.communicate(timeout=60)
    print(f"forked    from step render: {forked.strip()}")
    recorded = ("plan", "render")
    bodies = [line for line in said() if not line.endswith("begins")]
    expected = ["A plan", "A render", "B check", "B render", "B check"]
    columns, calls = jr.rows(base / "B" / f"{ID}.db", "wf_api_calls")
    tries = [row[columns.index("outcome")] for row in calls]
    ok = bodies == expected and "published 41,943,040 bytes" in result and "published" in forked
    _figures(
        [
            ("time to resume, process start and restore included", f"{resumed_s:.2f} s"),
            ("recorded steps not repeated", f"{sum(f'B {name}' not in resumed for name in recorded)} of {len(recorded)}"),
            ("attempts of the API call", ", ".join(tries)),
            ("loss window of replicated steps", "0"),
            ("result", "as if nothing had happened" if ok else f"FAILED: {bodies}"),
        ]
    )
    return 0 if ok else 1


def _wait_for(holds: object, process: subprocess.Popen[str], what: str) -> None:
    assert callable(holds)
    end = time.monotonic() + 60
    while not holds():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"no {what}: exit code {process.poll()}")
        time.sleep(0.01)


def _figures(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


async def _machine(folder: str, url: str, what: str) -> None:
    async with Engine(folder, replica=url, lease_ttl_s=2.0) as engine:
        if what == "start":
            await engine.start(research, "otters", id=ID)
        run = engine.run(ID)
        if what == "fork":
            run = await run.fork(step="render", id="otters-fork")
            await Client(folder).run(run.id).send("approval", True)
        print(await run.result())


if __name__ == "__main__":
    from workflow import demo  # the flows are those of the module's own name, not of __main__

    asyncio.run(demo._machine(*sys.argv[1:4]))
