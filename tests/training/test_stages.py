"""Stages: lengths by shares, own recipes, what is quantized, acting units, and resuming in each of them."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.cli.overrides import resolve_row
from qbench.config.recipe import Recipe
from qbench.config.stages import lengths, listed
from qbench.data import load
from qbench.errors import UserError
from qbench.quant.layers import quant_layers
from qbench.quant.method import Done, Hook, Method, Stage, State
from qbench.records import read_metrics
from qbench.training.build import assemble
from qbench.training.interrupt import Interrupted
from qbench.training.recorder import Recorder
from qbench.training.trainer import Trainer

BASE = ("model=tiny", "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=32", "dataset.size=8")
HERE = ("budget=smoke", "device=cpu", "train.batch_size=16", "checkpoint_seconds=1e9", "tensorboard=false")


# --- words


def test_one_stage_for_each_value() -> None:
    found = listed([{"name": "portion {value}", "each": [0.5, 1.0], "share": 0.2}, {"name": "rest"}], "m")
    assert found == [
        {"name": "portion 0.5", "share": 0.2, "value": 0.5},
        {"name": "portion 1.0", "share": 0.2, "value": 1.0},
        {"name": "rest"},
    ]


@pytest.mark.parametrize(
    ("stages", "train", "want"),
    [
        ([{"share": 0.25}, {}], {"epochs": 8}, [{"epochs": 2.0}, {"epochs": 6.0}]),
        ([{}, {}, {}], {"steps": 10}, [{"steps": 3}, {"steps": 4}, {"steps": 3}]),
        ([{"share": 0.25}, {"share": 0.25}, {}], {"steps": 2}, [{"steps": 0}, {"steps": 1}, {"steps": 1}]),
        ([{"act": {}}, {"share": 1}], {"epochs": 3}, [{"steps": 0}, {"epochs": 3.0}]),
        ([{"epochs": 2}, {"steps": 5}, {}], {"epochs": 3}, [{"epochs": 2}, {"steps": 5}, {"epochs": 3.0}]),
        ([{}, {"share": 0}], {"epochs": 3}, [{"epochs": 3.0}, {"epochs": 0}]),
    ],
)
def test_lengths(stages: list[dict[str, Any]], train: dict[str, Any], want: list[dict[str, Any]]) -> None:
    assert lengths(stages, train) == want


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"name": "a"}, {"name": "a"}], "two stages are called 'a'"),
        ([{"name": "a", "share": 0.5, "epochs": 1}], "has share and epochs; give one"),
        ([{"name": "a", "each": 3}], "must be a list: 3"),
        ([{"name": "a", "share": 2}], "must be in 0..1, got 2"),
        ([{"name": "a", "share": 0.7}, {"name": "b", "share": 0.7}], "add up to 1.4"),
        ([{"name": "a", "share": 0.7}], "add up to 0.7, not to 1"),
    ],
)
def test_words_that_make_no_stages(stages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        lengths(listed(stages, "m"), {"epochs": 1})


def test_recipes_of_stages_are_whole_and_the_user_wins() -> None:
    config = resolve_row(["method=reactnet", *BASE, *HERE[1:], "train.steps=10", "budget=short"])
    first, second = config["method"]["stages"]
    assert (first["recipe"]["steps"], second["recipe"]["steps"]) == (5, 5)
    assert (first["recipe"]["weight_decay"], second["recipe"]["weight_decay"]) == (1e-5, 0.0)
    assert {s["recipe"]["schedule"] for s in (first, second)} == {"linear"}
    config = resolve_row(["method=reactnet", *BASE, *HERE, "train.steps=10", "train.schedule=cosine", "train.lr=0.3"])
    assert {(s["recipe"]["schedule"], s["recipe"]["lr"]) for s in config["method"]["stages"]} == {("cosine", 0.3)}
    config = resolve_row(["method=bireal", *BASE, "budget=paper"])
    assert [s["recipe"]["milestones"] for s in config["method"]["stages"]] == [(6, 8), (6, 8), (10, 14)]


# --- the loop


class Watch(Hook):
    """Notes what each step and each stage saw."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []
        self.begun: list[str] = []

    def before_stage(self, state: State) -> None:
        self.begun.append(state.stage.name)

    def before_step(self, state: State) -> None:
        layers = [layer for _, layer in quant_layers(state.model) if layer.weight_quantizer and layer.input_quantizer]
        on = [(lay.weight_quantizer.enabled, lay.input_quantizer.enabled) for lay in layers]
        group = state.optimizer.param_groups[0]
        self.steps.append(
            (state.stage.name, state.stage.step, *on[0], round(group["lr"], 9), len(state.optimizer.state))
        )


