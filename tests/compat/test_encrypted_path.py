"""Litestream sees nothing at the path of an encrypted replica, and what it writes there does not touch ours."""

from __future__ import annotations

import secrets
from pathlib import Path

import pyrage
import pytest

from replicator import Replicator, open_client, restore
from tests.compat.litestream import litestream, replicate_once
from tests.e2e.databases import checkpointed_bytes, connect, insert

TIMEOUT_S = 60
KEY = pyrage.x25519.Identity.generate()
BOTH = {"age_recipients": [str(KEY.to_public())], "age_identities": [str(KEY)]}


@pytest.mark.parametrize("store", ["file", "seaweed"])
def test_it_finds_no_files_and_no_backups(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> None:
    path = f"age-{secrets.token_hex(6)}"
    url = f"file://{tmp_path}/replica" if store == "file" else request.getfixturevalue(store).url(path)
    application = connect(tmp_path / "a.db")
    with Replicator(tmp_path / "a.db", open_client(url, **BOTH)) as engine:
        insert(application, 50)
        engine.wait(timeout_s=TIMEOUT_S)
        engine.snapshot()
    application.close()
    listing = litestream("ltx", "-level", "all", url)
    assert listing.returncode == 0, listing.stderr
    assert len(listing.stdout.splitlines()) == 1  # the heading
    done = litestream("restore", "-o", str(tmp_path / "theirs.db"), url)
    assert done.returncode != 0
    assert "no matching backup files available" in done.stdout + done.stderr
    assert not (tmp_path / "theirs.db").exists()


def test_it_begins_a_replica_of_its_own_beside_ours(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/replica"
    application = connect(tmp_path / "a.db")
    with Replicator(tmp_path / "a.db", open_client(url, **BOTH)) as engine:
        insert(application, 50)
        engine.wait(timeout_s=TIMEOUT_S)
    expected = checkpointed_bytes(tmp_path / "a.db", tmp_path)
    ours = {path: path.read_bytes() for path in (tmp_path / "replica/age").rglob("*.age")}
    insert(application, 10)
    replicate_once(tmp_path / "a.db", url, tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "replica/age").rglob("*.age")} == ours
    restore(open_client(url, **BOTH), tmp_path / "r.db", integrity_check="full")
    assert (tmp_path / "r.db").read_bytes() == expected
    application.close()
