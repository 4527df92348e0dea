"""Errors that are answers: what was got, what is allowed, what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend; shown as one clear message without a traceback."""


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The valid word closest to `word`, or None when nothing is close."""
    close = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.5)
    return close[0] if close else None


def unknown(kind: str, word: str, words: Iterable[str]) -> UserError:
    """An error for a name that does not exist: the nearest right one, then all of them."""
    words = sorted(words)
    hint = nearest(word, words)
    did = f" Did you mean '{hint}'?" if hint else ""
    return UserError(f"unknown {kind} '{word}'.{did} Available: {', '.join(words)}.")
