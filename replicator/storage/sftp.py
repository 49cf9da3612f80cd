"""A replica on an SSH server with SFTP, on asyncssh: `<path>/ltx/<level>/<name>`, the header's time as the file's mtime.

Decisions, and what they protect:

* **Temporary name, fsync, then the final name.** What a broken connection leaves is a `.tmp` that no listing shows; those of a day ago are
  swept. (fsync where the server has the extension; SFTP has no fsync of a folder.)
* **Create-if-absent is a hard link**, which every file system refuses when the name exists. Servers without that extension get a plain
  rename, which the protocol forbids to overwrite; some overwrite all the same, and the probe finds those.
* **Replacing on a condition does not exist in SFTP**, and what is checked first and written then fences nobody: `ConditionUnsupported`.
* **mtimes are whole seconds** in this protocol, so that exact times come from the headers of the files (`TreeClient`).
* **The host's key.** One that is configured is the only one accepted. Else `~/.ssh/known_hosts` decides about hosts that it lists, so that
  a changed key is refused; about others there is a warning, as Litestream gives it.
* **One connection, many requests.** Any number of threads share it. A lost one is opened anew by the next operation; what only reads is
  tried once more by itself, because idle connections get lost between machines.

Source: specification 2.1, 4.3, 8.5; draft-ietf-secsh-filexfer-02; OpenSSH's PROTOCOL (extensions).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import posixpath
import stat
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import asyncssh

from replicator.errors import (
    AccessDenied,
    ConditionUnsupported,
    ConfigError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from replicator.storage.background import Background
from replicator.storage.base import Body, ReadStream, body_size
from replicator.storage.locations import SFTPSettings
from replicator.storage.tree import CHUNK, Entry, Pieces, Write, etag_of, is_stale, opened, temporary_name, whole

__all__ = ["SFTPObjects"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 30.0
_TIMEOUT_S = 60.0
_KEEPALIVE_S = 15
_DELETES = 16

_LOST = (asyncssh.ConnectionLost, asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)
_MISSING = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)


class SFTPObjects:
    """The store at one path of one server. Connects at the first operation."""

    kind = "sftp"

    def __init__(self, settings: SFTPSettings, *, known_hosts: Path | None = None) -> None:
        self.settings = settings
        self.url = settings.url
        self._known_hosts = Path("~/.ssh/known_hosts").expanduser() if known_hosts is None else known_hosts
        self._background = Background()
        self._connecting = asyncio.Lock()  # used in the loop alone
        self._connection: Any = None
        self._client: Any = None
        self._folders: set[str] = set()
        self._has_links = True

    def __repr__(self) -> str:
        return f"SFTPObjects({self.url!r})"

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def entries(self, folder: str) -> Iterable[Entry]:
        for name, attributes in self._listing(folder):
            if attributes.permissions is not None and stat.S_ISREG(attributes.permissions):
                yield Entry(name, attributes.size or 0, (attributes.mtime or 0) * 10**9)

    def folders(self, folder: str) -> Iterable[str]:
        for name, attributes in self._listing(folder):
            if attributes.permissions is not None and stat.S_ISDIR(attributes.permissions):
                yield name

    def open(self, name: str, offset: int, size: int | None) -> ReadStream:
        path = self._path(name)

        async def start(client: Any) -> tuple[Any, int]:
            file = await client.open(path, "rb")
            try:
                return file, (await file.stat()).size or 0
            except BaseException:
                with contextlib.suppress(Exception):
                    await file.close()
                raise

        file, total = self._run(name, start, again=True)
        rest = max(0, total - offset)

        def pieces() -> Iterator[bytes]:
            at, end = offset, offset + (rest if size is None else min(rest, size))
            while at < end:
                count, here = min(CHUNK, end - at), at
                piece = self._run(name, lambda _: file.read(count, here))  # noqa: B023 - run at once
                if not piece:
                    return
                at += len(piece)
                yield piece

        def release() -> None:
            with contextlib.suppress(StorageError):
                self._run(name, lambda _: file.close())

        return Pieces(pieces(), rest if size is None else min(rest, size), self._named(name), release)

    def get(self, name: str) -> tuple[bytes, str]:
        data = whole(self.open(name, 0, None), self._named(name))
        return data, etag_of(data)

    def details(self, name: str) -> tuple[datetime | None, dict[str, str]]:
        return None, {}

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def write(self, name: str, body: Body, how: Write) -> str:
        if how.if_match is not None:
            raise ConditionUnsupported(self._named(name))
        body_size(body)  # a body that is missing is the caller's error, not the server's
        path, temporary = self._path(name), self._path(temporary_name(name))
        self._prepare(posixpath.dirname(path))
        try:
            self._send(name, temporary, body, how.when)
            self._run(name, lambda client: self._publish(client, temporary, path, create=how.if_absent))
        except PreconditionFailed:
            raise PreconditionFailed(self._named(name)) from None
        except StorageError:
            with contextlib.suppress(StorageError):
                self._run(name, lambda client: client.remove(temporary))
            raise
        return etag_of(bytes(body)) if not isinstance(body, Path) else ""

    def delete(self, names: Sequence[str]) -> None:
        async def remove(client: Any) -> None:
            for first in range(0, len(names), _DELETES):
                tasks = [client.remove(self._path(name)) for name in names[first : first + _DELETES]]
                for done in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(done, BaseException) and not isinstance(done, _MISSING):
                        raise done

        if names:
            self._run(names[0], remove, timeout_s=_TIMEOUT_S + len(names))

    def delete_if(self, name: str, etag: str) -> None:
        raise ConditionUnsupported(self._named(name))

    def delete_folder(self, folder: str) -> None:
        async def remove(client: Any, path: str) -> None:
            for entry in await client.readdir(path):
                name = str(entry.filename)
                if name in (".", "..") or "/" in name:
                    continue
                if stat.S_ISDIR(entry.attrs.permissions or 0):
                    await remove(client, posixpath.join(path, name))
                else:
                    await client.remove(posixpath.join(path, name))
            await client.rmdir(path)

        self._folders.clear()
        with contextlib.suppress(ObjectNotFound):
            self._run(folder, lambda client: remove(client, self._path(folder)), timeout_s=600)

    def close(self) -> None:
        if self._background.closed:
            return
        with contextlib.suppress(TimeoutError):
            self._background.run(self._drop(), timeout_s=5)
        self._background.close()

    # -- steps -------------------------------------------------------------------------------------------------------------------

    def _listing(self, folder: str) -> list[tuple[str, Any]]:
        try:
            entries = self._run(folder, lambda client: client.readdir(self._path(folder)), again=True)
        except ObjectNotFound:
            return []
        return [(str(entry.filename), entry.attrs) for entry in entries if str(entry.filename) not in (".", "..")]

    def _prepare(self, folder: str) -> None:
        """Make a folder, once for each client, and sweep what dead writers left in it."""
        if folder in self._folders or not folder:
            return

        async def make(client: Any) -> None:
            await client.makedirs(folder, exist_ok=True)
            for entry in await client.readdir(folder):
                if is_stale(str(entry.filename)):
                    with contextlib.suppress(asyncssh.SFTPError):
                        await client.remove(posixpath.join(folder, str(entry.filename)))

        self._run(folder, make)
        self._folders.add(folder)

    def _send(self, name: str, temporary: str, body: Body, when: datetime | None) -> None:
        """Write the temporary file, with its time, to the server's disk."""
        requests = -1 if self.settings.concurrent_writes else 1
        try:
            file = self._run(name, lambda client: client.open(temporary, "xb", max_requests=requests))
        except ObjectNotFound:
            # Somebody removed the folder after this client had made it.
            self._folders.discard(posixpath.dirname(temporary))
            self._prepare(posixpath.dirname(temporary))
            file = self._run(name, lambda client: client.open(temporary, "xb", max_requests=requests))
        try:
            with opened(body) as source:
                offset = 0
                while piece := source.read(CHUNK):
                    data, at = piece, offset
                    self._run(name, lambda _: file.write(data, at))  # noqa: B023 - run at once
                    offset += len(piece)

            async def finish(_: Any) -> None:
                if when is not None:
                    seconds = min(max(0, int(when.timestamp())), 0xFFFFFFFF)
                    await file.utime((seconds, seconds))
                with contextlib.suppress(asyncssh.SFTPOpUnsupported):
                    await file.fsync()
                await file.close()

            self._run(name, finish)
        except BaseException:
            with contextlib.suppress(StorageError):
                self._run(name, lambda _: file.close())
            raise

    async def _publish(self, client: Any, temporary: str, path: str, *, create: bool) -> None:
        """Give a finished file its name."""
        if not create:
            await self._replace(client, temporary, path)
            return
        if self._has_links:
            try:
                await client.link(temporary, path)
            except (asyncssh.SFTPOpUnsupported, asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists, asyncssh.SFTPPermissionDenied):
                # Protocol 3 has one code for everything.
                if await client.exists(path):
                    await client.remove(temporary)
                    raise PreconditionFailed(path) from None
                self._has_links = False
            else:
                await client.remove(temporary)
                return
        try:
            await client.rename(temporary, path)
        except (asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists):
            if not await client.exists(path):
                raise
            await client.remove(temporary)
            raise PreconditionFailed(path) from None

    @staticmethod
    async def _replace(client: Any, temporary: str, path: str) -> None:
        try:
            await client.posix_rename(temporary, path)
        except asyncssh.SFTPOpUnsupported:
            with contextlib.suppress(*_MISSING):
                await client.remove(path)
            await client.rename(temporary, path)

    def _path(self, name: str) -> str:
        return posixpath.normpath(posixpath.join(self.settings.path, name))

    def _named(self, name: str) -> str:
        return f"sftp://{self.settings.host}/{self._path(name).lstrip('/')}"

    # -- the connection ----------------------------------------------------------------------------------------------------------

    def _run(self, name: str, work: Callable[[Any], Coroutine[Any, Any, T]], *, again: bool = False, timeout_s: float = _TIMEOUT_S) -> T:
        """Carry out one step with the connection; `again`: once more when the connection was lost under it."""

        async def step() -> T:
            try:
                return await work(await self._connected())
            except _LOST:
                await self._drop()
                if not again:
                    raise
                return await work(await self._connected())

        try:
            return self._background.run(step(), timeout_s=timeout_s + _CONNECT_TIMEOUT_S)
        except (asyncssh.Error, OSError, TimeoutError) as exc:
            raise self._translated(name, exc) from exc

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._client is None or self._connection.is_closed():
                await self._drop()
                self._connection = await asyncssh.connect(**self._options())
                self._client = await self._connection.start_sftp_client()
            return self._client

    async def _drop(self) -> None:
        connection, self._connection, self._client = self._connection, None, None
        if connection is not None:
            connection.abort()
            with contextlib.suppress(Exception):
                await connection.wait_closed()

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        host, port = _split_host(settings.host)
        return {
            "host": host,
            "port": port,
            "username": settings.user,
            "password": settings.password,
            "client_keys": [self._client_key()] if settings.key_path else None,
            "agent_path": None,
            "known_hosts": self._trusted(host, port),
            "config": None,
            "login_timeout": _CONNECT_TIMEOUT_S,
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "keepalive_interval": _KEEPALIVE_S,
        }

    def _client_key(self) -> Any:
        path = self.settings.key_path
        try:
            return asyncssh.read_private_key(path)
        except OSError as exc:
            raise ConfigError(f"cannot read key-path {path}: {(exc.strerror or 'error').lower()}") from exc
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
            hint = "give a private key in OpenSSH or PEM form, without a passphrase"
            raise ConfigError(f"key-path {path} does not hold a usable private key", hint=hint) from exc

    def _trusted(self, host: str, port: int) -> Any:
        """Return the host keys to accept, or None for any."""
        if self.settings.host_key is not None:
            return [read_host_key(self.settings.host_key)], [], []
        if self._known_hosts.is_file():
            try:
                known = asyncssh.read_known_hosts(os.fspath(self._known_hosts))
            except (OSError, ValueError) as exc:
                raise ConfigError(f"cannot read {self._known_hosts}", hint="give host-key, the line of authorized_keys") from exc
            found = known.match(host, host, port)
            if any(found[:3]):
                return known
        log.warning("sftp host key not verified host=%s", self.settings.host)
        return None

    def _translated(self, name: str, exc: Exception) -> StorageError | ConfigError:
        where = self._named(name)
        kind = type(exc).__name__
        match exc:
            case asyncssh.SFTPNoSuchFile() | asyncssh.SFTPNoSuchPath():
                return ObjectNotFound(where)
            case asyncssh.SFTPPermissionDenied() | asyncssh.SFTPWriteProtect():
                return AccessDenied(where, hint="check owner and permissions of the folder on the server")
            case asyncssh.HostKeyNotVerifiable():
                hint = "compare the server's key with host-key, or with its line in ~/.ssh/known_hosts"
                return AccessDenied(where, "host key is not the expected one", hint=hint)
            case asyncssh.PermissionDenied() | asyncssh.IllegalUserName():
                return AccessDenied(where, "login refused", hint="check user, password and key-path")
            case asyncssh.SFTPNoSpaceOnFilesystem() | asyncssh.SFTPQuotaExceeded():
                return StorageUnavailable(f"no space left: {where}", hint="free space on the server")
            case asyncssh.SFTPOpUnsupported() | asyncssh.SFTPBadMessage() | asyncssh.SFTPNotADirectory() | asyncssh.SFTPFileIsADirectory():
                return StorageError(f"server refused ({kind}): {where}")
            case asyncssh.SFTPFailure():
                return StorageUnavailable(f"server reports a failure: {where}", hint="its log says why: often a full disk, or a quota")
            case asyncssh.KeyExchangeFailed() | asyncssh.ProtocolNotSupported():
                return StorageError(f"no common algorithm with the server ({kind}): {where}")
        if isinstance(exc, OSError) and exc.errno in (errno.EACCES, errno.EPERM):
            return AccessDenied(where, "connection refused by this machine")
        return StorageUnavailable(f"server cannot be reached ({kind}): {where}", hint="check host, port and the network")


def read_host_key(text: str) -> Any:
    """Return the key of a line of `authorized_keys` (`ssh-ed25519 AAAA... comment`). Raises `ConfigError`."""
    try:
        return asyncssh.import_public_key(text.strip())
    except asyncssh.KeyImportError:
        raise ConfigError("host-key is not a public key", hint="give a line such as: ssh-ed25519 AAAA... (ssh-keyscan prints it)") from None


def _split_host(host: str) -> tuple[str, int]:
    name, colon, port = host.rpartition(":")
    return (name.strip("[]"), int(port)) if colon and port.isdigit() else (host.strip("[]"), 22)
