"""The packed file as bytes: a safetensors container whose header says what each part is, sealed by checksums. No torch.

docs/format.md describes it for readers in other languages.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from qbench.errors import UserError
from qbench.records import CONFIG_SHAPE
from qbench.shapes import NUMBER, OPEN, Each, check, parsed

FORMAT = "qbench.packed"
VERSION = 1
KEY = "qbench"  # of the one text in the container's __metadata__
UNSEALED = "0" * 64  # stands where the checksum of the whole will be, while it is computed
HEADER_MOST = 100_000_000  # bytes; the library's own limit

SIZES = ("code_bytes", "entropy_bytes", "bytes", "folded_bytes")
CONFIG: dict[str, Any] = {
    **{k: CONFIG_SHAPE[k] for k in ("method", "model", "options", "dataset", "w_bits", "a_bits", "seed", "threads")},
    "channels_last": bool,
    "train": {"batch_size": int},
}
QUANTIZED = {"bits": NUMBER, "grid": {"kind": str}}
SHAPE: dict[str, Any] = {
    "format": str,
    "version": int,
    "sha256": str,
    "made_by": str,
    "run": {"accuracy_last?": OPEN, **dict.fromkeys(("kernels?", "evaluated_in?", "key?"), str)},
    "config": CONFIG,
    "parts": Each({"role": str, "shape": [int], "sha256": str, "width?": (int, dict)}),
    "weights": Each(
        {"shape": [int], "bits": NUMBER, "grid": {"kind": str}, "coding": {"kind": str, "parts": Each(str)}}
    ),
    "activations": Each({"bits": NUMBER, "grid": {"kind": str}}),
    "extra_state": Each(dict),
    "sizes": {"nominal_bits": NUMBER, **dict.fromkeys(SIZES, int)},
    "layers": Each({"macs": int, "w_bits": NUMBER, "a_bits": NUMBER, "bit_operations": int}),
}


@dataclass(frozen=True)
class Container:
    """What a packed file holds: what its header says, and the bytes of each part as an array."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    size: int  # bytes of the file
    source: str  # what to call it


def seal(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The file: `meta` with the checksum of each array in its "parts" and of the whole.

    The arrays are contiguous. The checksum of the whole is the SHA-256 of the file with 64 zeros in its own place.
    Equal content gives equal bytes.
    """
    parts = {
        name: {**meta["parts"][name], "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
        for name, array in arrays.items()
    }
    whole = {"format": FORMAT, "version": VERSION, "sha256": UNSEALED, **meta, "parts": parts}
    text = json.dumps(whole, separators=(",", ":"))
    data = save(dict(arrays), {KEY: text})
    place = data.index(UNSEALED.encode())
    return data[:place] + hashlib.sha256(data).hexdigest().encode() + data[place + len(UNSEALED) :]


def is_packed(path: Path) -> bool:
    """Whether a file begins as a packed one does, whole or not."""
    try:
        with path.open("rb") as file:
            return FORMAT.encode() in file.read(1024)
    except OSError:
        return False


def read(path: Path) -> Container:
    """The content of a packed file, every checksum compared.

    Errors: UserError naming the file, and the part where it is one, when anything is missing, cut off, altered or of a
    later version than this one reads.
    """
    if not path.is_file():
        raise UserError(f"no packed file at {path}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return opened(data, str(path))


def opened(data: bytes, source: str) -> Container:
    """`read` of bytes that are at hand."""
    try:
        header, begin = _header(data)
        meta = _meta(header)
        _check_parts(data, header, begin, meta)
        _check_whole(data, meta)
        check(meta, SHAPE)
        arrays = _arrays(data, meta)
    except ValueError as error:
        raise UserError(f"{source} is refused: {error}") from error
    return Container(meta, arrays, len(data), source)


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """(the container's header, where the data begin). Errors: ValueError."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > HEADER_MOST or data[8:9] != b"{":
        raise ValueError("it is not a safetensors file, or its beginning is damaged")
    if len(data) < 8 + length:
        raise ValueError(f"it is cut off within its header: {len(data):,} bytes of at least {8 + length:,}")
    try:
        header = parsed(data[8 : 8 + length].decode())
        check(header, {"__metadata__?": dict})
    except ValueError as error:
        raise ValueError(f"its header is damaged ({error})") from error
    return header, 8 + length


def _meta(header: Mapping[str, Any]) -> dict[str, Any]:
    """What the header says of the net. Errors: ValueError."""
    text = header.get("__metadata__", {}).get(KEY)
    if not isinstance(text, str):
        raise ValueError("it is a safetensors file, but no packed net of qbench")
    try:
        meta: dict[str, Any] = parsed(text)
        check(meta, {"format": str, "version": int, "sha256": str, "parts": SHAPE["parts"]})
    except ValueError as error:
        raise ValueError(f"its description is damaged ({error})") from error
    if meta["format"] != FORMAT:
        raise ValueError(f"its format is {meta['format']!r}, not {FORMAT!r}")
    if not 1 <= meta["version"] <= VERSION:
        raise ValueError(f"it is of version {meta['version']} of the format, and this qbench reads up to {VERSION}")
    return meta


def _check_parts(data: bytes, header: Mapping[str, Any], begin: int, meta: Mapping[str, Any]) -> None:
    """Name the part that is damaged. Errors: ValueError."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    check(entries, Each({"dtype": str, "shape": [int], "data_offsets": [int]}))
    if lost := sorted(set(entries) ^ set(meta["parts"])):
        where = "data" if lost[0] not in entries else "description"
        raise ValueError(f"its part '{lost[0]}' has no {where}")
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = (begin + offset for offset in (*entry["data_offsets"], 0, 0)[:2])
        if last > len(data):
            raise ValueError(f"it is cut off in its part '{name}', {last - len(data):,} bytes before that ends")
        if first != end or last < first:
            raise ValueError(f"its part '{name}' does not begin where the one before it ends")
        if hashlib.sha256(data[first:last]).hexdigest() != meta["parts"][name]["sha256"]:
            raise ValueError(f"its part '{name}' is not what was written: its checksum differs")
        end = last
    if end != len(data):
        raise ValueError(f"{len(data) - end:,} bytes follow its last part")


def _check_whole(data: bytes, meta: Mapping[str, Any]) -> None:
    noted = meta["sha256"].encode()
    if len(noted) != len(UNSEALED) or data.count(noted) != 1:
        raise ValueError("the checksum of the whole is damaged")
    if hashlib.sha256(data.replace(noted, UNSEALED.encode())).hexdigest().encode() != noted:
        raise ValueError("its header is not what was written: the checksum of the whole differs")


def _arrays(data: bytes, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        entries = dict(deserialize(data))
    except SafetensorError as error:
        raise ValueError(f"its container is damaged ({error})") from error
    found = {}
    for name, entry in entries.items():
        part, dtype = meta["parts"][name], DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"its part '{name}' holds {entry['dtype']}, which no packed file does")
        array = np.frombuffer(entry["data"], dtype) if entry["data"] else np.empty(0, dtype)
        if "width" not in part:
            if list(entry["shape"]) != part["shape"]:
                raise ValueError(f"its part '{name}' has the shape {entry['shape']}, not {part['shape']}")
            array = array.reshape(part["shape"])
        elif entry["dtype"] != "U8":
            raise ValueError(f"its part '{name}' holds {entry['dtype']}, not the bytes of packed integers")
        found[name] = array
    return found


DTYPES = {"U8": "u1", "I8": "i1", "BOOL": "?", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
