"""What Litestream 0.3.13 writes, we restore, list and convert as it does; what we convert, 0.5.17 restores."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path

import pytest

import replicator
from replicator.cli import main
from replicator.convert import convert
from replicator.errors import MissingSegment, ReplicatorError
from replicator.format.v3 import encode_frame, time_text
from replicator.storage import open_client
from replicator.storage.v3 import v3_client
from replicator.v3plan import Generation
from replicator.v3restore import list_generations
from replicator.v3verify import verify_any
from tests.compat.litestream import litestream, restore
from tests.compat.litestream03 import litestream03, replicating03
from tests.e2e.databases import checkpointed_bytes, connect, insert
from tests.servers import ACCESS, SECRET, Server
from tests.v3data import GENERATION, page, segment, wal
from tests.v3data import replica as replica_of


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def write_history(replica: Replica) -> None:
    """Two generations; in the first several indexes and snapshots, a shrinking database, and a large transaction."""
    database, v3 = replica.database, replica.v3

    def files() -> int:
        return sum(len(item.files) for item in list_generations(v3))

    def arrived() -> bool:
        return replica.ours() == checkpointed_bytes(database, database.parent)

    def change(statement: str) -> None:
        before = files()
        with connection:
            connection.execute(statement)
        until(lambda: files() > before and arrived())

    for part in range(2):
        connection = sqlite3.connect(database)
        connection.execute("PRAGMA journal_mode=WAL")
        with replicating03(replica.config):
            change(f"CREATE TABLE t{part} (a INTEGER PRIMARY KEY, b BLOB)")
            for number in range(4):
                change(f"INSERT INTO t{part} (b) SELECT randomblob(900) FROM (VALUES (1),(2),(3),(4),(5),(6)), (VALUES (1),(2),({number}))")
            until(lambda: max(info.index for item in list_generations(v3) for info in item.snapshots) > 0)
            change(f"DELETE FROM t{part} WHERE a > 4")
            change("VACUUM")
            change(f"UPDATE t{part} SET b = randomblob(3000)")
        connection.close()  # the last one: the WAL goes, and with it the generation
        if part == 0:
            with contextlib.closing(sqlite3.connect(database)) as other, other:
                other.execute("CREATE TABLE unseen (a)")


class Replica:
    """A replica that 0.3.13 wrote, with the ways to ask both."""

    def __init__(self, url: str, config: Path, database: Path) -> None:
        self.url, self.config, self.database = url, config, database
        self.client = open_client(url)
        v3 = v3_client(self.client)
        assert v3 is not None
        self.v3 = v3

    @property
    def generations(self) -> list[Generation]:
        return list_generations(self.v3)

    def theirs(self, *flags: str) -> bytes | None:
        """What 0.3.13 restores; None when it refuses."""
        out = self.config.parent / "theirs.db"
        for path in self.config.parent.glob("theirs.db*"):
            path.unlink()
        done = litestream03("restore", "-config", str(self.config), "-o", str(out), *flags, str(self.database))
        assert done.returncode in (0, 1)
        return None if done.returncode else out.read_bytes()

    def theirs_of_the_generation_before(self, time_ns: int) -> bytes | None:
        """What 0.3.13 restores of the newest generation that it can restore at a time, or that had ended, when it is told which one."""
        for item in sorted(self.generations, key=lambda item: -item.newest_ns):
            time = min(time_ns, item.newest_ns)
            if (found := self.theirs("-generation", item.name, "-timestamp", time_text(time))) is not None:
                return found
        return None

    def ours(self, **select: str) -> bytes | None:
        out = self.config.parent / "ours.db"
        try:
            replicator.restore(self.client, out, force=True, integrity_check="quick", **select)
        except ReplicatorError:
            return None
        return out.read_bytes()


@pytest.fixture(scope="module", params=["file", "seaweed"])
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replica:
    folder = tmp_path_factory.mktemp("v3")
    keys = {"access-key-id": ACCESS, "secret-access-key": SECRET}
    if request.param == "file":
        url = f"file://{folder}/replica"
        entry: dict[str, object] = {"path": f"{folder}/replica"}
    else:
        server: Server = request.getfixturevalue("seaweed")
        path = f"v3/reading-{uuid.uuid4().hex}"  # the fixture may be made again for tests that another worker gave up
        url = server.url(path)
        entry = {"type": "s3", **keys, "bucket": "bucket", "path": path, "endpoint": server.endpoint, "region": "us-east-1"}
    database, config = folder / "source.db", folder / "litestream.yml"
    settings = {"sync-interval": "50ms", "snapshot-interval": "400ms"}
    options = {"monitor-interval": "50ms", "min-checkpoint-page-count": 30}
    config.write_text(json.dumps({"dbs": [{"path": str(database), **options, "replicas": [{**entry, **settings}]}]}))
    with pytest.MonkeyPatch.context() as patch:  # the fixture for it lives as long as one test
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        made = Replica(url, config, database)
        write_history(made)
    return made


def test_the_history_has_what_the_tests_are_about(replica: Replica) -> None:
    first, second = sorted(replica.generations, key=lambda item: item.newest_ns)
    assert len(first.snapshots) > 1 or len(second.snapshots) > 1
    assert max(info.index for info in first.segments) > 0
    assert any(info.offset for info in second.segments)


def test_every_generation_and_index_restores_as_it_does(replica: Replica) -> None:
    assert replica.ours() == replica.theirs() is not None
    for generation in replica.generations:
        assert replica.ours(generation=generation.name) == replica.theirs("-generation", generation.name)
        for index in range(max(info.index for info in generation.files) + 2):
            flags = {"generation": generation.name, "index": f"{index:08x}"}
            ours, theirs = replica.ours(**flags), replica.theirs(*(part for key, value in flags.items() for part in (f"-{key}", value)))
            assert ours == theirs is not None, flags


def test_every_time_restores_as_it_does(replica: Replica) -> None:
    times = sorted({info.created_ns for item in replica.generations for info in item.files})
    asked = sorted({edge + more for edge in times for more in (-1, 0)} | {times[-1] + 1})
    outcomes = []
    for time_ns in asked:
        ours, theirs = replica.ours(timestamp=time_text(time_ns)), replica.theirs("-timestamp", time_text(time_ns))
        if theirs is None and times[0] <= time_ns <= times[-1]:
            theirs = replica.theirs_of_the_generation_before(time_ns)
        assert ours == theirs, time_text(time_ns)
        outcomes.append(ours)
    assert outcomes[0] is None is outcomes[-1]
    assert len(set(outcomes)) > (4 if replica.url.startswith("file:") else 1)  # S3 counts whole seconds


@pytest.mark.parametrize("command", ["generations", "snapshots", "wal"])
def test_listings_are_the_same(replica: Replica, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.cli.generations.log_to", lambda *_: None)  # the stream ends with the test
    theirs = litestream03(command, "-config", str(replica.config), str(replica.database))
    assert main([command, "-config", str(replica.config), str(replica.database)]) == 0
    ours = capsys.readouterr().out
    assert len(ours.splitlines()) > 1
    assert [line.rstrip() for line in ours.splitlines()] == [line.rstrip() for line in theirs.stdout.splitlines()]


def apart(times: list[int]) -> list[int]:
    """Those that are not followed by another one in the same millisecond, which LTX files cannot tell apart."""
    return [first for first, second in pairwise([*times, 1 << 63]) if first // 10**6 != second // 10**6]


def test_a_converted_replica_restores_every_moment(replica: Replica, tmp_path: Path) -> None:
    target = open_client(replica.url.replace("v3/reading", f"v3/{tmp_path.name}") if "s3://" in replica.url else f"file://{tmp_path}/ltx")
    convert(replica.client, target)
    times = sorted({info.created_ns for item in replica.generations for info in item.files})
    first = min(info.created_ns for item in replica.generations for info in item.snapshots)
    checked = 0
    for time_ns in sorted({edge // 10**6 * 10**6 + more for edge in times for more in (0, 10**6)} | {*apart(times)}):
        expected = replica.ours(timestamp=time_text(time_ns))
        assert (expected is not None) == (first <= time_ns <= times[-1]), time_text(time_ns)
        if expected is None:
            continue
        replicator.restore(target, tmp_path / "out.db", timestamp=time_text(time_ns), force=True)
        assert (tmp_path / "out.db").read_bytes() == expected, time_text(time_ns)
        checked += 1
    assert checked >= len([time_ns for time_ns in apart(times) if time_ns >= first])


def test_the_next_release_restores_what_was_converted(replica: Replica, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/ltx"
    convert(replica.client, open_client(url))
    restore(url, tmp_path / "latest.db")
    assert (tmp_path / "latest.db").read_bytes() == replica.ours()
    times = sorted({info.created_ns for item in replica.generations for info in item.files})
    for number, time_ns in enumerate(apart(times)[::3]):
        expected = replica.ours(timestamp=time_text(time_ns))
        if expected is not None:
            out = tmp_path / f"{number}.db"
            restore(url, out, "-timestamp", time_text(time_ns))
            assert out.read_bytes() == expected
            os.unlink(out)


def test_verify_compares_its_replica_with_the_database(replica: Replica) -> None:
    verdict = verify_any(replica.database, replica.client, timeout_s=1)
    newest = max(replica.generations, key=lambda item: item.newest_ns)
    assert (verdict.finding, verdict.position[:16]) == ("agrees", newest.name), verdict


@pytest.mark.parametrize("first_of_later", [13, 14, 20], ids=["overlapping", "same-second", "apart"])
def test_before_its_first_snapshot_a_generation_has_not_begun(tmp_path: Path, first_of_later: int) -> None:
    """0.3.13 replaces the snapshot of an index by a later one. What it then refuses to restore, 0.5.17 restores as we do."""
    root, start, later = tmp_path / "replica", 1_700_000_000, "ffee000000000000"
    database, journal = tmp_path / "a.db", tmp_path / "a.db-wal"
    connection = connect(database)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    image, cuts, states = database.read_bytes(), list[int](), list[bytes]()
    for _ in range(3):
        insert(connection, 1)
        cuts.append(journal.stat().st_size)
        states.append(checkpointed_bytes(database, tmp_path))
    objects = replica_of(image, [journal.read_bytes()], [cuts])
    connection.close()
    stored = [
        *zip(objects, objects.values(), (10, 11, 12, 14), strict=True),
        *zip((name.replace(GENERATION, later) for name in objects), objects.values(), (22, first_of_later, 21, 23), strict=True),
    ]
    for name, data, second in stored:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=((start + second) * 10**9,) * 2)
    outcomes = {}
    for second in (9, 10, 12, 13, 14, 20, 21, 22, 24):
        out, time = tmp_path / f"{second}.db", time_text((start + second) * 10**9)
        with contextlib.suppress(ReplicatorError):
            replicator.restore(f"file://{root}", out, timestamp=time)
        ours = out.read_bytes() if out.exists() else None
        next_release = tmp_path / f"{second}.next.db"
        litestream("restore", "-timestamp", time, "-o", str(next_release), f"file://{root}")
        assert ours == (next_release.read_bytes() if next_release.exists() else None), second
        old_release = tmp_path / f"{second}.old.db"
        done = litestream03("restore", "-timestamp", time, "-o", str(old_release), f"file://{root}")
        outcomes[second] = (done.returncode == 0, ours)
        assert done.returncode == 1 or old_release.read_bytes() == ours, second
    assert [second for second, (_, ours) in outcomes.items() if ours is None] == [9, 24]
    headless = [second for second in outcomes if min(first_of_later, 15) <= second < 22]
    assert [second for second, (restored, _) in outcomes.items() if not restored] == [9, *headless, 24]
    assert [outcomes[second][1] for second in (13, 14, 21)] == [states[1], states[2], states[2]]


def test_the_choice_between_the_formats_is_the_next_releases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[1] / "data/golden/mixed/upgrade-same-path"
    root, files = tmp_path / "replica", json.loads((folder / "manifest.json").read_text())["files"]
    shutil.copytree(folder / "replica", root)
    for file in files:
        os.utime(root / file["path"], ns=(file["mtime_ns"],) * 2)
    edges = sorted({file["mtime_ns"] // 10**6 for file in files})
    shown = []
    for number, time_ms in enumerate(edge + more for edge in edges for more in (0, 1)):
        theirs, ours = tmp_path / f"{number}.theirs", tmp_path / f"{number}.ours"
        done = litestream("restore", "-timestamp", time_text(time_ms * 10**6), "-o", str(theirs), f"file://{root}")
        with contextlib.suppress(ReplicatorError):
            replicator.restore(f"file://{root}", ours, timestamp=time_text(time_ms * 10**6))
        assert done.returncode in (0, 1)
        assert ours.exists() == theirs.exists() == (done.returncode == 0)
        if not ours.exists():
            continue
        assert ours.read_bytes() == theirs.read_bytes()
        main(["restore", "-dry-run", "-timestamp", time_text(time_ms * 10**6), "-o", str(theirs), f"file://{root}"])
        shown += [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  format: ")]
    assert [text for text, _ in groupby(shown)] == ["format: 0.3", "format: ltx"]  # one change, at the upgrade


def test_segments_beyond_four_gib_are_no_segments_for_it(tmp_path: Path) -> None:
    """It would write them, with nine digits, and then not see them: its restore is an older state, with exit code 0. Ours names what is missing."""
    history = [wal([({2: 1}, 2)], salt=1)]
    near, far = segment(0, 0), segment(0, (1 << 32) + 32)
    for name, data in {**replica_of(page(1, 0) + page(2, 0), history, [[]]), far: encode_frame(b"x")}.items():
        path = tmp_path / "replica" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    listed = litestream03("wal", f"file://{tmp_path}/replica").stdout.splitlines()
    assert [line.split()[2:4] for line in listed[1:]] == [["0", "0"]]
    with pytest.raises(MissingSegment, match=f"00000000_{len(history[0]):08x}.* begins at 100000020"):
        replicator.restore(f"file://{tmp_path}/replica", tmp_path / "out.db")
    (tmp_path / "replica" / near).unlink()
    theirs = litestream("restore", "-o", str(tmp_path / "theirs.db"), f"file://{tmp_path}/replica")
    assert (theirs.returncode, "missing WAL segment" in theirs.stderr) == (1, True), theirs.stderr  # the next release sees it


def test_a_hole_that_it_restores_to_damage_is_refused(replica: Replica, tmp_path: Path) -> None:
    """0.3.13 ends with exit code 0 and a database of mixed ages; see the specification's traps."""
    generation = max(replica.generations, key=lambda item: len(item.segments))
    middle = next(info for info in generation.segments if info.offset)
    whole = replica.ours(generation=generation.name)
    replica.v3.delete([middle])  # for good: this is the last test
    assert replica.theirs("-generation", generation.name, "-index", f"{middle.index:08x}") not in (None, whole)
    with pytest.raises(ReplicatorError, match=middle.name):
        replicator.restore(replica.client, tmp_path / "out.db", generation=generation.name, index=middle.index)
    assert list(tmp_path.iterdir()) == []
