"""INQ, by the numbers of arXiv 1702.03044: levels, partition, portions, and what a frozen weight withstands."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.cli.overrides import resolve_row
from qbench.data import load
from qbench.errors import UserError
from qbench.methods.inq import INQ, Freeze, power
from qbench.quant.layers import quant_layers
from qbench.quant.method import StageState, State
from qbench.training.build import assemble
from qbench.training.trainer import Trainer

W = torch.tensor([0.70, -0.34, 0.18, 0.09, -0.05])
EIGHT = torch.tensor([0.70, -0.34, 0.18, 0.09, -0.05, 0.02, 0.41, -0.60])
SMALL = ("model=tiny", "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=32", "dataset.size=8")
HERE = ("budget=smoke", "device=cpu", "train.batch_size=16", "checkpoint_seconds=1e9", "tensorboard=false")


def inq(w: Tensor = W, **options: Any) -> INQ:
    layer = nn.Linear(len(w), 1)
    layer.weight = nn.Parameter(w.clone().view(1, -1))
    q = INQ(layer, "weight", **options)  # type: ignore[arg-type]
    q.calibrate(layer.weight)
    return q


def rounded(q: INQ, *values: float) -> list[float]:
    return q.rounded(torch.tensor(values)).tolist()


def below(x: float) -> float:
    return torch.nextafter(torch.tensor(x), torch.tensor(0.0)).item()


def frozen(q: INQ) -> set[int]:
    return set(q.frozen.flatten().nonzero().flatten().tolist())


def loop(folder: Path, *words: str) -> Trainer:
    net = assemble(config := resolve_row(["method=inq", *SMALL, *HERE, *words]), load(config["dataset"]))
    made = net.trainer(folder)
    if not made.restore():
        net.calibrate(made)
    return made


def quantizers(made: Trainer) -> list[tuple[INQ, nn.Parameter]]:
    found = [(layer.weight_quantizer, layer.weight) for _, layer in quant_layers(made.model)]
    assert all(isinstance(q, INQ) for q, _ in found)
    return found  # type: ignore[return-value]


# --- the grid


@pytest.mark.parametrize(
    ("bits", "values"),
    [
        (5, [0.5, -0.25, 0.125, 0.0625, -0.0625]),
        (4, [0.5, -0.25, 0.125, 0.0625, -0.0625]),
        (3, [0.5, -0.25, 0.25, 0, 0]),
        (2, [0.5, -0.5, 0, 0, 0]),
    ],
)
def test_worked_examples(bits: int, values: list[float]) -> None:
    q = inq(bits=bits).eval()
    assert q(W.view(1, -1)).tolist() == [values]
    assert q.top(W).item() == 0.5  # n1 = floor(log2(4 * 0.7 / 3)) = -1
    lowest = {5: -8, 4: -4, 3: -2, 2: -1}[bits]  # n2; the paper: "if b = 3 and n1 = -1, it is easy to get n2 = -2"
    table = q.grid(W.view(1, -1)).values(torch.arange(2 ** (bits - 1) + 1)).tolist()
    assert table[0] == -0.5
    assert [v for v in table if v > 0] == [2.0**k for k in range(lowest, 0)]
    assert (q.levels, q.grid().width) == (2 ** (bits - 1) + 1, bits)


def test_bounds_belong_to_the_larger_value() -> None:
    q = inq(bits=3, growth="zero")  # 0, 1/4, 1/2
    assert rounded(q, 0.375, below(0.375), -0.375) == [0.5, 0.25, -0.5]  # (1/4 + 1/2) / 2
    assert rounded(q, 0.125, below(0.125), -0.125) == [0.25, 0, -0.25]  # (0 + 1/4) / 2
    assert rounded(q, below(0.75), 0.75, -0.75) == [0.5, 0, 0]  # 3/2 of 1/2: Eq. 4 to the letter
    assert rounded(inq(bits=3, growth="saturate"), 0.75, -9.0) == [0.5, -0.5]


@pytest.mark.parametrize("k", [-60, -3, 0, 5, 60])
def test_the_top_is_the_power_that_three_quarters_begin(k: int) -> None:
    x = torch.tensor([0.75, below(0.75), 1.0, below(1.5), 1.5]) * 2.0**k
    assert (power(x) / 2.0**k).tolist() == [1, 0.5, 1, 1, 2]
    assert power(torch.zeros(2)).tolist() == [0, 0]


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20), st.integers(2, 8))
def test_every_weight_goes_to_the_nearest_value_and_none_is_too_large(values: list[float], bits: int) -> None:
    """Where the grid follows the weights, Eq. 4 and the authors' saturation are one."""
    w = torch.tensor([1.0, *values])
    q = inq(w, bits=bits)
    table = q.grid(w.view(1, -1)).table.double()
    off = (w.double().view(-1, 1) - table).abs()
    ties = table.abs().masked_fill(off != off.amin(1, keepdim=True), -1)
    assert q.rounded(w).abs().tolist() == ties.amax(1).tolist()
    assert all(v * x >= 0 for v, x in zip(q.rounded(w).tolist(), w.tolist(), strict=True))


