"""What `pyrepl` sets up for its own process, in which nothing else runs. (As a library we leave the process alone.)"""

from __future__ import annotations

import gc
import os

__all__ = ["environment_of_others", "set_up"]

# Nothing here uses numpy's linear algebra. Its threads, one for each core, spin for a while when it is loaded.
_ENVIRONMENT = {"OPENBLAS_DEFAULT_NUM_THREADS": "1"}
# Batches of pages are many small tuples and no cycles; looking for cycles each 700 allocations cost some per cent.
_GC_THRESHOLD = 20_000
_set: set[str] = set()


def set_up() -> None:
    """Call once, before anything heavy is imported."""
    gc.set_threshold(_GC_THRESHOLD)
    for name, value in _ENVIRONMENT.items():
        if name not in os.environ:
            os.environ[name] = value
            _set.add(name)


def environment_of_others() -> dict[str, str]:
    """Return the environment for a program that is started from here: as we found it."""
    return {name: value for name, value in os.environ.items() if name not in _set}
