"""The ImageNet ResNets: published size, the 7x7 end, arguments."""

import pytest
import torch
from torch import nn

from qbench.models.resnet_imagenet import ResNetImageNet


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672)])
def test_published_parameters(depth: int, count: int) -> None:
    model = ResNetImageNet(channels=3, classes=1000, size=224, depth=depth)
    assert sum(p.numel() for p in model.parameters()) == count
    assert isinstance(model.fc, nn.Linear)


@pytest.mark.parametrize("preactivation", [None, True])
def test_seven_by_seven_at_the_end(preactivation: bool | None) -> None:
    model = ResNetImageNet(channels=3, classes=10, size=224, width=0.1, preactivation=preactivation).eval()
    shapes = []
    model.pool.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)
    assert shapes == [(7, 7)]


@pytest.mark.parametrize(("name", "value"), [("depth", 50), ("shortcut", "C"), ("width", 0), ("size", 4)])
def test_arguments_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        ResNetImageNet(**{"channels": 3, "classes": 10, "size": 32, name: value})
