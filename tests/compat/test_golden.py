"""Replicas written by the released Litestream restore to the bytes that it restores itself. See tests/data/golden/README.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import replicator
from replicator.errors import ReplicatorError

GOLDEN = Path(__file__).parents[1] / "data/golden"


def cases() -> list[Any]:
    found = []
    for manifest in sorted(GOLDEN.glob("*/*/manifest.json")):
        document = json.loads(manifest.read_text())
        for state in document["states"]:
            if manifest.parts[-3] == "mixed" and not (state["name"].startswith(("v05", "txid")) or state["name"] == "latest"):
                continue  # restored from the 0.3 part of the replica
            found.append(pytest.param(manifest.parent, document["files"], state, id=f"{manifest.parent.name}-{state['name']}"))
    return found


@pytest.mark.parametrize(("folder", "files", "state"), cases())
def test_golden_state(folder: Path, files: list[dict[str, Any]], state: dict[str, Any], tmp_path: Path) -> None:
    replica = tmp_path / "replica"
    shutil.copytree(folder / "replica", replica)
    for file in files:
        os.utime(replica / file["path"], ns=(file["mtime_ns"], file["mtime_ns"]))
    output = tmp_path / "out.db"
    select = state["select"]
    if state["expect"] == "error":
        with pytest.raises(ReplicatorError):
            replicator.restore(f"file://{replica}", output, **select)
        assert list(tmp_path.iterdir()) == [replica]
        return
    replicator.restore(f"file://{replica}", output, integrity_check="full", **select)
    assert hashlib.sha256(output.read_bytes()).hexdigest() == state["restored_db_sha256"]


def test_there_are_golden_states() -> None:
    assert len(cases()) > 50
