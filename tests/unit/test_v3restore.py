from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

import replicator
from replicator.chain import Progress
from replicator.convert import NOTE, convert
from replicator.errors import (
    ConfigError,
    CorruptReplica,
    GenerationNotAvailable,
    IntegrityCheckFailed,
    MissingSegment,
    NoBackups,
    ObjectNotFound,
    OutputExists,
    ReplicaStateError,
    StorageUnavailable,
)
from replicator.format.v3 import SegmentInfo, encode_frame, snapshot_name, snapshots_folder, time_of
from replicator.recover import parse_timestamp
from replicator.replay import Replay
from replicator.restores import planned_generations
from replicator.storage.base import ReadStream
from replicator.storage.memory import MemoryClient
from replicator.v3restore import restore_any
from tests.v3data import GENERATION, PAGE, Clock, Transaction, apply, page, replica, segment, store, wal

FRAME = PAGE + 24
DATABASE = b"".join(page(pgno, 9000 + pgno) for pgno in range(1, 5))
FIRST: list[Transaction] = [({2: 1, 3: 1}, 4), ({5: 2}, 5), ({2: 3}, 5)]
SECOND: list[Transaction] = [({4: 4}, 5), ({1: 5, 6: 5}, 6)]
WALS = [wal(FIRST, salt=1), wal(SECOND, salt=2)]
CUTS = [[32 + 2 * FRAME], [32 + FRAME]]
OBJECTS = replica(DATABASE, WALS, CUTS)
LATEST = apply(apply(DATABASE, FIRST), SECOND)


def test_the_newest_state_is_restored(tmp_path: Path) -> None:
    result = replicator.restore(store(OBJECTS), tmp_path / "out.db")
    assert (tmp_path / "out.db").read_bytes() == LATEST
    assert (result.generation, result.index, result.txid, result.files) == (GENERATION, 1, 0, 5)
    assert (result.page_size, result.commit) == (PAGE, len(LATEST) // PAGE)
    assert (tmp_path / "out.db").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["out.db"]


@pytest.mark.fault("F18")
def test_mode_and_side_files_are_those_of_every_restore(tmp_path: Path) -> None:
    output = tmp_path / "out.db"
    output.write_bytes(b"old")
    output.chmod(0o640)
    (tmp_path / "out.db-wal").write_bytes(b"old")
    with pytest.raises(OutputExists):
        replicator.restore(store(OBJECTS), output)
    replicator.restore(store(OBJECTS), output, force=True)
    assert output.read_bytes() == LATEST
    assert output.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["out.db"]


def test_the_integrity_check_comes_before_the_name(tmp_path: Path) -> None:
    with pytest.raises(IntegrityCheckFailed):  # the pages are not those of a database
        replicator.restore(store(OBJECTS), tmp_path / "out.db", integrity_check="quick")
    assert os.listdir(tmp_path) == []


@pytest.mark.fault("F64")
@pytest.mark.parametrize("place", [(0, 0), (0, 32 + 2 * FRAME), (1, 0)])
def test_a_missing_segment_is_named_and_nothing_is_left(place: tuple[int, int], tmp_path: Path) -> None:
    name = segment(*place)
    objects = replica(DATABASE, WALS, [[32 + 2 * FRAME, 32 + 3 * FRAME], [32 + FRAME]])
    del objects[name]
    with pytest.raises(MissingSegment, match=name):
        replicator.restore(store(objects), tmp_path / "out.db")
    assert os.listdir(tmp_path) == []


def test_without_the_last_segment_it_is_an_earlier_moment(tmp_path: Path) -> None:
    objects = {key: value for key, value in OBJECTS.items() if key != segment(1, 32 + FRAME)}
    replicator.restore(store(objects), tmp_path / "out.db")
    assert (tmp_path / "out.db").read_bytes() == apply(apply(DATABASE, FIRST), SECOND[:1])


def test_what_cannot_be_seen(tmp_path: Path) -> None:
    """The end of an index is marked by nothing. When its last segments are gone, whole transactions are missing, and nothing tells."""
    objects = {key: value for key, value in OBJECTS.items() if key != segment(0, 32 + 2 * FRAME)}
    replicator.restore(store(objects), tmp_path / "out.db")
    assert (tmp_path / "out.db").read_bytes() == apply(apply(DATABASE, FIRST[:1]), SECOND)


def test_an_index_that_ends_inside_a_transaction_has_lost_its_end(tmp_path: Path) -> None:
    objects = replica(DATABASE, WALS, [[32 + FRAME], []])
    del objects[segment(0, 32 + FRAME)]
    with pytest.raises(MissingSegment, match="00000000_00000238"):
        replicator.restore(store(objects), tmp_path / "out.db")


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        (segment(0, 0), WALS[0][:31] + b"\0" + WALS[0][32 : 32 + 2 * FRAME], "WAL header checksum"),
        (segment(0, 0), WALS[0][: 32 + FRAME + 8] + b"\0\0\0\7" + WALS[0][32 + FRAME + 12 : 32 + 2 * FRAME], "salts of another WAL"),
        (segment(0, 32 + 2 * FRAME), WALS[0][32 + 2 * FRAME : -1] + b"!", "chain of checksums"),
        (segment(0, 32 + 2 * FRAME), WALS[1][32 + FRAME :], "salts of another WAL"),
        (segment(1, 0), WALS[0], "of an earlier index again"),
        (segment(1, 0), b"", "it holds nothing"),
    ],
)
def test_a_damaged_segment_is_named_with_the_reason(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptReplica, match=why) as caught:
        replicator.restore(store({**OBJECTS, name: encode_frame(data)}), tmp_path / "out.db")
    assert caught.value.name.endswith(name)
    assert os.listdir(tmp_path) == []


