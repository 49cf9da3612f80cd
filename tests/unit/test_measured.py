from __future__ import annotations

import pytest

from replicator.errors import ObjectNotFound, StorageUnavailable
from replicator.format.ltx import TXID
from replicator.storage.base import Comparing, ReplicaClient
from replicator.storage.measured import Operations, measured
from replicator.storage.memory import MemoryClient
from tests.e2e.databases import Flaky


def test_operations_are_counted_by_kind_with_bytes_and_errors() -> None:
    operations, inner = Operations(), Flaky()
    client = measured(inner, operations)
    assert isinstance(client, ReplicaClient)
    assert client.url == inner.url
    client.put_control("pyrepl/x", b"12345")
    assert client.get_control("pyrepl/x").data == b"12345"
    with pytest.raises(ObjectNotFound):  # an answer, and no error
        client.get_control("pyrepl/y")
    info = client.put(0, TXID(1), TXID(1), b"x" * 7, timestamp_ms=1)
    with client.open(info, offset=3) as stream:
        assert stream.read() == b"x" * 4
    assert list(client.list(0)) == [info]
    inner.down = True
    with pytest.raises(StorageUnavailable):
        client.list(0)
    kinds = operations.kinds()
    assert {kind: (item.count, item.size_bytes, item.errors) for (_, kind), item in kinds.items()} == {
        "PUT": (2, 12, {}),
        "GET": (3, 9, {}),
        "LIST": (2, 0, {"StorageUnavailable": 1}),
    }
    assert all(sum(item.slots) == item.count for item in kinds.values())


def test_a_client_that_compares_still_does() -> None:
    class Comparer(MemoryClient):
        def holds(self, info: object, body: object) -> bool:
            return True

    assert isinstance(measured(Comparer(), Operations()), Comparing)
    assert not isinstance(measured(MemoryClient(), Operations()), Comparing)
