"""URLs of the stores other than S3: what they mean, what is refused, and that they say it back without secrets."""

from __future__ import annotations

import pytest

from replicator.errors import ConfigError
from replicator.storage import open_client
from replicator.storage.locations import (
    ABSSettings,
    GSSettings,
    NATSSettings,
    OSSSettings,
    SFTPSettings,
    StoreSettings,
    WebDAVSettings,
    parse_store_url,
)


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("gs://bucket/a/b", GSSettings(bucket="bucket", path="a/b")),
        ("gs://bucket/a//../b%20c/", GSSettings(bucket="bucket", path="b c")),
        ("gs://bucket", GSSettings(bucket="bucket", path="")),
        ("abs://account@container/a", ABSSettings(bucket="container", path="a", account_name="account")),
        ("abs://c/a?endpoint=http://127.0.0.1:1/acc", ABSSettings(bucket="c", path="a", endpoint="http://127.0.0.1:1/acc")),
        ("oss://bucket/a", OSSSettings(bucket="bucket", path="a")),
        ("oss://bucket", OSSSettings(bucket="bucket", path=".")),
        ("oss://bucket/", OSSSettings(bucket="bucket", path="")),
        ("oss://bucket.oss-cn-beijing.aliyuncs.com/a", OSSSettings(bucket="bucket", path="a", region="cn-beijing")),
        (
            "oss://bucket.oss-cn-beijing-internal.aliyuncs.com/a",
            OSSSettings(bucket="bucket", path="a", region="cn-beijing", endpoint="https://oss-cn-beijing-internal.aliyuncs.com"),
        ),
        ("sftp://user@host/srv/a", SFTPSettings(host="host", user="user", path="/srv/a")),
        ("sftp://us%40er:p%2Fw@host:2222/a", SFTPSettings(host="host:2222", user="us@er", password="p/w", path="/a")),
        ("sftp://user@[::1]:2222/a", SFTPSettings(host="[::1]:2222", user="user", path="/a")),
        ("sftp://user@host/./a", SFTPSettings(host="host", user="user", path="a")),
        ("webdav://host:8080/a%20b", WebDAVSettings(server="http://host:8080", path="/a b")),
        ("webdavs://u:p@host/a", WebDAVSettings(server="https://host", path="/a", username="u", password="p")),
        ("nats://host/bucket", NATSSettings(server="host", bucket="bucket")),
        ("nats://u:p@host:4223/bucket/", NATSSettings(server="host:4223", bucket="bucket", username="u", password="p")),
        ("nats://t0ken@host/bucket", NATSSettings(server="host", bucket="bucket", token="t0ken")),
        ("nats:///bucket", NATSSettings(server="127.0.0.1", bucket="bucket")),
    ],
)
def test_urls(url: str, settings: StoreSettings) -> None:
    assert parse_store_url(url) == settings


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gs:///a", "has no bucket"),
        ("gs://user@bucket/a", "credentials do not belong"),
        ("gs://bucket/a?project=p", "unknown parameter: 'project'"),
        ("gs://buc ket/a", "not a bucket name"),
        ("gs://bucket/%zz", "invalid percent escape"),
        ("gs://bucket/a%0Ab", "control characters"),
        ("abs://container/a", "needs an account name"),
        ("abs://account:key@container/a", "secrets do not belong"),
        ("oss://bucket/a?endpoint=ftp://h", "not an endpoint"),
        ("sftp://host/a", "has no user"),
        ("sftp://user@/a", "has no host"),
        ("sftp://user@ho st/a", "not a host"),
        ("sftp://user@host:99999/a", "malformed"),
        ("sftp://user@host/a?key=k", "unknown parameter: 'key'"),
        ("webdav:///a", "has no server"),
        ("nats://host", "has no bucket"),
        ("nats://host/a/b", "not a NATS bucket"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_store_url(url)


@pytest.mark.parametrize(
    "settings",
    [
        GSSettings(bucket="b", path="a b/c%"),
        ABSSettings(bucket="b", path="x", account_name="acc", endpoint="https://h/acc", account_key="xxHIDDEN", sas_token="xxHIDDEN"),
        OSSSettings(bucket="b", path="x", region="cn-beijing", access_key_id="xxHIDDEN", secret_access_key="xxHIDDEN"),
        OSSSettings(bucket="b", path="x", region="r", endpoint="https://h", access_key_id="xxHIDDEN", secret_access_key="xxHIDDEN"),
        OSSSettings(bucket="b", path="."),
        SFTPSettings(host="h:22", user="u@x", path="/a?b#c", password="xxHIDDEN"),
        SFTPSettings(host="h", user="u", path="relative/x", password="xxHIDDEN"),
        WebDAVSettings(server="https://h:1", path="/x y", username="u", password="xxHIDDEN"),
        NATSSettings(server="h:1", bucket="b", username="u", password="xxHIDDEN"),
        NATSSettings(server="h", bucket="b", token="xxHIDDEN", jwt="xxHIDDEN", seed="xxHIDDEN", nkey="xxHIDDEN"),
    ],
)
def test_urls_for_people_name_the_same_place_and_no_secret(settings: StoreSettings) -> None:
    assert "HIDDEN" not in f"{settings.url} {settings!r}"
    assert parse_store_url(settings.url).url == settings.url
    assert getattr(parse_store_url(settings.url), "path", "") == getattr(settings, "path", "")


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("gs://b/x", "google.cloud"),
        ("abs://a@c/x", "azure.core"),
        ("oss://b/x", "alibabacloud_oss_v2"),
        ("sftp://u@h/x", "asyncssh"),
        ("nats://h/b", "nats.errors"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    import sys

    kind = url.partition(":")[0]
    monkeypatch.delitem(sys.modules, f"replicator.storage.{kind}", raising=False)
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{extra}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden(extra), *sys.meta_path])
    with pytest.raises(ConfigError, match=f"replicas of type {kind} need a library that is not installed: {extra}") as caught:
        open_client(url)
    assert caught.value.hint == f"pip install 'pyrepl-sqlite[{kind}]'"


class Hidden:
    """A finder that knows that a module is not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.name or name.startswith(f"{self.name}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
