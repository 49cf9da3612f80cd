"""`Lease`: one writer at a time, for one database or for any number of them.

A thin engine around the decisions in `tenure.py`: it reads and writes `lock.json` with conditions, resolves replies that were lost, and tells those who
rely on it when it is lost. One object may guard a whole host: one renewal each third of the TTL, whatever the number of databases.

**Unknown outcomes.** Every record that is written carries this instance's id and a serial number. So whatever happened to a request, reading the object
back says whether it was stored; and since each write names the version that it replaces, a late copy of one changes nothing.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import datetime
from types import TracebackType
from typing import Literal, Self

from replicator.clock import SYSTEM, Clock, Moment
from replicator.errors import (
    ConditionsIgnored,
    ConfigError,
    FormatError,
    LeaseError,
    LeaseHeld,
    LeaseLost,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from replicator.format.lock import MAX_TTL_S, LockRecord, decode_lock
from replicator.storage.base import ReplicaClient
from replicator.storage.probe import probe_conditional_writes
from replicator.tenure import Sighting, Term, is_in_force, renewal_due_in_s, sighted, successor, wait_s

__all__ = ["LOCK_NAME", "Lease", "LeaseState", "LeaseStatus", "LeaseTerms", "default_owner", "read_lock", "release_lock"]

LOCK_NAME = "lock.json"
MIN_TTL_S = 1.0
WRITE_TRIES = 4
RETRY_PART = 0.1

LeaseState = Literal["none", "held", "expired", "lost", "released"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How a lease is to be held. `owner`: what others read; `<host>:<pid>` when empty."""

    ttl_s: float = 30.0
    owner: str = ""

    def __post_init__(self) -> None:
        if not MIN_TTL_S <= self.ttl_s <= MAX_TTL_S:
            raise ConfigError(f"the ttl of a lease must be {MIN_TTL_S:g} s to {MAX_TTL_S:g} s, not {self.ttl_s:g} s")


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """A lease as this process knows it.

    Attributes:
        state: "expired": its time is over and it could not be renewed yet; nothing is acknowledged meanwhile.
        generation: the fencing token; 0 when there never was one.
        expires_at: a hint, on this machine's wall clock.
        error: why it could not be renewed, or who has it now.
    """

    url: str
    state: LeaseState
    owner: str
    generation: int
    expires_at: datetime | None
    error: str | None = None


def default_owner() -> str:
    """Return `<host>:<pid>`, as Litestream names an owner."""
    return f"{socket.gethostname()}:{os.getpid()}"


def read_lock(client: ReplicaClient) -> tuple[str, LockRecord] | None:
    """Return the lease object and its etag; None when there is none.

    Raises:
        LeaseError: it cannot be understood.
        StorageError: it cannot be read.
    """
    try:
        stored = client.get_control(LOCK_NAME)
    except ObjectNotFound:
        return None
    try:
        return stored.etag, decode_lock(stored.data)
    except FormatError as error:
        raise LeaseError(
            f"unreadable lease: {client.url}/{LOCK_NAME}: {error}", hint="`pyrepl lease release -force` replaces it"
        ) from error


def release_lock(client: ReplicaClient, *, force: bool, clock: Clock = SYSTEM) -> LockRecord | None:
    """Mark a lease as released, whoever holds it; returns what it was, None when there is none. An owner that lives finds it lost.

    Args:
        force: also one that its owner may still hold, and one that cannot be understood.

    Raises:
        LeaseHeld: its `expires_at` is not over.
        LeaseError, StorageError: see there; it was changed meanwhile.
    """
    try:
        stored = client.get_control(LOCK_NAME)
    except ObjectNotFound:
        return None
    now = clock.now()
    try:
        record = decode_lock(stored.data)
    except FormatError as error:
        if not force:
            raise LeaseError(f"unreadable lease: {client.url}/{LOCK_NAME}: {error}", hint="-force replaces it") from error
        record = LockRecord(0, now.wall, "")
    if record.released:
        return record
    if record.expires_at > now.wall and not force:
        raise LeaseHeld(client.url, owner=record.owner, generation=record.generation, wait_s=record.expires_at - now.wall)
    mark = replace(record, expires_at=now.wall, instance=secrets.token_hex(8), serial=0, released=True)
    try:
        client.put_control(LOCK_NAME, mark.encode(), if_match=stored.etag)
    except PreconditionFailed:
        raise LeaseError(
            f"lease was changed at this moment: {client.url}/{LOCK_NAME}", hint="look again with `pyrepl lease show`"
        ) from None
    return record


