"""Encrypted replicas: what is in the store, which keys are taken, what is refused, and what a repeat does."""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyrage
import pytest

from replicator.atomic import AtomicFile
from replicator.chain import read_file
from replicator.errors import (
    AccessDenied,
    ConfigError,
    CorruptReplica,
    Fenced,
    ObjectNotFound,
    PreconditionFailed,
    ReplicatorError,
    StorageUnavailable,
    WrongKey,
)
from replicator.format.age import MAGIC, header_size
from replicator.format.ltx import TXID, FileInfo
from replicator.outbox import OutFile
from replicator.replica import Replica
from replicator.storage import open_client
from replicator.storage.age import AgeClient
from replicator.storage.base import AGE, ReadStream
from replicator.storage.file import FileClient
from replicator.storage.memory import MemoryClient

STAMP = 1_795_444_774_997
LARGE = 9 << 20
KEY = pyrage.x25519.Identity.generate()
PUBLIC, SECRET = str(KEY.to_public()), str(KEY)
OTHER = pyrage.x25519.Identity.generate()

# Made for this test by `ssh-keygen -t ed25519`; the second one with a passphrase.
SSH_PUBLIC = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILqK8puD56q+FX0lO/uFDVktRzy2Z9FPTilWL8RIuNps test"
SSH_SECRET = """-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
QyNTUxOQAAACC6ivKbg+eqvhV9JTv7hQ1ZLUc8tmfRT04pVi/ESLjabAAAAIg48aWsOPGl
rAAAAAtzc2gtZWQyNTUxOQAAACC6ivKbg+eqvhV9JTv7hQ1ZLUc8tmfRT04pVi/ESLjabA
AAAECse8FGgAYV6C44PAo37wt+HFc04sPA5/UG1CAGFECLhrqK8puD56q+FX0lO/uFDVkt
Rzy2Z9FPTilWL8RIuNpsAAAABHRlc3QB
-----END OPENSSH PRIVATE KEY-----
"""
SSH_LOCKED = """-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABANS+KUnR
3qGypzemLJPoZJAAAAEAAAAAEAAAAzAAAAC3NzaC1lZDI1NTE5AAAAIKkZasM27ntNmp/O
yeQzqyy20kbHQde0SLGhc13wrVUvAAAAkEaftvcaNOthlZhWBu7nqwIoZzwXXkl7erTL0K
qTSDqeS+F1C5fFRZdX0q0JgNhHdLqjIywYMYrIwtiHsIeQ6o58DMsiDFLJO6VxhXX1p5RU
UiP0foEO1uVyhe6BiWYfXqtHceOLVoHScAE15657DBsUD1DH3t+/c91zigl2ta7oMlf66v
dZKGh2T2ckeOkbMA==
-----END OPENSSH PRIVATE KEY-----
"""


class Store(MemoryClient):
    """A store that a test can look into and make fail: `before` and `after` run around the next `put`."""

    def __init__(self) -> None:
        super().__init__(layout=AGE)
        self.sent: list[bytes] = []
        self.opened = 0
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def put(self, level: int, min_txid: TXID, max_txid: TXID, body: bytes | Path, **options: Any) -> FileInfo:
        self.sent.append(body.read_bytes() if isinstance(body, Path) else bytes(body))
        self.before()
        info = super().put(level, min_txid, max_txid, body, **options)
        self.after()
        return info

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        self.opened += 1
        return super().open(info, offset=offset, size=size)

    def bytes_of(self, txid: int = 1) -> bytes:
        with MemoryClient.open(self, FileInfo(0, TXID(txid), TXID(txid), 0, None)) as stream:  # type: ignore[arg-type]
            return stream.read()

    def replace(self, data: bytes, txid: int = 1) -> None:
        MemoryClient.put(self, 0, TXID(txid), TXID(txid), data, timestamp_ms=STAMP)


def unavailable() -> None:
    raise StorageUnavailable("the reply was lost")


def client_of(
    store: MemoryClient | FileClient, *, recipients: tuple[str, ...] = (PUBLIC,), identities: tuple[str, ...] = (SECRET,), **more: Path
) -> AgeClient:
    return AgeClient(store, recipients=recipients, identities=identities, **more)


