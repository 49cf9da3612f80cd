"""The sample flows on DBOS, as an oracle: their source as it stands, with the names of `workflow` bound to DBOS's features.

    python -m tests.dbosflows FOLDER BROKEN.json          prints {flow: result} as its last line

`BROKEN.json` has, for each flow, which of its bodies (from 1) is never to end: when all flows have come there, or have ended, the process is killed. Without it,
all flows run to their ends; those that an earlier process began, DBOS recovers first. A day takes less than half a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import workflow
from workflow import Fatal, Retry, StepFailed
from workflow.errors import RunFailed

NO_COUNTERPART = {
    "branches": "keys of steps by the path of their task: DBOS counts the steps of a workflow in the order in which they begin",
    "nested": "keys of steps by the path of their task",
    "without_arguments": "a key of a step that its body can ask for",
    "first_of_several": "the order in which results reach the flow is not recorded: each replay may see another",
    "waits_wrong_type_first": "messages have no type that is checked before they are consumed",
    "asks_twice": "two waits for one topic at once",
    "transacts": "transactions in the workflow's own SQLite file",
    "stateful": "state of a run that is written with its steps",
    "artifacts": "bytes by reference",
    "versioned": "a patch that an async flow asks about without awaiting",
    "cleans_up": "steps in `finally` after a cancellation",
    "cancelled_in_branches": "steps in `finally` after a cancellation",
}
"""Which sample flows use something that DBOS 3.4 has not, and what."""

ONLY_UNINTERRUPTED = {
    "group_fails": "several steps in each of several branches: recovery numbers them in another order, and stops with DBOSUnexpectedStepError, or not",
    "sleeps_in_parallel": "a timer and a step in each of several branches: recovery may give one branch's result to another",
}
"""Which ones DBOS 3.4 runs to the same result only while nothing kills it: it numbers steps in the order in which they begin, which is the same
again where each branch has one step."""

SHORTER = 200_000.0
_seen: Counter[str] = Counter()
_broken: dict[str, int] = {}
_stuck: set[str] = set()
_lock = threading.Lock()


def _name() -> str:
    from dbos import DBOS

    return str(DBOS.workflow_id).partition("~")[0]


def _body() -> bool:
    """Count a body that begins; says whether it is the one that shall not end."""
    with _lock:
        _seen[_name()] += 1
        is_last = _seen[_name()] == _broken.get(_name())
        if is_last:
            _stuck.add(_name())
        return is_last


def _seconds(duration: float | timedelta | None, otherwise: float) -> float:
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    return otherwise if seconds is None else seconds / SHORTER


def _failed(name: str, error: Exception, attempts: int) -> StepFailed:
    from dbos._error import DBOSMaxStepRetriesExceeded

    if isinstance(error, DBOSMaxStepRetriesExceeded):
        error, attempts = error.errors[-1], len(error.errors)
    return StepFailed(name, type(error).__name__, str(error), attempts)


class OnDBOS:
    """`step`, and what acts on the attempt that runs."""

    def __call__(self, function: Callable[..., Any] | None = None, /, *, retry: Retry | None = None, **_: Any) -> Any:
        if function is None:
            return functools.partial(self, retry=retry)
        from dbos import DBOS

        body: Any
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def body(*args: Any, **kwargs: Any) -> Any:
                if _body():
                    await asyncio.sleep(3600)
                return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def body(*args: Any, **kwargs: Any) -> Any:
                if _body():
                    threading.Event().wait()
                return function(*args, **kwargs)

        more: dict[str, Any] = {}
        if retry is not None:
            more = {
                "retries_allowed": True,
                "interval_seconds": retry.first / SHORTER,
                "backoff_rate": retry.factor,
                "max_attempts": retry.attempts,
                "should_retry": lambda error: not isinstance(error, Fatal),
            }
        on_dbos = DBOS.step(name=function.__name__, **more)(body)
        name = f"{function.__name__}#1"

        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                if inspect.iscoroutinefunction(function):
                    return await on_dbos(*args, **kwargs)
                return await asyncio.to_thread(on_dbos, *args, **kwargs)
            except Exception as error:
                raise _failed(name, error, 1) from error

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                asyncio.get_running_loop()
            except RuntimeError:  # a flow that is a plain function, in a thread
                return asyncio.run(call(*args, **kwargs)) if inspect.iscoroutinefunction(function) else on_dbos(*args, **kwargs)
            return call(*args, **kwargs)

        return called

    @staticmethod
    def key() -> str:
        from dbos import DBOS

        return f"{DBOS.workflow_id}/{DBOS.step_id}"


def flow(function: Callable[..., Any] | None = None, /, **_: Any) -> Any:
    """Make a workflow of DBOS; called in another one it is a child."""
    if function is None:
        return flow
    from dbos import DBOS, SetWorkflowID

    on_dbos: Any = DBOS.workflow(name=function.__name__)(function)
    count: Counter[str] = Counter()

    @functools.wraps(function)
    async def called(*args: Any, **kwargs: Any) -> Any:
        parent = str(DBOS.workflow_id)
        count[parent] += 1
        try:
            with SetWorkflowID(f"{parent}-{function.__name__}-{count[parent]}"):
                handle = await DBOS.start_workflow_async(on_dbos, *args, **kwargs)
            return await handle.get_result(polling_interval_sec=0.01)
        except StepFailed as error:  # a child failed with what its step failed with
            raise StepFailed(f"{function.__name__}#1", "StepFailed", str(error), 1) from error

    called.on_dbos = on_dbos  # type: ignore[attr-defined]
    return called


def sleep(duration: float | timedelta) -> Any:
    from dbos import DBOS

    seconds = _seconds(duration, 0.0)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return DBOS.sleep(seconds)
    return DBOS.sleep_async(seconds)


async def receive(type: str, result: Any = Any, *, timeout: float | timedelta | None = None) -> Any:
    from dbos import DBOS

    return await DBOS.recv_async(type, timeout_seconds=_seconds(timeout, 60.0))


async def send(run: str, type: str, payload: Any = None) -> None:
    from dbos import DBOS

    await DBOS.send_async(f"{_name()}~{run}", payload, type)


class Run:
    """What scenarios ask of a run."""

    def __init__(self, id: str) -> None:
        self.id = id

    async def send(self, type: str, payload: Any, *, id: str) -> None:
        from dbos import DBOS

        await DBOS.send_async(self.id, payload, type, idempotency_key=id)

    async def result(self) -> Any:
        from dbos import DBOS

        handle: Any = await DBOS.retrieve_workflow_async(self.id)
        try:
            return await handle.get_result(polling_interval_sec=0.01)
        except Exception as error:
            raise RunFailed(self.id, "failed", type(error).__name__, str(error)) from error


class Scenes:
    """An engine, to one scenario."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def start(self, flow: Any, *args: Any, id: str) -> Run:
        from dbos import DBOS, SetWorkflowID

        run = Run(f"{self.name}~{id}")
        if await DBOS.get_workflow_status_async(run.id) is None:
            with SetWorkflowID(run.id):
                if inspect.iscoroutinefunction(flow.__wrapped__):
                    await DBOS.start_workflow_async(flow.on_dbos, *args)
                else:
                    await asyncio.to_thread(DBOS.start_workflow, flow.on_dbos, *args)
        return run


