"""`each_failure`: every step that some code takes fails once, one after the other, until it comes through.

    for failure in each_failure():
        prepare()
        with failure, contextlib.suppress(OSError, ReplicatorError, sqlite3.Error):
            act()                        # its first step fails, then its second one, ...
        check()                          # what must hold whichever failed

The last round is the one in which nothing failed any more, so that `act` must have come through there. SQLite tests itself in this way.

**Steps** are the calls by which code meets the world, of these kinds:

| kind | calls | how one fails |
|---|---|---|
| `FILES` | `open`, those of `os` that read, write, name, sync, list, or ask about files, `flock`, `mmap.mmap` | EIO; ENOSPC where it needs room, EMFILE where a descriptor |
| `SQLITE` | `sqlite3.connect`, `Connection.execute` | `sqlite3.OperationalError`: disk I/O error, unable to open |
| `NETWORK` | connecting, sending and receiving with sockets, looking up names | `ConnectionResetError`, and the connection is at its end; `socket.gaierror` |
| `THREADS` | `threading.Thread.start` | `RuntimeError`, as where the system has no more of them |
| `PROCESSES` | `subprocess.Popen` | `BlockingIOError` |
| `CLOCK` | `time.time`, `time.time_ns` | no error: the wall clock is wrong by `jump_s` |

Only calls count that are made, directly or through other modules, by code of the packages under test, and none while a module is imported. Threads count, too.

**How a step fails.** `REFUSED`: nothing was done. `UNKNOWN`: it was done, a write in part, and reported as failed: what an error means where a disk or a file
server is in trouble. `SHORT`: only writes fail, and no error comes: half of the bytes are written, and the number of these returned. `close()` always closes, and
fails only for files that may be written: the others have nothing to lose. `KILLED`: the process kills itself (SIGKILL) instead of the step; for a child of the test.

While no failure is being made nothing is replaced, but for the class of the connections that are made between two rounds of `each_failure`, so that a connection
which is older than a failure can fail, too: the code under test pays nothing for it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import mmap
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from enum import StrEnum
from types import TracebackType
from typing import Any, ClassVar, Self

__all__ = ["FailNth", "How", "Kind", "each_failure"]

LIMIT = 10_000
_HERE = "replicator.testing"


class Kind(StrEnum):
    """A kind of steps. See the table in the module's docstring."""

    FILES = "files"
    SQLITE = "sqlite"
    NETWORK = "network"
    THREADS = "threads"
    PROCESSES = "processes"
    CLOCK = "clock"


class How(StrEnum):
    """How a step fails. See the module's docstring."""

    REFUSED = "refused"
    UNKNOWN = "unknown"
    SHORT = "short"
    KILLED = "killed"


# Where calls live, and with what they fail. Those that make a descriptor are never done before they fail: nobody could close it.
_WRITES = ("write", "pwrite", "pwritev")
_ROOM = ("ftruncate", "truncate", "posix_fallocate", "copy_file_range", "sendfile", "rename", "replace", "link", "mkdir")
_PLAIN = (
    "read", "pread", "fsync", "fdatasync", "unlink", "remove", "rmdir", "utime", "chmod", "fchmod", "chown", "fchown",
    "stat", "lstat", "fstat", "statvfs", "listdir", "close",
)  # fmt: skip
_MAKING = ("open", "scandir")
_SOCKET = ("connect", "send", "sendall", "recv", "recv_into")

_real_open = builtins.open


