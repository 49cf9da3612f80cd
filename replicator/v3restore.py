"""Read a 0.3 replica: list it, carry out a plan, and restore whichever of 0.3 and LTX data the replica's rules choose."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from replicator.chain import READ_BYTES, RETRY_DELAYS_S, SMALL_FILE_BYTES, Progress, list_files
from replicator.errors import AccessDenied, ConfigError, RestoreError, StorageError, StorageUnavailable, TimestampNotAvailable
from replicator.format.ltx import TXID, FileInfo
from replicator.format.v3 import SnapshotInfo, V3Info, time_of, time_text
from replicator.publish import IntegrityCheck, restore_into
from replicator.replay import Replay, Replayed
from replicator.restorer import RestoreResult, find_plan, plan_files, write_plan
from replicator.restores import Announcement
from replicator.storage.base import ReplicaClient
from replicator.storage.v3 import V3Client, v3_client
from replicator.v3plan import Generation, V3Plan, choose_format, plan_beside_ltx, plan_v3

__all__ = ["find_any_plan", "list_generations", "newest_first", "read_object", "restore_any", "stored_pieces", "write_v3"]

LISTINGS_AT_ONCE = 8

log = logging.getLogger(__name__)


def list_generations(client: V3Client, *, only: str | None = None) -> list[Generation]:
    """Return what is stored, without generations that hold nothing. `only`: that one and no other."""
    names = [name for name in client.list_generations() if only is None or name == only]

    def one(name: str) -> Generation:
        return Generation(name, tuple(client.list_snapshots(name)), tuple(client.list_segments(name)))

    if client.kind in ("file", "memory") or len(names) < 2:
        found = [one(name) for name in names]
    else:
        with ThreadPoolExecutor(min(LISTINGS_AT_ONCE, len(names)), "v3-list") as pool:
            found = [*pool.map(one, names)]
    return [generation for generation in found if generation.files]


def find_any_plan(
    client: ReplicaClient,
    *,
    txid: TXID | None = None,
    timestamp_ns: int | None = None,
    generation: str | None = None,
    index: int | None = None,
) -> list[FileInfo] | V3Plan:
    """List the replica and plan with its LTX or its 0.3 data: the former for a TXID, the latter for a generation or an index.

    Raises:
        NoBackups: nothing is stored.
        RestoreError: there is no way to the asked state.
        ConfigError: a generation or an index, of a backend that has none.
    """
    v3 = v3_client(client)
    if generation is not None or index is not None:
        if v3 is None:
            raise ConfigError(f"no generations of the 0.3 format can be read from {client.url}")
        return plan_v3(client.url, list_generations(v3, only=generation), generation=generation, index=index, timestamp_ns=timestamp_ns)
    timestamp = None if timestamp_ns is None else time_of(timestamp_ns + 999)  # "before" is the same for this and the next microsecond
    if v3 is None or txid is not None:
        return find_plan(client, txid=txid, timestamp=timestamp)
    files = list_files(client, accurate_times=timestamp is not None)
    ltx = [info.created_at for level in files.values() for info in level]
    try:
        generations = list_generations(v3)
    except AccessDenied as error:
        if not ltx:
            raise
        log.debug("0.3 data cannot be listed, only ltx files count replica=%s error=%s", client.url, error)
        generations = []
    if not generations:
        return plan_files(client.url, files, timestamp=timestamp)
    if not ltx:
        plan = plan_v3(client.url, generations, timestamp_ns=timestamp_ns)
        end_ns = next(item.newest_ns for item in generations if item.name == plan.generation)
        if timestamp_ns is not None and end_ns < timestamp_ns:
            log.info(
                "between two generations, restored is the end of the earlier one generation=%s end=%s", plan.generation, time_text(end_ns)
            )
        return plan
    if timestamp_ns is not None:
        oldest = min(*ltx, *(time_of(item.oldest_ns) for item in generations))
        newest = max(*ltx, *(time_of(item.newest_ns) for item in generations))
        if not oldest <= time_of(timestamp_ns) <= newest:
            raise TimestampNotAvailable(time_of(timestamp_ns), oldest=oldest, newest=newest)
    if choose_format(generations, files, timestamp_ns=timestamp_ns) == "0.3":
        return plan_beside_ltx(client.url, generations, timestamp_ns=timestamp_ns)
    return plan_files(client.url, files, timestamp=timestamp, check_bounds=False)


def newest_first(
    clients: Sequence[ReplicaClient], *, timestamp_ns: int | None = None, all_must_answer: bool = False
) -> list[ReplicaClient]:
    """Order the replicas of one database by how far they lead: one may lack what another one acknowledged.

    Args:
        timestamp_ns: by how close they come to it; else by their newest TXID (by time where one holds data of the 0.3 format).
        all_must_answer: one that cannot be asked is an error, because it may be ahead; else it comes last.

    Raises:
        StorageError: see `all_must_answer`.
    """
    if len(clients) < 2:
        return list(clients)
    plans: dict[int, list[FileInfo] | V3Plan] = {}
    silent: list[int] = []
    for number, client in enumerate(clients):
        try:
            plans[number] = find_any_plan(client, timestamp_ns=timestamp_ns)
        except RestoreError as error:
            log.warning("replica passed over, the next one is tried replica=%s error=%s", client.url, json.dumps(str(error)))
        except StorageError as error:
            if all_must_answer:
                raise
            silent.append(number)
            log.warning(
                "replica passed over, although it may be ahead of the others replica=%s error=%s", client.url, json.dumps(str(error))
            )
    by_time = timestamp_ns is not None or any(isinstance(plan, V3Plan) for plan in plans.values())

    def reach(number: int) -> float:
        plan = plans[number]
        if isinstance(plan, V3Plan):
            return plan.newest_ns / 1e9
        return plan[-1].created_at.timestamp() if by_time else plan[-1].max_txid

    rest = [number for number in range(len(clients)) if number not in plans and number not in silent]
    return [clients[number] for number in [*sorted(plans, key=lambda number: -reach(number)), *rest, *silent]]


def restore_any(
    client: ReplicaClient,
    output: Path,
    *,
    txid: TXID | None = None,
    timestamp_ns: int | None = None,
    generation: str | None = None,
    index: int | None = None,
    force: bool = False,
    integrity_check: IntegrityCheck = "none",
    parallelism: int = 8,
    progress: Callable[[Progress], None] | None = None,
    restores_folder: Path | None = None,
) -> RestoreResult:
    """Restore a database into `output` from LTX or 0.3 data (see `find_any_plan`). Otherwise as `restorer.restore_database`."""
    started = time.monotonic()

    def fill(file: int, announcement: Announcement) -> RestoreResult:
        plan = find_any_plan(client, txid=txid, timestamp_ns=timestamp_ns, generation=generation, index=index)
        if not isinstance(plan, V3Plan):
            announcement.plan(client.url, plan)
            return write_plan(client, plan, file, output, started=started, parallelism=parallelism, progress=progress)
        announcement.plan_generation(client.url, plan.generation, plan.snapshot.index)
        v3 = v3_client(client)
        assert v3 is not None
        state = write_v3(v3, plan, file, folder=output.parent, parallelism=parallelism, progress=progress)
        return RestoreResult(
            output=output,
            txid=TXID(0),
            timestamp=time_of(plan.newest_ns),
            page_size=state.page_size,
            commit=state.commit,
            files=len(plan.files),
            bytes_read=sum(info.size for info in plan.files),
            duration_s=time.monotonic() - started,
            url=client.url,
            generation=plan.generation,
            index=plan.index,
        )

    return restore_into(output, fill, force=force, integrity_check=integrity_check, restores_folder=restores_folder)


def write_v3(
    client: V3Client, plan: V3Plan, file: int, *, folder: Path, parallelism: int = 8, progress: Callable[[Progress], None] | None = None
) -> Replayed:
    """Write the state that a plan leads to into an empty file, given by its descriptor, and return which it is.

    Raises:
        CorruptReplica, MissingSegment: a file fails a check, or is not there; it is named.
        ObjectNotFound: a file is gone: list and plan again.
        StorageError: see there.
    """
    reading = stored_pieces(client, plan.files, parallelism=parallelism, progress=progress)
    with Replay(file, client.url, folder=folder) as replay, closing(reading):
        for info, pieces in reading:
            if isinstance(info, SnapshotInfo):
                replay.snapshot(info, pieces)
            else:
                replay.segment(info, pieces)
        return replay.finish()


def stored_pieces(
    client: V3Client, infos: Sequence[V3Info], *, parallelism: int = 8, progress: Callable[[Progress], None] | None = None
) -> Generator[tuple[V3Info, Iterable[bytes]], None, None]:
    """Yield each file with its stored bytes, in order. Small ones are read ahead, `parallelism` at once."""
    teller = _Teller(infos, progress)
    waiting: deque[tuple[V3Info, Future[bytes] | None]] = deque()
    coming = iter(infos)
    pool = ThreadPoolExecutor(max(1, parallelism), "v3-read")
    try:
        while True:
            while len(waiting) < 2 * parallelism and (info := next(coming, None)) is not None:
                small = info.size <= SMALL_FILE_BYTES
                waiting.append((info, pool.submit(_read_whole, client, info) if small else None))
            if not waiting:
                return
            info, task = waiting.popleft()
            yield info, teller.counted([task.result()] if task is not None else read_object(client, info))
    finally:
        pool.shutdown(cancel_futures=True)


def read_object(client: V3Client, info: V3Info, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[bytes]:
    """Yield the stored bytes, resuming at the offset after a dropped connection: three times for each file.

    Raises:
        ObjectNotFound, StorageError: at once.
        StorageUnavailable: after the last try.
    """
    at = tries = 0
    while True:
        try:
            with client.open(info, offset=at) as stream:
                while data := stream.read(READ_BYTES):
                    at += len(data)
                    yield data
                return
        except StorageUnavailable:
            if tries == len(RETRY_DELAYS_S):
                raise
            sleep(RETRY_DELAYS_S[tries])
            tries += 1


def _read_whole(client: V3Client, info: V3Info) -> bytes:
    return b"".join(read_object(client, info))


class _Teller:
    """Counts what was read, and says so."""

    def __init__(self, infos: Sequence[V3Info], progress: Callable[[Progress], None] | None) -> None:
        self._progress = progress
        self._files, self._bytes = len(infos), sum(info.size for info in infos)
        self._done_files = self._done_bytes = 0

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._done_bytes += len(piece)
            self._tell()
            yield piece
        self._done_files += 1
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(Progress(self._done_files, self._files, self._done_bytes, self._bytes))