def put(client: AgeClient, txid: int = 1, body: bytes | Path = b"x" * 100, **options: bool) -> FileInfo:
    return client.put(0, TXID(txid), TXID(txid), body, timestamp_ms=STAMP, **options)


def read(client: AgeClient, info: FileInfo, **where: int) -> bytes:
    with client.open(info, **where) as stream:
        return stream.read()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


# -- what is stored --------------------------------------------------------------------------------------------------------------


def test_files_are_plain_age_files_in_a_folder_of_their_own(tmp_path: Path) -> None:
    client = open_client(f"file://{tmp_path}/replica", age_recipients=[PUBLIC], age_identities=[SECRET])
    info = client.put(9, TXID(1), TXID(10), b"an LTX file", timestamp_ms=STAMP)
    client.put_control("pyrepl/lineage.json", b"{}")
    found = {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"
    }
    stored = "replica/age/9/0000000000000001-000000000000000a.ltx.age"
    assert set(found) == {stored, "replica/pyrepl/lineage.json", "replica/pyrepl/.lock"}
    assert found[stored].startswith(MAGIC)
    assert pyrage.decrypt(found[stored], [KEY]) == b"an LTX file"
    assert stat.S_IMODE((tmp_path / stored).stat().st_mode) == 0o600
    assert [item.size for item in client.list(9)] == [info.size] == [11]
    assert open_client(client.url.removeprefix("age+")).list(9) is not None
    assert [*open_client(f"file://{tmp_path}/replica").list(9)] == []


def test_s3_keys_have_the_level_in_hex_below_age() -> None:
    client = open_client("s3://bucket/some/path?endpoint=http://127.0.0.1:1", age_recipients=[PUBLIC])
    info = FileInfo(9, TXID(1), TXID(10), 1, None)  # type: ignore[arg-type]
    assert client._inner._key(info) == "some/path/age/0009/0000000000000001-000000000000000a.ltx.age"  # type: ignore[attr-defined]


def test_plain_and_encrypted_replicas_at_one_path_do_not_see_each_other() -> None:
    plain = open_client("memory://both")
    encrypted = open_client("memory://both", age_recipients=[PUBLIC], age_identities=[SECRET])
    plain.put(0, TXID(1), TXID(1), b"plain", timestamp_ms=STAMP)
    encrypted.put(0, TXID(2), TXID(2), b"secret", timestamp_ms=STAMP)
    assert [info.max_txid for info in plain.list(0)] == [1]
    assert [info.max_txid for info in encrypted.list(0)] == [2]
    assert plain.url != encrypted.url
    plain.put_control("lock.json", b"1")
    assert encrypted.get_control("lock.json").data == b"1"


@pytest.mark.parametrize("name", ["age", "age/0/x", "age/0/0000000000000001-0000000000000001.ltx.age"])
def test_a_control_object_cannot_lie_among_the_files(tmp_path: Path, name: str) -> None:
    for client in (FileClient(tmp_path), MemoryClient()):
        with pytest.raises(ValueError, match="control object"):
            client.put_control(name, b"x")


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 131072, 200_000, LARGE])
def test_a_listing_tells_the_size_that_is_read(store: Store, size: int) -> None:
    client = client_of(store)
    body = os.urandom(size)
    put(client, body=body)
    [info] = client_of(store).list(0)
    assert info.size == size
    assert read(client, info) == body
    assert b"".join(read_file(client, info)) == body


def test_many_recipients_make_a_long_header_and_the_size_is_still_right(store: Store) -> None:
    keys = [pyrage.x25519.Identity.generate() for _ in range(60)]
    client = client_of(store, recipients=tuple(str(key.to_public()) for key in keys), identities=(str(keys[-1]),))
    put(client, body=b"y" * 5000)
    assert (header_size(store.bytes_of()) or 0) > 4096
    assert [info.size for info in client.list(0)] == [5000]
    assert read(client, next(client.list(0))) == b"y" * 5000


