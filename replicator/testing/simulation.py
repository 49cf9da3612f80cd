"""A deterministic simulation of several writers that want the same replica, over a store and a world that misbehave.

    python -m replicator.testing.simulation --steps 1000000 --seed 1

What runs is the real code: `Lease`, `tenure`, `Replica.open`, `join` and `store`, `until_claimed`. Only the store (a `MemoryClient` behind a network that
delays, loses, repeats and reorders), the clocks and the application are made up. A seed repeats its run exactly.

**The world.** Writers are processes with clocks of their own: steady ones that run up to 4 % too fast or too slow, in every second seed up to three times
too fast or too slow, so that two believe to have the lease; wall clocks that are wrong and are set. They
are killed and begin again, stopped (the steady clock goes on) or frozen (it stands still and the wall clock jumps afterwards, as with a paused virtual machine).
Requests and replies take up to minutes and overtake each other; either may be lost, then the writer's request ends with "outcome unknown"; requests arrive
twice. Those that wait for the lease ask for it now and then, and take that back. Raw files are merged and deleted by the store itself as soon as that is allowed, so that slots that were taken become free again.

Phases of faults and quiet phases follow each other. In a quiet one an owner must be there in bounded time; then it is killed, and the next one must be.

**What must hold**, checked at each event that could break it (`Violation` otherwise):

* *one writer*: a TXID is acknowledged to one writer only, with one content;
* *nothing lost*: what was acknowledged is what the replica holds at that TXID, at every later time, and the chain leads there;
* *exclusive*: once a writer was told that it is the owner, no former owner is told that anything is stored at its claim or behind it;
* *complete*: what a new owner begins with includes everything that was acknowledged;
* *patient*: nobody takes the lease of an owner that is alive and renews it in time (where clocks run as clocks do);
* *bounded*: in a quiet phase somebody owns the replica and stores something after `BOUND_S` at most.

The runs know nothing of SQLite: the content of a transaction is a page with a random number. That what the engine encodes is right is tested elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from replicator.clock import Moment
from replicator.errors import Fenced, LeaseError, LeaseHeld, ReplicaStateError, StorageError, StorageUnavailable
from replicator.format.lock import decode_lock, writer_number
from replicator.format.ltx import TXID, FileInfo, Header, decode_header, encode_file
from replicator.lease import LOCK_NAME, Lease
from replicator.outbox import OutFile
from replicator.replica import Replica
from replicator.storage.base import FROM_START, Body, ControlObject, ReadStream
from replicator.storage.memory import MemoryClient
from replicator.takeover import Overtaken, reassure, until_claimed
from replicator.testing.scheduler import Scheduler, Task

__all__ = ["Report", "Simulation", "Violation", "main", "simulate"]

TTL_S = 10.0
L0_RETENTION_S = 60.0
REREAD_S = L0_RETENTION_S / 2
WILD_REREAD_S = L0_RETENTION_S / 4
"""Where clocks are wild; by the slowest of them it is less than `L0_RETENTION_S`."""
TIMEOUT_S = 4.0
POLL_S = 1.0
DRIFT = 0.08
WILD_RATE = 3.0
BOUND_S = 6 * TTL_S
FAULTS_S, QUIET_S = 300.0, 120.0
LINEAGE = bytes(range(16))
PAGE_SIZE = 512


class Violation(AssertionError):
    """Something that must hold does not."""


@dataclass(slots=True)
class Report:
    """What happened. `takeovers_s`: how long the replica had no owner after one was killed in a quiet phase."""

    seed: int
    steps: int = 0
    simulated_s: float = 0.0
    acknowledged: int = 0
    owners: int = 0
    crashes: int = 0
    pauses: int = 0
    fenced: int = 0
    lost_leases: int = 0
    handovers: int = 0
    requests: int = 0
    lost_messages: int = 0
    late_messages: int = 0
    merged: int = 0
    takeovers_s: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        ordered = sorted(self.takeovers_s) or [0.0]
        return (
            f"seed={self.seed} steps={self.steps} hours={self.simulated_s / 3600:.1f} acknowledged={self.acknowledged} owners={self.owners} "
            f"crashes={self.crashes} pauses={self.pauses} fenced={self.fenced} lost_leases={self.lost_leases} handovers={self.handovers} requests={self.requests} "
            f"lost_messages={self.lost_messages} late_messages={self.late_messages} merged={self.merged} takeovers={len(self.takeovers_s)} "
            f"takeover_p50_s={ordered[len(ordered) // 2]:.1f} takeover_max_s={ordered[-1]:.1f}"
        )


# -- the store -------------------------------------------------------------------------------------------------------------------


class Store:
    """What is stored, and the watcher of what must hold. Requests reach it one at a time."""

    def __init__(self, scheduler: Scheduler, report: Report, *, checks_patience: bool) -> None:
        self.client = MemoryClient()
        self._checks_patience = checks_patience
        self._scheduler, self._report = scheduler, report
        self._arrived: dict[int, float] = {}  # raw files, by TXID
        self._content: dict[int, bytes] = {}  # of merged TXIDs
        self._merged = 0
        self._acknowledged: dict[int, bytes] = {}
        self._newest = 0
        self._generation = self._first = 0
        self._renewed = 0.0
        self.dead: set[str] = set()

    def put(self, client: SimulatedClient, arguments: tuple[Any, ...], options: dict[str, Any]) -> FileInfo:
        info = self.client.put(*arguments, **options)
        if info.level == 0:
            self._arrived[info.max_txid] = self._scheduler.now
            self._check_stored(info.max_txid)
        return info

    def put_control(self, name: str, data: bytes, **conditions: Any) -> str:
        before = self.client.get_control(name).data if name == LOCK_NAME and name in self.client._store.control else None
        etag = self.client.put_control(name, data, **conditions)
        if name == LOCK_NAME:
            if before is not None and self._checks_patience:
                self._check_patience(before, data)
            if before is None or not decode_lock(before).is_same_write(decode_lock(data)):  # who asks for it has not renewed it
                self._renewed = self._scheduler.now
        return etag

    def _check_patience(self, before: bytes, after: bytes) -> None:
        old, new = decode_lock(before), decode_lock(after)
        stood_s = self._scheduler.now - self._renewed
        if old.instance != new.instance and not old.released and old.instance not in self.dead and stood_s < old.ttl_s * (1 - DRIFT) - 0.01:
            raise Violation(f"patient: the lease of {old.owner} was taken by {new.owner} {stood_s:.2f} s after it was renewed")

    def content(self, txid: int) -> bytes | None:
        """Return what a restore finds for a TXID: merged files come first."""
        if txid <= self._merged:
            return self._content.get(txid)
        stored = self.client._store.files.get((self.client.layout, 0, TXID(txid), TXID(txid)))
        return None if stored is None else stored.data

    def _check_stored(self, txid: int) -> None:
        acknowledged = self._acknowledged.get(txid)
        if acknowledged is not None and self.content(txid) != acknowledged:
            raise Violation(f"nothing lost: TXID {txid} was acknowledged and holds something else now")

    def acknowledge(self, writer: str, generation: int, txid: int, data: bytes) -> None:
        """A writer was told that a TXID is stored."""
        if self._acknowledged.get(txid, data) != data:
            raise Violation(f"one writer: TXID {txid} is acknowledged to {writer}, and was to another one")
        if generation < self._generation and txid >= self._first:
            raise Violation(
                f"exclusive: {writer} of generation {generation} is told that TXID {txid} is stored; {self._generation} owns it"
            )
        self._acknowledged[txid] = data
        self._newest = max(self._newest, txid)
        self._check_stored(txid)
        self._report.acknowledged += 1

    def own(self, writer: str, generation: int, first: int) -> None:
        """A writer was told that it is the owner; `first` is the first TXID of its own."""
        if first < self._newest:
            raise Violation(f"complete: {writer} owns the replica from TXID {first} on, and {self._newest} was acknowledged")
        if generation > self._generation:
            self._generation, self._first = generation, first
        self._report.owners += 1

    def merge(self) -> None:
        """Merge all raw files into one, and delete those whose time is over, but the newest."""
        now = self._scheduler.now
        present = sorted(self._arrived)
        for txid in list(present):
            if txid <= self._merged:  # came late, into a slot that is free again
                if now - self._arrived[txid] > L0_RETENTION_S and txid != present[-1]:
                    self._delete(txid)
                continue
            if txid != self._merged + 1 or txid == present[-1] or now - self._arrived[txid] <= L0_RETENTION_S:
                break
            data = self.content(txid)
            assert data is not None
            self._content[txid] = data
            self._merged = txid
            self._delete(txid)
            self._report.merged += 1
        if self._merged:
            files = self.client._store.files
            for key in [key for key in files if key[1] == 1]:
                del files[key]
            self.client.put(1, TXID(1), TXID(self._merged), b"merged", timestamp_ms=0)

    def _delete(self, txid: int) -> None:
        del self._arrived[txid]
        del self.client._store.files[self.client.layout, 0, TXID(txid), TXID(txid)]

    def check_all(self) -> None:
        """Check at the end that all that was ever acknowledged is there, without a gap."""
        for txid in range(1, self._newest + 1):
            if self.content(txid) is None:
                raise Violation(f"nothing lost: TXID {txid} is gone, {self._newest} was acknowledged")
            self._check_stored(txid)

    @property
    def newest(self) -> int:
        """Newest TXID that was acknowledged."""
        return self._newest


class SimulatedClient:
    """A process's way to the store: a `ReplicaClient` whose requests take virtual time, and whose outcome may stay unknown."""

    kind, can_read = "memory", True  # which is asked in order, and not by several threads
    url = "simulated://store"

    def __init__(self, world: Simulation, process: Process, task: Task) -> None:
        self._world, self._process, self._task = world, process, task

    def _ask(self, operation: Callable[[], Any]) -> Any:
        """Send a request and wait for its reply. Raises `StorageUnavailable` when none comes in time."""
        world, task = self._world, self._task
        chance, scheduler = world.random.random, world.scheduler
        if task.is_dead:
            task.suspend()  # a killed process asks for nothing more
        ticket = task.ticket()

        def arrive(wants_reply: bool) -> None:
            try:
                answer: Any = operation()
            except Violation:
                raise
            except Exception as error:
                answer = error
            if wants_reply:
                scheduler.after(world.delay_s(), lambda: self._process.deliver(task, ticket, answer))

        lost_on_the_way, lost_on_the_way_back, twice = chance() < world.loss, chance() < world.loss, chance() < world.loss
        world.report.lost_messages += lost_on_the_way + lost_on_the_way_back
        if not lost_on_the_way:
            scheduler.after(world.delay_s(), lambda: arrive(not lost_on_the_way_back))
        if twice:
            scheduler.after(world.delay_s() * world.random.choice((1, 1, 10)), lambda: arrive(False))
        scheduler.after(TIMEOUT_S, lambda: self._process.deliver(task, ticket, StorageUnavailable("no reply")))
        return task.suspend()

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        found: list[FileInfo] = self._ask(lambda: list(self._world.store.client.list(level, seek=seek)))
        return iter(found)

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        stream: ReadStream = self._ask(lambda: self._world.store.client.open(info, offset=offset, size=size))
        return stream

    def put(self, level: int, min_txid: TXID, max_txid: TXID, body: Body, **options: Any) -> FileInfo:
        info: FileInfo = self._ask(lambda: self._world.store.put(self, (level, min_txid, max_txid, body), options))
        return info

    def metadata(self, info: FileInfo) -> dict[str, str]:
        found: dict[str, str] = self._ask(lambda: self._world.store.client.metadata(info))
        return found

    def delete(self, files: Iterable[FileInfo]) -> None:
        raise AssertionError("nobody deletes here but the store")

    def get_control(self, name: str) -> ControlObject:
        found: ControlObject = self._ask(lambda: self._world.store.client.get_control(name))
        return found

    def put_control(self, name: str, data: bytes, **conditions: Any) -> str:
        etag: str = self._ask(lambda: self._world.store.put_control(name, data, **conditions))
        return etag

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        self._ask(lambda: self._world.store.client.delete_control(name, if_match=if_match))

    def close(self) -> None:
        pass


