"""A replica whose LTX files are encrypted before they leave this process, with age, around a client of any backend.

Files are `<path>/age/<level>/<name>.ltx.age`, binary age files of one LTX file each; `age -d` gives the LTX file back. Control objects hold
nothing of the database and stay as they are. This lies outside what Litestream reads: it finds an empty replica at the path.

Decisions, and what they protect:

* **Fail closed.** There is no way from a plaintext body to the inner client but through `_encrypt`; without recipients nothing is
  written, not even a control object. Whatever is not an age file under an encrypted name is refused.
* **Sizes are those of the plaintext**, as everybody who reads a file expects. Only the header of an age file has an unknown length, so
  a listing fetches the first 4 KiB of each file that this client has not listed before, and computes the rest. Neither names nor listings
  of stores have a place for the size; needing no key, this works with recipients alone.
* **The ciphertext of an unknown outcome is kept**, because encrypting again gives other bytes: the next try of the same body sends the
  same bytes, and `holds` recognises them in the store. Sent for the first time and refused, a ciphertext cannot be there, and is dropped.
* **Plaintext is never on disk.** Large ciphertexts wait in a temporary file, which is no more secret than the store. A whole file is
  decrypted while it is read, in a thread of its own: the library pushes, the reader pulls.
* **Reading begins at the first byte**, as the format of age has no other way without its file key. A range costs what stands before it.
  The end of a file is kept in memory, because whoever asks for the trailer asks for the page index next.
* **A chunk is authenticated before any of its bytes is handed out**, and a file that ends early is an error at its end.

The keys that fit are told from damage by the header alone: no stanza that opens is `WrongKey`, all else is `CorruptReplica`.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from replicator.atomic import AtomicFile, sweep
from replicator.errors import AccessDenied, ConfigError, CorruptReplica, ObjectNotFound, PreconditionFailed, StorageUnavailable, WrongKey
from replicator.format.age import MAGIC, header_size, plaintext_size
from replicator.format.ltx import TXID, FileInfo
from replicator.storage.base import (
    AGE,
    FROM_START,
    Body,
    ControlObject,
    Layout,
    ObjectStore,
    ReadStream,
    ReplicaClient,
    StoredObject,
    body_size,
)

__all__ = ["AgeClient"]

_SPOOL_BYTES = 8 << 20
_RANGE_BYTES = 8 << 20
_TAIL_BYTES = 2 << 20
_TAILS = 16
_KEPT = 4
_PIECE_BYTES = 256 << 10
_PIECES = 4
_FIRST_BYTES = 4 << 10
_MAX_HEADER_BYTES = 1 << 20
_HEADER_THREADS = 8

_KINDS = {
    "recipient": "age1..., or an SSH public key",
    "identity": "AGE-SECRET-KEY-1..., or an SSH private key without a passphrase",
}

_Address = tuple[int, TXID, TXID]
_Listed = tuple[TXID, TXID, int, datetime]


class _LaidOut(ReplicaClient, ObjectStore, Protocol):
    """A client that was opened for a layout."""

    @property
    def layout(self) -> Layout: ...


class AgeClient:
    """The replica inside `inner`, encrypted to `recipients` and read with `identities`.

    Args:
        inner: a client opened with the layout `AGE`.
        recipients: `age1...` and public SSH keys; a string may hold several, one on each line, and `#` comments. None: read only.
        identities: `AGE-SECRET-KEY-1...` and private SSH keys without a passphrase. None: write only (see `can_read`).
        spool: folder for temporary files of ciphertext; the system's when not given.

    Raises:
        ConfigError: no key at all, one that is none, identities that cannot read what is written, or the library is missing.
    """

    def __init__(
        self, inner: _LaidOut, *, recipients: Sequence[str] = (), identities: Sequence[str] = (), spool: Path | None = None
    ) -> None:
        if inner.layout != AGE:
            raise ValueError(f"the client was not opened for encrypted files: {inner.url}")
        self._inner = inner
        self._age = _library()
        self._recipients = self._keys("recipient", recipients, self._read_recipient)
        self._identities = self._keys("identity", identities, self._read_identity)
        self._check_keys()
        self._spool = spool
        self._swept = False
        self._lock = threading.Lock()  # guards the collections below
        self._kept: OrderedDict[_Address, _Kept] = OrderedDict()
        self._tails: OrderedDict[_Address, _Tail] = OrderedDict()
        self._headers: dict[int, dict[_Listed, int]] = {}

    @property
    def kind(self) -> str:
        return self._inner.kind

    @property
    def inner(self) -> ReplicaClient:
        """The client of the store itself."""
        return self._inner

    @property
    def url(self) -> str:
        """The inner URL, marked: what is known about a plain replica at the same path must not be taken for this one."""
        return f"age+{self._inner.url}"

    @property
    def can_read(self) -> bool:
        return bool(self._identities)

    def __repr__(self) -> str:
        return f"AgeClient({self._inner!r})"

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        stored = [*self._inner.list(level, seek=seek, accurate_times=accurate_times)]
        known = self._headers.get(level, {})
        new = [info for info in stored if _listed(info) not in known]
        headers = {
            **known,
            **{_listed(info): header for info, header in zip(new, self._header_sizes(new), strict=True) if header is not None},
        }
        if seek == FROM_START:
            headers = {_listed(info): headers[_listed(info)] for info in stored if _listed(info) in headers}
        self._headers[level] = headers
        for info in stored:
            header = headers.get(_listed(info))
            if header is None:
                continue  # deleted since the listing
            # What is no age file keeps its size here, and is refused when it is opened: one bad file must not hide the others.
            size = plaintext_size(info.size, header) if header else None
            yield FileInfo(info.level, info.min_txid, info.max_txid, info.size if size is None else size, info.created_at)

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        if not self._identities:
            raise ConfigError(f"cannot read without an age identity: {self._name(info)}", hint="give the identity of one of the recipients")
        source = self._inner.open(info)
        try:
            start, header = self._begin(source, self._name(info))
            if size is None or size > _RANGE_BYTES:
                return self._decryption(self._name(info), start, source, offset, size)
            with source:
                return BytesIO(self._range(info, start[:header], _Reader(start, source), offset, size))
        except BaseException:
            source.close()
            raise

    def _begin(self, source: ReadStream, name: str) -> tuple[bytes, int]:
        """Read the header; return what was read and the header's length."""
        start, header = _read_header(source)
        if not header:
            raise CorruptReplica(name, f"not an encrypted file ({_what(start)})")
        return start, header

    def _decryption(self, name: str, start: bytes, source: ReadStream, offset: int, size: int | None) -> _Decryption:
        return _Decryption(lambda reader, writer: self._decrypt(name, reader, writer), _Reader(start, source), offset, size)

    def metadata(self, info: FileInfo) -> dict[str, str]:
        return self._inner.metadata(info)

    def holds(self, info: FileInfo, body: Body) -> bool:
        """Say whether the stored file is this body: the ciphertext that was sent for it, or else what it decrypts to.

        With recipients alone only the first can be known. Another process's ciphertext of the same body is then False.
        """
        address = _address(info)
        kept = self._take(address, body)
        try:
            if kept is not None:
                with self._inner.open(info) as stored:
                    same = _digest(stored) == _digest(kept.ciphertext.body)
                if same:
                    kept.ciphertext.discard()
                    kept = None
                    return True
        finally:
            if kept is not None:
                self._keep(address, kept)
        if not self.can_read:
            self._inner.open(info).close()  # missing, or other bytes
            return False
        try:
            with self.open(info) as theirs:
                return _digest(theirs) == _digest(body)
        except CorruptReplica:
            return False

    def _header_sizes(self, files: Sequence[FileInfo]) -> Sequence[int | None]:
        if len(files) < 2 or self.kind in ("file", "memory"):
            return [self._header_size(info) for info in files]
        with ThreadPoolExecutor(min(_HEADER_THREADS, len(files)), "age-header") as pool:
            return [*pool.map(self._header_size, files)]

    def _header_size(self, info: FileInfo) -> int | None:
        """Return the length of a file's header, 0 for what is no age file, None when the file is gone."""
        for size in (_FIRST_BYTES, _MAX_HEADER_BYTES):
            try:
                with self._inner.open(info, size=size) as stream:
                    start, header = _read_header(stream)
            except ObjectNotFound:
                return None
            if header or not start.startswith(MAGIC) or len(start) < size:
                break
        return header

    def _range(self, info: FileInfo, header: bytes, reader: _Reader, offset: int, size: int) -> bytes:
        with self._lock:
            tail = self._tails.get(_address(info))
        if tail is not None and tail.header == header and tail.start <= offset:  # a header is never used twice: it is the same file
            return tail.data[offset - tail.start : offset - tail.start + size]
        end = offset + size
        keep = offset >= _PIECE_BYTES and end >= info.size
        start = max(0, offset - _TAIL_BYTES) if keep else offset
        parts = bytearray()
        self._decrypt(self._name(info), reader, _Window(parts.extend, start, None if keep else end))
        data = bytes(parts)
        if keep:
            with self._lock:
                self._tails[_address(info)] = _Tail(header, start, data)
                while len(self._tails) > _TAILS:
                    self._tails.popitem(last=False)
        return data[offset - start : offset - start + size]

    def _decrypt(self, name: str, reader: _Reader, writer: _Window) -> None:
        """Decrypt until the end, or until the writer has what it wants.

        Raises:
            WrongKey: no identity opens the header.
            CorruptReplica: anything else is wrong with the file.
        """
        try:
            self._age.decrypt_io(reader, writer, self._identities)
        except Exception as exc:
            # What the reader or the writer raised comes out as itself or inside an error of the library.
            if reader.error is not None:
                raise reader.error from None
            if writer.error is not None:
                raise writer.error from None
            if writer.is_satisfied:
                return
            if not isinstance(exc, self._age.DecryptError | OSError):
                raise
            if "No matching keys" in str(exc):
                raise WrongKey(name) from exc
            raise CorruptReplica(name, f"it does not decrypt ({str(exc).partition(chr(10))[0].lower()})") from exc

    def _name(self, info: FileInfo) -> str:
        return f"{self.url} level {info.level} {AGE.name(info)}"

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def put(
        self,
        level: int,
        min_txid: TXID,
        max_txid: TXID,
        body: Body,
        *,
        timestamp_ms: int,
        if_absent: bool = False,
        metadata: dict[str, str] | None = None,
    ) -> FileInfo:
        self._check_writable()
        address = (level, min_txid, max_txid)
        kept = self._take(address, body)
        sent = kept.ciphertext if kept is not None else self._encrypt(body)
        try:
            info = self._inner.put(level, min_txid, max_txid, sent.body, timestamp_ms=timestamp_ms, if_absent=if_absent, metadata=metadata)
        except BaseException as exc:
            if kept is None and isinstance(exc, PreconditionFailed | AccessDenied):
                sent.discard()
            else:
                self._keep(address, kept or _Kept(_digest(body), sent))
            raise
        sent.discard()
        return FileInfo(level, min_txid, max_txid, body_size(body), info.created_at)

    def delete(self, files: Iterable[FileInfo]) -> None:
        self._inner.delete(files)

    def _check_writable(self) -> None:
        if not self._recipients:
            raise ConfigError(
                f"cannot write without an age recipient: {self.url}", hint="identities only decrypt; give a recipient (age1...) as well"
            )

    def _encrypt(self, body: Body) -> _Ciphertext:
        """Encrypt a body, in memory when it is small and into a temporary file when it is not.

        Raises:
            StorageUnavailable: there is no room for the temporary file.
        """
        if body_size(body) <= _SPOOL_BYTES:
            return _Ciphertext(self._age.encrypt(body.read_bytes() if isinstance(body, Path) else bytes(body), self._recipients))
        folder = self._spool or Path(tempfile.gettempdir())
        with body.open("rb") if isinstance(body, Path) else BytesIO(body) as plain:
            reader = _Reader(b"", plain)
            try:
                if not self._swept:
                    sweep(folder)  # what a killed process left
                    self._swept = True
                file = AtomicFile(folder / "never-given").__enter__()
            except OSError as exc:
                raise _no_room(folder, exc) from exc
            writer = _Window(file.write, 0, None)
            try:
                self._age.encrypt_io(reader, writer, self._recipients)
            except BaseException as exc:
                file.discard()
                if isinstance(writer.error, OSError):
                    raise _no_room(folder, writer.error) from exc
                raise reader.error or writer.error or exc from None
        return _Ciphertext(file.temporary_path, file)

    def _take(self, address: _Address, body: Body) -> _Kept | None:
        """Return the ciphertext that was already sent for this body; the caller then owns it. One of another body is dropped."""
        with self._lock:
            kept = self._kept.pop(address, None)
        if kept is None or kept.digest == _digest(body):
            return kept
        kept.ciphertext.discard()
        return None

    def _keep(self, address: _Address, kept: _Kept) -> None:
        # A replica tries one file at a time; what is pushed out here was given up by its owner.
        with self._lock:
            replaced = [self._kept.pop(address)] if address in self._kept else []
            self._kept[address] = kept
            while len(self._kept) > _KEPT:
                replaced.append(self._kept.popitem(last=False)[1])
        for old in replaced:
            old.ciphertext.discard()

    # -- objects of the 0.3 format: encrypted under the names that plain ones have ------------------------------------------------

    def list_folders(self, folder: str) -> Sequence[str]:
        return self._inner.list_folders(folder)

    def list_objects(self, folder: str) -> Sequence[StoredObject]:
        return self._inner.list_objects(folder)

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        if not self._identities:
            raise ConfigError(f"cannot read without an age identity: {name}", hint="give the identity of one of the recipients")
        source = self._inner.open_object(name)
        where = f"{self.url} {name}"
        try:
            start, _ = self._begin(source, where)
            return self._decryption(where, start, source, offset, None)
        except BaseException:
            source.close()
            raise

    def put_object(self, name: str, body: Body, *, if_absent: bool = False) -> StoredObject:
        """As the contract says; a second try sends another ciphertext of the same body."""
        self._check_writable()
        sent = self._encrypt(body)
        try:
            return self._inner.put_object(name, sent.body, if_absent=if_absent)
        finally:
            sent.discard()

    def delete_objects(self, names: Iterable[str]) -> None:
        self._inner.delete_objects(names)

    def delete_folder(self, folder: str) -> None:
        self._inner.delete_folder(folder)

    # -- control objects ---------------------------------------------------------------------------------------------------------

    def get_control(self, name: str) -> ControlObject:
        return self._inner.get_control(name)

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        self._check_writable()
        return self._inner.put_control(name, data, if_match=if_match, if_absent=if_absent)

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        self._inner.delete_control(name, if_match=if_match)

    def close(self) -> None:
        with self._lock:
            kept = [*self._kept.values()]
            self._kept.clear()
            self._tails.clear()
        for old in kept:
            old.ciphertext.discard()
        self._inner.close()

    # -- keys --------------------------------------------------------------------------------------------------------------------

    def _keys(self, what: str, texts: Sequence[str], read: Callable[[str], object]) -> Sequence[object]:
        """Read keys. A message names a key by its place and never shows it: what was given as a recipient may be a secret by mistake."""
        if isinstance(texts, str):
            raise ConfigError(f"age {what}: give a list of strings")
        keys = []
        for number, text in enumerate(texts, start=1):
            found = _split(text)
            if not found:
                raise ConfigError(f"age {what} {number} is empty", hint="a variable that is not set?")
            for key in found:
                try:
                    keys.append(read(key))
                except (self._age.RecipientError, self._age.IdentityError, ValueError):
                    raise ConfigError(f"age {what} {number} is not valid", hint=f"give {_KINDS[what]}") from None
        return keys

    def _read_recipient(self, text: str) -> object:
        if text.startswith("ssh-"):
            return self._age.ssh.Recipient.from_str(text)
        return self._age.x25519.Recipient.from_str(text)

    def _read_identity(self, text: str) -> object:
        if text.startswith("-----BEGIN"):
            return self._age.ssh.Identity.from_buffer(text.encode())
        return self._age.x25519.Identity.from_str(text)

    def _check_keys(self) -> None:
        """Find out now, and not at the first restart, that what would be written could not be read."""
        if not self._recipients and not self._identities:
            raise ConfigError(f"encryption without any key: {self.url}", hint="give age recipients to write, identities to read")
        if self._recipients and self._identities:
            try:
                self._age.decrypt(self._age.encrypt(b"", self._recipients), self._identities)
            except self._age.DecryptError:
                hint = "give the identity of one of the recipients, or no identity at all to write only"
                raise ConfigError(f"no age identity belongs to a recipient: {self.url}", hint=hint) from None