def test_overlapping_segments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptReplica, match="begins inside the segment before it"):
        replicator.restore(store({**OBJECTS, segment(0, 32 + FRAME): encode_frame(WALS[0][32 + FRAME :])}), tmp_path / "out.db")


@pytest.mark.parametrize("data", [b"no database" * 100, DATABASE[:-1], DATABASE[:50]])
def test_a_snapshot_that_is_no_database_is_refused(data: bytes, tmp_path: Path) -> None:
    [name] = [name for name in OBJECTS if "/snapshots/" in name]
    with pytest.raises(CorruptReplica, match=name):
        replicator.restore(store({**OBJECTS, name: encode_frame(data)}), tmp_path / "out.db")


def test_a_database_that_is_all_in_its_wal_is_restored(tmp_path: Path) -> None:
    replicator.restore(store(replica(b"", [wal([({1: 1, 2: 1}, 2)], salt=1)], [[]])), tmp_path / "out.db")
    assert (tmp_path / "out.db").read_bytes() == page(1, 1) + page(2, 1)
    with pytest.raises(CorruptReplica, match="no committed state"):
        replicator.restore(store(replica(b"", [], [])), tmp_path / "none.db")


def test_a_page_that_was_cut_off_and_is_inside_again_has_its_old_image(tmp_path: Path) -> None:
    history: list[Transaction] = [({4: 7}, 4), ({2: 1}, 2), ({1: 2}, 4)]
    replicator.restore(store(replica(DATABASE, [wal(history, salt=1)], [[32 + FRAME, 32 + 2 * FRAME]])), tmp_path / "out.db")
    assert (tmp_path / "out.db").read_bytes() == apply(DATABASE, history)
    assert (tmp_path / "out.db").read_bytes()[3 * PAGE :] == page(4, 7)


@pytest.mark.fault("F64")
def test_offsets_beyond_four_gibibytes_join() -> None:
    far = SegmentInfo(GENERATION, 0, 1 << 32, 10, 0)
    with tempfile.TemporaryFile() as file, Replay(file.fileno(), "x", folder=Path(tempfile.gettempdir())) as replay:
        replay.segment(SegmentInfo(GENERATION, 0, 0, 10, 0), [encode_frame(WALS[0][: 32 + 2 * FRAME])])
        assert replay._wal is not None
        replay._wal.offset = far.offset  # as if four gibibytes had come
        replay.segment(far, [encode_frame(WALS[0][32 + 2 * FRAME :])])
        with pytest.raises(MissingSegment, match=f"00000000_{(1 << 32) + 2 * FRAME:x}"):
            replay.segment(SegmentInfo(GENERATION, 0, 1 << 33, 10, 0), [encode_frame(b"x")])