def test_codes_and_their_size() -> None:
    w = W.view(1, -1)
    q = inq(bits=3)
    codes = q.codes(w)
    assert codes.tolist() == [[4, 1, 3, 2, 2]]  # of -1/2, -1/4, 0, 1/4, 1/2
    assert q.grid(w).values(codes).equal(q.eval()(w))
    assert q.stored_bits(w) == (5 * 3, 32)  # 2^n1 is all that is stored beside them
    part = q.stored(w)["codes"]
    assert q.restored({"codes": part.unpack(part.pack())}).equal(codes)


def test_a_layer_of_zeros_stays_one() -> None:
    q = inq(torch.zeros(4))
    assert q.freeze(torch.zeros(1, 4), 0.5).tolist() == [[0] * 4]
    assert q.eval()(torch.zeros(1, 4)).tolist() == [[0] * 4]
    assert q.grid(torch.zeros(1, 4)).values(q.codes(torch.zeros(1, 4))).tolist() == [[0] * 4]


# --- portions


def test_the_largest_weights_first() -> None:
    q, w = inq(EIGHT), EIGHT.view(1, -1)
    for portion, more in ((0.5, {0, 1, 6, 7}), (0.75, {2, 3}), (0.875, {4}), (1, {5})):
        before = frozen(q)
        w = q.freeze(w, portion)
        assert frozen(q) - before == more
        assert before <= frozen(q)
    assert w.tolist() == [[0.5, -0.25, 0.125, 0.0625, -0.0625, 2.0**-6, 0.5, -0.5]]


def test_masks_accumulate_whatever_becomes_of_the_rest() -> None:
    """A free weight that outgrows a frozen one does not take its place; the largest of the free ones come next."""
    q = inq(EIGHT)
    w = q.freeze(EIGHT.view(1, -1), 0.5)
    assert w.tolist() == [[0.5, -0.25, *EIGHT[2:6].tolist(), 0.5, -0.5]]
    w[0, 5] = 0.65
    w[0, 0] = 0.0  # as nothing reads it
    assert q.freeze(w, 0.75).tolist() == [[0.5, -0.25, 0.125, *EIGHT[3:5].tolist(), 0.5, 0.5, -0.5]]
    assert frozen(q) == {0, 1, 2, 5, 6, 7}


def test_equal_weights_are_taken_in_order() -> None:
    q = inq(torch.ones(8))
    q.freeze(-torch.ones(1, 8), 0.5)
    assert frozen(q) == {0, 1, 2, 3}


def test_training_sees_frozen_and_free_weights_evaluation_the_grid() -> None:
    q, w = inq(EIGHT), EIGHT.view(1, -1).clone().requires_grad_()
    assert q(w).equal(w)  # nothing is frozen yet
    q.freeze(w, 0.5)
    for training, values in (
        (True, [0.5, -0.25, *EIGHT[2:6].tolist(), 0.5, -0.5]),
        (False, [0.5, -0.25, 0.125, 0.0625, -0.0625, 2.0**-6, 0.5, -0.5]),
    ):
        w.grad = None
        hat = q.train(training)(w)
        assert hat.tolist() == [values]
        hat.backward(torch.full((1, 8), 3.0))
        assert w.grad is not None
        assert w.grad.tolist() == [[0, 0, 3, 3, 3, 3, 0, 0]]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_update_moves_a_frozen_weight(optimizer: Any) -> None:
    q, w = inq(EIGHT), nn.Parameter(EIGHT.view(1, -1).clone())
    before = q.freeze(w, 0.5)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    sgd = optimizer([w], lr=0.5, weight_decay=0.3, **options)
    for _ in range(5):
        sgd.zero_grad()
        q(w).square().sum().backward()
        sgd.step()
    now, chosen = q(w), q.frozen.clone()
    assert now[chosen].equal(before[chosen])
    assert not (now == before)[~chosen].any()
    assert not w.detach()[chosen].equal(before[chosen])  # decay did move the latents, which nothing reads
    assert q.freeze(w, 0.75)[chosen].equal(before[chosen])


