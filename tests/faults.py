"""The table of faults: python -m tests.faults writes docs/faults.md.

A test names the faults that it covers: `@pytest.mark.fault("F12")`. It may do so only if it fails when the defence is removed. A fault that no test names is shown
as a hole. For each fault a seeded bug of `tests/seeded.py` takes a defence away; `python -m tests.mutants --faults` shows that a test with the mark fails then. The
numbers are stable.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tests.seeded import BEYOND_OUR_CODE, MUTANTS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "faults.md"

GROUPS = {
    "Process and machine": range(1, 10),
    "SQLite and the local database": [*range(10, 28), 69, 70, 71],
    "Object store": range(28, 44),
    "Split brain and failover": range(44, 51),
    "Hostile inputs": range(51, 65),
    "Of the tests themselves": range(65, 69),
}

FAULTS = {
    1: ("SIGKILL at any step", "a restart goes on; nothing acknowledged is lost, no temporary file stays"),
    2: ("power loss: unsynced files vanish or tear", "local state is checked when it is opened, and rebuilt from database and replica"),
    3: ("`fsync` fails once", "unknown outcome: nothing is taken for stored"),
    4: ("the process sleeps past its lease", "it looks again before it acknowledges anything"),
    5: ("`fork()` with a running engine", "the child keeps no lock and ends no thread"),
    6: ("two engines for one database on one machine", "the second one is refused"),
    7: ("stop during an outage", "a bounded last sync; what did not get through is said"),
    8: ("the application drops tables", "nothing of ours is in the schema"),
    9: ("an exception in a thread, the end of the interpreter", "reported; no thread or half state stays"),
    10: ("WAL restarted while we were down", "continuity is proven, or the pages that differ are uploaded"),
    11: ("WAL restarted between our read and our checkpoint", "the salts are looked at again under the pin"),
    12: ("WAL reused with the same size", "salts and checksums of frames tell"),
    13: ("SQLite with the WAL-reset bug", "a warning where others checkpoint the database; our own checkpoints have no writer beside them"),
    14: ("a long reader pins the WAL", "nothing blocks; the WAL only stays longer"),
    15: ("any `wal_autocheckpoint`, foreign checkpoints", "nothing is lost"),
    16: ("VACUUM, auto-vacuum, shrinking and growing", "the restored bytes are SQLite's"),
    17: ("database replaced, deleted, made anew", "one history: the difference is the next TXID"),
    18: ("stale `-wal` beside a restored file", "refused, or moved aside with it"),
    19: ("torn tail, or damage in the middle of the WAL", "the end, or an alarm; the two are told apart"),
    20: ("page sizes, the lock page, more than 1 GiB", "restored exactly"),
    21: ("a file that SQLite alone cannot read", "refused by its header"),
    22: ("links to the database", "symbolic ones are followed once, hard ones refused"),
    23: ("full disk", "staging is bounded, the last of the disk belongs to the application"),
    24: ("no file handles left", "an error on the way drops nothing"),
    25: ("little memory, large database", "streams; memory does not grow with the database"),
    26: ("applications without a busy timeout", "the write lock is held for milliseconds"),
    27: ("clocks that jump", "order by TXID; deletion waits"),
    28: ("500, 503, 429 for minutes", "backs off, and goes on"),
    29: ("a reply is lost", "read back and compared before the next try"),
    30: ("a PUT comes twice, or late", "the same name has the same bytes"),
    31: ("an upload is cut short, or never completed", "found by size and checksum; parts are aborted"),
    32: ("listings are stale, unordered, repeated", "a hint, put in order; nothing is built on one alone"),
    33: ("downloads end early, ranges are ignored", "resumed at the exact offset, verified to the end"),
    34: ("files vanish under us", "planned again; retention never cuts the only chain"),
    35: ("no store at the start", "begins when it is back; a lost database does not begin anew"),
    36: ("the store refuses our clock", "the error names both times"),
    37: ("the store ignores conditions", "a probe finds out"),
    38: ("dialects of signatures and checksums", "one plain signed request"),
    39: ("rights are missing", "less is done, loudly; replication goes on"),
    40: ("deletion is denied", "retention reports, uploads go on"),
    41: ("a very slow store", "bounded queue, visible lag"),
    42: ("local position ahead of the replica", "the longest chain in the replica counts"),
    43: ("nobody writes", "no request"),
    44: ("two writers", "creating decides; the loser stops before it acknowledges"),
    45: ("an old owner comes back with a tail of its own", "refused, not merged"),
    46: ("a lease with skewed clocks", "no acknowledgement on local time alone"),
    47: ("restore while another one writes", "a fixed plan; a takeover claims first"),
    48: ("one TXID, two contents", "stops"),
    49: ("a restored copy goes on at the same path", "the chain is continued with proof"),
    50: ("old and new versions of our format", "newer ones are refused"),
    51: ("truncated and flipped LTX files", "an error that names the file"),
    52: ("LTX files that make no sense", "refused before anything is allocated"),
    53: ("LZ4 bombs", "output is limited to a page"),
    54: ("tracked checksums", "read, never written"),
    55: ("names that lead elsewhere", "refused"),
    56: ("foreign objects in the prefix", "ignored"),
    57: ("YAML bombs, unknown keys", "refused with their place, in bounded time"),
    58: ("redirects and endpoint tricks", "credentials stay with the configured host"),
    59: ("secrets in output", "redacted"),
    60: ("a restored database with evil contents", "checked with an untrusted schema"),
    61: ("permissions, planted links, temporary names", "0600, O_EXCL, O_NOFOLLOW; verified before it has its name"),
    62: ("encryption without the right key", "never plaintext; a wrong key is not damage"),
    63: ("a bucket that was rolled back", "refused: it had more"),
    64: ("edges of format 0.3", "read, or the gap is named"),
    65: ("a checker that cannot fail", "seeded bugs must be found"),
    66: ("a test double nicer than S3", "the same suite runs against real servers"),
    67: ("a soak that never verifies", "each cycle compares bytes"),
    68: ("backups that nobody restores", "drills on a schedule"),
    69: ("WAL restarted while we are stopped, and shorter", "the missed pages are uploaded"),
    70: ("local state deleted, or of another database", "rebuilt from the replica, or refused"),
    71: ("another page size", "a full image first; merging never crosses"),
}


def covered() -> dict[int, list[str]]:
    """Return the tests of each fault, as `file::name`, in order."""
    found: dict[int, list[str]] = {number: [] for number in FAULTS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for number in _numbers(node):
                found[number].append(f"{path.relative_to(ROOT / 'tests')}::{_name(node)}")
    return found


def removed() -> dict[int, list[str]]:
    """Return the names of the seeded bugs that take the defence against each fault away."""
    return {number: [mutant.name for mutant in MUTANTS if number in mutant.faults] for number in FAULTS}


def document() -> str:
    """Return the text of docs/faults.md."""
    tests, bugs = covered(), removed()
    shown = [number for number in FAULTS if bugs[number]]
    elsewhere = "; ".join(f"F{number}: {where}" for number, where in sorted(BEYOND_OUR_CODE.items()))
    holes = [number for number in sorted(FAULTS) if not tests[number]]
    lines = [
        "# Faults",
        "",
        "What the engine must survive, what happens then, and the tests that cover it. Written by `python -m tests.faults`; a test",
        "checks that it is up to date. The rule for every row: either the restored database is a prefix of committed history at or after the last acknowledged",
        "transaction, or the operation fails with a typed error that names the object.",
        "",
        f"{len(FAULTS) - len(holes)} of {len(FAULTS)} faults have a test. Holes: {', '.join(f'F{number}' for number in holes) or 'none'}.",
        "",
        f"For {len(shown)} of {len(FAULTS)} faults a seeded bug takes a defence away: the last column. `python -m tests.mutants --faults` applies each of them to a copy",
        "of the source and shows that a test of the same row fails then; CI does so on a schedule. Defences that are no line of the package:",
        f"{elsewhere}.",
    ]
    for title, numbers in GROUPS.items():
        lines += ["", f"## {title}", "", "| | fault | what happens | tests | seeded bugs |", "|---|---|---|---|---|"]
        for number in numbers:
            fault, outcome = FAULTS[number]
            names = "<br>".join(f"`{name.rpartition('/')[2]}`" for name in tests[number]) or "**hole**"
            without = "<br>".join(bugs[number]) or ("elsewhere" if number in BEYOND_OUR_CODE else "**none**")
            lines.append(f"| F{number} | {fault} | {outcome} | {names} | {without} |")
    return "\n".join(lines) + "\n"


def _numbers(node: ast.stmt) -> list[int]:
    match node:
        case ast.FunctionDef(decorator_list=marks):
            calls = marks
        case ast.Assign(value=ast.Call(func=ast.Call() as mark)):
            calls = [mark]
        case _:
            return []
    return [
        int(str(argument.value).removeprefix("F"))
        for call in calls
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    ]


def _name(node: ast.stmt) -> str:
    return node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.targets[0])  # type: ignore[attr-defined]


def main() -> int:
    DOCUMENT.write_text(document())
    print(DOCUMENT.read_text().splitlines()[6])
    return 0


if __name__ == "__main__":
    sys.exit(main())
