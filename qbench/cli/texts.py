"""Paths and names on the command line, taken as they were typed. No torch here."""

import re
from collections.abc import Sequence
from pathlib import Path

from qbench.errors import UserError

# Options whose values are not read in the grammar of all others.
TEXTS = ("name", "init", "out", "dataset.root")
FUNCTIONS = re.compile(r"(choice|glob|shuffle|sort|tag|str)\(.*\)")  # Hydra's, in a sweep


def typed(words: Sequence[str], sweep: bool = False) -> list[str]:
    """The words with the values of `TEXTS` in quotes, and a home folder in place of ~; Hydra's parser alters others."""
    return [_quoted(word, sweep) for word in words]


def _quoted(word: str, sweep: bool) -> str:
    key, equals, text = word.partition("=")
    if key.lstrip("+") not in TEXTS or not equals or text in ("", "null") or (sweep and FUNCTIONS.fullmatch(text)):
        return word
    from hydra.core.override_parser.types import Quote, QuotedString

    quoted = r"'(?:[^'\\]|\\.)*'" + "|" + r'"(?:[^"\\]|\\.)*"'
    parts = re.findall(rf"(?:{quoted}|[^,])+", text) if sweep else [text]
    told = (
        p if re.fullmatch(quoted, p) else QuotedString(text=_home(p), quote=Quote.single).with_quotes() for p in parts
    )
    return f"{key}={','.join(told)}"


def _home(text: str) -> str:
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from error
