"""`litestream.yml`: what each key becomes, what is refused and where, and that nothing secret is shown."""

from __future__ import annotations

import base64
import contextlib
import re
import time
from pathlib import Path

import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.config import Config, Daemon, DatabaseSettings, Logging, ReplicaSettings, Socket, database_path, load
from replicator.errors import ConfigError
from replicator.levels import History
from replicator.storage import open_replica
from replicator.storage.age import AgeClient
from replicator.storage.file import FileClient
from replicator.storage.locations import (
    ABSSettings,
    GSSettings,
    NATSSettings,
    OSSSettings,
    SFTPSettings,
    StoreSettings,
    WebDAVSettings,
)
from replicator.storage.s3 import S3Client

FOLDER, HOME = Path("/srv"), Path("/home/me")


def read(text: str, *, environ: dict[str, str] | None = None, lenient: bool = False, expand_env: bool = True) -> Config:
    return load(text, environ=environ or {}, home=HOME, folder=FOLDER, source="c.yml", lenient=lenient, expand_env=expand_env, pid=42)


def database(keys: str = "", replica: str = "path: r", top: str = "", **options: object) -> DatabaseSettings:
    """The settings of a file with one database; keys in flow style."""
    (found,) = read(f"{top}\ndbs:\n  - {{path: a.db, replica: {{{replica}}}, {keys}}}", **options).databases  # type: ignore[arg-type]
    return found


def replica(keys: str, top: str = "", **options: object) -> ReplicaSettings:
    return database("", keys, top, **options).replicas[0]


def refused(text: str, *words: str, **options: object) -> ConfigError:
    """The file's name, line and column come first."""
    with pytest.raises(ConfigError) as caught:
        read(text, **options)  # type: ignore[arg-type]
    assert re.match(r"c\.yml:[0-9]+:[0-9]+: ", str(caught.value))
    for word in words:
        assert word in str(caught.value)
    return caught.value


def warnings(text: str, **options: object) -> list[str]:
    return [str(note) for note in read(text, **options).warnings]  # type: ignore[arg-type]


def with_replica(keys: str) -> str:
    return f"dbs: [{{path: a.db, replica: {{{keys}}}}}]"


# -- databases -------------------------------------------------------------------------------------------------------------------


def test_the_smallest_file_has_the_engines_defaults() -> None:
    config = read("dbs:\n  - path: a.db\n    replica:\n      path: r\n")
    settings = ReplicaSettings(kind="file", url="file:///srv/r", directory=Path("/srv/r"))
    assert config.databases == (DatabaseSettings(path=Path("/srv/a.db"), replicas=(settings,)),)
    assert config.warnings == ()
    assert (config.logging.level, config.logging.stderr) == (None, False)


def test_every_key_of_a_database() -> None:
    found = database(
        "meta-path: ~/m, monitor-interval: 2s, checkpoint-interval: 0s, busy-timeout: 500ms, min-checkpoint-page-count: 10, "
        "verify-interval: 24h, restore-if-db-not-exists: yes, sync: commit"
    )
    assert found == DatabaseSettings(
        path=Path("/srv/a.db"),
        replicas=found.replicas,
        meta_path=Path("/home/me/m"),
        monitor_interval_s=2.0,
        checkpoint_interval_s=0.0,
        busy_timeout_s=0.5,
        min_checkpoint_pages=10,
        verify_interval_s=86400.0,
        restore_if_db_not_exists=True,
        sync="commit",
    )


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/x/a.db", "/x/a.db"),
        ("x/../a.db", "/srv/a.db"),
        ("~/a.db", "/home/me/a.db"),
        ("~you/a.db", "/srv/~you/a.db"),
        ("sqlite:///x/a.db", "/x/a.db"),
        ("sqlite3://a.db", "/srv/a.db"),
        ("sqlite://~/a.db", "/home/me/a.db"),
        ("sqlite4://a.db", "/srv/sqlite4:/a.db"),
        ("010", "/srv/010"),
        ("yes", "/srv/yes"),
        ("1e3", "/srv/1e3"),
    ],
)
def test_database_paths(text: str, path: str) -> None:
    assert read(f"dbs: [{{path: {text}, replica: {{path: r}}}}]").databases[0].path == Path(path)
    assert database_path(text, home=HOME, folder=FOLDER) == Path(path)


def test_a_home_comes_from_the_environment_or_is_missed() -> None:
    text = "dbs: [{path: ~/a.db, replica: {path: ~/r}}]"
    (found,) = load(text, environ={"HOME": "/h"}).databases
    assert (found.path, found.replicas[0].directory) == (Path("/h/a.db"), Path("/h/r"))
    with pytest.raises(ConfigError, match="HOME is not set"):
        load(text, environ={})


def test_several_replicas_keep_their_order() -> None:
    (found,) = read("dbs: [{path: a.db, replicas: [{path: r1}, {url: 's3://bucket/x'}, {url: 'file:///r3'}]}]").databases
    assert [item.url for item in found.replicas] == ["file:///srv/r1", "s3://bucket/x", "file:///r3"]


def test_look_up_by_path() -> None:
    config = read("dbs: [{path: a.db, replica: {path: r}}, {path: b.db, replica: {path: q}}]")
    assert config.database(Path("/srv/b.db")) is config.databases[1]
    assert config.database(Path("/srv/c.db")) is None


