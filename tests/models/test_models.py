"""Every network of conf/model: shapes, parameter counts, names, and that its graph can be read."""

import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import Tensor, fx, nn

from qbench.models.lenet import LeNet5
from qbench.models.mlp import MLP
from qbench.models.mobilenet import MobileNetV1, MobileNetV2
from qbench.models.parts import Add, ShortcutA
from qbench.models.resnet import ResNetCIFAR
from qbench.models.tiny import Tiny
from qbench.models.vgg_small import VGGSmall

CONF = Path(__file__).parents[2] / "conf" / "model"
YAMLS = sorted(CONF.glob("*.yaml"))
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "resnet8_preactivation": partial(ResNetCIFAR, depth=8, preactivation=True),
    "resnet8_B": partial(ResNetCIFAR, depth=8, shortcut="B"),
    "resnet8_preactivation_B": partial(ResNetCIFAR, depth=8, shortcut="B", preactivation=True),
    "resnet8_per_conv": partial(ResNetCIFAR, depth=8, shortcut_per_conv=True),
    "resnet8_per_conv_B": partial(ResNetCIFAR, depth=8, shortcut="B", shortcut_per_conv=True),
    "resnet8_narrow": partial(ResNetCIFAR, depth=8, width=0.3),
    "lenet5_batch_norm": partial(LeNet5, width=0.25, batch_norm=True),
    "vgg_small_preactivation": partial(VGGSmall, width=0.1, preactivation=True),
    "mobilenet_v1_narrow": partial(MobileNetV1, width=0.1),
    "mobilenet_v2_narrow": partial(MobileNetV2, width=0.1),
    "mlp_linear": partial(MLP, hidden=[]),
    "mlp_everything": partial(MLP, hidden=[8, 8], batch_norm=True, dropout=0.5, dropout_in=0.2),
    "vgg10_preactivation": partial(VGGSmall, width=0.1, preactivation=True, hidden=[64, 64]),
}
NETS = VARIANTS | {
    path.stem: partial(instantiate, OmegaConf.masked_copy(node, [key for key in node if key != "name"]))
    for path in YAMLS
    for node in [OmegaConf.load(path)]
}
every_net = pytest.mark.parametrize("name", NETS)


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(name: str, channels: int = 3, classes: int = 10, size: int = 8) -> nn.Module:
    return NETS[name](channels=channels, classes=classes, size=size)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def calls(model: nn.Module, x: Tensor) -> list[str]:
    """The names of the leaf modules in the order in which a forward pass runs them."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(x)
    return ran


def test_the_yaml_files_are_the_networks():
    resnets = ["resnet18", "resnet20", "resnet32", "resnet44", "resnet56"]
    mlps = ["mlp", "mlp3x1024", "mlp3x2048", "mlp3x4096"]
    expected = ["lenet5", *mlps, "mobilenet_v1", "mobilenet_v2", *resnets, "tiny", "vgg10", "vgg7", "vgg_small"]
    assert [path.stem for path in YAMLS] == expected


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_describes_itself_and_gives_every_option_its_default(path):
    assert re.fullmatch(r"# description: \S.*", path.read_text().splitlines()[0])
    options = OmegaConf.to_container(OmegaConf.load(path))
    assert options.pop("name") == path.stem
    arguments = inspect.signature(get_class(options.pop("_target_"))).parameters
    assert all(a.kind is a.KEYWORD_ONLY for a in arguments.values())
    assert set(options) | {"channels", "classes", "size"} == set(arguments)


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (partial(ResNetCIFAR, depth=20), 269_722),
        (partial(ResNetCIFAR, depth=32), 464_154),
        (partial(ResNetCIFAR, depth=44), 658_586),
        (partial(ResNetCIFAR, depth=56), 853_018),
        # B adds 16 * 32 + 2 * 32 and 32 * 64 + 2 * 64
        (partial(ResNetCIFAR, depth=20, shortcut="B"), 269_722 + 576 + 2_176),
        # the stem's batch-norm (2 * 16) goes, the last one (2 * 64) comes; bn1 of two blocks has half the channels
        (partial(ResNetCIFAR, depth=20, preactivation=True), 269_722 - 32 + 128 - 32 - 64),
        # six convs of 9 * in * out, their batch-norms, 512 * 16 * 10 + 10
        (VGGSmall, 4_574_592 + 2 * 2 * (128 + 256 + 512) + 81_930),
        (partial(VGGSmall, preactivation=True), 4_574_592 + 3_584 + 81_930),
        # hidden layers without bias and their batch-norms: 512 * 16 * 1024, 1024 * 1024; 14.0 M is what others print
        (NETS["vgg7"], 4_574_592 + 3_584 + 8_388_608 + 2_048 + 10_250),
        (NETS["vgg10"], 4_574_592 + 3_584 + 8_388_608 + 1_048_576 + 2 * 2_048 + 10_250),
        (MobileNetV1, 3_217_226),
        (MobileNetV2, 2_236_682),
        (Tiny, 27 * 8 + 72 * 8 + 4 * 8 + 90),
    ],
)
def test_parameter_count(net, count):
    assert parameters(net(channels=3, classes=10, size=32)) == count


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (LeNet5, (25 * 32 + 32) + (25 * 32 * 64 + 64) + (49 * 64 * 512 + 512) + 5_130),
        (partial(LeNet5, batch_norm=True), 25 * 32 + 25 * 32 * 64 + 49 * 64 * 512 + 2 * (32 + 64 + 512) + 5_130),
        (partial(LeNet5, padding=0), (25 * 32 + 32) + (25 * 32 * 64 + 64) + (16 * 64 * 512 + 512) + 5_130),
        (MLP, (784 * 512 + 512) + (512 * 512 + 512) + 5_130),
        (partial(MLP, batch_norm=True, dropout=0.5), 784 * 512 + 512 * 512 + 2 * 2 * 512 + 5_130),
        *((NETS[f"mlp3x{n}"], 784 * n + 2 * n * n + 3 * 2 * n + 10 * n + 10) for n in (1024, 2048, 4096)),
    ],
)
def test_parameter_count_on_mnist(net, count):
    assert parameters(net(channels=1, classes=10, size=28)) == count


@pytest.mark.parametrize(("net", "count"), [(MobileNetV1, 4_231_976), (MobileNetV2, 3_504_872)])
def test_imagenet_plan_has_the_published_parameters_and_a_7x7_end(net, count):
    model = net(channels=3, classes=1000, size=224).eval()
    assert parameters(model) == count
    shapes = []
    model.pool.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[2:]))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert shapes == [(7, 7)]


@pytest.mark.parametrize(("size", "end"), [(8, 1), (28, 4), (32, 4), (64, 8), (65, 3)])
@pytest.mark.parametrize("net", [MobileNetV1, MobileNetV2])
def test_mobilenets_stride_less_on_small_images(net, size, end):
    model = net(channels=3, classes=10, size=size, width=0.1).eval()
    shapes = []
    model.pool.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[2:]))
    model(torch.randn(1, 3, size, size))
    assert shapes == [(end, end)]


@pytest.mark.parametrize("size", [8, 16, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@every_net
def test_output_shape(name, channels, size):
    model = build(name, channels, classes=7, size=size).eval()
    with torch.no_grad():
        y = model(torch.randn(2, channels, size, size))
    assert y.shape == (2, 7)
    assert torch.isfinite(y).all()


@every_net
def test_every_leaf_runs_once_and_in_the_order_of_registration(name):
    model = build(name)
    leaves = [key for key, module in model.named_modules() if not list(module.children())]
    ran = calls(model, torch.randn(2, 3, 8, 8))
    assert Counter(ran) == Counter(leaves)
    assert ran == leaves


@every_net
def test_graph_names_the_whole_computation(name):
    """Traced with Add and ShortcutA as leaves, a net is nothing but calls of modules, and computes the same."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, Add | ShortcutA) or super().is_leaf_module(m, name)

    model = build(name).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = Tracer().trace(model)
    assert {node.op for node in graph.nodes} == {"placeholder", "call_module", "output"}
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@every_net
def test_batch_norm_follows_a_conv_or_linear_without_bias(name):
    model = build(name)
    graph = fx.symbolic_trace(model).graph
    at = dict(model.named_modules())
    folded = set()
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(at[node.target], nn.BatchNorm2d | nn.BatchNorm1d):
            source = node.args[0]
            if source.op == "call_module" and isinstance(at[source.target], nn.MaxPool2d):
                source = source.args[0]
            if source.op == "call_module" and isinstance(at[source.target], nn.Conv2d | nn.Linear):
                assert at[source.target].bias is None
                folded.add(source.target)
    convs = {key for key, module in at.items() if isinstance(module, nn.Conv2d)}
    if name.startswith("resnet8_preactivation"):  # the second conv of a block ends in the addition
        convs = {key for key in convs if not key.endswith("conv2")} - {"conv1"}
    if name != "lenet5":
        assert convs <= folded


