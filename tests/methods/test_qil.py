"""QIL against numbers worked out by hand and against plain autograd (arXiv 1808.05779); the ladder of bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from yamls import config_of

from qbench.data import load
from qbench.methods.qil import LEAST_GAMMA, QIL
from qbench.methods.shared.ladder import Ladder, Progressive
from qbench.quant.layers import QuantLayer
from qbench.quant.method import StageState, State
from qbench.training.build import assemble
from qbench.training.trainer import Trainer

W = torch.tensor([-0.95, -0.55, -0.1, 0.25, 0.52, 0.79])  # with c = .5, d = .3: alpha 5/3, beta -1/3


def qil(bits: int = 3, site: str = "weight", c: float = 0.5, d: float = 0.3, **options: object) -> QIL:
    q = QIL(nn.Linear(6, 1), site, bits=bits, **{"rescale": False, "gradient_scale": 1, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        q.center.fill_(c)
        q.width.fill_(d)
    return q


def composed(x: Tensor, q: QIL, c: Tensor, d: Tensor, gamma: Tensor | None) -> Tensor:
    """The paper's two steps in torch's own operations: the transformer, and a round with gradient 1."""
    size = x.abs() if q.signed else x
    u = 0.5 / d * size + (0.5 - 0.5 * c / d)
    inside = u if gamma is None else u.clamp_min(1e-30) ** gamma
    t = torch.where(size < c - d, 0.0, torch.where(size > c + d, 1.0, inside))
    t = t * x.sign() if q.signed else t
    n = 2 ** (q.bits - 1) - 1 if q.signed else 2**q.bits - 1
    return t + ((t * n).round() / n - t).detach()


def test_the_worked_example() -> None:
    q, w = qil(), W.clone().requires_grad_()
    # t = -1, -.58333, 0, .08333, .53333, .98333; three steps
    hat = q(w)
    assert hat.tolist() == pytest.approx([-1, -2 / 3, 0, 0, 2 / 3, 1])
    of_w, of_c, of_d = torch.autograd.grad(hat[4], [w, q.center, q.width])
    assert of_w.tolist() == pytest.approx([0, 0, 0, 0, 5 / 3, 0])
    assert of_c.item() == pytest.approx(-1.66667, abs=1e-5)
    assert of_d.item() == pytest.approx(-0.11111, abs=1e-5)
    assert q.codes(W).tolist() == [-3, -2, 0, 0, 2, 3]
    assert q.levels == 7


def test_the_bounds_of_the_interval() -> None:
    x = torch.tensor([0.25, 0.75, -0.75, 0.7501], requires_grad=True)  # c - d, c + d, all exact
    qil(c=0.5, d=0.25)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 2, 0]  # 0.5 / d


@pytest.mark.parametrize("gamma", [None, 0.6, 1.7])
@pytest.mark.parametrize("site", ["weight", "input", "signed input"])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_values_and_gradients_are_those_of_autograd(site: str, bits: int, gamma: float | None) -> None:
    q = qil(bits, site.split()[-1], c=0.6, d=0.45, gamma=gamma is not None, gradient_scale=0.25)
    x = torch.randn(300, generator=torch.Generator().manual_seed(bits))
    x = x.abs() if site == "input" else x
    q.calibrate(x)
    assert q.signed == (site != "input")
    assert (q.gamma is not None) == (gamma is not None and site == "weight")
    found, wanted = [q.center, q.width], [torch.tensor(v, requires_grad=True) for v in (0.6, 0.45)]
    exponent = None
    if q.gamma is not None:
        with torch.no_grad():
            q.gamma.fill_(gamma)
        exponent = torch.tensor(gamma, requires_grad=True)
        found, wanted = [*found, q.gamma], [*wanted, exponent]
    a, b = (x.clone().requires_grad_() for _ in range(2))
    g = torch.randn(300, generator=torch.Generator().manual_seed(9))
    ours, theirs = q(a), composed(b, q, wanted[0], wanted[1], exponent)
    torch.testing.assert_close(ours, theirs)
    ours = torch.autograd.grad(ours, [a, *found], g)
    theirs = torch.autograd.grad(theirs, [b, *wanted], g)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, 0.25 * other, rtol=1e-3, atol=1e-3)


def test_an_edge_of_infinite_slope_has_none() -> None:
    q = qil(c=0.25, d=0.25, gamma=True)
    with torch.no_grad():
        q.gamma.fill_(0.5)  # type: ignore[union-attr]
    x = torch.tensor([0.0, 0.0], requires_grad=True)
    grads = torch.autograd.grad(q(x).sum(), [x, *q.parameters()])
    assert all(not g.any() for g in grads)


def test_parameters_out_of_range_are_read_at_its_ends() -> None:
    q = qil(c=0.1, d=0.3, gamma=True)  # c - d below 0: c is read as d
    with torch.no_grad():
        q.gamma.fill_(-1)  # type: ignore[union-attr]
    assert q(torch.tensor([0.0, 0.3])).tolist() == pytest.approx([0, round(3 * 0.5**LEAST_GAMMA) / 3])
    q = qil(c=0.4, d=-1.0)
    assert q(torch.tensor([0.3, -0.5])).tolist() == [0, -1]


def test_gradient_scales() -> None:
    x, sums = torch.full((2, 8), 0.6), []
    for scale, site in ((1, "input"), (0.01, "input"), ("lsq", "input"), ("lsq", "weight")):
        q = qil(2, site, gradient_scale=scale)
        q(x).sum().backward()
        assert q.center.grad is not None
        sums.append(q.center.grad.item() / (-16 * 0.5 / 0.3))
    assert sums == pytest.approx([1, 0.01, (8 * 3) ** -0.5, 16**-0.5])


def test_it_starts_from_0_to_the_end_of_least_error_and_keeps_the_size() -> None:
    q = QIL(nn.Linear(4, 1), "weight", bits=2)
    q.calibrate(torch.tensor([-0.4, 0.4, 0.4, 0.0]))
    q.finish_calibration()
    assert q.scale.item() == pytest.approx(0.4)
    assert q.center.item() == q.width.item()
    assert q(torch.tensor([-0.4, 0.4, 0.0])).tolist() == pytest.approx([-0.4, 0.4, 0])
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)).relu()
    for bits, error in ((2, 0.06), (4, 0.005)):
        q = QIL(nn.Linear(4, 1), "input", bits=bits)
        q.calibrate(x)
        q.finish_calibration()
        assert ((q(x) - x).square().sum() / x.square().sum()).item() < error
        plain = QIL(nn.Linear(4, 1), "input", bits=bits, init="scratch")
        plain.calibrate(x)
        plain.finish_calibration()
        assert torch.allclose(plain(x) * q.scale, q(x))
        assert plain.grid().tables() == {}


def test_an_input_without_a_value_keeps_its_start() -> None:
    q = QIL(nn.Linear(4, 1), "input", bits=2)
    q.calibrate(torch.zeros(1, 4))
    q.finish_calibration()
    assert (q.center.item(), q.scale.item()) == (0.5, 1)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 17}, {"gradient_scale": "no"}, {"gradient_scale": 0}])
def test_arguments_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        qil(**options)  # type: ignore[arg-type]


# --- the ladder


def test_a_rung_gives_its_bits_to_all_that_were_asked_for_fewer() -> None:
    net = nn.ModuleList([qil(2), qil(8), qil(3, "input")])
    state, ladder = State(net, torch.Generator()), Ladder([5, 4])
    for value, bits in ((5, [5, 8, 5]), (4, [4, 8, 4]), (None, [2, 8, 3])):
        state.stage = StageState(value=value)
        ladder.before_stage(state)
        assert [q.bits for q in net if isinstance(q, Progressive)] == bits
    ladder.before_stage(State(net, torch.Generator(), stage=StageState(value=5)))
    again = nn.ModuleList([qil(2), qil(8), qil(3, "input")])
    again.load_state_dict(net.state_dict())  # what is resumed within a rung has its bits
    assert [q.bits for q in again] == [5, 8, 5]
    assert torch.equal(again[0](W), net[0](W))


@pytest.mark.parametrize("rungs", [[3, 4], [4, 4], [0], [2.5]])
def test_rungs_that_do_not_fall_are_refused(rungs: list[int]) -> None:
    with pytest.raises(ValueError, match="bits of the ladder must"):
        Ladder(rungs)


def loop(folder: Path, *words: str) -> Trainer:
    small = ("model=tiny", "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=32", "dataset.size=8")
    here = ("budget=smoke", "device=cpu", "checkpoint_seconds=1e9", "tensorboard=false", "train.steps=8")
    net = assemble(config := config_of("method=qil", *small, *here, *words), load(config["dataset"]))
    made = net.trainer(folder)
    net.calibrate(made)
    return made


def test_the_papers_way_to_two_bits_in_stages_of_equal_length(tmp_path: Path) -> None:
    made = loop(tmp_path, "bits=2")
    seen: list[int] = []
    layer = next(m for m in made.model.modules() if isinstance(m, QuantLayer))
    layer.register_forward_pre_hook(lambda m, _: seen.append(m.weight_quantizer.bits) if m.training else None)  # type: ignore[union-attr]
    made.train()
    assert seen == [5, 5, 4, 4, 3, 3, 2, 2]
    assert [loop(tmp_path, *w).parts[0].stage.value for w in (["bits=4"], ["bits=8"])] == [5, None]
    assert [p.stage.name for p in loop(tmp_path, "bits=2", "options.ladder=[]").parts] == ["last"]
