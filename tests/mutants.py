"""Seeded bugs that the tests must find: python -m tests.mutants [--faults] [-k WORD]

Each mutant of `tests/seeded.py` is a small change of the source, applied to a copy of it in a temporary folder, and the tests that must fail then. First they must
all pass without a change. Exit code 1 when a mutant survives. What survives is a test to be written.

`pytest -m scheduled -n0` runs it as well; CI does that on a schedule, since it takes minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.seeded import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300
BASELINE_TIMEOUT_S = 3600
_FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(?:\w+/)*(\w+\.py::.+?)(?: - |$)", re.MULTILINE)


def copied(folder: Path) -> None:
    """Copy what tests need; the test data are linked."""
    shutil.copytree(ROOT / "replicator", folder / "replicator", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("fuzz", "docs", "tests/data", "README.md", "CHANGELOG.md"):
        (folder / name).symlink_to(ROOT / name)


def failure(folder: Path, tests: str, timeout_s: float = TIMEOUT_S) -> str:
    """Run tests in a copy; return how they fail, an empty string when they pass. One that does not end in time has failed."""
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "ci"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return "not ended in time"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout[-2000:] if done.returncode else ""


def mutate(folder: Path, mutant: Mutant) -> dict[Path, str]:
    """Apply a mutant to a copy; returns the texts before."""
    before: dict[Path, str] = {}
    for file, old, new in mutant.edits:
        path = folder / "replicator" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"mutant does not fit any more: {mutant.name} ({file})")
        before.setdefault(path, text)
        path.write_text(text.replace(old, new))
    return before


def survivors(chosen: list[Mutant]) -> list[str]:
    """Run mutants; return the names of those that no test found."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copied(folder)
        tests = sorted({path for mutant in chosen for path in mutant.tests.split()})
        if failing := failure(folder, " ".join(tests), BASELINE_TIMEOUT_S):
            raise RuntimeError(f"the tests fail without a mutant:\n{failing}")
        found = []
        for mutant in chosen:
            started = time.monotonic()
            before = mutate(folder, mutant)
            how = failure(folder, mutant.tests)
            for path, text in before.items():
                path.write_text(text)
            by = match[1] if (match := _FAILED.search(how)) else how[-80:]
            faults = " ".join(f"F{number}" for number in mutant.faults)
            print(f"{'killed' if how else 'SURVIVED':9} {time.monotonic() - started:5.1f} s  {faults:8} {mutant.name}  {by}", flush=True)
            if not how:
                found.append(mutant.name)
    print(f"{len(chosen) - len(found)} of {len(chosen)} mutants killed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("-k", default="", metavar="WORD", help="only mutants with the word in their name, or of that fault (F12)")
    parser.add_argument("--faults", action="store_true", help="only mutants that take away the defence against a fault of docs/faults.md")
    given = parser.parse_args()
    words = given.k.split("|")
    chosen = [
        mutant
        for mutant in MUTANTS
        if any(word in mutant.name or word in [f"F{number}" for number in mutant.faults] for word in words)
        and (mutant.faults or not given.faults)
    ]
    return 1 if survivors(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
