"""Where does the live WAL stand relative to what was synced? A pure decision, no I/O.

A `WALPosition` is the end of the last synced frame: salts, offset and running checksum *together*. Length, modification time and
`mxFrame` prove nothing (a restarted WAL keeps its old length); salts and checksums do.

The decision is this table. "Proven" means that the engine has held a read transaction, without a break, since a moment at which
everything in the WAL was synced; under such a reader SQLite can restart the WAL at most once, and only after copying all of it.

| WAL header | salts | last synced frame | restart proven | result |
|---|---|---|---|---|
| none (missing, short, torn) | - | - | position has no WAL | `Nothing` |
| none | - | - | yes | `Nothing`: truncated, the next writer writes a new header |
| none | - | - | no | `Resynchronise` |
| other page size | - | - | - | `Resynchronise` |
| valid | equal | none synced (offset 32), or intact | - | `Continue` at the position |
| valid | equal | differs | - | `Resynchronise` |
| valid | differ | - | yes, or no WAL before | `Continue` at offset 32 of the new WAL |
| valid | differ | - | no | `Resynchronise` |
"""

from __future__ import annotations

from dataclasses import dataclass

from replicator.format.wal import WAL_HEADER_SIZE, FrameHeader, WALHeader

__all__ = ["NO_WAL", "Continue", "Decision", "Nothing", "Resynchronise", "WALPosition", "decide", "start_of"]


@dataclass(frozen=True, slots=True)
class WALPosition:
    """The end of the last synced frame.

    Attributes:
        salts: salt-1 and salt-2 of the WAL header; (0, 0) when there was no WAL.
        offset: bytes from the start of the WAL; 32 when none of its frames is synced, 0 when there was no WAL.
        checksum: running checksum after that frame (the header's at offset 32).
    """

    salts: tuple[int, int]
    offset: int
    checksum: tuple[int, int]

    @property
    def has_wal(self) -> bool:
        return self.offset >= WAL_HEADER_SIZE


NO_WAL = WALPosition((0, 0), 0, (0, 0))


@dataclass(frozen=True, slots=True)
class Nothing:
    """There is no WAL to read at the moment."""


@dataclass(frozen=True, slots=True)
class Continue:
    """Read frames from `position` on. `restarted`: it is the start of a WAL that replaced the synced one."""

    position: WALPosition
    restarted: bool


@dataclass(frozen=True, slots=True)
class Resynchronise:
    """Continuity is not proven; compare pages instead."""

    reason: str


Decision = Nothing | Continue | Resynchronise


def start_of(header: WALHeader) -> WALPosition:
    """Return the position before the first frame of a WAL."""
    return WALPosition((header.salt1, header.salt2), WAL_HEADER_SIZE, (header.checksum1, header.checksum2))


def decide(
    position: WALPosition, header: WALHeader | None, last_frame: FrameHeader | None, *, page_size: int, restart_proven: bool
) -> Decision:
    """Decide how the next sync starts. See the table above.

    Args:
        position: where the last sync ended.
        header: the WAL's header as it is now, or None when there is no valid one.
        last_frame: the frame that ends at `position.offset` as it is now, or None when it cannot be read.
        page_size: of the synced database, in bytes.
        restart_proven: a restart since `position` cannot have skipped a frame.
    """
    if header is None:
        if restart_proven or not position.has_wal:
            return Nothing()
        return Resynchronise("the WAL was removed or truncated")
    if header.page_size != page_size:
        return Resynchronise(f"the page size changed from {page_size} to {header.page_size}")
    if (header.salt1, header.salt2) == position.salts:
        if position.offset == WAL_HEADER_SIZE:
            return Continue(position, restarted=False)
        if (
            last_frame is not None
            and (last_frame.salt1, last_frame.salt2) == position.salts
            and (last_frame.checksum1, last_frame.checksum2) == position.checksum
        ):
            return Continue(position, restarted=False)
        return Resynchronise("the last synced WAL frame was overwritten")
    if restart_proven:
        return Continue(start_of(header), restarted=True)
    return Resynchronise("the WAL was restarted by another process")
