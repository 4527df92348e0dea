"""Data sets that need no file: scikit-learn's digits and a synthetic one."""

import gzip
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qbench.data.splits import Split
from qbench.errors import UserError

DIGITS_TRAIN = 898
LARGEST = 1 << 33  # values of a synthetic set


def digits(config: Mapping[str, Any]) -> tuple[Split, Split]:
    """The 1,797 handwritten digits that come with scikit-learn: the first 898 to train, the other 899 to test.

    The order is kept, as in scikit-learn's own example of classification. Neighbours come from one hand, so a random
    split is easier: of one of 1,437 and 360, ResNet-20 has every test image right, and nothing is left to compare.

    Grey values 0..16 become 0..255; 8 x 8 pixels are upsampled to 16 x 16 by bilinear interpolation.
    """
    table = torch.from_numpy(_digits_table())
    grey = table[:, :64].float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(grey, scale_factor=2.0, mode="bilinear").round().to(torch.uint8)
    whole = Split(images, table[:, 64].long())
    order = torch.arange(len(whole))
    return whole.take(order[:DIGITS_TRAIN]), whole.take(order[DIGITS_TRAIN:])


def _digits_table() -> np.ndarray:
    """scikit-learn's file of digits, float64 [1797, 65]: 64 grey values and the label.

    Read by path, since importing scikit-learn takes a second; by its own reader where the file lies elsewhere.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    return np.column_stack(load_digits(return_X_y=True))


def synthetic(config: Mapping[str, Any]) -> tuple[Split, Split]:
    """A learnable task from a seed: one smooth random pattern per class, and white noise on every image.

    pixel = clip(127.5 + 64 * pattern[label] + 64 * noise * N(0, 1)) with patterns of unit variance: `noise` is the
    noise-to-signal ratio of a pixel. Keys: train_size, test_size, classes, channels, size, seed, noise.

    Errors: UserError on a number that is missing, MemoryError on more than LARGEST values.
    """
    for key in ("train_size", "test_size", "classes", "channels", "size"):
        if config.get(key) is None:
            raise UserError(f"dataset.{key} must be a positive whole number, got {config.get(key)!r}")
    classes, channels, size = config["classes"], config["channels"], config["size"]
    if (values := (config["train_size"] + config["test_size"] + classes) * channels * size**2) > LARGEST:
        raise MemoryError(f"{values:,} values")
    random = np.random.default_rng(config.get("seed", 0))
    coarse = torch.from_numpy(random.standard_normal((classes, channels, 4, 4), dtype=np.float32))
    patterns = F.interpolate(coarse, size=(size, size), mode="bilinear")
    patterns = (patterns - patterns.mean((1, 2, 3), keepdim=True)) / patterns.std((1, 2, 3), keepdim=True)

    def split(count: int) -> Split:
        labels = torch.arange(count) % classes
        noise = torch.from_numpy(random.standard_normal((count, channels, size, size), dtype=np.float32))
        pixels = 127.5 + 64 * patterns[labels] + 64 * float(config.get("noise", 1.0)) * noise
        return Split(pixels.clamp(0, 255).round().to(torch.uint8), labels)

    return split(config["train_size"]), split(config["test_size"])
