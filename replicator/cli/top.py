"""`pyrepl top`: a live view of all databases of a running daemon, the worst first; lines or JSON where nobody looks.

A thread asks the daemon, so that keys are answered while it is slow or away. The terminal is drawn in one write on its second screen, and left as
it was, whatever ends the command. A daemon that goes away is shown as such, with what was last known, and found again when it is back.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from replicator.cli.control import SOCKET, ask_daemon, timeout_flag
from replicator.cli.output import EXIT_FAILED, fail
from replicator.cli.parse import Command, UsageError, duration_flag
from replicator.cli.toprows import ORDERS, Sample
from replicator.cli.topscreen import KEYS, Frame, View, print_json, print_lines, rendered
from replicator.errors import ReplicatorError, RequestRefused
from replicator.signalpipe import SignalPipe

__all__ = ["COMMAND", "next_frame", "sample_of", "watch"]

DEFAULT_INTERVAL_S = 2.0
LEAST_INTERVAL_S = 0.1


# -- asking ----------------------------------------------------------------------------------------------------------------------


def sample_of(where: Path, *, timeout_s: float) -> Sample:
    """Ask a daemon what its databases do; of Litestream's that is less. Raises `ReplicatorError`."""
    try:
        return _own_sample(where, timeout_s=timeout_s)
    except RequestRefused as error:
        if error.status != 404:
            raise
        return _peers_sample(where, timeout_s=timeout_s)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "its version and that of this command differ too much: restart the daemon with this version"
        raise ReplicatorError(f"the answer of {where} is not understood: {error!r}", hint=hint) from error


def _own_sample(where: Path, *, timeout_s: float) -> Sample:
    answer, name = ask_daemon(where, "/pyrepl/overview", timeout_s=timeout_s)
    return Sample(
        name,
        str(answer["version"]),
        str(answer["pid"]),
        float(answer["uptime_seconds"]),
        float(answer["uptime_seconds"]),
        int(answer.get("resident_bytes", 0)),
        {item["path"]: item for item in answer["databases"]},
        answer["operations"],
    )


def _peers_sample(where: Path, *, timeout_s: float) -> Sample:
    info, name = ask_daemon(where, "/info", timeout_s=timeout_s)
    listed, _ = ask_daemon(where, "/list", timeout_s=timeout_s)
    synced, _ = ask_daemon(where, "/debug/sync-status", timeout_s=timeout_s)
    details: dict[str, Any] = {item["path"]: item for item in synced.get("databases") or []}
    databases = {}
    for item in listed.get("databases") or []:
        more = details.get(item["path"], {})
        state = {"open": "waiting"}.get(item["status"], item["status"])
        fields = {"txid": more.get("txid"), "wal_bytes": more.get("wal_size"), "error": more.get("error")}
        databases[item["path"]] = {"state": state, **{key: value for key, value in fields.items() if value}}
    return Sample(name, str(info["version"]), str(info["pid"]), None, float(info["uptime_seconds"]), 0, databases, {})


def next_frame(frame: Frame | None, where: Path, *, timeout_s: float) -> Frame:
    """Ask again."""
    last = frame.after if frame is not None else None
    try:
        sample = sample_of(where, timeout_s=timeout_s)
    except ReplicatorError as error:
        return Frame(datetime.now(UTC), last, frame.before if frame else None, error, frame.since if frame else None)
    now = datetime.now(UTC)
    return Frame(now, sample, last, None, now)


# -- the terminal ----------------------------------------------------------------------------------------------------------------


class _Asking:
    """The thread that asks again and again; `frame` is the newest, and a byte comes through `reader` with each."""

    def __init__(self, ask: Callable[[Frame | None], Frame], interval_s: float) -> None:
        self.frame = Frame(datetime.now(UTC))
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._ask, self._interval_s = ask, interval_s
        threading.Thread(target=self._run, name="pyrepl top", daemon=True).start()

    def _run(self) -> None:
        frame: Frame | None = None
        while True:
            began = time.monotonic()
            self.frame = frame = self._ask(frame)
            try:
                os.write(self._writer, b".")
            except OSError:  # the command has ended
                return
            # A second answer soon after the first: rates are there at once.
            pause = self._interval_s if frame.before is not None or frame.error is not None else min(self._interval_s, 0.5)
            time.sleep(max(0.0, began + pause - time.monotonic()))