@pytest.mark.parametrize("text", ["", "dbs:", "dbs: []", "# nothing"])
def test_a_file_without_databases_is_a_file(text: str) -> None:
    assert read(text).databases == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", "the file must be a mapping"),
        ("dbs: {path: a}", "dbs: must be a list"),
        ("dbs: [a]", "dbs[0] must be a mapping"),
        ("dbs: [{replica: {path: r}}]", "dbs[0]: path is missing"),
        ("dbs: [{path: '', replica: {path: r}}]", "path is missing"),
        ("dbs: [{path: [a], replica: {path: r}}]", "dbs[0].path: must be text"),
        ("dbs: [{path: a}]", "must specify replica for database"),
        ("dbs: [{path: a, replicas: []}]", "must specify replica for database"),
        ("dbs: [{path: a, replica: {}}]", "file replica path required"),
        ("dbs: [{path: a, replica: {path: r}, replicas: [{path: q}]}]", "cannot specify 'replica' and 'replicas'"),
        (
            "dbs: [{path: a, replica: {path: r}}, {path: ./a, replica: {path: q}}]",
            "dbs[1]: duplicate path /srv/a (already used by dbs[0])",
        ),
        ("dbs: [{path: a, meta-path: m, replica: {path: r}}, {path: b, meta-path: m, replica: {path: q}}]", "duplicate metadata path"),
        ("dbs: [{path: a, replica: {path: r}}, {path: b, replica: {url: 'file:///srv/r'}}]", "duplicate replica file:///srv/r"),
        ("dbs: [{path: a, replicas: [{path: r}, {path: ./r}]}]", "duplicate replica file:///srv/r (used twice)"),
        ("dbs: [{path: a, min-checkpoint-page-count: 0, replica: {path: r}}]", "must be greater than 0"),
        ("dbs: [{path: a, min-checkpoint-page-count: '5', replica: {path: r}}]", "whole number"),
        ("dbs: [{path: a, min-checkpoint-page-count: 010, replica: {path: r}}]", "whole number"),
        ("dbs: [{path: a, restore-if-db-not-exists: 'true', replica: {path: r}}]", "true or false"),
        ("dbs: [{path: a, verify-interval: 0s, replica: {path: r}}]", "longer than 0"),
        ("dbs: [{dir: d, replica: {path: r}}]", "dbs[0].dir: 'pattern' is required when using 'dir'"),
        ("dbs: [{dir: d, pattern: '[a', replica: {path: r}}]", "dbs[0].pattern: syntax error in pattern"),
        ("dbs: [{dir: d, path: p, pattern: '*', replica: {path: r}}]", "dbs[0].dir: cannot specify both 'path' and 'dir'"),
        ("dbs: [{dir: d, pattern: '*', meta-path: m, meta-dir: n, replica: {path: r}}]", "cannot specify both 'meta-path' and 'meta-dir'"),
        ("dbs: [{dir: d, pattern: '*', restore-if-db-not-exists: true, replica: {path: r}}]", "not for directories"),
        ("dbs: [{dir: d, pattern: a, replica: {path: r}}, {dir: d, pattern: a, replica: {path: s}}]", "duplicate dir and pattern"),
        ("dbs: [{dir: d, pattern: a, replica: {path: r}}, {dir: e, pattern: a, replica: {path: r}}]", "duplicate replica"),
        ("pyrepl: {max-hot: 0}", "pyrepl.max-hot: must be greater than 0"),
        ('dbs: [{path: "a\\nb", replica: {path: r}}]', "control characters"),
    ],
)
def test_databases_that_are_refused(text: str, words: str) -> None:
    refused(text, words)


# -- replicas --------------------------------------------------------------------------------------------------------------------


def test_every_key_of_an_s3_replica() -> None:
    key = base64.b64encode(b"k" * 32).decode()
    found = replica(
        f"type: s3, bucket: bkt, path: a/b, region: eu-1, endpoint: 'example.com:9000', access-key-id: AK, secret-access-key: SK, "
        f"force-path-style: false, sign-payload: off, require-content-md5: no, sign-accept-encoding: no, skip-verify: true, "
        f"storage-class: GLACIER, part-size: 10MiB, concurrency: 3, sse-customer-algorithm: AES256, sse-customer-key: {key}"
    )
    assert (found.kind, found.url) == ("s3", "s3://bkt/a/b?endpoint=https://example.com:9000")
    settings = found.s3
    assert settings is not None
    assert (settings.bucket, settings.path, settings.region, settings.endpoint) == ("bkt", "a/b", "eu-1", "https://example.com:9000")
    assert (settings.access_key_id, settings.secret_access_key, settings.sse_customer_key) == ("AK", "SK", key)
    assert (settings.force_path_style, settings.sign_payload, settings.require_content_md5) == (False, False, False)
    assert (settings.sign_accept_encoding, settings.skip_verify, settings.storage_class) == (False, True, "GLACIER")
    assert (settings.part_size, settings.concurrency) == (10 << 20, 3)
    assert replica("url: 's3://bkt/x', sse-kms-key-id: kms").s3.sse_kms_key_id == "kms"  # type: ignore[union-attr]


def test_keys_complete_and_override_a_url() -> None:
    settings = replica("url: 's3://bkt/x?region=r1&partSize=6000000', region: r2, endpoint: 'https://h'").s3
    assert settings is not None
    assert (settings.bucket, settings.path, settings.region, settings.part_size) == ("bkt", "x", "r2", 6000000)
    assert (settings.endpoint, settings.path_style) == ("https://h", True)


def test_an_s3_path_is_taken_literally_as_the_peer_does() -> None:
    for path in ("/p/q", "p//q/", "./p"):
        text = with_replica(f"type: s3, bucket: bkt, path: {path}")
        assert read(text).databases[0].replicas[0].s3.path == path  # type: ignore[union-attr]
        assert "as it is written" in warnings(text)[0]
    for path in ("p/q", ""):
        assert warnings(with_replica(f"type: s3, bucket: bkt, path: '{path}'")) == []


def test_the_scheme_of_a_url_wins_over_the_type() -> None:
    assert replica("type: file, url: 's3://bkt/x'").kind == "s3"
    assert replica("type: s3, url: 'file:///x'").kind == "file"