class Noise:
    """Acts on one layer after the other: adds to its weight what the global generator draws."""

    def __call__(self, state: State) -> Iterator[Done]:
        layers = [(n, m) for n, m in state.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        layers += [(n, m) for n, m in quant_layers(state.model)]
        for name, layer in layers[state.stage.step :]:
            with torch.no_grad():
                layer.weight.add_(0.01 * torch.randn(layer.weight.shape))
            yield Done(name, len(layers), {"size": float(layer.weight.detach().abs().mean())})


def stage(name: str, steps: int, **more: Any) -> Stage:
    recipe = {
        "batch_size": 16,
        "steps": steps,
        "lr": 0.05,
        "momentum": 0.9,
        "schedule": "linear",
        **more.pop("recipe", {}),
    }
    return Stage(name, recipe=asdict(Recipe(**recipe)), **more)


def loop(folder: Path, stages: list[Stage], recorder: Recorder | None = None) -> tuple[Trainer, Watch]:
    config = resolve_row(["method=lsq", "bits=2", *BASE, *HERE])
    net, watch = assemble(config, load(config["dataset"])), Watch()
    net.method = Method("m", "", "qat", rules=net.method.rules, hooks=[watch], stages=stages)
    made = net.trainer(folder, recorder)
    if not made.restore():
        net.calibrate(made)
    return made, watch


def three() -> list[Stage]:
    return [
        stage("float", 3, quantize=[]),
        stage("act", 0, act=Noise()),
        stage("both", 4, recipe={"optimizer": "adam", "lr": 0.01}),
    ]


def weights(made: Trainer) -> dict[str, Tensor]:
    return {k: v for k, v in made.model.state_dict().items() if isinstance(v, Tensor)}


def test_each_stage_has_its_recipe_its_sites_and_a_fresh_optimizer(tmp_path: Path) -> None:
    made, watch = loop(tmp_path, three())
    made.train()
    assert watch.begun == ["float", "act", "both"]
    assert watch.steps == [
        ("float", 0, False, False, 0.05, 0),
        ("float", 1, False, False, round(0.05 * 2 / 3, 9), 8),  # the steps of quantizers have no gradient yet
        ("float", 2, False, False, round(0.05 / 3, 9), 8),
        ("both", 0, True, True, 0.01, 0),
        ("both", 1, True, True, 0.0075, 14),
        ("both", 2, True, True, 0.005, 14),
        ("both", 3, True, True, 0.0025, 14),
    ]
    assert made.total == made.state.step == 7


def test_a_stage_of_no_length_is_entered_all_the_same(tmp_path: Path) -> None:
    made, watch = loop(tmp_path, [stage("a", 2), stage("last", 0)])
    outcome = made.train()
    assert watch.begun == ["a", "last"]
    assert outcome.accuracy_last is not None


def test_an_evaluation_in_float_is_no_best_one(tmp_path: Path) -> None:
    made, _ = loop(tmp_path, [stage("float", 4, quantize=["weight"]), stage("both", 4)])
    outcome = made.train()
    assert outcome.epoch_best == 2.0  # of 4 steps each


class Cut(Exception):
    pass


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_run_cut_off_in_any_stage_ends_with_the_same_weights(cut: int, tmp_path: Path) -> None:
    """Cut after the `cut`-th save: of every step, unit and stage there is one."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with closing(Recorder(tmp_path / "a", tensorboard=False)) as recorder:
        straight, _ = loop(tmp_path / "a", three(), recorder)
        straight.checkpoint_seconds = -1
        straight.train()
    saves = 0

    def counting(save: Callable[[], None]) -> Callable[[], None]:
        def counted() -> None:
            nonlocal saves
            save()
            saves += 1
            if saves == cut:
                raise Cut

        return counted

    with closing(Recorder(tmp_path / "b", tensorboard=False)) as recorder:
        made, _ = loop(tmp_path / "b", three(), recorder)
        made.checkpoint_seconds = -1
        made.save = counting(made.save)  # type: ignore[method-assign]
        with pytest.raises(Cut):
            made.train()
    kept = torch.load(made.checkpoint_path, weights_only=True)
    torch.manual_seed(123)
    resumed = {"resume_step": kept["step"], "resume_records": kept["records"]}
    with closing(Recorder(tmp_path / "b", tensorboard=False, **resumed)) as recorder:
        again, _ = loop(tmp_path / "b", three(), recorder)
        again.train()
    assert all(v.equal(weights(again)[k]) for k, v in weights(straight).items())
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")


def test_an_acting_stage_can_be_interrupted(tmp_path: Path) -> None:
    made, _ = loop(tmp_path, three())
    real = made.save

    def save() -> None:
        real()
        made.stop._asked = made.state.stage.name == "act" and made.state.stage.step == 2

    made.save = save  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped in stage act, 2 of 3 done"):
        made.train()
    assert loop(tmp_path, three())[0].where() == "in stage act, 2 done"
