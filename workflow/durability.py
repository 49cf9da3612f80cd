"""Runs and the intake of a host on a replica: claim, replicate, restore.

    <root>/<id>/...             an instance file, as LTX
    <root>/_hosts/<host>/...    the intake, as LTX, and who owns the host (see `ownership.py`)

A run has a `Replicator` of its own while it is in memory, all of them under the host's one lease. Closing it stores the rest, so that a parked run is replicated.

**Claims.** A run is a host's when the newest file of its chain is one that the host has written, and each new one is created, never overwritten. So for a new run TXID 1
decides: of two hosts that start the same id at once one creates it, and the other finds it taken. A run that comes back reads the end of its chain first. Whoever finds
another writer there restores that state and looks whose it is (`wf_instance.owner`): an earlier folder of the same host, from which it goes on, or
another host, to which it belongs now.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from replicator import Replicator, ReplicatorError, open_client, restore
from replicator.errors import Fenced, LineageMismatch, NoBackups, OutputExists
from replicator.levels import History
from replicator.takeover import seed_table
from workflow import journal as jr
from workflow.bucket import Marks, ReplicaObjects
from workflow.errors import Elsewhere, Refused, Unreadable
from workflow.ownership import Ownership, below

__all__ = ["Replication"]

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

WAIT_S = 60.0
"""So long may a barrier take; then the run leaves memory and is tried again later."""
ATTACH_TRIES = 4
TAKE_TRIES = 12
"""More, because an owner that lives may store something between a look and the claim."""


class Replication:
    """A folder's replica. Blocking work is done in threads of its own."""

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        host: str = "main",
        sync_interval_s: float | None = None,
        lease_ttl_s: float = 30.0,
        ownership: Ownership | None = None,
    ) -> None:
        """Nothing is contacted yet.

        Args:
            url: the root, for all files of the folder.
            host: the name under which the intake is stored; another machine takes over by using the same.
            sync_interval_s: as in `Replicator`: least time between uploads that nobody waits for.
            lease_ttl_s: after so long without a sign of life another engine may take over.
            ownership: one that is there already; closed with this.

        Raises:
            ConfigError: a malformed URL, or time.
        """
        self._folder = folder
        self._url = url
        self._interval_s = sync_interval_s
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="workflow replica")
        self._replicators: dict[str, Replicator] = {}
        self._intake: Replicator | None = None
        self._is_all_stored = True
        self._behind: dict[str, ReplicatorError] = {}
        self._new: set[str] = set()
        self.host = host
        self.objects = ReplicaObjects(url)
        self._done = Marks(url, "_done")
        self.ownership = ownership or Ownership(folder, url, host, ttl_s=lease_ttl_s)
        self.inherited: dict[str, set[str]] = {}
        """Runs that this host was given, and the hosts from which it may claim them; see `handing.py`."""
        self.on_claimed: Callable[[str], None] = lambda _id: None
        """Called, by any thread, when one of them was."""
        self.on_lost: Callable[[str, ReplicatorError], None] = lambda _id, _error: None
        """Called, by any thread, when somebody else owns a run; with an empty id when it is the whole host."""

    # -- the host ----------------------------------------------------------------------------------------------------------------

    async def take_over(self) -> None:
        """Become the owner of the host, and get its intake where another folder was the owner, or it is missing here.

        Raises:
            HostInUse: an engine elsewhere is, and lives.
            ReplicatorError: the replica cannot be reached or read.
        """
        await self._run(self.take_over_now)

    def take_over_now(self) -> None:
        """Do what `take_over` does; blocks."""
        self.ownership.take()
        with contextlib.closing(Marks(self._url, "_hosts", shard="all")) as hosts:
            hosts.put(self.host, {"host": self.host})
        self.ownership.on_loss(lambda error: self.on_lost("", error))
        path, name = self._folder / ".host" / "intake.db", f"_hosts/{self.host}"
        for left in reversed(range(ATTACH_TRIES)):
            was_here = path.exists()
            if not was_here and not self._restore(name, path):
                return  # it begins here
            replicator = self._replicator(path, name)
            try:
                self._intake = replicator.start()
            except Fenced:
                # The owner before us stored something between the restore and the claim; after the claim it cannot.
                if was_here or not left:
                    raise
                path.unlink()
            else:
                return

    async def attach_intake(self) -> None:
        """Begin to replicate the intake, where it is a new one. Raises `ReplicatorError`."""
        if self._intake is None:
            path = self._folder / ".host" / "intake.db"
            self._intake = await self._run(lambda: self._replicator(path, f"_hosts/{self.host}").start())

    async def intake_barrier(self) -> None:
        """Return when the replica has the intake as it is now."""
        await self._run(self.wait_intake)

    def wait_intake(self, timeout_s: float | None = None) -> None:
        """Do what `intake_barrier` does; blocks. Raises `ReplicatorError`, also when it takes longer."""
        if self._intake is not None:
            self._intake.wait(timeout_s=timeout_s)

    def check_owner(self) -> None:
        """Return if bodies may run now; no request. Raises `NotOwner`."""
        self.ownership.check()

    # -- runs --------------------------------------------------------------------------------------------------------------------

    def restore_missing(self, id: str) -> bool:
        """Get a run's file if the replica has it; blocks. Raises `ReplicatorError`: it has it, and it cannot be read."""
        try:
            return bool(self._restore(id, self._path(id)))
        except OutputExists:  # the run has begun at this moment, or somebody else has restored it
            return True

    def _restore(self, name: str, path: Path) -> int:
        """Return the TXID that was restored; 0 when nothing is stored. What is here is known as that state, so that it can be gone on from."""
        with contextlib.closing(open_client(below(self._url, name))) as client:
            try:
                txid = restore(client, path).txid
            except NoBackups:
                return 0
            seed_table(client, path, self._meta(name) / "pyrepl", txid)
            return txid

    async def attach(self, id: str, *, is_new: bool, is_contested: bool = False) -> None:
        """Claim a run and begin to replicate its file, which may be replaced by what the replica has. Nobody else may have it open.

        Args:
            is_new: the file was just made.
            is_contested: another host may make the same. Then the replica has the file when this returns, so that one of them has begun the run.

        Raises:
            Elsewhere: it is another host's; what is here of it is gone, or kept beside it as a salvage file.
            NotOwner: the host's lease is lost, or over.
            ReplicatorError: it cannot be done now.
        """
        await self._run(self._attach, id, is_new, is_contested)

    def _attach(self, id: str, is_new: bool, is_contested: bool) -> None:
        path = self._path(id)
        error: ReplicatorError | None = None
        if is_new and is_contested:
            self._check_not_ended(id)
        for _ in range(ATTACH_TRIES):
            self.ownership.check()  # a lost lease must not be asked for again by a replicator
            if not path.exists():
                if not self._restore(id, path):
                    raise Unreadable(str(path), f"it is neither here nor in {self._url}")
                self._check_owner_of(id, path)
            replicator = self._replicator(path, id)
            try:
                if is_new and not is_contested and error is None:
                    replicator.assume_empty()
                replicator.start()
                if not is_new or is_contested:
                    replicator.wait(timeout_s=WAIT_S)  # a start alone waits in the background for a store that is away
                if id in self.inherited:
                    jr.set_owner(path, self.host)
                    replicator.wait(timeout_s=WAIT_S)
                    self.inherited.pop(id, None)
                    self.on_claimed(id)
                self._replicators[id] = replicator
                if is_new:
                    self._new.add(id)
                return
            except LineageMismatch as mismatch:
                if not is_new:
                    raise
                error = mismatch  # another host began the same run at this moment: look at what it stored
            except Fenced as fenced:
                error = fenced
                log.warning("the replica of a run was written by another writer id=%s error=%r", id, str(fenced))
                with contextlib.suppress(ReplicatorError):
                    replicator.close(timeout_s=0.0)
                self._drop(id, with_salvage=is_new)
                is_new = False
            except BaseException:
                with contextlib.suppress(ReplicatorError):
                    replicator.close(timeout_s=0.0)
                raise
        assert error is not None
        raise error

    def _check_owner_of(self, id: str, path: Path) -> None:
        """Let a restored file be this host's, or leave it to its owner. Raises `Elsewhere`."""
        instance = jr.read_instance(path)
        if instance.owner is not None and instance.owner != self.host and instance.owner not in self.inherited.get(id, ()):
            self._drop(id, with_salvage=False)
            raise Elsewhere(id, instance.owner, (instance.flow, instance.input_sha256))

    def _drop(self, id: str, *, with_salvage: bool) -> None:
        """Delete what is here of a run, and what is known about its replica."""
        path = self._path(id)
        stale = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
        if with_salvage:
            stale += self._folder.glob(f"{id}.db-salvage-*")
        for item in stale:
            item.unlink(missing_ok=True)
        shutil.rmtree(self._meta(id), ignore_errors=True)

    async def take(self, id: str) -> None:
        """Make another host's run this one's: restore it, claim it, and write into it whose it is. That host's writes to it are refused from then on.

        Raises:
            Refused: the replica has no such run.
            NotOwner, ReplicatorError: as for `attach`.
        """
        await self._run(self._take, id)

    def _take(self, id: str) -> None:
        path = self._path(id)
        error: ReplicatorError | None = None
        for _ in range(TAKE_TRIES):
            self.ownership.check()
            self._drop(id, with_salvage=False)
            if not self._restore(id, path):
                raise Refused(id, f"{self._url} has no such run")
            replicator = self._replicator(path, id)
            try:
                replicator.start().wait(timeout_s=WAIT_S)
            except Fenced as fenced:  # its owner is alive, and was faster
                error = fenced
                with contextlib.suppress(ReplicatorError):
                    replicator.close(timeout_s=0.0)
                continue
            try:
                jr.set_owner(path, self.host)
            finally:
                replicator.close(timeout_s=WAIT_S)
            return
        assert error is not None
        raise error

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.db"

    def _meta(self, name: str) -> Path:
        return self._folder / ".host" / "meta" / name.replace("/", "-")

    def _replicator(self, path: Path, name: str) -> Replicator:
        meta = self._meta(name)
        meta.mkdir(parents=True, exist_ok=True)
        is_intake = name.startswith("_")
        return Replicator(
            path,
            below(self._url, name),
            meta_path=meta,
            sync_interval_s=self._interval_s,
            history=History() if is_intake else None,  # a run's file is small, and ends
            lease=self.ownership.lease,
            on_failure=lambda error: self.on_lost("" if is_intake else name, error),
        )

    async def barrier(self, id: str) -> None:
        """Return when the replica has all that a run has committed; waiters share one upload. Raises `ReplicatorError`."""
        replicator = self._replicators[id]
        await self._run(lambda: replicator.wait(timeout_s=WAIT_S))
        if id in self._new:  # without the index nobody would find the run when this machine is lost
            await self.intake_barrier()
            self._new.discard(id)

    async def detach(self, id: str) -> None:
        """Store the rest and stop. What cannot be stored in time stays on this machine, and is stored at the next start."""
        replicator = self._replicators.pop(id, None)
        self._new.discard(id)
        if replicator is None:
            return
        try:
            await self._run(lambda: replicator.close(timeout_s=WAIT_S))
            self._behind.pop(id, None)
        except ReplicatorError as error:
            self._behind[id] = error
            log.warning("not all is replicated id=%s error=%r", id, str(error))

    async def mark_done(self, id: str, status: str, error: str | None, at: str, what: tuple[str, str]) -> None:
        """Tell other machines that a run has ended: nobody restores it any more, but to look at it. Raises `ReplicatorError`: not all of it is stored."""
        if id in self._behind:
            raise self._behind[id]
        facts = {"status": status, "error": error, "finished_at": at, "host": self.host, "flow": what[0], "input_sha256": what[1]}
        await self._run(self._done.put, id, facts)

    def _check_not_ended(self, id: str) -> None:
        """Keep an id taken whose run has ended, also when nothing else is left of it. Raises `Elsewhere`."""
        elsewhere = self.ended_elsewhere(id)
        if elsewhere is not None:
            self._drop(id, with_salvage=True)
            raise elsewhere

    def ended_elsewhere(self, id: str) -> Elsewhere | None:
        """Return whose a run is that has ended on another host. Blocks; one GET."""
        mark = self._done.get(id)
        if mark is None or mark.get("host") == self.host:
            return None
        return Elsewhere(id, str(mark.get("host")), (str(mark.get("flow")), str(mark.get("input_sha256"))), is_over=True)

    def restore_boundary(self, id: str, path: Path, number: int, count: int) -> bool:
        """Restore a run as it stood at a place in its order of finishing, before any later transaction step; False when no TXID is of that place. Blocks.

        Args:
            count: how many records are final up to `number`.

        Raises:
            ReplicatorError: the replica cannot be read.
        """
        with contextlib.closing(open_client(below(self._url, id))) as client:
            txids = [info.max_txid for info in client.list(0)]
            low, high = 0, len(txids)
            while low < high:  # the newest of the states that are not past it
                middle = (low + high) // 2
                restore(client, path, txid=txids[middle], force=True)
                if jr.stands_at(path, number, count) > 0:
                    high = middle
                else:
                    low = middle + 1
            if not low:
                return False
            restore(client, path, txid=txids[low - 1], force=True)
            return jr.stands_at(path, number, count) == 0

    def forget(self, id: str) -> None:
        """Delete a run's replica, and what is known here about it; its mark stays, so that no other host begins it anew. Blocks."""
        with contextlib.closing(open_client(below(self._url, id))) as client:
            for level in range(10):
                client.delete(client.list(level))
            client.delete_control("pyrepl/lineage.json")
        shutil.rmtree(self._meta(id), ignore_errors=True)

    async def close(self, *, release: bool = True) -> None:
        """Store the rest of the intake and stop. The lease is released when everything is stored; else it runs out by itself.

        Args:
            release: False as a killed process would: nothing is released.
        """
        await self._run(functools.partial(self.close_now, release=release))

    def close_now(self, *, release: bool = True) -> None:
        """Do what `close` does; blocks."""
        if self._intake is not None:
            try:
                self._intake.close()
            except ReplicatorError as error:
                self._is_all_stored = False
                log.warning("the intake is not all replicated error=%r", str(error))
        self.ownership.close(release=release and self._is_all_stored and not self._behind)
        self._threads.shutdown(wait=False)
        self.objects.close()
        self._done.close()

    async def _run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *args, **kwargs))