@pytest.mark.parametrize(
    ("text", "size"),
    [("5242880", 5242880), ("10MB", 10_000_000), ("6 mb", 6_000_000), ("5MiB", 5 << 20), ("0.5GiB", 1 << 29), ("0", 5 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert replica(f"url: 's3://bkt/x', part-size: {text}").s3.part_size == size  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("url: x/y", "replica.url: not a URL"),
        ("path: 's3://bkt/x'", "replica path cannot be a url, please use the 'url' field instead: s3://bkt/x"),
        ("path: x, url: 'file:///y'", "cannot specify url & path for file replica"),
        ("path: x, url: 's3://bkt/y'", "cannot specify url & path for s3 replica"),
        ("bucket: b, url: 's3://bkt/y'", "cannot specify url & bucket for s3 replica"),
        ("type: s3", "bucket required for s3 replica"),
        ("type: sftp, host: h", "user required for sftp replica"),
        ("type: sftp, user: u", "host required for sftp replica"),
        ("url: 'sftp://h/x'", "replica URL has no user"),
        ("url: 'sftp://u@h/x', host: h", "cannot specify url & host for sftp replica"),
        ("type: gs", "bucket required for gs replica"),
        ("url: 'gs://b/x', bucket: b", "cannot specify url & bucket for gs replica"),
        ("url: 'gs://b/x', path: x", "cannot specify url & path for gs replica"),
        ("url: 'abs://c/x'", "abs needs an account name"),
        ("type: abs, account-name: a", "bucket required for abs replica"),
        ("type: oss", "bucket required for oss replica"),
        ("url: 'oss://b/x', part-size: 1KB", "part size is too small"),
        ("type: webdav", "webdav-url required for webdav replica"),
        ("type: webdav, webdav-url: 'ftp://h'", "not an endpoint"),
        ("url: 'webdav://h/x', webdav-url: 'http://h'", "cannot specify url & webdav-url for webdav replica"),
        ("type: nats", "bucket required for nats replica"),
        ("type: nats, bucket: b, path: x", "a NATS bucket holds one replica and has no path"),
        ("url: 'nats://h/a/b'", "not a NATS bucket"),
        ("url: 'nats://h/b', client-cert: c.pem", "client-cert and client-key go together"),
        ("url: 'nats://h/b', jwt: j", "jwt and seed go together"),
        ("url: 'nats://h/b', max-reconnects: many", "whole number, or -1"),
        ("url: 'nats://h/b', timeout: 0s", "must be longer than 0"),
        ("type: ftp", "unknown replica type in config: 'ftp'"),
        ("type: S3", "unknown replica type in config: 'S3'"),
        ("url: 's3://bkt/x?nonsense=1'", "unknown parameter"),
        ("url: 's3://bkt/x', endpoint: 'ftp://h'", "replica.endpoint: not an endpoint"),
        ("url: 's3://bkt/x', access-key-id: a", "access-key-id and secret-access-key go together"),
        ("url: 's3://bkt/x', part-size: 1MB", "at least 5MiB"),
        ("url: 's3://bkt/x', part-size: big", "must be a size"),
        ("url: 's3://bkt/x', concurrency: -1", "whole number"),
        ("url: 's3://bkt/x', sse-customer-algorithm: DES", "must be AES256"),
        ("url: 's3://bkt/x', sse-customer-algorithm: AES256", "without sse-customer-key"),
        ("url: 's3://bkt/x', sse-customer-key: short", "32 bytes in base64"),
        ("url: 's3://bkt/x', sse-customer-key: a, sse-customer-key-path: b", "cannot specify sse-customer-key & sse-customer-key-path"),
        ("type: s3, bucket: 'no/bucket'", "not a bucket name"),
        ("path: r, sync-interval: 0s", "must be longer than 0"),
        ("path: r, retention: 0s", "must be longer than 0"),
        ("path: r, sync-interval: 1d", "invalid duration"),
        ("path: r, sync-interval: '10'", "invalid duration"),
        ("path: r, sync-interval: -5s", "invalid duration"),
        ("path: r, sync-interval: [1s]", "must be a duration"),
        ("path: r, sync-interval: 9999999h", "292 years"),
    ],
)
def test_replicas_that_are_refused(keys: str, words: str) -> None:
    refused(with_replica(keys), words)


def test_global_values_are_inherited_where_a_replica_says_nothing() -> None:
    top = "access-key-id: AK\nsecret-access-key: SK\nregion: r1\nbucket: shared\nsync-interval: 3s\nskip-verify: true\n"
    found = replica("type: s3, path: x, region: r2, skip-verify: false", top)
    assert found.sync_interval_s == 3.0
    assert found.s3 is not None
    assert (found.s3.bucket, found.s3.region, found.s3.access_key_id, found.s3.secret_access_key) == ("shared", "r2", "AK", "SK")
    assert found.s3.skip_verify  # sticky, as the peer's
    assert replica("type: s3, path: x, sync-interval: 1s, bucket: own", top).s3.bucket == "own"  # type: ignore[union-attr]


def test_some_global_values_are_not_inherited_and_that_is_said() -> None:
    top = "type: s3\npath: /p\nurl: 's3://bkt/x'\nname: n\npart-size: 10MB\nconcurrency: 9\nhost-key: k\nwebdav-url: 'http://h'\n"
    found = read(f"{top}dbs: [{{path: a.db, replica: {{path: r}}}}, {{path: b.db, replica: {{url: 's3://bkt/y'}}}}]")
    assert [item.replicas[0].url for item in found.databases] == ["file:///srv/r", "s3://bkt/y"]
    assert found.databases[1].replicas[0].s3.concurrency is None  # type: ignore[union-attr]
    assert [note.line for note in found.warnings] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all("no effect" in note.text for note in found.warnings)


def test_litestreams_credential_variables() -> None:
    environ = {"LITESTREAM_ACCESS_KEY_ID": "AK", "LITESTREAM_SECRET_ACCESS_KEY": "SK"}
    settings = replica("url: 's3://bkt/x'", environ=environ).s3
    assert settings is not None
    assert (settings.access_key_id, settings.secret_access_key) == ("AK", "SK")
    assert replica("url: 's3://bkt/x', access-key-id: a, secret-access-key: s", environ=environ).s3.access_key_id == "a"  # type: ignore[union-attr]


# -- the history -----------------------------------------------------------------------------------------------------------------


def test_the_history_of_the_file() -> None:
    top = (
        "levels: [{interval: 1m}, {interval: 2h}]\nsnapshot: {interval: 6h, retention: 48h}\nl0-retention: 0\n"
        "l0-retention-check-interval: 30s\nretention: {enabled: false}"
    )
    assert replica("path: r", top).history == History((60.0, 7200.0), 21600.0, 172800.0, 0.0, 30.0, False)


def test_a_replicas_own_retention_does_what_it_says() -> None:
    (found,) = read(
        "snapshot: {retention: 48h}\ndbs: [{path: a, replicas: [{path: r, retention: 72h, snapshot-interval: 12h}, {path: q}]}]"
    ).databases
    assert [item.history.snapshot_retention_s for item in found.replicas] == [72 * 3600.0, 48 * 3600.0]
    assert [item.history.snapshot_interval_s for item in found.replicas] == [12 * 3600.0, 24 * 3600.0]


def two(first: str, second: str, top: str = "") -> str:
    return f"{top}\ndbs:\n  - {{path: a, replica: {{path: r}}, {first}}}\n  - {{path: b, replica: {{path: q}}, {second}}}\n"


def test_a_databases_snapshot_settings_hold_for_all() -> None:
    text = two("snapshot: {retention: 72h}", "")
    assert [item.replicas[0].history.snapshot_retention_s for item in read(text).databases] == [72 * 3600.0] * 2
    assert "holds for all databases" in warnings(text)[0]
    assert warnings(two("snapshot: {retention: 72h}", "snapshot: {retention: 72h}")) == []
    assert warnings(two("snapshot: {retention: 72h}", "", "snapshot: {retention: 72h}")) == []


def test_conflicting_snapshot_settings_are_refused() -> None:
    refused(
        two("snapshot: {interval: 1h}", "snapshot: {interval: 2h}"), "dbs[1].snapshot.interval: conflicts with dbs[0].snapshot.interval"
    )
    refused(two("snapshot: {interval: 1h}", "snapshot: {interval: 2h}"), "conflicts", lenient=True)
    refused(two("snapshot: {interval: 1h}", "", "snapshot: {interval: 2h}"), "holds for all databases")
    config = read(two("snapshot: {interval: 1h}", "", "snapshot: {interval: 2h}"), lenient=True)
    assert config.databases[0].replicas[0].history.snapshot_interval_s == 7200.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("levels: []", "1 to 8 entries"),
        (f"levels: [{', '.join(['{interval: 1s}'] * 9)}]", "1 to 8 entries"),
        ("levels: [{interval: 0s}]", "levels[0].interval: must be longer than 0"),
        ("levels: [{}]", "levels[0]: interval is missing"),
        ("levels: [{interval: 1s, retention: 1h}]", "unknown key"),
        ("snapshot: {interval: 0s}", "snapshot.interval: must be longer than 0"),
        ("snapshot: 1h", "snapshot must be a mapping"),
        ("retention: 24h", "retention: must be a mapping"),
        ("retention: {enabled: maybe}", "true or false"),
        ("l0-retention-check-interval: 0", "longer than 0"),
    ],
)
def test_histories_that_are_refused(text: str, words: str) -> None:
    refused(text, words)


