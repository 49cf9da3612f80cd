"""Both engines plan the same files for many TXIDs and around many times: on replicas that the released binary wrote, and on made ones."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from replicator.chain import list_files
from replicator.cli import main
from replicator.errors import TXIDNotAvailable
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, Header, encode_file
from replicator.restorer import restore_database
from replicator.storage import open_client
from replicator.storage.base import ReplicaClient
from replicator.storage.file import FileClient
from tests.compat.litestream import litestream

GOLDEN = Path(__file__).parents[1] / "data/golden/v0.5"
START_MS = 1_800_000_000_000
STEP_MS = 700
PAGE_SIZE, PAGES = 512, 5

Spec = tuple[int, int, int, int]
"""Level, min TXID, max TXID, and the file's time in ms after START_MS."""


def spec(level: int, low: int, high: int, late_ms: int = 0) -> Spec:
    return level, low, high, high * STEP_MS + late_ms


def raw(low: int, high: int) -> list[Spec]:
    return [spec(0, txid, txid) for txid in range(low, high + 1)]


def compacted(level: int, low: int, high: int, step: int) -> list[Spec]:
    return [spec(level, at, at + step - 1) for at in range(low, high + 1, step)]


def snapshots(*txids: int) -> list[Spec]:
    return [spec(SNAPSHOT_LEVEL, 1, txid, late_ms=333) for txid in txids]


