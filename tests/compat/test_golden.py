"""Replicas written by the released Litestream restore to the bytes that it restores itself. See tests/data/golden/README.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyrage
import pytest

import replicator
from replicator.errors import ReplicatorError, WrongKey
from replicator.storage import open_client

GOLDEN = Path(__file__).parents[1] / "data/golden"


def cases() -> list[Any]:
    found = []
    for manifest in sorted(GOLDEN.glob("*/*/manifest.json")):
        document = json.loads(manifest.read_text())
        # `cross_restores`: what 0.5.17 makes of a replica of 0.3.13. What it restores, and 0.3.13 refuses, is restored (a time between two generations).
        cross = document.get("cross_restores", [])
        restored = [state["select"] for state in cross if state["expect"] == "ok"]
        own = [state for state in document["states"] if state["expect"] == "ok" or state["select"] not in restored]
        for state in [*own, *cross]:
            name = f"{manifest.parts[-3]}-{manifest.parent.name}-{state['name']}-{state.get('restored_with', 'own')}"
            found.append(pytest.param(manifest.parent, document, state, id=name))
    return found


@pytest.mark.parametrize(("folder", "document", "state"), cases())
def test_golden_state(folder: Path, document: dict[str, Any], state: dict[str, Any], tmp_path: Path) -> None:
    replica = copied(folder, document, tmp_path / "replica")
    identities = [document["age_identity"]] if "age_identity" in document else []
    client = open_client(f"file://{replica}", age_identities=identities)
    output = tmp_path / "out.db"
    select = state["select"]
    if state["expect"] == "error":
        with pytest.raises(ReplicatorError):
            replicator.restore(client, output, **select)
        assert list(tmp_path.iterdir()) == [replica]
        return
    replicator.restore(client, output, integrity_check="full", **select)
    assert hashlib.sha256(output.read_bytes()).hexdigest() == state["restored_db_sha256"]


def copied(folder: Path, document: dict[str, Any], replica: Path) -> Path:
    shutil.copytree(folder / "replica", replica)
    for file in document["files"]:
        os.utime(replica / file["path"], ns=(file["mtime_ns"], file["mtime_ns"]))
    return replica


def test_there_are_golden_states() -> None:
    """All but one: both releases are asked for a time between two generations, and only one can be followed."""
    documents = [json.loads(manifest.read_text()) for manifest in GOLDEN.glob("*/*/manifest.json")]
    states = [state for document in documents for state in [*document["states"], *document.get("cross_restores", [])]]
    assert len(cases()) == len(states) - 1 > 150


def test_a_wrong_age_key_is_not_damage(tmp_path: Path) -> None:
    folder = GOLDEN / "v0.3/age-encrypted"
    replica = copied(folder, json.loads((folder / "manifest.json").read_text()), tmp_path / "replica")
    other = str(pyrage.x25519.Identity.generate())
    for identities in ([other], []):
        with pytest.raises(WrongKey, match=r"00000000\.snapshot\.lz4"):
            replicator.restore(open_client(f"file://{replica}", age_identities=identities), tmp_path / "out.db")
    assert list(tmp_path.iterdir()) == [replica]