# -- keys and numbers without a meaning ------------------------------------------------------------------------------------------


@pytest.mark.fault("F57")
@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (
            "dbs:\n  - path: a\n    replica:\n      path: r\n      sync-intervall: 1s",
            "5:7",
            "dbs[0].replica.sync-intervall (did you mean sync-interval?)",
        ),
        ("dbs:\n  - path: a\n    sync-interval: 1s\n    replica: {path: r}", "3:5", "dbs[0].sync-interval (it belongs under replica)"),
        ("DBS: []", "1:1", "DBS (did you mean dbs?)"),
        ("snapshot_retention: 1h", "1:1", "snapshot_retention"),
        ("retention-check-interval: 1h", "1:1", "(it belongs under replica)"),
        ("dbs:\n- path: a\n  addr: x\n  replica: {path: r}", "3:3", "(it belongs under the top level of the file)"),
        ("logging: {lvl: info}", "1:11", "logging.lvl"),
        ("x-common: {a: 1}\nsnapshot: {x-a: 1}", "2:12", "snapshot.x-a"),
    ],
)
def test_unknown_keys_are_refused_with_their_place(text: str, place: str, words: str) -> None:
    error = refused(text, f"c.yml:{place}: unknown key", words)
    assert "-lenient" in error.hint
    found = read(text, lenient=True)
    assert f"line {place.partition(':')[0]}, column {place.partition(':')[2]}: unknown key" in str(found.warnings[0])


@pytest.mark.parametrize(
    ("number", "reading", "seconds"),
    [("10", "10ns", 1e-8), ("1500", "1.5µs", 1.5e-6), ("2_000_000", "2ms", 2e-3), ("60000000000", "1m", 60.0), ("1.5", "1ns", 1e-9)],
)
def test_a_duration_without_a_unit_is_refused_with_both_readings(number: str, reading: str, seconds: float) -> None:
    text = with_replica(f"path: r, sync-interval: {number}")
    refused(text, "replica.sync-interval", f"{reading} as Litestream reads it; write {number}s if seconds are meant")
    config = read(text, lenient=True)
    assert config.databases[0].replicas[0].sync_interval_s == pytest.approx(seconds)
    assert reading in config.warnings[0].text


