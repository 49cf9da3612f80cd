"""LTX files that are encoded but not yet on every replica, and the encoding itself.

A file is kept in memory while it is small, and in the staging folder (`<meta>/pyrepl/staged/`) when it is large or must survive this
process. A staged file is complete and synced under its final name; `*.tmp` is swept at start.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from replicator.atomic import begin_flush, make_directories
from replicator.budget import MemoryBudget
from replicator.format.checksum import page_checksums
from replicator.format.ltx import TXID, Encoder, Header, format_name, parse_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from replicator.tail import WALPosition

__all__ = ["EncodedPages", "Entry", "OutFile", "Spool", "Staging", "encode"]

SPOOL_BYTES = 8 << 20
FREE_BYTES = 64 << 10
BATCH_BYTES = 1 << 18
DISK_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, weakref_slot=True)
class OutFile:
    """One file to store. `body` is the whole file, or the path of a staged one."""

    level: int
    min_txid: TXID
    max_txid: TXID
    timestamp_ms: int
    body: bytes | Path

    @property
    def size(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield the bytes in pieces of `size`."""
        if isinstance(self.body, bytes):
            for at in range(0, len(self.body), size):
                yield self.body[at : at + size]
            return
        with self.body.open("rb") as file:
            while data := file.read(size):
                yield data

    def discard(self) -> None:
        """Remove the file, if the body is one."""
        if isinstance(self.body, Path):
            self.body.unlink(missing_ok=True)

    @property
    def staged_name(self) -> str:
        """The file's name in the staging folder, which says where it belongs."""
        return _staged_name(self.level, self.min_txid, self.max_txid)


@dataclass(frozen=True, slots=True)
class EncodedPages:
    """What the page table learns from an encoded file: its page numbers and their checksums."""

    pgnos: NDArray[np.uint32]
    checksums: NDArray[np.uint64]

    @classmethod
    def none(cls) -> EncodedPages:
        """Return an empty one."""
        import numpy as np

        return cls(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint64))

    def xor(self) -> int:
        """XOR of the checksums: for a full image, the checksum of the whole database."""
        import numpy as np

        return int(np.bitwise_xor.reduce(self.checksums))


@dataclass(frozen=True, slots=True)
class Entry:
    """The next TXID: its files in the order in which they must be stored, and the state after it.

    `whole`: it needs none of the entries before it.
    """

    txid: TXID
    files: tuple[OutFile, ...]
    encoded: EncodedPages
    page_size: int
    commit: int
    timestamp_ms: int
    position: WALPosition
    whole: bool = False

    @property
    def is_staged(self) -> bool:
        """True when all of it survives this process."""
        return all(isinstance(file.body, Path) for file in self.files)

    @property
    def memory_bytes(self) -> int:
        return sum(len(file.body) for file in self.files if isinstance(file.body, bytes))

    @property
    def staged_bytes(self) -> int:
        return sum(file.size for file in self.files if isinstance(file.body, Path))


