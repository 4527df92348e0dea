"""What the files of a run hold, each read and checked in one place. No torch here."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from qbench.errors import UserError

METRICS = "metrics.jsonl"
RESULT = "result.json"


def read_result(path: Path) -> dict[str, Any]:
    """The result.json at `path`.

    Errors: UserError where it is corrupt.
    """
    try:
        return _whole(json.loads(path.read_text()), "method")
    except ValueError as error:
        raise UserError(f"{path} is corrupt ({error}); move the folder away to run again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the finished run in `folder`.

    Errors: UserError where there is none, or a corrupt one.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a finished run: it has no config.yaml")
    try:
        return _whole(yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)), "dataset")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is corrupt ({error}); move the folder away to run again") from error


def _whole(content: Any, key: str) -> dict[str, Any]:
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"it has no '{key}'")
    return content


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result.json below `folder`, with its folder under 'folder'; one that is corrupt is left out, and named.

    Errors: UserError when the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; results lie where out=DIR put them (outputs by default)")
    found = []
    for path in sorted(folder.rglob("result.json")):
        try:
            found.append({**read_result(path), "folder": str(path.parent)})
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `folder`/metrics.jsonl in the order written; none when there is no such file.

    A last line that a kill cut short is left out.

    Errors: UserError naming file and line when any other line is not a record.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    lines = text.split("\n")  # the last one is empty unless it was cut short
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(
                f"{path}, line {number}: not a record: '{line[:60]}'. Delete that line or the run's folder."
            )
        records.append(record)
    return records
