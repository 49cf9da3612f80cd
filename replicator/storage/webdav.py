"""A replica on a WebDAV server, on urllib3: `<path>/ltx/<level>/<name>`.

Decisions, and what they protect:

* **PUT to a temporary name, then MOVE.** Servers exist that show a file while it arrives. MOVE with `Overwrite: F` is create-if-absent; how
  strictly two of them at one moment are told apart is up to the server, and the probe finds those that ignore the header.
* **Replacing on a condition is not offered** (`ConditionUnsupported`): servers ignore `If-Match`, or check it and write later.
* **Times.** WebDAV keeps its own, that of the upload; exact ones come from the headers of the files (`TreeClient`).
* **Redirects are not followed**, so that the password stays with the server that was configured.
* **A short body is an error**, and ranges are checked, as some servers ignore them.

Requests that only read are sent again when the connection broke or the server failed; those that write are not.

Source: RFC 4918 (9.1 PROPFIND, 9.3 MKCOL, 9.9 MOVE); specification 2.1, 4.3, 8.5.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

import urllib3

from replicator import __version__
from replicator.errors import AccessDenied, ConditionUnsupported, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.storage.base import Body, ReadStream, body_size
from replicator.storage.locations import WebDAVSettings
from replicator.storage.tree import CHUNK, Entry, Pieces, Write, etag_of, is_stale, opened, stored_time, temporary_name, whole

__all__ = ["WebDAVObjects"]

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_POOL = 32
_LOCKED_S = (0.05, 0.1, 0.2, 0.4, 0.8)
_MAX_LISTING = 256 << 20
_SAFE = "/-._~!$&'()*+,;=:@"
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]{1,19}|\*)")
_READING = frozenset({"GET", "PROPFIND"})
_BUSY = frozenset({500, 502, 503, 504})
_WANTED = b'<?xml version="1.0" encoding="utf-8"?><propfind xmlns="DAV:"><prop><resourcetype/><getcontentlength/><getlastmodified/></prop></propfind>'


class WebDAVObjects:
    """The store at one path of one server."""

    kind = "webdav"

    def __init__(self, settings: WebDAVSettings) -> None:
        self.settings = settings
        self.url = settings.url
        base = "/".join(part for part in settings.path.split("/") if part not in ("", "."))
        self._base = f"{settings.server}/{quote(base, safe=_SAFE)}".rstrip("/")
        self._headers = {"User-Agent": f"pyrepl/{__version__}", "Accept-Encoding": "identity"}
        if settings.username is not None:
            self._headers |= urllib3.make_headers(basic_auth=f"{settings.username}:{settings.password or ''}")
            if settings.server.startswith("http://") and urlsplit(settings.server).hostname not in ("127.0.0.1", "localhost", "::1"):
                log.warning("webdav password travels unencrypted replica=%s", self.url)
        timeout = urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_READ_TIMEOUT_S)
        self._http = urllib3.PoolManager(maxsize=_POOL, block=True, timeout=timeout)
        self._swept: set[str] = set()

    def __repr__(self) -> str:
        return f"WebDAVObjects({self.url!r})"

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def entries(self, folder: str) -> Iterable[Entry]:
        for name, is_folder, size, when in self._listing(folder):
            if not is_folder:
                yield Entry(name, size, stored_time(when))

    def folders(self, folder: str) -> Iterable[str]:
        return (name for name, is_folder, *_ in self._listing(folder) if is_folder)

    def open(self, name: str, offset: int, size: int | None) -> ReadStream:
        headers = {}
        if offset or size is not None:
            headers["Range"] = f"bytes={offset}-" if size is None else f"bytes={offset}-{offset + size - 1}"
        reply = self._request("GET", name, headers=headers, allowed=(200, 206, 416), stream=True)
        try:
            if reply.status == 416:
                return Pieces((), 0, self._named(name), self._release(reply))
            skip, length = self._locate(name, reply, offset, size)
            stream = Pieces(self._pieces(name, reply), skip + length, self._named(name), self._release(reply))
            while skip:
                skip -= len(stream.read(min(skip, CHUNK)))
            return stream
        except BaseException:
            reply.close()
            raise

    def get(self, name: str) -> tuple[bytes, str]:
        data = whole(self.open(name, 0, None), self._named(name))
        return data, etag_of(data)

    def details(self, name: str) -> tuple[datetime | None, dict[str, str]]:
        return None, {}

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def write(self, name: str, body: Body, how: Write) -> str:
        if how.if_match is not None:
            raise ConditionUnsupported(self._named(name))
        size = body_size(body)
        self._sweep(name.rpartition("/")[0])
        temporary = temporary_name(name)
        try:
            if self._put(temporary, body, size) not in (200, 201, 204):
                # 409 by the standard: the folder is missing. Some say 404, or 403.
                self._make_folders(name)
                status = self._put(temporary, body, size)
                if status not in (200, 201, 204):
                    raise self._error("PUT", temporary, status)
            headers = {"Destination": self._url(name), "Overwrite": "F" if how.if_absent else "T"}
            self._request("MOVE", temporary, headers=headers, allowed=(200, 201, 204))
        except StorageError as error:
            with contextlib.suppress(StorageError):
                self._request("DELETE", temporary, allowed=(200, 202, 204, 404))
            if isinstance(error, PreconditionFailed):
                raise PreconditionFailed(self._named(name)) from None
            raise
        return etag_of(bytes(body)) if not isinstance(body, Path) else ""

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._request("DELETE", name, allowed=(200, 202, 204, 404, 410))

    def delete_if(self, name: str, etag: str) -> None:
        raise ConditionUnsupported(self._named(name))

    def delete_folder(self, folder: str) -> None:
        # With the slash: a server may take the name without it for a file.
        self._request("DELETE", f"{folder}/", allowed=(200, 202, 204, 404, 410))

    def close(self) -> None:
        self._http.clear()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    def _url(self, name: str) -> str:
        return f"{self._base}/{quote(name, safe=_SAFE)}"

    def _named(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _put(self, name: str, body: Body, size: int) -> int:
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with opened(body) as data:
            reply = self._request("PUT", name, headers=headers, body=data, allowed=(200, 201, 204, 403, 404, 409))
        return int(reply.status)

    def _make_folders(self, name: str) -> None:
        """Make the folders above a name, the replica's path included."""
        below = [part for part in self.settings.path.split("/") if part not in ("", ".")]
        parts = [*(quote(part, safe=_SAFE) for part in below), *name.split("/")[:-1]]
        for count in range(1, len(parts) + 1):
            url = f"{self.settings.server}/{'/'.join(parts[:count])}/"
            reply = self._send("MKCOL", url, name, {}, b"", stream=False)
            # 405: it exists. Of folders above the replica's nobody may be told more than that they are forbidden.
            if reply.status not in (200, 201, 204, 301, 405, *((401, 403) if count < len(parts) else ())):
                raise self._error("MKCOL", name, reply.status)

    def _sweep(self, folder: str) -> None:
        """Delete what dead writers left in a folder, once for each client."""
        if folder in self._swept:
            return
        self._swept.add(folder)
        self.delete([f"{folder}/{entry.name}" if folder else entry.name for entry in self.entries(folder) if is_stale(entry.name)])

    def _listing(self, folder: str) -> Iterator[tuple[str, bool, int, datetime | None]]:
        """Yield names, whether they are folders, sizes and times."""
        headers = {"Depth": "1", "Content-Type": "application/xml; charset=utf-8"}
        reply = self._request("PROPFIND", f"{folder}/" if folder else "", headers=headers, body=_WANTED, allowed=(207, 404), stream=True)
        with contextlib.closing(reply):
            if reply.status == 404:
                return
            text = b"".join(self._limited(folder, reply))
        own = unquote(urlsplit(self._url(folder)).path).rstrip("/")
        for response in self._responses(folder, text):
            path = unquote(urlsplit(response.findtext("{DAV:}href") or "").path)
            parent, _, name = path.rstrip("/").rpartition("/")
            if not name or path.rstrip("/") == own or parent.rpartition("/")[2] != own.rpartition("/")[2]:
                continue
            properties = response.findall("{DAV:}propstat/{DAV:}prop")
            is_folder = any(item.find("{DAV:}resourcetype/{DAV:}collection") is not None for item in properties)
            sizes = [found for item in properties if (found := item.findtext("{DAV:}getcontentlength") or "").isdecimal()]
            times = [when for item in properties if (when := _http_date(item.findtext("{DAV:}getlastmodified")))]
            yield name, is_folder, int(sizes[0][:19]) if sizes else 0, times[0] if times else None

    def _responses(self, folder: str, text: bytes) -> list[ElementTree.Element]:
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise StorageError(f"listing with a document type, which none has: {self._named(folder)}")
        try:
            return ElementTree.fromstring(text).findall("{DAV:}response")
        except ElementTree.ParseError:
            raise StorageError(f"listing is not XML: {self._named(folder)}", hint="is this the URL of a WebDAV server?") from None

    def _limited(self, folder: str, reply: Any) -> Iterator[bytes]:
        size = 0
        for piece in self._pieces(folder, reply):
            size += len(piece)
            if size > _MAX_LISTING:
                raise StorageError(f"listing is too large: {self._named(folder)}")
            yield piece

    def _locate(self, name: str, reply: Any, offset: int, size: int | None) -> tuple[int, int]:
        """Return where in the body of a reply the asked bytes begin, and how many they are."""
        text = str(reply.headers.get("Content-Length", ""))
        if not text.isdecimal():
            raise StorageError(f"server does not say how long the file is: {self._named(name)}")
        length = int(text[:19])
        if reply.status == 206:
            found = _CONTENT_RANGE.fullmatch(str(reply.headers.get("Content-Range", "")))
            if found is None or int(found[1]) != offset or int(found[2]) - offset + 1 != length:
                raise StorageError(f"server answered with another range than asked: {self._named(name)}")
            return 0, length if size is None else min(length, size)
        rest = max(0, length - offset)
        return min(offset, length), rest if size is None else min(rest, size)

    def _pieces(self, name: str, reply: Any) -> Iterator[bytes]:
        try:
            yield from (piece for piece in reply.stream(CHUNK) if piece)
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise self._unreachable(name, exc) from exc

    @staticmethod
    def _release(reply: Any) -> Any:
        # Closed, not given back: what was not read to its end would be the beginning of the next reply.
        return lambda: reply.release_conn() if reply.length_remaining == 0 else reply.close()

    def _request(
        self,
        method: str,
        name: str,
        *,
        headers: dict[str, str] | None = None,
        body: bytes | BinaryIO | None = None,
        allowed: tuple[int, ...],
        stream: bool = False,
    ) -> Any:
        reply = self._send(method, self._url(name), name, headers or {}, body, stream=stream)
        if reply.status not in allowed:
            reply.close()
            raise self._error(method, name, reply.status)
        return reply

    def _send(self, method: str, url: str, name: str, headers: dict[str, str], body: bytes | BinaryIO | None, *, stream: bool) -> Any:
        again = 2 if method in _READING else 0
        retries = urllib3.Retry(
            total=again,
            connect=again,
            read=again,
            redirect=0,
            status=again,
            other=0,
            allowed_methods=None,
            status_forcelist=_BUSY if again else (),
            backoff_factor=0.1,
            raise_on_status=False,
        )
        for pause_s in (*_LOCKED_S, None):
            try:
                reply = self._http.request(
                    method,
                    url,
                    headers={**self._headers, **headers},
                    body=body,
                    redirect=False,
                    retries=retries,
                    preload_content=not stream,
                )
            except (urllib3.exceptions.HTTPError, OSError) as exc:
                raise self._unreachable(name, exc) from exc
            if reply.status != 423 or pause_s is None or method == "PUT":
                break
            # Another request has a lock on the name at this moment; nothing was done. (What is PUT has a name that nobody else knows.)
            reply.close()
            time.sleep(pause_s)
        return reply

    def _unreachable(self, name: str, exc: Exception) -> StorageError:
        cause = getattr(exc, "reason", None) or exc
        if "CERTIFICATE_VERIFY_FAILED" in str(cause):
            host = urlsplit(self.settings.server).hostname
            return StorageError(
                f"certificate of the server is not trusted: {host}", hint="set SSL_CERT_FILE to the authority's certificate"
            )
        where = urlsplit(self.settings.server).netloc
        return StorageUnavailable(
            f"server cannot be reached: {self._named(name)} ({where}, {type(cause).__name__})", hint="check the URL and the network"
        )

    def _error(self, method: str, name: str, status: int) -> StorageError:
        where = self._named(name)
        match status:
            case 404 | 410:
                return ObjectNotFound(where)
            case 401 | 403 | 407:
                return AccessDenied(where, f"access denied ({status})", hint="check user and password, and the rights on the folder")
            case 412:
                return PreconditionFailed(where)
            case 507:
                return StorageUnavailable(f"no space left: {where}", hint="free space on the server")
            case 408 | 423 | 425 | 429:
                return StorageUnavailable(f"server asks to try later ({status}): {where}")
            case _ if status >= 500 and status != 501:
                return StorageUnavailable(f"server asks to try later ({status}): {where}")
            case _ if 300 <= status < 400:
                return StorageError(f"server redirects to another place ({status}): {where}", hint="give the URL that it redirects to")
        return StorageError(f"server refused {method} ({status}): {where}", hint="is this the URL of a WebDAV server?")


def _http_date(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text) if text else None
    except ValueError:
        return None
