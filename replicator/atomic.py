"""Write a file so that a crash leaves the old one, or the new one, and never a part.

The order is always the same: a temporary name in the same directory, write, fsync, give it the final name, fsync the directory. The final
name comes from `rename()`, which replaces what stands there, or from `link()`, which creates or fails: the create-if-absent of file systems.

A crashed writer leaves its temporary file behind. Every writer holds a shared `flock` on its temporary file for as long as it lives, so
`sweep` can tell a dead one by taking the exclusive lock; it needs neither process ids nor clocks. Between creating and locking its file a
writer may be swept: it then finds that its file has no name any more and starts over.

Nothing here knows what is written. Errors are plain `OSError`s; callers say what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = [
    "AtomicFile",
    "begin_flush",
    "is_temporary",
    "link_file",
    "make_directories",
    "sweep",
    "sync_directory",
    "sync_file",
    "write_all",
    "write_file",
]

_PREFIX = ".pyrepl-"
_SUFFIX = ".tmp"
_CREATE_ATTEMPTS = 8


class AtomicFile:
    """A new file that gets its final name when the `with` block ends without an exception, and disappears when it does not.

    The directory is opened once and used by descriptor, so that the temporary and the final name are in the same place even if somebody
    moves the directory meanwhile. The descriptor is not kept for the next file: writing into a directory that was moved away would be
    a write that nobody finds, and opening it costs microseconds beside an fsync.

    Args:
        mode: permissions before the umask. 0600: a copy of a database is as secret as the database.
        overwrite: replace what stands at `path`; else `FileExistsError` when the block ends.
        mtime_ns: modification time, set before the file gets its name.
        waiting: makes a context manager that is entered, once, while the disk is waited for.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mode: int = 0o600,
        overwrite: bool = True,
        mtime_ns: int | None = None,
        waiting: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._folder, self._final = os.path.split(path)  # a `Path` of each costs more than writing a small file
        self._mode, self._overwrite, self._mtime_ns, self._waiting = mode, overwrite, mtime_ns, waiting
        self._directory = self._file = -1
        self._name = ""

    def __enter__(self) -> Self:
        self._directory = _open_directory(self._folder or os.curdir)
        try:
            self._file, self._name = _create_temporary(self._directory, self._mode)
        except BaseException:
            os.close(self._directory)
            raise
        return self

    @property
    def temporary_path(self) -> Path:
        """Where the file is until it gets its name, for a check that must open it by path."""
        return Path(self._folder, self._name)

    def fileno(self) -> int:
        """Return the descriptor, for positioned writes. It belongs to this object."""
        return self._file

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data` at the current position."""
        write_all(self._file, data)
        return len(data)

    def discard(self) -> None:
        """Give the file up, in place of the end of the block: for one that is only read by others while it is open, and never gets its name."""
        try:
            _unlink_missing_ok(self._name, self._directory)
        finally:
            self._close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self._publish()
        finally:
            self._close()

    def _close(self) -> None:
        try:
            os.close(self._file)
        finally:
            os.close(self._directory)

    def _publish(self) -> None:
        with self._waiting():
            try:
                if self._mtime_ns is not None:
                    os.utime(self._file, ns=(self._mtime_ns, self._mtime_ns))
                sync_file(self._file)
                _give_name(self._name, self._final, self._directory, overwrite=self._overwrite)
            except BaseException:
                _unlink_missing_ok(self._name, self._directory)
                raise
            sync_file(self._directory)


def write_file(
    path: str | Path,
    data: bytes | bytearray | memoryview,
    *,
    mode: int = 0o600,
    overwrite: bool = True,
    mtime_ns: int | None = None,
    waiting: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Write a whole file durably. See `AtomicFile` for the arguments."""
    with AtomicFile(path, mode=mode, overwrite=overwrite, mtime_ns=mtime_ns, waiting=waiting) as file:
        file.write(data)


def link_file(source: str | Path, path: str | Path, *, overwrite: bool = True, mtime_ns: int | None = None) -> int:
    """Give a complete file a second name, durably, without copying it. Return its size in bytes.

    The bytes are then shared: the source must never be changed in place again.

    Raises:
        FileExistsError: not `overwrite`, and something stands at `path`.
        OSError: EXDEV, EMLINK, EPERM, ELOOP (a symbolic link) and others where only a copy helps; nothing has changed then.
    """
    path = Path(path)
    file = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(source))
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if mtime_ns is not None and found.st_mtime_ns != mtime_ns:
            os.utime(file, ns=(mtime_ns, mtime_ns))
        sync_file(file)
        directory = _open_directory(path.parent)
        try:
            if overwrite:
                name = _temporary_name()
                os.link(source, name, dst_dir_fd=directory, follow_symlinks=False)
                try:
                    os.rename(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
                finally:
                    # rename() does nothing at all when both names already are the same file.
                    _unlink_missing_ok(name, directory)
            else:
                os.link(source, path.name, dst_dir_fd=directory, follow_symlinks=False)
            sync_file(directory)
        finally:
            os.close(directory)
        return found.st_size
    finally:
        os.close(file)


def make_directories(path: str | Path, mode: int = 0o755) -> list[Path]:
    """Create a directory and its missing parents so that they survive a crash, and return those that were missing, from the top.

    Existing ones are left as they are.
    """
    path = Path(path)
    missing = []
    for ancestor in (path, *path.parents):
        if ancestor.is_dir():
            break
        missing.append(ancestor)
    missing.reverse()
    for directory in missing:
        try:
            os.mkdir(directory, mode)
        except FileExistsError:
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None
        # Also when another process was faster: it may not have come to its own fsync yet.
        sync_directory(directory.parent)
    return missing


def sweep(directory: str | Path) -> int:
    """Delete the temporary files of writers that are dead, and return how many. Live ones are left alone, and so are foreign files.

    Raises:
        OSError: the directory cannot be read.
    """
    swept = 0
    opened = _open_directory(directory)
    try:
        for name in filter(is_temporary, os.listdir(opened)):
            try:
                file = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened)
            except OSError:
                continue  # gone, or not ours to open
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=opened)
                swept += 1
            except OSError:
                pass  # its writer lives, or the file system has no locks and nobody can know
            finally:
                os.close(file)
    finally:
        os.close(opened)
    return swept


def is_temporary(name: str) -> bool:
    """Say whether a file name is one that this module gives to temporary files."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def sync_file(file: int) -> None:
    """Bring a file or directory, given by its descriptor, to stable storage."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:  # macOS: fsync() stops at the drive's cache
        try:
            fcntl.fcntl(file, full_sync)
            return
        except OSError:
            pass  # a file system without it; fsync() is then the best there is
    os.fsync(file)


def sync_data(file: int) -> None:
    """Bring the bytes of a file to stable storage, of what describes it only what is needed to read them."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(file)


def begin_flush(file: int, at: int, size: int) -> None:
    """Let the disk begin with bytes that were just written, so that `sync_file` has less to wait for. Changes nothing else.

    The advice says that the bytes are not needed any more. Linux begins to write them, and drops from its cache only what is written already.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, at, size, os.POSIX_FADV_DONTNEED)


def sync_directory(path: str | Path) -> None:
    """Bring the names in a directory to stable storage."""
    directory = _open_directory(path)
    try:
        sync_file(directory)
    finally:
        os.close(directory)


def write_all(file: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`; a single `write()` may take a part of it."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(file, rest) :]


def _open_directory(path: str | Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _temporary_name() -> str:
    return f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def _create_temporary(directory: int, mode: int) -> tuple[int, str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_CREATE_ATTEMPTS):
        name = _temporary_name()
        try:
            file = os.open(name, flags, mode, dir_fd=directory)
        except FileExistsError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)  # a sweeper has it in its hands and will delete it
            continue
        except OSError:
            pass  # no locks on this file system: sweepers cannot lock either, and leave it alone
        try:
            named = os.fstat(file).st_nlink
        except BaseException:
            try:
                _unlink_missing_ok(name, directory)
            finally:
                os.close(file)
            raise
        if named:
            return file, name
        os.close(file)
    raise FileExistsError(errno.EEXIST, "cannot create a temporary file")


def _give_name(temporary: str, name: str, directory: int, *, overwrite: bool) -> None:
    if overwrite:
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    else:
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        os.unlink(temporary, dir_fd=directory)


def _unlink_missing_ok(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
