"""Seeded bugs that the tests must find: python -m tests.mutants [-k WORD]

Each mutant is a small change of the source, applied to a copy of it in a temporary folder, and the tests that must fail then. First they must all pass without a
change. Exit code 1 when a mutant survives. What survives is a test to be written.

`pytest -m scheduled -n0` runs it as well; CI does that on a schedule, since it takes minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300
BASELINE_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file` and becomes `new`; at least one of `tests` must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


POWER, WAL, TAIL, TABLE = (
    "tests/unit/test_power_cut.py",
    "tests/unit/test_wal.py",
    "tests/unit/test_tail.py",
    "tests/unit/test_pagetable.py",
)
RETENTION, PLAN, LEVELS = "tests/unit/test_retention.py", "tests/unit/test_plan.py", "tests/unit/test_levels.py"
COMPACTOR, LTX, S3, RESTORE = (
    "tests/unit/test_compactor.py",
    "tests/unit/test_ltx.py",
    "tests/storage/test_s3.py",
    "tests/unit/test_restore.py",
)
STEPS = "tests/e2e/test_every_step_fails.py"
V3RESTORE, LIBRARY = "tests/unit/test_v3restore.py", "tests/e2e/test_library.py"

MUTANTS = [
    Mutant("a file is named before it is synced", "atomic.py", "            sync_file(self._file)\n            _give_name", "            _give_name", POWER),
    Mutant("a name is not synced", "atomic.py", "            raise\n        sync_file(self._directory)", "            raise", POWER),
    Mutant("a temporary file is readable by all", "atomic.py", "flags, mode, dir_fd=directory", "flags, 0o666, dir_fd=directory", "tests/unit/test_security.py"),
    Mutant("the last commit frame is left out", "format/wal.py", "int(found[-1]) + 1 if", "int(found[-1]) if", WAL),
    Mutant("salts are ignored", "format/wal.py", "(fields[:, 2] == salts[0]) & (fields[:, 3] == salts[1]) & ", "", WAL),
    Mutant("frame checksums are ignored", "format/wal.py", "(sums == fields[:count, 4:]).all(axis=1)", "(sums == sums).all(axis=1)", WAL),
    Mutant("frames of page 0 are taken", "format/wal.py", " & (fields[:, 0] != 0)", "", WAL),
    Mutant("the last frame's checksum is not compared", "tail.py", "\n            and (last_frame.checksum1, last_frame.checksum2) == position.checksum", "", TAIL),
    Mutant("any restart of the WAL is continued", "tail.py", "    if restart_proven:\n", "    if restart_proven is not None:\n", TAIL),
    Mutant(
        "salts are not looked at again after the first scan", "engine.py", "if first and not self._database.salts_are(position.salts):", "if False:",
        "tests/e2e/test_attach_and_checkpoint.py",
    ),
    Mutant("the only full image before the window is deleted", "retention.py", "doomed = list(old[:-1])", "doomed = list(old)", RETENTION),
    Mutant("the newest raw file is deleted", "retention.py", "for info in raw[:-1]:", "for info in raw:", RETENTION),
    Mutant("raw files are deleted before they are merged", "retention.py", " or info.max_txid > merged:", ":", RETENTION),
    Mutant("deletion does not check what is reached", "retention.py", "    if before != after:\n        raise NonContiguous(after, before)\n    for", "    for", RETENTION),
    Mutant("a time includes its own moment", "plan.py", "info.created_at >= self._timestamp", "info.created_at > self._timestamp", PLAN),
    Mutant("a gap is passed over", "plan.py", "        if beyond:\n            raise NonContiguous(current, min(beyond))\n    if not plan or", "    if not plan or", PLAN),
    Mutant("merging goes across a gap", "levels.py", "        if inputs and info.min_txid > inputs[-1].max_txid + 1:\n            break\n", "", LEVELS),
    Mutant("the oldest page wins", "format/merge.py", "_ranked(pages, -rank)", "_ranked(pages, rank)", COMPACTOR),
    Mutant("pages behind the end are merged", "format/merge.py", "if newest < pgno <= commit:", "if newest < pgno:", COMPACTOR),
    Mutant("the file checksum is not compared", "format/ltx.py", "if got != trailer.file_checksum:", "if got < 0:", LTX),
    Mutant("a block may be of any size", "format/ltx.py", "if size > bound:", "if size < 0:", LTX),
    Mutant("the page index is not compared", "format/ltx.py", "        if self._found.digest() != self._expected.digest():\n", "        if self._found is None:\n", LTX),
    Mutant(
        "published before it is checked", "publish.py",
        '        if integrity_check != "none":\n            _check(temporary, integrity_check)\n        _publish(temporary, output, force)\n',
        '        _publish(temporary, output, force)\n        if integrity_check != "none":\n            _check(temporary, integrity_check)\n', V3RESTORE,
    ),
    Mutant("an old WAL stays beside the restored file", "publish.py", "                side.rename(temporary.with_name(temporary.name + suffix))\n", "                side.exists()\n", V3RESTORE),
    Mutant("the schema of a restored database is trusted", "publish.py", "PRAGMA trusted_schema=OFF", "PRAGMA trusted_schema=ON", "tests/unit/test_security.py"),
    Mutant("pages behind the end of a shrunk database are written", "chain.py", "if pgno <= limit and owners[pgno] == mine:", "if pgno > limit or owners[pgno] == mine:", RESTORE),
    Mutant(
        "growth pages are forgotten", "engine.py", "        if not len(grown) or len(grown) == int((changes.pgnos > self._commit).sum()):\n", "        if True:\n",
        "tests/e2e/test_attach_and_checkpoint.py tests/e2e/test_library.py",
    ),
    Mutant("a failed restore keeps the old WAL", "publish.py", "                _put_back(temporary, output)\n        raise\n", "                pass\n        raise\n", STEPS),
    Mutant("a file that cannot be synced is named", "atomic.py", "            sync_file(self._file)\n            _give_name", "            with contextlib.suppress(OSError):\n                sync_file(self._file)\n            _give_name", STEPS),
    Mutant("a staged file that fails is left", "outbox.py", "        except BaseException:\n            path.unlink(missing_ok=True)\n            raise\n", "        except BaseException:\n            raise\n", STEPS),
    Mutant("other bytes of another writer are taken for ours", "replica.py", "        if not same:\n            raise Fenced(self.url, file.max_txid)\n", "", LIBRARY),
    Mutant("acknowledged without being stored", "replica.py", "        for file in files:\n            self._store(file)\n        self._make_sure", "        self._make_sure", LIBRARY),
    Mutant("a condition that was lost against ourselves is a refusal", "storage/s3.py", 'if about.get("RetryAttempts", 0):', "if about is None:", S3),
    Mutant("another range than asked is taken", "storage/s3.py", "if first != offset or last - first + 1 != length:", "if first < 0:", S3),
    Mutant("a damaged page table is trusted", "pagetable.py", "return self._xor(self.state.commit) == self.state.xor", "return True", f"{POWER} {TABLE}"),
    Mutant("entries behind the end come back", "pagetable.py", "        if commit > old.commit:  # a crash", "        if commit < 0:  # a crash", TABLE),
]  # fmt: skip


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


def mutate(folder: Path, mutant: Mutant) -> str:
    """Apply a mutant to a copy; returns the text before."""
    path = folder / "replicator" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"mutant does not fit any more: {mutant.name} ({mutant.file})")
    path.write_text(text.replace(mutant.old, mutant.new))
    return text


def survivors(word: str = "") -> list[str]:
    """Run the mutants whose name has the word in it; return the names of those that no test found."""
    chosen = [mutant for mutant in MUTANTS if word in mutant.name]
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
            survived = not failure(folder, mutant.tests)
            (folder / "replicator" / mutant.file).write_text(before)
            print(f"{'SURVIVED' if survived else 'killed':9} {time.monotonic() - started:5.1f} s  {mutant.name}", flush=True)
            if survived:
                found.append(mutant.name)
    print(f"{len(chosen) - len(found)} of {len(chosen)} mutants killed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("-k", default="", metavar="WORD", help="only mutants with the word in their name")
    return 1 if survivors(parser.parse_args().k) else 0


if __name__ == "__main__":
    sys.exit(main())
