"""Our S3 client, and whole runs, through a proxy that does what networks and stores do on bad days; the server behind it is a real one."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator import Replicator
from replicator.errors import CorruptReplica, PreconditionFailed, ReplicatorError, StorageError, StorageUnavailable, Truncated
from replicator.format.ltx import TXID
from replicator.storage.s3 import S3Client
from replicator.storage.url import parse_s3_url
from replicator.testing import CHECKS, HostileS3, Trouble
from tests.e2e.databases import checkpointed_bytes, connect, insert, restored
from tests.servers import ACCESS, SECRET

TIMEOUT_S = 60
HONEST = {
    Trouble.BUSY: 0.08, Trouble.DROP: 0.05, Trouble.LOST_REPLY: 0.08, Trouble.DELAY: 0.1, Trouble.CUT: 0.05,
    Trouble.DUPLICATE: 0.05, Trouble.LATE: 0.05, Trouble.CONFLICT: 0.05, Trouble.IGNORE_RANGE: 0.2, Trouble.STALE_LIST: 0.1,
}  # fmt: skip


@pytest.fixture
def hostile(seaweed, replicator_seed: int) -> Iterator[HostileS3]:
    with HostileS3(seaweed.endpoint, access_key=ACCESS, secret_key=SECRET, seed=replicator_seed, max_delay_s=0.05) as proxy:
        yield proxy


def client_of(proxy: HostileS3, max_attempts: int = 1, **options: int) -> S3Client:
    url = f"s3://bucket/hostile-{secrets.token_hex(6)}?endpoint={proxy.endpoint}&region=us-east-1&forcePathStyle=true"
    return S3Client(parse_s3_url(url, environ={}), max_attempts=max_attempts, **options)


def put(client: S3Client, body: bytes = b"x" * 1000, **options: bool):
    return client.put(0, TXID(1), TXID(1), body, timestamp_ms=1, **options)


def stored(client: S3Client) -> list[int]:
    return [info.max_txid for info in client.list(0)]


@pytest.mark.fault("F29")
@pytest.mark.parametrize(
    ("trouble", "done"),
    [(Trouble.BUSY, False), (Trouble.DROP, False), (Trouble.LOST_REPLY, True), (Trouble.CONFLICT, False)],
)
def test_a_write_without_an_answer_is_of_unknown_outcome(hostile: HostileS3, trouble: Trouble, done: bool) -> None:
    client = client_of(hostile)
    hostile.trouble_next(trouble, "PUT")
    with pytest.raises(StorageUnavailable):
        put(client, if_absent=True)
    assert stored(client) == ([1] if done else [])
    client.close()


def test_a_condition_that_is_lost_against_ourselves_is_of_unknown_outcome(hostile: HostileS3) -> None:
    client = client_of(hostile, max_attempts=3)
    hostile.trouble_next(Trouble.LOST_REPLY, "PUT")
    with pytest.raises(StorageUnavailable, match="outcome is unknown"):
        put(client, if_absent=True)
    assert stored(client) == [1]
    with pytest.raises(PreconditionFailed):
        put(client, if_absent=True)
    client.close()


def test_a_body_that_is_cut_is_an_error_and_an_ignored_range_is_not(hostile: HostileS3) -> None:
    client = client_of(hostile)
    body = bytes(range(256)) * 40
    info = put(client, body)
    for _ in range(5):
        hostile.trouble_next(Trouble.CUT, "GET")
        with pytest.raises(StorageUnavailable), client.open(info) as stream:
            stream.read()
    hostile.trouble_next(Trouble.IGNORE_RANGE, "GET")
    with client.open(info, offset=1000, size=500) as stream:
        assert stream.read() == body[1000:1500]
    assert hostile.happened[Trouble.IGNORE_RANGE] == 1
    client.close()


def test_the_contract_holds_where_troubles_are_retried(hostile: HostileS3) -> None:
    hostile.troubles = {Trouble.BUSY: 0.1, Trouble.DELAY: 0.2}
    for name in ("listing_is_in_order", "ranges_are_exact", "delete_forgives", "missing_is_not_found"):
        client = client_of(hostile, max_attempts=8)
        CHECKS[name](client)
        client.close()
    assert hostile.happened[Trouble.BUSY] > 0


@pytest.mark.fault("F28", "F29", "F30", "F33")
def test_replication_and_restore_come_through_everything_that_an_honest_store_does(hostile: HostileS3, tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", client_of(hostile, max_attempts=2)
    application = connect(database)
    hostile.troubles = HONEST
    with Replicator(database, client, sync_interval_s=0.01) as replicator:
        for _ in range(12):
            insert(application, 20)
            replicator.wait(timeout_s=TIMEOUT_S)
        expected = checkpointed_bytes(database, tmp_path)
        hostile.troubles = {**HONEST, Trouble.DROP: 0.02, Trouble.CUT: 0.02, Trouble.BUSY: 0.05}
        reader = S3Client(client.settings, max_attempts=6)
        for attempt in range(20):
            try:
                copy = restored(reader, tmp_path)
                break
            except StorageUnavailable:
                assert attempt < 19
        reader.close()
        assert copy.read_bytes() == expected
        assert len(hostile.happened) >= 5
        hostile.troubles = {}
    application.close()


def test_a_flipped_bit_on_the_way_is_never_restored(hostile: HostileS3, tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", client_of(hostile, max_attempts=2)
    application = connect(database)
    with Replicator(database, client, history=None) as replicator:
        for _ in range(3):
            insert(application, 5)
            replicator.wait(timeout_s=TIMEOUT_S)
    good = restored(client_again(client), tmp_path).read_bytes()
    hostile.troubles = {Trouble.CORRUPT: 1.0}
    refused = 0
    for _ in range(8):
        try:
            copy = restored(client_again(client), tmp_path)
        except (CorruptReplica, StorageError, Truncated) as error:
            refused += 1
            message = str(error)
        else:
            assert copy.read_bytes() == good  # a bit of a compressed block that stands for the same page
            continue
        assert "ltx" in message or "s3://" in message
        assert not (tmp_path / "restored.db").exists()
    assert refused >= 6
    application.close()


def client_again(client: S3Client) -> S3Client:
    return S3Client(client.settings, max_attempts=1)


def test_a_refusal_that_is_a_lie_acknowledges_nothing_that_is_not_stored(hostile: HostileS3, tmp_path: Path) -> None:
    database, client = tmp_path / "a.db", client_of(hostile)
    application = connect(database)
    replicator = Replicator(database, client, history=None, sync_interval_s=0.01).start()
    replicator.wait(timeout_s=TIMEOUT_S)
    hostile.trouble_next(Trouble.PRECONDITION, "PUT")
    insert(application, 3)
    told = tells(replicator)
    assert hostile.happened[Trouble.PRECONDITION] == 1
    found = restored(client_again(client), tmp_path).read_bytes()
    assert (found == checkpointed_bytes(database, tmp_path)) or not told
    with contextlib.suppress(ReplicatorError):
        replicator.close()
    application.close()


def tells(replicator: Replicator) -> bool:
    """Say whether everything is acknowledged."""
    try:
        replicator.wait(timeout_s=3)
    except ReplicatorError:
        return False
    return True