@every_net
def test_names_of_stem_shortcut_and_classifier(name):
    model = build(name)
    at = {key: m for key, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert list(at)[-1] == "fc"
    assert "mlp" in name or next(iter(at)) == "conv1"
    shortcuts = [key for key, m in at.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert name.startswith("mobilenet") or all("shortcut" in key for key in shortcuts)
    assert len(shortcuts) == 2 or not name.endswith("_B")


@every_net
def test_same_seed_same_weights(name):
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build(name).state_dict()

    one, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


@every_net
def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_order_of_vgg_small():
    orders = {}
    for preactivation in (None, True, False):
        model = VGGSmall(channels=3, classes=10, size=8, width=0.1, preactivation=preactivation)
        orders[preactivation] = [key for key, _ in model.named_children() if key in {"conv2", "bn2", "relu2", "pool1"}]
    assert orders[True] == ["conv2", "pool1", "bn2", "relu2"]
    assert orders[None] == orders[False] == ["conv2", "bn2", "relu2", "pool1"]


@pytest.mark.parametrize("net", [partial(LeNet5, batch_norm=True), VGGSmall])
def test_pooling_before_batch_norm_and_relu_for_who_asks(net):
    orders = {}
    for first in (None, True, False):
        made = net(channels=3, classes=10, size=8, width=0.1, pool_first=first)
        number = "1" if isinstance(made, LeNet5) else "2"
        parts = (f"conv{number}", f"bn{number}", f"relu{number}", "pool1")
        orders[first] = [key.rstrip("0123456789") for key, _ in made.named_children() if key in parts]
    assert orders[True] == ["conv", "pool", "bn", "relu"]
    assert orders[None] == orders[False] == ["conv", "bn", "relu", "pool"]
    preactivation = VGGSmall(channels=3, classes=10, size=8, width=0.1, preactivation=True, pool_first=False)
    assert [key for key, _ in preactivation.named_children()][2:5] == ["relu1", "conv2", "pool1"]


def test_width_multiplies_the_channels():
    assert ResNetCIFAR(channels=3, classes=10, size=8, depth=8, width=2).fc.in_features == 128
    assert VGGSmall(channels=3, classes=10, size=8, width=0.5).conv6.out_channels == 256
    assert MLP(channels=1, classes=10, size=8, hidden=[100], width=1.5).fc1.out_features == 150
    narrow = MobileNetV2(channels=3, classes=10, size=8, width=0.35)
    assert (narrow.conv1.out_channels, narrow.conv2.out_channels) == (16, 1280)
    assert MobileNetV2(channels=3, classes=10, size=8, width=1.4).conv2.out_channels == 1792


@pytest.mark.parametrize(
    ("net", "smallest"),
    [
        (ResNetCIFAR, 8),
        (MobileNetV1, 8),
        (MobileNetV2, 8),
        (VGGSmall, 8),
        (LeNet5, 4),
        (partial(LeNet5, padding=0), 16),
        (Tiny, 2),
        (MLP, 1),
    ],
)
def test_too_small_an_image_is_refused(net, smallest):
    with pytest.raises(ValueError, match=f"size must be >= {smallest} pixels.* got {smallest - 1}"):
        net(channels=3, classes=10, size=smallest - 1)
    with torch.no_grad():
        model = net(channels=3, classes=10, size=smallest).eval()
        assert model(torch.randn(2, 3, smallest, smallest)).shape == (2, 10)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0.0}, "width must be a positive number, got 0.0"),
        ({"width": -1.0}, "got -1.0"),
        ({"width": float("nan")}, "got nan"),
        ({"channels": 0}, "channels=0"),
        ({"classes": 0}, "classes=0"),
    ],
)
def test_wrong_arguments_are_refused(path, wrong, message):
    net = get_class(OmegaConf.load(path)["_target_"])
    with pytest.raises(ValueError, match=message):
        net(**({"channels": 3, "classes": 10, "size": 32} | wrong))


