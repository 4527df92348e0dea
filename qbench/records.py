"""What the files of a run hold, each read and checked in one place. No torch here.

A file is refused as a whole, by name and field, or it is what was written: result.json seals itself with a checksum,
and holds the SHA-256 of the files beside it that are read again. Files of before these were introduced are checked by
their shape alone.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qbench.errors import UserError
from qbench.files import sha256_file
from qbench.shapes import NUMBER, OPEN, Each, check, parsed, parsed_yaml

METRICS = "metrics.jsonl"
RESULT = "result.json"
CONFIG = "config.yaml"
BEFORE = "before.json"
MANIFEST = "manifest.json"
SEALED = (CONFIG, METRICS, MANIFEST)  # what `sealed` notes of a run's folder
AGAIN = "move the folder away to run again"

COUNTS = {"counts": [int], "values?": [NUMBER], "lo?": OPEN, "hi?": OPEN}
HISTOGRAM = {"latent": COUNTS, "quantized": COUNTS, "codes": (dict, type(None))}
DATA = {"name": str, "checksum": str, "augment": str, "mean?": [NUMBER], "std?": [NUMBER], "preprocess?": str}
RESULT_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("method", "model", "dataset", "budget", "key", "protocol", "init"), str),
    **dict.fromkeys(("w_bits", "a_bits", "bits_per_weight", "seconds"), NUMBER),
    **dict.fromkeys(("accuracy_last", "accuracy_best", "epoch_best", "float_accuracy"), OPEN),
    **dict.fromkeys(("accuracy_before_training", "epochs?", "seconds_total?", "images_per_s?"), OPEN),
    **dict.fromkeys(("code?", "version?", "torch?", "device?", "kernels?", "precision?", "weights_sha256?"), str),
    **dict.fromkeys(("seed", "bytes", "threads?", "macs?", "bit_operations?"), int),
    "sizes?": Each(NUMBER),
    "not_packed?": str,
    "resumed?": [dict],
    "identity": {"data": DATA, "method?": {"rules?": list}},
    "files?": Each(str),
}
CONFIG_SHAPE: dict[str, Any] = {
    "method": {"name": str},
    "model": {"name": str},
    **dict.fromkeys(("train", "options", "distill"), dict),
    "dataset": {"name": str, **dict.fromkeys(("channels?", "classes?", "size?"), (int, type(None)))},
    **dict.fromkeys(("w_bits", "a_bits"), NUMBER),
    "seed": int,
    "init": str,
    "device": str,
    "threads": (int, type(None)),
    "channels_last": bool,
}
MANIFEST_SHAPE: dict[str, Any] = {"weights": Each(dict), "float_inputs?": Each(str), "layers?": int}
RECORD_SHAPE: dict[str, Any] = {
    "step": int,
    "epoch?": NUMBER,
    "phase?": str,
    **dict.fromkeys(("accuracy?", "loss?", "lr?"), OPEN),
    "traces?": dict,
    "telemetry?": Each(Each(OPEN)),
    **dict.fromkeys(("histograms?", "activations?"), Each(HISTOGRAM)),
}


def read_result(path: Path) -> dict[str, Any]:
    """The result.json at `path`.

    Errors: UserError naming file and field where it is corrupt, or of another run than its folder's name says.
    """
    content = _result(path)
    content.pop("files", None)
    folder = re.search(r"-([0-9a-f]{10})$", path.resolve().parent.name)
    if folder and folder[1] != content["key"]:
        raise UserError(f"{path} is of another run: its key is {content['key']}, not {folder[1]}; move it away")
    return content


def _result(path: Path) -> dict[str, Any]:
    return dict(read_json(path, RESULT_SHAPE))


def read_json(path: Path, shape: Any, mend: str = AGAIN) -> Any:
    """The JSON at `path`, without its checksum, compared with that where it has one, and with `shape`.

    Errors: UserError naming file and field, and how to `mend` it.
    """
    with named(path, mend):
        content = opened(parsed(text_of(path, mend)))
        check(content, shape)
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest.json of the run in `folder`; of older runs nothing.

    Errors: UserError where it is corrupt, or not there though the run has written it.
    """
    path = folder / MANIFEST
    return read_json(path, MANIFEST_SHAPE) if _is_there(path) else {}


