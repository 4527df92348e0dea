"""A Method from its YAML alone, without the rest of the configuration."""

from typing import Any

from omegaconf import OmegaConf

from qbench.config.resolve import wanted
from qbench.config.stages import lengths, listed
from qbench.quant.method import Method
from qbench.training.build import make_method


def method_of(conf: Any) -> Method:
    """The Method that `conf`, a file of conf/method with bits and options filled in, declares."""
    plain: dict[str, Any] = OmegaConf.to_container(conf, resolve=True)  # type: ignore[assignment]
    node = plain["method"]
    stages = listed(node.get("stages") or [], node["name"])
    whole = [
        {**s, "recipe": {**(s.get("recipe") or {}), **n}}
        for s, n in zip(stages, lengths(stages, {"steps": 10}), strict=True)
    ]
    return make_method({"method": {**node, "rules": wanted(node["rules"], plain["options"]), "stages": whole}})