def test_wrong_options_are_refused():
    net = partial(ResNetCIFAR, channels=3, classes=10, size=32)
    with pytest.raises(ValueError, match="shortcut must be A or B, got 'C'"):
        net(shortcut="C")
    for depth in (18, 2, -4):
        with pytest.raises(ValueError, match=f"depth must be 6n \\+ 2 .*, got {depth}"):
            net(depth=depth)
    with pytest.raises(ValueError, match="padding must be 0 or 2, got 1"):
        LeNet5(channels=1, classes=10, size=28, padding=1)
    with pytest.raises(ValueError, match=r"hidden must hold numbers >= 1, got \[512, 0\]"):
        MLP(channels=1, classes=10, size=8, hidden=[512, 0])
    with pytest.raises(ValueError, match=r"hidden must hold numbers >= 1, got \[0\]"):
        VGGSmall(channels=1, classes=10, size=8, hidden=[0])
    for option in ("dropout", "dropout_in"):
        with pytest.raises(ValueError, match=rf"{option} must be at least 0 and below 1, got 1\.0"):
            MLP(channels=1, classes=10, size=8, **{option: 1.0})


def test_importing_the_models_imports_torch_only():
    names = ", ".join(
        f"qbench.models.{path.stem}" for path in (CONF.parents[1] / "qbench" / "models").glob("[a-z]*.py")
    )
    code = f"import sys, {names}; print({{'torchvision', 'hydra', 'omegaconf', 'matplotlib'}} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
