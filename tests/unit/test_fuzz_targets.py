"""The fuzz targets run without atheris, accept what is valid, and notice a decoder that is wrong."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import lz4.block
import pytest

from fuzz import fuzz_config, fuzz_ltx, fuzz_names, fuzz_socket, fuzz_url, fuzz_v3, fuzz_wal
from replicator.errors import ConfigError, FormatError
from replicator.format.checksum import wal_checksum
from replicator.format.ltx import TXID, Header, decode_file, encode_file
from replicator.format.v3 import encode_frame
from replicator.storage.url import parse_s3_url

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


CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
MODULES = {
    "config": fuzz_config, "ltx": fuzz_ltx, "names": fuzz_names, "socket": fuzz_socket, "url": fuzz_url, "v3": fuzz_v3, "wal": fuzz_wal,
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_target_accepts_its_corpus_and_what_comes_of_it(name: str, replicator_seed: int) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert inputs
    rng = random.Random(replicator_seed)
    for data in [b"", *inputs]:
        MODULES[name].check(data)
    for _ in range(150):
        mixed = bytearray(rng.choice(inputs) + (rng.choice(inputs) if rng.random() < 0.2 else b""))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(mixed))
            mixed[at : at + rng.randrange(4)] = rng.choice(
                [rng.randbytes(rng.randrange(4)), b"/", b"..", b"@", b"?", b"&", b"=", b"%00", b"\0"]
            )
        MODULES[name].check(bytes(mixed))


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


def test_the_url_target_notices_a_password_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_url, "redact", lambda url: url)
    with pytest.raises(AssertionError):
        fuzz_url.check(b"bucket/path")


def test_the_names_target_notices_a_traversal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_names, "check_control_name", lambda name: None)
    with pytest.raises(AssertionError):
        fuzz_names.check(b"a/../../x")


def test_the_socket_target_notices_a_defect_in_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: Any) -> Any:
        raise KeyError("path")

    monkeypatch.setattr(fuzz_socket.CONTROL, "respond", broken)
    with pytest.raises(AssertionError):
        fuzz_socket.check_bytes(b"GET /info HTTP/1.1\r\n\r\n")


@pytest.mark.fault("F57")
def test_a_bomb_of_aliases_is_refused_in_bounded_time_and_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]
    text = "\n".join(["dbs: []", *lines])
    tracemalloc.start()
    try:
        started = time.process_time()
        assert isinstance(fuzz_config.read(text, lenient=False), ConfigError)
        assert time.process_time() - started < 5
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.fault("F53")
def test_a_page_that_claims_to_be_huge_takes_no_memory() -> None:
    page = lz4.block.compress(bytes(16 << 20), store_size=False)
    body = struct.pack(">IHI", 1, 1, len(page)) + page
    bomb = Header(512, 1, TXID(1), TXID(1), 7).encode() + body
    tracemalloc.start()
    try:
        fuzz_ltx.check(bomb)
        with pytest.raises(FormatError):
            decode_file(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.fault("F52")
def test_a_header_of_four_billion_pages_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        fuzz_ltx.check(Header(65536, 2**32 - 1, TXID(1), TXID(1), 7).encode() + bytes(1000))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("url", ["s3://bucket.min]x.local:9000/x", "s3://bucket.[::1.local:9000/x", "s3://bucket.local:99999/x"])
def test_a_host_in_a_url_that_is_none_is_refused_when_it_is_read(url: str) -> None:
    with pytest.raises(ConfigError, match="not an endpoint"):
        parse_s3_url(url, environ={})
