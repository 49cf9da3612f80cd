"""A deterministic scheduler with virtual time: real code in real threads, of which one runs at a time, and only when the scheduler says so.

    scheduler = Scheduler()
    task = scheduler.start(function)     # runs until it sleeps, or waits for `resume`
    scheduler.run(until=60.0)

Code under test blocks by calling `Task.suspend` or `Task.sleep` from its own thread; time passes only between events. Events of the same time happen in the
order in which they were planned. So a run depends on nothing but what the events do, and repeats exactly.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Crashed", "Scheduler", "Task"]


class Crashed(BaseException):
    """Raised in a task that is killed, wherever it is."""


class Scheduler:
    """Events in order of time. `now`: virtual seconds; `steps`: events so far."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0
        self._back = threading.Lock()
        self._back.acquire()
        self._tasks: list[Task] = []

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Plan an event; one in the past happens next."""
        self._planned += 1
        heapq.heappush(self._events, (max(when, self.now), self._planned, event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.at(self.now + seconds, event)

    def start(self, function: Callable[[Task], None]) -> Task:
        """Begin a task; its first step is an event of now."""
        task = Task(self, function)
        self._tasks.append(task)
        self.after(0.0, task.begin)
        return task

    def run(self, *, until: float, steps: int | None = None) -> None:
        """Let events happen up to a time, or until there were so many in all. An error in a task is raised here."""
        while self._events and self._events[0][0] <= until and (steps is None or self.steps < steps):
            when, _, event = heapq.heappop(self._events)
            self.now = when
            self.steps += 1
            event()
        if steps is None or self.steps < steps:
            self.now = max(self.now, until)

    def close(self) -> None:
        """Kill all tasks."""
        for task in self._tasks:
            task.kill()
        self._tasks.clear()

    def forget(self, task: Task) -> None:
        """Take note that a task has ended."""
        if task in self._tasks:
            self._tasks.remove(task)


class Task:
    """One flow of control. Its own code calls `suspend` and `sleep`; everything else is for events."""

    def __init__(self, scheduler: Scheduler, function: Callable[[Task], None]) -> None:
        self.is_dead = False
        self._scheduler, self._function = scheduler, function
        self._go = threading.Lock()
        self._go.acquire()
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="simulated", daemon=True)
        self._waiting = 0  # what it waits for: a late answer to an earlier question is dropped
        self._begun = False

    # -- for the task itself -----------------------------------------------------------------------------------------------------

    def ticket(self) -> int:
        """Return a number for what `suspend` is going to wait for."""
        self._waiting += 1
        return self._waiting

    def suspend(self) -> Any:
        """Wait for `resume`, and return its value, or raise it."""
        if self.is_dead:
            raise Crashed
        self._scheduler._back.release()
        self._go.acquire()
        value, self._value = self._value, None
        if self.is_dead:
            raise Crashed
        if isinstance(value, BaseException):
            raise value
        return value

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        ticket = self.ticket()
        self._scheduler.after(seconds, lambda: self.resume(ticket, None))
        self.suspend()

    # -- for events --------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        if not self.is_dead:
            self._begun = True
            self._thread.start()
            self._switch()

    def resume(self, ticket: int, value: Any) -> None:
        """Let the task go on, if it still waits for that ticket."""
        if self.is_dead or ticket != self._waiting:
            return
        self._waiting += 1
        self._value = value
        self._go.release()
        self._switch()

    def kill(self) -> None:
        """Let the task end where it is, as a killed process does."""
        if self.is_dead:
            return
        self.is_dead = True
        if self._begun:
            self._go.release()
            self._switch()

    def _switch(self) -> None:
        self._scheduler._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        try:
            self._function(self)
        except Crashed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.is_dead = True
            self._scheduler._back.release()
