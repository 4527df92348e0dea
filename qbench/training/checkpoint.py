"""Atomic save and load of everything that decides the next step."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qbench.errors import UserError
from qbench.files import atomic_write


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that a kill at any moment leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def load(path: Path) -> Any:
    """Read what torch.save wrote (tensors and plain values only).

    Errors: UserError naming the file when it is missing, truncated or corrupt.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a readable checkpoint ({first}). It was left as it is: delete it, or name another one."
        ) from error


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


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a plain state_dict of the same architecture into `model`: by key, else by order and shape.

    A wrapper such as {'state_dict': ...} or {'model': ...} and a 'module.' prefix are taken off. Returns the lines of
    the mapping where keys differ, for the screen; empty when they were equal.

    Errors: UserError naming the file and the first tensor that does not fit.
    """
    content = load(path)
    for key in ("state_dict", "model", "net", "weights"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()) or not content:
        raise UserError(f"{path} holds no state_dict (a mapping from names to tensors)")
    given = {k.removeprefix("module."): v for k, v in content.items()}
    own = model.state_dict()
    if given.keys() == own.keys() and all(given[k].shape == own[k].shape for k in own):
        model.load_state_dict(given)
        return []
    skip = "num_batches_tracked"
    mine = [(k, v) for k, v in own.items() if not k.endswith(skip)]
    theirs = [(k, v) for k, v in given.items() if not k.endswith(skip)]
    for (k, v), (g, u) in zip(mine, theirs, strict=False):
        if v.shape != u.shape:
            raise UserError(
                f"{path} is of another architecture: {g} has shape {list(u.shape)} "
                f"where the model's {k} has {list(v.shape)}"
            )
    if len(mine) != len(theirs):
        raise UserError(f"{path} is of another architecture: it holds {len(theirs)} tensors, the model has {len(mine)}")
    model.load_state_dict({k: u for (k, _), (_, u) in zip(mine, theirs, strict=True)}, strict=False)
    return [f"{g} -> {k}" for (k, _), (g, _) in zip(mine, theirs, strict=True) if g != k]
