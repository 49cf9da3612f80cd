"""0.3 histories: any cut of a WAL restores to the same bytes, and whatever happens to one segment is refused by name or harmless."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from replicator.convert import convert
from replicator.errors import CorruptReplica, MissingSegment
from replicator.format.v3 import encode_frame
from replicator.restorer import write_plan
from replicator.storage.memory import MemoryClient
from replicator.storage.v3 import V3Client
from replicator.v3plan import V3Plan, plan_v3
from replicator.v3restore import find_any_plan, list_generations, write_v3
from tests.v3data import PAGE, Transaction, apply, page, replica, segment, store, wal

FRAME = PAGE + 24

transactions = st.tuples(st.dictionaries(st.integers(1, 12), st.integers(0, 2000), min_size=1, max_size=5), st.integers(1, 12))
wal_files = st.lists(st.lists(transactions, min_size=1, max_size=6), min_size=1, max_size=3)
fractions = st.lists(st.lists(st.floats(0, 1), max_size=6), min_size=3, max_size=3)
DATABASE = b"".join(page(pgno, 9000 + pgno) for pgno in range(1, 7))


def restored(client: MemoryClient, *, index: int | None = None) -> bytes:
    v3 = V3Client(client)
    with tempfile.TemporaryFile() as file:
        write_v3(v3, plan_v3("memory://", list_generations(v3), index=index), file.fileno(), folder=Path(tempfile.gettempdir()))
        return os.pread(file.fileno(), 1 << 20, 0)


def built(history: list[list[Transaction]], cuts: list[list[float]], *, aligned: bool) -> tuple[dict[str, bytes], list[bytes]]:
    """The objects, and the state after each index."""
    wals = [wal(item, salt=number, big_endian=bool(number % 2)) for number, item in enumerate(history, 1)]
    places = []
    for data, at in zip(wals, cuts, strict=False):
        offsets = [int(part * len(data)) for part in at]
        places.append([max(0, offset - 32) // FRAME * FRAME + 32 for offset in offsets] if aligned else offsets)
    states = [DATABASE]
    for item in history:
        states.append(apply(states[-1], item))
    return replica(DATABASE, wals, places), states


@given(wal_files, fractions, st.booleans())
def test_any_cut_restores_to_the_same_bytes(history: list[list[Transaction]], cuts: list[list[float]], aligned: bool) -> None:
    objects, states = built(history, cuts, aligned=aligned)
    assert restored(store(objects)) == states[-1]
    for index, state in enumerate(states[1:]):
        assert restored(store(objects), index=index) == state


@given(st.lists(transactions, min_size=1, max_size=6), st.data())
def test_what_is_not_committed_is_not_restored(history: list[Transaction], data: st.DataObject) -> None:
    tail = data.draw(st.dictionaries(st.integers(1, 12), st.integers(0, 2000), min_size=1, max_size=5))
    whole = wal([*history, (tail, 0)], salt=1)
    cut = data.draw(st.integers(0, len(whole) // FRAME)) * FRAME + 32
    assert restored(store(replica(DATABASE, [whole], [[cut]]))) == apply(DATABASE, history)


@given(wal_files, fractions, st.data())
def test_damage_to_one_segment_is_refused_by_name_or_gives_right_bytes(
    history: list[list[Transaction]], cuts: list[list[float]], data: st.DataObject
) -> None:
    objects, states = built(history, cuts, aligned=True)
    names = [name for name in objects if "/wal/" in name]
    name = data.draw(st.sampled_from(names))
    index, offset = (int(part, 16) for part in name.rpartition("/")[2].removesuffix(".wal.lz4").split("_"))
    is_last = name == max(item for item in names if f"/{index:08x}_" in item)
    what = data.draw(st.sampled_from(["remove", "cut", "shorten", "flip", "copy", "rename"]))
    # The one thing that nothing in the format shows: see test_what_cannot_be_seen.
    assume(not (is_last and index < len(history) - 1 and what in ("remove", "shorten", "rename")))
    stored, suspects = objects[name], {name}
    match what:
        case "remove":
            del objects[name]
        case "cut":
            objects[name] = stored[: data.draw(st.integers(0, len(stored) - 1))]
        case "shorten":  # a whole frame of LZ4 that holds less
            content = b"".join(_content(stored))
            keep = data.draw(st.integers(0, len(content) - 1))
            objects[name] = encode_frame(content[:keep])
            suspects.add(segment(index, offset + keep))
        case "flip":
            at = data.draw(st.integers(0, len(stored) - 1))
            objects[name] = stored[:at] + bytes([stored[at] ^ 1 << data.draw(st.integers(0, 7))]) + stored[at + 1 :]
        case "copy" | "rename":
            place = data.draw(st.tuples(st.integers(0, len(history)), st.integers(0, 8).map(lambda n: n and (n - 1) * FRAME + 32)))
            other = segment(*place)
            assume(other not in objects)
            objects[other] = stored
            suspects.add(other)
            if what == "rename":
                del objects[name]
    outcome = outcome_of(objects)
    if isinstance(outcome, str):
        # What is named is the segment itself, one that misses it as its neighbour, or the beginning of the index that has lost it.
        assert what in ("copy", "rename") or outcome in suspects or outcome.startswith(segment(index, 0)[:-17])
        return
    prefixes = [apply(state, item[:count]) for state, item in zip(states, history, strict=False) for count in range(len(item) + 1)]
    assert outcome in prefixes
    if what in ("flip", "cut", "copy"):
        assert outcome == states[-1]


def outcome_of(objects: dict[str, bytes]) -> bytes | str:
    """The bytes that are restored, or the name of the segment that is refused."""
    try:
        return restored(store(objects))
    except (CorruptReplica, MissingSegment) as error:
        return error.name.removeprefix("memory:// ")


def _content(stored: bytes) -> list[bytes]:
    from replicator.format.v3 import FrameDecoder

    return [*FrameDecoder().feed(stored)]


@settings(max_examples=20)
@given(wal_files, fractions)
def test_converted_history_restores_every_moment(history: list[list[Transaction]], cuts: list[list[float]]) -> None:
    objects, _ = built(history, cuts, aligned=True)
    source, target = store(objects), MemoryClient()
    convert(source, target)
    v3 = V3Client(source)
    [generation] = list_generations(v3)
    for time_ns in sorted({info.created_ns + more for info in generation.files for more in (0, 10**6, -(10**6))}):
        if generation.snapshots[0].created_ns <= time_ns <= generation.newest_ns:
            assert restored_at(source, time_ns) == restored_at(target, time_ns)


def restored_at(client: MemoryClient, time_ns: int) -> bytes:
    """What a restore of that time writes."""
    plan, folder = find_any_plan(client, timestamp_ns=time_ns), Path(tempfile.gettempdir())
    with tempfile.TemporaryFile() as file:
        if isinstance(plan, V3Plan):
            write_v3(V3Client(client), plan, file.fileno(), folder=folder)
        else:
            write_plan(client, plan, file.fileno(), folder, started=0.0, parallelism=2, progress=None)
        return os.pread(file.fileno(), 1 << 20, 0)
