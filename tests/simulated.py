"""A replica that ages in virtual time: writes, uploads, compactions, full images and retention, without threads, files or waiting.

The database is a handful of pages whose content is the TXID that wrote them last, so that every past state is known.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from replicator.chain import list_files
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, Header, encode_file
from replicator.keeper import Keeper
from replicator.levels import History
from replicator.outbox import OutFile, Staging
from replicator.recent import RecentFiles
from replicator.replica import Replica, new_lineage
from replicator.restorer import restore_database
from replicator.storage.base import FROM_START
from replicator.storage.memory import MemoryClient

PAGES, PAGE_SIZE = 6, 512
START = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


class CountingClient(MemoryClient):
    """Counts requests as an S3 store would bill them."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: Counter[str] = Counter()

    def list(self, level, *, seek=FROM_START, accurate_times=False):
        self.requests["LIST"] += 1
        return super().list(level, seek=seek, accurate_times=accurate_times)

    def open(self, info, *, offset=0, size=None):
        self.requests["GET"] += 1
        return super().open(info, offset=offset, size=size)

    def put(self, level, *args, **options):
        self.requests["PUT"] += 1
        self.requests[f"PUT level {level}"] += 1
        return super().put(level, *args, **options)

    def delete(self, files):
        self.requests["DELETE"] += 1
        return super().delete(files)

    def get_control(self, name):
        self.requests["GET"] += 1
        return super().get_control(name)

    def put_control(self, name, data, **options):
        self.requests["PUT"] += 1
        return super().put_control(name, data, **options)

    def delete_control(self, name, **options):
        self.requests["DELETE"] += 1
        return super().delete_control(name, **options)


def image(version: int) -> bytes:
    """A page whose content names the TXID that wrote it."""
    return version.to_bytes(8, "big") * (PAGE_SIZE // 8)


class Simulation:
    """One database, its replica and its keeper. `now` is the virtual time in seconds since 1970."""

    def __init__(
        self, folder: Path, history: History | None = None, *, client: CountingClient | None = None, seed: int = 1, steady: bool = False
    ) -> None:
        """`steady`: the monotonic clock does not follow `jump`, as in reality."""
        self.now = START
        self.jumped = 0.0
        self.client = client or CountingClient()
        self.recent = RecentFiles()
        self.replica = Replica(self.client, writer=1)
        self.lineage = new_lineage()
        recorded = self.replica.open()
        self.replica.join(recorded or self.lineage, recorded, known_txid=TXID(0))
        self.in_use: set[tuple[int, int, int]] = set()
        self.keeper = Keeper(
            self.replica,
            history or History(),
            scratch=Staging(folder / "scratch", limit_bytes=1 << 30),
            recent=self.recent,
            take_snapshot=self.take_snapshot,
            in_use=lambda url: self.in_use,
            clock=lambda: self.now,
            monotonic=lambda: self.now - (self.jumped if steady else 0),
        )
        self.random = random.Random(seed)
        self.pages = [0] * PAGES
        self.states: list[tuple[float, tuple[int, ...]]] = [(self.now, tuple(self.pages))]
        """Time and content of each TXID, from 0."""

    @property
    def txid(self) -> TXID:
        return TXID(len(self.states) - 1)

    def write(self) -> None:
        """Commit and upload one transaction."""
        txid = self.txid + 1
        changed = range(1, PAGES + 1) if txid == 1 else sorted({1, self.random.randint(1, PAGES)})
        for pgno in changed:
            self.pages[pgno - 1] = txid
        data = self.encode(txid, txid, changed)
        self.states.append((int(self.now * 1000) / 1000, tuple(self.pages)))  # files keep milliseconds
        self.replica.store([OutFile(0, TXID(txid), TXID(txid), int(self.now * 1000), data)], TXID(txid))
        self.recent.add(0, txid, txid, data)

    def encode(self, low: int, high: int, pgnos) -> bytes:
        header = Header(PAGE_SIZE, PAGES, TXID(low), TXID(high), int(self.now * 1000))
        return encode_file(header, [(pgno, image(self.pages[pgno - 1])) for pgno in pgnos])

    @contextlib.contextmanager
    def take_snapshot(self, newer_than: TXID) -> Iterator[OutFile]:
        assert self.txid > newer_than
        data = self.encode(1, self.txid, range(1, PAGES + 1))
        yield OutFile(SNAPSHOT_LEVEL, TXID(1), self.txid, int(self.now * 1000), data)

    def advance(self, seconds: float) -> None:
        """Let time pass; the keeper does what is due, when it is due."""
        end = self.now + seconds
        while (due := self.keeper.due()) is not None and due <= end:
            self.now = max(self.now, due)
            assert self.keeper.step()
        self.now = end

    def jump(self, seconds: float) -> None:
        """Set the wall clock."""
        self.now += seconds
        self.jumped += seconds

    def state_before(self, when: float) -> tuple[int, ...]:
        """The content at a time: of the last transaction strictly before it."""
        low, high = 0, len(self.states)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.states[middle][0] < when else (low, middle)
        return self.states[low - 1][1]

    def restored(self, output: Path, **target: object) -> tuple[tuple[int, ...], int]:
        """Restore, and return content and TXID."""
        result = restore_database(self.client, output, force=True, parallelism=1, **target)  # type: ignore[arg-type]
        data = output.read_bytes()
        content = tuple(int.from_bytes(data[n * PAGE_SIZE : n * PAGE_SIZE + 8], "big") for n in range(PAGES))
        assert all(data[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] == image(content[n]) for n in range(PAGES))
        return content, result.txid

    def check_every_restorable_txid(self, output: Path) -> int:
        """Restore each TXID that ends a stored file and that a chain leads to; returns how many there were."""
        files = sorted((info for infos in list_files(self.client).values() for info in infos), key=lambda info: info.max_txid)
        reachable: set[int] = set()
        for info in files:
            if info.min_txid == 1 or any(info.min_txid - 1 <= txid < info.max_txid for txid in reachable):
                reachable.add(info.max_txid)
        for txid in sorted(reachable):
            content, got = self.restored(output, txid=txid)
            assert (content, got) == (self.states[txid][1], txid)
        return len(reachable)
