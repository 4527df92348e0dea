"""Atomic save and load of everything that decides the next step."""

import argparse
import hashlib
import io
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct, scalar
from torch import nn

from qbench.errors import UserError
from qbench.files import atomic_write
from qbench.records import RESULT, read_result
from qbench.shapes import NUMBER, OPEN, Each, check
from qbench.training import weights

MARK = b"sha256:"  # in the comment of the zip archive that torch.save makes: any torch reads the file as ever
# Of an unfinished run.
SHAPE: dict[str, Any] = {
    "step": int,
    "records?": (int, type(None)),
    "stage": [int],
    **dict.fromkeys(("model", "hooks"), dict),
    "optimizer": [{"state": dict, "param_groups": [dict]}],
    "randoms": [{"global": dict, "own": torch.Tensor}],
    **dict.fromkeys(("kernels?", "records_sha256?"), (str, type(None))),
    "makers?": [{"step": int, **dict.fromkeys(("code", "torch", "device"), str), "threads?": (int, type(None))}],
    "telemetry?": Each(torch.Tensor),
    "outcome": {
        **dict.fromkeys(("accuracy_last", "accuracy_best", "epoch_best"), OPEN),
        **dict.fromkeys(("val_best?", "accuracy_at_best_val?"), OPEN),
        "seconds": NUMBER,
        "extra?": Each(OPEN),
    },
    "running": list,
}
# Numbers and options that trainings keep beside the weights; to build them runs no code of the file's.
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    *((f, f"numpy.{core}.multiarray.{f.__name__}") for f in (scalar, _reconstruct) for core in ("core", "_core")),
]


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with a hash of itself, so that a kill at any moment leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    comment = MARK + hashlib.sha256(data).hexdigest().encode()
    atomic_write(path, data[:-2] + len(comment).to_bytes(2, "little") + comment)  # zip ends with its comment's length


def load(path: Path) -> Any:
    """Read what torch.save wrote: tensors, plain values, and what is HARMLESS.

    Errors: UserError naming the file when it is missing, damaged, or holds an object that could run code.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    inner, mark, noted = data.rpartition(MARK)
    # more bytes behind it: it stands there by chance; fewer: the hash is cut off
    whole = not mark or len(noted) > 64 or hashlib.sha256(inner[:-2] + b"\0\0").hexdigest().encode() == noted
    try:
        if not whole:
            raise ValueError("it is not what was written: its hash differs")
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        if whole and (strange := _strange(data)):
            raise UserError(
                f"{path} is no plain checkpoint: it holds {strange}, and reading such an object could run any code. "
                "Save the weights alone, where you trust it: torch.save(model.state_dict(), FILE)"
            ) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a readable checkpoint ({first}). It was left as it is: delete it, or name another one."
        ) from error


def _strange(data: bytes) -> str:
    """The names of the classes or functions in a checkpoint that are not loaded; empty where it is damaged."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))[:3])
    except Exception:
        return ""


def load_net(path: Path) -> Any:
    """The content of a checkpoint; the model.pt of a finished run is compared with the hash in its result.json.

    Errors: UserError naming the file.
    """
    state, beside = load_any(path), path.parent / RESULT
    if path.name == "model.pt" and beside.is_file():
        noted = read_result(beside).get("weights_sha256")
        if noted and noted != (sha256_of(state) if isinstance(state, dict) else None):
            raise UserError(
                f"{path} is damaged: its weights are not those of {beside}; move the folder away to run again"
            )
    return state


def load_any(path: Path) -> Any:
    """`load`, or the tensors of a .safetensors file."""
    if path.suffix != ".safetensors":
        return load(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error


def sha256_of(state: Mapping[str, Any]) -> str:
    """SHA-256 over names and bytes of every tensor of a state_dict."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, torch.Tensor):
            sha.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def load_unfinished(path: Path) -> dict[str, Any]:
    """The checkpoint of an unfinished run.

    Errors: UserError naming the file, and the field that no run has written so.
    """
    content = load(path)
    with belonging(path, content, None):
        return dict(content)


@contextmanager
def belonging(path: Path, content: Any, total: int | None) -> Iterator[dict[str, Any]]:
    """The content of the checkpoint of a run of `total` steps (None: not known), while it is put back.

    Errors: UserError where it lacks something, does not fit, or is of a step that the run has not.
    """
    try:
        check(content, SHAPE)
        step = content["step"]
        if step < 0 or (total is not None and step > total):
            raise ValueError(f"it is of step {step}, the run has {total}")
        yield content
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not belong to this run: {error}") from error


def made_by(makers: list[dict[str, Any]], step: int, maker: Mapping[str, Any]) -> list[str]:
    """Note in `makers` by what the steps from `step` on are computed; says what is other than for those before.

    maker: code, torch, threads and device, each with its value.
    """
    before = makers[-1] if makers else maker
    changed = [k for k in maker if before.get(k) != maker[k]]
    if changed or not makers:
        makers.append({"step": step, **maker})
    told = [f"other {k}" if k == "code" else f"{k} {maker[k]} (before: {before.get(k)})" for k in changed]
    end = "the result may differ from that of a run in one go, and says so"
    return [f"continued with {', '.join(told)}: {end}"] if told else []


def random_state() -> dict[str, Any]:
    """The state of every global generator: torch (CPU and GPU), numpy, random."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def load_weights(model: nn.Module, path: Path, new_head: bool = False) -> list[str]:
    """Load the weights of the same architecture into `model`, by name where any name fits (see `weights.fit`).

    new_head: the last layer keeps its initialisation, so that the file may have another number of classes.
    Returns what there is to say, for the screen; empty when every tensor was there under its name.

    Errors: UserError naming the file and the tensors that do not fit.
    """
    given = weights.tensors_of(load_net(path), path)
    found, lines = weights.fit(model.state_dict(), given, path, new_head, ordered=path.suffix != ".safetensors")
    model.load_state_dict(found, strict=False)
    return lines