def test_a_transaction_that_is_too_large_for_memory_waits_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.replay.WAITING_BYTES", 4 * FRAME)
    history: list[Transaction] = [({pgno: pgno for pgno in range(1, 300)}, 299)]
    replicator.restore(store(replica(DATABASE, [wal(history, salt=1)], [[32 + at * FRAME for at in range(0, 299, 7)]])), tmp_path / "o.db")
    assert (tmp_path / "o.db").read_bytes() == apply(DATABASE, history)
    assert os.listdir(tmp_path) == ["o.db"]


class Flaky(MemoryClient):
    """Opens fail, or streams break after some bytes, as often as they are told to."""

    def __init__(self, objects: dict[str, bytes], failures: int) -> None:
        super().__init__(clock_ns=Clock())
        self.failures = failures
        for name, data in objects.items():
            self.put_object(name, data)

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        stream = super().open_object(name, offset=offset)
        if self.failures:
            self.failures -= 1

            def read(size: int = -1, /, *, calls: list[int] = []) -> bytes:  # noqa: B006  one for each stream
                calls.append(size)
                if len(calls) > 1:
                    raise StorageUnavailable("connection lost")
                return stream.__class__.read(stream, 10)

            class Broken:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None: ...

            broken: Any = Broken()
            broken.read = read
            return broken  # type: ignore[no-any-return]
        return stream


def test_a_dropped_connection_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.v3restore.RETRY_DELAYS_S", (0, 0, 0))
    replicator.restore(Flaky(OBJECTS, 3), tmp_path / "out.db", parallelism=1)
    assert (tmp_path / "out.db").read_bytes() == LATEST
    with pytest.raises(StorageUnavailable):
        replicator.restore(Flaky(OBJECTS, 1000), tmp_path / "other.db", parallelism=1)
    assert os.listdir(tmp_path) == ["out.db"]


def test_an_object_that_vanishes_leads_to_a_new_plan(tmp_path: Path) -> None:
    later = replica(apply(DATABASE, FIRST), [WALS[1]], [[]], first=1)
    seen: list[dict[str, int]] = []

    class Retention(MemoryClient):
        def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
            if not seen:
                seen.append(planned_generations(self.url, folder=tmp_path / "notes"))
                for key in OBJECTS:
                    self.delete_objects([key])
                for key, data in later.items():
                    self.put_object(key, data)
            return super().open_object(name, offset=offset)

    client = Retention(clock_ns=Clock())
    for name, data in OBJECTS.items():
        client.put_object(name, data)
    result = restore_any(client, tmp_path / "out.db", parallelism=1, restores_folder=tmp_path / "notes")
    assert (tmp_path / "out.db").read_bytes() == LATEST
    assert (result.files, seen) == (2, [{GENERATION: 0}])
    assert planned_generations(client.url, folder=tmp_path / "notes") == {}


def test_an_object_that_stays_away_is_an_error(tmp_path: Path) -> None:
    class Lying(MemoryClient):
        def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
            raise ObjectNotFound(name)

    client = Lying(clock_ns=Clock())
    client.put_object(next(iter(OBJECTS)), b"x")
    with pytest.raises(ObjectNotFound):
        replicator.restore(client, tmp_path / "out.db")


def test_progress_counts_files_and_bytes(tmp_path: Path) -> None:
    seen: list[Progress] = []
    replicator.restore(store(OBJECTS), tmp_path / "out.db", progress=seen.append)
    total = sum(map(len, OBJECTS.values()))
    assert seen[-1] == Progress(5, 5, total, total)
    assert [item.bytes_done for item in seen] == sorted(item.bytes_done for item in seen)


