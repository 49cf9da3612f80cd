"""For tests of flows: a clock that skips waiting, a crash at every commit and every barrier, recorded files against changed code.

    def test_research_survives_everything(tmp_path):
        crash_everywhere(tmp_path, start(research, "otters"))

A **scenario** is an async function of an engine that starts a run, sends what it needs, and returns what is to be compared. It is run from its
beginning after each crash, as a caller would try again: give ids to runs and events.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from workflow import journal as jr
from workflow.clock import Clock, Timers
from workflow.context import Flow, flows
from workflow.engine import Engine
from workflow.errors import RunFailed, WorkflowError
from workflow.state import ENDED
from workflow.values import iso

__all__ = [
    "CrashMachine",
    "CrashReport",
    "VirtualClock",
    "crash_everywhere",
    "crash_machine",
    "replay_recorded",
    "run_to_crash",
    "start",
    "virtual_engine",
]

Scenario = Callable[[Engine], Awaitable[Any]]


class VirtualClock(Clock):
    """A clock that stands still until `advance`. The wall clock and the monotonic one move together."""

    def __init__(self, now: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._start = now
        self._passed_s = 0.0

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._passed_s)

    def stamp(self) -> str:
        """Return the clock as it is recorded."""
        return iso(self.now())

    def monotonic(self) -> float:
        return self._passed_s

    def delay_s(self, due: float) -> float | None:
        return 0.0 if due <= self._passed_s else None

    def advance(self, seconds: float) -> None:
        """Move on."""
        self._passed_s += seconds

    def skip(self, timers: Timers) -> bool:
        """Move to the next timer and fire it; False when there is none."""
        due = timers.next_due()
        if due is None:
            return False
        self._passed_s = max(self._passed_s, due)
        timers.fire()
        return True


@contextlib.asynccontextmanager
async def virtual_engine(folder: Path, **settings: Any) -> AsyncIterator[Engine]:
    """An engine that never waits: whenever all runs only wait, the clock skips to what is due next. Timeouts of bodies stay real."""
    clock = settings.setdefault("clock", VirtualClock())
    settings.setdefault("synchronous", "OFF")
    settings.setdefault("park_after_s", 0.0)
    async with Engine(folder, **settings) as engine:
        skipping = asyncio.ensure_future(_skip(engine, clock))
        try:
            yield engine
        finally:
            skipping.cancel()
            await asyncio.wait({skipping})


async def _skip(engine: Engine, clock: VirtualClock) -> None:
    while True:
        await asyncio.sleep(0.0005)
        if engine.is_at_rest:
            for _ in range(3):  # a timer without delay is due in the next turn, after this task: by then what parks at once has begun to
                await asyncio.sleep(0)
            if engine.is_at_rest:
                clock.skip(engine.timers)


class _Crash(BaseException):
    pass


class _Faults:
    """Count commits; refuse all from number `at` on, or from where it says so."""

    def __init__(self, at: int | Callable[[str, str], bool] | None) -> None:
        self._at = at
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self.count = 0
        self.is_dead = False
        self.died = asyncio.Event()

    def __call__(self, id: str, where: str) -> None:
        with self._lock:
            self.count += not self.is_dead
            if not self.is_dead and (self._at(id, where) if callable(self._at) else self.count == self._at):
                self.is_dead = True
                self._loop.call_soon_threadsafe(self.died.set)
            if self.is_dead:
                raise _Crash


@dataclass(slots=True)
class CrashReport:
    """What `crash_everywhere` did. `points`: commits, twice each (before and after); `repeated`: recorded steps whose body ran again."""

    points: int = 0
    tried: int = 0
    expected: Any = None
    repeated: list[str] = field(default_factory=list)


def start(flow: Callable[..., Any], *args: Any, id: str = "it", events: tuple[tuple[str, Any], ...] = (), **kwargs: Any) -> Scenario:
    """Return the scenario of one run: start it, send it some events, and compare its result, or how it failed."""

    async def scenario(engine: Engine) -> Any:
        run = await engine.start(flow, *args, id=id, **kwargs)
        for number, (type, payload) in enumerate(events):
            with contextlib.suppress(WorkflowError):  # a run that has ended does not want it
                await run.send(type, payload, id=f"{id}-event-{number}")
        try:
            return "returned", await run.result()
        except RunFailed as error:
            return error.status, error.type_name, error.message

    return scenario


async def run_to_crash(
    folder: Path, scenario: Scenario, at: int | Callable[[str, str], bool] | None, settings: dict[str, Any]
) -> tuple[bool, Any, int]:
    """Run a scenario on a virtual clock, and crash at a commit.

    Args:
        at: its number, odd before it and even after it; or called at each with the run's id and "before" or "after", true for the one. None: never.
        settings: for `Engine`.

    Returns (whether it came to its end, its answer, how many points there were).
    """
    faults = _Faults(at)
    clock = VirtualClock()
    chosen: dict[str, Any] = {"clock": clock, "synchronous": "OFF", "park_after_s": 0.0, "random": Random(1)} | settings
    engine = Engine(folder, **chosen, faults=faults)

    async def all_of_it() -> Any:
        await engine.__aenter__()
        skipping = asyncio.ensure_future(_skip(engine, clock))
        try:
            return await scenario(engine)
        finally:
            skipping.cancel()

    work, death = asyncio.ensure_future(all_of_it()), asyncio.ensure_future(faults.died.wait())
    await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
    if not faults.is_dead:
        with contextlib.suppress(_Crash):  # the last commits are points, too
            await engine.__aexit__()
    death.cancel()
    if not faults.is_dead:
        return True, work.result(), faults.count
    work.cancel()
    await asyncio.wait({work})
    if not work.cancelled():
        work.exception()
    await engine.crash()
    return False, None, faults.count


def recorded(folder: Path) -> dict[str, set[str]]:
    """Return the keys of the steps that are final, for each run of a folder."""
    found = {}
    for path in sorted(folder.glob("*.db")):
        found[path.stem] = {record.key for record in jr.read(path).records if record.is_final}
    return found


def crash_everywhere(
    folder: Path,
    scenario: Scenario,
    *,
    bodies: Callable[[], list[str]] | None = None,
    points: Callable[[int], list[int]] | None = None,
    expected: Any = None,
    **settings: Any,
) -> CrashReport:
    """Run a scenario uninterrupted, then once for each of its commits and barriers, with a crash before or after it and a second engine that goes on.

    Args:
        folder: for the files; each try has a folder of its own in it, deleted when it went well.
        bodies: returns, and forgets, the idempotency keys (`step.key()`) of all bodies that ran since it was last asked.
        points: which of so many points to try, from 1; all when not given.
        expected: the answer, when an uninterrupted run is not what it is to be compared with.
        settings: for `Engine`. With `replica=` each try has a root of its own below it, and each wait for the replica is a point, too.

    Raises:
        AssertionError: an answer differs, or a step that was recorded ran again.
    """
    asked = bodies or list
    whole, answer, count = asyncio.run(run_to_crash(folder / "whole", scenario, None, _own_root(settings, "whole")))
    assert whole
    asked()
    report = CrashReport(points=count, expected=answer if expected is None else expected)
    for at in points(count) if points else range(1, count + 1):
        place = folder / f"at-{at}"
        ended, found, _ = asyncio.run(run_to_crash(place, scenario, at, _own_root(settings, place.name)))
        done = recorded(place)
        asked()
        if not ended:
            ended, found, _ = asyncio.run(run_to_crash(place, scenario, None, _own_root(settings, place.name)))
        again = [key for key in asked() if key.partition("@")[2].partition("/")[2] in done.get(key.partition("@")[0], ())]
        report.repeated += again
        report.tried += 1
        assert ended
        assert not again, f"crash at point {at} of {count}: {again} were recorded and ran again ({place})"
        assert found == report.expected, f"crash at point {at} of {count}: {found!r} instead of {report.expected!r} ({place})"
        shutil.rmtree(place)
    return report


def _own_root(settings: dict[str, Any], name: str) -> dict[str, Any]:
    if settings.get("replica") is None:
        return settings
    from workflow.ownership import below

    return settings | {"replica": below(settings["replica"], name)}


class CrashMachine(RuleBasedStateMachine):
    """Crash a scenario again and again, at commits that Hypothesis chooses; the answer must be that of an uninterrupted run.

    Make one for your flow with `crash_machine(start(flow, ...))`, and give it to pytest: `TestFlow = crash_machine(...).TestCase`.
    """

    scenario: Scenario
    settings_of_engine: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._folder = Path(tempfile.mkdtemp(prefix="workflow-crash-"))
        self._is_over = False

    @initialize()
    def uninterrupted(self) -> None:
        """Find out what is expected."""
        _, self._expected, _ = asyncio.run(run_to_crash(self._folder / "whole", type(self).scenario, None, self.settings_of_engine))

    @rule(at=st.integers(1, 60))
    def crash(self, at: int) -> None:
        """Go on, and crash at a commit, if it comes so far."""
        if self._is_over:
            return
        self._is_over, answer, _ = asyncio.run(run_to_crash(self._folder / "crashed", type(self).scenario, at, self.settings_of_engine))
        assert not self._is_over or answer == self._expected

    def teardown(self) -> None:
        """Let it come to its end."""
        try:
            if not self._is_over and hasattr(self, "_expected"):
                ended, answer, _ = asyncio.run(run_to_crash(self._folder / "crashed", type(self).scenario, None, self.settings_of_engine))
                assert ended
                assert answer == self._expected
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def crash_machine(scenario: Scenario, *, examples: int = 10, crashes: int = 4, **settings_of_engine: Any) -> type[CrashMachine]:
    """Return a Hypothesis machine for a scenario.

    Args:
        examples: so many runs, each with up to `crashes` crashes.
        settings_of_engine: for `Engine`. It may crash more often than a run may without progress, so nothing is quarantined.
    """
    settings_of_engine.setdefault("max_crashes", 1_000_000)
    made: type[CrashMachine] = type(
        "CrashMachineOfScenario", (CrashMachine,), {"scenario": staticmethod(scenario), "settings_of_engine": settings_of_engine}
    )
    made.TestCase.settings = settings(max_examples=examples, stateful_step_count=crashes, deadline=None)
    return made


def replay_recorded(path: Path, flow: Callable[..., Any], folder: Path) -> tuple[str, str | None]:
    """Let changed code run over a copy of a recorded file, as far as the record goes; returns (status, error).

    The status is `diverged` when the code does not do what was recorded. A record that has ended must lead to the same end; one that has not is run
    on, so give the flow harmless steps then.

    Args:
        path: an instance file. It is not changed.
        flow: the changed flow, under the name that the record has.
        folder: an empty one for the copy.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"not a flow: {flow!r}")
    loaded = jr.read(path)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{loaded.instance.id}.db"
    jr.copy(path, copy)
    jr.reopen(copy, flow.name)

    async def again() -> tuple[str, str | None]:
        async with virtual_engine(folder) as engine:
            await engine.adopt(loaded.instance.id)
            status, _, error = await engine.ending(loaded.instance.id)
            return status, error

    registered = flows.get(flow.name)
    flows[flow.name] = flow
    try:
        status, error = asyncio.run(again())
    finally:
        if registered is not None:
            flows[flow.name] = registered
    if loaded.instance.status in ENDED and status != "diverged" and (status, error) != (loaded.instance.status, loaded.instance.error):
        return "diverged", f"the record ended {loaded.instance.status}, this code ends {status}: {error}"
    return status, error