async def play(folder: Path) -> dict[str, Any]:
    from dbos import DBOS

    config: Any = {
        "name": "oracle",
        "system_database_url": f"sqlite:///{folder}/dbos.sqlite",
        "log_level": "CRITICAL",
        "executor_id": "oracle",
        "application_version": "1",
        "notification_listener_polling_interval_sec": 0.01,
    }
    DBOS(config=config)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
    names: Any = {"step": OnDBOS(), "flow": flow, "sleep": sleep, "receive": receive, "send": send}
    for name, value in names.items():
        setattr(workflow, name, value)
    from tests.sampleflows import SCENARIOS

    DBOS.launch()
    results: dict[str, Any] = {}

    async def one(name: str) -> None:
        scene: Any = Scenes(name)
        results[name] = await SCENARIOS[name](scene)
        _stuck.add(name)

    wanted = [name for name in SCENARIOS if name not in NO_COUNTERPART]
    playing = asyncio.gather(*(one(name) for name in wanted))
    if _broken:
        while not _stuck >= set(wanted):
            await asyncio.sleep(0.01)
        os._exit(9)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(playing, 60)
    return results


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _broken.update(json.loads(Path(sys.argv[2]).read_text()))
    found = asyncio.run(play(Path(sys.argv[1])))
    print("\n" + json.dumps({"results": found, "bodies": _seen}), flush=True)
    os._exit(0)
