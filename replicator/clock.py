"""Two clocks, and what can be said when they disagree.

The **steady** clock runs while the machine sleeps (CLOCK_BOOTTIME) and is never set; but a virtual machine that is paused stops it. The **wall** clock
is set by people and by NTP; after a pause it is usually the one that tells. So: how long something lasted *at least* is said by the steady clock, how
long it may have lasted *at most* by the longer of the two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

__all__ = ["SYSTEM", "Clock", "Moment", "SystemClock", "longest_s"]


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time on both clocks, in seconds; `wall` since 1970."""

    steady: float
    wall: float


class Clock(Protocol):
    """Where times come from."""

    def now(self) -> Moment: ...


class SystemClock:
    """This machine's clocks."""

    def now(self) -> Moment:
        steady = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
        return Moment(steady, time.time())


SYSTEM = SystemClock()


def longest_s(since: Moment, now: Moment) -> float:
    """Return how many seconds may have passed at most, as far as the clocks can tell."""
    return max(now.steady - since.steady, now.wall - since.wall)
