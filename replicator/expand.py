"""`$NAME` and `${NAME}` in a text, replaced as Litestream does, with a note on whatever may surprise.

Source: specification 0.5 section 4; Go's `os.Expand`, whose edge cases were tried with the released binary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from replicator.yamltree import MAX_NOTES, Note

__all__ = ["expand_environment"]

_SPECIAL = frozenset("*#$@!?-0123456789")
_NAME = re.compile(r"[A-Za-z0-9_]+")
_USUAL_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,60}")


def expand_environment(text: str, environ: Mapping[str, str], *, pid: int) -> tuple[str, list[Note]]:
    """Replace `$NAME` and `${NAME}` as Litestream does (Go's `os.Expand`), in comments, too, and say what may surprise.

    What is not set becomes empty. `${X:-d}` is the variable of that whole name, hence empty. A `$` before one of `*#$@!?-` or a digit disappears
    together with it; before anything else it stays. There is no escape.
    """
    out: list[str] = []
    notes: list[Note] = []
    last_brace = text.rfind("}")
    at = line_start = 0
    line = 1
    while (dollar := text.find("$", at)) >= 0:
        newline = text.rfind("\n", at, dollar)
        if newline >= 0:
            line, line_start = line + text.count("\n", at, dollar), newline + 1
        out.append(text[at:dollar])
        name, at = _shell_name(text, dollar + 1, last_brace)
        if name is None:
            out.append("$")
            continue
        value = str(pid) if name == "PID" else environ.get(name)
        out.append(value or "")
        if value is None and not text[line_start : line_start + 100].lstrip().startswith("#") and len(notes) < MAX_NOTES:
            notes.append(Note(line, dollar - line_start + 1, _why_empty(name)))
        if "\n" in text[dollar:at]:  # inside ${...}
            line, line_start = line + text.count("\n", dollar, at), text.rfind("\n", dollar, at) + 1
    out.append(text[at:])
    return "".join(out), notes


def _shell_name(text: str, at: int, last_brace: int) -> tuple[str | None, int]:
    """Return the name after a `$`, and where it ends; None when the `$` means itself, and an empty name for what is only removed."""
    if at == len(text):
        return None, at
    if text[at] == "{":
        if at > last_brace:
            return "", at + 1
        end = text.index("}", at)
        return text[at + 1 : end], end + 1
    if text[at] in _SPECIAL:
        return text[at], at + 1
    found = _NAME.match(text, at)
    return (found[0], found.end()) if found else (None, at)


def _why_empty(name: str) -> str:
    # The name is repeated only where it looks like a variable's: it could be the rest of a password.
    if _USUAL_NAME.fullmatch(name):
        return f"environment variable {name} is not set: it is replaced by nothing"
    head = _USUAL_NAME.match(name)
    if head and name[head.end() :].startswith((":", "-")):
        return f"${{{head[0]}...}} is replaced by nothing: default values are not supported, as in Litestream"
    return "$ and what follows it are replaced by nothing; to keep a literal $, use -no-expand-env, or put the text into a variable"