def test_sizes_need_no_identity_and_are_fetched_once(store: Store) -> None:
    client = client_of(store, identities=())
    for txid in range(1, 6):
        put(client, txid, body=b"x" * txid)
    assert [info.size for info in client.list(0)] == [1, 2, 3, 4, 5]
    opened = store.opened
    assert [info.size for info in client.list(0)] == [1, 2, 3, 4, 5]
    assert [info.size for info in client.list(0, seek=TXID(4))] == [4, 5]
    assert store.opened == opened == 5
    put(client, 6)
    client.delete(client.list(0, seek=TXID(5)))
    assert [info.size for info in client.list(0)] == [1, 2, 3, 4]


def test_a_file_that_goes_away_during_a_listing_is_not_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(store)
    put(client, 1)
    put(client, 2)

    def gone(info: FileInfo, **where: Any) -> ReadStream:
        if info.min_txid == 1:
            raise ObjectNotFound(info.name)
        return MemoryClient.open(store, info, **where)

    monkeypatch.setattr(store, "open", gone)
    assert [info.min_txid for info in client.list(0)] == [2]


# -- reading -----------------------------------------------------------------------------------------------------------------------


def test_ranges_of_a_large_file_are_exact(store: Store) -> None:
    client = client_of(store)
    body = os.urandom(LARGE)
    info = put(client, body=body)
    generator = random.Random(1)
    for _ in range(20):
        offset, size = generator.randrange(LARGE + 100), generator.choice([1, 24, 70_000, LARGE])
        assert read(client, info, offset=offset, size=size) == body[offset : offset + size]
    assert read(client, info, offset=LARGE - 5) == body[-5:]
    assert read(client, info, offset=LARGE + 5) == b""
    with client.open(info) as stream:
        assert stream.read(0) == b""
        assert stream.read(100) == body[:100]
        assert stream.read(300_000) == body[100:300_100]
        assert stream.read() == body[300_100:]
        assert stream.read() == stream.read(1) == b""


def test_the_end_of_a_file_is_decrypted_once_for_trailer_and_index(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(store)
    body = os.urandom(LARGE)
    info = put(client, body=body)
    assert read(client, info, offset=LARGE - 24, size=24) == body[-24:]
    with monkeypatch.context() as patched:
        patched.setattr(client, "_decrypt", None)  # not called again
        assert read(client, info, offset=LARGE - 500_000, size=499_976) == body[-500_000:-24]
    store.replace(pyrage.encrypt(body[::-1], [KEY.to_public()]))  # another file of the same name and size
    assert read(client, info, offset=LARGE - 24, size=24) == body[::-1][-24:]


@pytest.mark.fault("F9")
def test_a_reader_that_stops_early_leaves_no_thread(store: Store) -> None:
    client = client_of(store)
    info = put(client, body=bytes(LARGE))
    for wanted in (0, 1, 1 << 20):
        with client.open(info) as stream:
            stream.read(wanted)
            stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "pyrepl age"]


