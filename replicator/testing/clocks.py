"""A clock that moves when it is told to."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

__all__ = ["ManualClock"]


class ManualClock:
    """Wall clock and steady clock in one. Give the object itself where a wall clock is asked for, and its methods for the others.

        clock = ManualClock()
        Engine(..., clock=clock)
        Keeper(..., clock=clock, monotonic=clock.monotonic)
        MemoryClient(clock_ns=clock.time_ns)

    May be used from any thread.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._lock = threading.Lock()
        self._wall = start.timestamp()
        self._steady = 0.0

    def __call__(self) -> float:
        """Seconds since 1970."""
        with self._lock:
            return self._wall

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        return int(self() * 1e9)

    def monotonic(self) -> float:
        """Seconds of the steady clock, which `jump` does not move."""
        with self._lock:
            return self._steady

    def now(self) -> datetime:
        """The wall clock as a time point in UTC."""
        return datetime.fromtimestamp(self(), UTC)

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks. Raises `ValueError` for less than no time: see `jump`."""
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds} s")
        with self._lock:
            self._wall += seconds
            self._steady += seconds

    sleep = advance
    """For code that takes a function to sleep with: returns at once, and the time has passed."""

    def jump(self, seconds: float) -> None:
        """Set the wall clock, forward or back, as an operator or NTP does."""
        with self._lock:
            self._wall += seconds
