"""`pyrepl history`: what it prints, and its exit codes. Through stores in memory, and the golden replicas that the documentation shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.cli import main
from replicator.cli.history import bytes_text, span_text
from replicator.format.ltx import TXID
from replicator.storage.memory import MemoryClient

START_MS = 1_700_000_000_000
ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A store in memory; pass (level, min, max) as its parameter."""
    name = request.node.name
    client = MemoryClient.named(name)
    for level, low, high in getattr(request, "param", [(0, txid, txid) for txid in range(1, 6)] + [(1, 1, 3), (9, 1, 2)]):
        client.put(level, TXID(low), TXID(high), bytes(10 * high), timestamp_ms=START_MS + 1000 * high)
    yield f"memory://{name}"
    MemoryClient._named.pop(name, None)


GAP = [(0, 1, 1), (0, 2, 2), (0, 5, 5)]
BRIDGED = [*GAP, (9, 1, 4)]


def picture(text: str) -> dict[str, str]:
    """The bars by their labels."""
    return {line[:9].strip(): line[9:] for line in text.splitlines() if re.match(r"level \d  |moments  ", line)}


def test_the_picture_has_a_bar_for_each_level(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", "-width", "49", url]) == 0
    bars = picture(capsys.readouterr().out)
    # 40 columns for TXIDs 1 to 5: ten from one to the next.
    assert bars["level 9"] == " " * 10 + "S"
    assert bars["level 1"] == " " * 20 + "█"
    assert bars["level 0"] == "█" * 40
    assert bars["moments"] == "█" + "         █" * 3 + "        █"


@pytest.mark.parametrize("url", [GAP], indirect=True)
def test_a_broken_replica_is_shown_and_exits_with_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", "-width", "49", url]) == 1
    out, err = capsys.readouterr()
    bars = picture(out)
    assert bars["level 0"] == "█" * 11 + "!" * 28 + "░"
    assert bars["moments"] == "█         █" + "!" * 28
    assert "gap: after 0000000000000002 the next file starts at 0000000000000005; 1 file of no use, nothing bridges it" in out
    assert err.splitlines() == [
        "Error: the newest state cannot be restored: "
        "non-contiguous ltx files: have up to 0000000000000002 but next file starts at 0000000000000005",
        "Try: -txid 0000000000000002 restores the state before the gap",
    ]
    assert main(["history", "-json", url]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["restorable"] is False
    assert "non-contiguous" in document["reason"]
    assert document["newest"]["txid"] == f"{2:016x}"
    assert document["gaps"] == [{"after": f"{2:016x}", "before": f"{5:016x}", "resumes": None, "files": 1}]


@pytest.mark.parametrize("url", [BRIDGED], indirect=True)
def test_a_hole_that_a_snapshot_bridges_is_no_error(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", url]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "hole: level 0: TXIDs are missing before a file" in out


@pytest.mark.parametrize("url", [[(0, 3, 3)]], indirect=True)
def test_nothing_restorable_says_so(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", url]) == 1
    out, err = capsys.readouterr()
    assert "nothing can be restored" in out
    assert len(err.splitlines()) == 1
    assert main(["history", "-json", url]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["oldest"], document["newest"], document["moments"], document["ages"]) == (None, None, [], [])


def test_an_empty_replica_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", "memory://nothing-here"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: no matching backup files available: memory://nothing-here\n")


def test_times_outside_the_calendar_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    client = MemoryClient.named("calendar")
    for txid, time_ms in enumerate((-(2**62), 0, START_MS, 2**62), start=1):
        client.put(0, TXID(txid), TXID(txid), b"x", timestamp_ms=time_ms)
    for flags in ([], ["-json"]):
        assert main(["history", *flags, "memory://calendar"]) == 0
        assert "future" in capsys.readouterr().out


@pytest.mark.parametrize("width", ["39", "401", "-5", "x", "", "1" * 50, "0000000400000", "\uff14\uff10"])
def test_a_wrong_width_is_refused(width: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", f"-width={width}", "memory://any"]) == 2
    assert "invalid value for -width" in capsys.readouterr().err


def test_one_url_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history"]) == main(["history", "a", "b"]) == 2


def test_no_bar_is_wider_than_asked(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for width in (40, 77, 400):
        main(["history", "-width", str(width), url])
        drawn = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith(("level", "moments", " ")) and "objects" not in line
        ]
        assert max(map(len, drawn)) == width


def test_a_stream_that_is_not_unicode_gets_ascii(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["history", "-width", "49", url]) == 0
    assert picture(path.read_text())["level 0"] == "#" * 40


def test_a_terminal_gets_the_same_text_with_colours(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main(["history", "-width", "120", url])
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["history", "-width", "120", url])
    coloured = capsys.readouterr().out
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def golden(name: str, folder: Path) -> str:
    source = ROOT / "tests/data/golden/v0.5" / name
    root = folder / name
    shutil.copytree(source / "replica", root)
    for file in json.loads((source / "manifest.json").read_text())["files"]:
        os.utime(root / file["path"], ns=(file["mtime_ns"], file["mtime_ns"]))
    return f"file://{root}"


def shown(command: str) -> str:
    """What docs/history.md shows as the output of a command."""
    text = (ROOT / "docs/history.md").read_text()
    return text.partition(f"$ {command}\n")[2].partition("```")[0]


def test_the_documented_picture_is_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = golden("compacted-levels-l0-pruned", tmp_path)
    assert main(["history", "-width", "80", url]) == 0
    age = r", \S+( ago| in the future)"
    printed = re.sub(age, "", capsys.readouterr().out.replace(url, "file:///backup/app"))
    # The files' times are in the future of a machine whose clock is behind theirs; what is said about that is not the point here.
    printed = "".join(line for line in printed.splitlines(keepends=True) if not line.startswith("future:")).rstrip("\n")
    assert printed == re.sub(age, "", shown("pyrepl history -width 80 file:///backup/app")).rstrip("\n")


def test_the_documented_json_is_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = golden("point-in-time", tmp_path)
    assert main(["history", "-json", url]) == 0
    printed = json.loads(capsys.readouterr().out.replace(url, "file:///backup/small"))
    printed["problems"] = [problem for problem in printed["problems"] if problem["kind"] != "future"]
    assert printed == json.loads(shown("pyrepl history -json file:///backup/small"))


def test_sizes_and_durations_for_people() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1.0 kB",
        9949: "9.9 kB",
        9951: "10 kB",
        999_499: "999 kB",
        999_500: "1.0 MB",
        2 * 10**15: "2.0 PB",
    }
    assert {count: bytes_text(count) for count in sizes} == sizes
    spans = {
        0: "0ms", 0.05: "50ms", 0.9996: "1s", 3.21: "3.2s", 59.94: "59.9s", 59.96: "1m", 60: "1m", 90: "1m30s", 300: "5m", 3599.9: "60m",
        3600: "1h", 5400: "1h30m", 86399: "24h", 86400: "1d", 90000: "1d1h", 12.5 * 86400: "12d",
    }  # fmt: skip
    assert {seconds: span_text(seconds) for seconds in spans} == spans