def test_zero_needs_no_unit() -> None:
    assert database("checkpoint-interval: 0").checkpoint_interval_s == 0.0


@pytest.mark.parametrize("number", ["1e400", "99999999999999999999", "-1", "1.2.3", "."])
def test_numbers_that_are_no_durations(number: str) -> None:
    refused(with_replica(f"path: r, sync-interval: {number}"), lenient=True)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("mcp-addr: x", 1, "mcp-addr"),
        ("validation: {interval: 1h}", 1, "validation"),
        ("verify-compaction: true", 1, "verify-compaction"),
        ("auto-recover: true", 1, "auto-recover"),
        ("dbs:\n - {path: a, truncate-page-n: 1, replica: {path: r}}", 2, "dbs[0].truncate-page-n"),
        ("dbs:\n - {path: a, max-checkpoint-page-count: 1, replica: {path: r}}", 2, "max-checkpoint-page-count"),
        ("dbs:\n - {path: a, monitor-interval: 0, replica: {path: r}}", 2, "monitor-interval"),
        ("dbs:\n - {path: a, watch: true, replica: {path: r}}", 2, "watch: goes with dir only"),
        ("dbs:\n - {path: a, replica: {path: r, validation-interval: 1h}}", 2, "validation-interval"),
        ("dbs:\n - {path: a, replica: {path: r, retention-check-interval: 1h}}", 2, "retention-check-interval"),
        ("dbs:\n - {path: a, replica: {path: r, max-sync-ltx-files: 1}}", 2, "max-sync-ltx-files"),
        ("dbs:\n - {path: a, replica: {path: r, bucket: b}}", 2, "replica.bucket: of no use for a replica of type file"),
        ("dbs:\n - {path: a, replica: {url: 's3://bkt/x', host: h}}", 2, "replica.host: of no use for a replica of type s3"),
        ("dbs:\n - {path: a, replicas: [{path: r, sync-interval: 1s}, {path: q}]}", 2, "shortest sync-interval"),
    ],
)
def test_what_has_no_effect_is_said_with_its_line(text: str, line: int, words: str) -> None:
    (note,) = read(text).warnings
    assert note.line == line
    assert words in note.text


def test_keys_for_anchors_are_free_and_empty_keys_say_nothing() -> None:
    assert warnings("x-s3: &s3 {region: r}\naddr:\nexec: ''\ndbs: [{path: a, replica: {<<: *s3, url: 's3://bkt/x'}}]") == []


def test_logging() -> None:
    for text, level in (("DEBUG", "debug"), ("warning", "warn"), ("WARN", "warn"), ("trace", "trace")):
        assert read(f"logging: {{level: {text}, stderr: true, type: text}}").logging.level == level
    assert read("logging: {stderr: true}").logging.stderr
    refused("logging: {level: loud}", "must be trace, debug")
    for kind in ("text", "json", "pretty"):
        assert read(f"logging: {{type: {kind}, source: true}}").logging == Logging(None, False, kind, True)  # type: ignore[arg-type]
    assert read("logging: {type: '', level: ''}").logging == Logging(None, False, "text", False)
    refused("logging: {type: xml}", "logging.type: must be text, json or pretty")


def test_what_is_said_about_the_process() -> None:
    text = """
addr: "127.0.0.1:9090"
exec: sh -c 'sleep 1; exit 3'
socket: {enabled: true, path: run/s.sock, permissions: 0660}
shutdown-sync-timeout: 10s
shutdown-sync-interval: 100ms
heartbeat-url: https://alarm.example.com/ping/SECRET?x=1
heartbeat-interval: 1m
logging: {type: json}
"""
    found = read(text)
    assert found.warnings == ()
    assert found.logging.kind == "json"
    assert found.daemon == Daemon(
        address=("127.0.0.1", 9090),
        command=("sh", "-c", "sleep 1; exit 3"),
        socket=Socket(True, Path("/srv/run/s.sock"), 0o660),
        shutdown_timeout_s=10.0,
        shutdown_interval_s=0.1,
        heartbeat_url="https://alarm.example.com/ping/SECRET?x=1",
        heartbeat_interval_s=60.0,
    )
    assert "SECRET" not in repr(found)
    assert read("").daemon == Daemon()


@pytest.mark.parametrize(("text", "address"), [(":9090", ("", 9090)), ("localhost:0", ("localhost", 0)), ("[::1]:80", ("::1", 80))])
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert read(f"addr: '{text}'").daemon.address == address


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("addr: localhost", "must specify port for bind address"),
        ("addr: ':99999'", "must specify port"),
        ("addr: '::1:80'", "must specify port"),
        ("addr: 'http://h:80'", "must specify port"),
        ("exec: 'app; echo'", "; outside of quotes"),
        ("exec: 'app \"'", "a quote is not closed"),
        ("exec: \"''\"", "it is empty"),
        ("socket: /run/s.sock", "must be a mapping"),
        ("socket: {permissions: 600}", "octal number such as 0600"),
        ("socket: {permissions: 0999}", "octal number"),
        ("socket: {permissions: 04600}", "octal number"),
        ("socket: {enabled: 'true'}", "must be true or false"),
        ("shutdown-sync-timeout: 10", "10 without a unit"),
        ("shutdown-sync-interval: 0s", "must be longer than 0"),
        ("heartbeat-url: 'ftp://h/x'", "must be a URL that begins with http:// or https://"),
        ("heartbeat-url: 'file:///etc/passwd'", "must be a URL"),
        ("heartbeat-url: 'https:///x'", "must be a URL"),
        ("heartbeat-url: 'http://h:x/'", "must be a URL"),
        ('heartbeat-url: "http://h/ x"', "must be a URL"),
        ("heartbeat-interval: 59s", "must be at least 1m"),
    ],
)
def test_what_is_refused_about_the_process(text: str, words: str) -> None:
    refused(text, "c.yml:1:", words)


