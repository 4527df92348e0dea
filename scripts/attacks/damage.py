"""Ways to damage a file. Each returns the new content (None: the file is gone) and how, in words."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from qbench.records import sealed
from qbench.training import checkpoint

Way = Callable[[bytes, random.Random], tuple[bytes | None, str]]
# What stands in place of a field's value.
VALUES = (None, True, -1, 0, 1.5, 10**400, "x", "", [], {}, [[]], {"name": 5}, float("nan"), float("inf"), "9" * 5000)


def flip(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    new, places = bytearray(data), [chance.randrange(len(data)) for _ in range(chance.choice((1, 1, 3)))]
    for place in places:
        new[place] ^= 1 << chance.randrange(8)
    return bytes(new), f"bits flipped at {places}"


def cut(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    end = chance.choice((0, len(data) - 1, chance.randrange(len(data)), max(data[:-1].rfind(b"\n"), 0) + 1))
    return data[:end], f"cut at {end} of {len(data)}"


def take_out(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((1, 8, 100)))
    return data[:start] + data[end:], f"bytes {start} to {end} taken out"


def zeros(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((1, 16, 512)))
    return data[:start] + bytes(end - start) + data[end:], f"zeros from {start} to {end}"


def twice(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    return data + data[chance.randrange(len(data)) :], "a part of itself behind it"


def gone(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    return None, "removed"


def json_field(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    """A field changed or dropped."""
    content = json.loads(data)
    how = _change(content, chance)
    return json.dumps(content).encode(), how


def json_type(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    """A field of another type, as another program could have written it: with the right checksum."""
    content = json.loads(data)
    how = _change(content, chance, types=True)
    return json.dumps(sealed(content) if isinstance(content, dict) else content).encode(), f"{how}, sealed again"


def line_field(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    """A field of one line of JSON changed or dropped."""
    lines = data.splitlines(keepends=True)
    number = chance.randrange(len(lines))
    content = json.loads(lines[number])
    how = _change(content, chance)
    lines[number] = json.dumps(content).encode() + b"\n"
    return b"".join(lines), f"line {number + 1}: {how}"


def yaml_field(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    content = yaml.safe_load(data)
    how = _change(content, chance)
    head = data.splitlines(keepends=True)[0] if data.startswith(b"#") else b""  # Hydra reads it
    return head + yaml.safe_dump(content, sort_keys=False).encode(), how


def tensor(data: bytes, chance: random.Random) -> tuple[bytes | None, str]:
    """A field of a checkpoint of another type, or another number in a tensor; written anew, with the right hash."""
    with torch.serialization.safe_globals(checkpoint.HARMLESS):
        content = torch.load(io.BytesIO(data), weights_only=True)
    nodes: list[Any] = [content]
    for node in nodes:  # grows while it is read
        nodes += [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, dict | list) and v]
    node = chance.choice(nodes)
    key = chance.choice([*node] if isinstance(node, dict) else range(len(node)))
    values = [v for v in (*VALUES, torch.zeros(3), torch.tensor(float("nan"))) if type(v) is not type(node[key])]
    node[key] = chance.choice(values)
    place = Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / f"qbench-attack-{id(content)}.pt"
    checkpoint.save(place, content)
    new = place.read_bytes()
    place.unlink()
    return new, f"{key} is {str(node[key])[:20]}, hashed again"


def _change(content: Any, chance: random.Random, types: bool = False) -> str:
    """Change a field of `content`, or drop one; with `types` one gets a value of another kind."""
    nodes = [content]
    for node in nodes:  # grows while it is read; what a configuration may hold, and so an identity, has any type
        inner = [v for k, v in node.items() if k != "identity" or not types] if isinstance(node, dict) else node
        nodes += [v for v in inner if isinstance(v, dict | list) and v]
    node = chance.choice([n for n in nodes if n])
    key = chance.choice([*node] if isinstance(node, dict) else range(len(node)))
    if not types and chance.random() < 0.25:
        del node[key]
        return f"field {key} dropped"
    kinds = (int, float) if isinstance(node[key], int | float) and not isinstance(node[key], bool) else type(node[key])
    fitting = [v for v in VALUES if not types or not isinstance(v, kinds) or isinstance(v, bool)]
    if types and isinstance(node[key], int | float | None):  # what may be open may be a number
        fitting = [v for v in fitting if v is not None and not (isinstance(v, int | float) and node[key] is None)]
    node[key] = chance.choice(fitting)
    return f"field {key} is {str(node[key])[:20]}"


BYTES: tuple[Way, ...] = (flip, flip, cut, take_out, zeros, twice)
JSON: tuple[Way, ...] = (*BYTES, gone, *(json_field,) * 4, *(json_type,) * 4)