def image(pgno: int, txid: int) -> bytes:
    """What page `pgno` holds at a TXID: its number and the last TXID that wrote it. Transaction t writes pages 1 and 2 + t % 4."""
    written = next((at for at in range(txid, 1, -1) if pgno in (1, 2 + at % 4)), 1)
    return bytes([pgno, written % 256]) * (PAGE_SIZE // 2)


def make(client: ReplicaClient, specs: Iterable[Spec]) -> None:
    """Store valid files of the one history that `image` defines."""
    for level, low, high, at_ms in specs:
        pgnos = range(1, PAGES + 1) if low == 1 else sorted({1} | {2 + txid % 4 for txid in range(low, high + 1)})
        header = Header(PAGE_SIZE, PAGES, TXID(low), TXID(high), START_MS + at_ms)
        data = encode_file(header, [(pgno, image(pgno, high)) for pgno in pgnos])
        client.put(level, TXID(low), TXID(high), data, timestamp_ms=header.timestamp_ms)


def random_specs(seed: int) -> list[Spec]:
    """Files of any ranges and times on levels 0 to 4 and 9: gaps, overlaps, several of one range, and times that run backwards."""
    dice = random.Random(seed)
    found = {}
    for _ in range(dice.randint(8, 25)):
        level = dice.choice((0, 0, 0, 1, 1, 2, 3, 4, 9))
        low = 1 if level == SNAPSHOT_LEVEL or dice.random() < 0.2 else dice.randint(1, 16)
        high = low if level == 0 else low + dice.randint(0, 6)
        found[level, low, high] = (level, low, high, high * STEP_MS + dice.choice((0, 0, 5, -3000, 2000)))
    return list(found.values())


MADE: dict[str, list[Spec]] = {
    "all-levels": raw(1, 30) + compacted(1, 1, 30, 3) + compacted(2, 1, 27, 9) + compacted(3, 1, 27, 27) + snapshots(5, 17, 27),
    "pruned": raw(26, 31) + compacted(1, 16, 30, 3) + compacted(2, 10, 27, 9) + compacted(3, 1, 27, 27) + snapshots(12, 24),
    "pruned-inside-a-level-1-file": raw(8, 12) + compacted(1, 1, 9, 3) + snapshots(2),
    "overlaps": [*raw(4, 12), spec(1, 1, 4), spec(1, 3, 6), spec(1, 5, 9, 50), spec(2, 1, 6), spec(2, 5, 9), spec(3, 2, 9), *snapshots(3)],
    "gap": raw(1, 5) + raw(9, 12) + compacted(1, 1, 3, 3),
    "gap-with-a-later-snapshot": raw(1, 5) + raw(9, 14) + snapshots(10),
    "only-the-end-is-left": raw(7, 9),
    "snapshots-alone": snapshots(3, 8, 9),
    "snapshot-of-part": [*raw(1, 9), (9, 1, 6, 6 * STEP_MS), (9, 3, 4, 4 * STEP_MS)],
    "times-run-backwards": [(0, txid, txid, at * STEP_MS) for txid, at in enumerate((1, 2, 9, 3, 4, 4, 5, 8), start=1)]
    + [(9, 1, 4, 6 * STEP_MS)],
    **{f"random-{seed}": random_specs(seed) for seed in range(6)},
}
COPIED = ["point-in-time", "compacted-levels", "compacted-levels-l0-pruned"]


@pytest.fixture(params=[*COPIED, *MADE])
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> FileClient:
    root = tmp_path / "replica"
    if request.param in MADE:
        make(FileClient(root), MADE[request.param])
    else:
        shutil.copytree(GOLDEN / request.param / "replica", root)
        for file in json.loads((GOLDEN / request.param / "manifest.json").read_text())["files"]:
            os.utime(root / file["path"], ns=(file["mtime_ns"], file["mtime_ns"]))
    return FileClient(root)


def targets(client: FileClient) -> list[list[str]]:
    """Flags for no target, many TXIDs, and times at, 1 ms around and between those of the files, and far outside."""
    files = [info for level in list_files(client).values() for info in level]
    last = max(info.max_txid for info in files)
    times = sorted({info.created_at for info in files})
    wanted = {times[0] - timedelta(days=400), times[-1] + timedelta(days=400), times[-1] + timedelta(seconds=1)}
    for when in times if len(times) <= 12 else [*times[:4], *times[4:-4:6], *times[-4:]]:
        wanted |= {when, when - timedelta(milliseconds=1), when + timedelta(milliseconds=1)}
    wanted |= {left + (right - left) / 2 for left, right in zip(times[::7], times[1::7], strict=False)}
    return [
        [],
        *(["-txid", f"{txid:016x}"] for txid in (*range(1, 10), *range(10, last, 4), *range(max(last, 10), last + 3))),
        *(["-timestamp", when.isoformat(timespec="milliseconds").replace("+00:00", "Z")] for when in sorted(wanted)),
    ]


def test_the_plans_are_those_of_the_released_binary(replica: FileClient, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = targets(replica)
    assert len(wanted) > 10
    command = ["restore", "-dry-run", "-json", "-o", "/nowhere/x.db"]
    with ThreadPoolExecutor(2) as pool:
        peer = list(pool.map(lambda flags: litestream(*command, *flags, replica.url), wanted))
    for flags, theirs in zip(wanted, peer, strict=True):
        code = main([*command, *flags, replica.url])
        ours = capsys.readouterr()
        assert (code, ours.out) == (theirs.returncode, theirs.stdout), (flags, ours.err, theirs.stderr)
        if theirs.stderr.strip() == "Error: timestamp does not exist":
            times = sorted(info.created_at for level in list_files(replica).values() for info in level)
            asked = datetime.fromisoformat(flags[1]).isoformat()
            expected = f"Error: timestamp does not exist: {asked}; stored: {times[0].isoformat()} to {times[-1].isoformat()}"
            assert ours.err.splitlines()[0] == expected


def test_the_listings_are_those_of_the_released_binary(replica: FileClient, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["-level", "all"], ["-level", "all", "-json"], ["-level", "9"], []):
        assert main(["ltx", *flags, replica.url]) == 0
        theirs = litestream("ltx", *flags, replica.url)
        assert theirs.returncode == 0
        assert capsys.readouterr().out == theirs.stdout


def test_the_plans_in_a_bucket_are_those_of_the_released_binary(seaweed, capsys: pytest.CaptureFixture[str]) -> None:
    """By TXID: the times of a bucket are those of the upload for its bounds, which we do not follow (specification, section 2.5)."""
    url = seaweed.url("point-in-time")
    make(open_client(url), MADE["all-levels"])
    for flags in ([], *(["-txid", f"{txid:016x}"] for txid in range(1, 32, 4))):
        command = ["restore", "-dry-run", "-json", "-o", "/nowhere/x.db", *flags, url]
        theirs = litestream(*command)
        assert main(command) == theirs.returncode
        ours = capsys.readouterr().out
        if theirs.returncode == 0:
            assert json.loads(ours)["files"] == json.loads(theirs.stdout)["files"]
    # The listing that `history` needs, from a bucket.
    assert main(["history", "-json", url]) == 0
    assert [moment["txid"] for moment in json.loads(capsys.readouterr().out)["moments"]] == [f"{txid:016x}" for txid in range(1, 31)]


@pytest.mark.parametrize("name", ["all-levels", "pruned", "overlaps", "gap-with-a-later-snapshot"])
def test_each_plan_of_many_levels_restores_the_state_that_was_written(tmp_path: Path, name: str) -> None:
    client = FileClient(tmp_path / "replica")
    make(client, MADE[name])
    restored = 0
    for txid in sorted({high for _, _, high, _ in MADE[name]}):
        ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
        try:
            restore_database(client, ours, txid=TXID(txid), force=True)
        except TXIDNotAvailable:
            continue
        assert ours.read_bytes() == b"".join(image(pgno, txid) for pgno in range(1, PAGES + 1))
        if restored % 5 == 0:
            done = litestream("restore", "-force", "-o", str(theirs), "-txid", f"{txid:016x}", client.url)
            assert done.returncode == 0, done.stderr
            assert theirs.read_bytes() == ours.read_bytes()
        restored += 1
    assert restored >= 5
