"""A command line in words, as a shell splits it: quotes, double quotes and backslashes, and nothing else. No shell is started.

Litestream stops reading at an unquoted `;`, `&`, `|`, `<` or `>`, and runs what stands before it. A command that silently loses its second half is
worse than an error, so here it is one. `$NAME` and backquotes mean nothing, in Litestream, too.
"""

from __future__ import annotations

import re
import shlex

from replicator.errors import ConfigError

__all__ = ["split_words"]

_QUOTED = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_SPECIAL = re.compile("[;&|<>]")


def split_words(text: str) -> tuple[str, ...]:
    """Return the words. Raises `ConfigError`: a quote is not closed, there is no word, or a shell would be needed."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise ConfigError("cannot parse exec command: a quote is not closed") from None
    if found := _SPECIAL.search(_QUOTED.sub("", text)):
        raise ConfigError(f"cannot parse exec command: {found[0]} outside of quotes", hint="let a shell do it: sh -c '...'")
    if not words or not words[0]:
        raise ConfigError("cannot parse exec command: it is empty")
    return tuple(words)
