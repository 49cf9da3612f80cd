"""`docs/keys.md` lists every key of Litestream's configuration files, and the code does with each what the table says."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from replicator import config
from replicator.errors import ConfigError

TEXT = (Path(__file__).parents[2] / "docs" / "keys.md").read_text()

# By section: what surrounds an example, and what stands beside it unless it says the same itself or what excludes it.
SURROUNDINGS = {
    "Top level": ("{{{}}}", {"dbs": "dbs: [{path: a.db, replica: {path: r}}]"}),
    "Databases": ("{{dbs: [{{{}}}]}}", {"path": "path: a.db", "replica": "replica: {path: r}"}),
    "Replicas": ("{{dbs: [{{path: a.db, replica: {{{}}}}}]}}", {"path": "path: r"}),
    "S3": ("{{dbs: [{{path: a.db, replica: {{{}}}}}]}}", {"type": "type: s3", "bucket": "bucket: bkt", "path": "path: x"}),
    "Google Cloud Storage": (
        "{{dbs: [{{path: a.db, replica: {{{}}}}}]}}",
        {"type": "type: gs", "bucket": "bucket: plain", "path": "path: x"},
    ),
    "Azure": (
        "{{dbs: [{{path: a.db, replica: {{{}}}}}]}}",
        {"type": "type: abs", "account-name": "account-name: acc", "bucket": "bucket: bkt", "path": "path: x"},
    ),
    "Alibaba OSS": ("{{dbs: [{{path: a.db, replica: {{{}}}}}]}}", {"type": "type: oss", "bucket": "bucket: bkt", "path": "path: x"}),
    "SFTP": ("{{dbs: [{{path: a.db, replica: {{{}}}}}]}}", {"type": "type: sftp", "user": "user: u", "host": "host: h", "path": "path: x"}),
    "WebDAV": (
        "{{dbs: [{{path: a.db, replica: {{{}}}}}]}}",
        {"type": "type: webdav", "webdav-url": "webdav-url: 'https://h'", "path": "path: x"},
    ),
    "NATS": ("{{dbs: [{{path: a.db, replica: {{{}}}}}]}}", {"type": "type: nats", "bucket": "bucket: plain"}),
}
EXCLUDES = {"dir": "path", "replicas": "replica", "url": "path"}

# Specification 0.5, section 4, and 0.3, section 13.
S3_KEYS = """access-key-id secret-access-key region bucket endpoint force-path-style sign-payload require-content-md5 sign-accept-encoding skip-verify
    storage-class part-size concurrency sse-customer-algorithm sse-customer-key sse-customer-key-path sse-kms-key-id"""
LITESTREAM = {
    "Top level": """addr mcp-addr exec socket.enabled socket.path socket.permissions logging.level logging.type logging.stderr logging.source
        levels levels[].interval snapshot.interval snapshot.retention l0-retention l0-retention-check-interval retention.enabled verify-compaction
        validation.interval heartbeat-url heartbeat-interval shutdown-sync-timeout shutdown-sync-interval dbs""",
    "Databases": """path dir pattern recursive watch meta-path meta-dir monitor-interval checkpoint-interval busy-timeout min-checkpoint-page-count
        max-checkpoint-page-count truncate-page-n max-sync-wal-bytes restore-if-db-not-exists snapshot.interval snapshot.retention replica replicas""",
    "Replicas": """type path url name sync-interval retention retention-check-interval snapshot-interval validation-interval max-sync-ltx-files
        auto-recover age.identities age.recipients""",
    "S3": S3_KEYS,
    "Google Cloud Storage": "bucket",
    "Azure": "account-name account-key sas-token bucket endpoint",
    "Alibaba OSS": "access-key-id secret-access-key region bucket endpoint part-size concurrency",
    "SFTP": "host user password key-path host-key concurrent-writes",
    "WebDAV": "webdav-url webdav-username webdav-password",
    "NATS": "bucket jwt seed creds nkey username password token tls root-cas client-cert client-key max-reconnects reconnect-wait timeout",
}
OWN = {
    "Top level": {
        "x-*",
        "lease",
        *(f"pyrepl.{key}" for key in ("park-after", "park-max-size", "max-hot", "max-recent", "max-queued", "max-uploads-per-second")),
    },
    "Databases": {"verify-interval", "format", "sync", "lease"},
    "Replicas": {"format"},
}


@dataclass(frozen=True)
class Line:
    """A line of the tables. `outcome`: holds, no effect, or refused; `why`: what a warning or an error says."""

    section: str
    key: str
    example: str
    versions: str
    outcome: str
    why: str


def lines() -> list[Line]:
    found, section = [], ""
    for line in TEXT.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif match := re.fullmatch(r"\| `([^`]+)` \| `([^`]+)` \| ([0-9., ]*|ours) \| (holds|no effect|refused)(?:: (.*))? \|", line):
            found.append(Line(section, match[1], match[2], match[3], match[4], (match[5] or "").replace("\\|", "|")))
        else:
            assert not re.match(r"\| `", line), f"not of the form of the table: {line}"
    return found


def load(section: str, example: str) -> config.Config:
    outside, beside = SURROUNDINGS[section]
    own = yaml.safe_load(f"{{{example}}}") if example else {}
    left_out = {*own, *(EXCLUDES.get(key, "") for key in own)}
    text = outside.format(", ".join([*(piece for key, piece in beside.items() if key not in left_out), *([example] if example else [])]))
    return config.load(text, environ={}, home=Path("/home/me"), folder=Path("/srv"), pid=42)


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.section}-{line.key}".replace(" ", "_"))
def test_the_code_does_what_the_table_says(line: Line) -> None:
    own = yaml.safe_load(f"{{{line.example}}}")
    assert line.key.partition(".")[0].removesuffix("[]") in own or line.key == "x-*"
    if line.outcome == "refused":
        with pytest.raises(ConfigError) as caught:
            load(line.section, line.example)
        assert line.why
        assert line.why in str(caught.value)
        return
    found = load(line.section, line.example)
    plain = load(line.section, "")
    if line.outcome == "holds":
        assert [note.text for note in found.warnings] == []
        assert found != plain or line.key == "x-*", "it changes nothing"
    else:
        (note,) = found.warnings
        assert line.why
        assert line.why in note.text
        assert replace(found, warnings=()) == plain


def test_every_key_of_litestream_is_there_once() -> None:
    for section, keys in LITESTREAM.items():
        listed = [line.key for line in lines() if line.section == section]
        assert sorted(listed) == sorted({*keys.split(), *OWN.get(section, ())}), section
    assert {line.section for line in lines()} == set(LITESTREAM) == set(SURROUNDINGS)


def test_keys_of_our_own_are_marked() -> None:
    ours = {(line.section, line.key) for line in lines() if line.versions == "ours"}
    assert ours == {(section, key) for section, keys in OWN.items() for key in keys}


def test_the_code_knows_no_other_keys() -> None:
    """What a typing error is compared with, key by key: unknown keys are refused, so these are all that can be said."""
    documented: dict[str, set[str]] = {}
    for line in lines():
        documented.setdefault(line.section, set()).add(line.key.partition(".")[0].removesuffix("[]"))
    replica = set().union(*(keys for section, keys in documented.items() if section not in ("Top level", "Databases")))
    assert replica == config.REPLICA_KEYS
    assert documented["Databases"] == config.DATABASE_KEYS
    assert documented["Top level"] - {"x-*"} == config.TOP_KEYS
