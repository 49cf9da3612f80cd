"""Make a file that appears at the output in one step, or not at all: what every restore does around its own work.

The temporary file lies beside the output, so that publishing is a rename. A database is three names: a `-wal` left over beside the
output would be replayed into the restored file, so it is moved aside *before* the rename and deleted after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

from replicator.atomic import sync_directory
from replicator.errors import IntegrityCheckFailed, NonContiguous, ObjectNotFound, OutputExists
from replicator.restores import Announcement, announce

__all__ = ["IntegrityCheck", "restore_into", "temporary_paths"]

T = TypeVar("T")

IntegrityCheck = Literal["none", "quick", "full"]
SIDE_FILES = ("-wal", "-shm", "-journal")
REPLANS = 2


def restore_into(
    output: Path,
    fill: Callable[[int, Announcement], T],
    *,
    force: bool = False,
    integrity_check: IntegrityCheck = "none",
    published: Callable[[T], None] | None = None,
    restores_folder: Path | None = None,
) -> T:
    """Let `fill` write a file, and publish it as `output`. Either all of it stands there afterwards, or nothing has changed.

    Args:
        fill: plans, announces the plan, writes the empty file whose descriptor it gets, and returns what came of it. Called again, with
            an empty file, when an object has vanished meanwhile: there may be another way to the same state.
        force: replace what stands at the output; its mode and owner are kept (0600 otherwise).
        integrity_check: let SQLite check the file before it is published.
        published: called when the output has its name, while it still has its temporary name too (see `temporary_paths`).
        restores_folder: where running restores are noted for retention; the user's own when None.

    Raises:
        OutputExists: a non-empty file, or a left-over `-wal` or `-journal`, stands there.
        IntegrityCheckFailed, and what `fill` raises.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    _refuse_existing(output, force)
    with announce(restores_folder) as announcement:
        for attempt in range(REPLANS + 1):
            try:
                return _attempt(output, fill, announcement, force=force, integrity_check=integrity_check, published=published)
            except (ObjectNotFound, NonContiguous):
                if attempt == REPLANS:
                    raise
                # Retention runs meanwhile: there is another way to the same state.
    raise AssertionError("unreachable")


def _attempt(
    output: Path,
    fill: Callable[[int, Announcement], T],
    announcement: Announcement,
    *,
    force: bool,
    integrity_check: IntegrityCheck,
    published: Callable[[T], None] | None,
) -> T:
    with _temporary_file(output) as (temporary, file):
        result = fill(file, announcement)
        os.fsync(file)
        if integrity_check != "none":
            _check(temporary, integrity_check)
        _publish(temporary, output, force)
        if published is not None:
            published(result)
    return result


@contextlib.contextmanager
def _temporary_file(output: Path) -> Iterator[tuple[Path, int]]:
    """Yield path and descriptor of the file to restore into. It loses this name at the end."""
    path, file = _create_temporary(output)
    with contextlib.ExitStack() as last:  # all of it, whichever fails; the file itself goes after what lies beside it
        last.callback(os.close, file)
        for suffix in ("", *SIDE_FILES):
            last.callback(path.with_name(path.name + suffix).unlink, missing_ok=True)
        yield path, file


def _create_temporary(output: Path) -> tuple[Path, int]:
    """Create the file to restore into, with a lock that tells `_sweep` that this restore lives."""
    while True:
        path = output.with_name(f".{output.name}.{secrets.token_hex(6)}.restore")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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
                path.unlink(missing_ok=True)
            finally:
                os.close(file)
            raise
        if named:
            return path, file
        os.close(file)


def _sweep(output: Path) -> None:
    """Delete what killed restores into `output` left, and put back what they had moved aside. Live ones hold a lock on theirs."""
    for path in temporary_paths(output):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _put_back(path, output)
            for suffix in (*SIDE_FILES, ""):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
    start = f".{output.name}."
    for path in output.parent.iterdir():
        base, mark, suffix = path.name.rpartition(".restore-")
        if path.name.startswith(start) and mark and f"-{suffix}" in SIDE_FILES and not path.with_name(f"{base}.restore").exists():
            path.unlink(missing_ok=True)  # what was moved aside for a file that has its name now


def temporary_paths(output: Path) -> list[Path]:
    """Return the temporary files that restores into `output` have, or left behind when they were killed."""
    start = f".{output.name}."
    return [path for path in output.parent.iterdir() if path.name.startswith(start) and path.name.endswith(".restore")]


def _refuse_existing(output: Path, force: bool) -> None:
    if output.is_dir():
        raise OutputExists(output)
    if force:
        return
    for suffix in ("", "-wal", "-journal"):
        path = output.with_name(output.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_size:
                raise OutputExists(path)


def _check(path: Path, kind: IntegrityCheck) -> None:
    """Let SQLite check a file that is not trusted."""
    connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=rw", uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("PRAGMA mmap_size=0")
        pragma = "quick_check" if kind == "quick" else "integrity_check"
        message = str(connection.execute(f"PRAGMA {pragma}(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        message = str(error)
    finally:
        connection.close()
    if message != "ok":
        raise IntegrityCheckFailed(path, message)


def _publish(temporary: Path, output: Path, force: bool) -> None:
    try:
        found = output.stat()
    except FileNotFoundError:
        found = None
    if found is not None:
        os.chmod(temporary, found.st_mode & 0o7777)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):
                os.chown(temporary, found.st_uid, found.st_gid)
    replaces = force or (found is not None and found.st_size == 0)
    try:
        for suffix in SIDE_FILES:
            side = output.with_name(output.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                if not force and suffix != "-shm" and side.lstat().st_size:
                    raise OutputExists(side)
                side.rename(temporary.with_name(temporary.name + suffix))
        if replaces:
            os.replace(temporary, output)
        else:
            try:
                os.link(temporary, output)
            except FileExistsError:
                raise OutputExists(output) from None
    except BaseException:
        with contextlib.suppress(OSError):  # where this cannot be told now, `_sweep` does it
            if not replaces or temporary.exists():  # else the rename was done, and reported as failed
                _put_back(temporary, output)
        raise
    sync_directory(output.parent)


def _put_back(temporary: Path, output: Path) -> None:
    """Give the database that was not replaced its side files again: the newest of it may be in its WAL."""
    if not output.exists() or output.samefile(temporary):
        return
    for suffix in SIDE_FILES:
        side = output.with_name(output.name + suffix)
        with contextlib.suppress(OSError):
            if not side.exists():
                temporary.with_name(temporary.name + suffix).rename(side)