def test_variables_and_their_warnings() -> None:
    text = "dbs:\n  - path: $DB\n    replica: {path: '${ROOT:-x}r$PID'}\n"
    config = read(text, environ={"DB": "/x/a.db"})
    assert config.databases[0].path == Path("/x/a.db")
    assert config.databases[0].replicas[0].directory == Path("/srv/r42")
    assert [note.line for note in config.warnings] == [3]
    assert read("dbs: [{path: $A, replica: {path: r}}]", expand_env=False).databases[0].path == Path("/srv/$A")


def test_warnings_are_bounded() -> None:
    assert len(read("".join(f"k{n}: 1\n" for n in range(5000)), lenient=True).warnings) == 200


# -- clients and secrets ---------------------------------------------------------------------------------------------------------


def test_clients() -> None:
    client = open_replica(replica("path: r"))
    assert isinstance(client, FileClient)
    assert client.url == "file:///srv/r"
    client = open_replica(replica("url: 's3://bkt/x?endpoint=http://127.0.0.1:1'"))
    assert isinstance(client, S3Client)
    assert client.url == "s3://bkt/x?endpoint=http://127.0.0.1:1"


def test_a_key_file_is_read_when_the_client_is_made(tmp_path: Path) -> None:
    key = base64.b64encode(b"k" * 32).decode()
    (tmp_path / "key").write_text(f" {key}\n")
    settings = replica(f"url: 's3://bkt/x', sse-customer-algorithm: AES256, sse-customer-key-path: {tmp_path}/key")
    client = open_replica(settings)
    assert isinstance(client, S3Client)
    assert client.settings.sse_customer_key == key
    (tmp_path / "key").write_text("not a key")
    with pytest.raises(ConfigError, match="32 bytes in base64"):
        open_replica(settings)
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError, match=f"cannot read sse-customer-key-path {tmp_path}/key"):
        open_replica(settings)


@pytest.mark.fault("F62")
@pytest.mark.parametrize(
    "keys", ["recipients: [age1abc]", "identities: [AGE-SECRET-KEY-1XYZ]", "recipients: [age1abc], identities: [AGE-SECRET-KEY-1XYZ]"]
)
@pytest.mark.parametrize("place", ["replica", "top"])
def test_encryption_that_was_asked_for_never_becomes_plaintext(keys: str, place: str) -> None:
    found = replica("path: r", f"age: {{{keys}}}") if place == "top" else replica(f"path: r, age: {{{keys}}}")
    assert found.age_recipients == (("age1abc",) if "age1abc" in keys else ())
    assert found.age_identities == (("AGE-SECRET-KEY-1XYZ",) if "XYZ" in keys else ())
    with pytest.raises(ConfigError, match=r"age (recipient|identity) 1 is not valid") as caught:
        open_replica(found)
    assert "XYZ" not in f"{found!r} {caught.value} {caught.value.hint}"


def test_a_replica_with_age_keys_is_an_encrypted_one() -> None:
    secret = pyrage.x25519.Identity.generate()
    client = open_replica(replica(f"path: r, age: {{recipients: ['{secret.to_public()}'], identities: ['{secret}']}}"))
    assert isinstance(client, AgeClient)
    assert client.url.startswith("age+file://")


@pytest.mark.parametrize(
    "keys",
    [
        "age: $X",
        "age: {}",
        "age: {recipients: $X}",
        "age: {recipients: [$X]}",
        "age: {recipients: ['$X']}",
        "age: {recipients: [], identities: []}",
    ],
)
@pytest.mark.parametrize("place", ["replica", "top"])
def test_an_unset_variable_does_not_switch_encryption_off(keys: str, place: str) -> None:
    for lenient in (False, True):
        text = f"{keys}\n{with_replica('path: r')}" if place == "top" else with_replica(f"path: r, {keys}")
        refused(text, "age", lenient=lenient)


def test_a_secret_key_is_no_recipient() -> None:
    error = refused(with_replica("path: r, age: {recipients: [AGE-SECRET-KEY-1XYZ]}"), "not a recipient")
    assert "XYZ" not in str(error)


SECRETS = "type: s3, bucket: bkt, access-key-id: AKxxHIDDEN, secret-access-key: SKxxHIDDEN"


