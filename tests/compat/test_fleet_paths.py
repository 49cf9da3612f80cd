"""`dir:` leads to the same replicas with the released Litestream and with ours, and it restores each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.litestream import litestream, restore
from tests.e2e.databases import checkpointed_bytes, connect, insert

# (A name with a per cent sign is left out: 0.5.17 takes the database for another file then.)
NAMES = ["a.db", "sub/b.db", "sub/deep/c.db", ".hidden.db", "[z] ä,;=@+$&~!'()*.db", ".h/d.db", "x.txt", "b.db-wal.db"]


def configuration(folder: Path, name: str, keys: str) -> Path:
    path = folder / f"{name}.yml"
    path.write_text(f"dbs:\n - dir: {folder}/d\n   pattern: '*.db'\n{keys}\n")
    return path


def places(root: Path) -> set[str]:
    """Return the folders of replicas below a folder."""
    return {str(path.parents[2].relative_to(root)) for path in root.rglob("*1-*1.ltx") if path.parent.name == "0"}


@pytest.mark.parametrize("recursive", ["true", "false"])
@pytest.mark.parametrize("kind", ["path", "url", "meta-path", "meta-dir"])
def test_the_same_configuration_leads_to_the_same_places(tmp_path: Path, kind: str, recursive: str) -> None:
    applications = []
    for name in NAMES:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        applications.append(connect(tmp_path / "d" / name))
        insert(applications[-1], 3)
    (tmp_path / "d" / "none.db").write_text("no database, and more than sixteen bytes")
    (tmp_path / "d" / "loop").symlink_to(".")
    more = {"meta-path": f"   meta-path: {tmp_path}/m\n", "meta-dir": f"   meta-dir: {tmp_path}/m\n"}.get(kind, "")
    roots = {}
    for engine in ("ours", "theirs"):
        root = tmp_path / f"r %{engine}" if kind != "url" else tmp_path / f"r%20{engine}"
        replica = f"{{url: 'file://{root}'}}" if kind == "url" else f"{{path: '{root}'}}"
        config = configuration(tmp_path, engine, f"   recursive: {recursive}\n{more}   replica: {replica}")
        if engine == "ours":
            command = [sys.executable, "-m", "replicator", "replicate", "-once", "-config", str(config)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        else:
            done = litestream("replicate", "-once", "-config", str(config))
        assert done.returncode == 0, done.stdout + done.stderr
        roots[engine] = root
        meta = tmp_path / "m" if more else tmp_path / "d"
        roots[f"{engine} meta"] = meta
        folders = {str(path.relative_to(meta)) for path in meta.rglob("*-litestream")}
        roots[f"{engine} folders"] = Path(" ".join(sorted(folders)))
    assert places(roots["ours"]) == places(roots["theirs"])
    assert len(places(roots["ours"])) == (7 if recursive == "true" else 4)
    assert roots["ours folders"] == roots["theirs folders"]
    for number, place in enumerate(sorted(places(roots["ours"]))):
        output = tmp_path / f"out{number}.db"
        url = roots["ours"] / place
        if kind == "url":
            restore(f"file://{url}", output)
        else:
            _by_path(url, output)
        assert output.stat().st_size > 0
    names = [name for name in NAMES if name.endswith(".db") and (recursive == "true" or "/" not in name)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "replicator",
            "restore",
            "-config",
            str(tmp_path / "theirs.yml"),
            "-o",
            str(tmp_path / "all"),
            str(tmp_path / "d"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for application in applications:
        application.close()
    assert {str(path.relative_to(tmp_path / "all")) for path in (tmp_path / "all").rglob("*.db")} == set(names)
    for name in names:
        assert (tmp_path / "all" / name).read_bytes() == checkpointed_bytes(tmp_path / "d" / name, tmp_path)
    assert os.path.exists(tmp_path / "d" / "loop")


def _by_path(replica: Path, output: Path) -> None:
    """Restore through a configuration: a URL cannot say every path."""
    config = output.with_suffix(".yml")
    config.write_text(f"dbs: [{{path: '{output}', replica: {{path: \"{replica}\"}}}}]")
    done = litestream("restore", "-config", str(config), "-integrity-check", "full", "-no-expand-env", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
