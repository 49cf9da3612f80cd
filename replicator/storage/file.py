"""A replica in a directory, laid out as Litestream does: `<root>/ltx/<level>/<name>`, the header's time as the file's mtime.

It also holds the local L0 files, so that an upload is a copy between two clients.

* Create-if-absent is `link()` of a complete temporary file; overwriting is `rename()`. Each put costs one fsync of the file and one of its
  folder. A body that is itself a file on the same file system is hard-linked: not a byte is copied.
* Control objects lie at `<root>/<name>`; their etag is the SHA-256 of their bytes. A condition is checked and its write done under an OS
  lock on `<root>/pyrepl/.lock`, which the system releases when its holder dies. Reading needs no lock, because every write is a rename.
* Nobody checks what a hard disk stores; nor does this module. LTX files carry their own checksum.

Source: specification 2.1 (paths, mtime).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self

from replicator.atomic import AtomicFile, is_temporary, link_file, make_directories, sweep, sync_directory, write_all, write_file
from replicator.errors import AccessDenied, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.format.ltx import TXID, FileInfo
from replicator.format.v3 import GENERATIONS
from replicator.gate import gate
from replicator.storage.base import (
    FROM_START,
    LITESTREAM,
    Body,
    ControlObject,
    Layout,
    ReadStream,
    StoredObject,
    body_size,
    check_control_name,
    check_object_name,
    created_at,
)

__all__ = ["FileClient"]

_LOCK_NAME = "pyrepl/.lock"
_LOCK_TIMEOUT_S = 10.0
_CHUNK = 1 << 20
_MAX_CONTROL_SIZE = 1 << 20

# link() or copy_file_range() cannot do it here, but reading and writing can.
_COPY_INSTEAD = frozenset(
    {
        errno.EXDEV,
        errno.EMLINK,
        errno.EPERM,
        errno.EACCES,
        errno.ELOOP,
        errno.EINVAL,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.ENOLCK,
        errno.EAGAIN,
    }
)


class FileClient:
    """The replica under one root directory, which is created by the first write."""

    kind = "file"
    can_read = True

    def __init__(self, root: str | Path, *, layout: Layout = LITESTREAM) -> None:
        self.root = Path(os.path.abspath(root))
        self.layout = layout
        self._prepared: dict[int, str] = {}
        """The levels whose folders are made, and where those are."""
        self._made: set[Path] = set()
        self._swept = False
        self._prepare_lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"file://{self.root}"

    def __repr__(self) -> str:
        return f"FileClient({os.fspath(self.root)!r})"

    def level_path(self, level: int) -> Path:
        """Return the folder of a level."""
        return self.root / (self.layout.folder or "ltx") / str(level)

    def path(self, info: FileInfo) -> Path:
        """Return where a file is, for callers that link or map it."""
        return self.level_path(info.level) / self.layout.name(info)

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        folder = self.level_path(level)
        found = []
        with _translated(folder):
            try:
                entries = os.scandir(folder)
            except FileNotFoundError:
                return
            with entries:
                for entry in entries:
                    txids = self.layout.parse(entry.name)
                    if txids is None or txids[0] < seek:
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # deleted since the folder was read
                    if stat.S_ISREG(status.st_mode):
                        found.append(_info(level, txids, status))
        yield from sorted(found, key=lambda info: (info.min_txid, info.max_txid))

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        return _open(self.path(info), offset, size)

    def put(
        self,
        level: int,
        min_txid: TXID,
        max_txid: TXID,
        body: Body,
        *,
        timestamp_ms: int,
        if_absent: bool = False,
        metadata: dict[str, str] | None = None,
    ) -> FileInfo:
        info = FileInfo(level, min_txid, max_txid, body_size(body), created_at(timestamp_ms))
        folder = self._prepared.get(level) or os.fspath(self.level_path(level))
        path = os.path.join(folder, self.layout.name(info))
        with _translated(path):
            self._prepare(level)
            try:
                size = _store(body, path, overwrite=not if_absent, mtime_ns=timestamp_ms * 1_000_000)
            except FileNotFoundError:
                if os.path.isdir(folder):
                    raise
                # Somebody removed the folder after this client had made it.
                self._prepared.pop(level, None)
                self._prepare(level)
                size = _store(body, path, overwrite=not if_absent, mtime_ns=timestamp_ms * 1_000_000)
        return info if size == info.size else replace(info, size=size)

    def metadata(self, info: FileInfo) -> dict[str, str]:
        return {}

    def delete(self, files: Iterable[FileInfo]) -> None:
        # No fsync: a file that comes back after a crash is an old file with its old bytes, and the next retention deletes it.
        for info in files:
            path = self.path(info)
            with _translated(path), contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def get_control(self, name: str) -> ControlObject:
        data = self._read_control(name)
        if data is None:
            raise ObjectNotFound(name)
        return ControlObject(data, _etag(data))

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        path = self._control_path(name)
        with self._control_lock(), _translated(path):
            self._check_conditions(name, if_match=if_match, if_absent=if_absent)
            self._sweep_once()
            make_directories(path.parent)
            write_file(path, data)
        return _etag(data)

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        path = self._control_path(name)
        with self._control_lock(), _translated(path):
            self._check_conditions(name, if_match=if_match, if_absent=False)
            try:
                os.unlink(path)
            except FileNotFoundError:
                return
            sync_directory(path.parent)

    def list_folders(self, folder: str) -> Sequence[str]:
        return [name for name, status in self._entries(folder) if stat.S_ISDIR(status.st_mode)]

    def list_objects(self, folder: str) -> Sequence[StoredObject]:
        return [
            StoredObject(name, status.st_size, status.st_mtime_ns)
            for name, status in self._entries(folder)
            if stat.S_ISREG(status.st_mode) and not is_temporary(name)
        ]

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        return _open(self._object_path(name), offset, None)

    def put_object(self, name: str, body: Body, *, if_absent: bool = False) -> StoredObject:
        path = self._object_path(name)
        if isinstance(body, Path):
            os.stat(body)  # a body that is missing is the caller's error, not the replica's
        created_ns = time.time_ns()
        with _translated(path):
            self._sweep_once()
            if path.parent not in self._made:
                make_directories(path.parent)
                self._made.add(path.parent)
            try:
                size = _store(body, path, overwrite=not if_absent, mtime_ns=created_ns)
            except FileNotFoundError:
                if path.parent.is_dir():
                    raise
                make_directories(path.parent)  # somebody removed the folder after this client had made it
                size = _store(body, path, overwrite=not if_absent, mtime_ns=created_ns)
        return StoredObject(name, size, created_ns)

    def delete_objects(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._object_path(name)
            with _translated(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)

    def delete_folder(self, folder: str) -> None:
        path = self._object_path(folder)
        with _translated(path), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)

    def close(self) -> None:
        pass

    def _object_path(self, name: str) -> Path:
        check_object_name(name)
        return self.root / name

    def _entries(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        path = self._object_path(folder)
        with _translated(path):
            try:
                entries = os.scandir(path)
            except FileNotFoundError:
                return
            with entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                        yield entry.name, entry.stat(follow_symlinks=False)

    def _sweep_once(self) -> None:
        """Before the first write, sweep what dead writers left: in all folders, because there may be some that nobody writes to again."""
        if self._swept:
            return
        with self._prepare_lock:
            tops = (self.level_path(0).parent, self.root / GENERATIONS, self.root / _LOCK_NAME.partition("/")[0])
            for folder in (self.root, *(Path(name) for top in tops for name, _, _ in os.walk(top))):
                with contextlib.suppress(OSError):  # not there, or not ours
                    sweep(folder)
            self._swept = True

    def _prepare(self, level: int) -> None:
        """Sweep, and make the folder of a level, once for each client and level."""
        if level in self._prepared:
            return
        with gate().aside():  # a dozen times the disk is waited for
            self._sweep_once()
            self._make(level)

    def _make(self, level: int) -> None:
        with self._prepare_lock:
            folder = self.level_path(level)
            made = make_directories(folder)
            # A folder that was there may have been made just before a crash or by a writer that has not come to its fsync.
            for there in (folder, folder.parent):
                if there not in made:
                    sync_directory(there.parent)
            self._prepared[level] = os.fspath(folder)

    def _control_path(self, name: str) -> Path:
        check_control_name(name)
        return self.root / name

    def _read_control(self, name: str) -> bytes | None:
        path = self._control_path(name)
        with _translated(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                with open(file, "rb", closefd=False) as stream:
                    data = stream.read(_MAX_CONTROL_SIZE + 1)
            finally:
                os.close(file)
        if len(data) > _MAX_CONTROL_SIZE:
            raise StorageError(f"control object is too large: {path}")
        return data

    def _check_conditions(self, name: str, *, if_match: str | None, if_absent: bool) -> None:
        if if_match is None and not if_absent:
            return
        old = self._read_control(name)
        if (if_absent and old is not None) or (if_match is not None and (old is None or _etag(old) != if_match)):
            raise PreconditionFailed(name)

    @contextlib.contextmanager
    def _control_lock(self) -> Iterator[None]:
        """Hold the lock of the control objects, against other threads and other processes."""
        path = self.root / _LOCK_NAME
        with _translated(path):
            if not path.parent.is_dir() and self.root in make_directories(path.parent):
                self._swept = True  # where there was nothing, nobody has left anything
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(file, path)
            yield
        finally:
            os.close(file)


def _open(path: Path, offset: int, size: int | None) -> _FileStream:
    with _translated(path):
        # Not through a planted link, and not blocked for ever by a FIFO.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"not a regular file: {path}")
        rest = max(0, status.st_size - offset)
        if offset:
            os.lseek(file, offset, os.SEEK_SET)
        return _FileStream(file, path, rest if size is None else min(rest, size))
    except BaseException:
        os.close(file)
        raise


class _FileStream:
    """A range of an open file. Unbuffered: callers read large pieces."""

    def __init__(self, file: int, path: Path, size: int) -> None:
        self._file, self._path, self._rest = file, path, size

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._rest if size < 0 else min(size, self._rest)
        pieces: list[bytes] = []
        while wanted:
            with _translated(self._path):
                piece = os.read(self._file, wanted)
            if not piece:
                raise StorageUnavailable(f"file became shorter while it was read: {self._path}")
            pieces.append(piece)
            self._rest -= len(piece)
            wanted -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()


def _store(body: Body, path: str | Path, *, overwrite: bool, mtime_ns: int) -> int:
    """Write one file under its final name; return its size in bytes."""
    if isinstance(body, Path):
        try:
            return link_file(body, path, overwrite=overwrite, mtime_ns=mtime_ns)
        except OSError as exc:
            if exc.errno not in _COPY_INSTEAD:
                raise
        with AtomicFile(path, overwrite=overwrite, mtime_ns=mtime_ns) as file:
            return _copy(body, file.fileno())
    write_file(path, body, overwrite=overwrite, mtime_ns=mtime_ns, waiting=gate().aside)
    return memoryview(body).nbytes


def _copy(source: Path, target: int) -> int:
    """Copy a whole file, inside the kernel where it can; return the bytes copied."""
    size = 0
    with open(source, "rb", buffering=0) as file:
        try:
            while hasattr(os, "copy_file_range") and (copied := os.copy_file_range(file.fileno(), target, 1 << 30)):
                size += copied
        except OSError as exc:
            if exc.errno not in _COPY_INSTEAD:
                raise
        # The rest: everything where the kernel cannot, normally nothing.
        while chunk := file.read(_CHUNK):
            write_all(target, chunk)
            size += len(chunk)
    return size


def _lock(file: int, path: Path) -> None:
    """Take the lock, and give up in a bounded time: its holder may be stopped by a debugger."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    pause_s = 0.0005
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as exc:
            if time.monotonic() > deadline:
                raise StorageUnavailable(f"another process holds the lock: {path}") from exc
        except OSError as exc:
            raise StorageError(f"cannot lock {path}: {exc.strerror}", hint="conditional writes need a file system with flock()") from exc
        time.sleep(pause_s)
        pause_s = min(0.05, pause_s * 2)


