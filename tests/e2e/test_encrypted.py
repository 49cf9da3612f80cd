"""The main job with encryption: replicate, stop, continue, restore; and nothing of the database in the clear."""

from __future__ import annotations

import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyrage
import pytest

from replicator import Replicator, open_client, restore
from replicator.errors import ConfigError, CorruptReplica, WrongKey
from replicator.format.ltx import TXID, FileInfo
from replicator.storage.age import AgeClient
from replicator.storage.base import AGE, ReplicaClient
from replicator.storage.file import FileClient
from tests.e2e.databases import checkpointed_bytes, connect, insert

TIMEOUT_S = 60
KEY = pyrage.x25519.Identity.generate()
PUBLIC, SECRET = str(KEY.to_public()), str(KEY)
BOTH = {"age_recipients": [PUBLIC], "age_identities": [SECRET]}


@pytest.fixture(params=["file", "seaweed", "rclone"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/replica"
    return str(request.getfixturevalue(request.param).url(f"age-{secrets.token_hex(6)}"))


@pytest.fixture
def application(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = connect(tmp_path / "a.db")
    yield connection
    connection.close()


def chain(client: ReplicaClient) -> list[tuple[int, int]]:
    return [(info.min_txid, info.max_txid) for info in client.list(0)]


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("keys", [BOTH, {"age_recipients": [PUBLIC]}], ids=["with identities", "recipients alone"])
def test_a_restart_continues_the_chain_and_every_state_restores(
    tmp_path: Path, url: str, application: sqlite3.Connection, keys: dict[str, Any]
) -> None:
    for _ in range(2):
        with Replicator(tmp_path / "a.db", open_client(url, **keys), sync_interval_s=0.02, min_checkpoint_pages=30) as engine:
            for _ in range(4):
                insert(application, 40)
                engine.wait(timeout_s=TIMEOUT_S)
            engine.snapshot()
            insert(application, 5)
    client = open_client(url, age_identities=[SECRET])
    txids = chain(client)
    assert txids == [(txid, txid) for txid in range(1, len(txids) + 1)]
    assert len(txids) >= 10
    assert len([*client.list(9)]) == 2
    restore(client, tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)
    restore(client, tmp_path / "r3.db", txid=3, integrity_check="full")
    with sqlite3.connect(tmp_path / "r3.db") as restored:
        assert 80 <= restored.execute("SELECT count(*) FROM t").fetchone()[0] <= 120
    restored.close()


def test_a_new_machine_continues_with_the_identities(tmp_path: Path, url: str, application: sqlite3.Connection) -> None:
    """The page table is made again from the replica, which takes reading it."""
    for machine in ("one", "two"):
        with Replicator(tmp_path / "a.db", open_client(url, **BOTH), meta_path=tmp_path / machine, sync_interval_s=0.02) as engine:
            insert(application, 400)
            engine.wait(timeout_s=TIMEOUT_S)
    first, second = open_client(url, **BOTH).list(0)
    assert (first.max_txid, second.max_txid) == (1, 2)
    restore(open_client(url, **BOTH), tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)


def test_a_new_machine_cannot_continue_with_recipients_alone(tmp_path: Path, application: sqlite3.Connection) -> None:
    with Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/replica", age_recipients=[PUBLIC])):
        insert(application, 10)
    engine = Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/replica", age_recipients=[PUBLIC]), meta_path=tmp_path / "two")
    with pytest.raises(ConfigError, match="without an age identity"):
        engine.start()


def test_local_state_behind_the_replica_needs_the_identities(tmp_path: Path, application: sqlite3.Connection) -> None:
    """As after a crash between storing a file and noting it."""
    meta = tmp_path / ".a.db-litestream"
    for copy in (tmp_path / "before", tmp_path / "after"):
        with Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/replica", age_recipients=[PUBLIC])):
            insert(application, 10)
        shutil.copytree(meta, copy)
    shutil.rmtree(meta)
    shutil.move(tmp_path / "before", meta)
    with pytest.raises(ConfigError, match="without an age identity"):
        Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/replica", age_recipients=[PUBLIC])).start()
    with Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/replica", **BOTH)):
        insert(application, 10)
    assert chain(open_client(f"{tmp_path}/replica", **BOTH)) == [(1, 1), (2, 2), (3, 3)]


def test_nothing_of_the_database_is_in_the_clear(tmp_path: Path, application: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files, large ones, snapshots; in the replica, and in the temporary folder while files are sent."""
    marker = secrets.token_hex(20)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    spooled: list[int] = []

    class Watching(FileClient):
        def put(self, level: int, min_txid: TXID, max_txid: TXID, body: bytes | Path, **options: Any) -> FileInfo:
            spooled.extend(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
            assert files_with(temporary, marker) == []
            return super().put(level, min_txid, max_txid, body, **options)

    encrypted = AgeClient(Watching(tmp_path / "encrypted", layout=AGE), recipients=[PUBLIC], identities=[SECRET])
    application.execute("CREATE TABLE secrets(v TEXT)")
    with Replicator(tmp_path / "a.db", encrypted, f"file://{tmp_path}/plain") as engine:
        application.execute("INSERT INTO secrets VALUES(?)", (marker,))
        engine.wait(timeout_s=TIMEOUT_S)
        insert(application, 10, size=1 << 20)
        engine.wait(timeout_s=TIMEOUT_S)
        engine.snapshot()
    restore(open_client(encrypted.url, age_identities=[SECRET]), tmp_path / "r.db", integrity_check="full")
    assert max(spooled) > 10 << 20  # the large file and the snapshot did go through the temporary folder
    assert [*temporary.iterdir()] == []
    assert files_with(tmp_path / "plain", marker)  # it would be found
    assert files_with(tmp_path / "encrypted", marker) == []
    assert files_with(tmp_path / "encrypted", "SQLite format 3") == files_with(tmp_path / "encrypted", "CREATE TABLE") == []
    assert len([*(tmp_path / "encrypted").rglob("*.ltx.age")]) >= 3
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)


def test_restoring_with_the_wrong_key_says_so_and_leaves_nothing(tmp_path: Path, url: str, application: sqlite3.Connection) -> None:
    with Replicator(tmp_path / "a.db", open_client(url, **BOTH)):
        insert(application, 10)
    other = str(pyrage.x25519.Identity.generate())
    with pytest.raises(WrongKey, match="no key fits"):
        restore(open_client(url, age_identities=[other]), tmp_path / "r.db")
    with pytest.raises(ConfigError, match="without an age identity"):
        restore(open_client(url, age_recipients=[PUBLIC]), tmp_path / "r.db")
    assert not [*tmp_path.glob("*r.db*")]


@pytest.mark.parametrize("rows", [10, 2000], ids=["small", "large"])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path: Path, application: sqlite3.Connection, rows: int) -> None:
    with Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/replica", **BOTH)):
        insert(application, rows)
    [path] = (tmp_path / "replica/age/0").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptReplica, match=f"level 0 {path.name}: it does not decrypt"):
        restore(open_client(f"{tmp_path}/replica", **BOTH), tmp_path / "r.db")
    assert not [*tmp_path.glob("*r.db*")]


def test_a_plain_replica_can_be_made_encrypted_in_place(tmp_path: Path, application: sqlite3.Connection) -> None:
    """The encrypted chain begins with a full image; the plain files stay, for their owner to delete."""
    for client in (open_client(f"{tmp_path}/replica"), open_client(f"{tmp_path}/replica", **BOTH)):
        with Replicator(tmp_path / "a.db", client) as engine:
            insert(application, 10)
            engine.wait(timeout_s=TIMEOUT_S)
    restore(open_client(f"{tmp_path}/replica", **BOTH), tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)
    assert len([*(tmp_path / "replica/ltx/0").iterdir()]) == 1


def test_a_second_replica_is_filled_from_an_encrypted_one(tmp_path: Path, application: sqlite3.Connection) -> None:
    with Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/encrypted", **BOTH)) as engine:
        for _ in range(3):
            insert(application, 300)
            engine.wait(timeout_s=TIMEOUT_S)
    with Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/encrypted", **BOTH), f"{tmp_path}/plain") as engine:
        engine.wait(timeout_s=TIMEOUT_S)
    restore(f"{tmp_path}/plain", tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == checkpointed_bytes(tmp_path / "a.db", tmp_path)


def test_replication_does_not_begin_with_identities_alone(tmp_path: Path, application: sqlite3.Connection) -> None:
    insert(application, 10)
    engine = Replicator(tmp_path / "a.db", open_client(f"{tmp_path}/replica", age_identities=[SECRET]))
    with pytest.raises(ConfigError, match="without an age recipient"):
        engine.start()
    assert not (tmp_path / "replica").exists()