# -- the writers -----------------------------------------------------------------------------------------------------------------


class Process:
    """A machine that runs a writer, again and again. Its clocks and what is on its disk survive a crash."""

    def __init__(self, world: Simulation, number: int) -> None:
        self._world = world
        self.name = f"writer-{number}"
        self._rate = WILD_RATE ** world.random.choice((-1, -1, 1)) if world.is_wild else 1 + world.random.uniform(-DRIFT / 2, DRIFT / 2)
        self._wall_s = world.random.uniform(-3600, 3600)
        self._lost_s = 0.0  # so long the steady clock stood still
        self.is_settable = number % 2 == 0
        """Its wall clock is set now and then; the others are frozen instead. Both at once would hide a pause from any clock."""
        self._paused_until = self._late_until = 0.0
        self._held: list[Callable[[], None]] = []
        self._instances: list[str] = []
        self.owns = False
        self.task: Task | None = None

    # -- its clocks --------------------------------------------------------------------------------------------------------------

    def now(self) -> Moment:
        true_s = self._world.scheduler.now
        return Moment(1000 + (true_s - self._lost_s) * self._rate, 1_700_000_000 + true_s + self._wall_s)

    def set_clock(self, seconds: float) -> None:
        self._wall_s += seconds

    # -- its life ----------------------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Begin the program, if it does not run."""
        if self.task is None or self.task.is_dead:
            self.task = self._world.scheduler.start(self._run)

    def crash(self) -> None:
        """Kill the program. What it has sent is under way."""
        if self.task is not None and not self.task.is_dead:
            self._world.store.dead.update(self._instances)
            self.owns = False
            self.task.kill()
            self._world.scheduler.forget(self.task)
            self._world.report.crashes += 1

    def pause(self, seconds: float) -> None:
        """Stop, or freeze, the process: what arrives waits."""
        scheduler = self._world.scheduler
        if scheduler.now < self._paused_until:
            return
        self._paused_until = scheduler.now + seconds
        self._world.report.pauses += 1
        frozen = not self.is_settable

        def wake() -> None:
            if frozen:
                self._lost_s += seconds
            held, self._held = self._held, []
            for event in held:
                event()

        scheduler.after(seconds, wake)

    def deliver(self, task: Task, ticket: int, answer: Any) -> None:
        """Give an answer to the program, once the process runs."""
        if self._world.scheduler.now < self._paused_until:
            self._held.append(lambda: task.resume(ticket, answer))
            self._world.report.late_messages += 1
        else:
            task.resume(ticket, answer)

    def _sleep(self, task: Task, seconds: float) -> None:
        ticket = task.ticket()
        self._world.scheduler.after(seconds, lambda: self.deliver(task, ticket, None))
        task.suspend()

    # -- its program -------------------------------------------------------------------------------------------------------------

    def _run(self, task: Task) -> None:
        world, report = self._world, self._world.report
        client = SimulatedClient(world, self, task)
        while True:
            instance = f"{world.random.getrandbits(64):016x}"
            lease = Lease(client, owner=self.name, ttl_s=TTL_S, clock=self, instance=instance, background=False)
            predecessors = list(self._instances)
            self._instances.append(instance)
            try:
                self._live(task, client, lease, predecessors)
            except Fenced:
                report.fenced += 1
            except LeaseError:
                report.lost_leases += 1
            except ReplicaStateError as error:
                raise Violation(f"nothing lost: {error}") from error
            finally:
                self.owns = False
                world.store.dead.add(instance)
            self._sleep(task, world.random.uniform(0.1, 2 * POLL_S))

    def _acquire(self, task: Task, lease: Lease, predecessors: Sequence[str]) -> int:
        while True:
            try:
                return lease.acquire(predecessors=predecessors)
            except LeaseHeld as error:
                with contextlib.suppress(StorageUnavailable):
                    if self._world.random.random() < 0.01:
                        self._world.report.requests += lease.request()
                    elif self._world.random.random() < 0.01:
                        lease.withdraw()
                self._sleep(task, min(POLL_S, error.wait_s))
            except StorageUnavailable:
                self._sleep(task, POLL_S)

    def _live(self, task: Task, client: SimulatedClient, lease: Lease, predecessors: Sequence[str]) -> None:
        world, random = self._world, self._world.random
        token = self._acquire(task, lease, predecessors)
        number = writer_number(token, random.getrandbits(40))
        replica, first = until_claimed(lambda: self._claim(task, client, lease, number), lambda: None)
        world.store.own(self.name, token, first)
        self.owns = True
        asked: list[str] = []
        lease.on_request(asked.append)
        while True:
            idle_until = world.scheduler.now + (
                random.uniform(20, 150) if random.random() < 0.003 else random.choice((0.05, 0.3, 1.0, 3.0))
            )
            while (left := idle_until - world.scheduler.now) > 0 and (world.is_faulty or left < TTL_S):
                self._sleep(task, min(left, TTL_S / 6))
                self._keep(lease)
            if (world.is_faulty and random.random() < 0.002) or (asked and random.random() < 0.5):
                self.owns = False
                with contextlib.suppress(StorageUnavailable):
                    lease.release()
                world.report.handovers += 1
                return
            self._store(task, lease, replica, self._encode(replica.txid + 1, replica.writer))

    def _claim(self, task: Task, client: SimulatedClient, lease: Lease, number: int) -> tuple[Replica, TXID]:
        """Find the end of the chain, and claim what follows; returns the first TXID that is ours."""
        replica = Replica(client, writer=number, lease=lease, clock=self, reread_s=WILD_REREAD_S if self._world.is_wild else REREAD_S)
        while True:
            self._keep(lease)
            try:
                recorded = replica.open()
                replica.join(LINEAGE, recorded, known_txid=0)
                self._reassure(lease)
                break
            except StorageUnavailable:
                self._sleep(task, POLL_S)
        return replica, self._append_claim(task, lease, replica)

    def _reassure(self, lease: Lease) -> None:
        """What comes between the look at the replica and the claim."""
        reassure(lease)

    def _append_claim(self, task: Task, lease: Lease, replica: Replica) -> TXID:
        try:
            self._store(task, lease, replica, self._encode(replica.txid + 1, replica.writer))
        except Fenced as error:
            raise Overtaken(error) from error
        return replica.txid

    def _store(self, task: Task, lease: Lease, replica: Replica, data: bytes) -> None:
        """Store the next TXID, with the same bytes until it is known to be stored, and tell that it is."""
        txid = decode_header(data).max_txid
        out = OutFile(0, txid, txid, 0, data)
        while True:
            try:
                replica.store([out], txid)
                break
            except StorageError:
                self._sleep(task, self._world.random.uniform(0.1, POLL_S))
                self._keep(lease)
        self._world.store.acknowledge(self.name, lease.generation, txid, data)

    def _keep(self, lease: Lease) -> None:
        """What the lease's own thread does: renew when it is due. Where clocks are wild it is late now and then, too."""
        world = self._world
        if lease.due_s() != 0:
            return
        if world.is_wild and world.is_faulty and world.scheduler.now >= self._late_until and world.random.random() < 0.5:
            self._late_until = world.scheduler.now + world.random.uniform(0, 3 * TTL_S)
        if not world.is_faulty or world.scheduler.now >= self._late_until:
            with contextlib.suppress(StorageUnavailable):
                lease.renew()

    def _encode(self, txid: int, number: int) -> bytes:
        page = self._world.random.getrandbits(64).to_bytes(8, "big") * (PAGE_SIZE // 8)
        return encode_file(Header(PAGE_SIZE, 1, TXID(txid), TXID(txid), 0, wal_offset=32, node_id=number), [(1, page)])


# -- the world -------------------------------------------------------------------------------------------------------------------


class Simulation:
    """Several writers, one store, and what happens to them."""

    def __init__(self, seed: int, *, writers: int | None = None) -> None:
        """`writers`: how many there are; 2 to 5, by the seed, when not given."""
        self.random = random.Random(seed)
        self.scheduler = Scheduler()
        self.report = Report(seed)
        self.is_wild = seed % 2 == 0
        self.store = Store(self.scheduler, self.report, checks_patience=not self.is_wild)
        self.loss = 0.0
        self.is_faulty = False
        self._slow = 0.0
        self.processes = [Process(self, number) for number in range(writers or self.random.randint(2, 5))]

    def delay_s(self) -> float:
        """Return how long a message is under way."""
        chance = self.random.random()
        if chance < self._slow / 20:
            return self.random.uniform(TIMEOUT_S, 3 * L0_RETENTION_S)
        return self.random.uniform(0.1, 6.0) if chance < self._slow else self.random.uniform(0.001, 0.05)

    def run(self, steps: int) -> Report:
        """Go on until there were so many events. Raises `Violation`."""
        scheduler, report = self.scheduler, self.report
        self._merge()
        try:
            while scheduler.steps < steps:
                self._faults(steps)
                if scheduler.steps < steps:
                    self._quiet()
            self.store.check_all()
        finally:
            scheduler.close()
            report.steps, report.simulated_s = scheduler.steps, scheduler.now
        return report

    def _merge(self) -> None:
        self.store.merge()
        self.scheduler.after(L0_RETENTION_S / 10, self._merge)

    def _faults(self, steps: int) -> None:
        """A phase in which anything may happen."""
        scheduler, chance = self.scheduler, self.random
        self.loss, self._slow = chance.choice(((0.0, 0.02), (0.02, 0.1), (0.1, 0.3)))
        self.is_faulty = True
        end = scheduler.now + FAULTS_S
        while scheduler.now < end and scheduler.steps < steps:
            scheduler.run(until=min(end, scheduler.now + chance.expovariate(1 / (40 if self.is_wild else 12))), steps=steps)
            process = chance.choice(self.processes)
            what = chance.random()
            if what < 0.25:
                process.crash()
                scheduler.after(chance.expovariate(1 / 10), process.boot)
            elif what < 0.75:
                process.pause(chance.choice((2.0, TTL_S, 2 * TTL_S, L0_RETENTION_S, 3 * L0_RETENTION_S)) * chance.uniform(0.5, 1.5))
            elif process.is_settable:
                process.set_clock(chance.choice((-7200.0, -60.0, -5.0, 5.0, 60.0, 7200.0)))
            process.boot()

    def _quiet(self) -> None:
        """A phase without faults: somebody owns the replica in bounded time, and somebody else does when that one is killed."""
        scheduler = self.scheduler
        self.loss = self._slow = 0.0
        self.is_faulty = False
        for process in self.processes:
            process.boot()
        scheduler.run(until=scheduler.now + max((process._paused_until for process in self.processes), default=0.0) - scheduler.now + 0.1)
        scheduler.run(until=scheduler.now + TIMEOUT_S)
        self._until_stored()
        owner = next((process for process in self.processes if process.owns), None)
        if owner is not None:
            began = scheduler.now
            owner.crash()
            self._until_stored()
            self.report.takeovers_s.append(scheduler.now - began)
        scheduler.run(until=scheduler.now + QUIET_S / 10)
        if owner is not None:
            owner.boot()

    def _until_stored(self) -> None:
        scheduler, newest = self.scheduler, self.store.newest
        end = scheduler.now + BOUND_S
        while self.store.newest == newest:
            if scheduler.now >= end:
                raise Violation(f"bounded: nobody has stored anything for {BOUND_S:.0f} s without faults")
            scheduler.run(until=min(end, scheduler.now + 0.25))


def simulate(seed: int, steps: int, *, writers: int | None = None) -> Report:
    """Run a simulation of so many events.

    Raises:
        Violation: something does not hold; its notes tell the seed.
    """
    log = logging.getLogger("replicator")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    world = Simulation(seed, writers=writers)
    try:
        return world.run(steps)
    except Violation as error:
        error.add_note(f"seed {seed}, step {world.scheduler.steps}, time {world.scheduler.now:.1f} s")
        raise
    finally:
        log.setLevel(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run simulations with consecutive seeds until there were so many steps; print what happened."""
    parser = argparse.ArgumentParser(prog="python -m replicator.testing.simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="events in all")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--each", type=int, default=50_000, help="events for each seed")
    parser.add_argument("--writers", type=int, help="2 to 5, by the seed, when not given")
    options = parser.parse_args(arguments)
    began, done, seed = time.monotonic(), 0, options.seed
    while done < options.steps:
        try:
            report = simulate(seed, min(options.each, options.steps - done), writers=options.writers)
        except Violation as error:
            print(f"VIOLATION {error} ({'; '.join(error.__notes__)})")
            return 1
        print(report, flush=True)
        done, seed = done + report.steps, seed + 1
    print(f"{done} steps without a violation, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
