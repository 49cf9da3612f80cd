"""A request to somebody who raises the alarm when it stays away (`heartbeat-url`): sent while all databases are in order, as Litestream does it.

| when | what |
|---|---|
| every quarter of a minute, once the interval is over since the last request that succeeded | look at all databases |
| all are in order | GET the URL; only an answer 2xx counts, anything else is tried again at the next look |
| one is not | nothing is sent, and the log says once which one it is |

The URL is a secret: whoever knows it can silence the alarm. Neither the log nor an error shows more of it than the host.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

from replicator import __version__
from replicator.store import Member, Store

__all__ = ["Heartbeat", "why_not"]

LOOK_S = 15.0
TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


def why_not(member: Member, interval_s: float) -> str:
    """Say what keeps a database from being in order; empty when nothing does, and for one that somebody has stopped.

    In order: all that was committed more than an interval ago is on every replica, as far as anybody can tell.
    """
    replicator = member.replicator
    if replicator is None:
        return member.problem or member.state if member.state in ("waiting", "failed") else ""
    status = replicator.status()
    if status.state == "failed" or status.error:
        return status.error or status.state
    late = max(status.replicas, key=lambda item: item.lag_s, default=None)
    return f"{late.url} lags {late.lag_s:.0f} s" if late is not None and late.lag_s > interval_s else ""


class Heartbeat:
    """The thread that does it. `start` once, then `close`."""

    def __init__(
        self, store: Store, url: str, interval_s: float, *, look_s: float = LOOK_S, get: Callable[[str], int] | None = None
    ) -> None:
        """`get` sends a request and returns the status of the answer; it raises `OSError`."""
        self._store, self._url, self._interval_s, self._look_s = store, url, interval_s, look_s
        self._get = get or _get
        self._host = urlsplit(url).hostname or ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pyrepl heartbeat", daemon=True)
        self._sent_at: float | None = None
        self._said = ""

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Send nothing more. A request under way is not waited for any longer than that."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing.wait(min(self._look_s, self._interval_s)):
            try:
                self.look()
            except Exception as error:
                log.error("no heartbeat, by a defect host=%s", self._host, exc_info=error)

    def look(self) -> bool:
        """Send a request if one is due and all is in order; True when it arrived."""
        if self._sent_at is not None and time.monotonic() - self._sent_at < self._interval_s:
            return False
        for member in self._store.members():
            if why := why_not(member, self._interval_s):
                self._say(f"db={member.path} reason={why!r}")
                return False
        try:
            status = self._get(self._url)
        except OSError as error:
            # Its text may hold the URL.
            self._say(f"host={self._host} error={type(error).__name__}")
            return False
        if not 200 <= status < 300:
            self._say(f"host={self._host} status={status}")
            return False
        self._sent_at = time.monotonic()
        if self._said:
            log.info("heartbeat is sent again host=%s", self._host)
        self._said = ""
        return True

    def _say(self, why: str) -> None:
        if why.split("reason=")[0] != self._said.split("reason=")[0]:
            log.warning("no heartbeat %s", why)
        self._said = why


def _get(url: str) -> int:
    request = urllib.request.Request(url, headers={"User-Agent": f"pyrepl/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except http.client.HTTPException as error:
        raise OSError("not an HTTP answer") from error
