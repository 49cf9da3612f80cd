"""Snapshots and WAL segments of format 0.3 that are encoded and not yet on every replica."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from replicator.format.ltx import SNAPSHOT_LEVEL, TXID
from replicator.format.v3 import FrameEncoder, Position
from replicator.outbox import EncodedPages, Entry, OutFile, Spool, Staging
from replicator.tail import NO_WAL

__all__ = ["V3File", "encode_v3", "staged_entries"]

_STAGED = re.compile(r"([0-9a-f]{16})-([09])-([0-9a-f]{16})-([0-9a-f]{8})-([0-9a-f]{8,16})-([0-9a-f]{8,16})\.v3")


@dataclass(frozen=True, slots=True)
class V3File(OutFile):
    """A snapshot or a WAL segment to store. `body` is one LZ4 frame.

    As a file of the engine it has level 9 or 0, and for both TXIDs the engine's count of entries.

    Attributes:
        offset: where its bytes begin in WAL `index`; 0 for a snapshot.
        end: where they end; for a snapshot, up to where its state includes WAL `index`.
    """

    generation: str
    index: int
    offset: int
    end: int

    @property
    def is_snapshot(self) -> bool:
        return self.level == SNAPSHOT_LEVEL

    @property
    def end_position(self) -> Position:
        return Position(self.generation, self.index, self.end)

    @property
    def staged_name(self) -> str:
        return f"{self.max_txid:016x}-{self.level}-{self.generation}-{self.index:08x}-{self.offset:08x}-{self.end:08x}.v3"


def encode_v3(staging: Staging, file: V3File, content: Iterable[bytes | bytearray | memoryview], *, unique: bool = False) -> V3File:
    """Return the file with its body.

    Args:
        file: all but the body.
        unique: give it, when it becomes a local file, a name of its own; else that by which `staged_entries` finds it.

    Raises:
        OSError: the staging folder cannot take it; nothing is left there.
    """
    spool = Spool(staging, f"{secrets.token_hex(8)}.v3" if unique else file.staged_name)
    try:
        encoder = FrameEncoder()
        for piece in content:
            spool.write(encoder.feed(memoryview(piece)))
        spool.write(encoder.close())
        return spool.finish(file)
    except BaseException:
        spool.discard()
        raise


def staged_entries(staging: Staging) -> list[Entry]:
    """Return what an earlier run staged, in order; nothing is verified."""
    found: dict[int, list[V3File]] = {}
    for path in staging.paths():
        if match := _STAGED.fullmatch(path.name):
            number, level, generation, index, offset, end = match.groups()
            txid = TXID(int(number, 16))
            file = V3File(int(level), txid, txid, 0, path, generation, int(index, 16), int(offset, 16), int(end, 16))
            found.setdefault(txid, []).append(file)
    entries = []
    for number in sorted(found):
        files = sorted(found[number], key=lambda file: not file.is_snapshot)
        entries.append(Entry(TXID(number), tuple(files), EncodedPages.none(), 0, 0, 0, NO_WAL, whole=files[0].is_snapshot))
    return entries
