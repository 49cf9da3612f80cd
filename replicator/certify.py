"""Find out what a store can do, and say which modes of replication it is fit for.

The checks (`certchecks.py`) work in a scratch folder below the replica's URL and remove it afterwards. They are bounded in requests and time; what
there was no time for counts as not supported. The report carries the SHA-256 of its own canonical JSON (`Report.digest`), so that a copy can be
told from an edited one; it is no signature of a person's.

| mode | what it needs |
|---|---|
| replication | what is stored is there, whole, and listed |
| restore | and can be read in ranges, with its times |
| append-only | and creating has one winner, also in parts and after lost replies |
| fenced | and a control object can be replaced by one of several, for a lease |
| retention | and files can be deleted, and dated |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from replicator import __version__
from replicator.certchecks import CHECKS, CONTROL_NAMES, LEVELS, RACES, SAMPLES, WRITERS, Failed, Mode, NotTried, Place, quantile
from replicator.errors import ConfigError, ReplicatorError, StorageError
from replicator.storage.base import ReplicaClient
from replicator.storage.measured import Operations, measured
from replicator.storage.scratch import Scratch, open_scratch

__all__ = ["DEFAULT_KEYS", "MODES", "Estimate", "Finding", "Report", "certify", "estimate"]

MODES: tuple[Mode, ...] = get_args(Mode)
DEFAULT_KEYS = 1005
_KINDS = ("PUT", "GET", "LIST", "DELETE")

Result = Literal["pass", "fail", "not tried"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will need at most, about. `cost_usd`: at the list prices of S3; 0 where requests cost nothing."""

    requests: int
    timeout_s: float
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `detail`: what was seen, or what is wrong. `modes`: those that need it."""

    name: str
    title: str
    result: Result
    detail: str
    seconds: float
    modes: tuple[Mode, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. Contains no secret: URLs are those that clients show.

    Attributes:
        modes: whether each mode is supported.
        required: what was asked for.
        latency_s: p50, p99 and longest time of appending, reading and listing, in seconds.
        requests: operations on the store, by kind, without those that a client repeats by itself.
        left_behind: why the scratch folder could not be removed; empty when it was.
    """

    url: str
    kind: str
    scratch: str
    began_at: datetime
    duration_s: float
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    modes: dict[Mode, bool]
    required: tuple[Mode, ...]
    latency_s: dict[str, tuple[float, float, float]]
    requests: dict[str, int]
    cost_usd: float
    left_behind: str = ""

    @property
    def supports_what_is_required(self) -> bool:
        return all(self.modes[mode] for mode in self.required)

    def document(self) -> dict[str, Any]:
        """Return the report for JSON, with its digest."""
        found: dict[str, Any] = {
            "url": self.url,
            "kind": self.kind,
            "scratch": self.scratch,
            "date": self.began_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "duration_ms": round(self.duration_s * 1000),
            "versions": self.versions,
            "checks": [
                {
                    "name": item.name,
                    "title": item.title,
                    "result": item.result,
                    "detail": item.detail,
                    "duration_ms": round(item.seconds * 1000),
                    "needed_for": list(item.modes),
                }
                for item in self.findings
            ],
            "warnings": list(self.warnings),
            "modes": {mode: self.modes[mode] for mode in MODES},
            "required": list(self.required),
            "supported": self.supports_what_is_required,
            "latency_ms": {
                kind: dict(zip(("p50", "p99", "max"), (round(value * 1000, 3) for value in values), strict=True))
                for kind, values in self.latency_s.items()
            },
            "requests": self.requests,
            "estimated_cost_usd": round(self.cost_usd, 6),
            "left_behind": self.left_behind,
        }
        return {**found, "sha256": digest(found)}


def digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a report's JSON without its `sha256`: keys sorted, no spaces, UTF-8."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def estimate(scratch: Scratch, *, keys: int, races: int, timeout_s: float) -> Estimate:
    """Return what a run will need, about."""
    requests = {
        "PUT": keys + SAMPLES + 2 * WRITERS * races + 80,
        "GET": SAMPLES + 120,
        "LIST": 2 * (keys // 1000 + 1) + SAMPLES + 30,
        "DELETE": 60,
    }
    prices = dict(scratch.prices)
    return Estimate(sum(requests.values()), timeout_s, sum(count * prices.get(kind, 0.0) for kind, count in requests.items()))


def certify(
    url: str,
    *,
    required: Collection[Mode] = ("replication", "restore"),
    keys: int = DEFAULT_KEYS,
    races: int = RACES,
    timeout_s: float = 300.0,
    on_start: Callable[[str, Estimate], None] = lambda scratch, needed: None,
    progress: Callable[[int, int, str], None] = lambda done, total, title: None,
    scratch: Scratch | None = None,
) -> Report:
    """Try a store out.

    Args:
        url: of a replica, or of where one shall be. Only a new folder below it is touched.
        required: the modes that must be supported.
        keys: how many files the check of long listings stores; more than 1,000 to see more than one page of most stores, 0 for none.
        races: how often 50 writers race for one name.
        timeout_s: checks that would begin later are not tried. One that has begun ends in the time that the client's requests take.
        on_start: gets the scratch place and what the run will need, before the first request.
        progress: gets how many checks are done, of how many, and the next one's title.
        scratch: instead of a new folder at the URL.

    Raises:
        ConfigError: the URL is wrong, or a mode is unknown.
    """
    unknown = [mode for mode in required if mode not in MODES]
    if unknown:
        raise ConfigError(f"unknown mode: {unknown[0]!r}", hint=f"modes are {', '.join(MODES)}")
    scratch = scratch or open_scratch(url, f"pyrepl-certify-{secrets.token_hex(8)}")
    operations = Operations()
    place = Place(scratch, measured(scratch.client, operations), keys, races)
    on_start(scratch.client.url, estimate(scratch, keys=keys, races=races, timeout_s=timeout_s))
    began_at, began = datetime.now(UTC), time.monotonic()
    left_behind = ""
    findings: list[Finding] = []
    result: Result
    hopeless = False
    try:
        for check in CHECKS:
            progress(len(findings), len(CHECKS), check.title)
            started = time.monotonic()
            if hopeless:
                result, detail = "fail", "not tried, because nothing can be stored there"
            elif started - began > timeout_s:
                result, detail = "fail", f"no time left: {timeout_s:.0f} s were allowed"
            else:
                result, detail, hopeless = _run(check.run, place, is_first=not findings)
            findings.append(Finding(check.name, check.title, result, detail, time.monotonic() - started, check.modes))
    finally:
        progress(len(CHECKS), len(CHECKS), "cleaning up")
        left_behind = _clean_up(place.client, LEVELS[:1] if hopeless else LEVELS, () if hopeless else CONTROL_NAMES)
        scratch.close()
    requests = {kind: sum(item.count for (_, name), item in operations.kinds().items() if name == kind) for kind in _KINDS}
    prices = dict(scratch.prices)
    return Report(
        url=_without(scratch.client.url),
        kind=scratch.client.kind,
        scratch=scratch.client.url,
        began_at=began_at,
        duration_s=time.monotonic() - began,
        versions={"pyrepl": __version__, "python": platform.python_version(), "system": platform.system(), **dict(scratch.tools)},
        findings=tuple(findings),
        warnings=tuple(place.warnings),
        modes={mode: all(item.result != "fail" for item in findings if mode in item.modes) for mode in MODES},
        required=tuple(mode for mode in MODES if mode in required),
        latency_s={kind: (quantile(times, 0.5), quantile(times, 0.99), max(times)) for kind, times in place.latency_s.items()},
        requests={**requests, "total": sum(requests.values())},
        cost_usd=sum(count * prices.get(kind, 0.0) for kind, count in requests.items()),
        left_behind=left_behind,
    )


def _run(check: Callable[[Place], str], place: Place, *, is_first: bool) -> tuple[Result, str, bool]:
    """Return the result, what was seen, and whether more is of no use: a store that does not take the first file takes no other."""
    try:
        return "pass", check(place), False
    except NotTried as reason:
        return "not tried", str(reason), False
    except Failed as reason:
        return "fail", str(reason), False
    except ReplicatorError as error:
        return "fail", str(error), is_first


def _clean_up(client: ReplicaClient, levels: Sequence[int], names: Sequence[str]) -> str:
    """Delete all that the checks have stored; returns why that was not possible."""
    problem = ""
    for level in levels:
        try:
            client.delete(list(client.list(level)))
        except StorageError as error:
            problem = problem or str(error)
    for name in names:
        try:
            client.delete_control(name)
        except StorageError as error:
            problem = problem or str(error)
    with contextlib.suppress(StorageError):
        left = sum(len(list(client.list(level))) for level in levels)
        problem = problem or (f"{left} files are still listed" if left else "")
    return problem


def _without(url: str) -> str:
    """Return the URL of the place that the scratch folder is in."""
    place, mark, query = url.partition("?")
    return f"{place.rpartition('/')[0]}{mark}{query}"
