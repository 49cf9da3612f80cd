"""Which files do the restores need that run on this machine now? So that retention does not delete them under their hands.

Each running restore keeps one small file in a folder of the user, `$XDG_RUNTIME_DIR/pyrepl/restores` or `<tmp>/pyrepl-<uid>/restores`,
with the replica's URL and the planned files. It holds an exclusive `flock` on that file for as long as it lives, which is how readers tell
the living from the dead: no process ids, no clocks. A plan that changes is a new file with a new lock, renamed over the old one.

This is a courtesy, not a lock: restores of other users and other machines are not seen, a folder that cannot be used or trusted is
noted at debug level, and a restore whose file is gone plans again anyway.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from replicator.atomic import write_all
from replicator.format.ltx import TXID, FileInfo

__all__ = ["Announcement", "announce", "default_folder", "planned", "planned_generations"]

MAX_FILES = 1 << 16
MAX_BYTES = 4 << 20
MAX_RESTORES = 1000
REREADS = 5

log = logging.getLogger(__name__)


def default_folder(environ: Mapping[str, str]) -> Path:
    """Return where this user's restores are noted. Nothing is created."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime, "pyrepl", "restores")
    return Path(tempfile.gettempdir(), f"pyrepl-{os.geteuid()}", "restores")


@contextlib.contextmanager
def announce(folder: Path | None = None) -> Iterator[Announcement]:
    """Keep a note of a restore for as long as the block runs. `folder`: the user's own when None."""
    announcement = Announcement(default_folder(os.environ) if folder is None else folder)
    try:
        yield announcement
    finally:
        announcement.withdraw()


class Announcement:
    """One restore's note; empty until `plan` is called."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"{secrets.token_hex(8)}.json"
        self._file = -1

    def plan(self, url: str, files: Iterable[FileInfo]) -> None:
        """Note what will be read, in place of what was noted before. Never raises `OSError`."""
        triples = [[info.level, info.min_txid, info.max_txid] for info, _ in zip(files, range(MAX_FILES), strict=False)]
        self._note({"url": url, "files": triples})

    def plan_generation(self, url: str, generation: str, index: int) -> None:
        """Note that a generation of the 0.3 format will be read from `index` on. Otherwise as `plan`."""
        self._note({"url": url, "files": [], "generation": generation, "index": index})

    def _note(self, document: Mapping[str, object]) -> None:
        try:
            directory = _open_folder(self._folder, create=True)
            try:
                file = _write(directory, self._name, json.dumps(document).encode())
            finally:
                os.close(directory)
        except OSError as error:
            log.debug("restore is not announced folder=%s error=%s", self._folder, error)
            return
        old, self._file = self._file, file
        if old >= 0:
            with contextlib.suppress(OSError):
                os.close(old)

    def withdraw(self) -> None:
        """Remove the note."""
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            directory = _open_folder(self._folder, create=False)
            try:
                os.unlink(self._name, dir_fd=directory)
            finally:
                os.close(directory)
        file, self._file = self._file, -1
        with contextlib.suppress(OSError):
            os.close(file)


def planned(url: str, *, folder: Path | None = None) -> set[tuple[int, TXID, TXID]]:
    """Return level, min TXID and max TXID of each file that a restore running on this machine may still read.

    Args:
        url: the replica, as `ReplicaClient.url` says it.
        folder: the user's own when None.
    """
    found: set[tuple[int, TXID, TXID]] = set()
    for document in _notes(url, folder):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found |= {(int(level), TXID(int(low)), TXID(int(high))) for level, low, high in document["files"][:MAX_FILES]}
    return found


def planned_generations(url: str, *, folder: Path | None = None) -> dict[str, int]:
    """Return the generations of the 0.3 format that a restore running on this machine may still read, and the lowest index it reads there.

    Arguments as those of `planned`.
    """
    found: dict[str, int] = {}
    for document in _notes(url, folder):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            generation, index = str(document["generation"]), int(document["index"])
            found[generation] = min(index, found.get(generation, index))
    return found


def _notes(url: str, folder: Path | None) -> Iterator[dict[str, Any]]:
    folder = default_folder(os.environ) if folder is None else folder
    try:
        directory = _open_folder(folder, create=False)
    except FileNotFoundError:
        return
    except OSError as error:
        log.debug("announced restores cannot be read folder=%s error=%s", folder, error)
        return
    try:
        for name in sorted(os.listdir(directory))[:MAX_RESTORES]:
            data = _read_or_sweep(directory, name)
            with contextlib.suppress(ValueError, KeyError, TypeError):
                document = json.loads(data)
                if document["url"] == url:
                    yield document
    finally:
        os.close(directory)


def _open_folder(folder: Path, *, create: bool) -> int:
    """Open the folder and its parent without following links, and refuse what another user could write to."""
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder.parent, 0o700)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    parent = os.open(folder.parent, flags)
    try:
        _check_private(parent, folder.parent)
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder.name, 0o700, dir_fd=parent)
        opened = os.open(folder.name, flags, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        _check_private(opened, folder)
    except OSError:
        os.close(opened)
        raise
    return opened


def _check_private(directory: int, path: Path) -> None:
    found = os.fstat(directory)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise OSError(errno.EPERM, "not a private folder of this user", str(path))


def _write(directory: int, name: str, data: bytes) -> int:
    """Write a locked file and return its descriptor, which holds the lock."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = f".{secrets.token_hex(8)}"
        file = os.open(temporary, flags, 0o600, dir_fd=directory)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_nlink:  # else a sweeper found it before it was locked
                    write_all(file, data)
                    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _read_or_sweep(directory: int, name: str) -> bytes:
    """Return a note's bytes if its restore lives; delete it otherwise."""
    data = None
    for _ in range(REREADS):  # again when a newer plan took the name meanwhile
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            break  # withdrawn meanwhile, or not a note
        try:
            data = _read_if_locked(directory, name, file)
        except OSError as error:
            log.debug("announced restore cannot be read name=%s error=%s", name, error)
            break
        finally:
            os.close(file)
        if data is not None:
            break
    return data or b""


def _read_if_locked(directory: int, name: str, file: int) -> bytes | None:
    """Return the bytes of a note that is locked. One that is not is deleted; None if it has lost its name to a newer one."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        return b""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return b"" if name.startswith(".") else os.pread(file, MAX_BYTES, 0)
    if os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino != os.fstat(file).st_ino:
        return None
    os.unlink(name, dir_fd=directory)
    return b""
