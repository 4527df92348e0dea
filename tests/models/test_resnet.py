"""What only the ResNets have: the usual names and the shared activation."""

import pytest
import torch
from torch import nn

from qbench.models.resnet import ResNetCIFAR


def test_state_dict_keys_of_a_resnet_are_the_usual_ones():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *(f"bn1.{k}" for k in norm)]
    for layer in (1, 2, 3):
        for block in (0, 1, 2):
            for i in (1, 2):
                at = f"layer{layer}.{block}"
                expected += [f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{k}" for k in norm)]
    expected += ["fc.weight", "fc.bias"]
    assert list(ResNetCIFAR(channels=3, classes=10, size=32).state_dict()) == expected


def test_preactivation_shares_the_activation_only_where_the_path_splits():
    """With zero convs a block hands on its shortcut: the activation in the first block of a stage, else x itself."""
    model = ResNetCIFAR(channels=3, classes=10, size=8, depth=14, preactivation=True).eval()
    x = torch.randn(2, 16, 8, 8)
    first, second = model.layer1
    nn.init.zeros_(first.conv2.weight)
    nn.init.zeros_(second.conv2.weight)
    torch.testing.assert_close(first(x), x.relu(), rtol=1e-4, atol=1e-5)
    assert torch.equal(second(x), x)


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_shortcut_per_conv_has_the_same_parameters(preactivation, shortcut):
    options = dict(channels=3, classes=10, size=8, depth=14, shortcut=shortcut, preactivation=preactivation)
    one = ResNetCIFAR(**options)
    two = ResNetCIFAR(**options, shortcut_per_conv=True)
    assert one.state_dict().keys() == two.state_dict().keys()
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert not one.eval()(x).equal(two.eval()(x))
    same = ResNetCIFAR(**options, shortcut_per_conv=False).eval()
    same.load_state_dict(one.state_dict())
    assert one(x).equal(same(x))


def test_a_shortcut_per_conv_leads_around_each_conv():
    """With zero convs, whose batch-norm adds nothing, a block is its shortcut, with two ReLUs behind it."""
    model = ResNetCIFAR(channels=3, classes=10, size=8, depth=8, shortcut_per_conv=True).eval()
    block, x = model.layer1[0], torch.randn(2, 16, 8, 8)
    nn.init.zeros_(block.conv1.weight)
    assert torch.equal(block.conv2(block.relu1(block.add1(block.bn1(block.conv1(x)), x))), block.conv2(x.relu()))
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x.relu())
    down = model.layer2[0]
    nn.init.zeros_(down.conv1.weight)
    nn.init.zeros_(down.conv2.weight)
    assert torch.equal(down(x), down.shortcut(x).relu())


def test_preactivation_with_a_shortcut_per_conv():
    model = ResNetCIFAR(channels=3, classes=10, size=8, depth=14, preactivation=True, shortcut_per_conv=True).eval()
    block, x = model.layer1[1], torch.randn(2, 16, 8, 8)
    nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x), x + block.conv1(block.relu1(block.bn1(x))))


def test_a_raw_shortcut_starts_at_the_input_where_the_shape_changes():
    """With zero convs a block hands on its shortcut: x, and the activation in the first block of the net alone."""
    options = dict(channels=3, classes=10, size=8, depth=14, preactivation=True)
    model = ResNetCIFAR(**options, raw_shortcut=True).eval()
    for block in (model.layer1[0], model.layer2[0]):
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(model.layer1[0](x), x.relu(), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.layer2[0](x), model.layer2[0].shortcut(x))
    assert model.state_dict().keys() == ResNetCIFAR(**options).state_dict().keys()
    with pytest.raises(ValueError, match="raw_shortcut=true asks for preactivation=true"):
        ResNetCIFAR(channels=3, classes=10, size=8, raw_shortcut=True)


@pytest.mark.parametrize("preactivation", [False, True])
def test_a_final_norm_gives_the_classifier_features_of_deviation_one(preactivation):
    options = dict(channels=3, classes=10, size=8, depth=8, preactivation=preactivation)
    deviation = []
    for final_norm in (None, True):
        torch.manual_seed(0)
        model = ResNetCIFAR(**options, final_norm=final_norm).train()
        model.fc.register_forward_pre_hook(lambda _, args: deviation.append(args[0].std(0).mean().item()))
        model(torch.randn(64, 3, 8, 8))
    assert deviation[0] < 0.7
    assert deviation[1] == pytest.approx(1, abs=0.05)
    plain = ResNetCIFAR(**options).state_dict().keys()
    assert plain == ResNetCIFAR(**options, final_norm=False).state_dict().keys()
    more = {f"final_norm.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert model.state_dict().keys() - plain == more
