"""The commands on replicas of Litestream 0.3: what they print, and how they refuse."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from replicator.cli import main
from replicator.cli.generations import lag_text
from replicator.format.v3 import encode_frame
from replicator.storage import open_client
from replicator.storage.base import ObjectStore
from replicator.storage.file import FileClient
from tests.v3data import GENERATION, PAGE, Transaction, apply, page, replica, segment, wal

FRAME = PAGE + 24
START_S = 1_700_000_000
DATABASE = b"".join(page(pgno, 9000 + pgno) for pgno in range(1, 5))
FIRST: list[Transaction] = [({2: 1, 3: 1}, 4), ({2: 3}, 4)]
SECOND: list[Transaction] = [({4: 4}, 4)]
OBJECTS = replica(DATABASE, [wal(FIRST, salt=1), wal(SECOND, salt=2)], [[32 + 2 * FRAME], []])
SECOND_OFFSET = 32 + 2 * FRAME


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """Commands log to a stream that ends with the test."""
    log = logging.getLogger("replicator")
    handlers, level = log.handlers[:], log.level
    yield
    log.handlers[:] = handlers
    log.setLevel(level)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A replica whose files are a second apart: snapshot, two segments of index 0, one of index 1."""
    return filled(tmp_path / "replica", OBJECTS)


def filled(root: Path, objects: dict[str, bytes]) -> Path:
    client = FileClient(root)
    for number, (name, data) in enumerate(objects.items()):
        client.put_object(name, data)
        os.utime(root / name, ns=((START_S + number) * 10**9,) * 2)
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(item) for item in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_restore_takes_generation_index_and_time(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {
        (): apply(apply(DATABASE, FIRST), SECOND),
        ("-index", "0"): apply(DATABASE, FIRST),
        ("-index", "ff"): apply(apply(DATABASE, FIRST), SECOND),
        ("-generation", GENERATION, "-timestamp", "2023-11-14T22:13:21Z"): apply(DATABASE, FIRST[:1]),
        ("-timestamp", "2023-11-14T22:13:21.999999999Z"): apply(DATABASE, FIRST[:1]),
        ("-timestamp", "2023-11-14T22:13:22Z"): apply(DATABASE, FIRST),
    }
    for flags, expected in states.items():
        code, out, err = run(capsys, "restore", "-force", "-o", tmp_path / "out.db", *flags, f"file://{source}")
        assert (code, err) == (0, ""), flags
        assert f"generation={GENERATION}" in out
        assert (tmp_path / "out.db").read_bytes() == expected, flags


def test_restore_prints_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "restore", "-json", "-o", tmp_path / "out.db", source)
    document = json.loads(out)
    assert (code, document["format"], document["generation"], document["index"]) == (0, "0.3", GENERATION, "00000001")
    assert "txid" not in document


def test_a_dry_run_shows_format_generation_and_files(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "restore", "-dry-run", "-json", "-index", "0", "-o", "/nowhere/x.db", source)
    document = json.loads(out)
    assert code == 0
    assert {key: document[key] for key in ("format", "generation", "min_index", "max_index")} == {
        "format": "0.3",
        "generation": GENERATION,
        "min_index": "00000000",
        "max_index": "00000000",
    }
    assert [(file["name"], file["offset"]) for file in document["files"]] == [
        ("00000000.snapshot.lz4", None),
        ("00000000_00000000.wal.lz4", 0),
        (f"00000000_{SECOND_OFFSET:08x}.wal.lz4", SECOND_OFFSET),
    ]
    code, out, _ = run(capsys, "restore", "-dry-run", "-o", "/nowhere/x.db", source)
    assert code == 0
    assert "  format: 0.3\n" in out
    assert f"  generation: {GENERATION}\n  index range: 00000000 - 00000001\n" in out
    assert not Path("/nowhere").exists()


