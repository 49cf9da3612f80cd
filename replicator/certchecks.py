"""What `certify` tries on a store, one function for each promise. They know the contract of `storage.base` and no backend.

A check returns what it saw, in one line. It raises `Failed` when the promise does not hold, and `NotTried` when it says nothing about this store;
an error of the store's is a failure, too. All names are new to the place, so that checks do not depend on each other, with one exception: what
writes under conditions runs only where they held, because a store that ignores them may be left with a file that it cannot read.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from replicator.errors import Fenced, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.format.ltx import TXID, FileInfo
from replicator.outbox import OutFile
from replicator.replica import Replica, new_lineage
from replicator.storage.base import ReplicaClient, created_at
from replicator.storage.faultproxy import FaultProxy
from replicator.storage.probe import Conditions, probe_conditional_writes
from replicator.storage.scratch import Scratch

__all__ = ["CHECKS", "CONTROL_NAMES", "LEVELS", "Check", "Failed", "Mode", "NotTried", "Place", "quantile"]

Mode = Literal["replication", "restore", "append-only", "fenced", "retention"]

STAMP_MS = 1_700_000_000_997  # long ago, and no whole second
WRITERS, RACES = 50, 3
SAMPLES = 50
LARGE_BYTES = 8 << 20
PART_WRITERS = 4
DRILL_TRIES = 6
BIG_SKEW_S, SMALL_SKEW_S = 300.0, 5.0
LEVELS = (0, 1, 2, 3, 4, 5, 6, 9)
CONTROL_NAMES = ("certify/first", "certify/second", "certify/empty", "certify/race", "certify/none", "pyrepl/lineage.json")


class Failed(Exception):
    """The promise does not hold."""


class NotTried(Exception):
    """The check says nothing about this store."""


@dataclass(slots=True)
class Place:
    """Where the checks work.

    Attributes:
        keys: how many files the listing of many has; 0 for no such check.
        races: how often writers race.
        conditions: which ones the store honours; None before that was tried.
        latency_s: what `latency` measured.
        warnings: what the report says beside the results.
    """

    scratch: Scratch
    client: ReplicaClient
    keys: int
    races: int = RACES
    conditions: Conditions | None = None
    latency_s: dict[str, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, level: int, txid: int, body: bytes, *, if_absent: bool = False, client: ReplicaClient | None = None) -> FileInfo:
        return (client or self.client).put(level, TXID(txid), TXID(txid), body, timestamp_ms=STAMP_MS, if_absent=if_absent)

    def read(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> bytes:
        with self.client.open(info, offset=offset, size=size) as stream:
            return b"".join(iter(lambda: stream.read(1 << 20), b""))

    def names(self, level: int) -> list[int]:
        return [info.min_txid for info in self.client.list(level)]

    def listed(self, level: int, txid: int) -> FileInfo:
        """Return a file as it is listed."""
        found = [info for info in self.client.list(level, accurate_times=True) if info.min_txid == txid]
        expect(len(found) == 1, "what was just stored is not listed" if not found else "a file is listed twice")
        return found[0]

    def needs_create(self) -> None:
        if self.conditions is None or not self.conditions.create:
            raise Failed("not tried: see create")

    def needs_replace(self) -> None:
        if self.conditions is None or not self.conditions.replace:
            raise Failed("not tried: see replace")


@dataclass(frozen=True, slots=True)
class Check:
    """`modes`: those that need it."""

    name: str
    title: str
    modes: tuple[Mode, ...]
    run: Callable[[Place], str]


def expect(holds: object, what: str) -> None:
    if not holds:
        raise Failed(what)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# -- reading and writing -----------------------------------------------------------------------------------------------------------


def bytes_come_back(place: Place) -> str:
    sizes = [1, 100, 4096, 65_537]
    for number, size in enumerate(sizes, 1):
        body = os.urandom(size)
        info = place.put(0, number, body)
        expect(info.size == size, f"{size} bytes were stored as {info.size}")
        expect(place.read(info) == body, f"{size} bytes came back changed")
    overwritten = place.put(0, 1, b"second")
    expect(place.read(overwritten) == b"second", "an overwritten file gave its old bytes")
    return f"files of {', '.join(map(str, sizes))} bytes, and one overwritten"


def large_comes_back(place: Place) -> str:
    body = os.urandom(LARGE_BYTES)
    info = place.put(1, 1, body)
    digest, found = hashlib.sha256(body).digest(), hashlib.sha256(place.read(info)).digest()
    expect(digest == found, f"{LARGE_BYTES} bytes came back changed")
    return f"{LARGE_BYTES >> 20} MiB"


def empty_comes_back(place: Place) -> str:
    try:
        place.client.put_control("certify/empty", b"")
        expect(place.client.get_control("certify/empty").data == b"", "an empty object came back with bytes")
    except (StorageError, Failed) as error:
        place.warnings.append(f"empty objects: {error} (nothing that is stored is ever empty)")
    return "an empty object"


def ranges_are_exact(place: Place) -> str:
    body = bytes(range(256)) * 1024
    info = place.put(0, 10, body)
    end = len(body)
    cases = {
        "first": (0, 100),
        "middle": (70_001, 4097),
        "suffix": (end - 37, None),
        "one byte": (end - 1, 1),
        "past the end": (end - 5, 100),
    }
    for name, (offset, size) in cases.items():
        wanted = body[offset : None if size is None else offset + size]
        expect(place.read(info, offset=offset, size=size) == wanted, f"the range '{name}' gave other bytes")
    expect(place.read(info, offset=end + 10, size=5) == b"", "a range beyond the end gave bytes")
    return ", ".join([*cases, "beyond the end"])


def times_are_kept(place: Place) -> str:
    place.put(2, 1, b"dated")
    info = place.listed(2, 1)
    expect(info.created_at == created_at(STAMP_MS), f"a time came back as {info.created_at.isoformat()}")
    return "to the millisecond"


def metadata_is_kept(place: Place) -> str:
    given = {"pyrepl-writer": "00ff", "pyrepl-lineage": "certify"}
    info = place.client.put(2, TXID(2), TXID(2), b"marked", timestamp_ms=STAMP_MS, metadata=given)
    found = place.client.metadata(info)
    expect(found in (given, {}), "metadata came back changed")
    return "names and values" if found else "the store has no place for it, and none is needed"


# -- listings ----------------------------------------------------------------------------------------------------------------------


def listings_are_consistent(place: Place) -> str:
    rounds = 10
    for txid in range(1, rounds + 1):
        place.put(3, txid, b"1")
        expect(place.names(3) == list(range(1, txid + 1)), "a file that was just stored is not listed")
    place.put(3, rounds, b"longer now")
    expect(place.listed(3, rounds).size == 10, "a listing has the size of the overwritten file")
    for txid in range(1, rounds + 1):
        place.client.delete([info for info in place.client.list(3) if info.min_txid == txid])
        expect(place.names(3) == list(range(txid + 1, rounds + 1)), "a file that was just deleted is listed")
    return f"after writing, overwriting and deleting, {rounds} times"


def pages_are_complete(place: Place) -> str:
    if not place.keys:
        raise NotTried("switched off")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda txid: place.put(4, txid, b"x"), range(1, place.keys + 1)))
    expect(place.names(4) == list(range(1, place.keys + 1)), "files are missing from a long listing, or out of order, or there twice")
    middle = place.keys // 2
    found = [info.min_txid for info in place.client.list(4, seek=TXID(middle))]
    expect(found == list(range(middle, place.keys + 1)), "a listing that begins in the middle is not the end of the whole one")
    if place.keys <= 1000:
        place.warnings.append(f"only {place.keys} files were listed: one page of most stores")
    return f"{place.keys} files, from the start and from the middle"


# -- conditions --------------------------------------------------------------------------------------------------------------------


def a_second_create_is_refused(place: Place) -> str:
    place.conditions = probe_conditional_writes(place.client)
    expect(place.conditions.create, "conditional writes are accepted and ignored: two writers would overwrite each other")
    return "on a small object"


def replacing_on_a_condition_works(place: Place) -> str:
    place.needs_create()
    expect(
        place.conditions is not None and place.conditions.replace,
        "nothing can be replaced on a condition, which leases need (it is not offered, or accepted and ignored)",
    )
    return "a wrong etag is refused"


def etags_guard(place: Place) -> str:
    place.needs_replace()
    client, name = place.client, "certify/first"
    first = client.put_control(name, b"1", if_absent=True)
    second = client.put_control(name, b"2", if_match=first)
    _refused(lambda: client.put_control(name, b"3", if_match=first), "a replacement with the etag of older bytes was accepted")
    _refused(lambda: client.put_control(name, b"3", if_absent=True), "a second create was accepted")
    _refused(lambda: client.put_control("certify/none", b"3", if_match=second), "a replacement of what is not there was accepted")
    found = client.get_control(name)
    expect((found.data, found.etag) == (b"2", second), "reading gave other bytes, or another etag, than the last write")
    try:
        _refused(lambda: client.delete_control(name, if_match=first), "")
    except (StorageError, Failed):
        place.warnings.append("deleting under a condition is not supported (what needs it overwrites instead)")
    return "current and stale etags, and one of what is not there"


def _refused(write: Callable[[], object], otherwise: str) -> None:
    try:
        write()
    except PreconditionFailed:
        return
    raise Failed(otherwise)


def creating_has_one_winner(place: Place) -> str:
    place.needs_create()
    for turn in range(1, place.races + 1):
        bodies = [b"%d of writer %d" % (turn, number) * 20 for number in range(WRITERS)]
        won = _race(WRITERS, lambda number, turn=turn, bodies=bodies: place.put(5, turn, bodies[number], if_absent=True))  # type: ignore[misc]
        expect(len(won) == 1, f"{len(won)} of {WRITERS} writers created the same file")
        expect(place.read(place.listed(5, turn)) == bodies[won[0]], "the file has not the bytes of the writer that won")
    return f"{WRITERS} writers at once, {place.races} times"


def replacing_has_one_winner(place: Place) -> str:
    place.needs_replace()
    name, client = "certify/race", place.client
    etag = client.put_control(name, b"start")
    for turn in range(place.races):

        def replace(number: int, turn: int = turn, etag: str = etag) -> object:
            return client.put_control(name, b"%d %d" % (turn, number), if_match=etag)

        won = _race(WRITERS, replace)
        expect(len(won) == 1, f"{len(won)} of {WRITERS} writers replaced the same version")
        stored = client.get_control(name)
        expect(stored.data == b"%d %d" % (turn, won[0]), "the object has not the bytes of the writer that won")
        etag = stored.etag
    return f"{WRITERS} writers at once, {place.races} times"


def _race(writers: int, write: Callable[[int], object]) -> list[int]:
    """Let writers write at one moment; returns those that were told that they have won.

    Who gets no answer does not know; it asks again, as a writer does. A refusal is then no proof that another one has won, so such a writer
    counts as a loser, and the bytes that are stored say whether there is exactly one winner.
    """
    start, won, lock = threading.Barrier(writers), list[int](), threading.Lock()
    errors: list[StorageError] = []

    def run(number: int) -> None:
        start.wait(60)
        for _ in range(4):
            try:
                write(number)
            except PreconditionFailed:
                return
            except StorageUnavailable as error:
                with lock:
                    errors.append(error)
                time.sleep(0.1)
                continue
            with lock:
                won.append(number)
            return

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(run, range(writers)))
    if not won and errors:
        raise errors[0]
    return won


def parts_keep_the_condition(place: Place) -> str:
    parts = place.scratch.parts
    if parts is None:
        raise NotTried("files are never sent in parts")
    place.needs_create()
    bodies = [os.urandom(1 << 16) * ((place.scratch.part_bytes >> 16) + 8) for _ in range(PART_WRITERS)]
    won = _race(PART_WRITERS, lambda number: place.put(6, 1, bodies[number], if_absent=True, client=parts))
    expect(len(won) == 1, f"{len(won)} of {PART_WRITERS} writers created the same file in parts")
    expect(place.read(place.listed(6, 1)) == bodies[won[0]], "the file has not the bytes of the writer that won")
    _refused(lambda: place.put(6, 1, b"small", if_absent=True), "a file that was sent in parts was created again")
    _refused(
        lambda: place.put(6, 1, bodies[0], if_absent=True, client=parts),
        "the condition of an upload in parts is accepted and ignored: two writers would overwrite each other's large files",
    )
    return f"{len(bodies[0])} bytes each, {PART_WRITERS} writers at once"


def unknown_outcomes_are_resolved(place: Place) -> str:
    """The code that appends is the engine's own."""
    place.needs_create()
    scratch = place.scratch
    if scratch.endpoint is None or scratch.through is None:
        raise NotTried("nobody can stand in between: not plain HTTP" if scratch.prices else "there is no network in between")
    with FaultProxy(scratch.endpoint) as proxy:
        client = scratch.through(proxy.endpoint)
        try:
            replica = Replica(client, writer=1)
            replica.join(new_lineage(), replica.open(allow_gap=True), known_txid=0)
            for txid, faults in enumerate((("before",), ("after",), ("before", "after"), ("after", "after", "after", "after")), 101):
                file = _file(txid, b"ours %d" % txid)
                proxy.lose(*faults)  # type: ignore[arg-type]
                _append(replica, file)
                expect(place.read(place.listed(0, txid)) == file.body, "what was acknowledged is not what is stored")
            place.put(0, 105, b"of another writer")
            proxy.lose("after")
            try:
                _append(replica, _file(105, b"ours 105"))
            except Fenced:
                pass
            else:
                raise Failed("a file of another writer was taken for ours")
            expect(place.read(place.listed(0, 105)) == b"of another writer", "a file of another writer was overwritten")
            return f"{proxy.lost} requests or replies were lost on purpose"
        finally:
            client.close()


