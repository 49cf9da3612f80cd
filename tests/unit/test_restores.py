"""Restores that run on this machine are seen by others; dead ones and other users' folders are not believed."""

from __future__ import annotations

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replicator import restores
from replicator.format.ltx import TXID, FileInfo
from replicator.restorer import restore_database
from replicator.restores import announce, default_folder, planned
from replicator.storage.memory import MemoryClient
from tests.unit.test_restore import chain_of_three

URL = "s3://bucket/path"


def info(level: int, low: int, high: int) -> FileInfo:
    return FileInfo(level, TXID(low), TXID(high), 100, datetime.now(UTC))


def test_a_plan_is_seen_while_the_restore_runs(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "restores"
    folder.parent.parent.mkdir(exist_ok=True)
    assert planned(URL, folder=folder) == set()
    with announce(folder) as one, announce(folder) as two:
        one.plan(URL, [info(9, 1, 5), info(0, 6, 6)])
        two.plan("s3://bucket/other", [info(0, 7, 7)])
        assert planned(URL, folder=folder) == {(9, 1, 5), (0, 6, 6)}
        two.plan(URL, [info(1, 6, 8)])
        assert planned(URL, folder=folder) == {(9, 1, 5), (0, 6, 6), (1, 6, 8)}
        one.plan(URL, [info(1, 6, 9)])
        assert planned(URL, folder=folder) == {(1, 6, 9), (1, 6, 8)}
    assert planned(URL, folder=folder) == set()
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700


def test_dead_restores_are_swept_and_their_half_written_notes_too(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "restores"
    with announce(folder) as alive, announce(folder) as dead:
        alive.plan(URL, [info(0, 1, 1)])
        dead.plan(URL, [info(0, 2, 2)])
        os.close(dead._file)  # what the system does for a killed process
        dead._file = -1
        (folder / ".half").write_bytes(b'{"url"')
        assert planned(URL, folder=folder) == {(0, 1, 1)}
        assert len(list(folder.iterdir())) == 1


def test_a_plan_that_changes_while_it_is_read_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "restores"
    real = fcntl.flock
    with announce(folder) as one:
        one.plan(URL, [info(0, 1, 1)])

        def change_first(file: int, operation: int) -> None:
            monkeypatch.setattr(restores.fcntl, "flock", real)
            one.plan(URL, [info(0, 2, 2)])
            real(file, operation)

        monkeypatch.setattr(restores.fcntl, "flock", change_first)
        assert planned(URL, folder=folder) == {(0, 2, 2)}


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'{"url": "s3://bucket/path", "files": [[1]]}', b'{"url": 1, "files": 2}'])
def test_a_note_that_is_none_is_ignored(tmp_path: Path, text: bytes) -> None:
    folder = tmp_path / "a" / "restores"
    with announce(folder) as alive:
        alive.plan(URL, [info(0, 1, 1)])
        with (folder / "b.json").open("wb") as other:
            other.write(text)
            other.flush()
            fcntl.flock(other, fcntl.LOCK_EX)
            os.mkfifo(folder / "fifo")
            (folder / "link").symlink_to("/etc/passwd")
            assert planned(URL, folder=folder) == {(0, 1, 1)}


def test_a_plan_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "restores"
    monkeypatch.setattr(restores, "MAX_FILES", 3)
    with announce(folder) as one:
        one.plan(URL, [info(0, txid, txid) for txid in range(1, 10)])
        [note] = folder.iterdir()
        assert len(json.loads(note.read_bytes())["files"]) == len(planned(URL, folder=folder)) == 3


@pytest.mark.parametrize("how", ["a file", "open to others", "a link", "parent is a link", "no parent"])
def test_a_folder_that_cannot_be_trusted_does_not_stop_a_restore(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "a" / "restores"
    if how == "a file":
        folder.parent.mkdir(0o700)
        folder.write_text("")
    elif how == "open to others":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    elif how == "a link":
        folder.parent.mkdir(0o700)
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif how == "parent is a link":
        (tmp_path / "elsewhere").mkdir()
        folder.parent.symlink_to(tmp_path / "elsewhere")
    else:
        folder = tmp_path / "a" / "b" / "restores"
    client = MemoryClient()
    chain_of_three(client)
    restore_database(client, tmp_path / "out.db", restores_folder=folder)
    with announce(folder) as one:
        one.plan(URL, [info(0, 1, 1)])
        assert planned(URL, folder=folder) == set()


def test_a_restore_announces_what_it_reads(tmp_path: Path) -> None:
    seen = []

    class Watched(MemoryClient):
        def open(self, info, *, offset=0, size=None):
            seen.append(planned(self.url, folder=tmp_path / "a" / "restores"))
            return super().open(info, offset=offset, size=size)

    client = Watched()
    chain_of_three(client)
    restore_database(client, tmp_path / "out.db", restores_folder=tmp_path / "a" / "restores")
    assert seen[0] == seen[-1] == {(0, 1, 1), (0, 2, 2), (0, 3, 3)}
    assert planned(client.url, folder=tmp_path / "a" / "restores") == set()


def test_the_folder_is_the_users_own() -> None:
    assert default_folder({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/pyrepl/restores")
    for environ in ({}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "relative"}):
        assert default_folder(environ).parent.name == f"pyrepl-{os.geteuid()}"
