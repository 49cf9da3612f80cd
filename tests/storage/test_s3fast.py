"""The fast S3 client: when it is chosen, that it is used, and what happens when it gives no clear answer. (What it promises: test_clients.py.)"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replicator.errors import PreconditionFailed, StorageUnavailable
from replicator.format.ltx import TXID
from replicator.storage import s3fast
from replicator.storage.s3 import S3Client
from replicator.storage.s3fast import FastS3Client, open_s3
from replicator.storage.url import S3Settings, parse_s3_url
from tests.servers import ACCESS, SECRET, Server

NOTHING = {"AWS_CONFIG_FILE": os.devnull}
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", **NOTHING}
PLAIN = S3Settings(bucket="bucket", path="a/b.c", endpoint="http://127.0.0.1:1")
STAMP = 1_795_444_774_997


@pytest.fixture
def client(seaweed: Server) -> Iterator[FastS3Client]:
    settings = parse_s3_url(seaweed.url(f"f-{secrets.token_hex(6)}"), environ={})
    made = open_s3(replace(settings, access_key_id=ACCESS, secret_access_key=SECRET), NOTHING)
    assert isinstance(made, FastS3Client)
    yield made
    made.close()


def no_boto3(*_: object, **__: object) -> Any:
    raise AssertionError("boto3 was asked")


def put(client: S3Client, body: bytes, *, if_absent: bool = True) -> Any:
    return client.put(0, TXID(1), TXID(1), body, timestamp_ms=STAMP, if_absent=if_absent, metadata={"pyrepl-writer": "7"})


def test_small_files_are_stored_and_read_without_boto3(client: FastS3Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(S3Client, "_put_body", no_boto3)
        patch.setattr(S3Client, "open", no_boto3)
        info = put(client, b"0123456789")
        with pytest.raises(PreconditionFailed):
            put(client, b"others")
        with client.open(info) as whole, client.open(info, offset=3, size=4) as part, client.open(info, offset=8) as rest:
            assert (whole.read(), part.read(), rest.read()) == (b"0123456789", b"3456", b"89")
    assert client.metadata(info) == {"pyrepl-writer": "7"}
    assert [(found.size, found.created_at) for found in client.list(0, accurate_times=True)] == [(10, info.created_at)]


@pytest.mark.parametrize("if_absent", [True, False])
def test_a_reply_that_is_lost_leaves_a_conditional_write_unknown_and_repeats_another(client: FastS3Client, if_absent: bool) -> None:
    real = client._obstore

    def stored_but_lost(*arguments: Any, **more: Any) -> None:
        real.put(*arguments, **more)
        raise real.exceptions.GenericError("connection closed")

    client._obstore = SimpleNamespace(put=stored_but_lost, exceptions=real.exceptions)
    if if_absent:
        with pytest.raises(StorageUnavailable, match="outcome is unknown"):
            put(client, b"ours")
    else:
        put(client, b"ours", if_absent=False)
    client._obstore = real
    [info] = client.list(0)
    with client.open(info) as stream:
        assert stream.read() == b"ours"


def test_a_file_that_has_become_longer_than_it_was_listed_is_read_whole(client: FastS3Client) -> None:
    info = put(client, b"short")
    put(client, b"x" * (s3fast.SMALL_BYTES + 1), if_absent=False)
    with client.open(info) as stream:
        assert len(stream.read()) == s3fast.SMALL_BYTES + 1


def test_it_is_chosen_where_it_can_do_the_same() -> None:
    assert isinstance(open_s3(PLAIN, KEYS), FastS3Client)
    assert isinstance(open_s3(PLAIN, {**KEYS, "AWS_CA_BUNDLE": "/srv/ca.pem"}), FastS3Client)  # no certificate comes into it
    assert isinstance(open_s3(replace(PLAIN, endpoint=None, region="eu-west-1"), KEYS), FastS3Client)


@pytest.mark.parametrize(
    ("change", "environ"),
    [
        ({}, NOTHING),
        ({}, {**KEYS, "PYREPL_S3": "boto3"}),
        ({}, {**KEYS, "AWS_PROFILE": "work"}),
        ({"endpoint": "https://127.0.0.1:1"}, {**KEYS, "AWS_CA_BUNDLE": "/srv/ca.pem"}),
        ({}, {**KEYS, "https_proxy": "http://proxy:3128"}),
        ({"endpoint": None}, KEYS),
        ({"path": ""}, KEYS),
        ({"path": "a//b"}, KEYS),
        ({"path": "a/../b"}, KEYS),
        ({"path": "a b"}, KEYS),
        ({"path": "a%20b"}, KEYS),
        ({"bucket": "my.bucket"}, KEYS),
        ({"storage_class": "STANDARD_IA"}, KEYS),
        ({"sse_kms_key_id": "key"}, KEYS),
        ({"skip_verify": True}, KEYS),
        ({"sign_payload": False}, KEYS),
    ],
    ids=[
        "no keys", "switched off", "profile", "authority", "proxy", "no region", "no path", "empty name", "dots", "blank", "escape", "dotted bucket",
        "class", "kms", "unverified", "unsigned",
    ],
)  # fmt: skip
def test_all_that_is_odd_stays_with_boto3(change: dict[str, Any], environ: dict[str, str]) -> None:
    made = open_s3(replace(PLAIN, **change), environ)
    assert isinstance(made, S3Client)
    assert not isinstance(made, FastS3Client)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("# nothing\n\n[default]\nregion = eu-west-1\noutput=json\n", True),
        ("[default]\nendpoint_url = https://store\n", False),
        ("s3 =\n", False),
    ],
    ids=["a region", "another store", "details"],
)
def test_what_a_configuration_file_says_beyond_a_region_is_left_to_boto3(tmp_path: Path, text: str, chosen: bool) -> None:
    file = tmp_path / "config"
    file.write_text(text)
    assert isinstance(open_s3(PLAIN, {**KEYS, "AWS_CONFIG_FILE": str(file)}), FastS3Client) == chosen
    assert isinstance(open_s3(PLAIN, {**KEYS, "AWS_CONFIG_FILE": str(tmp_path / "absent")}), FastS3Client)
    assert not isinstance(open_s3(PLAIN, {**KEYS, "AWS_CONFIG_FILE": str(tmp_path)}), FastS3Client)  # it cannot be read


def test_without_obstore_boto3_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3fast.importlib.util, "find_spec", lambda name: None)
    assert type(open_s3(PLAIN, KEYS)) is S3Client
