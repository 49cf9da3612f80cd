"""`PowerCut`: what a disk may hold after the power was lost, for the files that Python code writes.

    with PowerCut(folder) as power:
        power.cut_after(12)              # the twelfth call that changes something in the folder is cut in half, and nothing works after it
        with contextlib.suppress(OSError):
            run()
        power.disk(other, seed=1)        # one of the states that the disk may be in now

**How.** While the block runs, the functions of the `os` module that change files are replaced by ones that also keep a record, and so is `mmap.mmap`; only
calls that concern the folder are looked at. The record knows for each file what was written and what was synced.

**The disk.** What was synced is there: bytes by `fsync` of the file (or `flush` of a map), names by `fsync` of their folder. Of the rest any part may be there:

* a write wholly, in part (sectors of 512 bytes, pages of a map), or not at all, whatever came after it;
* the changes of names in one folder up to some point, in their order, as journalling file systems keep them. So a new name can stand for a file without
  its bytes, and a name that was deleted can be back.

**What it covers**: everything that this package writes by itself - staged files, page table, journals of followed copies, restored files, replicas in
directories. `pathlib`, `shutil` and `tempfile` go through `os`, too. **What it does not cover**: files written by C code - SQLite's database, WAL and
journal - and by the built-in `open()`. They come out as they are at the moment of `disk()`, without the `-shm` file, as after a kill of the process. SQLite's own
promise for them (`synchronous`) is SQLite's to test.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

__all__ = ["PowerCut", "PowerLost"]

SECTOR = 512
MAP_PAGE = 4096
_WRITES = os.O_WRONLY | os.O_RDWR

_open, _close, _stat, _lstat, _fstat, _read = os.open, os.close, os.stat, os.lstat, os.fstat, os.pread
_Map = mmap.mmap


class PowerLost(OSError):
    """A call after the power was cut. Like an error of the disk for the code that meets it; nothing of what it does then has an effect."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the power was cut")


@dataclass(slots=True)
class _File:
    """What is known of one file. `done`: changes in order - (offset, bytes), or (size, None) for a truncation; the first `synced` are on the disk."""

    base: bytes = b""
    done: list[tuple[int, bytes | None]] = field(default_factory=list)
    synced: int = 0


@dataclass(slots=True)
class _Folder:
    """Changes of names in one folder: each has names, and the file or the inode of the folder that they stand for then; None for a name that goes.

    `base`: what the names stood for before their first change. `synced` as in `_File`.
    """

    base: dict[str, _Named] = field(default_factory=dict)
    done: list[dict[str, _Named]] = field(default_factory=list)
    synced: int = 0


_Named = _File | int | None


