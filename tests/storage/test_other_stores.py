"""What the conformance suite does not ask of the stores other than S3: logins and keys of hosts, secrets, what is sent, and bad days."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest

from replicator.errors import AccessDenied, ConfigError, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.format.ltx import TXID, FileInfo
from replicator.storage import open_store
from replicator.storage.abs import ABSObjects
from replicator.storage.background import Background
from replicator.storage.base import AGE, LITESTREAM, Layout, ReplicaClient
from replicator.storage.below import replicas_below
from replicator.storage.gs import GSObjects
from replicator.storage.locations import (
    ABSSettings,
    GSSettings,
    NATSSettings,
    OSSSettings,
    SFTPSettings,
    StoreSettings,
    WebDAVSettings,
)
from replicator.storage.nats import NATSObjects
from replicator.storage.oss import OSSObjects
from replicator.storage.sftp import SFTPObjects
from replicator.storage.tree import Entry, TreeClient, Write, temporary_name
from replicator.storage.webdav import WebDAVObjects
from tests.otherservers import OTHER_STORES, PASSWORD, USER, Place, SSHServer, create_bucket, fresh_path, nats_server
from tests.servers import free_port
from tests.storage.scripted import Reply, Request, scripted

STAMP = 1_795_444_774_997
WRONG = "wrong-secret-value"


def put(client: ReplicaClient, txid: int, body: bytes | Path, **options: bool) -> FileInfo:
    return client.put(0, TXID(txid), TXID(txid), body, timestamp_ms=STAMP, **options)


def read(client: ReplicaClient, info: FileInfo) -> bytes:
    with client.open(info) as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


@pytest.fixture
def place(request: pytest.FixtureRequest, other_store: Callable[[str], Place]) -> Place:
    return other_store(request.param)


# -- logins ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [name for name in OTHER_STORES if name != "gs"], indirect=True)
def test_a_wrong_secret_is_named_as_such_and_not_shown(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    right = place.settings(fresh_path())
    wrong: StoreSettings
    match right:
        case ABSSettings():
            wrong = replace(right, sas_token=f"sv=2024-01-01&sig={WRONG}")
        case OSSSettings():
            wrong = replace(right, access_key_id="nobody", secret_access_key=WRONG)
        case _:
            wrong = replace(right, password=WRONG)  # type: ignore[call-arg]
    client = open_store(wrong)
    with contextlib.closing(client):
        with pytest.raises(AccessDenied) as caught:
            list(client.list(0))
        assert caught.value.hint
        shown = f"{caught.value!r} {caught.value} {caught.value.hint} {client!r} {client.objects!r} {client.url} {wrong!r} {caplog.text}"
        assert WRONG not in shown
        with pytest.raises(AccessDenied):
            put(client, 1, b"x")


@pytest.mark.parametrize(
    "settings",
    [
        SFTPSettings(host="127.0.0.1:1", user=USER, path="/x"),
        WebDAVSettings(server="http://127.0.0.1:1", path="/x"),
        NATSSettings(server="127.0.0.1:1", bucket="x", timeout_s=0.5),
    ],
    ids=lambda settings: settings.kind,
)
def test_an_unreachable_server_is_unavailable(settings: StoreSettings) -> None:
    with contextlib.closing(open_store(settings)) as client:
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            list(client.list(0))
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            put(client, 1, b"x")


@pytest.mark.parametrize(
    "objects",
    [
        lambda: ABSObjects(ABSSettings(bucket="b", account_name="a", account_key="a2V5", endpoint="http://127.0.0.1:1/a"), retries=0),
        lambda: OSSObjects(
            OSSSettings(bucket="bucket", endpoint="http://127.0.0.1:1", access_key_id="a", secret_access_key="b"), attempts=1
        ),
        lambda: GSObjects(GSSettings(bucket="b"), retries_s=0.1),
    ],
    ids=["abs", "oss", "gs"],
)
def test_an_unreachable_cloud_is_unavailable(objects: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with contextlib.closing(TreeClient(objects())) as client:  # type: ignore[arg-type]
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            list(client.list(0))
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            put(client, 1, b"x", if_absent=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nats", {"bucket": "never-made"}),
        ("gs", {"bucket": "never-made"}),
        ("abs", {"bucket": "never-made"}),
        ("oss", {"bucket": "never-made"}),
    ],
)
def test_a_missing_bucket_is_named(other_store: Callable[[str], Place], name: str, change: dict[str, str]) -> None:
    settings = replace(other_store(name).settings(fresh_path()), **change)  # type: ignore[arg-type]
    with contextlib.closing(open_store(settings)) as client:
        with pytest.raises(StorageError, match=r"(bucket|container) does not exist: never-made") as caught:
            list(client.list(0))
        assert caught.value.hint


# -- SSH: keys -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[SSHServer]:
    (tmp_path / "served").mkdir()
    server = SSHServer(tmp_path / "served")
    yield server
    server.close()


def at(server: SSHServer, **more: object) -> SFTPSettings:
    return replace(
        SFTPSettings(host=f"127.0.0.1:{server.port}", user=USER, password=PASSWORD, path="/db", host_key=server.host_key), **more
    )  # type: ignore[arg-type]


def test_another_host_key_than_the_given_one_is_refused(ssh: SSHServer) -> None:
    other = ssh.client_key.export_public_key().decode()
    with (
        contextlib.closing(open_store(at(ssh, host_key=other))) as client,
        pytest.raises(AccessDenied, match="host key is not the expected"),
    ):
        list(client.list(0))


def test_known_hosts_decides_where_no_key_is_given(ssh: SSHServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = tmp_path / "known_hosts"

    def listing() -> list[FileInfo]:
        with contextlib.closing(TreeClient(SFTPObjects(at(ssh, host_key=None), known_hosts=known))) as client:
            return list(client.list(0))

    unverified = f"sftp host key not verified host=127.0.0.1:{ssh.port}"
    assert listing() == []
    assert unverified in caplog.text  # no such file: as Litestream does
    known.write_text(f"elsewhere.example {ssh.client_key.export_public_key().decode()}")
    caplog.clear()
    assert listing() == []
    assert unverified in caplog.text
    known.write_text(f"[127.0.0.1]:{ssh.port} {ssh.host_key}\n")
    caplog.clear()
    assert listing() == []
    assert unverified not in caplog.text
    known.write_text(f"[127.0.0.1]:{ssh.port} {ssh.client_key.export_public_key().decode()}")
    with pytest.raises(AccessDenied, match="host key is not the expected"):
        listing()


def test_login_by_key(ssh: SSHServer, tmp_path: Path) -> None:
    ssh.client_key.write_private_key(tmp_path / "id")
    with contextlib.closing(open_store(at(ssh, password=None, key_path=str(tmp_path / "id")))) as client:
        assert list(client.list(0)) == []
    ssh.key.write_private_key(tmp_path / "other")
    with (
        contextlib.closing(open_store(at(ssh, password=None, key_path=str(tmp_path / "other")))) as client,
        pytest.raises(AccessDenied, match="login refused"),
    ):
        list(client.list(0))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"key_path": "/nonexistent/id"}, "cannot read key-path /nonexistent/id"), ({"host_key": "nonsense"}, "host-key is not a public key")],
)
def test_keys_that_are_none(ssh: SSHServer, change: dict[str, str], words: str) -> None:
    with contextlib.closing(open_store(at(ssh, **change))) as client, pytest.raises(ConfigError, match=words):
        list(client.list(0))


# -- bad days --------------------------------------------------------------------------------------------------------------------


def everything_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_server_that_goes_away_during_an_upload_leaves_nothing_under_the_name(ssh: SSHServer, tmp_path: Path) -> None:
    body = os.urandom(6 << 20)
    source = tmp_path / "body"
    source.write_bytes(body)
    client = open_store(at(ssh))
    seen = threading.Event()

    def cut() -> None:
        folder = ssh.folder / "db/ltx/0"
        end = time.monotonic() + 20
        while time.monotonic() < end and not any(path.stat().st_size for path in folder.glob("*.tmp")):
            pass
        seen.set()
        ssh.stop()

    with contextlib.closing(client):
        put(client, 1, b"before")
        cutter = threading.Thread(target=cut)
        cutter.start()
        with pytest.raises(StorageUnavailable):
            put(client, 2, source, if_absent=True)
        cutter.join()
        assert seen.is_set()
        assert [name for name in everything_below(ssh.folder) if not name.endswith(".tmp")] == ["0000000000000001-0000000000000001.ltx"]
        with pytest.raises(StorageUnavailable):
            list(client.list(0))
        ssh.start()
        assert [info.min_txid for info in client.list(0)] == [1]
        info = put(client, 2, source, if_absent=True)
        assert read(client, info) == body
        assert [info.min_txid for info in client.list(0)] == [1, 2]


def test_a_lost_connection_is_opened_anew_for_reading(ssh: SSHServer) -> None:
    with contextlib.closing(open_store(at(ssh))) as client:
        info = put(client, 1, b"x" * 100)
        ssh.stop()
        ssh.start()
        assert [found.min_txid for found in client.list(0)] == [1]
        ssh.stop()
        ssh.start()
        assert read(client, info) == b"x" * 100


class Gone:
    """A connection that is lost under the first request."""

    async def readdir(self, path: str) -> None:
        raise asyncssh.ConnectionLost("gone")

    async def open(self, path: str, mode: str, **options: object) -> None:
        raise asyncssh.ConnectionLost("gone")


def test_what_only_reads_is_tried_again_when_the_connection_is_lost_under_it(ssh: SSHServer) -> None:
    with contextlib.closing(open_store(at(ssh))) as client:
        assert isinstance(client.objects, SFTPObjects)
        info = put(client, 1, b"x" * 100)
        client.objects._client = Gone()
        assert [found.min_txid for found in client.list(0)] == [1]
        client.objects._client = Gone()
        assert read(client, info) == b"x" * 100
        client.objects._client = Gone()
        with pytest.raises(StorageUnavailable):
            put(client, 2, b"x")


@contextlib.contextmanager
def relay(port: int, *, after: int) -> Iterator[tuple[int, threading.Event]]:
    """Pass connections on to a port, and cut all of them when so many bytes went there. With the event set nothing is cut."""
    listener = socket.create_server(("127.0.0.1", 0))
    calm, stopping = threading.Event(), threading.Event()
    open_sockets: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket, budget: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                budget -= len(data)
                if budget < 0 and not calm.is_set():
                    break
                target.sendall(data)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port), 5)
                open_sockets.extend((near, far))
                threads.append(threading.Thread(target=pump, args=(near, far, after)))
                threads.append(threading.Thread(target=pump, args=(far, near, 1 << 40)))
                for thread in threads[-2:]:
                    thread.start()

    threads: list[threading.Thread] = []
    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield listener.getsockname()[1], calm
    finally:
        stopping.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for item in open_sockets:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
        for item in open_sockets:
            item.close()
        acceptor.join(10)


@pytest.mark.parametrize("name", ["sftp", "sftp-rclone", "webdav", "webdav-wsgidav", "nats", "abs", "oss"])
def test_a_connection_that_breaks_during_an_upload_leaves_nothing_and_the_next_try_succeeds(
    other_store: Callable[[str], Place], name: str, tmp_path: Path
) -> None:
    path = fresh_path()
    settings = other_store(name).settings(path)
    body = os.urandom(4 << 20)
    source = tmp_path / "body"
    source.write_bytes(body)
    with contextlib.ExitStack() as stack:

        def through(after: int) -> tuple[StoreSettings, threading.Event]:
            match settings:
                case SFTPSettings():
                    port, calm = stack.enter_context(relay(int(settings.host.rpartition(":")[2]), after=after))
                    return replace(settings, host=f"127.0.0.1:{port}"), calm
                case NATSSettings():
                    port, calm = stack.enter_context(relay(int(settings.server.rpartition(":")[2]), after=after))
                    return replace(settings, server=f"127.0.0.1:{port}", timeout_s=1.0, reconnect_wait_s=0.1), calm
                case WebDAVSettings():
                    there = settings.server.split(":")[2].partition("/")
                    port, calm = stack.enter_context(relay(int(there[0]), after=after))
                    return replace(settings, server=f"http://127.0.0.1:{port}{there[1]}{there[2]}"), calm
                case ABSSettings() | OSSSettings():
                    assert settings.endpoint
                    there = settings.endpoint.split(":")[2].partition("/")
                    port, calm = stack.enter_context(relay(int(there[0]), after=after))
                    return replace(settings, endpoint=f"http://127.0.0.1:{port}{there[1]}{there[2]}"), calm
                case _:
                    raise AssertionError(settings)

        broken, calm = through(2 << 20)
        client = stack.enter_context(contextlib.closing(open_store(broken)))
        with pytest.raises(StorageUnavailable):
            put(client, 1, source, if_absent=True)
        direct = stack.enter_context(contextlib.closing(open_store(settings)))
        assert list(direct.list(0)) == []
        with pytest.raises(ObjectNotFound):
            direct.open(FileInfo(0, TXID(1), TXID(1), len(body), client_time()))
        calm.set()
        end = time.monotonic() + 30
        while True:  # a server may need a moment to see that the first connection is gone
            try:
                info = put(client, 1, source, if_absent=True)
                break
            except StorageUnavailable:
                assert time.monotonic() < end
        assert read(direct, info) == body
        assert [found.min_txid for found in direct.list(0)] == [1]


def client_time():  # type: ignore[no-untyped-def]
    from datetime import UTC, datetime

    return datetime.now(UTC)


def test_a_nats_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    port = free_port()
    settings = NATSSettings(server=f"127.0.0.1:{port}", bucket="again", timeout_s=1.0, reconnect_wait_s=0.05)
    with nats_server(tmp_path, port):
        create_bucket(settings, "again")
        client = open_store(settings)
        info = put(client, 1, b"x" * 300_000)
    with contextlib.closing(client):
        with pytest.raises(StorageUnavailable):
            list(client.list(0))
        with nats_server(tmp_path, port):
            end = time.monotonic() + 30
            while True:
                try:
                    assert [found.min_txid for found in client.list(0)] == [1]
                    break
                except StorageUnavailable:
                    assert time.monotonic() < end
            assert read(client, info) == b"x" * 300_000


@pytest.mark.parametrize("place", ["sftp", "webdav-wsgidav"], indirect=True)
def test_what_dead_writers_left_is_swept_after_a_day(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.folder is not None
    path = fresh_path()
    level = place.folder / path / "ltx/0"
    level.mkdir(parents=True)
    now = time.time_ns()
    old, young = f"a.ltx.1.{now - 25 * 3600 * 10**9}.tmp", f"a.ltx.1.{now - 3600 * 10**9}.tmp"
    for name in (old, young, "a.tmp", f"b.{now}.tmp"):
        (level / name).write_bytes(b"x")
    with contextlib.closing(open_store(place.settings(path))) as client:
        put(client, 1, b"x")
    assert sorted(found.name for found in level.iterdir()) == sorted(
        [young, "a.tmp", f"b.{now}.tmp", "0000000000000001-0000000000000001.ltx"]
    )
    assert temporary_name("a.ltx").startswith(f"a.ltx.{os.getpid()}.")


@pytest.mark.parametrize("place", ["sftp", "nats"], indirect=True)
def test_closing_ends_threads_and_connections(place: Place) -> None:
    before, users = {thread.name for thread in threading.enumerate()}, Background._users
    first, second = (open_store(place.settings(fresh_path())) for _ in range(2))
    for client in (first, second):
        put(client, 1, b"x")
    first.close()
    assert [info.min_txid for info in second.list(0)] == [1]
    second.close()
    second.close()
    assert {thread.name for thread in threading.enumerate()} <= before
    assert Background._users == users


# -- TLS -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    import ipaddress
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    built = built.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1)).add_extension(alternative, critical=False)
    (folder / "cert.pem").write_bytes(built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"


def test_nats_speaks_tls_and_only_to_a_certificate_that_it_trusts(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    port = free_port()
    base = NATSSettings(server=f"127.0.0.1:{port}", bucket="secure", timeout_s=2.0, tls=True)
    with nats_server(tmp_path, port, "--tls", "--tlscert", str(certificate[0]), "--tlskey", str(certificate[1])):
        with contextlib.closing(open_store(base)) as client, pytest.raises(StorageError, match="is not trusted"):
            list(client.list(0))
        with (
            contextlib.closing(open_store(replace(base, root_cas=(str(certificate[0]),)))) as client,
            pytest.raises(StorageError, match="bucket does not exist: secure"),
        ):
            list(client.list(0))


def test_nats_login_by_nkey(tmp_path: Path) -> None:
    import nkeys

    key, other = (nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)) for _ in range(2))
    (tmp_path / "server.conf").write_text(f"authorization {{ users = [ {{ nkey: {key.public_key.decode()} }} ] }}")
    port = free_port()
    settings = NATSSettings(server=f"127.0.0.1:{port}", bucket="mine", timeout_s=2.0)
    with nats_server(tmp_path, port, "-c", str(tmp_path / "server.conf")):
        with (
            contextlib.closing(open_store(replace(settings, nkey=key.seed.decode()))) as client,
            pytest.raises(StorageError, match="bucket does not exist: mine"),
        ):
            list(client.list(0))
        for refused in (replace(settings, nkey=other.seed.decode()), settings):
            with contextlib.closing(open_store(refused)) as client, pytest.raises(AccessDenied):
                list(client.list(0))


def test_nats_sends_nothing_to_a_server_without_tls_when_it_must(caplog: pytest.LogCaptureFixture) -> None:
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                connection.sendall(b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576,"auth_required":true}\r\n')
                with contextlib.suppress(OSError):
                    received.append(connection.recv(4096))

        thread = threading.Thread(target=answer)
        thread.start()
        settings = NATSSettings(
            server=f"127.0.0.1:{listener.getsockname()[1]}", bucket="b", username=USER, password=WRONG, tls=True, timeout_s=1
        )
        with contextlib.closing(open_store(settings)) as client, pytest.raises(StorageError, match="does not speak TLS"):
            list(client.list(0))
        thread.join(10)
    assert received in ([], [b""])


def test_webdav_over_https_needs_a_certificate_that_it_trusts(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with scripted(lambda request: Reply(404), context=context) as server:
        settings = WebDAVSettings(server=server.endpoint.replace("http://", "https://"), path="/x")
        with (
            contextlib.closing(open_store(settings)) as client,
            pytest.raises(StorageError, match="certificate of the server is not trusted"),
        ):
            list(client.list(0))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with contextlib.closing(open_store(settings)) as client:
            assert list(client.list(0)) == []


# -- what is sent, and replies of servers on bad days ----------------------------------------------------------------------------


@contextlib.contextmanager
def webdav(answer: Callable[[Request], Reply], **more: object) -> Iterator[tuple[TreeClient, list[Request]]]:
    with scripted(answer) as server:
        client = TreeClient(WebDAVObjects(WebDAVSettings(server=server.endpoint, path="/db", **more)))  # type: ignore[arg-type]
        with contextlib.closing(client):
            yield client, server.requests


def test_webdav_puts_beside_the_name_and_moves() -> None:
    with webdav(lambda request: Reply(404 if request.method == "PROPFIND" else 201)) as (client, requests):
        put(client, 1, b"abc", if_absent=True)
        put(client, 2, b"abc")
    assert [request.method for request in requests] == ["PROPFIND", "PUT", "MOVE", "PUT", "MOVE"]
    _, sent, moved, _, replaced = requests
    assert sent.path == moved.path
    assert sent.path.startswith("/db/ltx/0/0000000000000001-0000000000000001.ltx.")
    assert sent.path.endswith(".tmp")
    assert (sent.body, sent.headers["content-length"]) == (b"abc", "3")
    assert moved.headers["destination"].endswith("/db/ltx/0/0000000000000001-0000000000000001.ltx")
    assert (moved.headers["overwrite"], replaced.headers["overwrite"]) == ("F", "T")


def test_a_webdav_move_that_loses_is_a_failed_condition_and_cleans_up() -> None:
    answers = {"PROPFIND": 404, "PUT": 201, "MOVE": 412, "DELETE": 204}
    with webdav(lambda request: Reply(answers[request.method])) as (client, requests):
        with pytest.raises(PreconditionFailed):
            put(client, 1, b"abc", if_absent=True)
        assert requests[-1].method == "DELETE"
        assert requests[-1].path.endswith(".tmp")


def test_a_webdav_move_to_a_name_that_is_locked_at_this_moment_is_sent_again() -> None:
    moves = iter([423, 423, 201])
    with webdav(lambda request: Reply(next(moves) if request.method == "MOVE" else 404 if request.method == "PROPFIND" else 201)) as (
        client,
        requests,
    ):
        put(client, 1, b"abc", if_absent=True)
    assert [request.method for request in requests] == ["PROPFIND", "PUT", "MOVE", "MOVE", "MOVE"]


def test_a_webdav_folder_that_others_make_at_this_moment_is_asked_for_again() -> None:
    folders, puts = iter([423, 423, 405, 201]), iter([409, 201])
    answers = {"PROPFIND": lambda: 404, "PUT": lambda: next(puts), "MKCOL": lambda: next(folders, 405), "MOVE": lambda: 201}
    with webdav(lambda request: Reply(answers[request.method]())) as (client, requests):
        put(client, 1, b"abc")
    made = [request.path for request in requests if request.method == "MKCOL"]
    assert made[0] == made[1] == made[2] != made[3]
    assert requests[-1].method == "MOVE"


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, AccessDenied), (403, AccessDenied), (423, StorageUnavailable), (429, StorageUnavailable), (507, StorageUnavailable), (302, StorageError),
     (405, StorageError), (501, StorageError)],
)  # fmt: skip
def test_webdav_answers_that_are_no(status: int, error: type[StorageError]) -> None:
    with webdav(lambda request: Reply(404 if request.method == "PROPFIND" else status, headers={"Location": "http://127.0.0.1:1/"})) as (
        client,
        _,
    ):
        with pytest.raises(StorageError) as caught:
            put(client, 1, b"abc")
        assert type(caught.value) is error
        assert str(status) in str(caught.value) or status == 507


@pytest.mark.fault("F58")
def test_a_redirect_does_not_get_the_password() -> None:
    with scripted(lambda request: Reply(200)) as elsewhere:
        answer = Reply(301, headers={"Location": f"{elsewhere.endpoint}/"})
        with (
            webdav(lambda request: answer, username=USER, password=PASSWORD) as (client, _),
            pytest.raises(StorageError, match="redirects to another place"),
        ):
            list(client.list(0))
        assert elsewhere.requests == []


LISTING = (
    '<?xml version="1.0"?>{head}<D:multistatus xmlns:D="DAV:"><D:response><D:href>/db/ltx/0/</D:href><D:propstat><D:prop><D:resourcetype>'
    "<D:collection/></D:resourcetype></D:prop></D:propstat></D:response>{more}</D:multistatus>"
)
ONE = (
    "<D:response><D:href>{href}</D:href><D:propstat><D:prop><D:resourcetype/><D:getcontentlength>{size}</D:getcontentlength>"
    "<D:getlastmodified>{when}</D:getlastmodified></D:prop></D:propstat></D:response>"
)
GOOD = "Mon, 23 Nov 2026 14:31:44 GMT"
FILE = "0000000000000001-0000000000000001.ltx"


@pytest.mark.parametrize(
    ("href", "size", "when", "found"),
    [
        (f"/db/ltx/0/{FILE}", "7", GOOD, [(1, 7)]),
        (f"http://host/db/ltx/0/{FILE}", "7", GOOD, [(1, 7)]),
        (f"/db/ltx/0/{FILE.replace('-', '%2D')}", "7", GOOD, [(1, 7)]),
        (f"/db/ltx/0/{FILE}", "", "", [(1, 0)]),
        (f"/db/ltx/0/{FILE}", "-7", "never", [(1, 0)]),
        (f"/db/ltx/1/{FILE}", "7", GOOD, []),
        ("/db/ltx/0/x%2F..", "7", GOOD, []),
    ],
)
def test_webdav_listings(href: str, size: str, when: str, found: list[tuple[int, int]]) -> None:
    text = LISTING.format(head="", more=ONE.format(href=href, size=size, when=when))
    with webdav(lambda request: Reply(207, text.encode())) as (client, _):
        assert [(info.min_txid, info.size) for info in client.list(0)] == found


@pytest.mark.parametrize("text", ["<html>", "", LISTING.format(head='<!DOCTYPE x [<!ENTITY a "aa">]>', more=""), "\x00"])
def test_webdav_listings_that_are_none(text: str) -> None:
    with webdav(lambda request: Reply(207, text.encode())) as (client, _), pytest.raises(StorageError, match="listing"):
        list(client.list(0))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(206, b"x" * 10, {"Content-Range": "bytes 0-9/100"}), "another range"),
        (Reply(206, b"x" * 10), "another range"),
        (Reply(200, b"x" * 50, announced=100), "connection ended|cannot be reached"),
    ],
)
def test_webdav_ranges_are_checked(reply: Reply, words: str) -> None:
    info = FileInfo(0, TXID(1), TXID(1), 100, client_time())
    with (
        webdav(lambda request: reply) as (client, _),
        pytest.raises(StorageError, match=words),
        client.open(info, offset=20, size=60) as stream,
    ):
        stream.read()


def test_a_webdav_server_that_ignores_ranges_is_read_all_the_same() -> None:
    info = FileInfo(0, TXID(1), TXID(1), 100, client_time())
    body = bytes(range(100))
    with webdav(lambda request: Reply(200, body)) as (client, _):
        for offset, size in ((20, 30), (20, None), (90, 50), (150, 10)):
            with client.open(info, offset=offset, size=size) as stream:
                assert stream.read() == body[offset : None if size is None else offset + size]


def test_conditions_that_google_and_azure_and_alibaba_get(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(lambda request: Reply(412)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        gs = GSObjects(GSSettings(bucket="b", path="x"))
        azure = ABSObjects(ABSSettings(bucket="b", account_name="a", account_key="a2V5", endpoint=f"{server.endpoint}/a"))
        oss = OSSObjects(OSSSettings(bucket="bucket", endpoint=server.endpoint, access_key_id="a", secret_access_key="b"))

        def google() -> str:
            """The last request for the object; the library asks for other things by itself."""
            return [request.path for request in server.requests if "/o" in request.path and "/b/b" in request.path][-1]

        def azures() -> dict[str, str]:
            return [request.headers for request in server.requests if request.path.startswith("/a/b/")][-1]

        for how, query, header, value in (
            (Write(if_absent=True), "ifGenerationMatch=0", "if-none-match", "*"),
            (Write(if_match="17"), "ifGenerationMatch=17", "if-match", "17"),
        ):
            with pytest.raises(PreconditionFailed):
                gs.write("lock.json", b"x", how)
            assert query in google()
            with pytest.raises(PreconditionFailed):
                azure.write("lock.json", b"x", how)
            assert azures()[header] == value
        with pytest.raises(PreconditionFailed):
            gs.delete_if("lock.json", "17")
        assert "ifGenerationMatch=17" in google()
        with pytest.raises(PreconditionFailed):
            azure.delete_if("lock.json", "17")
        assert azures()["if-match"] == "17"
        with pytest.raises(PreconditionFailed):
            oss.write("lock.json", b"x", Write(if_absent=True))
        assert server.requests[-1].headers["x-oss-forbid-overwrite"] == "true"
        for objects in (gs, azure, oss):
            objects.close()


@pytest.mark.parametrize("kind", ["gs", "abs", "oss", "webdav"])
def test_a_conditional_write_is_sent_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent again after its reply was lost, it would be refused because of itself."""
    with scripted(lambda request: Reply(404 if request.method in ("PROPFIND", "GET") else 503)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        objects = {
            "gs": lambda: GSObjects(GSSettings(bucket="b")),
            "abs": lambda: ABSObjects(ABSSettings(bucket="b", account_name="a", account_key="a2V5", endpoint=f"{server.endpoint}/a")),
            "oss": lambda: OSSObjects(OSSSettings(bucket="bucket", endpoint=server.endpoint, access_key_id="a", secret_access_key="b")),
            "webdav": lambda: WebDAVObjects(WebDAVSettings(server=server.endpoint)),
        }[kind]()
        with contextlib.closing(objects), pytest.raises(StorageUnavailable):
            objects.write("lock.json", b"x", Write(if_absent=True))
        assert len([request for request in server.requests if request.method in ("PUT", "POST")]) == 1


def test_a_password_in_the_clear_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        WebDAVObjects(WebDAVSettings(server="http://dav.example", path="/x", username=USER, password=PASSWORD)).close()
    assert "travels unencrypted" in caplog.text
    assert PASSWORD not in caplog.text


def test_damaged_pieces_in_nats_are_found(other_store: Callable[[str], Place]) -> None:
    import asyncio

    import nats

    settings = other_store("nats").settings(fresh_path())
    assert isinstance(settings, NATSSettings)
    with contextlib.closing(open_store(settings)) as client:
        assert isinstance(client.objects, NATSObjects)
        info = put(client, 1, b"x" * 200_000)

        async def damage() -> None:
            connection = await nats.connect(f"nats://{settings.server}", user=USER, password=PASSWORD)
            js = connection.jetstream()
            stream = f"OBJ_{settings.bucket}"
            message = await js.get_msg(stream, seq=1)
            await js.purge_stream(stream, subject=message.subject)
            await js.publish(message.subject, b"y" * (128 << 10))
            await js.publish(message.subject, b"y" * (200_000 - (128 << 10)))
            await connection.close()

        asyncio.run(damage())
        with pytest.raises(StorageError, match="digest does not match"):
            read(client, info)


# -- replicas below a place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [name for name in OTHER_STORES if not name.startswith("nats")], indirect=True)
def test_the_replicas_of_a_directory_are_found(place: Place) -> None:
    """Databases at `a.db` and `0001/b.db`, whose folder looks like a level of OSS; one encrypted, one of 0.3; and what is none."""
    base = fresh_path()
    with contextlib.ExitStack() as stack:

        def at(path: str, layout: Layout = LITESTREAM) -> TreeClient:
            client = open_store(place.settings(f"{base}/{path}".rstrip("/")), layout=layout)
            stack.callback(client.close)
            return client

        clients = [at(path) for path in ("a.db", "0001/b.db", "old.db", "none")]
        for client in (*clients[:2], at("secret.db", layout=AGE)):
            put(client, 1, b"x")
        clients[2].put_object("generations/0123456789abcdef/snapshots/00000000.snapshot.lz4", b"x")
        clients[3].put_control("pyrepl/lineage.json", b"{}")
        assert replicas_below(at("")) == ["0001/b.db", "a.db", "old.db", "secret.db"]
        assert replicas_below(clients[0]) == [""]
        assert replicas_below(at("nothing/here")) == []


class Folders(TreeClient):
    """A store whose folders are named as it is told."""

    def __init__(self, names: Callable[[str], list[str]]) -> None:
        self.objects = self  # type: ignore[assignment]
        self._names = names
        self.asked = 0

    @property
    def url(self) -> str:
        return "webdav://hostile"

    def folders(self, folder: str) -> list[str]:
        self.asked += 1
        return self._names(folder)

    def entries(self, folder: str) -> list[Entry]:
        return [Entry("0000000000000001-0000000000000001.ltx", 1, 0)] if folder.endswith("ltx/0") else []


def test_folders_that_lead_elsewhere_or_in_a_circle_are_not_entered(caplog: pytest.LogCaptureFixture) -> None:
    levels = {"": ["..", ".", "", "a/../../b", "x\0y", "good"], "good": ["ltx"], "good/ltx": ["0"]}
    assert replicas_below(Folders(lambda folder: levels.get(folder, []))) == ["good"]
    assert "count=5" in caplog.text
    circle = Folders(lambda folder: ["in"])
    assert replicas_below(circle) == []
    assert circle.asked <= 100
