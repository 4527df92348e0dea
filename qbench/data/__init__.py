"""Data sets as one uint8 tensor on the device, augmented on whole batches; and a stream for sets too large for that."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qbench.config import data as options
from qbench.config.data import AUGMENTATIONS, PREPROCESSINGS, STREAM_AUGMENTATIONS
from qbench.data.batching import Batches
from qbench.data.generated import digits, synthetic
from qbench.data.sources import ORIGINALS, check_published, image_folder, original
from qbench.data.splits import DataSet, Source, Split, Stream, draw
from qbench.data.stream import StreamBatches, batches, image_stream, imagenet
from qbench.errors import UserError, unknown

__all__ = ["Batches", "DataSet", "Source", "Split", "Stream", "StreamBatches", "batches", "load"]

log = logging.getLogger(__name__)
READERS: dict[str, Callable[[Mapping[str, Any]], tuple[Source, Source]]] = {
    "digits": digits,
    "synthetic": synthetic,
    "image_folder": image_folder,
    "image_stream": image_stream,
    "imagenet": imagenet,
    **dict.fromkeys(ORIGINALS, original),
}


def load(config: Mapping[str, Any]) -> DataSet:
    """The data set that a `dataset` node describes; keys as in conf/dataset/*.yaml, checked by `options`.

    Errors: UserError for a name, file or number that does not fit.
    """
    if "name" not in config:
        raise UserError(f"dataset.name is missing; available: {', '.join(sorted(READERS))}")
    name = str(config["name"])
    if name not in READERS:
        raise unknown("data set", name, READERS)
    options.check(name, config)
    config = {**config, "root": _root(config.get("root", "data"))}
    whole_train, whole_test = _read(name, config)
    check_published(config, whole_train, whole_test)
    if whole_train.digest == whole_test.digest:
        log.warning("%s at %s: the images to train and to test are the same", name, config["root"])
    train, test, val, checksum = draw(whole_train, whole_test, config)
    classes = int(config.get("classes") or whole_train.labels.max() + 1)
    channels, size = _shape(config, whole_train)
    largest = int(max(whole_train.labels.max(), whole_test.labels.max()))
    if largest >= classes:
        raise UserError(f"dataset.classes={classes}, but {name} at {config['root']} holds {largest + 1} classes")
    mean, std = _mean_std(config, whole_train, channels)
    augment = str(config.get("augment") or "none")
    allowed = STREAM_AUGMENTATIONS if isinstance(whole_train, Stream) else AUGMENTATIONS
    if augment not in allowed:
        raise UserError(f"dataset.augment must be one of {', '.join(allowed)} for {name}, got '{augment}'")
    preprocess = str(config.get("preprocess") or "standard")
    if preprocess not in PREPROCESSINGS or (preprocess != "standard" and isinstance(train, Stream)):
        raise UserError(f"dataset.preprocess must be one of {', '.join(PREPROCESSINGS)} for {name}, got '{preprocess}'")
    return DataSet(name, train, test, val, classes, channels, size, mean, std, augment, checksum, preprocess)


def _root(root: Any) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"dataset.root={root}: whose home folder '~' means is not known; write the whole path"
        ) from error


def _read(name: str, config: Mapping[str, Any]) -> tuple[Source, Source]:
    try:
        return READERS[name](config)
    except MemoryError as error:
        raise UserError(
            f"the images of dataset={name} do not fit into memory ({error}); a smaller dataset.size takes less, and "
            "dataset=image_stream reads them from disk as they are needed"
        ) from error
    except OSError as error:  # of the file system; what reads files knows what it expects of their content
        where = error.filename or config["root"]
        raise UserError(
            f"cannot read {where}: {error.strerror or error}; dataset.root says where the data lie"
        ) from error


def _shape(config: Mapping[str, Any], train: Source) -> tuple[int, int]:
    """(channels, size) of the images, which are what the configuration says where it says it."""
    if isinstance(train, Stream):
        return 3, train.size
    shape = tuple(train.images.shape[1:])
    asked = (config.get("channels") or shape[0], config.get("size") or shape[1], config.get("size") or shape[2])
    if shape != asked:
        raise UserError(f"dataset {config['name']}: the images are {shape} (channels, height, width), asked {asked}")
    return shape[0], shape[1]


def _mean_std(config: Mapping[str, Any], train: Source, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The configured mean and std, or those of the training pixels where they are null."""
    mean, std = config.get("mean"), config.get("std")
    if (mean is None or std is None) and isinstance(train, Split):
        pixels = train.images.float().div_(255)
        mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).clamp(min=1e-3).tolist()
    if mean is None or std is None or len(mean) != channels or len(std) != channels:
        raise UserError(f"dataset.mean and dataset.std need {channels} values each; got {mean} and {std}")
    return tuple(map(float, mean)), tuple(map(float, std))