class Dropping:
    """A connection that breaks after a while, once."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at, self.position, self.closed = data, at, 0, False

    def read(self, size: int = -1, /) -> bytes:
        if self.position >= self.at:
            raise StorageUnavailable("connection dropped")
        piece = self.data[self.position : min(self.position + size, self.at)]
        self.position += len(piece)
        return piece

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Dropping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.parametrize("at", [0, 50, "header", "nonce", 70_000, 5 << 20])
@pytest.mark.parametrize("where", [{}, {"offset": LARGE - 24, "size": 24}], ids=["whole", "range"])
def test_a_dropped_connection_keeps_its_error(store: Store, monkeypatch: pytest.MonkeyPatch, at: int | str, where: dict[str, int]) -> None:
    client = client_of(store)
    info = put(client, body=bytes(LARGE))
    data = store.bytes_of()
    header = header_size(data) or 0
    broken = Dropping(data, at if isinstance(at, int) else {"header": header, "nonce": header + 16}[at])
    monkeypatch.setattr(store, "open", lambda info, **where: broken)
    with pytest.raises(StorageUnavailable, match="connection dropped"):
        read(client, info, **where)
    assert broken.closed


def test_reading_resumes_after_a_dropped_connection(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(store)
    body = os.urandom(LARGE)
    info = put(client, body=body)
    broken = [Dropping(store.bytes_of(), 5 << 20), Dropping(store.bytes_of(), 1 << 30)]
    monkeypatch.setattr(store, "open", lambda info, **where: broken.pop(0))
    pauses: list[float] = []
    assert b"".join(read_file(client, info, sleep=pauses.append)) == body
    assert len(pauses) == 1


# -- damage and keys -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed() -> bytes:
    return pyrage.encrypt(os.urandom(200_000), [KEY.to_public()])


def damages() -> Iterator[Any]:
    def flip(at: Callable[[int, int], int]) -> Callable[[bytes, int], bytes]:
        def change(data: bytes, header: int) -> bytes:
            position = at(header, len(data))
            return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]

        return change

    yield pytest.param(flip(lambda header, size: 3), id="version line")
    yield pytest.param(flip(lambda header, size: header - 5), id="MAC of the header")
    yield pytest.param(flip(lambda header, size: header + 3), id="nonce")
    yield pytest.param(flip(lambda header, size: header + 16 + 70_000), id="second chunk")
    yield pytest.param(flip(lambda header, size: size - 1), id="last tag")
    yield pytest.param(lambda data, header: data[:-1], id="last byte lost")
    yield pytest.param(lambda data, header: data[: header + 16 + 65_552], id="cut between chunks")
    yield pytest.param(lambda data, header: data[: header + 16], id="no chunk")
    yield pytest.param(lambda data, header: data[: header - 1], id="cut in the header")
    yield pytest.param(lambda data, header: data + b"x", id="a byte too many")
    yield pytest.param(lambda data, header: b"", id="empty")
    yield pytest.param(lambda data, header: b"LTX1" + bytes(300), id="plain LTX file")


@pytest.mark.parametrize("damage", list(damages()))
def test_damage_is_named_as_such(store: Store, sealed: bytes, damage: Callable[[bytes, int], bytes]) -> None:
    data = sealed
    store.replace(damage(data, header_size(data) or 0))
    client = client_of(store)
    [info] = client.list(0)  # listed, so that it is in nobody's way
    for where in ({}, {"offset": 199_976, "size": 24}):
        with pytest.raises(CorruptReplica, match=r"age\+memory:// level 0 0000000000000001-0000000000000001.ltx.age: ") as caught:
            read(client, info, **where)
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_no_flipped_bit_goes_unnoticed(store: Store) -> None:
    data = pyrage.encrypt(b"short", [KEY.to_public()])
    client = client_of(store)
    for position in range(len(data)):
        store.replace(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises((CorruptReplica, WrongKey)):
            read(client, FileInfo(0, TXID(1), TXID(1), 5, None))  # type: ignore[arg-type]


def test_a_plain_file_is_refused_and_hides_no_other(store: Store) -> None:
    client = client_of(store)
    store.replace(b"LTX1" + bytes(200), txid=1)
    put(client, 2)
    first, second = client.list(0)
    assert read(client, second) == b"x" * 100
    with pytest.raises(CorruptReplica, match="a plain LTX file"):
        read(client, first)


@pytest.mark.fault("F62")
@pytest.mark.parametrize("size", [100, LARGE])
def test_the_wrong_key_is_not_damage(store: Store, size: int) -> None:
    info = put(client_of(store), body=bytes(size))
    client = client_of(store, recipients=(), identities=(str(OTHER),))
    for where in ({}, {"size": 10}):
        with pytest.raises(WrongKey, match=r"no key fits the encrypted file: age\+memory:// level 0 0000000000000001") as caught:
            read(client, info, **where)
        assert "identity" in caught.value.hint
        assert str(OTHER) not in "".join(traceback.format_exception(caught.value)) + caught.value.hint


def test_after_a_rotation_old_and_new_files_are_read(store: Store) -> None:
    put(client_of(store), 1, b"old")
    client = client_of(store, recipients=(str(OTHER.to_public()),), identities=(SECRET, str(OTHER)))
    put(client, 2, b"new")
    assert [read(client, info) for info in client.list(0)] == [b"old", b"new"]


# -- which keys are taken --------------------------------------------------------------------------------------------------------------


def test_ssh_keys_and_lists_in_one_string(store: Store) -> None:
    info = put(client_of(store, recipients=(f"# both\n{PUBLIC}\n\n  {SSH_PUBLIC}\n",), identities=()))
    assert read(client_of(store, recipients=(), identities=(SSH_SECRET,)), info) == b"x" * 100
    assert read(client_of(store, recipients=(), identities=(f"# old\n{OTHER}\n{SECRET}",)), info) == b"x" * 100


@pytest.mark.parametrize(
    ("recipients", "identities"),
    [
        ((), ()),
        (("",), ()),
        (("# nothing\n",), (SECRET,)),
        ((PUBLIC, ""), ()),
        ((PUBLIC[:-1],), ()),
        ((SECRET,), ()),
        (("ssh-ed25519 nonsense",), ()),
        (("passphrase",), ()),
        ((PUBLIC,), ("",)),
        ((), (SECRET[:-1],)),
        ((), (PUBLIC,)),
        ((), (SSH_LOCKED,)),
        ((), (SSH_SECRET[:200],)),
        ((), (SECRET + "\udcff",)),
        (PUBLIC, ()),
        ((), SECRET),
        ((PUBLIC,), (str(OTHER),)),
    ],
    ids=range(17),  # the keys are new in each process, and may not be part of a test's name
)
def test_keys_that_are_none_are_refused_without_being_shown(
    tmp_path: Path, recipients: tuple[str, ...], identities: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        AgeClient(FileClient(tmp_path / "r", layout=AGE), recipients=recipients, identities=identities)
    shown = "".join(traceback.format_exception(caught.value)) + caught.value.hint + repr(caught.value)
    for secret in (SECRET, str(OTHER), "passphrase", "nonsense", SSH_SECRET.splitlines()[3], SSH_LOCKED.splitlines()[3]):
        assert secret.upper() not in shown.upper().replace("WITHOUT A PASSPHRASE", "")
        assert secret[:40].upper() not in shown.upper().replace("WITHOUT A PASSPHRASE", "")
    assert not (tmp_path / "r").exists()


def test_a_client_shows_no_secret(store: Store) -> None:
    client = client_of(store)
    assert SECRET not in f"{client!r} {client.url} {vars(client)}"
    assert repr(client) == "AgeClient(MemoryClient('memory://'))"


# -- fail closed -----------------------------------------------------------------------------------------------------------------------


def test_without_a_recipient_nothing_is_written(tmp_path: Path) -> None:
    client = open_client(f"file://{tmp_path}/replica", age_identities=[SECRET])
    with pytest.raises(ConfigError, match="without an age recipient"):
        client.put(0, TXID(1), TXID(1), b"secret", timestamp_ms=STAMP)
    with pytest.raises(ConfigError, match="without an age recipient"):
        client.put_control("pyrepl/lineage.json", b"{}")
    assert [*tmp_path.iterdir()] == []


def test_without_an_identity_nothing_is_read(store: Store) -> None:
    client = client_of(store, identities=())
    info = put(client)
    assert not client.can_read
    assert client_of(store).can_read
    assert store.can_read
    with pytest.raises(ConfigError, match="without an age identity"):
        client.open(info)


@pytest.mark.parametrize("keys", [{"age_recipients": [PUBLIC]}, {"age_identities": [SECRET]}, {"age_recipients": [""]}])
def test_a_missing_library_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(ConfigError, match="extra `age`") as caught:
        open_client(f"file://{tmp_path}/replica", **keys)
    assert caught.value.hint == "pip install 'pyrepl-sqlite[age]'"
    assert open_client(f"file://{tmp_path}/replica").kind == "file"


def test_a_client_for_plain_files_is_not_wrapped(tmp_path: Path) -> None:
    for inner in (MemoryClient(), FileClient(tmp_path)):
        with pytest.raises(ValueError, match="not opened for encrypted files"):
            AgeClient(inner, recipients=[PUBLIC])


def test_the_url_of_an_encrypted_replica_opens_only_with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = open_client(f"file://{tmp_path}/replica", age_recipients=[PUBLIC]).url
    with pytest.raises(ConfigError, match="an encrypted replica needs keys"):
        open_client(url)
    assert open_client(url, age_recipients=[PUBLIC]).url == url
    assert open_client("age+folder").url == f"file://{tmp_path}/age+folder"


@pytest.mark.fault("F62")
def test_every_body_that_reaches_the_store_is_encrypted(store: Store, tmp_path: Path, spool: Path) -> None:
    client = client_of(store, spool=spool)
    large = tmp_path / "large"
    large.write_bytes(b"secret words " * (LARGE // 13 + 1))
    for txid, body in enumerate([b"secret words", large, bytearray(b"secret words"), memoryview(b"secret words" * LARGE)], start=1):
        client.put(0, TXID(txid), TXID(txid), body, timestamp_ms=STAMP)
    for data in store.sent:
        assert data.startswith(MAGIC)
        assert b"secret" not in data
        assert b"secret words" in pyrage.decrypt(data, [KEY])


# -- repeats -----------------------------------------------------------------------------------------------------------------------------

TRIES = [pytest.param((SECRET,), id="with identities"), pytest.param((), id="recipients alone")]


def joined(client: AgeClient) -> Replica:
    replica = Replica(client, writer=1)
    replica.join(b"l" * 16, replica.open(), known_txid=0)
    return replica


def out(body: bytes | Path, txid: int = 1) -> OutFile:
    return OutFile(0, TXID(txid), TXID(txid), STAMP, body)


@pytest.fixture(params=["memory", "disk"])
def body(request: pytest.FixtureRequest, tmp_path: Path) -> bytes | Path:
    """A small body, and one whose ciphertext goes through a temporary file."""
    if request.param == "memory":
        return os.urandom(1000)
    path = tmp_path / "staged"
    path.write_bytes(os.urandom(LARGE))
    return path


@pytest.mark.parametrize("identities", TRIES)
@pytest.mark.parametrize("conditional", [True, False])
def test_a_lost_reply_is_adopted_at_the_next_try(
    store: Store, spool: Path, body: bytes | Path, identities: tuple[str, ...], conditional: bool
) -> None:
    client = client_of(store, identities=identities, spool=spool)
    replica = joined(client)
    replica.conditional = conditional
    store.after = unavailable
    with pytest.raises(StorageUnavailable):
        replica.store([out(body)], TXID(1))
    assert len([*spool.iterdir()]) == isinstance(body, Path)
    store.after = lambda: None
    replica.store([out(body)], TXID(1))
    assert replica.txid == 1
    assert len(set(store.sent)) == 1
    assert [*spool.iterdir()] == []
    with client_of(store).open(next(client.list(0))) as stream:
        assert stream.read() == (body if isinstance(body, bytes) else body.read_bytes())


def test_a_repeat_sends_the_same_ciphertext_even_when_the_body_moved_to_a_file(store: Store, tmp_path: Path) -> None:
    client = client_of(store, identities=())
    store.before = unavailable
    staged = tmp_path / "staged"
    staged.write_bytes(b"x" * 1000)
    for body in (b"x" * 1000, staged, b"x" * 1000):
        with pytest.raises(StorageUnavailable):
            put(client, body=body)
    store.before = lambda: None
    put(client, body=staged)
    assert len(store.sent) == 4
    assert len(set(store.sent)) == 1
    put(client, body=staged)  # it was known to be stored: another put is another ciphertext
    assert len(set(store.sent)) == 2


def test_access_denied_after_a_lost_reply_forgets_nothing(store: Store) -> None:
    client = client_of(store, identities=())
    replica = joined(client)
    store.after = unavailable
    with pytest.raises(StorageUnavailable):
        replica.store([out(b"x" * 100)], TXID(1))

    def denied() -> None:
        raise AccessDenied("the key expired")

    store.before, store.after = denied, lambda: None
    with pytest.raises(AccessDenied):
        replica.store([out(b"x" * 100)], TXID(1))
    store.before = lambda: None
    replica.store([out(b"x" * 100)], TXID(1))


@pytest.mark.parametrize("identities", TRIES)
def test_another_writer_is_found(store: Store, identities: tuple[str, ...]) -> None:
    put(client_of(store), body=b"theirs")
    replica = joined(client_of(store, identities=identities))
    for _ in range(2):
        with pytest.raises(Fenced):
            replica.store([out(b"ours")], TXID(1))
    assert pyrage.decrypt(store.bytes_of(), [KEY]) == b"theirs"


@pytest.mark.parametrize("identities", TRIES)
def test_another_writer_between_two_tries_is_found(store: Store, identities: tuple[str, ...]) -> None:
    replica = joined(client_of(store, identities=identities))
    store.before = unavailable
    with pytest.raises(StorageUnavailable):
        replica.store([out(b"ours")], TXID(1))
    store.replace(pyrage.encrypt(b"them", [KEY.to_public()]))
    store.before = lambda: None
    with pytest.raises(Fenced):
        replica.store([out(b"ours")], TXID(1))
    assert pyrage.decrypt(store.bytes_of(), [KEY]) == b"them"


def test_what_is_refused_at_the_first_try_is_not_kept(store: Store, spool: Path) -> None:
    client = client_of(store, spool=spool)
    put(client, body=bytes(LARGE))
    with pytest.raises(PreconditionFailed):
        put(client, body=bytes(LARGE), if_absent=True)
    assert [*spool.iterdir()] == []


def test_another_body_at_the_address_does_not_send_the_old_ciphertext(store: Store) -> None:
    client = client_of(store)
    store.before = unavailable
    with pytest.raises(StorageUnavailable):
        put(client, body=b"first")
    store.before = lambda: None
    put(client, body=b"second")
    assert pyrage.decrypt(store.bytes_of(), [KEY]) == b"second"


def test_another_process_s_ciphertext_of_our_body_is_known_by_decrypting(store: Store) -> None:
    put(client_of(store), body=b"same")
    joined(client_of(store)).store([out(b"same")], TXID(1))
    with pytest.raises(Fenced):  # with recipients alone nobody can tell, and stopping is the safe side
        joined(client_of(store, identities=())).store([out(b"same")], TXID(1))


def test_damage_at_our_address_is_other_bytes(store: Store) -> None:
    store.replace(b"LTX1" + bytes(100))
    with pytest.raises(Fenced):
        joined(client_of(store)).store([out(b"ours")], TXID(1))


def test_what_was_given_up_is_dropped_in_the_end(store: Store, spool: Path) -> None:
    client = client_of(store, spool=spool)
    store.before = unavailable
    body = bytes(LARGE)
    for txid in range(1, 8):
        with pytest.raises(StorageUnavailable):
            put(client, txid, body)
    assert len([*spool.iterdir()]) == 4
    for left in spool.iterdir():
        assert stat.S_IMODE(left.stat().st_mode) == 0o600
        assert left.read_bytes().startswith(MAGIC)
    client.close()
    assert [*spool.iterdir()] == []


def test_what_a_killed_process_left_is_swept(store: Store, spool: Path) -> None:
    (spool / ".pyrepl-0123456789abcdef.tmp").write_bytes(b"left")
    put(client_of(store, spool=spool), body=bytes(LARGE))
    assert [*spool.iterdir()] == []


def test_a_full_disk_leaves_nothing_and_sends_nothing(store: Store, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: AtomicFile, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AtomicFile, "write", full)
    with pytest.raises(StorageUnavailable, match="no space left on device") as caught:
        put(client_of(store, spool=spool), body=bytes(LARGE))
    assert "TMPDIR" in caught.value.hint
    assert store.sent == []
    assert [*spool.iterdir()] == []


def test_a_spool_folder_that_is_missing_says_so(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="no such file"):
        put(client_of(store, spool=tmp_path / "none"), body=bytes(LARGE))


def test_a_staged_file_that_is_gone_is_the_caller_s_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        put(client_of(store), body=tmp_path / "none")


def test_errors_are_ours(store: Store) -> None:
    assert issubclass(WrongKey, ReplicatorError)
    with pytest.raises(ObjectNotFound):
        client_of(store).open(FileInfo(0, TXID(1), TXID(1), 5, None))  # type: ignore[arg-type]