class FailNth:
    """Makes the n-th step of the code that runs in the block fail. A context manager, to be used once; one at a time.

    Attributes:
        steps: number of steps so far.
        failed: what failed, in words; empty while nothing has.
    """

    _active: ClassVar[FailNth | None] = None

    def __init__(
        self,
        n: int,
        *,
        ever: bool = False,
        how: How = How.REFUSED,
        kinds: Collection[Kind] = (Kind.FILES, Kind.SQLITE),
        packages: Collection[str] = ("replicator",),
        jump_s: float = 86400.0,
    ) -> None:
        """
        Args:
            n: number of the step that fails, from 0.
            ever: all steps after it fail, too.
            packages: whose steps count.
            jump_s: of `Kind.CLOCK`.
        """
        self.n, self.ever, self.how, self.kinds = n, ever, How(how), frozenset(map(Kind, kinds))
        self.steps = 0
        self.failed: list[str] = []
        self.entered = False
        self._packages, self._jump_s = frozenset(packages), jump_s
        self._lock = threading.Lock()
        self._files: dict[int, str] = {}
        self._replaced: list[tuple[Any, str, Any]] = []

    def __repr__(self) -> str:
        return f"FailNth({self.n}, ever={self.ever}, how={self.how}, failed={self.failed[:3]})"

    def __enter__(self) -> Self:
        if FailNth._active is not None:
            raise RuntimeError("another failure is being made")
        self._files = _open_files()
        FailNth._active, self.entered = self, True
        for kind in self.kinds:
            getattr(self, f"_replace_{kind}")()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        for place, name, real in reversed(self._replaced):
            if real is None:  # it was inherited
                delattr(place, name)
            else:
                setattr(place, name, real)
        self._replaced.clear()
        FailNth._active = None

    def leaks(self) -> list[str]:
        """Return the files that were opened since the block began and are open now."""
        return sorted(name for number, name in _open_files().items() if self._files.get(number) != name)

    # -- steps -------------------------------------------------------------------------------------------------------------------

    def _fails(self, what: str, subject: object) -> bool:
        """Count a step of the code under test; True when it is one that fails."""
        if not self._is_ours():
            return False
        with self._lock:
            number, self.steps = self.steps, self.steps + 1
            if number != self.n and not (self.ever and number > self.n):
                return False
            if self.how is How.KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            self.failed.append(f"{what} {_words(subject)}".strip())
            return True

    def _is_ours(self) -> bool:
        frame = sys._getframe(2)
        found = False
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return False
            name = frame.f_globals.get("__name__") or ""
            if not found and name != __name__ and name.partition(".")[0] in self._packages:
                if name == _HERE or name.startswith(f"{_HERE}."):
                    return False
                found = True
            frame = frame.f_back  # type: ignore[assignment]
        return found

    def _replace(self, place: Any, name: str, new: Any) -> None:
        self._replaced.append((place, name, vars(place).get(name)))
        setattr(place, name, new)

    def _counted(self, place: Any, name: str, error: Callable[[], BaseException], *, does: bool = True) -> None:
        """Replace a function by one that may fail. `does`: it may be done and reported as failed."""
        if not hasattr(place, name):
            return
        real, what = getattr(place, name), f"{getattr(place, '__name__', '')}.{name}"

        def call(*arguments: Any, **keywords: Any) -> Any:
            if (name == "close" and not _may_be_written(arguments[0])) or not self._fails(what, arguments[0] if arguments else ""):
                return real(*arguments, **keywords)
            if name == "close" or (does and self.how is How.UNKNOWN):
                real(*arguments, **keywords)
            raise error()

        self._replace(place, name, call)

    # -- kinds -------------------------------------------------------------------------------------------------------------------

    def _replace_files(self) -> None:
        for name in filter(os.__dict__.__contains__, _WRITES):
            self._replace(os, name, self._writing(name, getattr(os, name)))
        if self.how is How.SHORT:
            return
        for name in _ROOM:
            self._counted(os, name, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        for name in _PLAIN:
            self._counted(os, name, lambda: OSError(errno.EIO, os.strerror(errno.EIO)))
        for name in _MAKING:
            self._counted(os, name, lambda: OSError(errno.EMFILE, os.strerror(errno.EMFILE)), does=False)
        self._counted(fcntl, "flock", lambda: OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)), does=False)
        real_map = mmap.mmap
        failure = self

        class Map(real_map):  # type: ignore[valid-type,misc]
            def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
                if failure._fails("mmap.mmap", ""):
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
                return super().__new__(cls, *arguments, **keywords)

        self._replace(mmap, "mmap", Map)
        self._replace(builtins, "open", self._opening)
        self._replace(io, "open", self._opening)

    def _writing(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(file: int, data: Any, *rest: Any) -> int:
            view = memoryview(b"".join(data) if name == "pwritev" else data).cast("B")
            if (self.how is How.SHORT and len(view) < 2) or not self._fails(f"os.{name}", file):
                return real(file, data, *rest)
            if self.how is How.REFUSED:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            part = view[: len(view) // 2]
            half = real(file, [part] if name == "pwritev" else part, *rest)
            if self.how is How.SHORT:
                return half
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    def _opening(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """`open`, with files whose reads and writes are steps as well."""
        if not self._is_ours():
            return _real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if self._fails("open", file):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), file)
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        wrapped: Any
        if "+" in mode:
            wrapped = io.BufferedRandom(raw)
        else:
            wrapped = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        return wrapped if "b" in mode else io.TextIOWrapper(wrapped, encoding, errors, newline)

    def _replace_sqlite(self) -> None:
        real, failure = sqlite3.connect, self

        def connect(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
            if failure._fails("sqlite3.connect", arguments[0] if arguments else ""):
                raise sqlite3.OperationalError("unable to open database file")
            if failure._is_ours():
                keywords.setdefault("factory", _Connection)
            found: sqlite3.Connection = real(*arguments, **keywords)
            return found

        if self.how is not How.SHORT:
            self._replace(sqlite3, "connect", connect)

    def _replace_network(self) -> None:
        for name in _SOCKET:
            self._replace(socket.socket, name, self._talking(name, getattr(socket.socket, name)))
        self._counted(socket, "getaddrinfo", lambda: socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution"))

    def _talking(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(connection: socket.socket, *arguments: Any) -> Any:
            if not self._fails(f"socket.{name}", ""):
                return real(connection, *arguments)
            if self.how is How.UNKNOWN:
                real(connection, *arguments)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # a connection that failed is of no use any more
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

        return call

    def _replace_threads(self) -> None:
        self._counted(threading.Thread, "start", lambda: RuntimeError("can't start new thread"), does=False)

    def _replace_processes(self) -> None:
        self._counted(subprocess.Popen, "__init__", lambda: BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), does=False)

    def _replace_clock(self) -> None:
        for name, unit in (("time", 1), ("time_ns", 1_000_000_000)):
            self._replace(time, name, self._reading(name, getattr(time, name), unit))

    def _reading(self, name: str, real: Callable[[], Any], unit: int) -> Callable[[], Any]:
        def call() -> Any:
            now = real()
            return now + type(now)(self._jump_s * unit) if self._fails(f"time.{name}", "") else now

        return call


class _Raw(io.FileIO):
    """A file whose reads and writes are steps."""

    def __init__(self, failure: FailNth, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        super().__init__(file, mode, closefd, opener)
        self._failure = failure

    def _step(self, what: str) -> None:
        if self._failure is FailNth._active and self._failure._fails(what, str(self.name)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def readinto(self, buffer: Any, /) -> int | None:
        self._step("read")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._step("read")
        return super().readall()

    def read(self, size: int | None = -1, /) -> bytes:
        self._step("read")
        return super().read(-1 if size is None else size)

    def write(self, data: Any, /) -> int:
        if self._failure is FailNth._active and self._failure._fails("write", str(self.name)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


class _Connection(sqlite3.Connection):
    """One whose statements are steps of the failure that is being made, if any; it may be older than that."""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        failure = FailNth._active
        if failure is None or Kind.SQLITE not in failure.kinds or failure.how is How.SHORT or not failure._fails("execute", sql):
            return super().execute(sql, *arguments)
        if failure.how is How.UNKNOWN:
            super().execute(sql, *arguments)
        raise sqlite3.OperationalError("disk I/O error")


@contextlib.contextmanager
def _connections_that_may_fail() -> Iterator[None]:
    """Let all connections that are made during the block be of that kind: what an engine prepared before a failure is used during it."""
    real = sqlite3.connect

    def connect(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
        found: sqlite3.Connection = real(*arguments, **{"factory": _Connection, **keywords})
        return found

    sqlite3.connect = connect  # type: ignore[assignment]
    try:
        yield
    finally:
        sqlite3.connect = real


def each_failure(
    *,
    ever: bool = False,
    how: How = How.REFUSED,
    kinds: Collection[Kind] = (Kind.FILES, Kind.SQLITE),
    packages: Collection[str] = ("replicator",),
    jump_s: float = 86400.0,
    every: int = 1,
    limit: int = LIMIT,
) -> Iterator[FailNth]:
    """Yield failures of the first step, the second, and so on, up to the first that does not happen. Each is entered around the same work.

    Args:
        ever, how, kinds, packages, jump_s: as for `FailNth`.
        every: 3 takes each third step alone, for work that takes long.
        limit: more steps than that mean that the work has no end.

    Raises:
        RuntimeError: a failure was not entered, or there are more steps than `limit`.
    """
    with _connections_that_may_fail():
        for n in range(0, limit, every):
            failure = FailNth(n, ever=ever, how=how, kinds=kinds, packages=packages, jump_s=jump_s)
            yield failure
            if not failure.entered:
                raise RuntimeError("a failure must be entered: `with failure: ...`")
            if not failure.failed:
                return
    raise RuntimeError(f"no end after {limit} steps")


def _words(subject: object) -> str:
    if isinstance(subject, bytes | os.PathLike):
        return os.fsdecode(subject)
    return str(subject) if isinstance(subject, str | int) else ""


def _may_be_written(file: int) -> bool:
    try:
        return fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return True


def _open_files() -> dict[int, str]:
    """Return the names of the open descriptors of this process, as far as the system tells."""
    found = {}
    for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            if not os.path.isdir("/proc/self/fd"):
                found[int(name)] = name
    return found
