"""The fuzz targets run without atheris, accept what is valid, and notice a decoder that is wrong."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from fuzz import fuzz_config, fuzz_ltx, fuzz_v3, fuzz_wal
from replicator.errors import ConfigError
from replicator.format.checksum import wal_checksum
from replicator.format.ltx import TXID, Header, encode_file
from replicator.format.v3 import encode_frame

LTX = encode_file(Header(512, 3, TXID(1), TXID(4), 7), [(pgno, bytes([pgno]) * 512) for pgno in (1, 2, 3)])


def _wal() -> bytes:
    start = struct.pack(">6I", 0x377F0682, 3007000, 512, 0, 1, 2)
    sums = wal_checksum(start, 0, 0, big_endian=False)
    out = start + struct.pack(">II", *sums)
    for pgno, commit in ((1, 0), (2, 2), (1, 2), (5, 0)):
        head, image = struct.pack(">II", pgno, commit), bytes([pgno]) * 512
        sums = wal_checksum(head + image, *sums, big_endian=False)
        out += head + struct.pack(">4I", 1, 2, *sums) + image
    return out


WAL = _wal()
CONFIG = b"""
x-common: &common {sync-interval: 1s}
dbs:
  - path: ~/a.db
    snapshot: {retention: 72h}
    replicas:
      - {<<: *common, type: s3, bucket: bkt, access-key-id: $ACCESS, secret-access-key: '${SECRET}'}
      - {path: r, age: {recipients: [age1x]}}
"""
TARGETS = [(fuzz_ltx, LTX), (fuzz_wal, WAL), (fuzz_config, CONFIG), (fuzz_v3, b"\x80" + WAL), (fuzz_v3, encode_frame(WAL * 9))]


@pytest.mark.parametrize(("target", "valid"), TARGETS)
def test_a_target_accepts_valid_empty_and_damaged_input(target: Any, valid: bytes) -> None:
    rng = random.Random(1)
    target.check(b"")
    target.check(valid)
    for _ in range(300):
        data = bytearray(valid)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        target.check(bytes(data[: rng.randrange(len(data)) if rng.random() < 0.3 else None]))


def test_the_ltx_target_notices_a_decoder_that_depends_on_the_cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(fuzz_ltx.Decoder):
        def feed(self, data: Any) -> Any:
            return super().feed(data) if len(data) > 100 else []

    monkeypatch.setattr(fuzz_ltx, "Decoder", Forgetful)
    with pytest.raises(AssertionError):
        fuzz_ltx.check(LTX)


def test_the_wal_target_notices_a_scan_that_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = fuzz_wal.scan_frames
    monkeypatch.setattr(fuzz_wal, "scan_frames", lambda data, **rest: scan(data[:-536], **rest))
    with pytest.raises(AssertionError):
        fuzz_wal.check(WAL)


def test_the_v3_target_notices_a_replay_that_forgets_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(fuzz_v3.Replay):
        def segment(self, info: Any, pieces: Any) -> None:
            super().segment(info, pieces)
            self._rest = b""

    monkeypatch.setattr(fuzz_v3, "Replay", Forgetful)
    with pytest.raises(AssertionError):
        fuzz_v3.check(b"\x80" + WAL)


def test_the_v3_target_notices_a_decoder_that_depends_on_the_cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(fuzz_v3.FrameDecoder):
        def feed(self, data: Any) -> Any:
            return super().feed(data) if len(data) > 100 else []

    monkeypatch.setattr(fuzz_v3, "FrameDecoder", Forgetful)
    with pytest.raises(AssertionError):
        fuzz_v3.check_frame(encode_frame(WAL))


def test_the_config_target_notices_a_secret_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    load = fuzz_config.load

    def talkative(text: str, **options: Any) -> Any:
        config = load(text, **options)
        raise ConfigError(f"fuzz.yml: {config.databases[0].replicas[0].s3.secret_access_key}")

    monkeypatch.setattr(fuzz_config, "load", talkative)
    with pytest.raises(AssertionError):
        fuzz_config.check(CONFIG)


def test_the_config_target_notices_plaintext_where_encryption_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_config, "open_replica", lambda settings: None)
    with pytest.raises(AssertionError):
        fuzz_config.check(CONFIG)
