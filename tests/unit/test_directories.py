"""Patterns, replica paths and the walk of `dir:`. That the peer comes to the same paths is shown in tests/compat/test_fleet_paths.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from replicator import config, fleet, livefile
from replicator.directories import DirectorySettings, is_pattern, matches
from replicator.errors import ConfigError
from replicator.fleet import databases_in, find
from tests.e2e.databases import connect


def directory(text: str) -> DirectorySettings:
    return config.load(text, environ={}, home=Path("/h"), folder=Path("/")).directories[0]


def entry(root: Path, **keys: str) -> DirectorySettings:
    lines = "".join(f"\n   {key.replace('_', '-')}: {value}" for key, value in {"pattern": "'*.db'", **keys}.items())
    return directory(f"dbs:\n - dir: {root}{lines}\n   replica: {{path: /r}}")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.db", "a.db", True), ("*.db", ".a.db", True), ("*.db", "a.db2", False), ("*", "", True), ("?.db", "ä.db", True), ("?.db", "ab.db", False),
        ("[a-c].db", "b.db", True), ("[a-c].db", "d.db", False), ("[^a-c].db", "d.db", True), ("[!a].db", "!.db", True), ("[!a].db", "b.db", False),
        (r"\*.db", "*.db", True), (r"\*.db", "a.db", False), (r"[\]]", "]", True), (r"[a\-z]", "-", True), (r"[a\-z]", "b", False),
        ("a{b,c}", "ab", False), ("a{b,c}", "a{b,c}", True), ("[c-a]", "b", False), ("a.b", "axb", False), ("*.db", "a\n.db", True),
    ],
)  # fmt: skip
def test_patterns_are_those_of_go(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize("pattern", ["[", "[]", "[a", "[a-", "[-a]", "[a-]", "\\", "[^]", "[\\"])
def test_malformed_patterns(pattern: str) -> None:
    assert not is_pattern(pattern)


@pytest.mark.parametrize(
    ("replica", "urls"),
    [
        ("{path: /r/./x}", ["file:///r/x/s ub/[z]%.db"]),
        ("{url: 'file:///r/x%201'}", ["file:///r/x%201/s%20ub/%5Bz%5D%25.db"]),
        ("{url: 's3://bkt/base'}", ["s3://bkt/base/s ub/[z]%25.db"]),
        ("{type: s3, bucket: bkt}", ["s3://bkt/s ub/[z]%25.db"]),
        ("{type: s3, bucket: bkt, path: x/}", ["s3://bkt/x/s ub/[z]%25.db"]),
    ],
)
def test_a_database_has_its_replica_below_that_of_the_directory(replica: str, urls: list[str]) -> None:
    found = directory(f"dbs: [{{dir: /d, pattern: '*', recursive: true, replica: {replica}}}]").database(Path("/d/s ub/[z]%.db"))
    assert [item.url for item in found.replicas] == urls
    assert found.path == Path("/d/s ub/[z]%.db")


def test_metadata_folders() -> None:
    path = Path("/d/sub/b.db")
    assert entry(Path("/d"), recursive="true").database(path).meta_path is None
    assert entry(Path("/d"), recursive="true", meta_path="/m").database(path).meta_path == Path("/m/sub/.b.db-litestream")
    assert entry(Path("/d"), recursive="true", meta_dir="/m").database(path).meta_path == Path("/m/sub/b.db-litestream")


def test_a_database_of_a_directory_is_found_by_its_path() -> None:
    text = "dbs:\n - {dir: /d, pattern: '*.db', replica: {path: /r}}\n - {path: /d/x.db, replica: {path: /other}}"
    found = config.load(text, environ={}, folder=Path("/"))
    named, in_directory = found.database(Path("/d/x.db")), found.database(Path("/d/y.db"))
    assert named is not None
    assert named.replicas[0].url == "file:///other"
    assert in_directory is not None
    assert in_directory.replicas[0].url == "file:///r/y.db"
    assert found.database(Path("/d/sub/y.db")) is None  # not recursive
    assert found.database(Path("/d/y.txt")) is None
    assert found.database(Path("/d/y.db-wal")) is None


def test_the_walk(tmp_path: Path) -> None:
    for name in ("a.db", "sub/b.db", ".hidden/c.db", ".a.db-litestream/pyrepl/pages.db", "r/ltx.db", "m/x.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        connect(tmp_path / name).close()
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("no database, but long enough")
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "other.txt").touch()
    os.mkfifo(tmp_path / "fifo.db")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "self.db").symlink_to("self.db")
    (tmp_path / "gone.db").symlink_to("nowhere")
    (tmp_path / "link.db").symlink_to("a.db")
    text = f"dbs: [{{dir: {tmp_path}, pattern: '*.db', recursive: true, meta-dir: {tmp_path}/m, replica: {{path: {tmp_path}/r}}}}]"
    found = find(directory(text))
    assert [str(path.relative_to(tmp_path)) for path in found.databases if path.parent == tmp_path] == [
        "a.db",
        "link.db",
    ]  # the link comes last
    assert {str(path.relative_to(tmp_path)) for path in found.databases} == {"a.db", "link.db", "sub/b.db", ".hidden/c.db"}
    reasons = {os.path.basename(path): why for path, why in found.skipped.items()}
    assert reasons == {
        "empty.db": "not a database", "text.db": "not a database", "fifo.db": "not a file", "gone.db": "not a file",
        "self.db": "cannot be read: too many levels of symbolic links",
    }  # fmt: skip
    assert [path.name for path in find(entry(tmp_path)).databases] == ["a.db", "link.db"]


def test_nothing_there_is_an_error_unless_it_is_watched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no SQLite databases found in directory"):
        databases_in(entry(tmp_path))
    assert databases_in(entry(tmp_path, watch="true")) == []
    with pytest.raises(ConfigError, match=r"failed to scan directory .*: no such file or directory"):
        databases_in(entry(tmp_path / "none", watch="true"))


@pytest.mark.slow
def test_a_hundred_thousand_files_that_are_none(tmp_path: Path) -> None:
    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        source = tmp_path / str(folder) / "0.db"
        source.touch()
        for number in range(1, 10_000):
            os.link(source, tmp_path / str(folder) / f"{number}.db")  # a link costs less than a file
    found = find(entry(tmp_path, recursive="true"))
    assert (len(found.skipped), found.databases, set(found.skipped.values())) == (100_000, [], {"not a database"})


def test_looking_at_a_file_that_is_in_use_does_not_close_it(tmp_path: Path) -> None:
    connect(tmp_path / "a.db").close()
    file, key = livefile.acquire(tmp_path / "a.db")
    os.link(tmp_path / "a.db", tmp_path / "b.db")
    assert fleet.why_no_database(tmp_path / "b.db") == ""
    os.fstat(file)
    assert not livefile.close_unused(key)
    livefile.release(key)
    assert livefile.close_unused(key)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
