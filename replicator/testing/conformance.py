"""What every storage client must do, as a callable suite.

    check_replica_client(lambda: MyClient(new_empty_path()))

Each check gets a client of a new, empty replica path and raises `Nonconforming` with what was expected. `CHECKS` has them by name, for suites
that show each as a test of its own:

    @pytest.mark.parametrize("name", CHECKS)
    def test_my_client(name):
        CHECKS[name](make_client())

The rules are those of `replicator.storage.base`. A store that ignores conditions fails the checks in `CONDITIONAL` and may pass the others; such a
store works with one writer, and two writers find each other late.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from replicator.errors import ObjectNotFound, PreconditionFailed, ReplicatorError
from replicator.format.ltx import NO_CHECKSUM, TXID, FileInfo, Header
from replicator.storage.base import Body, ReplicaClient
from replicator.storage.probe import Conditions, probe_conditional_writes

__all__ = ["CHECKS", "CONDITIONAL", "Nonconforming", "check_replica_client"]

Check = Callable[[ReplicaClient], None]

STAMP_MS = 1_795_444_774_997
WRITERS = 20


class Nonconforming(AssertionError):
    """A client breaks a rule of the contract. The message says which, and what happened instead."""


def check_replica_client(client_factory: Callable[[], ReplicaClient], *, without: frozenset[str] = frozenset()) -> None:
    """Run all checks, each on a client of its own, which is closed afterwards.

    Args:
        client_factory: returns a client of a new, empty replica path at each call.
        without: names of `CHECKS` to leave out, such as `CONDITIONAL` for a store that is known to ignore conditions.

    Raises:
        Nonconforming: the first broken rule.
        ReplicatorError: the store could not be used at all.
    """
    for name, check in CHECKS.items():
        if name not in without:
            with contextlib.closing(client_factory()) as client:
                check(client)


def _listing_is_in_order(client: ReplicaClient) -> None:
    for txid in (7, 3, 300, 1, 2, 16, 5):
        _put(client, txid)
    _put(client, 1, 9, level=1)
    _equal("all files of a level, ascending", _names(client), [(txid, txid) for txid in (1, 2, 3, 5, 7, 16, 300)])
    found = [(info.min_txid, info.max_txid) for info in client.list(0, seek=TXID(5))]
    _equal("files from a TXID on", found, [(5, 5), (7, 7), (16, 16), (300, 300)])
    _equal("files of another level", _names(client, 1), [(1, 9)])
    _equal("a level that was never written", _names(client, 9), [])


def _ranges_are_exact(client: ReplicaClient) -> None:
    body = bytes(range(256)) * 4
    info = _put(client, 1, body=body)
    _equal("size that `put` returns", info.size, 1024)
    _equal("size that `list` tells is positive", [found.size > 0 for found in client.list(0)], [True])
    for offset, size in ((0, None), (1000, None), (10, 20), (0, 1), (1023, 1), (1020, 100), (0, 5000)):
        want = body[offset : None if size is None else offset + size]
        _equal(f"bytes of a range ({offset}, {size})", _read(client, info, offset, size), want)
    with client.open(info) as stream:
        _equal("read(-1)", stream.read(), body)
        _equal("a read at the end", stream.read(1), b"")
        stream.close()


def _times_survive(client: ReplicaClient) -> None:
    # A client may keep the time beside the file, or look into its header.
    _put(client, 1, body=Header(4096, 1, TXID(1), TXID(1), STAMP_MS, flags=NO_CHECKSUM).encode() + b"x" * 100)
    [info] = client.list(0, accurate_times=True)
    when = datetime.fromtimestamp(STAMP_MS // 1000, UTC).replace(microsecond=997000)
    _equal("time of the header, to the millisecond", info.created_at, when)


def _create_has_one_winner(client: ReplicaClient) -> None:
    def attempt(number: int) -> bool:
        try:
            _put(client, 1, body=b"%03d" % number * 50, if_absent=True)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(attempt, range(WRITERS)))
    _equal("number of creators that won", sum(won), 1)
    [info] = client.list(0)
    _equal("content after the race", _read(client, info), b"%03d" % won.index(True) * 50)


def _put_replaces_without_a_condition(client: ReplicaClient) -> None:
    _put(client, 1, body=b"a" * 200)
    info = _put(client, 1, body=b"b" * 150)
    _equal("content after a second put", _read(client, info), b"b" * 150)
    _equal("files after a second put", _names(client), [(1, 1)])


def _paths_are_stored_and_not_changed(client: ReplicaClient) -> None:
    body = os.urandom(100_000)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "staged"
        source.write_bytes(body)
        info = _put(client, 1, body=source, if_absent=True)
        _equal("content of a stored path", _read(client, info, piece=4096), body)
        _equal("the file that was given", source.read_bytes(), body)


def _delete_forgives(client: ReplicaClient) -> None:
    files = [_put(client, txid) for txid in range(1, 9)]
    client.delete(files[:5])
    _succeeds("deleting files of which one is gone", lambda: client.delete(files[4:6]))
    _equal("files that are left", _names(client), [(7, 7), (8, 8)])


def _missing_is_not_found(client: ReplicaClient) -> None:
    missing = FileInfo(0, TXID(1), TXID(1), 100, datetime.now(UTC))
    _raises(ObjectNotFound, "open of a missing file", lambda: client.open(missing))
    _raises(ObjectNotFound, "a missing control object", lambda: client.get_control("pyrepl/none.json"))
    _succeeds("deleting a missing file", lambda: client.delete([missing]))
    _succeeds("deleting a missing control object", lambda: client.delete_control("pyrepl/none.json"))


def _control_objects_are_kept(client: ReplicaClient) -> None:
    etag = client.put_control("lock.json", b"1")
    found = client.get_control("lock.json")
    _equal("content and etag of a control object", (found.data, found.etag), (b"1", etag))
    newer = client.put_control("lock.json", b"2")
    _equal("whether the etag changes with the content", newer != etag, True)
    _equal("levels after writing a control object", _names(client), [])
    client.delete_control("lock.json")
    _raises(ObjectNotFound, "a deleted control object", lambda: client.get_control("lock.json"))


def _conditions_are_kept(client: ReplicaClient) -> None:
    etag = client.put_control("lock.json", b"1", if_absent=True)
    _equal("what the probe says", probe_conditional_writes(client), Conditions(create=True, replace=True))
    _raises(PreconditionFailed, "creating what exists", lambda: client.put_control("lock.json", b"2", if_absent=True))
    newer = client.put_control("lock.json", b"3", if_match=etag)
    _raises(PreconditionFailed, "replacing another version", lambda: client.put_control("lock.json", b"4", if_match=etag))
    _raises(PreconditionFailed, "deleting another version", lambda: client.delete_control("lock.json", if_match=etag))
    _equal("content after lost conditions", client.get_control("lock.json").data, b"3")
    client.delete_control("lock.json", if_match=newer)
    _raises(ObjectNotFound, "a deleted control object", lambda: client.get_control("lock.json"))
    _raises(PreconditionFailed, "replacing what is gone", lambda: client.put_control("lock.json", b"5", if_match=newer))


def _hostile_control_names_are_refused(client: ReplicaClient) -> None:
    for name in ("../x", "/etc/x", "a/../b", "", "a\0b", "a//b", "ltx/0/x", ".hidden"):
        _raises((ReplicatorError, ValueError), f"a control object called {name!r}", lambda name=name: client.put_control(name, b"x"))  # type: ignore[misc]


def _listing_while_writing(client: ReplicaClient) -> None:
    for txid in range(1, 11):
        _put(client, txid)
    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(_put, client, txid) for txid in range(11, 31)]
        seen = [_names(client) for _ in range(5)]
        for task in writing:
            task.result()
    for listing in seen:
        _equal("a listing while others write: ascending, without repeats", listing, sorted(set(listing)))
        _equal("files that were there before are in it", listing[:10], [(txid, txid) for txid in range(1, 11)])
    _equal("number of files at the end", len(_names(client)), 30)


CHECKS: Mapping[str, Check] = {
    check.__name__.removeprefix("_"): check
    for check in (
        _listing_is_in_order,
        _ranges_are_exact,
        _times_survive,
        _create_has_one_winner,
        _put_replaces_without_a_condition,
        _paths_are_stored_and_not_changed,
        _delete_forgives,
        _missing_is_not_found,
        _control_objects_are_kept,
        _conditions_are_kept,
        _hostile_control_names_are_refused,
        _listing_while_writing,
    )
}
"""The checks by name, in the order in which they are run."""

CONDITIONAL = frozenset({"create_has_one_winner", "conditions_are_kept"})
"""Checks that a store fails which ignores `If-None-Match` and `If-Match`."""


def _put(
    client: ReplicaClient, low: int, high: int | None = None, *, body: Body = b"x" * 100, level: int = 0, if_absent: bool = False
) -> FileInfo:
    return client.put(level, TXID(low), TXID(high or low), body, timestamp_ms=STAMP_MS, if_absent=if_absent)


def _read(client: ReplicaClient, info: FileInfo, offset: int = 0, size: int | None = None, *, piece: int = 7) -> bytes:
    def pieces() -> Iterator[bytes]:
        with client.open(info, offset=offset, size=size) as stream:
            while data := stream.read(piece):
                yield data

    return b"".join(pieces())


def _names(client: ReplicaClient, level: int = 0) -> list[tuple[int, int]]:
    return [(info.min_txid, info.max_txid) for info in client.list(level)]


def _equal(what: str, got: object, want: object) -> None:
    if got != want:
        raise Nonconforming(f"{what}: expected {want!r:.200}, got {got!r:.200}")


def _succeeds(what: str, act: Callable[[], object]) -> None:
    try:
        act()
    except (ObjectNotFound, PreconditionFailed) as error:
        raise Nonconforming(f"{what}: expected no error, got {type(error).__name__}: {error}") from error


def _raises(errors: type[Exception] | tuple[type[Exception], ...], what: str, act: Callable[[], object]) -> None:
    names = errors.__name__ if isinstance(errors, type) else " or ".join(error.__name__ for error in errors)
    try:
        act()
    except errors:
        return
    except Exception as error:
        raise Nonconforming(f"{what}: expected {names}, got {type(error).__name__}: {error}") from error
    raise Nonconforming(f"{what}: expected {names}, got no error")
