"""Each layer alone at low bits, and bits for each layer within a budget."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qbench.cli.overrides import resolve_row
from qbench.errors import UserError
from qbench.screen import Screen
from qbench.training import evaluation
from qbench.training.build import assemble
from qbench.training.run import prepare, start_from_file
from qbench.training.sensitivity import _images, choose, scan

Cli = Callable[..., Any]


def scanned(seed: int, sites: str = "both") -> dict[str, Any]:
    draw = random.Random(seed)
    layers = {
        f"l{i}": {
            "weights": draw.randint(10, 5000),
            "macs": draw.randint(100, 90000),
            **{str(b): {"loss": draw.random() * 4 / b} for b in (2, 4, 8)},
        }
        for i in range(5)
    }
    return {"sites": sites, "widths": [2, 4, 8], "float": {"loss": 0.1}, "layers": layers}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("sites", "size", "bops"), [("both", 4.0, None), ("both", None, 20.0), ("weights", 5.0, 150.0)]
)
def test_the_choice_is_the_best_of_all_that_fit(seed: int, sites: str, size: float | None, bops: float | None) -> None:
    found = scanned(seed, sites)
    layers = found["layers"].values()

    def mean(of: str, bits: tuple[int, ...]) -> float:
        price = [b if of == "weights" else b * (b if sites == "both" else 32) for b in bits]
        return sum(r[of] * p for r, p in zip(layers, price, strict=True)) / sum(r[of] for r in layers)

    fit = [
        bits
        for bits in itertools.product((2, 4, 8), repeat=5)
        if (size is None or mean("weights", bits) <= size) and (bops is None or mean("macs", bits) <= bops)
    ]
    best = min(fit, key=lambda bits: sum(r[str(b)]["loss"] for r, b in zip(layers, bits, strict=True)))
    assert tuple(choose(found, size=size, bops=bops).values()) == best


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(UserError, match=r"size=1\.5 is less than the fewest bits of this scan need \(2\)"):
        choose(scanned(0), size=1.5)


def test_a_layer_alone_is_what_a_run_with_that_layer_alone_evaluates(tiny: Cli, tmp_path: Path) -> None:
    data = ("dataset=synthetic", "model=tiny", "budget=smoke", "device=cpu")
    tiny("method=float", "out=o")
    (parent,) = (tmp_path / "o").glob("float-*")
    words = ["method=ptq", *data, f"init={parent}", "protocol=uniform"]
    found = scan(resolve_row([*words, "layer_bits={*:2}"]), [2, 5], "both", 100, Screen(quiet=True))
    names = list(found["layers"])
    assert len(names) == 3
    assert found["float"]["images"] == 100
    for name in names:
        run = prepare(resolve_row([*words, "bits=32", f"layer_bits={{{name}:2}}"]))
        net = assemble(run.config, run.data, lambda model, run=run: start_from_file(run, model, Screen(quiet=True)))
        net.calibrate(net.trainer())
        loss, accuracy = evaluation.evaluate(net.model, _images(net, 100), net.place, "fp32")
        assert found["layers"][name]["2"] == pytest.approx({"loss": loss, "accuracy": accuracy})
    assert found["layers"][names[0]]["2"]["loss"] != found["float"]["loss"]


def test_the_command_leaves_a_table_a_picture_and_a_file_for_layer_bits(tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    (parent,) = (tmp_path / "o").glob("float-*")
    said = cli("sensitivity", parent, "bits=2,4", "size=3", "images=50", "out=s")
    assert said.status == 0, said.err
    (folder,) = (tmp_path / "s").iterdir()
    assert {p.name for p in folder.iterdir()} == {"sensitivity.json", "sensitivity.png", "layer_bits.yaml"}
    found = json.loads((folder / "sensitivity.json").read_text())
    plan = yaml.safe_load((folder / "layer_bits.yaml").read_text())
    assert list(plan) == list(found["layers"])
    assert set(plan.values()) <= {"2/2", "4/4"}
    said = tiny("method=ptq", "protocol=uniform", f"layer_bits={folder / 'layer_bits.yaml'}", "out=o")
    assert said.status == 0, said.err
    assert list((tmp_path / "o").glob("ptq-w8a8-mixed-*/result.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "takes a run's folder first"),
        (("nowhere",), "no such run: nowhere"),
        (("RUN", "bist=2"), "Did you mean 'bits'?"),
        (("RUN", "bits=two"), "bits must be whole numbers of bits in 1..16"),
        (("RUN", "sites=weight"), "Did you mean 'weights'?"),
        (("RUN", "images=0"), "images must be a whole number"),
        (("RUN", "size=1"), "size=1 is less than the fewest bits"),
        (("RUN", "method=twn"), "method=twn takes 32"),
    ],
)
def test_wrong_words_are_answered(words: tuple[str, ...], said: str, tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    run = ""
    if "RUN" in words:
        tiny("method=float", "out=o")
        (run,) = map(str, (tmp_path / "o").glob("float-*"))
    found = cli("sensitivity", *(w.replace("RUN", run) if w == "RUN" else w for w in words))
    assert found.status == 2
    assert said in found.err
