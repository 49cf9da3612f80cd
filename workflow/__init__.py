"""Durable workflows on SQLite: plain functions whose steps are recorded, one file for each run, resumed after a crash.

    from workflow import Engine, flow, step

    @step
    async def fetch(topic: str) -> list[str]: ...

    @flow
    async def research(topic: str) -> str:
        return ", ".join(await fetch(topic))

    async with Engine("agents/") as engine:
        run = await engine.start(research, "otters", id="otters-1")
        print(await run.result())

`replicator` does not depend on it.
"""

from __future__ import annotations

from workflow.client import Client, Run
from workflow.context import barrier, flow, patched, receive, send, sleep, state, step
from workflow.engine import Engine
from workflow.errors import Cancelled, Diverged, Fatal, OutcomeUnknown, StepFailed, WorkflowError
from workflow.state import Retry
from workflow.values import Artifact

__all__ = [
    "Artifact",
    "Cancelled",
    "Client",
    "Diverged",
    "Engine",
    "Fatal",
    "OutcomeUnknown",
    "Retry",
    "Run",
    "StepFailed",
    "WorkflowError",
    "barrier",
    "flow",
    "patched",
    "receive",
    "send",
    "sleep",
    "state",
    "step",
]
