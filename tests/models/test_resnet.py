"""What only the ResNets have: the usual names and the shared activation."""

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