def test_between_generations_the_end_of_the_earlier_one_is_restored(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = "ffee000000000000"
    for number, name in enumerate(replica(DATABASE, [wal(SECOND, salt=7)], [[]])):
        path = source / name.replace(GENERATION, later)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(OBJECTS[name])
        os.utime(path, ns=((START_S + 100 + number) * 10**9,) * 2)
    between = ("-timestamp", "2023-11-14T22:14:00Z")
    code, out, err = run(capsys, "restore", "-o", tmp_path / "out.db", *between, source)
    assert (code, err) == (0, "")
    assert f'msg="between two generations, restored is the end of the earlier one" generation={GENERATION} end=2023-11-14T22:13:23Z' in out
    assert (tmp_path / "out.db").read_bytes() == apply(apply(DATABASE, FIRST), SECOND)
    code, out, _ = run(capsys, "restore", "-dry-run", "-json", "-o", "/nowhere/x.db", *between, source)
    assert (code, json.loads(out)["generation"], json.loads(out)["max_index"]) == (0, GENERATION, "00000001")
    code, _, err = run(capsys, "restore", "-o", tmp_path / "no.db", *between, "-generation", later, source)
    assert (code, "timestamp does not exist" in err) == (1, True)


def test_a_dry_run_says_ltx_where_ltx_is_chosen(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", source, tmp_path / "ltx")[0] == 0
    code, out, _ = run(capsys, "restore", "-dry-run", "-o", "/nowhere/x.db", tmp_path / "ltx")
    assert code == 0
    assert "  format: ltx\n  txid range: 0000000000000001 - 0000000000000004\n" in out


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["-generation", "f" * 16], 1, f"no such generation: {'f' * 16}"),
        (["-generation", GENERATION.upper()], 2, "invalid value for -generation"),
        (["-generation", "../" * 5 + "x"], 2, "invalid value for -generation"),
        (["-index", "0x1"], 1, "not an index"),
        (["-index", "123456789"], 1, "not an index"),
        (["-index", "0", "-timestamp", "2023-11-14T22:13:21Z"], 2, "cannot specify index & timestamp"),
        (["-index", "0", "-txid", "0000000000000001"], 2, "cannot specify -txid and -index"),
        (["-generation", GENERATION, "-f"], 2, "cannot use follow mode with -generation"),
        (["-timestamp", "2023-11-14T22:13:19.999999999Z"], 1, "timestamp does not exist"),
        (["-timestamp", "2023-11-14T22:13:23.000000001Z"], 1, "timestamp does not exist"),
        (["-timestamp", "2023-11-14 noon"], 1, "invalid -timestamp"),
        (["-txid", "0000000000000001"], 1, "no matching backup files available"),
    ],
)
def test_restore_refuses(flags: list[str], code: int, words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got, out, err = run(capsys, "restore", "-o", tmp_path / "out.db", *flags, source)
    assert (got, out) == (code, "")
    assert words in err
    assert os.listdir(tmp_path) == ["replica"]


def test_an_index_before_the_first_snapshot_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = filled(tmp_path / "replica", replica(DATABASE, [wal(SECOND, salt=2)], [[]], first=3))
    code, _, err = run(capsys, "restore", "-o", tmp_path / "out.db", "-index", "2", root)
    assert code == 1
    assert "no snapshots available" in err
    assert "at or below index 00000002" in err


@pytest.mark.parametrize("command", ["restore", "convert"])
def test_a_missing_segment_is_named(command: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / segment(0, 0)).unlink()
    arguments = ["-o", tmp_path / "out.db", source] if command == "restore" else [source, tmp_path / "ltx"]
    code, _, err = run(capsys, command, *arguments)
    assert code == 1
    assert f"missing wal segment {segment(0, 0)}" in err
    assert sorted(os.listdir(tmp_path)) == ["replica"]


def test_a_damaged_segment_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = source / segment(1, 0)
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-10] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(status.st_mtime_ns,) * 2)
    code, _, err = run(capsys, "restore", "-o", tmp_path / "out.db", source)
    assert code == 1
    assert f"{segment(1, 0)}: damaged LZ4 frame" in err
    assert os.listdir(tmp_path) == ["replica"]


def test_nothing_stored_is_an_error_unless_it_may_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none/generations" / GENERATION).mkdir(parents=True)
    for flags in ([], ["-generation", GENERATION]):
        assert run(capsys, "restore", "-o", tmp_path / "out.db", *flags, tmp_path / "none")[0] == 1
        assert run(capsys, "restore", "-if-replica-exists", "-o", tmp_path / "out.db", *flags, tmp_path / "none")[0] == 0


