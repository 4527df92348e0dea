"""The stages of a training: which steps are whose, and what is quantized in each."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qbench.config.recipe import Recipe
from qbench.quant.method import SITES, Method, Stage
from qbench.quant.passes import at_site


@dataclass(frozen=True)
class Part:
    """A stage with its whole recipe, its first step in the training and its number of steps."""

    stage: Stage
    recipe: Recipe
    first: int
    steps: int


def parts(method: Method, recipe: Recipe, steps_per_epoch: int) -> list[Part]:
    """The stages of a method in order; a method without any has one, which trains by `recipe`."""
    if not method.stages:
        return [Part(Stage("train"), recipe, 0, recipe.total_steps(steps_per_epoch))]
    out: list[Part] = []
    for stage in method.stages:
        own = Recipe(**stage.recipe)
        first = out[-1].first + out[-1].steps if out else 0
        out.append(Part(stage, own, first, 0 if stage.act else own.total_steps(steps_per_epoch)))
    return out


def switch(model: nn.Module, sites: Sequence[str]) -> None:
    """Quantize at these sites and leave the others in float; a quantizer in place of a ReLU counts as 'input'."""
    for site in SITES:
        for q in at_site(model, site):
            q.enabled = site in sites