def _append(replica: Replica, file: OutFile) -> None:
    for left in reversed(range(DRILL_TRIES)):
        try:
            replica.store([file], file.max_txid)
            return
        except StorageUnavailable:
            if not left:
                raise


def _file(txid: int, body: bytes) -> OutFile:
    return OutFile(0, TXID(txid), TXID(txid), STAMP_MS, body)


# -- deleting, clocks, times -------------------------------------------------------------------------------------------------------


def files_can_be_deleted(place: Place) -> str:
    files = [place.put(9, txid, b"x") for txid in range(1, 6)]
    place.client.delete(files[:3])
    place.client.delete(files[2:4])  # one of them is gone already
    expect(place.names(9) == [5], "deleted files are still there")
    place.client.put_control("certify/second", b"x")
    place.client.delete_control("certify/second")
    place.client.delete_control("certify/second")
    try:
        place.client.get_control("certify/second")
    except ObjectNotFound:
        return "files, several at once, and control objects; also missing ones"
    raise Failed("a deleted control object is still there")


def clocks_agree(place: Place) -> str:
    before = datetime.now(UTC)
    place.put(2, 3, b"now")
    after = datetime.now(UTC)
    seen = next((info.created_at for info in place.client.list(2) if info.min_txid == 3), None)
    if seen is None:
        raise Failed("what was just stored is not listed")
    if abs(seen - created_at(STAMP_MS)) < timedelta(seconds=2):
        raise NotTried("the store shows the times that it is given")
    skew_s = max((before - seen).total_seconds() - 1, (seen - after).total_seconds(), 0.0)  # times are whole seconds in most stores
    expect(skew_s < BIG_SKEW_S, f"the clocks differ by {skew_s:.0f} s; set this machine's (NTP)")
    if skew_s > SMALL_SKEW_S:
        place.warnings.append(f"the clocks of the store and of this machine differ by {skew_s:.0f} s")
    return f"they differ by {skew_s:.0f} s, at most" if skew_s else "no difference that can be seen"


