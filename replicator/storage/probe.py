"""Find out whether a store honours conditional writes. Some accept the headers and ignore them."""

from __future__ import annotations

import contextlib
import secrets

from replicator.errors import PreconditionFailed, StorageError
from replicator.storage.base import ReplicaClient

__all__ = ["probe_conditional_writes"]


def probe_conditional_writes(client: ReplicaClient) -> bool:
    """Return True when create-if-absent and replace-if-match both refuse what they must. Four small requests on an object of its own."""
    name = f"pyrepl/probe-{secrets.token_hex(8)}"
    client.put_control(name, b"1", if_absent=True)
    try:
        for condition in ({"if_absent": True}, {"if_match": '"0123456789abcdef0123456789abcdef"'}):
            try:
                client.put_control(name, b"2", **condition)  # type: ignore[arg-type]
            except PreconditionFailed:
                continue
            return False
        return True
    finally:
        with contextlib.suppress(StorageError):
            client.delete_control(name)