def test_listings_have_the_columns_of_0_3_13(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "snapshots", f"file://{source}")
    size = len(OBJECTS[next(iter(OBJECTS))])
    assert code == 0
    assert out.splitlines() == [
        "replica  generation        index  size  created",
        f"file     {GENERATION}  0      {size:<4}  2023-11-14T22:13:20Z",
    ]
    code, out, _ = run(capsys, "wal", "-generation", GENERATION, source)
    assert [line.split()[2:4] + line.split()[5:] for line in out.splitlines()] == [
        ["index", "offset", "created"],
        ["0", "0", "2023-11-14T22:13:21Z"],
        ["0", str(SECOND_OFFSET), "2023-11-14T22:13:22Z"],
        ["1", "0", "2023-11-14T22:13:23Z"],
    ]
    code, out, _ = run(capsys, "generations", source)
    assert out.split()[:5] == ["name", "generation", "lag", "start", "end"]
    assert out.split()[8:] == ["2023-11-14T22:13:20Z", "2023-11-14T22:13:23Z"]
    assert run(capsys, "wal", "-generation", "f" * 16, source)[:2] == (0, "replica  generation  index  offset  size  created\n")


def test_a_database_of_the_configuration_is_compared_with_its_own_time(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database, config = tmp_path / "app.db", tmp_path / "c.yml"
    database.write_bytes(b"")
    os.utime(database, (START_S, START_S + 5))
    other = {"path": str(tmp_path / "none"), "name": "second"}
    config.write_text(json.dumps({"dbs": [{"path": str(database), "replicas": [{"path": str(source)}, other]}]}))
    code, out, _ = run(capsys, "generations", "-config", config, database)
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["file", GENERATION, "2s"]]
    assert run(capsys, "generations", "-config", config, "-replica", "second", database)[1].count("\n") == 1
    code, _, err = run(capsys, "generations", "-config", config, "-replica", "third", database)
    assert code == 1
    assert "replica 'third' not found" in err
    database.unlink()
    code, _, err = run(capsys, "generations", "-config", config, database)
    assert (code, "no such file" in err) == (1, True)


@pytest.mark.parametrize("command", ["generations", "snapshots", "wal"])
def test_listings_refuse_what_they_cannot_do(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, command)[0] == 2
    assert run(capsys, command, "-nope", tmp_path)[0] == 2
    assert run(capsys, command, "-config", tmp_path / "c.yml", f"file://{tmp_path}")[0] == 1
    assert run(capsys, command, f"ftp://host/{tmp_path.name}")[0] == 1
    code, out, _ = run(capsys, command, tmp_path)
    assert (code, out.count("\n")) == (0, 1)


