"""Configurations for tests: a run's without composing the same files again, a Method's from its YAML alone."""

from copy import deepcopy
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qbench.cli.overrides import compose
from qbench.config import catalog
from qbench.config.resolve import resolve, wanted
from qbench.config.stages import lengths, listed
from qbench.quant.method import Method
from qbench.training.build import make_method


@cache
def composed(*files: str) -> DictConfig:
    """`compose`, once for each choice of files (method=lsq, model=tiny)."""
    return compose([*files])


def config_of(*words: str) -> dict[str, Any]:
    """What `resolve_row` gives, a tenth of a second sooner where these files were composed before."""
    files = [w for w in words if w.partition("=")[0] in catalog.GROUPS]
    whole = deepcopy(composed(*sorted(files)))
    whole.merge_with_dotlist([w for w in words if w not in files])
    return resolve(whole)


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