@pytest.mark.parametrize(
    ("growth", "values"),
    [
        ("follow", [1.0, 0.5, 0.5, 0.5]),  # n1 rises to 0: 1/4 is no longer on the grid, and nearest to 1/2 and to 0
        ("zero", [0.0, 0.5, 0.25, 0.25]),
        ("saturate", [0.5, 0.5, 0.25, 0.25]),
    ],
)
def test_a_weight_that_outgrows_the_grid(growth: str, values: list[float]) -> None:
    q = inq(torch.tensor([0.2, 0.6, 0.3, 0.25]), bits=3, growth=growth)
    w = q.freeze(torch.tensor([[0.2, 0.6, 0.3, 0.25]]), 0.75)
    assert w.tolist() == [[pytest.approx(0.2), 0.5, 0.25, 0.25]]
    w[0, 0] = 0.8
    assert q.eval()(w).tolist() == [values]
    assert q.freeze(w, 1).tolist() == [values]


def test_random_partition() -> None:
    w = torch.arange(1.0, 1001.0).view(1, -1)

    def order(seed: int) -> list[set[int]]:
        torch.manual_seed(seed)
        q = inq(w.view(-1), partition="random")
        torch.manual_seed(5)
        found = []
        for portion in (0.25, 0.5, 1):
            q.freeze(w, portion)
            found.append(frozen(q))
        return found

    first, second, everything = order(0)
    assert (len(first), len(second), len(everything)) == (250, 500, 1000)
    assert first < second
    assert 400 < sum(second) / 500 < 600  # the largest half would have 749.5, the smallest 249.5
    assert order(0) == [first, second, everything]  # whatever is drawn meanwhile
    assert order(1)[0] != first


def test_a_hook_without_a_value_freezes_all() -> None:
    made = loop(Path())
    hook = Freeze([0.5])
    for value, share in ((0.5, 0.5), (None, 1.0)):
        state = State(made.model, torch.Generator(), stage=StageState(value=value))
        hook.before_stage(state)
        for q, w in quantizers(made):
            assert q.frozen.float().mean().item() == pytest.approx(share, abs=0.5 / w.numel())
            assert w.detach()[q.frozen].equal(q.held[q.frozen])


# --- the run


@pytest.mark.parametrize(
    ("words", "portions"),
    [
        (["bits=5"], [0.5, 0.75, 0.875]),
        (["bits=4"], [0.3, 0.5, 0.8, 0.9, 0.95]),
        (["bits=3"], [0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95]),
        (["bits=2"], [0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975]),
        (["bits=5", "options.portions=[0.3,0.6,0.8]"], [0.3, 0.6, 0.8]),
    ],
)
def test_one_stage_for_each_portion_and_none_after_the_last(words: list[str], portions: list[float]) -> None:
    stages = resolve_row(["method=inq", *SMALL, "budget=smoke", *words, "train.steps=18"])["method"]["stages"]
    assert [s["name"] for s in stages] == [*(f"portion {p}" for p in portions), "all"]
    assert [s.get("value") for s in stages] == [*portions, None]
    assert [s["recipe"]["steps"] for s in stages][-1] == 0
    assert sum(s["recipe"]["steps"] for s in stages) == 18


def test_the_papers_recipe() -> None:
    found = {}
    for bits in (2, 3, 4, 5):
        config = resolve_row(["method=inq", f"bits={bits}", "budget=paper"])
        recipes = [s["recipe"] for s in config["method"]["stages"]]
        assert {(r["optimizer"], r["momentum"], r["nesterov"], r["schedule"]) for r in recipes} == {
            ("sgd", 0.9, False, "exponential")
        }
        found[bits] = (config["train"]["batch_size"], config["train"]["weight_decay"], config["train"]["epochs"])
        assert sum(r["epochs"] for r in recipes) == pytest.approx(found[bits][2])
    assert found == {2: (80, 5e-4, 30), 3: (80, 5e-4, 16), 4: (80, 5e-4, 8), 5: (80, 5e-4, 4)}