def test_selectors_exclude_each_other(tmp_path: Path) -> None:
    client = store(OBJECTS)
    for select in ({"index": 1, "timestamp": "2024-01-01T00:00:00Z"}, {"txid": 1, "generation": GENERATION}, {"txid": 1, "index": 0}):
        with pytest.raises(ConfigError, match="cannot specify"):
            replicator.restore(client, tmp_path / "out.db", **select)
    with pytest.raises(GenerationNotAvailable):
        replicator.restore(client, tmp_path / "out.db", generation="f" * 16)
    replicator.restore(client, tmp_path / "out.db", generation=GENERATION, index="0")
    assert (tmp_path / "out.db").read_bytes() == apply(DATABASE, FIRST)


def test_times_are_read_to_the_nanosecond() -> None:
    assert parse_timestamp("1970-01-01T00:00:01.607343262Z") == 1_607_343_262
    assert parse_timestamp("1970-01-01T01:00:01.6+01:00") == 1_600_000_000
    for text in ("1970-01-01T00:00:01", "yesterday"):
        with pytest.raises(ConfigError):
            parse_timestamp(text)


# -- convert -------------------------------------------------------------------------------------------------------------------------


def test_a_conversion_that_was_stopped_is_taken_up_again() -> None:
    whole = MemoryClient()
    convert(store(OBJECTS), whole)
    files = {info.name: level for level in range(10) for info in whole.list(level)}

    class Dying(MemoryClient):
        left = 0

        def put(self, *arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise StorageUnavailable("killed")
            return super().put(*arguments, **options)

    target = Dying()
    for left in range(len(files) + 1):
        target.left = left + sum(1 for level in range(10) for _ in target.list(level))
        try:
            convert(store(OBJECTS), target)
            break
        except StorageUnavailable:
            assert json.loads(target.get_control(NOTE).data)["source"] == "memory://"
    assert {info.name: level for level in range(10) for info in target.list(level)} == files
    for level in range(10):
        for info in whole.list(level):
            with whole.open(info) as mine, target.open(info) as theirs:
                assert mine.read() == theirs.read()
    with pytest.raises(ObjectNotFound):
        target.get_control(NOTE)
    with pytest.raises(ReplicaStateError, match="destination is not empty"):
        convert(store(OBJECTS), target)


def test_a_second_snapshot_of_the_same_state_adds_no_file(tmp_path: Path) -> None:
    """As at the start of 0.3.13 with a database that nobody writes to: its name, by the same TXID, is there already."""
    folder, state = snapshots_folder(GENERATION), apply(apply(DATABASE, FIRST), SECOND)
    objects = {**OBJECTS, **{f"{folder}/{snapshot_name(number)}": encode_frame(state) for number in (2, 3)}}
    target = MemoryClient()
    made = convert(store(objects), target)
    assert [(info.min_txid, info.max_txid) for info in target.list(9)] == [(1, 1), (1, made.txid)]
    for moment in (None, made.newest.isoformat()):
        replicator.restore(target, tmp_path / "out.db", timestamp=moment, force=True)
        assert (tmp_path / "out.db").read_bytes() == state


def test_a_destination_of_another_conversion_is_refused() -> None:
    target = MemoryClient()
    target.put_control(NOTE, json.dumps({"source": "file:///other", "generation": ""}).encode())
    with pytest.raises(ReplicaStateError, match="another conversion"):
        convert(store(OBJECTS), target)


def test_a_damaged_source_has_no_end_in_the_destination(tmp_path: Path) -> None:
    target = MemoryClient()
    broken = {**OBJECTS, segment(1, 0): encode_frame(b"x" * 100)}
    with pytest.raises(CorruptReplica, match="00000001_00000000"):
        convert(store(broken), target)
    assert target.get_control(NOTE)
    assert [*target.list(1)] == []
    with pytest.raises(NoBackups):
        convert(MemoryClient(), MemoryClient())


def test_times_are_kept_to_the_millisecond(tmp_path: Path) -> None:
    clock = Clock(1_700_000_000 * 10**9 + 123)
    target = MemoryClient()
    made = convert(store(OBJECTS, clock), target)
    assert made.newest == time_of(clock.now_ns)
    times = [info.created_at.timestamp() for info in target.list(0)]
    assert times == [1_700_000_002.0, 1_700_000_003.0, 1_700_000_004.0, 1_700_000_005.0]
    assert [info.created_at.timestamp() for info in target.list(1)] == [1_700_000_005.001]