class PowerCut:
    """A record of what is done to the files in a folder. A context manager; one at a time.

    Attributes:
        calls: number of calls so far that changed something.
        is_lost: whether the power was cut.
    """

    _active: ClassVar[PowerCut | None] = None

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.calls = 0
        self.is_lost = False
        self._limit: int | None = None
        self._lock = threading.RLock()
        self._files: dict[tuple[int, int], _File] = {}
        self._folders: dict[int, _Folder] = {}
        self._maps: list[_RecordedMap] = []
        self._real: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Self:
        if PowerCut._active is not None:
            raise RuntimeError("another PowerCut is recording")
        for path, _, _ in os.walk(self.folder):
            self._folders[_stat(path).st_ino] = _Folder()
        PowerCut._active = self
        for name in ("open", "write", "pwrite", "ftruncate", "posix_fallocate", "copy_file_range", "sendfile", "fsync", "fdatasync"):
            self._replace(name, getattr(self, f"_on_{name}"))
        for name in ("unlink", "remove", "rename", "replace", "link", "mkdir", "rmdir"):
            kind = {"remove": "unlink", "replace": "rename", "rmdir": "unlink"}.get(name, name)
            self._replace(name, self._naming(name, kind))
        mmap.mmap = _RecordedMap  # type: ignore[misc]
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        mmap.mmap = _Map  # type: ignore[misc]
        for name, real in self._real.items():
            setattr(os, name, real)
        PowerCut._active = None

    def cut_after(self, calls: int) -> None:
        """Cut the power at the change after so many more: 0 for the next one."""
        with self._lock:
            self._limit = self.calls + calls

    def cut(self) -> None:
        """Cut the power now. Cutting twice does nothing."""
        with self._lock:
            if not self.is_lost:
                self.is_lost = True
                for mapped in self._maps:
                    mapped.note()

    def disk(self, target: str | os.PathLike[str], *, seed: int) -> None:
        """Write one of the states that the disk may be in to `target`, a folder that does not exist yet. The power is cut, if it is not yet.

        The same seed gives the same choices. Files that are open for a live SQLite connection are opened and closed here, which drops SQLite's
        locks: end everything that works in the folder before.
        """
        self.cut()
        with self._lock:
            self._copy(self.folder, Path(target), random.Random(seed))

    @staticmethod
    def copy_after_kill(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """Copy a folder as a killed process leaves it: everything that was written, and no `-shm` file. `target` must not exist."""
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*-shm"))

    # -- the disk ----------------------------------------------------------------------------------------------------------------

    def _copy(self, source: Path | None, target: Path, choose: random.Random, recorded: _Folder | None = None) -> None:
        target.mkdir()
        if source is not None and recorded is None:
            recorded = self._folders.get(_stat(source).st_ino)
        names: dict[str, _Named] = {}
        if recorded is not None:
            unsynced = len(recorded.done) - recorded.synced
            names.update(recorded.base)
            for change in recorded.done[: recorded.synced + choose.choice([0, unsynced, choose.randint(0, unsynced)])]:
                names.update(change)
        for name, what in names.items():
            if isinstance(what, _File):
                (target / name).write_bytes(_content(what, choose))
            elif what is not None:
                self._copy(self._where(what), target / name, choose, self._folders.get(what))
        for entry in sorted(source.iterdir()) if source is not None else ():
            if entry.name in names or entry.name.endswith("-shm") or entry.is_symlink():
                continue
            if entry.is_dir():
                self._copy(entry, target / entry.name, choose)
            elif entry.is_file():
                shutil.copyfile(entry, target / entry.name)

    def _where(self, inode: int) -> Path | None:
        return next((Path(path) for path, _, _ in os.walk(self.folder) if _stat(path).st_ino == inode), None)

    # -- the record --------------------------------------------------------------------------------------------------------------

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        if hasattr(os, name):
            self._real[name] = getattr(os, name)
            setattr(os, name, function)

    def _count(self) -> bool:
        """Count a change. False when it is the one in which the power goes; raises when it is gone."""
        if self.is_lost:
            raise PowerLost
        if self._limit is not None and self.calls >= self._limit:
            self.cut()
            return False
        self.calls += 1
        return True

    def _parent(self, path: Any, dir_fd: int | None) -> tuple[_Folder | None, str]:
        """Return the folder that a name is in, None when it is none of ours, and the name."""
        head, name = os.path.split(os.fsdecode(path).rstrip("/"))
        try:
            if dir_fd is not None and not os.path.isabs(head):
                inode = _fstat(dir_fd).st_ino if not head else _stat(head, dir_fd=dir_fd).st_ino
            else:
                inode = _stat(head or ".").st_ino
        except OSError:
            return None, name
        return self._folders.get(inode), name

    def _file(self, descriptor: int) -> _File | None:
        found = _fstat(descriptor)
        return self._files.get((found.st_dev, found.st_ino))

    def _known(self, path: Any, dir_fd: int | None) -> _Named:
        """Return what a name stands for, with the bytes that it has now when they were not known yet."""
        try:
            found = _lstat(path, dir_fd=dir_fd)
        except OSError:
            return None
        if stat.S_ISDIR(found.st_mode):
            return found.st_ino
        key = (found.st_dev, found.st_ino)
        if key not in self._files:
            self._files[key] = _File(_bytes_of(path, dir_fd) if stat.S_ISREG(found.st_mode) else b"")
        return self._files[key]

    def _on_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with self._lock:
            folder, name = self._parent(path, dir_fd) if flags & (_WRITES | os.O_CREAT) else (None, "")
            if folder is None:
                return _open(path, flags, mode, dir_fd=dir_fd)
            before = self._known(path, dir_fd)
            if (before is None or flags & os.O_TRUNC) and not self._count():
                raise PowerLost
            if self.is_lost:
                raise PowerLost
            descriptor = _open(path, flags, mode, dir_fd=dir_fd)
            found = _fstat(descriptor)
            folder.base.setdefault(name, before)
            if before is None:
                file = self._files[found.st_dev, found.st_ino] = _File()
                folder.done.append({name: file})
            elif isinstance(before, _File) and flags & os.O_TRUNC:
                before.done.append((0, None))
            return descriptor

    def _writing(self, descriptor: int, real: Callable[[], int], half: Callable[[], object], at: Callable[[], int]) -> int:
        with self._lock:
            file = self._file(descriptor)
            if file is None:
                return real()
            where = at()
            if not self._count():
                half()
                self._note_range(file, descriptor, where)
                raise PowerLost
            done = real()
            self._note_range(file, descriptor, where, done)
            return done

    def _note_range(self, file: _File, descriptor: int, at: int, size: int | None = None) -> None:
        data = _bytes_at(descriptor, at, _fstat(descriptor).st_size - at if size is None else size)
        if data:
            file.done.append((at, data))

    def _on_write(self, descriptor: int, data: Any, /) -> int:
        real = self._real["write"]
        view = memoryview(data).cast("B")
        return self._writing(
            descriptor,
            lambda: real(descriptor, data),
            lambda: real(descriptor, view[: len(view) // 2]),
            lambda: self._end_or_place(descriptor),
        )

    def _end_or_place(self, descriptor: int) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            return _fstat(descriptor).st_size
        return os.lseek(descriptor, 0, os.SEEK_CUR)

    def _on_pwrite(self, descriptor: int, data: Any, offset: int, /) -> int:
        real = self._real["pwrite"]
        view = memoryview(data).cast("B")
        return self._writing(
            descriptor, lambda: real(descriptor, data, offset), lambda: real(descriptor, view[: len(view) // 2], offset), lambda: offset
        )

    def _on_copy_file_range(self, src: int, dst: int, count: int, offset_src: int | None = None, offset_dst: int | None = None) -> int:
        real = self._real["copy_file_range"]
        place = (lambda: os.lseek(dst, 0, os.SEEK_CUR)) if offset_dst is None else (lambda: offset_dst)
        return self._writing(dst, lambda: real(src, dst, count, offset_src, offset_dst), lambda: None, place)

    def _on_sendfile(self, out_fd: int, in_fd: int, offset: int | None, count: int) -> int:
        real = self._real["sendfile"]
        if stat.S_ISSOCK(_fstat(out_fd).st_mode):
            return int(real(out_fd, in_fd, offset, count))
        return self._writing(out_fd, lambda: real(out_fd, in_fd, offset, count), lambda: None, lambda: os.lseek(out_fd, 0, os.SEEK_CUR))

    def _on_ftruncate(self, descriptor: int, size: int, /) -> None:
        self._resizing(descriptor, size, lambda: self._real["ftruncate"](descriptor, size))

    def _on_posix_fallocate(self, descriptor: int, offset: int, size: int, /) -> None:
        end = max(offset + size, _fstat(descriptor).st_size)
        self._resizing(descriptor, end, lambda: self._real["posix_fallocate"](descriptor, offset, size))

    def _resizing(self, descriptor: int, size: int, real: Callable[[], None]) -> None:
        with self._lock:
            file = self._file(descriptor)
            if file is not None and not self._count():
                raise PowerLost
            real()
            if file is not None:
                file.done.append((size, None))

    def _on_fsync(self, descriptor: Any, /) -> None:
        self._syncing(descriptor, self._real["fsync"])

    def _on_fdatasync(self, descriptor: Any, /) -> None:
        self._syncing(descriptor, self._real["fdatasync"])

    def _syncing(self, descriptor: Any, real: Callable[[Any], None]) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        with self._lock:
            found = _fstat(number)
            what = self._folders.get(found.st_ino) if stat.S_ISDIR(found.st_mode) else self._files.get((found.st_dev, found.st_ino))
            if what is None:
                real(descriptor)
                return
            if not self._count():
                raise PowerLost
            for mapped in self._maps:
                if mapped._recorded is what:
                    mapped.note()
            what.synced = len(what.done)

    def _naming(self, name: str, kind: str) -> Callable[..., None]:
        real = getattr(os, name, None)

        def call(path: Any, *more: Any, **options: Any) -> None:
            assert real is not None
            with self._lock:
                here = options.get("src_dir_fd", options.get("dir_fd"))
                there = options.get("dst_dir_fd")
                ends = (
                    [self._parent(path, here)] if kind in ("unlink", "mkdir") else [self._parent(path, here), self._parent(more[0], there)]
                )
                if all(folder is None for folder, _ in ends):
                    real(path, *more, **options)
                    return
                subject = self._known(path, here)
                before = [subject] if len(ends) == 1 else [subject, self._known(more[0], there)]
                if not self._count():
                    raise PowerLost
                real(path, *more, **options)
                if kind == "mkdir":
                    subject = _stat(path, dir_fd=here).st_ino
                    self._folders[subject] = _Folder()
                for (folder, old), what in zip(ends, before, strict=True):
                    if folder is not None:
                        folder.base.setdefault(old, what)
                self._note_names(kind, ends, subject)

        return call

    def _note_names(self, kind: str, ends: list[tuple[_Folder | None, str]], subject: _Named) -> None:
        (source, old), (target, new) = ends[0], ends[-1]
        if (kind == "unlink" or (kind == "rename" and source is not target)) and source is not None:
            source.done.append({old: None})
        if kind in ("mkdir", "link", "rename") and target is not None:
            target.done.append({old: None, new: subject} if kind == "rename" and source is target else {new: subject})


class _RecordedMap(_Map):
    """A map whose changed pages enter the record: as written, whenever the record asks, and as synced by `flush`."""

    _recorder: PowerCut | None = None
    _last: bytes = b""
    _recorded: _File

    def __new__(cls, fileno: int, length: int, *more: Any, **options: Any) -> Self:
        made = super().__new__(cls, fileno, length, *more, **options)
        recorder = PowerCut._active
        if recorder is not None and fileno >= 0 and (file := recorder._file(fileno)) is not None:
            made._recorder, made._recorded, made._last = recorder, file, made[:]
            recorder._maps.append(made)
        return made

    def note(self) -> None:
        """Enter what has changed since the last time."""
        now = self[:]
        for at in range(0, len(now), MAP_PAGE):
            if now[at : at + MAP_PAGE] != self._last[at : at + MAP_PAGE]:
                self._recorded.done.append((at, now[at : at + MAP_PAGE]))
        self._last = now

    def flush(self, *where: int) -> None:
        super().flush(*where)
        if self._recorder is not None:
            with self._recorder._lock:
                if not self._recorder.is_lost:
                    self.note()
                    self._recorded.synced = len(self._recorded.done)

    def close(self) -> None:
        if self._recorder is not None:
            with self._recorder._lock:
                if not self._recorder.is_lost:
                    self.note()
                self._recorder._maps.remove(self)
                self._recorder = None
        super().close()


def _content(file: _File, choose: random.Random) -> bytes:
    """Return bytes that a file may have."""
    data = bytearray(file.base)
    for change in file.done[: file.synced]:
        _apply(data, change)
    rest = file.done[file.synced :]
    match choose.randrange(3):
        case 0:
            return bytes(data)
        case 1:
            for change in rest:
                _apply(data, change)
            return bytes(data)
    if choose.random() < 0.5:
        choose.shuffle(rest)
    for at, piece in rest:
        match choose.randrange(3):
            case 0:
                _apply(data, (at, piece))
            case 1 if piece is not None:
                for start in range(0, len(piece), SECTOR):
                    if choose.random() < 0.5:
                        _apply(data, (at + start, piece[start : start + SECTOR]))
    return bytes(data)


def _apply(data: bytearray, change: tuple[int, bytes | None]) -> None:
    at, piece = change
    if piece is None:
        del data[at:]
        data.extend(bytes(at - len(data)))
        return
    data.extend(bytes(max(0, at - len(data))))
    data[at : at + len(piece)] = piece


def _bytes_of(path: Any, dir_fd: int | None) -> bytes:
    descriptor = _open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        return _bytes_at(descriptor, 0, _fstat(descriptor).st_size)
    finally:
        _close(descriptor)


def _bytes_at(descriptor: int, at: int, size: int) -> bytes:
    """Read back what is at a place of a file that may be open for writing only."""
    try:
        return _read(descriptor, size, at)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
    readable = _open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read(readable, size, at)
    finally:
        _close(readable)
