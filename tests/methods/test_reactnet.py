"""ReActNet: RSign and RPReLU by hand, the loss without labels, channels of a ReLU, two-step training."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn import functional as F
from yamls import method_of

from qbench.cli.overrides import resolve_row
from qbench.data import load
from qbench.methods.reactnet import RPReLU, RSign
from qbench.models.resnet import ResNetCIFAR
from qbench.models.vgg_small import VGGSmall
from qbench.quant import layers, surgery
from qbench.quant.method import Method
from qbench.training.build import assemble, make_model
from qbench.training.stages import switch


def reactnet(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/reactnet.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits = conf.a_bits = 1
    conf.options.update(options)
    return method_of(conf)


def test_rsign_by_hand() -> None:
    """alpha = (.5, -1): x - alpha = (0, -.75) and (.5, 2); slopes 2, .5 and 1, 0."""
    q = RSign(nn.Linear(2, 3), "input")  # type: ignore[arg-type]
    with torch.no_grad():
        q.alpha.copy_(torch.tensor([0.5, -1.0]))
    x = torch.tensor([[0.5, -0.5], [-0.25, 1.0]], requires_grad=True)
    y = q(x)
    assert y.tolist() == [[1, 1], [-1, 1]]
    y.backward(torch.tensor([[1.0, 10.0], [100.0, 1000.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[2, 10], [50, 0]]
    assert q.alpha.grad is not None
    assert q.alpha.grad.tolist() == [-52, -10]


def test_rsign_of_images_and_groups() -> None:
    q = RSign(layers.QuantLayer(nn.Conv2d(6, 4, 3, groups=2)), "input")
    with torch.no_grad():
        q.alpha.copy_(torch.arange(6.0))
    x = torch.full((2, 6, 3, 3), 2.5)
    assert q(x)[0, :, 0, 0].tolist() == [1, 1, 1, -1, -1, -1]


def test_rprelu_by_hand() -> None:
    """gamma = 1, beta = .25, zeta = 2: y = x - 1 + 2 above 1, .25 (x - 1) + 2 below."""
    act = RPReLU(nn.ReLU(), "replace", channels=1)
    with torch.no_grad():
        act.gamma.fill_(1)
        act.zeta.fill_(2)
    x = torch.tensor([[3.0], [1.0], [-1.0]], requires_grad=True)
    y = act(x)
    assert y.flatten().tolist() == [4, 2, 1.5]
    y.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 2.5, 25]
    assert float(act.gamma.grad) == -28.5  # type: ignore[arg-type]
    assert float(act.zeta.grad) == 111  # type: ignore[arg-type]
    assert float(act.beta.grad) == -200  # type: ignore[arg-type]


def test_a_fresh_rprelu_is_a_prelu() -> None:
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(RPReLU(nn.ReLU(), "replace", channels=3)(x), F.prelu(x, torch.tensor([0.25])))
    assert RPReLU(nn.ReLU(), "replace", channels=3)(x.bfloat16()).dtype == torch.bfloat16


def test_the_teacher_alone_teaches(tmp_path: Path) -> None:
    """distill.labels=0: the loss is KL(teacher || student), the paper's Eq. 10 but for a constant."""
    words = ["method=reactnet", "model=tiny", "dataset=synthetic", "budget=smoke", "device=cpu"]
    config = resolve_row(words)
    assert config["distill"] | {"weight": 1.0, "temperature": 1.0, "labels": 0.0} == config["distill"]
    net = assemble(config, load(config["dataset"]))
    teacher = make_model({**config, "seed": 1}, net.data).eval()
    loop = net.trainer(tmp_path, teacher=teacher)
    state = loop.state
    state.inputs, state.labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1])
    net.model.eval()
    loss = loop._forward_backward(1.0)
    target = teacher(state.inputs).softmax(1)
    assert state.logits is not None
    want = (target * (target.log() - state.logits.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-6)
    assert resolve_row([*words, "distill.weight=0"])["distill"]["weight"] == 0
    assert assemble(resolve_row([*words, "distill.weight=0"]), net.data).trainer(tmp_path).labels_weight == 1


def test_channels_of_what_reaches_a_module() -> None:
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut_per_conv=True)
    found = surgery.channels(net)
    relus = {n: found[n] for n, m in net.named_modules() if isinstance(m, nn.ReLU)}
    assert list(relus.values()) == [16, 16, 16, 32, 32, 64, 64]
    assert surgery.channels(VGGSmall(channels=3, classes=10, size=8, width=0.1))["relu6"] == 51


@pytest.mark.parametrize("gradient", ["constant_alpha", "unscaled"])
def test_yaml_on_a_resnet_trains(gradient: str) -> None:
    method = reactnet(gradient=gradient)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut_per_conv=True)
    surgery.quantize(net, method.rules)
    assert next(n for n, m in net.named_modules() if isinstance(m, RPReLU)) == "layer1.0.relu1"
    assert sum(isinstance(m, RPReLU) for m in net.modules()) == 6
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    assert [[*stage.quantize] for stage in method.stages] == [["input"], ["weight", "input", "output", "error"]]
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    levels = []
    for stage in method.stages:
        switch(net, stage.quantize)
        optimizer.zero_grad()
        with layers.quantized_weights(net):
            levels.append(len(net.layer1[0].conv1.quantized_weight()[0].unique()))
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    assert levels[0] > 2
    assert levels[1] == 2
    assert torch.isfinite(loss)
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_first_step_is_the_share_of_the_first_stage() -> None:
    def steps(*words: str) -> list[int]:
        config = resolve_row(["method=reactnet", "model=tiny", "dataset=synthetic", "train.steps=8", *words])
        return [stage["recipe"]["steps"] for stage in config["method"]["stages"]]

    assert steps() == [4, 4]
    assert steps("options.first_step=0.25") == [2, 6]
    assert steps("options.first_step=0") == [0, 8]