class Staging:
    """The folder of staged files."""

    def __init__(self, folder: Path, *, limit_bytes: int, memory: MemoryBudget | None = None) -> None:
        """`memory`: shared with others, for files that are not in the folder; without it each may have `SPOOL_BYTES`."""
        self._folder = folder
        self._is_there = False
        self.limit_bytes = limit_bytes
        self.memory = memory
        for left in self.paths():
            if left.name.endswith(".tmp"):
                left.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """The folder, which is made when it is needed first: of most databases everything stays in memory."""
        if not self._is_there:
            make_directories(self._folder)
            self._is_there = True
        return self._folder

    def paths(self) -> list[Path]:
        """Return what is in the folder."""
        try:
            return [self._folder / name for name in os.listdir(self._folder)]
        except FileNotFoundError:
            return []

    def check_space(self) -> None:
        """Raise `OSError` (ENOSPC) when the disk is nearly full: the last of it belongs to the application."""
        if self._free_bytes() < DISK_RESERVE_BYTES:
            raise OSError(errno.ENOSPC, "the disk is nearly full", str(self._folder))

    def create(self, name: str) -> tuple[int, Path]:
        """Open a new temporary file for writing; `finish` or `discard` it. Raises `OSError` when the disk is nearly full."""
        self.check_space()
        path = self.folder / f"{name}.{secrets.token_hex(6)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o600), path

    def finish(self, file: int, path: Path) -> Path:
        """Make the file durable under its final name. It is closed in any case, and gone when that fails before it has its name."""
        final = path.with_suffix("").with_suffix("")
        try:
            try:
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(path, final)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return final

    def discard(self, file: int, path: Path) -> None:
        try:
            os.close(file)
        finally:
            path.unlink(missing_ok=True)

    def stage(self, entry: Entry) -> Entry:
        """Write the files of an entry that are in memory, so that it survives this process."""
        files = []
        for out in entry.files:
            body = out.body
            if isinstance(body, bytes):
                file, path = self.create(out.staged_name)
                try:
                    _write_all(file, body)
                except BaseException:
                    self.discard(file, path)
                    raise
                body = self.finish(file, path)
            files.append(replace(out, body=body))
        return replace(entry, files=tuple(files))

    def is_full(self) -> bool:
        """True when the bound of the folder is reached, or the disk is nearly full."""
        used = 0
        for path in self.paths():
            with contextlib.suppress(FileNotFoundError):
                used += path.stat().st_size
        return used >= self.limit_bytes or self._free_bytes() < DISK_RESERVE_BYTES

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._folder if self._is_there else self._folder.parent).free

    def files(self) -> list[tuple[int, TXID, TXID, Path]]:
        """Return (level, min TXID, max TXID, path) of the staged files, snapshots before raw files, in order of TXID."""
        found = []
        for path in self.paths():
            level, _, name = path.name.partition("-")
            txids = parse_name(name)
            if txids is not None and level.isdigit():
                found.append((int(level), *txids, path))
        return sorted(found, key=lambda item: (item[2], -item[0]))

    def remove(self, entry: Entry) -> None:
        """Forget the staged files of an entry that every replica holds."""
        for file in entry.files:
            if isinstance(file.body, Path):
                file.body.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything in it."""
        for path in self.paths():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


_File = TypeVar("_File", bound=OutFile)


class Spool:
    """Bytes in memory that move to a staged file when they become many, or when others need the memory."""

    def __init__(self, staging: Staging, name: str, *, limit_bytes: int = SPOOL_BYTES) -> None:
        self._staging, self._name, self._limit = staging, name, limit_bytes
        self._parts: list[bytes] = []
        self._size = self._taken = 0
        self._file = -1
        self._path = Path()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        before, self._size = self._size, self._size + len(data)
        if self._file >= 0:
            crossing = before // SPOOL_BYTES != self._size // SPOOL_BYTES
            if crossing:
                self._staging.check_space()
            _write_all(self._file, data)
            if crossing:
                begin_flush(self._file, before // SPOOL_BYTES * SPOOL_BYTES, SPOOL_BYTES)
            return
        self._parts.append(bytes(data))
        if self._size > self._limit or not self._take(len(data)):
            self._file, self._path = self._staging.create(self._name)
            for part in self._parts:
                _write_all(self._file, part)
            self._parts = []
            self._give()

    def _take(self, size: int) -> bool:
        """Take room in memory. What every database may have does not count: it is less than having it open costs."""
        if self._staging.memory is None or self._size <= FREE_BYTES:
            return True
        if not self._staging.memory.take(size):
            return False
        self._taken += size
        return True

    def _give(self) -> None:
        if self._staging.memory is not None:
            self._staging.memory.give(self._taken)
            self._taken = 0

    def finish(self, file: _File) -> _File:
        """Return a file with these bytes as its body; their memory is taken until nobody has it any more."""
        if self._file >= 0:
            opened, self._file = self._file, -1
            return replace(file, body=self._staging.finish(opened, self._path))
        made = replace(file, body=b"".join(self._parts))
        if self._staging.memory is not None:
            self._staging.memory.give_with(made, self._taken)
            self._taken = 0
        return made

    def discard(self) -> None:
        self._give()
        if self._file >= 0:
            self._staging.discard(self._file, self._path)
            self._file = -1


def encode(
    staging: Staging, level: int, header: Header, pages: Iterable[tuple[int, bytes | memoryview]], *, unique: bool = False
) -> tuple[OutFile, EncodedPages]:
    """Encode one LTX file from pages in ascending order.

    Args:
        unique: give the file, when it is one, a name of its own; else that of its place in the chain, by which `Staging.files` finds it.

    Raises:
        FormatError: the pages break a rule of the format.
        OSError: the staging folder cannot take it; nothing is left there.
    """
    import numpy as np

    spool = Spool(staging, f"{secrets.token_hex(8)}.ltx" if unique else _staged_name(level, header.min_txid, header.max_txid))
    pgnos, sums = array("I"), array("Q")
    try:
        encoder = Encoder(spool.write, header)
        following = iter(pages)
        while batch := list(itertools.islice(following, max(1, BATCH_BYTES // header.page_size))):
            encoder.pages(batch)
            pgnos.extend([pgno for pgno, _ in batch])
            sums.extend(page_checksums(batch))
        encoder.close()
        out = spool.finish(OutFile(level, header.min_txid, header.max_txid, header.timestamp_ms, b""))
    except BaseException:
        spool.discard()
        raise
    encoded = EncodedPages(np.frombuffer(pgnos, dtype=np.uint32), np.frombuffer(sums, dtype=np.uint64))
    return out, encoded


def _staged_name(level: int, min_txid: TXID, max_txid: TXID) -> str:
    return f"{level}-{format_name(min_txid, max_txid)}"


def _write_all(file: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
