from __future__ import annotations

import pytest

from replicator.errors import ConfigError
from replicator.words import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # Tried with the released Litestream, which gives the same.
        ("echo 'a b' \"c d\" e\\ f $HOME", ("echo", "a b", "c d", "e f", "$HOME")),
        ("echo `id`", ("echo", "`id`")),
        ("sh -c 'a; b | c'", ("sh", "-c", "a; b | c")),
        ("a\\;b 'x>y' \"p&q\"", ("a;b", "x>y", "p&q")),
        ("app --url=http://h/?a=1 #x", ("app", "--url=http://h/?a=1", "#x")),
    ],
)
def test_words(text: str, words: tuple[str, ...]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo a ; echo b", "; outside"),
        ("echo a;echo b", "; outside"),
        ("a | b", "| outside"),
        ("a && b", "& outside"),
        ("a 2>x", "> outside"),
        ("'it\\' b;", "; outside"),
        ("echo 'x", "not closed"),
        ("echo x\\", "not closed"),
        ("  ", "empty"),
        ("'' x", "empty"),
    ],
)
def test_what_would_need_a_shell_or_makes_no_sense_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why.replace("|", r"\|")):
        split_words(text)