@contextlib.contextmanager
def _keys(descriptor: int) -> Iterator[None]:
    """Let keys arrive one by one and unseen, and leave the terminal as it was."""
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def watch(ask: Callable[[Frame | None], Frame], view: View, interval_s: float) -> int:
    """Show it on the terminal until somebody has enough. Returns the exit code."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    asking = _Asking(ask, interval_s)
    stdin = sys.stdin.fileno()
    shown = asking.frame
    signals = SignalPipe()
    signals.take((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH))
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # a shell would get the terminal without its echo
    with _keys(stdin), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(rendered(shown, view, console.width, console.height), refresh=True)
            ready, _, _ = select.select([asking.reader, stdin, signals], [], [])
            if signals in ready:
                came = signals.wait()
                if ends := [number for number in (signal.SIGTERM, signal.SIGHUP) if number in came]:
                    return 128 + ends[0]
                if signal.SIGINT in came:
                    break
            if asking.reader in ready:
                os.read(asking.reader, 4096)
            if stdin in ready:
                data = os.read(stdin, 256)
                if not data:  # the terminal is gone
                    break
                changed = _after_keys(view, data.decode(errors="replace"))
                if changed is None:
                    break
                view = changed
            if not view.paused:
                shown = asking.frame
    return 0 if asking.frame.error is None else EXIT_FAILED


def _after_keys(view: View, text: str) -> View | None:
    if text.startswith("\x1b") and len(text) > 1:
        return view  # an arrow or a function key
    for key in text:
        if (changed := view.after_key(key)) is None:
            return None
        view = changed
    return view


# -- the command -----------------------------------------------------------------------------------------------------------------


def top(flags: dict[str, str], arguments: list[str]) -> int:
    if arguments:
        raise UsageError("too many arguments")
    interval = duration_flag(flags, "interval", DEFAULT_INTERVAL_S) or 0.0
    if interval < LEAST_INTERVAL_S:
        raise UsageError(f"invalid value for -interval: at least {LEAST_INTERVAL_S:g}s")
    if flags.get("once") == "true" and "n" in flags:
        raise UsageError("-once is -n 1: give one of them")
    frames = 1 if flags.get("once") == "true" else _whole(flags, "n")
    rows = _whole(flags, "rows")
    order = flags.get("sort", "worst")
    if order not in ORDERS:
        raise UsageError(f"invalid value for -sort: {order!r} ({', '.join(ORDERS)})")
    view = View(order, flags.get("filter", ""), flags.get("reverse") == "true", flags.get("problems") == "true")
    where, timeout_s = Path(flags.get("socket", SOCKET)), timeout_flag(flags, 10)

    def ask(frame: Frame | None) -> Frame:
        return next_frame(frame, where, timeout_s=timeout_s)

    as_json = flags.get("json") == "true"
    if not as_json and frames is None and sys.stdin.isatty() and sys.stdout.isatty():
        return watch(ask, view, interval)
    return _repeat(ask, interval, 1 if frames is None and not as_json else frames, print_json if as_json else print_lines, view, rows)


def _repeat(
    ask: Callable[[Frame | None], Frame],
    interval_s: float,
    frames: int | None,
    show: Callable[[Frame, View, int | None], None],
    view: View,
    rows: int | None,
) -> int:
    """Print frames, each with rates: the first one comes after an interval. A daemon that never answered is an error at once."""
    frame = ask(None)
    if frame.error is not None:
        return fail(str(frame.error), frame.error.hint)
    count = 0
    with contextlib.suppress(KeyboardInterrupt):
        while frames is None or count < frames:
            time.sleep(interval_s)
            frame = ask(frame)
            show(frame, view, rows)
            count += 1
    return 0 if frame.error is None else EXIT_FAILED


def _whole(flags: dict[str, str], name: str) -> int | None:
    if name not in flags:
        return None
    text = flags[name]
    if not text.isascii() or not text.isdigit() or not 0 < len(text) < 7 or not int(text):
        raise UsageError(f"invalid value for -{name}: {text!r} (a whole number, at least 1)")
    return int(text)


def _orders(names: Sequence[str]) -> str:
    return "|".join(names)


COMMAND = Command(
    f"pyrepl top [-interval D] [-sort {_orders(list(ORDERS))}] [-reverse] [-filter WORDS] [-problems]\n"
    "                  [-n N | -once] [-json] [-rows N] [-socket PATH] [-timeout SECONDS]",
    "Watch all databases of a running daemon, the worst first.\n\n"
    f"On a terminal: {KEYS}.\n"
    "-interval: time between two looks, 2s when not given.\n"
    "-filter: only databases whose path, state or error has all of the words.  -problems: only those with an error.\n"
    "-once, -n: print so many tables instead, the first one after an interval, because rates need two looks.\n"
    "-json: one object a line, without end unless -n says so.  -rows: so many databases at most.",
    ("once", "json", "reverse", "problems"),
    ("interval", "n", "sort", "filter", "rows", "socket", "timeout"),
    top,
)