class Lease:
    """The right to write, in one store. May be used from any thread, by any number of replicators.

    with Lease("s3://bucket/hosts/a") as lease:
        for path in paths:
            Replicator(path, url_of(path), lease=lease).start()
    """

    def __init__(
        self,
        home: str | ReplicaClient,
        *,
        owner: str | None = None,
        ttl_s: float = 30.0,
        clock: Clock = SYSTEM,
        instance: str | None = None,
        background: bool = True,
    ) -> None:
        """Nothing is asked of the store before `acquire`.

        Args:
            home: URL or client of the place where `lock.json` stands. A client is not closed.
            owner: what others read; `<host>:<pid>` when not given.
            ttl_s: after so long without a renewal others may take it: 1 to 3600.
            clock, instance: for tests.
            background: renew in a thread of its own; else `renew` must be called.

        Raises:
            ConfigError: a malformed URL or TTL.
        """
        LeaseTerms(ttl_s)
        self._owns_client = isinstance(home, str)
        if isinstance(home, str):
            from replicator.storage import open_client

            home = open_client(home)
        self._client: ReplicaClient = home
        self.ttl_s = ttl_s
        self.owner = owner or default_owner()
        self.instance = instance or secrets.token_hex(8)
        self.lapses = 0
        """How often it was renewed after its time was over already."""
        self._clock = clock
        self._background = background
        self._asking = threading.RLock()  # one request at a time
        self._changed = threading.Condition()
        self._term: Term | None = None
        self._seen: Sighting | None = None
        self._sent: dict[int, Moment] = {}  # when our records were sent, by serial
        self._serial = 0
        self._generation = 0  # of our last term
        self._floor = 0  # the highest that was seen
        self._state: LeaseState = "none"
        self._error: str | None = None
        self._lost: LeaseLost | None = None
        self._probed = False
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._ends = False
        self._listeners: list[Callable[[LeaseError], None]] = []

    # -- asking ------------------------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"{self._client.url.rstrip('/')}/{LOCK_NAME}"

    @property
    def generation(self) -> int:
        """The fencing token; that of our last term when there is none now, and 0 before the first."""
        return self._generation

    def status(self) -> LeaseStatus:
        """Return what is known, without a request."""
        term, seen = self._term, self._seen
        if term is not None:
            state: LeaseState = "held" if is_in_force(term, self._clock.now()) else "expired"
            return LeaseStatus(self.url, state, self.owner, term.record.generation, term.record.expires, self._error)
        record = seen.record if seen is not None else None
        if record is None:
            return LeaseStatus(self.url, self._state, "", self._floor, None, self._error)
        return LeaseStatus(self.url, self._state, record.owner, record.generation, record.expires, self._error)

    def due_s(self) -> float | None:
        """Return in how many seconds it must be renewed; None when there is nothing to renew."""
        term = self._term
        return None if term is None else renewal_due_in_s(term, self._clock.now())

    def on_loss(self, listener: Callable[[LeaseError], None]) -> Callable[[], None]:
        """Let `listener` be called, by any thread, when the lease is lost; returns a function that ends this."""
        with self._changed:
            self._listeners.append(listener)

        def forget() -> None:
            with self._changed:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return forget

    # -- acting ------------------------------------------------------------------------------------------------------------------

    def acquire(self, *, predecessors: Collection[str] = ()) -> int:
        """Take the lease if it is free, and return the fencing token; at once when it is ours. One try, which waits for nobody.

        An object must have been seen unchanged for its owner's TTL, so that the first call for a lease that somebody left behind fails: call again.

        Args:
            predecessors: instances that are certainly dead: their lease is free.

        Raises:
            LeaseHeld: somebody else has it; `wait_s` says when to ask again.
            ConditionsIgnored: the store cannot do this.
            LeaseError: the object cannot be understood.
            StorageError: see there. When the outcome is unknown, call again.
        """
        with self._asking:
            if self._term is not None:
                return self.confirm()
            if not self._probed:
                conditions = probe_conditional_writes(self._client)
                if not (conditions.create and conditions.replace):
                    raise ConditionsIgnored(self._client.url)
                self._probed = True
            for _ in range(WRITE_TRIES):
                self._look()
                if self._term is not None:  # an earlier try had arrived
                    break
                now = self._clock.now()
                if self._seen is not None and (left := wait_s(self._seen, now, predecessors)) > 0:
                    record = self._seen.record
                    raise LeaseHeld(self.url, owner=record.owner, generation=record.generation, wait_s=left)
                before = self._seen.record if self._seen is not None else None
                record = successor(before, floor=self._floor, owner=self.owner, instance=self.instance, ttl_s=self.ttl_s, now=now)
                if self._write(record, self._seen.etag if self._seen is not None else None):
                    break
            else:
                raise StorageUnavailable(f"lease changes hands again and again: {self.url}")
            self._lost, self._ends, self._pid = None, False, os.getpid()
            log.info("lease acquired url=%s owner=%s generation=%d", self.url, self.owner, self._generation)
            self._begin_renewing()
            return self._generation

    def confirm(self) -> int:
        """Return the fencing token if the lease is in force now, and renew it first where its time is over.

        Raises:
            LeaseLost: somebody else has it.
            StorageUnavailable: its time is over, and it cannot be told; it may still be ours.
        """
        term = self._term
        if term is not None and is_in_force(term, self._clock.now()):
            return term.record.generation
        with self._asking:
            if self._term is None:
                raise self._lost or LeaseLost(self.url, owner="", generation=self._generation)
            if not is_in_force(self._term, self._clock.now()):
                self.renew()
                if not is_in_force(self._term, self._clock.now()):
                    raise StorageUnavailable(f"lease cannot be renewed in time, the reply takes too long: {self.url}")
            return self._term.record.generation

    def renew(self) -> None:
        """Renew now.

        Raises:
            LeaseLost: somebody else has it.
            StorageError: unknown, or refused; it is ours until its time is over.
        """
        with self._asking:
            for _ in range(WRITE_TRIES):
                term = self._term
                if term is None:
                    raise self._lost or LeaseLost(self.url, owner="", generation=self._generation)
                now = self._clock.now()
                record = replace(term.record, expires_at=now.wall + self.ttl_s, ttl_s=self.ttl_s)
                if self._write(record, term.etag):
                    self._error = None
                    return
            raise StorageUnavailable(f"lease cannot be renewed, it changes again and again: {self.url}")

    def release(self) -> None:
        """Give it up, so that another may take it at once. Nothing is written when it is not ours.

        Raises:
            StorageError: it is not known whether it is released; it runs out by itself.
        """
        with self._asking:
            term = self._term
            if term is not None:
                now = self._clock.now()
                record = replace(term.record, expires_at=now.wall, released=True)
                try:
                    written = self._write(record, term.etag, keeps=False)
                except LeaseLost:
                    written = False
                self._term = None
                self._state = "released"
                log.info("lease %s url=%s generation=%d", "released" if written else "was not ours any more", self.url, self._generation)

    def close(self, *, release: bool = True) -> None:
        """Stop renewing, and release. A store that does not answer is no error: the lease runs out by itself."""
        if os.getpid() != self._pid:  # a forked child: the lease is its parent's
            return
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)
        if release:
            try:
                self.release()
            except StorageError as error:
                log.warning("lease was not released, it runs out by itself url=%s error=%r", self.url, str(error))
        if self._owns_client:
            self._client.close()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()

    # -- the object --------------------------------------------------------------------------------------------------------------

    def _write(self, record: LockRecord, etag: str | None, *, keeps: bool = True) -> bool:
        """Write a record in place of the version `etag`, or where there is none. False when the object was another one: look again.

        Args:
            keeps: the record makes the lease ours; else it gives it up.

        Raises:
            LeaseLost: it was ours, and is somebody else's.
        """
        self._serial += 1
        record = replace(record, serial=self._serial)
        self._sent[self._serial] = sent = self._clock.now()
        try:
            stored = self._client.put_control(LOCK_NAME, record.encode(), if_match=etag, if_absent=etag is None)
        except PreconditionFailed:
            return self._look_back(record)
        except StorageUnavailable:
            if self._look_back(record):
                return True
            raise
        if not stored:  # a store that tells no etag of what it took
            return self._look_back(record)
        if keeps:
            self._hold(Term(stored, record, sent))
        return True

    def _look_back(self, record: LockRecord) -> bool:
        """Find out whether a record is the one that is stored."""
        self._look()
        if record.released:
            return self._seen is not None and self._seen.record == record
        return self._term is not None and self._term.record == record

    def _look(self) -> None:
        """Read the object: it is ours, or nobody's, or somebody else's.

        Raises:
            LeaseLost: it was ours, and is not any more.
        """
        found = read_lock(self._client)
        now = self._clock.now()
        record = found[1] if found is not None else None
        if found is not None and record is not None and record.instance == self.instance and not record.released:
            sent = self._sent.get(record.serial)
            if sent is None:  # only an older version of what it has told us already could say this
                raise StorageUnavailable(f"store answers with what it held before: {self.url}")
            self._hold(Term(found[0], record, sent))
            return
        self._seen = None if found is None else sighted(self._seen, *found, now)
        if record is not None:
            self._floor = max(self._floor, record.generation)
        if self._term is not None and (record is None or record.instance != self.instance):
            self._lose(record)

    def _hold(self, term: Term) -> None:
        if self._term is not None and not is_in_force(self._term, self._clock.now()):
            self.lapses += 1
        self._term, self._seen, self._state = term, None, "held"
        self._generation = term.record.generation
        self._floor = max(self._floor, self._generation)
        for serial in [serial for serial in self._sent if serial < term.record.serial]:
            del self._sent[serial]

    def _lose(self, record: LockRecord | None) -> None:
        assert self._term is not None
        generation = record.generation if record is not None else self._term.record.generation
        lost = LeaseLost(self.url, owner=record.owner if record is not None else "", generation=generation)
        self._term, self._lost, self._state, self._error = None, lost, "lost", str(lost)
        log.error("lease lost url=%s to=%s generation=%d", self.url, lost.owner or "nobody", generation)
        with self._changed:
            self._ends = True
            listeners = list(self._listeners)
            self._changed.notify_all()
        for listener in listeners:
            listener(lost)
        raise lost

    # -- renewing ----------------------------------------------------------------------------------------------------------------

    def _begin_renewing(self) -> None:
        if self._background and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._keep, name="pyrepl lease", daemon=True)
            self._thread.start()

    def _keep(self) -> None:
        """Body of the thread: renew until it is lost, or given up."""
        failed = False
        while True:
            due_s = self.due_s()
            if due_s is None:
                return
            if failed:
                due_s = max(due_s, self.ttl_s * RETRY_PART)
            with self._changed:
                if self._changed.wait_for(lambda: self._ends, due_s):
                    return
            try:
                self.renew()
                failed = False
            except LeaseError:
                return
            except StorageError as error:
                failed = True
                if self._error != str(error):
                    log.warning("lease cannot be renewed url=%s error=%r", self.url, str(error))
                self._error = str(error)
