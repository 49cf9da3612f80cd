"""Give memory back to the system. glibc keeps what was freed, in as many heaps as there were threads at work side by side: after a thousand databases
were open for a minute half a gigabyte stays. Elsewhere than with glibc nothing is done here."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

__all__ = ["few_heaps", "trim"]

_M_ARENA_MAX = -8
_HEAPS = 2


@cache
def _library() -> Any:
    import ctypes

    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def few_heaps() -> None:
    """Let all threads share two heaps from now on. The interpreter's lock keeps them from colliding much."""
    with contextlib.suppress(OSError):
        if (library := _library()) is not None:
            library.mallopt(_M_ARENA_MAX, _HEAPS)


def trim() -> None:
    """Give back what is free."""
    with contextlib.suppress(OSError):
        if (library := _library()) is not None:
            library.malloc_trim(0)