def _etag(data: bytes) -> str:
    return sha256(data).hexdigest()


def _info(level: int, txids: tuple[TXID, TXID], status: os.stat_result) -> FileInfo:
    return FileInfo(
        level=level, min_txid=txids[0], max_txid=txids[1], size=status.st_size, created_at=created_at(status.st_mtime_ns // 1_000_000)
    )


@contextlib.contextmanager
def _translated(path: str | Path) -> Iterator[None]:
    """Turn the system's errors into ours, with the path in them."""
    try:
        yield
    except OSError as exc:
        raise _error(exc, path) from exc


def _error(exc: OSError, path: str | Path) -> StorageError:
    why = exc.strerror or str(exc)
    match exc.errno:
        case errno.EEXIST:
            return PreconditionFailed(os.fspath(path))
        case errno.ENOENT:
            return ObjectNotFound(os.fspath(path))
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AccessDenied(os.fspath(path), why.lower(), hint="check owner and permissions of the replica's directory")
        case errno.ENOTDIR | errno.EISDIR | errno.ELOOP | errno.ENAMETOOLONG:
            return StorageError(f"{why.lower()}: {path}", hint="the replica path must be a directory that nothing else uses")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageUnavailable(f"{why.lower()}: {path}", hint="free space on the replica's file system")
        case _:
            return StorageUnavailable(f"{why.lower()}: {path}")
