"""Give a replica what it lacks: by copying files from another replica, or by a full image of the newest state."""

from __future__ import annotations

from dataclasses import replace

from replicator.chain import read_file
from replicator.errors import CorruptReplica, Fenced, FormatError, ReplicatorError
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, Decoder, Encoder, FileInfo
from replicator.outbox import OutFile, Spool, Staging
from replicator.replica import Replica

__all__ = ["SourceFailed", "copy", "store_image"]

SLICE_BYTES = 64 << 10


class SourceFailed(ReplicatorError):
    """The replica that was copied from cannot be read, or has no way to what is needed."""


def copy(source: Replica, target: Replica, scratch: Staging) -> None:
    """Copy the files that lead from the target's position to the source's, each of them verified on the way.

    A full image that is newer than the target's position comes first: page sizes may have changed since.

    Raises:
        SourceFailed: see there; the target is as good as before.
        StorageError, Fenced: the target cannot take a file.
    """
    images = [info for info in source.listing().get(SNAPSHOT_LEVEL, ()) if info.max_txid > target.txid]
    if images:
        _copy_file(source, target, images[-1], scratch)
    files = source.files_after(images[-1].max_txid if images else target.txid)
    if files is None:
        raise SourceFailed(f"no files lead from TXID {target.txid:016x} to the newest: {source.url}")
    for info in files:
        _copy_file(source, target, info, scratch)
    # The newest raw file as well, where a merged one has led there: by it others find the position, and the next start the agreement.
    if not any(info.max_txid == target.txid for info in target.listing().get(0, ())):
        for info in source.listing().get(0, ()):
            if info.max_txid == target.txid:
                _copy_file(source, target, info, scratch)


def _copy_file(source: Replica, target: Replica, info: FileInfo, scratch: Staging) -> None:
    spool = Spool(scratch, f"copy-{info.level}-{info.name}")
    try:
        decoder = Decoder()
        for data in read_file(source.client, info):
            for at in range(0, len(data), SLICE_BYTES):
                decoder.feed(data[at : at + SLICE_BYTES])
            spool.write(data)
        decoder.close()
        assert decoder.header is not None
        out = spool.finish(OutFile(info.level, info.min_txid, info.max_txid, decoder.header.timestamp_ms, b""))
    except FormatError as error:
        spool.discard()
        raise SourceFailed(str(CorruptReplica(f"{source.url} level {info.level} {info.name}", str(error)))) from error
    except ReplicatorError as error:
        spool.discard()
        raise SourceFailed(f"cannot copy from {source.url}: {error}") from error
    except BaseException:
        spool.discard()
        raise
    try:
        if info.level:
            target.add(out)
            target.txid = max(target.txid, info.max_txid)
        else:
            target.store([out], info.max_txid)
    finally:
        out.discard()


def store_image(target: Replica, image: OutFile, scratch: Staging) -> None:
    """Store a full image, and the same pages once more as the raw file of its TXID, so that whoever looks at raw files only (the peer,
    when it takes over) finds the position.

    Raises:
        Fenced: somebody else has appended meanwhile.
        StorageError: not stored, or unknown; take a new image and call again.
    """
    known = target.txid
    target.relist()
    newest = max((info.max_txid for infos in target.listing().values() for info in infos), default=TXID(0))
    if newest > max(known, image.max_txid):
        raise Fenced(target.url, newest)
    target.add(image)
    raw = _as_raw(image, scratch)
    try:
        target.store([raw], image.max_txid)
    except Fenced:
        # An attempt before this one may have stored it without a reply: the same state, of an image that was encoded at another time.
        if not target.holds_own(raw):
            raise
        target.txid = max(target.txid, image.max_txid)
    finally:
        raw.discard()
    target.needs_image = False


def _as_raw(image: OutFile, scratch: Staging) -> OutFile:
    """Return the pages of a full image as a file of its last TXID alone."""
    decoder = Decoder(keep_blocks=True)
    spool = Spool(scratch, f"raw-{image.max_txid:016x}.ltx")
    try:
        encoder: Encoder | None = None
        for piece in image.pieces(SLICE_BYTES):
            pages = decoder.feed(piece)
            if encoder is None:
                assert decoder.header is not None
                encoder = Encoder(spool.write, replace(decoder.header, min_txid=decoder.header.max_txid))
            encoder.blocks(pages)
        decoder.close()
        assert encoder is not None
        encoder.close()
        return spool.finish(OutFile(0, image.max_txid, image.max_txid, image.timestamp_ms, b""))
    except BaseException:
        spool.discard()
        raise
