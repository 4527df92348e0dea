"""configuration -> net and method; the only caller of Hydra's instantiate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from qbench.config.resolve import digest
from qbench.data import DataSet
from qbench.errors import UserError
from qbench.quant import surgery
from qbench.quant.method import Method
from qbench.training import checkpoint


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """A constructor's ValueError or TypeError, also through Hydra's wrapping, becomes a UserError."""
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, (ValueError, TypeError, UserError, ImportError)):
            raise UserError(f"{what}: {cause or str(error).splitlines()[0]}") from error
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: {error}") from error


def make_model(config: Mapping[str, Any], data: DataSet) -> nn.Module:
    """The float net for this data set, initialised from the run's seed."""
    options = {k: v for k, v in config["model"].items() if k != "name"}
    checkpoint.seed_all(seed_of(config["seed"], "init"))
    with clear_errors(f"model={config['model']['name']}"):
        model = instantiate(options, channels=data.channels, classes=data.classes, size=data.size, _convert_="all")
    return model  # type: ignore[no-any-return]


def make_method(config: Mapping[str, Any]) -> Method:
    """The Method that the configuration declares."""
    node = {k: v for k, v in config["method"].items() if v is not None}
    with clear_errors(f"method={node['name']}"):
        if "_target_" not in node:
            return Method(**{"title": "", "family": "float", **node})
        return instantiate(node, _convert_="all")  # type: ignore[no-any-return]


def quantize(config: Mapping[str, Any], model: nn.Module, method: Method) -> dict[str, str]:
    """Surgery with the method's rules; returns what was kept, and why."""
    checkpoint.seed_all(seed_of(config["seed"], "surgery"))
    with clear_errors(f"method={method.name} on model={config['model']['name']}"):
        return surgery.quantize(model, method.rules)


def seed_of(seed: int, phase: str) -> int:
    """The seed of one phase of a run, so that phases do not depend on each other's draws."""
    return int(digest([seed, phase]), 16) % 2**31


def place_net(model: nn.Module, place: torch.device, channels_last: bool) -> nn.Module:
    """`model` on its device; with `channels_last` its four-dimensional parameters in that order (others have none)."""
    model.to(place)
    for p in model.parameters() if channels_last else ():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model