@pytest.mark.fault("F59")
@pytest.mark.parametrize(
    ("keys", "settings"),
    [
        ("type: gs, bucket: b, path: x/y", GSSettings(bucket="b", path="x/y")),
        ("type: gcs, bucket: b, path: x", GSSettings(bucket="b", path="x")),
        (
            "url: 'abs://acc@c/x', account-key: KEY, sas-token: SAS, endpoint: 'https://h'",
            ABSSettings(bucket="c", path="x", account_name="acc", account_key="KEY", sas_token="SAS", endpoint="https://h"),
        ),
        ("type: abs, bucket: c, account-name: acc", ABSSettings(bucket="c", account_name="acc")),
        (
            "url: 'oss://b/x', region: r, endpoint: h, part-size: 1MiB, concurrency: 2, access-key-id: AK, secret-access-key: SK",
            OSSSettings(
                bucket="b", path="x", region="r", endpoint="https://h", part_size=1 << 20, concurrency=2, access_key_id="AK", secret_access_key="SK"
            ),
        ),
        (
            "type: sftp, host: 'h:2222', user: u, password: p, path: rel/x, key-path: k, host-key: 'ssh-ed25519 A', concurrent-writes: false",
            SFTPSettings(
                host="h:2222", user="u", password="p", path="rel/x", key_path="/srv/k", host_key="ssh-ed25519 A", concurrent_writes=False
            ),
        ),
        ("url: 'sftp://u:p%40@h/x', user: other", SFTPSettings(host="h", user="other", password="p@", path="/x")),
        (
            "type: webdav, webdav-url: 'https://h/dav/', webdav-username: u, webdav-password: p, path: x",
            WebDAVSettings(server="https://h/dav", username="u", password="p", path="x"),
        ),
        ("url: 'webdavs://u:p@h/x'", WebDAVSettings(server="https://h", username="u", password="p", path="/x")),
        ("type: nats, bucket: b", NATSSettings(server="127.0.0.1", bucket="b")),
        (
            "url: 'nats://h:4223/b', creds: c, tls: true, root-cas: [ca.pem], client-cert: cc, client-key: ck, max-reconnects: -1, "
            "reconnect-wait: 1s, timeout: 3s",
            NATSSettings(
                server="h:4223", bucket="b", creds="/srv/c", tls=True, root_cas=("/srv/ca.pem",), client_cert="/srv/cc", client_key="/srv/ck",
                reconnect_wait_s=1.0, timeout_s=3.0,
            ),
        ),
    ],
)  # fmt: skip
def test_keys_of_other_stores(keys: str, settings: StoreSettings) -> None:
    found = replica(keys)
    assert (found.store, found.kind, found.url, found.s3) == (settings, settings.kind, settings.url, None)
    for secret in ("account_key", "sas_token", "access_key_id", "secret_access_key", "password"):
        assert f"{secret}=" not in f"{found!r} {settings!r}"
    assert warnings(with_replica(keys)) == ([] if "SAS" not in keys else [f"line 1, column 29: dbs[0].replica: {BOTH}"])


BOTH = "both account-key and sas-token: the token is used"


def test_settings_of_other_stores_are_inherited_where_litestream_does() -> None:
    top = "user: u\npassword: p\nbucket: shared\naccount-name: acc\nhost-key: k\nwebdav-username: w\n"
    assert replica("type: sftp, host: h, path: x", top).store == SFTPSettings(host="h", user="u", password="p", path="x")
    assert replica("type: abs, path: x", top).store == ABSSettings(bucket="shared", account_name="acc", path="x")
    assert replica("url: 'gs://own/x'", top).store == GSSettings(bucket="own", path="x")
    assert replica("url: 'webdav://h/x'", top).store == WebDAVSettings(server="http://h", path="/x")


def test_litestreams_variables_for_azure() -> None:
    environ = {"LITESTREAM_AZURE_ACCOUNT_KEY": "KEY", "LITESTREAM_AZURE_SAS_TOKEN": "SAS"}
    assert replica("url: 'abs://a@c/x'", environ=environ).store == ABSSettings(
        bucket="c", path="x", account_name="a", account_key="KEY", sas_token="SAS"
    )


def test_keys_of_another_store_are_warned_about() -> None:
    assert "of no use for a replica of type gs" in warnings(with_replica("url: 'gs://b/x', host: h"))[0]
    assert "of no use for a replica of type sftp" in warnings(with_replica("url: 'sftp://u@h/x', region: r"))[0]


@pytest.mark.parametrize(
    "keys",
    [
        "url: 'sftp://u:xxHIDDEN@h/x'",
        "url: 'webdav://u:xxHIDDEN@h/x'",
        "url: 'nats://u:xxHIDDEN@h/b'",
        "url: 'nats://xxHIDDEN@h/b'",
        "url: 'nats://h/b', jwt: xxHIDDEN, seed: xxHIDDEN",
        "url: 'nats://h/b', nkey: xxHIDDEN",
        "url: 'abs://a@c/x', account-key: xxHIDDEN, sas-token: xxHIDDEN",
        "url: 'oss://b/x', access-key-id: xxHIDDEN, secret-access-key: xxHIDDEN",
    ],
)
def test_settings_of_other_stores_show_no_secret(keys: str) -> None:
    assert "HIDDEN" not in repr(read(with_replica(keys)))


@pytest.mark.parametrize(
    "text",
    [
        with_replica(SECRETS.replace("SKxxHIDDEN", "[SKxxHIDDEN]")),
        with_replica(SECRETS + ", sse-customer-key: xxHIDDEN"),
        with_replica(SECRETS + ", part-size: 1"),
        with_replica(SECRETS + ", nonsense: xxHIDDEN"),
        with_replica("url: 's3://AK:xxHIDDEN@bucket/x'"),
        with_replica("path: 's3://AK:xxHIDDEN@bucket/x'"),
        with_replica("url: 's3://bucket/x?secret=xxHIDDEN'"),
        with_replica("url: 'sftp://u:xxHIDDEN@h/x?a=xxHIDDEN'"),
        with_replica("url: 'abs://account:xxHIDDEN@c/x'"),
        with_replica("url: 'webdav://u:xxHIDDEN@h h/x'"),
        with_replica("url: 'nats://xxHIDDEN@h/a/b'"),
        with_replica("type: webdav, webdav-url: 'https://u:xxHIDDEN@h/x'"),
        with_replica("url: 's3://bkt/x', endpoint: 'https://u:xxHIDDEN@h'"),
        with_replica(SECRETS) + "\n  bad: xxHIDDEN: yaml",
        with_replica("type: s3, secret-access-key xxHIDDEN, bucket: b"),
        with_replica("type: s3, secret-access-key:xxHIDDEN"),
        with_replica("xxHIDDEN: 1"),
        with_replica("path: r, sync-interval: xxHIDDEN"),
        with_replica("type: xxHIDDEN"),
        with_replica("type: s3, secret-access-key: *xxHIDDEN"),
        with_replica("type: s3, secret-access-key: !xxHIDDEN"),
        with_replica("type: s3, secret-access-key: @xxHIDDEN"),
        with_replica("type: s3, secret-access-key: &xxHIDDEN"),
    ],
)
def test_errors_show_no_secret(text: str) -> None:
    error = refused(text)
    assert "HIDDEN" not in f"{error!r} {error} {error.hint}"


