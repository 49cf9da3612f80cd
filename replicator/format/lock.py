"""`lock.json`, the lease object, and the writer's number in the headers of files.

The object is Litestream's, with a mapping of ours beside its three keys, which Litestream ignores:

    {"generation": 7, "expires_at": "2026-11-24T10:00:30.5Z", "owner": "host:123",
     "pyrepl": {"instance": "9f...", "serial": 41, "ttl_ms": 30000, "released": false, "wanted_by": "host:456"}}

`generation` is the fencing token: each new owner writes a higher one. `instance` and `serial` make each written object unlike every other one, so that
its bytes say who wrote it, and an unchanged object means that nobody did. `expires_at` is a hint, for people and for Litestream.
`wanted_by` is the one thing that somebody else may write: it asks the owner to hand over. The rest stays as the owner wrote it.

Writer's number (node id of an LTX header): the low 23 bits of the fencing token, then 40 random bits that are never all zero. Without a lease the token
is 0; Litestream writes a node id of 0.

Source: specification 8.4 (keys, meaning).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from replicator.errors import FormatError

__all__ = ["LITESTREAM_TTL_S", "MAX_TTL_S", "LockRecord", "decode_lock", "token_of", "writer_number"]

LITESTREAM_TTL_S = 30.0
MAX_TTL_S = 3600.0
"""What a record may ask for at most: nobody waits longer, whatever it says."""

MAX_GENERATION = 1 << 62
TOKEN_BITS, RANDOM_BITS = 23, 40
_INSTANCE = re.compile(r"[0-9a-f]{16}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class LockRecord:
    """What a lease object says. `expires_at` in seconds since 1970, on its owner's clock; `instance` is empty for one of Litestream's.

    `wanted_by`: who asks for a hand-over; empty when nobody does.
    """

    generation: int
    expires_at: float
    owner: str
    instance: str = ""
    serial: int = 0
    ttl_s: float = LITESTREAM_TTL_S
    released: bool = False
    wanted_by: str = ""

    def is_same_write(self, other: LockRecord) -> bool:
        """Say whether both are one write of the owner's, whoever asks for a hand-over in them."""
        return bool(self.instance) and (self.instance, self.serial) == (other.instance, other.serial)

    @property
    def expires(self) -> datetime:
        """`expires_at` as an aware datetime."""
        return _EPOCH + timedelta(seconds=self.expires_at)

    def encode(self) -> bytes:
        """Return the object's bytes."""
        own = {"instance": self.instance, "serial": self.serial, "ttl_ms": round(self.ttl_s * 1000), "released": self.released}
        if self.wanted_by:
            own["wanted_by"] = self.wanted_by
        when = self.expires.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return json.dumps({"generation": self.generation, "expires_at": when, "owner": self.owner, "pyrepl": own}).encode() + b"\n"


def decode_lock(data: bytes) -> LockRecord:
    """Read a lease object. It comes from outside: what is too long or not printable in the owner's name is left out.

    Raises:
        FormatError: it is none.
    """
    try:
        fields = json.loads(data)
        generation, owner, when = fields["generation"], fields["owner"], fields["expires_at"]
        own = fields.get("pyrepl", {})
        instance, serial = own.get("instance", ""), own.get("serial", 0)
        ttl_ms, released = own.get("ttl_ms", LITESTREAM_TTL_S * 1000), own.get("released", False)
        wanted_by = own.get("wanted_by", "")
        if not (_is_number(generation) and 0 <= generation < MAX_GENERATION and isinstance(owner, str)):
            raise FormatError("generation or owner")
        if not (_is_number(serial) and (instance == "" or _INSTANCE.fullmatch(instance)) and isinstance(released, bool)):
            raise FormatError("instance, serial or released")
        if not isinstance(wanted_by, str):
            raise FormatError("wanted_by")
        if not isinstance(ttl_ms, int | float) or isinstance(ttl_ms, bool) or not 0 <= ttl_ms < 1e12:
            raise FormatError("ttl_ms")
        expires_at = _seconds(when)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError) as error:
        raise FormatError(f"not a lease object: {error}") from None
    return LockRecord(
        generation, expires_at, _printable(owner), instance, serial, min(ttl_ms / 1000, MAX_TTL_S), released, _printable(wanted_by)
    )


def _printable(name: str) -> str:
    return "".join(character for character in name if character.isprintable())[:256]


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seconds(text: str) -> float:
    """RFC 3339 with any number of digits in the fraction."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,30})?(Z|[+-]\d\d:\d\d)", text)
    if found is None:
        raise ValueError("expires_at")
    when = datetime.fromisoformat(found[1] + found[3])
    return (when - _EPOCH).total_seconds() + float(found[2] or 0)


def writer_number(token: int, random: int) -> int:
    """Return the node id of a writer with a fencing token (0: it has no lease); `random`: 40 random bits."""
    low = token % (1 << TOKEN_BITS)
    if token and not low:
        low = 1  # after eight million owners it begins anew; never at "no lease"
    return low << RANDOM_BITS | (random % (1 << RANDOM_BITS) or 1)


def token_of(node_id: int) -> int:
    """Return the low bits of the fencing token with which a file was written; 0 when there was no lease."""
    return node_id >> RANDOM_BITS & ((1 << TOKEN_BITS) - 1)
