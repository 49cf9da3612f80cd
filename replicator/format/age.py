"""The outside of an age file: how long its header is, and how long its plaintext. No keys and no cryptography here.

    header      "age-encryption.org/v1\\n", one stanza for each recipient (and a random one), "--- " and a MAC of 43 characters, "\\n"
    nonce       16 bytes
    chunks      64 KiB of plaintext each and a tag of 16 bytes; the last one may be shorter, and is empty only when it is the only one

The header's length differs from file to file even for the same recipients: writers add a stanza of random length. So the length of the
plaintext follows from the file's length only together with the header's.

Source: age-encryption.org/v1, sections "Header" and "Payload".
"""

from __future__ import annotations

import re

__all__ = ["MAGIC", "header_size", "plaintext_size"]

MAGIC = b"age-encryption.org/v1\n"

_END = re.compile(rb"\n--- [A-Za-z0-9+/]{43}\n")
_NONCE_SIZE = 16
_TAG_SIZE = 16
_CHUNK_SIZE = 64 << 10


def header_size(data: bytes) -> int | None:
    """Return the length of the header that `data` begins with; None when it is not complete, or no header at all."""
    if not data.startswith(MAGIC):
        return None
    end = _END.search(data, len(MAGIC) - 1)
    return end.end() if end else None


def plaintext_size(size: int, header: int) -> int | None:
    """Return the length of the plaintext of a file of `size` bytes whose header has `header` bytes; None when no file has that size."""
    payload = size - header - _NONCE_SIZE
    chunks = -(-payload // (_CHUNK_SIZE + _TAG_SIZE))
    plain = payload - chunks * _TAG_SIZE
    if chunks < 1 or plain < 0 or (chunks > 1 and plain <= (chunks - 1) * _CHUNK_SIZE):
        return None
    return plain
