"""Old and new versions side by side: what a newer one wrote is refused by its name, or is local state that is made anew. Nothing is guessed."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

import replicator
from replicator import pagetable, parking
from replicator.engine import Engine
from replicator.errors import CorruptReplica, FormatError, StorageError
from replicator.storage.file import FileClient
from tests.e2e.databases import checkpointed_bytes, connect, drain, engine_for, insert, restored


def replicated(folder: Path) -> tuple[Path, FileClient]:
    database, client = folder / "a.db", FileClient(folder / "replica")
    engine = engine_for(database, client)
    application = connect(database)
    engine.open()
    for _ in range(3):
        insert(application, 2)
        drain(engine)
    engine.close()
    application.close()
    return database, client


@pytest.mark.fault("F50")
@pytest.mark.parametrize("number", [0, 2], ids=["the first file", "the newest file"])
def test_an_ltx_file_of_another_version_is_refused_by_name(tmp_path: Path, number: int) -> None:
    _, client = replicated(tmp_path)
    info = list(client.list(0))[number]
    data = client.path(info).read_bytes()
    client.path(info).write_bytes(b"LTX2" + data[4:])
    with pytest.raises(CorruptReplica, match="invalid version") as caught:
        replicator.restore(client, tmp_path / "copy.db")
    assert info.name in str(caught.value)
    assert not (tmp_path / "copy.db").exists()


@pytest.mark.fault("F50")
def test_a_replica_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    database, client = replicated(tmp_path)
    path = tmp_path / "replica" / "pyrepl" / "lineage.json"
    document = json.loads(path.read_bytes())
    assert document["version"] == 1
    path.write_text(json.dumps({**document, "version": 2}))
    application = connect(database)
    insert(application, 1)
    before = {file: file.read_bytes() for file in sorted((tmp_path / "replica").rglob("*.ltx"))}
    engine = engine_for(database, client)
    with pytest.raises(StorageError, match=r"newer version .*lineage\.json has version 2"):
        engine.open()
    assert {file: file.read_bytes() for file in sorted((tmp_path / "replica").rglob("*.ltx"))} == before
    path.write_text(json.dumps({"lineage": document["lineage"]}))  # as the first versions wrote it
    goes_on(engine, database, client, tmp_path)
    application.close()


@pytest.mark.fault("F50")
def test_a_page_table_of_another_version_is_made_anew_from_the_replica(tmp_path: Path) -> None:
    database, client = replicated(tmp_path)
    [path] = tmp_path.rglob("pages")
    data = bytearray(path.read_bytes())
    for at in (0, pagetable.SLOT_SIZE):  # sound ones, but for the version
        assert data[at : at + 8] == b"PYREPLT1"
        end = at + pagetable._SLOT.size - 4
        data[at : at + 8] = b"PYREPLT2"
        data[end : end + 4] = struct.pack("<I", zlib.crc32(data[at:end]))
    path.write_bytes(data)
    assert pagetable.PageTable.open(path) is None
    application = connect(database)
    insert(application, 1)
    goes_on(engine_for(database, client), database, client, tmp_path)
    assert b"PYREPLT1" in path.read_bytes()
    application.close()


def goes_on(engine: Engine, database: Path, client: FileClient, folder: Path) -> None:
    engine.open()
    drain(engine)
    engine.close()
    assert [info.max_txid for info in client.list(0)] == [1, 2, 3, 4]
    assert restored(client, folder).read_bytes() == checkpointed_bytes(database, folder)


@pytest.mark.fault("F50")
def test_a_record_of_a_parked_database_of_another_version_counts_for_nothing() -> None:
    with pytest.raises(FormatError, match="version 99"):
        parking.decode(json.dumps({"version": 99}).encode())
