"""One conformance suite for every client. What a store does differently is asserted here, not skipped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyrage
import pytest

from replicator.errors import AccessDenied, ConditionUnsupported, ObjectNotFound, PreconditionFailed, ReplicatorError, StorageError
from replicator.format.ltx import NO_CHECKSUM, TXID, FileInfo, Header
from replicator.storage import open_client, open_store, s3fast
from replicator.storage.age import AgeClient
from replicator.storage.base import AGE, LITESTREAM, ReplicaClient
from replicator.storage.file import FileClient
from replicator.storage.memory import MemoryClient
from replicator.storage.probe import Conditions, probe_conditional_writes
from replicator.storage.s3 import S3Client
from replicator.storage.tree import TreeClient, Write
from replicator.storage.url import parse_s3_url
from replicator.testing.conformance import CHECKS, CONDITIONAL, Nonconforming
from tests.otherservers import OTHER_STORES, fresh_path
from tests.servers import ACCESS, SECRET

KINDS = [
    *["memory", "file", "seaweed", "moto", "rclone", *OTHER_STORES],
    *["age memory", "age file", "age seaweed", "age rclone", "age sftp", "age oss"],
    *["fast seaweed", "fast moto", "fast rclone"],
]
STAMP = 1_795_444_774_997
HEADER = Header(4096, 1, TXID(1), TXID(1), STAMP, flags=NO_CHECKSUM).encode()


def creates(kind: str) -> bool:
    """Whether the store refuses a second create."""
    return not kind.endswith("rclone")


def replaces(kind: str) -> bool:
    """Whether the store refuses a replacement of what is no longer there."""
    return kind.removeprefix("age ").removeprefix("fast ") in ("memory", "file", "seaweed", "moto", "nats", "gs", "abs")


def keeps_metadata(kind: str) -> bool:
    return not kind.removeprefix("age ").startswith(("file", "sftp", "webdav"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def inner(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> MemoryClient | FileClient | S3Client | TreeClient:
    """The client of the store itself."""
    layout = AGE if kind.startswith("age ") else LITESTREAM
    fast = kind.startswith("fast ")
    match kind.removeprefix("age ").removeprefix("fast "):
        case name if name in OTHER_STORES:
            return open_store(request.getfixturevalue("other_store")(name).settings(fresh_path()), layout=layout)
        case "memory":
            return MemoryClient(layout=layout)
        case "file":
            return FileClient(tmp_path / "replica", layout=layout)
        case name:
            settings = parse_s3_url(request.getfixturevalue(name).url(f"t-{secrets.token_hex(6)}"), environ={})
            if fast:
                settings = replace(settings, access_key_id=ACCESS, secret_access_key=SECRET)
                options = s3fast._options(settings, {"AWS_CONFIG_FILE": os.devnull})
                assert options is not None
                return s3fast.FastS3Client(settings, options, page_size=3, single_put_bytes=6 << 20)
            return S3Client(settings, layout=layout, page_size=3, single_put_bytes=6 << 20)


@pytest.fixture
def client(kind: str, inner: MemoryClient | FileClient | S3Client | TreeClient) -> Iterator[ReplicaClient]:
    made: ReplicaClient = inner
    if kind.startswith("age "):
        key = pyrage.x25519.Identity.generate()
        made = AgeClient(inner, recipients=[str(key.to_public())], identities=[str(key)])
    yield made
    made.close()


def put(
    client: ReplicaClient, low: int, high: int | None = None, body: bytes | Path = b"x" * 100, level: int = 0, **options: bool
) -> FileInfo:
    return client.put(level, TXID(low), TXID(high or low), body, timestamp_ms=STAMP, **options)


def read(client: ReplicaClient, info: FileInfo, **where: int) -> bytes:
    with client.open(info, **where) as stream:
        return b"".join(iter(lambda: stream.read(7), b""))


def names(client: ReplicaClient, level: int = 0, **options: object) -> list[tuple[int, int]]:
    return [(info.min_txid, info.max_txid) for info in client.list(level, **options)]


def test_listing_spans_pages_and_is_in_order(client: ReplicaClient) -> None:
    for txid in (7, 3, 300, 1, 2, 16, 5):
        put(client, txid)
    put(client, 1, 9, level=1)
    assert names(client) == [(txid, txid) for txid in (1, 2, 3, 5, 7, 16, 300)]
    assert names(client, seek=TXID(5)) == [(5, 5), (7, 7), (16, 16), (300, 300)]
    assert names(client, level=1) == [(1, 9)]
    assert names(client, level=9) == []


def test_ranges_are_exact(client: ReplicaClient) -> None:
    body = bytes(range(256)) * 4
    info = put(client, 1, body=body)
    assert info.size == 1024
    assert read(client, info) == body
    assert read(client, info, offset=1000) == body[1000:]
    assert read(client, info, offset=10, size=20) == body[10:30]
    assert read(client, info, offset=1020, size=100) == body[1020:]


def test_times_survive_to_the_millisecond(client: ReplicaClient, kind: str) -> None:
    put(client, 1, body=HEADER + b"x" * 100)
    [info] = client.list(0, accurate_times=True)
    # SFTP knows whole seconds; exact times stand in the files themselves, but not where they are encrypted.
    assert info.created_at == datetime.fromtimestamp(STAMP // 1000, UTC).replace(microsecond=0 if kind == "age sftp" else 997000)


@pytest.mark.fault("F37", "F44", "F55", "F66")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["memory", "file", "seaweed", "moto", "rclone"], indirect=True)
def test_the_contract(client: ReplicaClient, kind: str, check: str) -> None:
    if not creates(kind) and check in CONDITIONAL:
        with pytest.raises(Nonconforming):
            CHECKS[check](client)
        return
    CHECKS[check](client)


def test_metadata_comes_back_in_lower_case(client: ReplicaClient, kind: str) -> None:
    info = client.put(0, TXID(1), TXID(1), b"x" * 100, timestamp_ms=STAMP, metadata={"pyrepl-writer": "00ff"})
    assert client.metadata(info) == ({"pyrepl-writer": "00ff"} if keeps_metadata(kind) else {})


def test_create_if_absent_has_one_winner(client: ReplicaClient, kind: str) -> None:
    def attempt(number: int) -> bool:
        try:
            put(client, 1, body=b"%03d" % number * 50, if_absent=True)
        except PreconditionFailed:
            return False
        return True

    # WsgiDAV and moto look first and store later, without a lock, so that there attempts come one after the other.
    looks_first = kind.removeprefix("age ").removeprefix("fast ") in ("webdav-wsgidav", "moto")
    with ThreadPoolExecutor(1 if looks_first else 20) as pool:
        won = list(pool.map(attempt, range(20)))
    if not creates(kind):  # it ignores conditions, as the probe says, and may keep a file that it can't read
        assert sum(won) > 1
        return
    assert sum(won) == 1
    [info] = client.list(0)
    assert read(client, info) == b"%03d" % won.index(True) * 50


def test_put_overwrites_without_a_condition(client: ReplicaClient) -> None:
    put(client, 1, body=b"a" * 200)
    info = put(client, 1, body=b"b" * 150)
    assert read(client, info) == b"b" * 150
    assert names(client) == [(1, 1)]


def test_a_path_is_stored_and_not_changed(client: ReplicaClient, tmp_path: Path) -> None:
    body = os.urandom(100_000)
    source = tmp_path / "staged"
    source.write_bytes(body)
    info = put(client, 1, body=source, if_absent=True)
    assert read(client, info) == body == source.read_bytes()


def test_large_files_go_up_in_parts_and_keep_the_condition(client: ReplicaClient, kind: str, tmp_path: Path) -> None:
    body = os.urandom(1 << 20) * 18
    source = tmp_path / "large"
    source.write_bytes(body)
    info = put(client, 1, body=source, if_absent=True)
    with client.open(info) as stream:
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == body
    if creates(kind):
        with pytest.raises(PreconditionFailed):
            put(client, 1, body=source, if_absent=True)


def test_deleting_is_batched_and_forgives(client: ReplicaClient) -> None:
    files = [put(client, txid) for txid in range(1, 9)]
    client.delete(files[:5])
    client.delete(files[4:6])
    assert names(client) == [(7, 7), (8, 8)]


def test_missing_things_are_not_found(client: ReplicaClient) -> None:
    missing = FileInfo(0, TXID(1), TXID(1), 100, datetime.now(UTC))
    with pytest.raises(ObjectNotFound):
        client.open(missing)
    with pytest.raises(ObjectNotFound):
        client.get_control("pyrepl/none.json")
    client.delete([missing])
    client.delete_control("pyrepl/none.json")


def test_control_objects_keep_their_conditions(client: ReplicaClient, kind: str) -> None:
    etag = client.put_control("lock.json", b"1", if_absent=True)
    assert client.get_control("lock.json").data == b"1"
    assert client.get_control("lock.json").etag == etag
    assert probe_conditional_writes(client) == Conditions(create=creates(kind), replace=replaces(kind))
    if not creates(kind):
        return
    with pytest.raises(PreconditionFailed):
        client.put_control("lock.json", b"2", if_absent=True)
    if not replaces(kind):
        with pytest.raises(ConditionUnsupported):
            client.put_control("lock.json", b"2", if_match=etag)
        with pytest.raises(ConditionUnsupported):
            client.delete_control("lock.json", if_match=etag)
        assert client.get_control("lock.json").data == b"1"
        return
    newer = client.put_control("lock.json", b"3", if_match=etag)
    with pytest.raises(PreconditionFailed):
        client.put_control("lock.json", b"4", if_match=etag)
    if kind != "gs":  # the emulator forgets the condition when it deletes; test_other_stores.py looks at what is sent
        with pytest.raises(PreconditionFailed):
            client.delete_control("lock.json", if_match=etag)
    assert client.get_control("lock.json").data == b"3"
    client.delete_control("lock.json", if_match=newer)
    with pytest.raises(ObjectNotFound):
        client.get_control("lock.json")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../b", "", "a\0b", "a//b"])
def test_hostile_control_names_are_refused(client: ReplicaClient, name: str) -> None:
    with pytest.raises((ReplicatorError, ValueError)):
        client.put_control(name, b"x")


@pytest.mark.fault("F56")
def test_foreign_names_in_a_level_are_ignored(client: ReplicaClient, inner: MemoryClient | FileClient | S3Client | TreeClient) -> None:
    put(client, 1)
    end, other = (".ltx", ".ltx.age") if client is inner else (".ltx.age", ".ltx")
    foreign = (
        "x",
        f"{1:016x}-{1:016x}{end}.tmp",
        f"{2:016x}-{1:016x}{end}",
        f"{2:016x}-{2:016x}{other}",
        f"{2:016x}-{2:016x}{end}.age",
        f"{'G' * 16}-{'0' * 16}{end}",
    )
    match inner:
        case FileClient():
            for name in foreign:
                (inner.level_path(0) / name).write_bytes(b"")
        case S3Client():
            folder = f"{inner.settings.path}/{'' if client is inner else 'age/'}0000"
            for name in (*foreign, f"sub/{2:016x}-{2:016x}{end}"):
                inner._s3.put_object(Bucket=inner.settings.bucket, Key=f"{folder}/{name}", Body=b"foreign")
        case TreeClient():
            for name in (*foreign, f"sub/{2:016x}-{2:016x}{end}"):
                inner.objects.write(f"{inner.level_folder(0)}/{name}", b"foreign", Write())
    assert names(client) == names(inner) == [(1, 1)]


def test_listing_while_writing_shows_each_finished_file_once(client: ReplicaClient) -> None:
    for txid in range(1, 11):
        put(client, txid)
    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(put, client, txid) for txid in range(11, 31)]
        seen = [names(client) for _ in range(5)]
        for task in writing:
            task.result()
    for listing in seen:
        assert listing == sorted(set(listing))
        assert set(listing) >= {(txid, txid) for txid in range(1, 11)}
    assert len(names(client)) == 30


def test_wrong_credentials_say_so_and_tell_no_secret(seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    client = open_client(seaweed.url("nowhere"))
    with pytest.raises(AccessDenied) as caught:
        list(client.list(0))
    assert "s3://bucket/nowhere" in str(caught.value)
    assert caught.value.hint
    assert "wrong-secret-value" not in f"{caught.value!r} {caught.value} {client!r} {client.url} {vars(client)}"


def test_a_missing_bucket_is_named(seaweed) -> None:
    client = open_client(seaweed.url("x").replace("s3://bucket/", "s3://no-such-bucket/"))
    with pytest.raises(StorageError, match="bucket does not exist: no-such-bucket"):
        list(client.list(0))


def test_an_unreachable_store_is_unavailable() -> None:
    settings = parse_s3_url("s3://bucket/x?endpoint=http://127.0.0.1:1", environ={})
    with pytest.raises(StorageError, match="cannot be reached: s3://bucket/x"):
        list(S3Client(settings, max_attempts=1).list(0))