def _is_there(path: Path) -> bool:
    """Whether there is a file of a run. Errors: UserError where there is none though the run has noted it."""
    if path.exists():
        return True
    beside = path.parent / RESULT
    if beside.is_file() and path.name in _result(beside).get("files", {}):
        raise UserError(f"{path} is missing, though the run has written it; {AGAIN}")
    return False


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the finished run in `folder`.

    Errors: UserError where there is none, or a corrupt one.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} is not a finished run: it has no config.yaml")
    with named(path):
        content: dict[str, Any] = parsed_yaml(text_of(path))
        check(content, CONFIG_SHAPE)
    return content


def read_before(folder: Path) -> float | None:
    """The accuracy that an unfinished run had before its training; None where it started from scratch.

    Errors: UserError where the file is missing or corrupt.
    """
    content = read_json(folder / BEFORE, {"accuracy_before_training": OPEN})
    return content["accuracy_before_training"]  # type: ignore[no-any-return]


def read_notes(folder: Path) -> str:
    """notes.md of a card's results, written by hand; empty where there is none.

    Nothing vouches for a text that anyone may edit, but one that was cut off seldom ends in a whole line.

    Errors: UserError where it is empty, is not UTF-8 or does not end in a newline.
    """
    path = folder / "notes.md"
    if not path.exists():
        return ""
    text = text_of(path)
    if not text.strip() or not text.endswith("\n"):
        raise UserError(f"{path} looks cut off: it is empty or its last line has no end; restore it, or end that line")
    return text


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result.json below `folder`, with its folder under 'folder'; one that is corrupt is left out, and named.

    Errors: UserError when the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; results lie where out=DIR put them (outputs by default)")
    found = []
    for path in sorted(folder.rglob(RESULT)):
        with leaving_out():
            found.append({**read_result(path), "folder": str(path.parent)})
    return found


@contextmanager
def leaving_out() -> Iterator[None]:
    """Name on stderr, and leave out, what a damaged file would have given; the rest goes on."""
    try:
        yield
    except UserError as error:
        print(f"left out: {error}", file=sys.stderr)


def trained(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`result` of a float parent. Errors: UserError where nothing was trained (epochs=0)."""
    if result["accuracy_last"] is None:
        raise UserError(
            f"the float parent in {folder} was not trained (epochs=0): give it parent.epochs, or init=scratch"
        )
    return dict(result)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `folder`/metrics.jsonl in the order written; none when there is no such file.

    A last line that a kill cut short is left out; of a finished run nothing may be missing.

    Errors: UserError naming file and line when any other line is not a record.
    """
    path = Path(folder) / METRICS
    if not _is_there(path):
        return []
    lines = text_of(path).split("\n")  # the last one is empty unless it was cut short
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parsed(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        try:
            check(record, RECORD_SHAPE)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not a record ({error}): '{line[:60]}'. Delete that line or the run's folder."
            ) from error
        records.append(record)
    return records


def sealed(content: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """`content` with its checksum and, of a run in `folder`, the SHA-256 of the files beside it."""
    content = {k: v for k, v in content.items() if k != "checksum"}
    if folder is not None:
        content["files"] = {n: sha256_file(folder / n) for n in SEALED if (folder / n).is_file()}
    return {**content, "checksum": _checksum(content)}


def opened(content: Any) -> Any:
    """`content` without its checksum, which is checked where there is one. Errors: ValueError where it differs."""
    if not isinstance(content, dict) or "checksum" not in content:
        return content
    inner = {k: v for k, v in content.items() if k != "checksum"}
    if content["checksum"] != _checksum(inner):
        raise ValueError("its content does not have the checksum that stands in it")
    return inner


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def text_of(path: Path, mend: str = AGAIN) -> str:
    """The text of a file that is as the run beside it has left it.

    Errors: UserError naming it, and how to `mend` it.
    """
    if not path.is_file():  # nothing ever comes out of a pipe
        raise UserError(f"{path} is not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    beside = path.parent / RESULT
    if path.name in SEALED and beside.is_file():
        noted = _result(beside).get("files", {}).get(path.name)
        if noted not in (None, hashlib.sha256(data).hexdigest()):
            raise UserError(f"{path} is corrupt: it is not what the run has written; {AGAIN}")
    with named(path, mend):
        return data.decode()


@contextmanager
def named(path: Path, mend: str = AGAIN) -> Iterator[None]:
    """A ValueError while reading `path` becomes a UserError that names it, and says how to `mend` it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} is corrupt ({error}); {mend}") from error
