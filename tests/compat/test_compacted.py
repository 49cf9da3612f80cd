"""The released Litestream restores what we compacted and pruned: every TXID and time that its rules allow, to equal bytes."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from replicator import Replicator
from replicator.chain import list_files
from replicator.errors import RestoreError
from replicator.levels import History
from replicator.storage import open_client
from tests.compat.litestream import litestream
from tests.e2e.databases import connect, insert, restored
from tests.e2e.stores import on_each_store

TIMEOUT_S = 60
SHORT = History((0.3, 0.9, 2.0), snapshot_interval_s=1.5, snapshot_retention_s=3.0, l0_retention_s=0.5, l0_retention_check_interval_s=0.1)


@on_each_store
def test_what_we_compacted_and_pruned(tmp_path: Path, url: str) -> None:
    database = tmp_path / "a.db"
    application = connect(database, page_size=1024)
    with Replicator(database, url, history=SHORT, sync_interval_s=0.05, min_checkpoint_pages=20) as engine:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            insert(application, 7)
            application.execute("DELETE FROM t WHERE id % 11 = 3")
            engine.wait(timeout_s=TIMEOUT_S)
            time.sleep(0.03)
        keeper = next(iter(engine._keepers.values()))
        assert keeper.problems == {}
        assert min(keeper.compactions, keeper.snapshots, keeper.deleted) > 0
    application.close()
    files = list_files(open_client(url), accurate_times=True)
    assert min(len(files[level]) for level in (0, 1, 2, 3, 9)) > 0
    ends = sorted({info.max_txid for infos in files.values() for info in infos})
    assert ends[0] > 1  # something was pruned
    in_folder = url.startswith("file")
    targets = [["-txid", f"{txid:016x}"] for txid in (ends if in_folder else [*ends[::4], ends[-1]])]
    if in_folder:  # in a bucket its bounds are upload times in whole seconds (specification 2.5)
        times = sorted({info.created_at for infos in files.values() for info in infos})
        for when in (*times[::5], times[-1]):
            for shift in (0, 1):
                text = (when + timedelta(milliseconds=shift)).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
                targets.append(["-timestamp", text])
    agreed = 0
    for target in [[], *targets]:
        theirs = tmp_path / "theirs.db"
        done = litestream("restore", "-o", str(theirs), "-integrity-check", "full", *target, url)
        options: dict[str, object] = {}
        if target[:1] == ["-txid"]:
            options = {"txid": int(target[1], 16)}
        elif target:
            options = {"timestamp": datetime.fromisoformat(target[1])}
        try:
            ours = restored(url, tmp_path, **options)
        except RestoreError:
            assert done.returncode != 0, (target, done.stdout)
            continue
        assert done.returncode == 0, (target, done.stderr)
        assert ours.read_bytes() == theirs.read_bytes(), target
        theirs.unlink()
        agreed += 1
    assert agreed > len(targets) // 2