def test_all_layers_from_float_to_powers_of_two(tmp_path: Path) -> None:
    """In every step: masks only grow, and what is frozen keeps its value; at the end every layer is on its grid."""
    made = loop(tmp_path, "bits=4", "train.steps=10", "train.weight_decay=0.1", "train.momentum=0.9", "train.lr=0.02")
    seen: list[list[tuple[Tensor, Tensor]]] = []
    step = made._step

    def watched(x: Tensor, y: Tensor) -> None:
        step(x, y)
        seen.append([(q.frozen.clone(), q.present(w).detach().clone()) for q, w in quantizers(made)])

    made._step = watched  # type: ignore[method-assign]
    made.train()
    assert len(seen) == 10
    for now, then in pairwise(seen):
        for (mask, w), (later, v) in zip(now, then, strict=True):
            assert (later >= mask).all()
            assert v[mask].equal(w[mask])
            assert not v[~later].equal(w[~later])
    layers = [m for m in made.model.modules() if isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() > 1]  # type: ignore[operator,union-attr]
    assert len(quantizers(made)) == len(layers)
    for q, w in quantizers(made):
        assert q.frozen.all()
        table = q.grid(w.detach()).table
        assert torch.isin(w.detach(), table).all()
        assert w.detach().abs().amax() == table.amax()


class Cut(Exception):
    pass


@pytest.mark.parametrize(("partition", "cuts"), [("magnitude", (1, 4, 7, 9)), ("random", (4,))])
def test_cut_off_in_any_stage_it_ends_with_the_same_weights(
    partition: str, cuts: tuple[int, ...], tmp_path: Path
) -> None:
    words = ("bits=5", "train.steps=6", f"options.partition={partition}", "train.momentum=0.9")

    def saving(folder: Path, cut: int) -> Trainer:
        folder.mkdir()
        made = loop(folder, *words)
        made.checkpoint_seconds = -1
        saves, save = iter(range(1, 99)), made.save

        def counted() -> None:
            save()
            if next(saves) == cut:
                raise Cut

        made.save = counted  # type: ignore[method-assign]
        return made

    def weights(made: Trainer) -> dict[str, Tensor]:
        return {k: v for k, v in made.model.state_dict().items() if isinstance(v, Tensor)}

    straight, stages = saving(tmp_path / "straight", 0), []
    straight.train()
    for cut in cuts:  # each step is saved, and each stage as it begins
        made = saving(tmp_path / str(cut), cut)
        with pytest.raises(Cut):
            made.train()
        stages.append(made.state.stage.index)
        again = loop(made.folder, *words)
        torch.manual_seed(cut)
        again.train()
        assert all(v.equal(weights(again)[k]) for k, v in weights(straight).items()), cut
    assert stages == ([0, 1, 2, 3] if partition == "magnitude" else [1])


def test_in_place_of_the_papers_rule_first_and_last_layer_stay_in_float(tmp_path: Path) -> None:
    made = loop(tmp_path, "protocol=uniform")
    assert sum(isinstance(m, INQ) for m in made.model.modules()) == len(quantizers(loop(tmp_path))) - 2


# --- errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1}, r"bits must be a whole number in 2..8, got 1"),
        ({"bits": 9}, r"bits must be a whole number in 2..8, got 9"),
        ({"partition": "smallest"}, "partition must be one of magnitude, random, got 'smallest'"),
        ({"growth": "clip"}, "growth must be one of follow, zero, saturate, got 'clip'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        inq(**options)


@pytest.mark.parametrize("portions", ["[0.5,0.25]", "[0,0.5]", "[0.5,1]", "[1.5]", "[-0.5,0.5]", "[half]"])
def test_portions_that_do_not_rise(portions: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method=inq: portions must rise, each above 0 and below 1, got"):
        loop(tmp_path, f"options.portions={portions}")


@pytest.mark.parametrize("portions", ["0.5", "half", "[0.5,0.5]", "[]"])
def test_portions_that_make_no_stages(portions: str) -> None:
    with pytest.raises(UserError, match=r"must be a list|two stages are called|not to 1"):
        resolve_row(["method=inq", *SMALL, f"options.portions={portions}"])
