"""Calls that wait until something is stored. Each has a future of its own; what completes it is one upload for all of them.

A waiter goes through two stages: it has a question (how far must the WAL be read?), whose answer is a TXID, and it needs that TXID on replicas.
The board looks at its waiters when either may have come true, and completes the futures; so a thread sleeps once and is woken once, and an event
loop is not blocked and needs no thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from replicator.errors import ReplicatorError
from replicator.format.ltx import TXID
from replicator.replica import Replica

__all__ = ["Waiter"]


class Waiter:
    """One call. `future` has the TXID that is stored. What changes is guarded by the board's lock."""

    __slots__ = ("_any", "_replicas", "future", "goal", "question")

    def __init__(self, replicas: Sequence[Replica], *, any_of_them: bool, goal: TXID | None) -> None:
        """`goal`: the TXID to wait for; None: the one that answers the question, which the board gives."""
        self.future: Future[TXID] = Future()
        self.question = 0
        self.goal = goal
        self._replicas, self._any = replicas, any_of_them

    def is_stored(self) -> bool:
        """True when enough replicas hold the goal."""
        goal = self.goal
        if goal is None:
            return False
        held = (replica.txid >= goal for replica in self._replicas)
        return any(held) if self._any else all(held)

    def complete(self, failure: ReplicatorError | None) -> None:
        """Complete the future, unless its owner has given it up."""
        if not self.future.set_running_or_notify_cancel():
            return
        if failure is not None:
            self.future.set_exception(failure)
        else:
            assert self.goal is not None
            self.future.set_result(self.goal)

    def missing(self) -> str:
        """Say what it waits for."""
        if self.goal is None:
            states = [f"{item.url} has TXID {item.txid:016x}" + (f", {item.error}" if item.error else "") for item in self._replicas]
            return "; ".join(["the last commits are not read yet", *states])
        lacking = [
            f"{item.url} lacks TXID {self.goal:016x} (it has {item.txid:016x}" + (f", {item.error})" if item.error else ")")
            for item in self._replicas
            if item.txid < self.goal
        ]
        return "; ".join(lacking)
