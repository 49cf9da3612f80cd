"""The event loop never waits for the disk: nothing that may sync runs in its thread, and whatever does sync ends only after the loop has turned.

No time is measured, so a busy machine changes nothing: every commit, every `fsync` and every close is held until the loop has turned a few more
times. A loop that waits for one of them stands still, which the one that is held sees.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests import sampleflows as sample
from workflow import Engine
from workflow import journal as jr

TURNS = 3
PATIENCE_S = 10.0


class Disk:
    """A slow disk: what syncs is held until the loop has turned."""

    def __init__(self) -> None:
        self.loop_thread = 0
        self.in_loop: list[str] = []
        self.stood_still: list[str] = []
        self.held = 0
        self._turns = 0
        self._turned = threading.Condition()
        self._is_over = False

    async def turn(self) -> None:
        """Turn with the loop."""
        self.loop_thread = threading.get_ident()
        while True:
            with self._turned:
                self._turns += 1
                self._turned.notify_all()
            await asyncio.sleep(0.0005)

    def end(self) -> None:
        with self._turned:
            self._is_over = True
            self._turned.notify_all()

    def sync(self, what: str) -> None:
        if threading.get_ident() == self.loop_thread:
            self.in_loop.append(what)
        if not self.loop_thread or self.in_loop or self._is_over:
            return
        with self._turned:
            wanted = self._turns + TURNS
            self.held += 1
            if not self._turned.wait_for(lambda: self._turns >= wanted or self._is_over, PATIENCE_S):
                self.stood_still.append(what)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    real_connect, real_fsync, real_fdatasync = sqlite3.connect, os.fsync, os.fdatasync

    def connect(path: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        if path == ":memory:":
            return real_connect(path, *args, **kwargs)
        found.sync(f"connect {path}") if threading.get_ident() == found.loop_thread else None

        class Watched(sqlite3.Connection):
            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]
                if sql == "COMMIT" or threading.get_ident() == found.loop_thread:
                    found.sync(sql)
                return super().execute(sql, *values)

            def executescript(self, sql: str) -> sqlite3.Cursor:  # type: ignore[override]
                found.sync(sql)
                return super().executescript(sql)

            def close(self) -> None:
                found.sync("close")
                super().close()

        return real_connect(path, *args, **kwargs, factory=Watched)

    monkeypatch.setattr(sqlite3, "connect", connect)
    monkeypatch.setattr(os, "fsync", lambda file: (found.sync("fsync"), real_fsync(file))[1])
    monkeypatch.setattr(os, "fdatasync", lambda file: (found.sync("fdatasync"), real_fdatasync(file))[1])
    return found


async def several_kinds(engine: Engine) -> None:
    runs = [
        await engine.start(sample.chain, 1, id="chain"),
        await engine.start(sample.branches),
        await engine.start(sample.transacts),
        await engine.start(sample.artifacts),
        await engine.start(sample.large_values),
        await engine.start(sample.stateful),
        await engine.start(sample.fails),
    ]
    waiting = await engine.start(sample.waits, id="waits")
    while await waiting.status() != "waiting":
        await asyncio.sleep(0.005)
    await waiting.send("approval", True)
    assert await waiting.result() == "True DONE"
    ends = await asyncio.gather(*(run.result() for run in runs), return_exceptions=True)
    assert [end for end in ends if isinstance(end, Exception)] == [ends[-1]]
    assert await (await engine.run("chain").fork(step="add#3")).result() == 11


@pytest.mark.parametrize("replica", ["", "replica"])
def test_the_event_loop_never_waits_for_the_disk(replica: str, disk: Disk, tmp_path: Path) -> None:
    async def run(use: Callable[[Engine], Awaitable[None]]) -> None:
        turning = asyncio.ensure_future(disk.turn())
        await asyncio.sleep(0)
        try:
            async with Engine(tmp_path / "runs", replica=f"file://{tmp_path}/root" if replica else None, park_after_s=0.0) as engine:
                await use(engine)
        finally:
            disk.end()
            turning.cancel()

    asyncio.run(run(several_kinds))
    assert disk.in_loop == []
    assert disk.stood_still == []
    assert disk.held > 60
    assert jr.read(tmp_path / "runs" / "chain.db").instance.status == "done"