def test_convert_prints_what_it_made_and_refuses_a_second_time(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert", "-json", source, tmp_path / "ltx")
    document = json.loads(out)
    assert code == 0
    assert (document["txid"], document["snapshots"], document["files"]) == ("0000000000000004", 1, 5)
    assert (document["oldest"], document["newest"]) == ("2023-11-14T22:13:20Z", "2023-11-14T22:13:23Z")
    code, _, err = run(capsys, "convert", source, tmp_path / "ltx")
    assert code == 1
    assert "destination is not empty" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give the URL"),
        (["{source}"], 2, "give the URL"),
        (["-generation", "x", "{source}", "{target}"], 2, "invalid value for -generation"),
        (["-generation", "f" * 16, "{source}", "{target}"], 1, "no matching backup files available"),
        (["file://{target}", "{target}2"], 1, "no matching backup files available"),
        (["-parallelism", "0", "{source}", "{target}"], 2, "invalid value for -parallelism"),
    ],
)
def test_convert_refuses(
    arguments: list[str], code: int, words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled_in = [item.format(source=source, target=tmp_path / "ltx") for item in arguments]
    got, _, err = run(capsys, "convert", *filled_in)
    assert (got, words in err) == (code, True), err
    assert not (tmp_path / "ltx").exists()


def encrypted(folder: Path, *, keys: list[str], **more: object) -> tuple[Path, Path]:
    """A database of a configuration with an encrypted replica; returns both their paths."""
    identity = pyrage.x25519.Identity.generate()
    age = {"identities": str(identity), "recipients": str(identity.to_public())}
    client = open_client(f"file://{folder}/encrypted", age_recipients=[age["recipients"]])
    assert isinstance(client, ObjectStore)
    for name, data in OBJECTS.items():
        client.put_object(name, data)
    config, database = folder / "c.yml", folder / "app.db"
    entry = {"path": str(folder / "encrypted"), "age": {key: [age[key]] for key in keys}}
    config.write_text(json.dumps({"dbs": [{"path": str(database), "replicas": [entry, *more.values()]}]}))
    return config, database


def test_an_encrypted_replica_is_converted_with_the_keys_of_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, database = encrypted(tmp_path, keys=["identities", "recipients"])
    code, out, _ = run(capsys, "convert", "-json", "-config", config, database, tmp_path / "ltx")
    assert (code, json.loads(out)["destination"]) == (0, f"age+file://{tmp_path}/ltx")
    stored = list((tmp_path / "ltx/age").rglob("*.age"))
    assert len(stored) == 5
    assert all(path.read_bytes().startswith(b"age-encryption.org/") for path in stored)
    text = config.read_text().replace(f"{tmp_path}/encrypted", f"{tmp_path}/ltx")
    config.write_text(text)
    assert run(capsys, "restore", "-config", config, "-o", tmp_path / "out.db", database)[0] == 0
    assert (tmp_path / "out.db").read_bytes() == apply(apply(DATABASE, FIRST), SECOND)


def test_plain_text_is_made_of_an_encrypted_replica_when_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, database = encrypted(tmp_path, keys=["identities"], second={"path": str(tmp_path / "none"), "name": "second"})
    for flags, words in (
        ([], "choose with -replica: file, second"),
        (["-replica", "third"], "replica 'third' not found"),
        (["-replica", "file"], "no keys to encrypt the destination to"),
    ):
        code, _, err = run(capsys, "convert", *flags, "-config", config, database, tmp_path / "ltx")
        assert (code, words in err) == (1, True), err
        assert "AGE-SECRET" not in err
        assert not (tmp_path / "ltx").exists()
    flags = ["-replica", "file", "-plaintext"]
    assert run(capsys, "convert", *flags, "-config", config, database, tmp_path / "ltx")[0] == 0
    assert run(capsys, "restore", "-o", tmp_path / "out.db", tmp_path / "ltx")[0] == 0
    assert (tmp_path / "out.db").read_bytes() == apply(apply(DATABASE, FIRST), SECOND)


def test_convert_goes_into_the_same_path(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", source, source)[0] == 0
    for flags in ([], ["-timestamp", "2023-11-14T22:13:22Z"]):
        for output in ("both.db", "old.db"):
            more = ["-generation", GENERATION] if output == "old.db" else []
            assert run(capsys, "restore", "-force", "-o", tmp_path / output, *flags, *more, source)[0] == 0
        assert (tmp_path / "both.db").read_bytes() == (tmp_path / "old.db").read_bytes()


def test_a_segment_without_a_commit_makes_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = replica(DATABASE, [wal([*FIRST, ({4: 1}, 0)], salt=1)], [[32 + 3 * FRAME]])
    code, out, _ = run(capsys, "convert", "-json", filled(tmp_path / "replica", objects), tmp_path / "ltx")
    assert (code, json.loads(out)["txid"]) == (0, "0000000000000002")


@pytest.mark.parametrize(
    ("lag_ns", "text"),
    [
        (0, "0s"),
        (999, "999ns"),
        (1500, "1µs"),
        (216_999_999, "216ms"),
        (1_290_000_000, "1.2s"),
        (59_999_999_999, "59s"),
        (254_000_000_000, "4m14s"),
        (3_600_000_000_000, "1h0m0s"),
        (2**63 - 1, "2562047h47m16s"),
        (-1_500_000_000, "-1.5s"),
        (-1_000_001, "-1.000001ms"),
    ],
)
def test_lags_are_cut_as_0_3_13_cuts_them(lag_ns: int, text: str) -> None:
    assert lag_text(lag_ns) == text


def test_an_encrypted_file_without_a_key_is_not_called_corrupt(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = segment(0, 0)
    (source / name).write_bytes(b"age-encryption.org/v1\n-> X25519 x\n")
    code, _, err = run(capsys, "restore", "-o", tmp_path / "out.db", source)
    assert code == 1
    assert "no key fits the encrypted file" in err
    assert "corrupt" not in err
    (source / name).write_bytes(encode_frame(b"x"))
