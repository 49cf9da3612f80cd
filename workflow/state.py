"""DECISIONS: states of a run and a step, what a record means on replay, when to try again, keys and ids. No clock, no files.

A **step key** is the path of the task that calls, the step's name, and how often this task has called that name: `2/1/search#3` is the third
`search` of the first task that was created by the second task that the flow created. A task takes its number when it is created, a step its
ordinal when it is called, so that neither depends on which branch is faster.

**Order.** Each record that is final has a number in the order of finishing. Results reach the flow one at a time in that order, live and on
replay alike, each when the flow has come to rest after the one before. A flow is therefore a function of its records.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from workflow.errors import BadId, Fatal

__all__ = [
    "ENDED",
    "FINAL",
    "MAX_RESUMES",
    "Durability",
    "Kind",
    "Next",
    "Record",
    "Retry",
    "RunStatus",
    "StepStatus",
    "after_failure",
    "check_id",
    "check_name",
    "child_id",
    "idempotency_key",
    "remaining_wait_s",
    "replay",
    "step_key",
    "ulid",
]

Durability = Literal["local", "replicated"]
RunStatus = Literal["queued", "running", "waiting", "paused", "done", "failed", "cancelled", "diverged", "quarantined"]
StepStatus = Literal["started", "retrying", "waiting", "done", "failed", "unknown", "cancelled"]
Kind = Literal["step", "llm", "tool", "http", "tx", "sleep", "receive", "send", "child", "barrier", "patch", "cancel"]

ENDED: frozenset[str] = frozenset(("done", "failed", "cancelled", "diverged", "quarantined"))
"""States that a run does not leave."""

FINAL: frozenset[str] = frozenset(("done", "failed", "unknown", "cancelled"))
"""States that a step does not leave."""

MAX_RESUMES = 5
"""So often may a run take its process down without finishing a step in between."""


@dataclass(frozen=True, slots=True)
class Retry:
    """When to try again: `attempts` in all; waits of first, first * factor, ... up to cap seconds, each a random part of that (full jitter).

    `on`: which errors are worth another attempt: exception types, or a function of the error. `Fatal` never is.
    """

    attempts: int = 3
    first: float = 1.0
    factor: float = 2.0
    cap: float = 60.0
    jitter: bool = True
    on: type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] = Exception

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first < 0 or self.cap < 0 or self.factor < 1:
            raise ValueError("attempts >= 1, first >= 0, cap >= 0, factor >= 1")

    def allows(self, error: Exception) -> bool:
        """Say whether this error is worth another attempt."""
        if isinstance(error, Fatal):
            return False
        return isinstance(error, self.on) if isinstance(self.on, (type, tuple)) else bool(self.on(error))

    def delay_s(self, attempt: int, random: Random) -> float:
        """Return the wait after attempt number `attempt`, from 1."""
        longest = min(self.cap, self.first * self.factor ** min(attempt - 1, 1000))
        return random.uniform(0, longest) if self.jitter else longest


def after_failure(retry: Retry, attempt: int, error: Exception, random: Random) -> float | None:
    """Return how many seconds to wait before the next attempt; None when there is none."""
    if attempt >= retry.attempts or not retry.allows(error):
        return None
    return retry.delay_s(attempt, random)


@dataclass(slots=True)
class Record:
    """A step as its row has it. `number`: place in the order of finishing; `after`: number of the newest final record when it was called."""

    key: str
    seq: int
    name: str
    kind: Kind
    status: StepStatus
    input: str | None = None
    input_sha256: str = ""
    output: str | None = None
    output_sha256: str | None = None
    error: str | None = None
    number: int | None = None
    after: int = 0
    attempts: int = 0
    durability: Durability = "local"
    repeat: bool = True
    wake_at: str | None = None
    started_at: str = ""
    finished_at: str | None = None

    @property
    def path(self) -> str:
        """The path of the task that called."""
        return self.key.rpartition("/")[0]

    @property
    def is_final(self) -> bool:
        return self.status in FINAL


Next = Literal["run", "deliver", "unknown", "diverged"]


def replay(record: Record | None, input_sha256: str) -> Next:
    """Decide what a call of a step does, given its record.

    ======================  ===========================================================
    no record               run
    other input             diverged
    final                   deliver: the flow gets what is recorded, in its turn
    started, may repeat     run: a retry, a timer, a wait, or a body that was cut short
    started, may not        unknown: the process died between intent and result
    ======================  ===========================================================
    """
    if record is None:
        return "run"
    if record.input_sha256 != input_sha256:
        return "diverged"
    if record.is_final:
        return "deliver"
    return "run" if record.repeat or record.status != "started" else "unknown"


def remaining_wait_s(by_clock_s: float, duration_s: float) -> float:
    """Return how long to wait after a restart, when the wall clock says `by_clock_s`: never longer than the whole wait was."""
    return min(max(0.0, by_clock_s), duration_s)


# -- names -----------------------------------------------------------------------------------------------------------------------

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,79}")
_RESERVED = re.compile(r".*(-wal|-shm|-journal|\.db|\.tmp)", re.IGNORECASE)
_LONGEST = 120


def check_id(id: str, *, longest: int = _LONGEST) -> str:
    """Return an id that is fit to be a file name and an object name. Raises `BadId`."""
    if not isinstance(id, str) or not _ID.fullmatch(id) or len(id) > longest or _RESERVED.fullmatch(id):
        raise BadId(str(id))
    return id


def check_name(name: str) -> str:
    """Return a name for a step or a flow. Raises `ValueError`."""
    if not _NAME.fullmatch(name) or name == "cancel":
        raise ValueError(f"not a name for a step or flow: {name!r}: letters, digits, '_' and '.', beginning with a letter")
    return name


def step_key(path: str, name: str, ordinal: int) -> str:
    return f"{path}/{name}#{ordinal}" if path else f"{name}#{ordinal}"


def child_id(parent: str, key: str) -> str:
    """Return the id of the run that a step starts: `otters.2-search-1`, and a digest where that becomes too long."""
    found = f"{parent}.{key.replace('/', '-').replace('#', '-')}"
    if len(found) <= 180:
        return found
    from hashlib import sha256

    return f"{parent[:100]}.{sha256(f'{parent}.{key}'.encode()).hexdigest()[:40]}"


def idempotency_key(id: str, incarnation: str, key: str) -> str:
    """Return what names a step outside: the same for all attempts, never the same for another run, also one of that id."""
    return f"{id}@{incarnation}/{key}"


_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def ulid(now_ms: int, noise: int | None = None) -> str:
    """Return a ULID: 26 characters that sort by time. Source: github.com/ulid/spec."""
    value = now_ms << 80 | (secrets.randbits(80) if noise is None else noise)
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))
