"""What the S3 client does with the replies that real servers give on bad days, and what it sends."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replicator.errors import AccessDenied, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.format.ltx import TXID, FileInfo
from replicator.storage.base import ReplicaClient
from replicator.storage.probe import Conditions, probe_conditional_writes
from replicator.storage.s3 import S3Client
from replicator.storage.url import S3Settings
from tests.servers import SECRET
from tests.storage.scripted import Reply, Request, Scripted, s3_error, scripted

BODY = bytes(range(100))
INFO = FileInfo(0, TXID(1), TXID(1), len(BODY), datetime.now(UTC))
KEY = "/bucket/db/0000/0000000000000001-0000000000000001.ltx"


@pytest.fixture
def serving() -> Iterator[Callable[..., tuple[S3Client, Scripted]]]:
    """Start a scripted server and a client of it; `max_attempts` and settings as keywords."""
    with contextlib.ExitStack() as stack:

        def start(answer: Callable[[Request], Reply], max_attempts: int = 1, **settings: object) -> tuple[S3Client, Scripted]:
            server = stack.enter_context(scripted(answer))
            client = S3Client(S3Settings(bucket="bucket", path="db", endpoint=server.endpoint, **settings), max_attempts=max_attempts)
            stack.callback(client.close)
            return client, server

        yield start


def put(client: ReplicaClient, body: bytes = BODY, **options: object) -> FileInfo:
    return client.put(0, TXID(1), TXID(1), body, timestamp_ms=1_795_444_304_390, **options)


# -- what is sent ------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F38")
def test_a_put_is_one_plain_signed_request(serving) -> None:
    client, server = serving(lambda request: Reply(headers={"ETag": '"e"'}))
    put(client, if_absent=True, metadata={"pyrepl-writer": "00ff"})
    [request] = server.requests
    assert (request.method, request.path, request.body) == ("PUT", KEY, BODY)
    assert request.headers["if-none-match"] == "*"
    assert request.headers["user-agent"].startswith("pyrepl/")
    assert request.headers["content-type"] == "application/octet-stream"
    assert request.headers["x-amz-meta-litestream-timestamp"] == "2026-11-23T14:31:44.39Z"  # the example of specification 2.1
    assert request.headers["x-amz-meta-pyrepl-writer"] == "00ff"
    assert request.headers["x-amz-content-sha256"] == hashlib.sha256(BODY).hexdigest()
    assert not [name for name in request.headers if "checksum" in name or "trailer" in name or name == "transfer-encoding"]


@pytest.mark.parametrize(
    ("timestamp_ms", "text"),
    [
        (1_795_444_304_390, "2026-11-23T14:31:44.39Z"),
        (1_795_444_304_125, "2026-11-23T14:31:44.125Z"),
        (1_795_444_304_000, "2026-11-23T14:31:44Z"),
    ],
)
def test_times_are_written_as_litestream_writes_them(serving, timestamp_ms: int, text: str) -> None:
    client, server = serving(lambda request: Reply())
    client.put(0, TXID(1), TXID(1), b"x", timestamp_ms=timestamp_ms)
    assert server.requests[0].headers["x-amz-meta-litestream-timestamp"] == text


@pytest.mark.parametrize("text", ["2026-11-23T14:31:44.5Z", "2026-11-23T14:31:44.500000001Z", "2026-11-23T15:31:44.50+01:00"])
def test_times_are_read_with_any_fraction(serving, text: str) -> None:
    def answer(request: Request) -> Reply:
        return Reply(headers={"x-amz-meta-litestream-timestamp": text}) if request.method == "HEAD" else _listing("1")

    [info] = serving(answer)[0].list(0, accurate_times=True)
    assert info.created_at == datetime(2026, 11, 23, 14, 31, 44, 500_000, tzinfo=UTC)


def test_a_time_that_makes_no_sense_leaves_the_listed_one(serving) -> None:
    def answer(request: Request) -> Reply:
        return Reply(headers={"x-amz-meta-litestream-timestamp": "yesterday"}) if request.method == "HEAD" else _listing("1")

    [info] = serving(answer)[0].list(0, accurate_times=True)
    assert info.created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_a_time_that_cannot_be_had_is_an_error_and_not_a_wrong_time(serving) -> None:
    client, _ = serving(lambda request: Reply(503) if request.method == "HEAD" else _listing("1"))
    with pytest.raises(StorageUnavailable):
        list(client.list(0, accurate_times=True))


@pytest.mark.fault("F38")
def test_batch_deletes_carry_content_md5_where_it_is_required(serving) -> None:
    empty = Reply(body=b"<DeleteResult/>")
    client, server = serving(lambda request: empty)
    client.delete([INFO])
    [request] = server.requests
    assert request.headers["content-md5"] == base64.b64encode(hashlib.md5(request.body).digest()).decode()
    client, server = serving(lambda request: empty, require_content_md5=False)
    client.delete([INFO])
    assert "content-md5" not in server.requests[0].headers


def test_an_error_for_one_key_fails_the_delete_and_names_the_key(serving) -> None:
    reply = b"<DeleteResult><Error><Key>db/0000/x</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    with pytest.raises(AccessDenied, match="s3://bucket/db/0000/x"):
        serving(lambda request: Reply(body=reply))[0].delete([INFO])


def test_a_customer_key_goes_with_reads_and_writes(serving) -> None:
    key = bytes(range(32))
    client, server = serving(lambda request: Reply(), sse_customer_key=base64.b64encode(key).decode())
    put(client)
    client.metadata(INFO)
    client.open(INFO).close()
    for request in server.requests:
        assert base64.b64decode(request.headers["x-amz-server-side-encryption-customer-key"]) == key
        digest = request.headers["x-amz-server-side-encryption-customer-key-md5"]
        assert base64.b64decode(digest) == hashlib.md5(key).digest()


def test_the_storage_class_and_an_unsigned_payload_are_sent_when_asked_for(serving) -> None:
    client, server = serving(lambda request: Reply(), storage_class="STANDARD_IA", sign_payload=False)
    put(client)
    assert server.requests[0].headers["x-amz-storage-class"] == "STANDARD_IA"
    assert server.requests[0].headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"


# -- reading -----------------------------------------------------------------------------------------------------------------------


def _range(request: Request, status: int = 206, *, say: bool = True) -> Reply:
    first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
    piece = BODY[int(first) : int(last) + 1 if last else None]
    end = int(first) + len(piece) - 1
    return Reply(status, piece, {"Content-Range": f"bytes {first}-{end}/{len(BODY)}"} if say else {})


SERVERS: dict[str, Callable[[Request], Reply]] = {
    "correct": _range,
    "right bytes, status 200": lambda request: _range(request, 200),
    "right bytes, status 200, no Content-Range": lambda request: (
        Reply(body=BODY) if request.method == "HEAD" else _range(request, 200, say=False)
    ),
    "range ignored": lambda request: Reply(body=BODY),
}


@pytest.mark.fault("F33")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("offset", "size"), [(0, 10), (0, 100), (0, 200), (40, 10), (90, None), (90, 200), (99, 1)])
def test_a_range_is_exact_whatever_the_server_makes_of_it(serving, server: str, offset: int, size: int | None) -> None:
    client, _ = serving(SERVERS[server])
    with client.open(INFO, offset=offset, size=size) as stream:
        got = b"".join(iter(lambda: stream.read(7), b""))
    assert got == BODY[offset : None if size is None else offset + size]


def test_another_range_than_asked_is_an_error(serving) -> None:
    client, _ = serving(lambda request: Reply(206, BODY[:10], {"Content-Range": "bytes 0-9/100"}))
    with pytest.raises(StorageError, match="another range"):
        client.open(INFO, offset=10, size=10)


@pytest.mark.fault("F33")
@pytest.mark.parametrize("arrived", [0, 1, 50, 99])
def test_a_body_that_ends_early_is_unavailable_and_not_short(serving, arrived: int) -> None:
    client, _ = serving(lambda request: Reply(body=BODY[:arrived], announced=100))
    with client.open(INFO) as stream, pytest.raises(StorageUnavailable, match=r"s3://bucket/db/0000/.*\.ltx"):
        list(iter(lambda: stream.read(10), b""))


def test_a_compressed_transfer_is_given_as_it_is(serving) -> None:
    client, _ = serving(lambda request: Reply(body=b"not gzip", headers={"Content-Encoding": "gzip"}))
    with client.open(INFO) as stream:
        assert stream.read() == b"not gzip"


# -- listing -----------------------------------------------------------------------------------------------------------------------


def _listing(*txids: str, token: str = "", prefix: str = "db/0000/") -> Reply:
    entries = "".join(
        f"<Contents><Key>{prefix}{t.zfill(16)}-{t.zfill(16)}.ltx</Key><Size>5</Size><LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
        for t in txids
    )
    more = (
        f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
        if token
        else "<IsTruncated>false</IsTruncated>"
    )
    return Reply(body=f"<ListBucketResult>{more}{entries}</ListBucketResult>".encode(), headers={"Content-Type": "application/xml"})


@pytest.mark.fault("F32")
def test_an_unordered_listing_with_repeats_is_put_right(serving) -> None:
    pages = iter([_listing("5", "3", token="a"), _listing("3", "1", token="b"), _listing("4", "5")])
    files = list(serving(lambda request: next(pages))[0].list(0))
    assert [info.min_txid for info in files] == [1, 3, 4, 5]


def test_keys_outside_the_asked_level_are_ignored(serving) -> None:
    client, _ = serving(lambda request: _listing("1", prefix="xx/0000/"))
    assert list(client.list(0)) == []


@pytest.mark.fault("F32")
def test_a_listing_that_does_not_end_is_an_error(serving) -> None:
    client, server = serving(lambda request: _listing("1", token="same"))
    with pytest.raises(StorageError, match="does not finish"):
        list(client.list(0))
    assert len(server.requests) == 2


# -- conditions and retries --------------------------------------------------------------------------------------------------------


def test_a_condition_that_fails_at_once_is_lost(serving) -> None:
    client, _ = serving(lambda request: s3_error(412, "PreconditionFailed"), max_attempts=3)
    with pytest.raises(PreconditionFailed):
        put(client, if_absent=True)


@pytest.mark.fault("F29")
def test_a_condition_that_fails_after_a_retry_is_unknown(serving) -> None:
    # The first request may be what the second one found.
    replies = iter([s3_error(500, "InternalError"), s3_error(412, "PreconditionFailed")])
    client, server = serving(lambda request: next(replies), max_attempts=3)
    with pytest.raises(StorageUnavailable, match="outcome is unknown"):
        put(client, if_absent=True)
    assert len(server.requests) == 2
    assert server.requests[1].body == BODY


def test_a_conflict_of_two_conditional_writes_is_tried_later(serving) -> None:
    client, _ = serving(lambda request: s3_error(409, "ConditionalRequestConflict"))
    with pytest.raises(StorageUnavailable):
        put(client, if_absent=True)


def test_replacing_what_is_gone_is_a_lost_condition(serving) -> None:
    client, _ = serving(lambda request: s3_error(404, "NoSuchKey"))
    with pytest.raises(PreconditionFailed):
        client.put_control("lock.json", b"1", if_match='"e"')
    with pytest.raises(PreconditionFailed):
        client.delete_control("lock.json", if_match='"e"')


@pytest.mark.parametrize("collects", [True, False])
def test_making_a_client_leaves_the_collector_as_it_was(collects: bool) -> None:
    client = S3Client(S3Settings(bucket=f"collects-{collects}", path="db", endpoint="http://127.0.0.1:9", region="us-east-1"))
    try:
        if not collects:
            gc.disable()
        assert client._s3 is not None
        assert gc.isenabled() == collects
    finally:
        gc.enable()
        client.close()


@pytest.mark.fault("F31")
def test_a_failed_upload_in_parts_is_aborted(serving) -> None:
    def answer(request: Request) -> Reply:
        if request.method == "POST":
            return Reply(body=b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
        return Reply(204) if request.method == "DELETE" else s3_error(403, "AccessDenied")

    client, server = serving(answer)
    client._single_put_bytes = 10
    with pytest.raises(AccessDenied):
        put(client)
    assert [(request.method, request.path) for request in server.requests][-1] == ("DELETE", f"{KEY}?uploadId=u1")


@pytest.mark.fault("F31")
@pytest.mark.parametrize("from_file", [False, True])
def test_parts_are_the_body_in_order_and_signed(from_file: bool, serving, tmp_path: Path) -> None:
    """Buffers are used again: more parts than travel at once, and a last one that is shorter."""

    def answer(request: Request) -> Reply:
        if request.method == "POST" and request.path.endswith("?uploads"):
            return Reply(body=b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
        return Reply(headers={"ETag": '"p"'}, body=b"<CompleteMultipartUploadResult/>" if request.method == "POST" else b"")

    client, server = serving(answer, concurrency=2)
    client._single_put_bytes = 10
    body = random.Random(1).randbytes((16 << 20) + 3)
    (tmp_path / "body").write_bytes(body)
    assert put(client, tmp_path / "body" if from_file else body).size == len(body)
    parts = {
        int(request.path.partition("partNumber=")[2].partition("&")[0]): request for request in server.requests if request.method == "PUT"
    }
    assert sorted(parts) == [1, 2, 3, 4]
    assert b"".join(parts[number].body for number in sorted(parts)) == body
    assert all(request.headers["x-amz-content-sha256"] == hashlib.sha256(request.body).hexdigest() for request in parts.values())


def test_a_file_that_shrinks_while_it_is_sent_is_not_stored(serving, tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(BODY)

    def answer(request: Request) -> Reply:
        path.write_bytes(BODY[:50])
        return Reply(body=b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")

    client, server = serving(answer)
    client._single_put_bytes = 10
    with pytest.raises(StorageError, match="became shorter"):
        put(client, path)
    assert [request.method for request in server.requests] == ["POST", "DELETE"]


def test_a_lost_reply_to_the_end_of_an_upload_is_unknown(serving) -> None:
    """The upload is gone because the first, unanswered request finished it."""

    def answer(request: Request) -> Reply:
        if request.path.endswith("?uploads"):
            return Reply(body=b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
        return Reply(headers={"ETag": '"p"'}) if request.method == "PUT" else s3_error(404, "NoSuchUpload")

    client, _ = serving(answer)
    client._single_put_bytes = 10
    with pytest.raises(StorageUnavailable, match="outcome is unknown"):
        put(client)


def test_a_store_that_renames_keys_without_a_path_is_found_out(serving) -> None:
    client, _ = serving(lambda request: _listing() if request.method == "GET" else Reply())
    bare = S3Client(S3Settings(bucket="bucket", path="", endpoint=client.settings.endpoint), max_attempts=1)
    with pytest.raises(StorageError, match="does not list what was stored") as caught:
        put(bare)
    assert "s3://bucket/path" in caught.value.hint


# -- the probe ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F37")
@pytest.mark.parametrize(
    ("honoured", "verdict"),
    [
        ({"if-none-match", "if-match"}, Conditions(create=True, replace=True)),
        ({"if-none-match"}, Conditions(create=True, replace=False)),
        ({"if-match"}, Conditions(create=False, replace=False)),
        (set(), Conditions(create=False, replace=False)),
    ],
)
def test_the_probe_tells_the_conditions_apart_and_cleans_up(serving, honoured: set[str], verdict: Conditions) -> None:
    stored: dict[str, str] = {}
    numbers = itertools.count()

    def answer(request: Request) -> Reply:
        etag = stored.get(request.path)
        if request.method == "DELETE":
            stored.pop(request.path, None)
            return Reply(204)
        exists = "if-none-match" in honoured and "if-none-match" in request.headers and etag is not None
        stale = "if-match" in honoured and "if-match" in request.headers and etag != request.headers["if-match"]
        if exists or stale:
            return s3_error(412, "PreconditionFailed")
        stored[request.path] = f'"{next(numbers):032x}"'
        return Reply(headers={"ETag": stored[request.path]})

    client, server = serving(answer)
    assert probe_conditional_writes(client) == verdict
    assert stored == {}
    assert len(server.requests) <= 4


def test_the_probe_takes_a_refused_header_for_a_no(serving) -> None:
    client, _ = serving(lambda request: s3_error(400, "InvalidArgument") if "if-none-match" in request.headers else Reply())
    assert probe_conditional_writes(client) == Conditions(create=False, replace=False)


def test_the_probe_passes_on_that_the_store_cannot_be_written(serving) -> None:
    with pytest.raises(AccessDenied):
        probe_conditional_writes(serving(lambda request: s3_error(403, "AccessDenied"))[0])
    with pytest.raises(StorageError, match="bucket does not exist"):
        probe_conditional_writes(serving(lambda request: s3_error(404, "NoSuchBucket"))[0])


# -- errors ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", ObjectNotFound),
        (403, "AccessDenied", AccessDenied),
        (403, "InvalidAccessKeyId", AccessDenied),
        (403, "SignatureDoesNotMatch", AccessDenied),
        (400, "ExpiredToken", AccessDenied),
        (401, "Unauthorized", AccessDenied),
        (500, "InternalError", StorageUnavailable),
        (503, "SlowDown", StorageUnavailable),
        (503, "", StorageUnavailable),
        (429, "TooManyRequests", StorageUnavailable),
        (400, "RequestTimeout", StorageUnavailable),
        (404, "NoSuchBucket", StorageError),
        (403, "RequestTimeTooSkewed", StorageError),
        (501, "NotImplemented", StorageError),
        (400, "InvalidArgument", StorageError),
    ],
)
def test_each_reply_has_its_error(serving, status: int, code: str, kind: type[StorageError]) -> None:
    client, _ = serving(lambda request: s3_error(status, code))
    with pytest.raises(StorageError) as caught:
        client.open(INFO)
    assert type(caught.value) is kind


@pytest.mark.fault("F36")
def test_a_wrong_clock_is_named_with_both_times(serving) -> None:
    reply = s3_error(403, "RequestTimeTooSkewed")
    with pytest.raises(StorageError, match=r"clock.*store: .*20[0-9]{2} [0-9:]{8} GMT, here: ") as caught:
        serving(lambda request: reply)[0].open(INFO)
    assert "clock" in caught.value.hint


def test_a_missing_bucket_is_named_with_what_to_do(serving) -> None:
    with pytest.raises(StorageError, match="bucket does not exist: bucket at http://127") as caught:
        list(serving(lambda request: s3_error(404, "NoSuchBucket"))[0].list(0))
    assert "create the bucket bucket" in caught.value.hint


@pytest.mark.fault("F59")
@pytest.mark.shows_secrets
@pytest.mark.parametrize("code", ["Bad\x1b[31m code", f"Bad code {SECRET}"])
def test_text_of_the_server_never_reaches_a_message(serving, code: str) -> None:
    def answer(request: Request) -> Reply:
        return s3_error(400, code, f"{request.headers['authorization']} {SECRET}")

    with pytest.raises(StorageError) as caught:
        serving(answer)[0].open(INFO)
    text = f"{caught.value!r} {caught.value} {caught.value.hint}"
    assert SECRET not in text
    assert "AWS4-HMAC" not in text
    assert text.isprintable()


def test_no_credentials_is_access_denied_with_a_hint(serving, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    client, server = serving(lambda request: Reply())
    with pytest.raises(AccessDenied, match="no usable credentials") as caught:
        client.open(INFO)
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    assert server.requests == []


@pytest.mark.fault("F58")
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_never_takes_the_credentials_to_another_host(serving, status: int) -> None:
    _, other = serving(lambda request: Reply(body=BODY))
    client, _ = serving(lambda request: Reply(status, headers={"Location": f"{other.endpoint}{KEY}"}))
    with pytest.raises(StorageError):
        client.open(INFO)
    assert other.requests == []


@pytest.mark.fault("F59")
def test_secrets_are_in_no_representation() -> None:
    settings = S3Settings(
        bucket="bucket", access_key_id="AKIDEXAMPLE", secret_access_key="topsecret", sse_customer_key=base64.b64encode(b"k" * 32).decode()
    )
    client = S3Client(settings)
    text = f"{settings!r} {client!r} {client.url} {settings}"
    for secret in ("AKIDEXAMPLE", "topsecret", base64.b64encode(b"k" * 32).decode()):
        assert secret not in text


def test_making_a_client_contacts_nobody(serving) -> None:
    _, server = serving(lambda request: Reply())
    S3Client(S3Settings(bucket="bucket", endpoint=server.endpoint)).close()
    assert server.requests == []