def latency(place: Place) -> str:
    body = os.urandom(4096)

    def measure(kind: str, work: Callable[[], object]) -> None:
        began = time.monotonic()
        work()
        place.latency_s.setdefault(kind, []).append(time.monotonic() - began)

    for txid in range(1001, 1001 + SAMPLES):
        measure("append", lambda txid=txid: place.put(0, txid, body, if_absent=place.conditions is not None and place.conditions.create))  # type: ignore[misc]
    files = [info for info in place.client.list(0) if info.min_txid > 1000]
    for info in files:
        measure("read", lambda info=info: place.read(info))  # type: ignore[misc]
    for _ in range(SAMPLES // 5):
        measure("list", lambda: place.names(0))
    return ", ".join(f"{kind} p50 {quantile(times, 0.5) * 1000:.1f} ms" for kind, times in place.latency_s.items())


_ALL: tuple[Mode, ...] = ("replication", "restore", "append-only", "fenced", "retention")


def _checks() -> Iterator[Check]:
    yield Check("bytes", "bytes come back as they were", _ALL, bytes_come_back)
    yield Check("large", "so do those of a large file", _ALL, large_comes_back)
    yield Check("empty", "and of an empty object", (), empty_comes_back)
    yield Check("ranges", "ranges are exact", ("restore",), ranges_are_exact)
    yield Check("times", "times are kept", ("restore", "retention"), times_are_kept)
    yield Check("metadata", "metadata is kept", _ALL, metadata_is_kept)
    yield Check("listing", "listings are consistent", _ALL, listings_are_consistent)
    yield Check("pages", "long listings are complete", _ALL, pages_are_complete)
    yield Check("delete", "files can be deleted", ("retention",), files_can_be_deleted)
    yield Check("clock", "the store's clock agrees with ours", ("retention",), clocks_agree)
    yield Check("create", "a second create is refused", ("append-only", "fenced"), a_second_create_is_refused)
    yield Check("replace", "replacing on a condition works", ("fenced",), replacing_on_a_condition_works)
    yield Check("etags", "stale etags are refused", ("fenced",), etags_guard)
    yield Check("latency", "how long it takes", (), latency)
    yield Check("create-race", "creating has one winner", ("append-only", "fenced"), creating_has_one_winner)
    yield Check("replace-race", "replacing has one winner", ("fenced",), replacing_has_one_winner)
    yield Check("parts", "so has creating in parts", ("append-only", "fenced"), parts_keep_the_condition)
    yield Check("faults", "lost requests and replies are resolved", ("append-only", "fenced"), unknown_outcomes_are_resolved)


CHECKS = tuple(_checks())
