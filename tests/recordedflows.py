"""Files of runs that one Python version recorded, to be replayed by others: `tests/data/recorded/<version>/<flow>[-half].db`.

    python -m tests.recordedflows          writes those of the version that runs it

`-half`: the process was killed in the middle; whoever replays has to go on from there.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

from tests import sampleflows as sample
from workflow import journal as jr
from workflow.state import ENDED
from workflow.testing import run_to_crash

RECORDED = Path(__file__).parent / "data" / "recorded"
FLOWS = {
    name: getattr(sample, "waits" if name.startswith("waits_wrong") else name)
    for name in (
        "chain", "typed", "fan_out", "branches", "nested", "without_arguments", "first_of_several", "retried", "gives_up", "group_fails",
        "sleeps_in_parallel", "waits_wrong_type_first", "asks_twice", "transacts", "stateful", "parent_of_bad", "plain", "versioned",
        "cancelled_in_branches",
    )
}  # fmt: skip

WHOLE_ONLY = {"waits_wrong_type_first", "asks_twice", "cancelled_in_branches", "retried"}
"""No halves of these: nobody sends events to a copy, and the steps of `retried` count their tries in memory, in the process that made the record."""


def record(name: str, folder: Path, *, half: bool) -> Path:
    """Run a flow to its end, or half of its way, and return the file."""
    _, _, count = asyncio.run(run_to_crash(folder / "run", sample.SCENARIOS[name], None, {}))
    path = folder / "run" / "it.db"
    for at in sorted(range(1, count), key=lambda at: abs(at - count * 2 // 3)):
        if not half or (path.exists() and jr.read(path).instance.status not in ENDED):
            break
        shutil.rmtree(folder / "run")
        asyncio.run(run_to_crash(folder / "run", sample.SCENARIOS[name], at, {}))
    return path


def main() -> None:
    target = RECORDED / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in FLOWS:
        for half in (False, True) if name not in WHOLE_ONLY else (False,):
            with tempfile.TemporaryDirectory() as folder:
                copy = target / f"{name}{'-half' if half else ''}.db"
                db = sqlite3.connect(record(name, Path(folder), half=half), isolation_level=None)
                db.execute("PRAGMA journal_mode = DELETE")
                db.execute("PRAGMA page_size = 512")  # a fifth of the size
                db.execute("VACUUM INTO ?", (str(copy),))
                db.close()
                print(copy.name, copy.stat().st_size, flush=True)


if __name__ == "__main__":
    main()
