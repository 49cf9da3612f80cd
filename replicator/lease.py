"""`Lease`: one writer at a time, for one database or for any number of them.

A thin engine around the decisions in `tenure.py`: it reads and writes `lock.json` with conditions, resolves replies that were lost, and tells those who
rely on it when it is lost. One object may guard a whole host: one renewal each third of the TTL, whatever the number of databases.

**Unknown outcomes.** Every record that is written carries this instance's id and a serial number. So whatever happened to a request, reading the object
back says whether it was stored; and since each write names the version that it replaces, a late copy of one changes nothing.

**Handing over.** Whoever wants the lease may `request` it: a mark in the object, which the owner finds when it renews the next time, because its etag is not
the one that it knows. So nobody has to look for requests. The owner then does what it does at an orderly end; the mark gives no right to anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from replicator.anchor import Anchor
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

T = TypeVar("T")

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
        wanted_by: who asks for a hand-over; empty when nobody does.
    """

    url: str
    state: LeaseState
    owner: str
    generation: int
    expires_at: datetime | None
    error: str | None = None
    wanted_by: str = ""


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
        self._run = 0  # the thread of which renewing is up
        self._is_given_up = False  # it is not known whether a release has arrived
        self._listeners: list[Callable[[LeaseError], None]] = []
        self._request_listeners: list[Callable[[str], None]] = []
        self._told_of = ""
        self._anchor: Anchor | None = None

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
            record = term.record
            return LeaseStatus(self.url, state, self.owner, record.generation, record.expires, self._error, record.wanted_by)
        if seen is None:
            return LeaseStatus(self.url, self._state, "", self._floor, None, self._error)
        record = seen.record
        return LeaseStatus(self.url, self._state, record.owner, record.generation, record.expires, self._error, record.wanted_by)

    def due_s(self) -> float | None:
        """Return in how many seconds it must be renewed; None when there is nothing to renew."""
        term = self._term
        return None if term is None else renewal_due_in_s(term, self._clock.now())

    def on_loss(self, listener: Callable[[LeaseError], None]) -> Callable[[], None]:
        """Let `listener` be called, by any thread, when the lease is lost; returns a function that ends this."""
        with self._changed:
            self._listeners.append(listener)
        return lambda: self._forget(self._listeners, listener)

    def on_request(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Let `listener` be called, by any thread, with the name of who asks for a hand-over, once for each; returns a function that ends this.

        Nothing happens by itself: to hand over is to stop writing, to store everything, and to release the lease.
        """
        with self._changed:
            self._request_listeners.append(listener)
            term = self._term
        if term is not None and term.record.wanted_by:
            listener(term.record.wanted_by)
        return lambda: self._forget(self._request_listeners, listener)

    def _forget(self, listeners: list[T], listener: T) -> None:
        with self._changed:
            if listener in listeners:
                listeners.remove(listener)

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
                    if self._is_given_up:  # and so may a release: only another version of the object stops it
                        self.renew()
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
            self._lost, self._is_given_up, self._pid = None, False, os.getpid()
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

    def anchor(self, folder: Path) -> Mapping[str, object] | None:
        """Lock a file for as long as this object lives, if there is none yet, and return where it is; None where that is not possible.

        Args:
            folder: of a database that it guards, where the file is to be.
        """
        with self._asking:
            if self._anchor is None:
                try:
                    self._anchor = Anchor(folder)
                except OSError as error:  # then its successor must wait for its time to be over
                    log.debug("lease has no anchor url=%s folder=%s error=%r", self.url, folder, str(error))
                    return None
            return self._anchor.place

    def release(self) -> None:
        """Give it up, so that another may take it at once. Nothing is written when it is not ours.

        Raises:
            StorageError: it is not known whether it is released; it runs out by itself. Nothing is acknowledged under it any more.
        """
        with self._asking:
            if self._term is None:
                return
            written, self._is_given_up = False, True
            try:
                for _ in range(WRITE_TRIES):
                    term = self._term
                    now = self._clock.now()
                    record = replace(term.record, expires_at=now.wall, released=True)
                    if written := self._write(record, term.etag, keeps=False):
                        break
                else:
                    raise StorageUnavailable(f"lease cannot be released, it changes again and again: {self.url}")
            except LeaseLost:
                pass
            finally:
                self._term = None
                self._state = "released"
            log.info("lease %s url=%s generation=%d", "released" if written else "was not ours any more", self.url, self._generation)

    def request(self) -> bool:
        """Ask the owner to hand over; False when there is nobody to ask: it is free, or ours. One or two small requests.

        Raises:
            LeaseError: the object cannot be understood, or is Litestream's, which hands over to nobody.
            StorageError: unknown; call again.
        """
        return self._mark(self.owner)

    def withdraw(self) -> None:
        """Take a `request` of ours back. Raises what `request` raises."""
        self._mark("")

    def _mark(self, wanted_by: str) -> bool:
        with self._asking:
            for _ in range(WRITE_TRIES):
                self._look()
                seen = self._seen
                if self._term is not None or seen is None or seen.record.released:
                    return False
                if wanted_by and not seen.record.instance:
                    raise LeaseError(
                        f"the owner cannot be asked to hand over: {self.url} is Litestream's ({seen.record.owner})",
                        hint="stop it; its lease is free then, or when its time is over",
                    )
                if seen.record.wanted_by == wanted_by or (not wanted_by and seen.record.wanted_by != self.owner):
                    return True
                record = replace(seen.record, wanted_by=wanted_by)
                with contextlib.suppress(PreconditionFailed):  # its owner was faster
                    self._client.put_control(LOCK_NAME, record.encode(), if_match=seen.etag)
                    return True
            raise StorageUnavailable(f"lease changes again and again: {self.url}")

    def close(self, *, release: bool = True) -> None:
        """Stop renewing, and release. A store that does not answer is no error: the lease runs out by itself."""
        if os.getpid() != self._pid:  # a forked child: the lease is its parent's
            return
        with self._changed:
            self._run += 1
            self._changed.notify_all()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)
        if release:
            try:
                self.release()
            except StorageError as error:
                log.warning("lease was not released, it runs out by itself url=%s error=%r", self.url, str(error))
        if self._anchor is not None:
            self._anchor.close()
            self._anchor = None
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
        wanted_by, before, self._told_of = term.record.wanted_by, self._told_of, term.record.wanted_by
        if wanted_by and wanted_by != before:
            log.info("a hand-over is asked for url=%s by=%s", self.url, wanted_by)
            with self._changed:
                listeners = list(self._request_listeners)
            for listener in listeners:
                listener(wanted_by)

    def _lose(self, record: LockRecord | None) -> None:
        assert self._term is not None
        generation = record.generation if record is not None else self._term.record.generation
        # Of a later generation it was taken first, and released by whoever took it.
        released = record is not None and record.released and generation == self._term.record.generation
        lost = LeaseLost(self.url, owner=record.owner if record is not None else "", generation=generation, released=released)
        self._term, self._lost, self._state, self._error = None, lost, "lost", str(lost)
        log.error("lease lost url=%s to=%s generation=%d", self.url, "nobody" if released else lost.owner or "nobody", generation)
        with self._changed:
            self._run += 1
            listeners = list(self._listeners)
            self._changed.notify_all()
        for listener in listeners:
            try:
                listener(lost)
            except Exception as error:  # the others must know, whatever one makes of it
                log.error("a listener failed when the lease was lost, by a defect url=%s", self.url, exc_info=error)
        raise lost

    # -- renewing ----------------------------------------------------------------------------------------------------------------

    def _begin_renewing(self) -> None:
        if self._background:
            with self._changed:
                self._run += 1  # one that is about to end does not count
                run = self._run
                self._changed.notify_all()
            self._thread = threading.Thread(target=self._keep, args=(run,), name="pyrepl lease", daemon=True)
            self._thread.start()

    def _keep(self, run: int) -> None:
        """Body of the thread: renew until it is lost, or given up."""
        failed = False
        while True:
            due_s = self.due_s()
            if due_s is None:
                return
            if failed:
                due_s = max(due_s, self.ttl_s * RETRY_PART)
            with self._changed:
                if self._changed.wait_for(lambda: self._run != run, due_s):
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
