"""Which layers of a quantized net compute on float inputs, and what the reason is said to be."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config import resolve
from qbench.figures import report
from qbench.methods.shared.pact import PACT
from qbench.models.mobilenet import MobileNetV2
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.float_inputs import float_inputs
from qbench.quant.method import Method, Rule
from qbench.quant.uniform import Uniform
from qbench.training import build

torch.set_num_threads(1)

CONF = str(Path(__file__).resolve().parents[2] / "conf")
NETS = {
    "resnet20": partial(ResNetCIFAR, channels=3, classes=10, size=8, depth=20, width=0.25),
    "mobilenet_v2": partial(MobileNetV2, channels=3, classes=10, size=8, width=0.1),
}
RULES = [
    Rule(weight=partial(Uniform, bits=8)),
    Rule(kind="ReLU", replace=partial(PACT, bits=8), optional=True),
]


def method(name: str) -> Method:
    with initialize_config_dir(CONF, version_base=None):
        return build.make_method(resolve.resolve(compose("config", overrides=[f"method={name}"])))


@pytest.mark.parametrize(
    ("name", "net", "count"),
    [
        ("pact", "resnet20", 2),  # the first and the last layer
        ("dorefa", "resnet20", 2),
        ("pact", "mobilenet_v2", 2 + 17),  # behind linear bottlenecks
        ("dorefa", "mobilenet_v2", 2 + 17),
        *((name, net, 0) for name in ("lsq", "ptq", "qat") for net in NETS),
    ],
)
def test_float_inputs_of_each_method(name: str, net: str, count: int) -> None:
    model, rules = NETS[net]().eval(), method(name).rules
    kept = surgery.quantize(model, rules)
    manifest = surgery.manifest(model, kept)
    found = manifest["float_inputs"]
    assert (len(found), manifest["layers"]) == (count, 20 if net == "resnet20" else 53)
    if count:
        assert [found.pop(layer) for layer in ("conv1", "fc")] == [kept[layer] for layer in ("conv1", "fc")]
        assert all(why.startswith("no ReLU before it: it reads 'blocks.") for why in found.values())
    if count > 2:
        assert found["blocks.1.body.conv1"] == "no ReLU before it: it reads 'blocks.0.add' (Add)"


class Odd(nn.Module):
    """A ReLU that is a function, one that has two names, and a good one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.relu1 = self.relu2 = nn.ReLU()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.relu1(self.conv1(x)))
        x = self.conv3(F.relu(x))
        x = self.conv4(self.relu2(x))
        return self.fc(torch.flatten(F.adaptive_max_pool2d(x.sigmoid(), 1), 1))  # type: ignore[no-any-return]


def test_functions_are_named_and_a_module_is_replaced_under_all_its_names() -> None:
    model = Odd()
    surgery.quantize(model, RULES)
    assert isinstance(model.relu1, PACT)
    assert model.relu1 is model.relu2
    assert float_inputs(model, {}) == {
        "conv1": "it reads the image",
        "conv3": "the ReLU before it is a function, not a module that a rule could replace",
        "fc": "no ReLU before it: it reads the result of adaptive_max_pool2d",
    }


class Branches(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x if x.sum() > 0 else -x).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_net_that_cannot_be_traced_is_said_to_be_unknown() -> None:
    model = Branches()
    surgery.quantize(model, [Rule(weight=partial(Uniform, bits=8), match="fc", input=partial(Uniform, bits=8))])
    (why,) = float_inputs(model, {}).values()
    assert why == "whether it reads quantized values is unknown: the net cannot be traced (TraceError)"
    assert float_inputs(model, {"conv": "kept"}) == {"conv": "kept"}


def test_a_run_tells_how_many(tmp_path: Path) -> None:
    result = dict.fromkeys(("float_accuracy", "accuracy_before_training", "accuracy_last", "accuracy_best"), 1.0)
    result |= dict.fromkeys(("w_bits", "a_bits", "bits_per_weight", "bytes", "seconds", "epoch_best"), 1)
    result |= {"method": "pact", "model": "m", "dataset": "d"}
    lines: list[str] = []
    report.tell(tmp_path, result, lines.append)
    assert not any("float inputs" in line for line in lines)  # a run of before it was counted
    (tmp_path / "manifest.json").write_text(
        '{"weights": {}, "float_inputs": {"conv1": "kept", "fc": "kept"}, "layers": 20}'
    )
    report.tell(tmp_path, result, lines.append)
    assert [line.split()[2:5] for line in lines if "float inputs" in line] == [["2", "of", "20"]]
