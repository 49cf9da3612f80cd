"""The thread of one replica, which stores what the engine hands out. A slow replica holds nobody else up."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from replicator.board import Board
from replicator.engine import Engine
from replicator.errors import LeaseError, ReplicaStateError, ReplicatorError, StorageUnavailable
from replicator.filling import SourceFailed, copy, store_image
from replicator.format.ltx import TXID
from replicator.gate import gate
from replicator.images import Images
from replicator.outbox import OutFile
from replicator.recent import RecentFiles
from replicator.replica import Replica

__all__ = ["Uploader", "start_thread", "waiting_snapshot"]

RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
WRONG_REPLICA_RETRY_S = 300.0
CATCH_UP_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


class Uploader:
    """Bring one replica to the newest TXID, again and again."""

    def __init__(self, replica: Replica, engine: Engine, board: Board, recent: RecentFiles, images: Images) -> None:
        self._replica, self._engine, self._board, self._recent, self._images = replica, engine, board, recent, images
        self._source_failed = False

    def run(self) -> None:
        """Body of the thread."""
        board, replica, failures = self._board, self._replica, 0
        while True:
            with board.changed:
                while not board.ends and (work := self._work()) is None:
                    board.uploads.wait()
                if board.ends:
                    return
            assert work is not None
            try:
                work()
            except LeaseError as error:
                replica.error = str(error)
                board.fail(error)
                return
            except SourceFailed as error:  # this replica is in reach, and there is something else to try: a full image
                self._note(error)
                continue
            except (ReplicatorError, OSError) as error:
                failures += 1
                delay = WRONG_REPLICA_RETRY_S if isinstance(error, ReplicaStateError) else RETRY_S[min(failures, len(RETRY_S)) - 1]
                self._wait(error, delay)
                continue
            except Exception as error:
                board.fail(error)
                return
            failures = 0
            replica.error = None
            board.note_stored(replica)
            for entry in board.tidy():
                self._engine.forget(entry)

    def _wait(self, error: Exception, delay_s: float) -> None:
        with self._board.changed:
            self._note(error)
            self._replica.retries += 1
            began = time.monotonic()
            while not self._board.ends and (left := began + min(delay_s, self._board.retry_s) - time.monotonic()) > 0:
                self._board.uploads.wait(left)

    def _note(self, error: Exception) -> None:
        with self._board.changed:
            if self._replica.error != str(error):
                log.warning("upload failed replica=%s error=%r", self._replica.url, str(error))
            self._replica.error = str(error)
            self._board.changed.notify_all()

    def _work(self) -> Callable[[], None] | None:
        """What to do next; None when the replica has everything."""
        board, replica = self._board, self._replica
        if board.state == "starting":
            return None
        if not replica.online:
            return lambda: self._engine.join_later(replica)
        home = board.replicas[0] if replica.lease is not None else replica
        if replica is not home:
            # The first replica decides who owns the database: the others only get what it has, so that they hold nobody else's.
            entry = board.next_for(replica)
            if home.txid <= replica.txid or (entry is not None and entry.txid > home.txid):
                return None
            if entry is None and home.txid < board.given_out and (replica.needs_image or self._source_failed):
                return None
        if replica.needs_image:
            return self._store_image
        if (entry := board.next_for(replica)) is not None:
            return lambda: self._store(entry)
        if (source := board.ahead_of(replica)) is not None and not self._source_failed:
            return lambda: self._copy(source)
        return self._store_image if board.given_out > replica.txid else None

    def _store(self, entry: Any) -> None:
        # For a directory nobody is waited for but the disk, and there the place is left (`storage/file.py`).
        is_work = self._replica.client.kind == "file" and all(isinstance(file.body, bytes) for file in entry.files)
        with gate().first if is_work else contextlib.nullcontext():
            self._replica.store(entry.files, entry.txid)
        for file in entry.files:
            if isinstance(file.body, bytes):
                self._recent.add(file.level, file.min_txid, file.max_txid, file.body)
        self._source_failed = False

    def _copy(self, source: Replica) -> None:
        try:
            copy(source, self._replica, self._engine.scratch)
        except SourceFailed:
            self._source_failed = True  # then a full image of the database itself does it
            raise

    def _store_image(self) -> None:
        log.info("replica lacks files and gets a full image replica=%s have=%016x", self._replica.url, self._replica.txid)
        with self._images.take(self._board.given_out) as image:
            home = self._board.replicas[0]
            if self._replica.lease is not None and self._replica is not home and image.max_txid > home.txid:
                raise StorageUnavailable(f"{home.url} must have TXID {image.max_txid:016x} first")
            store_image(self._replica, image, self._engine.scratch)
        self._source_failed = False


def waiting_snapshot(images: Images, replica: Replica, board: Board) -> Callable[[TXID], contextlib.AbstractContextManager[OutFile]]:
    """Return what a keeper takes its full images from: newer than a TXID, and only once the replica's raw files have come as far.

    An image of a TXID that is not stored yet would hide the file of another writer, if that one was faster.
    """

    @contextlib.contextmanager
    def take(newer_than: TXID) -> Iterator[OutFile]:
        with contextlib.ExitStack() as stack:
            with gate().aside():  # an image may take long to make, and its raw files to be stored
                image = stack.enter_context(images.take(TXID(newer_than + 1)))
                with board.changed:
                    board.changed.wait_for(lambda: board.ends or replica.txid >= image.max_txid, CATCH_UP_TIMEOUT_S)
                    if board.fatal is not None:
                        raise board.fatal
                    if replica.txid < image.max_txid:
                        raise StorageUnavailable(f"raw files have not reached TXID {image.max_txid:016x}: {replica.url}")
            yield image

    return take


def start_thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread.

    Raises:
        OSError: the system has no more of them.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, f"cannot start a thread: {error}") from error
    return thread
