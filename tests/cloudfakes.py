"""Azure Blob Storage and Alibaba Cloud OSS for tests, in memory: as much of their documented REST APIs as the two clients use.

They are ours, so that they show that the vendors' own libraries and our clients agree with what the vendors document, and no more.
Sources: Blob service REST API (Put Blob, Put Block, Put Block List, Get Blob, List Blobs, Delete Blob; conditional headers; error codes) and
OSS API reference (PutObject, multipart upload, GetObject, ListObjectsV2, DeleteMultipleObjects; x-oss-forbid-overwrite).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import itertools
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 4
"""Entries of a listing's page: few, so that there are several pages."""


@dataclass
class Kept:
    data: bytes
    etag: str
    when: datetime
    metadata: dict[str, str]


@dataclass
class Bucket:
    """What is stored, and the uploads under way. `lock` makes a condition and its write one step."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, Kept] = field(default_factory=dict)
    parts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploads: dict[str, dict[str, str]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def keep(self, key: str, data: bytes, metadata: dict[str, str]) -> Kept:
        kept = Kept(data, f'"0x{next(self.numbers):016X}"', datetime.now(UTC), metadata)
        self.objects[key] = kept
        return kept

    def listing(self, prefix: str, delimiter: str, after: str) -> tuple[list[tuple[str, Kept | None]], str]:
        """Return a page of entries (None for a common prefix), and the mark of the next one."""
        found: dict[str, Kept | None] = {}
        for key in sorted(self.objects):
            rest = key[len(prefix) :]
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                found[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                found[key] = self.objects[key]
        names = [name for name in sorted(found) if name > after]
        return [(name, found[name]) for name in names[:PAGE]], names[PAGE - 1] if len(names) > PAGE else ""


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body of a reply in one packet
    bucket: Bucket
    secret: str

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        self.target = unquote(split.path)
        try:
            body = self.body()
        except ConnectionError:
            self.close_connection = True
            return
        try:
            self.check(split.path)
            with self.bucket.lock:
                self.handle_request(body)
        except Refused as refused:
            text = f'<?xml version="1.0"?><Error><Code>{refused.code}</Code><Message>text of the server</Message></Error>'.encode()
            self.reply(
                refused.status,
                b"" if self.command == "HEAD" else text,
                {"x-ms-error-code": refused.code, "Content-Type": "application/xml"},
            )

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def check(self, raw_path: str) -> None:
        raise NotImplementedError

    def handle_request(self, body: bytes) -> None:
        raise NotImplementedError

    def body(self) -> bytes:
        """Read a body whole. `ConnectionError` when the connection ends before it, as a store keeps nothing then."""
        size = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(size)
        if len(data) != size:
            raise ConnectionError
        return data

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.command != "HEAD" or "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def metadata(self, prefix: str) -> dict[str, str]:
        return {name[len(prefix) :]: value for name, value in self.headers.items() if name.lower().startswith(prefix)}

    def find(self, key: str, code: str) -> Kept:
        if key not in self.bucket.objects:
            raise Refused(404, code)
        return self.bucket.objects[key]

    def send_object(self, kept: Kept, prefix: str, wanted: str) -> None:
        headers = {"ETag": kept.etag, "Last-Modified": format_datetime(kept.when, usegmt=True), "Content-Type": "application/octet-stream"}
        headers |= {prefix + name: value for name, value in kept.metadata.items()}
        if self.command == "HEAD":
            self.reply(200, headers={**headers, "Content-Length": str(len(kept.data))})
            return
        found = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", wanted)
        if found is None:
            self.reply(200, kept.data, headers)
            return
        first, last = int(found[1]), min(int(found[2] or len(kept.data)), len(kept.data) - 1)
        if first >= len(kept.data):
            raise Refused(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(kept.data)}"
        self.reply(206, kept.data[first : last + 1], headers)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Azure(Handler):
    """Path-style, as emulators have it: /account/container/blob. `secret` is the account's key, or the signature of a SAS token."""

    def check(self, raw_path: str) -> None:
        if "sig" in self.query:
            if self.query["sig"] != self.secret:
                raise Refused(403, "AuthenticationFailed")
        elif self.headers.get("Authorization") != f"SharedKey account:{self.signature(raw_path)}":
            raise Refused(403, "AuthenticationFailed")
        if self.target.split("/")[2] != "bucket":
            raise Refused(404, "ContainerNotFound")

    def signature(self, raw_path: str) -> str:
        """Source: Authorize with Shared Key, Blob service, version 2015-02-21 and later."""
        length = self.headers.get("Content-Length", "")
        names = ["Content-Encoding", "Content-Language", "", "Content-MD5", "Content-Type", "Date", "If-Modified-Since", "If-Match",
                 "If-None-Match", "If-Unmodified-Since", "Range"]  # fmt: skip
        values = [(("" if length == "0" else length) if not name else self.headers.get(name, "")) for name in names]
        own = sorted((name.lower(), value.strip()) for name, value in self.headers.items() if name.lower().startswith("x-ms-"))
        query = "".join(f"\n{name.lower()}:{value}" for name, value in sorted(self.query.items()))
        text = "\n".join([self.command, *values, *(f"{name}:{value}" for name, value in own), f"/account{raw_path}{query}"])
        return base64.b64encode(hmac.digest(base64.b64decode(self.secret), text.encode(), "sha256")).decode()

    def handle_request(self, body: bytes) -> None:
        key = self.target.split("/", 3)[3] if self.target.count("/") > 2 else ""
        match self.command, self.query.get("comp"):
            case "GET", "list":
                self.list_blobs()
            case "PUT", "block":
                self.bucket.parts.setdefault(key, {})[self.query["blockid"]] = body
                self.reply(201)
            case "PUT", "blocklist":
                self.check_conditions(key)
                blocks = self.bucket.parts.pop(key)
                ids = [element.text or "" for element in ElementTree.fromstring(body)]
                self.put(key, b"".join(blocks[block] for block in ids))
            case "PUT", None:
                self.check_conditions(key)
                self.put(key, body)
            case (("GET" | "HEAD"), None):
                wanted = self.headers.get("x-ms-range", self.headers.get("Range", ""))
                kept = self.find(key, "BlobNotFound")
                if self.headers.get("If-Match", kept.etag) != kept.etag:
                    raise Refused(412, "ConditionNotMet")
                self.send_object(kept, "x-ms-meta-", wanted)
            case "DELETE", None:
                self.find(key, "BlobNotFound")
                self.check_conditions(key)
                del self.bucket.objects[key]
                self.reply(202)
            case _:
                raise Refused(400, "InvalidQueryParameterValue")

    def check_conditions(self, key: str) -> None:
        kept = self.bucket.objects.get(key)
        if self.headers.get("If-None-Match") == "*" and kept is not None:
            raise Refused(409, "BlobAlreadyExists")
        wanted = self.headers.get("If-Match")
        if wanted is not None and (kept is None or kept.etag != wanted):
            raise Refused(412, "ConditionNotMet")

    def put(self, key: str, data: bytes) -> None:
        metadata = self.metadata("x-ms-meta-")
        if not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name in metadata):
            raise Refused(400, "InvalidMetadata")
        kept = self.bucket.keep(key, data, metadata)
        self.reply(201, headers={"ETag": kept.etag, "Last-Modified": format_datetime(kept.when, usegmt=True)})

    def list_blobs(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        page, following = self.bucket.listing(prefix, delimiter, self.query.get("marker", ""))
        entries = []
        for name, kept in page:
            if kept is None:
                entries.append(f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>")
                continue
            when = format_datetime(kept.when, usegmt=True)
            metadata = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in kept.metadata.items())
            entries.append(
                f"<Blob><Name>{escape(name)}</Name><Properties><Creation-Time>{when}</Creation-Time><Last-Modified>{when}</Last-Modified>"
                f"<Etag>{escape(kept.etag)}</Etag><Content-Length>{len(kept.data)}</Content-Length><BlobType>BlockBlob</BlobType></Properties>"
                + (f"<Metadata>{metadata}</Metadata>" if "metadata" in self.query.get("include", "") else "")
                + "</Blob>"
            )
        text = (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="http://127.0.0.1/" ContainerName="bucket">'
            f"<Prefix>{escape(prefix)}</Prefix><Blobs>{''.join(entries)}</Blobs><NextMarker>{escape(following)}</NextMarker></EnumerationResults>"
        )
        self.reply(200, text.encode(), {"Content-Type": "application/xml"})


class OSS(Handler):
    """Path-style, as for an address instead of a name: /bucket/key. `secret` must be the access key's id."""

    def check(self, raw_path: str) -> None:
        if f"Credential={self.secret}/" not in self.headers.get("Authorization", ""):
            raise Refused(403, "InvalidAccessKeyId")
        if self.target.split("/")[1] != "bucket":
            raise Refused(404, "NoSuchBucket")

    def handle_request(self, body: bytes) -> None:
        key = self.target.split("/", 2)[2]
        upload = self.query.get("uploadId", "")
        match self.command:
            case "GET" if "list-type" in self.query:
                self.list_objects()
            case "POST" if "delete" in self.query:
                if self.headers.get("Content-MD5") != base64.b64encode(hashlib.md5(body).digest()).decode():
                    raise Refused(400, "InvalidDigest")
                for element in ElementTree.fromstring(body).findall("Object/Key"):
                    self.bucket.objects.pop(element.text or "", None)
                self.reply(200, b'<?xml version="1.0"?><DeleteResult></DeleteResult>')
            case "POST" if "uploads" in self.query:
                self.check_absent(key)
                upload = f"upload{next(self.bucket.numbers)}"
                self.bucket.uploads[upload] = self.metadata("x-oss-meta-")
                self.bucket.parts[upload] = {}
                self.reply(200, f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode())
            case "PUT" if upload:
                self.bucket.parts[upload][self.query["partNumber"]] = body
                self.reply(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
            case "POST" if upload:
                self.check_absent(key)
                parts, metadata = self.bucket.parts.pop(upload), self.bucket.uploads.pop(upload)
                numbers = [element.text or "" for element in ElementTree.fromstring(body).findall("Part/PartNumber")]
                kept = self.bucket.keep(key, b"".join(parts[number] for number in numbers), metadata)
                result = f"<CompleteMultipartUploadResult><ETag>{kept.etag}</ETag></CompleteMultipartUploadResult>"
                self.reply(200, result.encode())
            case "DELETE" if upload:
                self.bucket.parts.pop(upload, None)
                self.bucket.uploads.pop(upload, None)
                self.reply(204)
            case "PUT":
                self.check_absent(key)
                kept = self.bucket.keep(key, body, self.metadata("x-oss-meta-"))
                self.reply(200, headers={"ETag": kept.etag})
            case "GET" | "HEAD":
                wanted = self.headers.get("Range", "")
                if wanted and self.headers.get("x-oss-range-behavior") != "standard":
                    raise Refused(400, "InvalidArgument")
                self.send_object(self.find(key, "NoSuchKey"), "x-oss-meta-", wanted)
            case _:
                raise Refused(405, "MethodNotAllowed")

    def check_absent(self, key: str) -> None:
        if self.headers.get("x-oss-forbid-overwrite") == "true" and key in self.bucket.objects:
            raise Refused(409, "FileAlreadyExists")

    def list_objects(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        page, following = self.bucket.listing(prefix, delimiter, self.query.get("continuation-token", ""))
        entries = []
        for name, kept in page:
            if kept is None:
                entries.append(f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>")
                continue
            when = kept.when.strftime("%Y-%m-%dT%H:%M:%S.000Z")
            entries.append(
                f"<Contents><Key>{quote(name)}</Key><LastModified>{when}</LastModified><ETag>{kept.etag}</ETag>"
                f"<Size>{len(kept.data)}</Size></Contents>"
            )
        more = f"<NextContinuationToken>{quote(following)}</NextContinuationToken>" if following else ""
        text = (
            f'<?xml version="1.0"?><ListBucketResult><EncodingType>url</EncodingType><IsTruncated>{str(bool(following)).lower()}</IsTruncated>'
            f"{more}{''.join(entries)}</ListBucketResult>"
        )
        self.reply(200, text.encode(), {"Content-Type": "application/xml"})


@contextlib.contextmanager
def serving(kind: type[Handler], secret: str) -> Iterator[str]:
    """Serve on loopback until the block ends; yield the endpoint."""
    handler = type(kind.__name__, (kind,), {"bucket": Bucket(), "secret": secret})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
