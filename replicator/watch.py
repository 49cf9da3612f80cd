"""Tell when the WAL of a database changes, at no cost while it does not.

File events come from watchdog. A busy writer causes one or two for each commit, far more than are of use, so a watch is disarmed by its first
event: from then on the caller polls at its own pace, and arms the watch again when the database has become quiet.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Watch"]

log = logging.getLogger(__name__)


class Watch:
    """A watch on one database's `-wal` file, and on the database file itself."""

    def __init__(self, path: Path, wake: Callable[[], None]) -> None:
        """`wake` is called from another thread, once for each time the watch is armed."""
        self._names = {os.fsencode(path), os.fsencode(f"{path}-wal")}
        self._folder = path.parent
        self._wake = wake
        self._observer: Any = None
        self.works = True

    @property
    def armed(self) -> bool:
        return self._observer is not None

    def arm(self) -> bool:
        """Begin to watch. False where events are not to be had (no inotify, limits reached): then only polling helps."""
        if self._observer is not None or not self.works:
            return self._observer is not None
        from watchdog.events import FileCreatedEvent, FileDeletedEvent, FileModifiedEvent, FileMovedEvent, FileSystemEventHandler
        from watchdog.observers import Observer

        handler = FileSystemEventHandler()
        handler.on_any_event = self._on_event
        observer = Observer()
        try:
            observer.schedule(
                handler, str(self._folder), event_filter=[FileModifiedEvent, FileCreatedEvent, FileDeletedEvent, FileMovedEvent]
            )
            observer.start()
        except OSError as error:
            self.works = False
            log.warning("no file events, polling instead folder=%s error=%s", self._folder, error)
            return False
        self._observer = observer
        return True

    def disarm(self) -> None:
        """Stop watching."""
        observer, self._observer = self._observer, None
        if observer is not None:
            with contextlib.suppress(RuntimeError):
                observer.stop()
                observer.join()

    def _on_event(self, event: Any) -> None:
        if os.fsencode(event.src_path) in self._names or os.fsencode(getattr(event, "dest_path", "") or "") in self._names:
            self._wake()
