"""What was written in format 0.3, state by state, and whether the released binaries bring each of them back."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from replicator import Replicator
from replicator.format.v3 import V3Info, parse_position
from replicator.storage import open_client
from replicator.storage.v3 import V3Client, v3_client
from tests.compat.litestream import litestream
from tests.compat.litestream03 import restore03
from tests.e2e.databases import checkpointed_bytes

TIMEOUT_S = 60


def client(url: str) -> V3Client:
    found = v3_client(open_client(url))
    assert found is not None
    return found


def stored(url: str) -> list[V3Info]:
    """Return everything that is stored, in order of time."""
    v3 = client(url)
    infos: list[V3Info] = []
    for generation in v3.list_generations():
        infos += [*v3.list_snapshots(generation), *v3.list_segments(generation)]
    return sorted(infos, key=lambda info: info.created_ns)


def generations(url: str) -> list[str]:
    """Return the generations in order of time."""
    return list(dict.fromkeys(info.generation for info in stored(url)))


def rfc3339(created_ns: int) -> str:
    seconds, rest = divmod(created_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def integrity(database: Path) -> str:
    connection = sqlite3.connect(f"file:{database}?immutable=1", uri=True)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


@dataclass
class History:
    """States of a database, each with the position and the time at which it was stored."""

    database: Path
    url: str
    folder: Path
    states: list[tuple[str, int, bytes]] = field(default_factory=list)

    def note(self, engine: Replicator) -> None:
        """Store what is committed, and remember it. Nobody may write meanwhile."""
        engine.wait(timeout_s=TIMEOUT_S)
        position = engine.status().replicas[0].position
        assert position == engine.status().position
        self.states.append((position, stored(self.url)[-1].created_ns, checkpointed_bytes(self.database, self.folder)))

    def check_times(self, step: int = 1) -> None:
        """0.3.13 restores each time to the state that was stored then."""
        output = self.folder / "theirs03.db"
        for position, created_ns, expected in self.states[::step]:
            assert restore03(self.url, output, "-timestamp", rfc3339(created_ns)) == expected, position
        assert integrity(output) == "ok"

    def check_indexes(self) -> None:
        """0.3.13 restores each index of each generation to its last state."""
        output = self.folder / "theirs03.db"
        last = {}
        for position, _, expected in self.states:
            at = parse_position(position)
            last[at.generation, at.index] = expected
        for (generation, index), expected in last.items():
            assert restore03(self.url, output, "-generation", generation, "-index", f"{index:08x}") == expected, (generation, index)
        assert integrity(output) == "ok"

    def check_newest(self) -> None:
        """Both releases restore the newest state, and find it healthy."""
        expected = checkpointed_bytes(self.database, self.folder)
        assert restore03(self.url, self.folder / "theirs03.db") == expected
        assert restore05(self.url, self.folder / "theirs05.db") == expected

    def check(self) -> None:
        self.check_newest()
        self.check_times()
        self.check_indexes()


def restore05(url: str, output: Path, *flags: str) -> bytes:
    output.unlink(missing_ok=True)
    done = litestream("restore", "-o", str(output), "-integrity-check", "full", *flags, url)
    assert done.returncode == 0, done.stdout + done.stderr
    return output.read_bytes()