@dataclass(frozen=True, slots=True)
class _Ciphertext:
    """An encrypted body: bytes, or a temporary file that stays until it is discarded."""

    body: bytes | Path
    file: AtomicFile | None = None

    def discard(self) -> None:
        if self.file is not None:
            self.file.discard()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A ciphertext that may be in the store, and the digest of its plaintext."""

    digest: bytes
    ciphertext: _Ciphertext


@dataclass(frozen=True, slots=True)
class _Tail:
    """The plaintext of a file from `start` to its end. `header` says which file it was."""

    header: bytes
    start: int
    data: bytes


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


class _Reader:
    """What the library reads: `start`, then the source. Many small reads become few large ones, and an error is remembered."""

    def __init__(self, start: bytes, source: _Readable) -> None:
        self._data, self._at, self._source = start, 0, source
        self.error: BaseException | None = None

    def read(self, size: int = -1, /) -> bytes:
        if self._at >= len(self._data):
            try:
                self._data, self._at = self._source.read(_PIECE_BYTES), 0
            except BaseException as exc:
                self.error = exc
                raise
        piece = self._data[self._at :] if size < 0 else self._data[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def close(self) -> None:
        self._source.close()


class _Window:
    """What the library writes to: passes on the bytes from `start` to `end`, and stops it there."""

    def __init__(self, emit: Callable[[bytes], object], start: int, end: int | None) -> None:
        self._emit, self._start, self._end, self._at = emit, start, end, 0
        self.error: BaseException | None = None

    @property
    def is_satisfied(self) -> bool:
        return self._end is not None and self._at >= self._end

    def write(self, data: bytes) -> int:
        first = max(0, self._start - self._at)
        last = len(data) if self._end is None else max(0, self._end - self._at)
        self._at += len(data)
        if first < len(data):
            try:
                self._emit(data[first:last])
            except BaseException as exc:
                self.error = exc
                raise
        if self.is_satisfied:
            raise _Satisfied
        return len(data)

    def flush(self) -> None:
        pass


class _Satisfied(Exception):
    """Nothing more is wanted; the library ends when it sees any exception."""


class _Decryption:
    """A plaintext being read while a thread decrypts it, at most a few pieces ahead. The thread owns the source."""

    def __init__(self, decrypt: Callable[[_Reader, _Window], None], reader: _Reader, offset: int, size: int | None) -> None:
        self._decrypt, self._reader = decrypt, reader
        self._window = _Window(self._gather, offset, None if size is None else offset + size)
        self._gathered = bytearray()
        self._changed = threading.Condition()  # guards what follows
        self._pieces: deque[bytes] = deque()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._piece, self._at = b"", 0
        self._thread = threading.Thread(target=self._run, name="pyrepl age", daemon=True)
        self._thread.start()

    def read(self, size: int = -1, /) -> bytes:
        parts: list[bytes] = []
        while size and self._fill():
            part = self._piece[self._at :] if size < 0 else self._piece[self._at : self._at + size]
            self._at += len(part)
            size -= len(part) if size > 0 else 0
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fill(self) -> bool:
        """Have unread bytes at hand; False at the end."""
        if self._at < len(self._piece):
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._ended)
            if not self._pieces:
                if self._error is not None:
                    raise self._error
                return False
            self._piece, self._at = self._pieces.popleft(), 0
            self._changed.notify_all()
        return True

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()

    # The thread's side.

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with contextlib.closing(self._reader):
                self._decrypt(self._reader, self._window)
            self._hand_over()
        except BaseException as exc:
            error = exc
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _gather(self, data: bytes) -> None:
        self._gathered += data
        if len(self._gathered) >= _PIECE_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._pieces) < _PIECES or self._closed)
            if self._closed:
                raise _Satisfied
            if self._gathered:
                self._pieces.append(bytes(self._gathered))
            self._gathered.clear()
            self._changed.notify_all()


def _library() -> Any:
    try:
        import pyrage
    except ImportError:
        raise ConfigError("encryption needs the extra `age`", hint="pip install 'pyrepl-sqlite[age]'") from None
    return pyrage


def _split(text: str) -> Sequence[str]:
    """Return the keys in a text: an SSH private key is one, else there is one on each line that is not empty and no comment."""
    if text.lstrip().startswith("-----BEGIN"):
        return [text.strip() + "\n"]
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _read_header(stream: _Readable) -> tuple[bytes, int]:
    """Read until the header of an age file is complete; return what was read and the header's length, 0 when there is none."""
    start = b""
    while len(start) < _MAX_HEADER_BYTES and (piece := stream.read(_FIRST_BYTES)):
        start += piece
        if header := header_size(start):
            return start, header
        if not MAGIC.startswith(start[: len(MAGIC)]):
            break
    return start, 0


def _what(start: bytes) -> str:
    if start.startswith(b"\x04\x22\x4d\x18"):
        return "a plain file of the 0.3 format"
    return "a plain LTX file" if start.startswith(b"LTX1") else "it has no complete header"


def _digest(source: Body | ReadStream) -> bytes:
    """Return the SHA-256 of a body, or of the rest of a stream."""
    digest = hashlib.sha256()
    if isinstance(source, bytes | bytearray | memoryview):
        digest.update(source)
    elif isinstance(source, Path):
        with source.open("rb") as file:
            return _digest(file)
    else:
        while piece := source.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.digest()


def _address(info: FileInfo) -> _Address:
    return info.level, info.min_txid, info.max_txid


def _listed(info: FileInfo) -> _Listed:
    return info.min_txid, info.max_txid, info.size, info.created_at


def _no_room(folder: Path, exc: OSError) -> StorageUnavailable:
    why = (exc.strerror or str(exc)).lower()
    return StorageUnavailable(f"cannot write a temporary file of ciphertext in {folder}: {why}", hint="free space there, or set TMPDIR")
