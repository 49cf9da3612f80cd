"""The lengths of an age file, against files that the library makes."""

from __future__ import annotations

import pyrage
import pytest

from replicator.format.age import MAGIC, header_size, plaintext_size

CHUNK = 64 << 10
RECIPIENT = pyrage.x25519.Recipient.from_str("age1gpykesj35j38mz5q4m5rkjq3u5taq63scjz5a2u2qcl82r7cn3jqwmpr4e")


@pytest.mark.parametrize("size", [0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 5 * CHUNK - 1])
@pytest.mark.parametrize("recipients", [1, 3])
def test_the_length_of_the_plaintext_follows_from_file_and_header(size: int, recipients: int) -> None:
    encrypted = pyrage.encrypt(b"x" * size, [RECIPIENT] * recipients)
    header = header_size(encrypted)
    assert header is not None
    assert plaintext_size(len(encrypted), header) == size


def test_headers_of_the_same_recipient_differ_in_length() -> None:
    """Why a listing's sizes are not enough."""
    assert len({header_size(pyrage.encrypt(b"", [RECIPIENT])) for _ in range(30)}) > 1


def test_a_header_is_complete_or_none() -> None:
    encrypted = pyrage.encrypt(b"x", [RECIPIENT])
    whole = header_size(encrypted)
    assert whole is not None
    assert encrypted[:whole].endswith(b"\n")
    assert {header_size(encrypted[:end]) for end in range(whole)} == {None}


@pytest.mark.parametrize(
    "data", [b"", b"LTX1" + b"\0" * 200, MAGIC + b"-> X25519 a\nb\n--- short\n", b"-----BEGIN AGE ENCRYPTED FILE-----\n", b"x" + MAGIC]
)
def test_what_is_no_header_has_no_length(data: bytes) -> None:
    assert header_size(data) is None


@pytest.mark.parametrize("payload", [-50, 0, 16, 31, 16 + CHUNK + 16 + 1, 16 + CHUNK + 16 + 16, 16 + 2 * (CHUNK + 16) + 16])
def test_lengths_that_no_file_has_are_none(payload: int) -> None:
    """Not even a tag, or a last chunk that is empty or only a part of its tag."""
    assert plaintext_size(200 + payload, 200) is None
