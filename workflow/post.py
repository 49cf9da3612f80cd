"""Requests of other machines: from the replica's inbox into the intake, and out of the inbox when they are where they belong.

An object is deleted when its request has left the intake, which is when the run's replica has it (or it was refused), and the intake's replica has
that. After a crash in between it is found again, and taking it in again changes nothing.

**Whose request is it?** A run's owner takes what is for it. A start is for everybody: of several hosts the one with the highest hash of host and id takes it at once, the others when it is
still there a lease's time later. What is for a run that nobody has is refused: at once by the only host there is, by the first of several after a minute.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from replicator.errors import ReplicatorError
from workflow import intake as ik
from workflow.context import flows
from workflow.intake import Request
from workflow.requests import Requests
from workflow.values import loads

if TYPE_CHECKING:
    from workflow.bucket import Marks
    from workflow.inbox import Inbox

__all__ = ["Post", "Postman"]

log = logging.getLogger(__name__)

QUIET = 1.5
LONGEST_S = 30.0
"""How the time between two looks grows while nothing comes, and up to what."""
ORPHANED_S = 60.0
HOSTS_S = 60.0


@dataclass(slots=True)
class Postman:
    """The inbox of a replica, and what is known about it."""

    inbox: Inbox
    refused: Marks
    hosts: Marks
    taken: dict[str, Request] = field(default_factory=dict)
    """In the intake, by the name of their object, which is still there."""
    others: dict[str, tuple[Request, float]] = field(default_factory=dict)
    """For somebody else, or nobody, so far, and since when they are known."""
    host_names: list[str] = field(default_factory=list)
    hosts_at: float | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def close(self) -> None:
        """Release connections."""
        for part in (self.inbox, self.refused, self.hosts):
            part.close()


class Post(Requests):
    """Takes them in."""

    _post: Postman | None = None
    _inbox_poll_s: float
    _lease_ttl_s: float

    async def _poll_inbox(self) -> None:
        """Look into the inbox again and again, less often while nothing comes."""
        delay = self._inbox_poll_s
        while True:
            try:
                busy = await self.look_into_inbox()
            except (ReplicatorError, OSError) as error:
                busy = False
                log.warning("inbox cannot be read error=%r", str(error))
            delay = self._inbox_poll_s if busy else min(delay * QUIET, max(LONGEST_S, self._inbox_poll_s))
            await asyncio.sleep(delay)

    async def look_into_inbox(self, found: dict[str, Request] | None = None) -> bool:
        """Take in what other machines ask for, and forget what is done; returns whether anything was there. Nothing without a replica.

        Args:
            found: what a look has found already, all of it for this engine: one look may serve the engines of a process.

        Raises:
            ReplicatorError: the replica cannot be read, or written.
        """
        if self._post is None or self._lost is not None:
            return False
        async with self._post.lock:
            return await self._look(self._post, found)

    async def _look(self, post: Postman, found: dict[str, Request] | None) -> bool:
        is_given = found is not None
        if found is None:
            found = await asyncio.to_thread(post.inbox.look, [*post.taken, *post.others])
        now = self._clock.monotonic()
        post.others |= {name: (request, now) for name, request in found.items() if name not in post.taken and name not in post.others}
        if not is_given:
            await self._look_for_hosts(post, now)
        # A start comes before what is sent to the run, whatever its name.
        for name, (request, since) in sorted(post.others.items(), key=lambda item: item[1][0].kind != "start"):
            if is_given or await self._is_ours(post, request, now - since):
                await self._intake.do(functools.partial(ik.add_request, request=request))
                await self._dispatch(request)
                post.taken[name] = request
                del post.others[name]
        done = await self._leave_inbox(post)
        return bool(found) or done

    async def _look_for_hosts(self, post: Postman, now: float) -> None:
        if post.others and (post.hosts_at is None or now - post.hosts_at > HOSTS_S):
            post.host_names, post.hosts_at = await asyncio.to_thread(post.hosts.names, "all"), now

    async def _is_ours(self, post: Postman, request: Request, age_s: float) -> bool:
        if await self._known(request.instance) is not None:
            return True
        is_alone = post.host_names in ([], [self._host])
        if request.kind == "start":
            if is_alone:
                return True
            first = self._first_of(post.host_names, request)
            return str(loads(request.body).get("flow")) in flows and (first == self._host or age_s > self._others_after_s)
        if is_alone:
            return True
        return age_s > ORPHANED_S and self._remote is not None and await self._remote.indexed(request.instance) is None

    @property
    def _others_after_s(self) -> float:
        """After how long a start that is still in the inbox is everybody's."""
        return self._lease_ttl_s

    def _first_of(self, host_names: list[str], request: Request) -> str:
        """Return the host that should begin a run at once."""
        return max(host_names, key=lambda host: sha256(f"{host}/{request.instance}".encode()).digest())

    async def _leave_inbox(self, post: Postman) -> bool:
        """Delete the objects of requests that the intake has no more."""
        if not post.taken:
            return False
        ids = [request.id for request in post.taken.values()]
        left, refusals = await self._intake.do(functools.partial(ik.waiting, requests=ids))
        done = {name: request for name, request in post.taken.items() if request.id not in left}
        if not done:
            return False
        for request in done.values():
            if request.id in refusals:
                facts = {"id": request.instance, "kind": request.kind, "reason": refusals[request.id], "at": self._now()}
                await asyncio.to_thread(post.refused.put, request.id, facts)
        assert self._replication is not None
        await self._replication.intake_barrier()
        await asyncio.to_thread(post.inbox.delete, list(done))
        for name in done:
            del post.taken[name]
        return True