def test_values_and_warnings_show_no_secret() -> None:
    key = base64.b64encode(b"xxHIDDENxxHIDDENxxHIDDENxxHIDDEN").decode()
    config = read(with_replica(f"{SECRETS}, sse-customer-key: {key}, password: xxHIDDEN") + "\naccess-key-id: pa$xxHIDDEN\n")
    assert config.warnings
    assert "HIDDEN" not in repr(config)
    assert key not in repr(config)


# -- hostile files ---------------------------------------------------------------------------------------------------------------

# Words that mean something in YAML or here, and the keys, one a line or two: they are only ever read as lists.
KEYS = """dbs path replica replicas url type bucket age recipients snapshot interval levels retention enabled sync-interval part-size endpoint
logging level l0-retention region access-key-id unknown"""
SIGNS = """s3 file 10 1s 24h true yes ~ null s3://bkt/x $HOME ${X:-d} << *a &a !x - ? : , [ ] { } | > # ' " \\ 1e999 0x10 -1"""
WORDS = st.sampled_from([*KEYS.split(), *SIGNS.split(), "\n", "\n  ", "\n    - ", ": ", "- ", " ", "\t", "\0", "é"])
VALUES = st.recursive(
    st.sampled_from(["a", "10", "1s", "true", "~", "s3://bkt/x", "''", "$X", "-1", "[]", "{}"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(
            st.sampled_from(KEYS.split()),
            inner,
            max_size=4,
        ).map(lambda entries: f"{{{', '.join(f'{key}: {value}' for key, value in entries.items())}}}"),
    ),
    max_leaves=20,
)


@given(st.one_of(st.text(max_size=300), st.lists(WORDS, max_size=40).map("".join), VALUES), st.booleans())
def test_any_text_is_a_configuration_or_an_error_with_a_place(text: str, lenient: bool) -> None:
    started = time.process_time()
    try:
        config = read(text, lenient=lenient)
    except ConfigError as error:
        outcome, is_right = str(error), str(error).startswith("c.yml:")
    else:
        outcome, is_right = repr(config), all(item.path.is_absolute() and item.replicas for item in config.databases)
    assert is_right, outcome
    assert time.process_time() - started < 5


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "x" * (1 << 21),
        "$A" * 150_000,
        "\ud800",
        "dbs: [" + "{path: a, replica: {path: r}}," * 4_000 + "]",
        "dbs: [" + ",".join(f"{{path: a{n}, replica: {{path: r{n}}}}}" for n in range(4_000)) + "]",
        "".join(f"key{n}: 1\n" for n in range(15_000)),
        "a" * 1_000_000 + ": 1",
        "l0-retention: " + "1" * 1_000_000,
        "l0-retention: " + "1" * 1_000_000 + "h",
        "dbs: &d [*d]",
        "p: &p {path: r}\ndbs: [" + ",".join(["{path: a, replicas: [" + "*p," * 20 + "]}"] * 1500) + "]",
    ],
)
def test_large_and_strange_files_take_bounded_time(text: str, lenient: bool) -> None:
    started = time.process_time()
    with contextlib.suppress(ConfigError):
        read(text, lenient=lenient, environ={"A": "x" * 10})
    assert time.process_time() - started < 10


# -- the format ------------------------------------------------------------------------------------------------------------------


def of_replicas(*keys: str, own: str = "") -> str:
    items = ", ".join(f"{{path: r{number}, {key}}}" for number, key in enumerate(keys))
    return f"dbs: [{{path: a.db, {own} replicas: [{items}]}}]"


@pytest.mark.parametrize(
    "text",
    [
        of_replicas("", own="format: v0.3,"),
        of_replicas("", "", own="format: v0.3,"),
        of_replicas("format: v0.3"),
        of_replicas("format: v0.3", "format: v0.3"),
        of_replicas("format: v0.3", "", own="format: v0.3,"),
    ],
)
def test_a_database_or_all_its_replicas_name_the_format(text: str) -> None:
    config = read(text)
    assert config.databases[0].format == "v0.3"
    assert not config.warnings


@pytest.mark.parametrize("text", [of_replicas("", ""), of_replicas("format: ltx", ""), of_replicas("", own="format: ltx,")])
def test_the_format_is_ltx_unless_told_otherwise(text: str) -> None:
    assert read(text).databases[0].format == "ltx"


@pytest.mark.parametrize(
    "text",
    [
        of_replicas("format: v0.3", ""),
        of_replicas("", "format: v0.3"),
        of_replicas("format: v0.3", "format: ltx"),
        of_replicas("format: v0.3", own="format: ltx,"),
        of_replicas("", "format: ltx", own="format: v0.3,"),
    ],
)
def test_the_replicas_of_a_database_have_one_format(text: str) -> None:
    error = refused(text, "format")
    assert "one format" in error.hint


def test_an_unknown_format_and_drills_in_that_of_0_3_are_refused() -> None:
    refused(of_replicas("format: v0.4"), "must be ltx or v0.3")
    refused(of_replicas("format: [v0.3]"), "must be text")
    refused(of_replicas("", own="format: v0.3, verify-interval: 1h,"), "has no drills")
    refused("format: v0.3\n" + of_replicas(""), "format")


def test_the_pacing_is_one_of_two() -> None:
    assert database("sync: interval").sync == "interval"
    refused(of_replicas("", own="sync: 1s,"), "must be interval or commit")
    refused("sync: commit\n" + of_replicas(""), "sync")
