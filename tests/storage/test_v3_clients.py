"""The 0.3 side of every client: one suite."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from replicator.errors import ConfigError, CorruptReplica, ObjectNotFound, PreconditionFailed, WrongKey
from replicator.format.v3 import SegmentInfo, SnapshotInfo, V3Info, encode_frame
from replicator.storage import open_store
from replicator.storage.age import AgeClient
from replicator.storage.base import AGE, LITESTREAM, ObjectStore, ReplicaClient, check_control_name
from replicator.storage.file import FileClient
from replicator.storage.memory import MemoryClient
from replicator.storage.s3 import S3Client
from replicator.storage.tree import TreeClient
from replicator.storage.url import parse_s3_url
from replicator.storage.v3 import V3Client, v3_client
from tests.otherservers import OTHER_STORES, fresh_path

KINDS = ["memory", "file", "seaweed", "moto", "rclone", *OTHER_STORES, "age memory", "age file", "age seaweed"]
ONE, TWO = "00112233445566ff", "ff00112233445566"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ReplicaClient]:
    layout = AGE if kind.startswith("age ") else LITESTREAM
    inner: MemoryClient | FileClient | S3Client | TreeClient
    match kind.removeprefix("age "):
        case name if name in OTHER_STORES:
            inner = open_store(request.getfixturevalue("other_store")(name).settings(fresh_path()), layout=layout)
        case "memory":
            inner = MemoryClient(layout=layout)
        case "file":
            inner = FileClient(tmp_path / "replica", layout=layout)
        case name:
            settings = parse_s3_url(request.getfixturevalue(name).url(f"t-{secrets.token_hex(6)}"), environ={})
            inner = S3Client(settings, layout=layout, page_size=3, single_put_bytes=6 << 20)
    key = pyrage.x25519.Identity.generate()
    made = AgeClient(inner, recipients=[str(key.to_public())], identities=[str(key)]) if layout is AGE else inner
    yield made
    made.close()


@pytest.fixture
def client(store: ReplicaClient) -> V3Client:
    found = v3_client(store)
    assert found is not None
    return found


def read(client: V3Client, info: V3Info) -> bytes:
    with client.open(info) as stream:
        return b"".join(iter(lambda: stream.read(7), b""))


def test_an_empty_replica_lists_nothing(client: V3Client) -> None:
    assert client.list_generations() == []
    assert client.list_snapshots(ONE) == []
    assert client.list_segments(ONE) == []


def test_what_is_put_is_listed_in_order_and_comes_back(client: V3Client) -> None:
    body = encode_frame(os.urandom(5000))
    for index in (16, 0, 3):
        client.put_snapshot(ONE, index, body)
    for index, offset in ((1, 0), (0, 0x123456789), (0, 0), (0, 0xF0), (0, 0xFFFFFFFF), (16, 0)):
        client.put_segment(ONE, index, offset, body)
    client.put_segment(TWO, 0, 0, body)
    assert client.list_generations() == [ONE, TWO]
    assert [info.index for info in client.list_snapshots(ONE)] == [0, 3, 16]
    segments = client.list_segments(ONE)
    assert [(info.index, info.offset) for info in segments] == [(0, 0), (0, 0xF0), (0, 0xFFFFFFFF), (0, 0x123456789), (1, 0), (16, 0)]
    assert client.list_snapshots(TWO) == []
    for info in [*client.list_snapshots(ONE), *segments]:
        assert read(client, info) == body
    with client.open(segments[0], offset=4000) as stream:
        assert stream.read() == body[4000:]


def test_a_put_says_what_the_listing_says(client: V3Client, kind: str) -> None:
    put = client.put_segment(ONE, 0, 0, encode_frame(b"x" * 100))
    [listed] = client.list_segments(ONE)
    assert (put.name, put.size) == (listed.name, listed.size)
    # A store has its own clock, and counts whole seconds.
    assert put == listed if kind.endswith(("memory", "file")) else abs(put.created_ns - listed.created_ns) < 60 * 10**9


def test_a_put_replaces_and_creates_if_asked(client: V3Client, kind: str) -> None:
    client.put_snapshot(ONE, 0, b"a" * 50)
    client.put_snapshot(ONE, 0, b"b" * 60)
    [info] = client.list_snapshots(ONE)
    assert read(client, info) == b"b" * 60
    if kind.endswith("rclone"):
        return  # ignores conditions
    with pytest.raises(PreconditionFailed):
        client.put_snapshot(ONE, 0, b"c" * 70, if_absent=True)
    client.put_segment(ONE, 0, 0, b"d" * 50, if_absent=True)
    with pytest.raises(PreconditionFailed):
        client.put_segment(ONE, 0, 0, b"e" * 50, if_absent=True)
    assert read(client, client.list_segments(ONE)[0]) == b"d" * 50


def test_a_large_body_is_a_path(client: V3Client, tmp_path: Path) -> None:
    source = tmp_path / "snapshot"
    source.write_bytes(os.urandom(1 << 20) * 13)
    info = client.put_snapshot(ONE, 0, source)
    with client.open(info) as stream:
        assert b"".join(iter(lambda: stream.read(1 << 20), b"")) == source.read_bytes()


def test_deleting_forgives_and_a_generation_goes_as_a_whole(client: V3Client, kind: str) -> None:
    for generation in (ONE, TWO):
        client.put_snapshot(generation, 0, b"x")
        for index in range(8):
            client.put_segment(generation, index, 0, b"x")
    segments = client.list_segments(ONE)
    client.delete([*segments[:5], *client.list_snapshots(ONE)])
    client.delete(segments[4:6])
    assert client.list_segments(ONE) == segments[6:]
    client.delete_generation(ONE)
    client.delete_generation(ONE)
    assert client.list_segments(ONE) == []
    # SeaweedFS removes an empty folder only later.
    assert client.list_generations() == [TWO] or (kind.endswith("seaweed") and client.list_generations() == [ONE, TWO])
    assert len(client.list_segments(TWO)) == 8


def test_missing_things_are_not_found(client: V3Client) -> None:
    for info in (SnapshotInfo(ONE, 0, 10, 0), SegmentInfo(ONE, 0, 0, 10, 0)):
        with pytest.raises(ObjectNotFound):
            client.open(info)


def test_foreign_names_are_passed_over(client: V3Client, store: ReplicaClient) -> None:
    client.put_snapshot(ONE, 0, b"x")
    assert isinstance(store, ObjectStore)
    for name in (
        "snapshots/00000001.snapshot.lz4.tmp",
        "snapshots/x",
        "snapshots/0000000A.snapshot.lz4",
    ):
        store.put_object(f"generations/{ONE}/{name}", b"x")
    store.put_object(f"generations/{ONE.upper()}/00000000.snapshot.lz4", b"x")
    store.put_object("generations/readme", b"x")
    assert client.list_generations() == [ONE]
    assert [info.index for info in client.list_snapshots(ONE)] == [0]


@pytest.mark.fault("F55")
@pytest.mark.parametrize("name", ["ltx/0/x", "generations/../../x", "generations//x", "", "/generations/x", "generations/.x"])
def test_names_outside_are_refused(store: ReplicaClient, name: str) -> None:
    assert isinstance(store, ObjectStore)
    for use in (store.open_object, store.list_objects, store.list_folders, store.delete_folder):
        with pytest.raises(ValueError, match="not a name"):
            use(name)
    with pytest.raises(ValueError, match="not a name"):
        store.put_object(name, b"x")


def test_control_objects_keep_out_of_the_generations() -> None:
    with pytest.raises(ValueError, match="not a name"):
        check_control_name(f"generations/{ONE}/x")


def test_the_two_formats_do_not_see_each_other(client: V3Client, store: ReplicaClient) -> None:
    client.put_segment(ONE, 0, 0, b"x")
    assert [*store.list(0), *store.list(9)] == []


def test_ciphertext_tells_wrong_key_from_damage(tmp_path: Path) -> None:
    key, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    inner = FileClient(tmp_path, layout=AGE)
    writer = V3Client(AgeClient(inner, recipients=[str(key.to_public())]))
    info = writer.put_snapshot(ONE, 0, encode_frame(b"secret" * 1000))
    path = tmp_path / info.name
    assert path.read_bytes().startswith(b"age-encryption.org/v1\n")
    assert not writer.can_read
    with pytest.raises(ConfigError, match="without an age identity"):
        writer.open(info)
    with pytest.raises(WrongKey, match=info.name):
        read(V3Client(AgeClient(inner, identities=[str(other)])), info)
    reader = V3Client(AgeClient(inner, identities=[str(key)]))
    assert read(reader, info) == encode_frame(b"secret" * 1000)
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptReplica, match=info.name):
        read(reader, info)
    path.write_bytes(encode_frame(b"plain"))
    with pytest.raises(CorruptReplica, match=r"a plain file of the 0\.3 format"):
        read(reader, info)
