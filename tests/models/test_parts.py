"""The shortcut without parameters and the initialization."""

import pytest
import torch

from qbench.models.lenet import LeNet5
from qbench.models.mobilenet import MobileNetV1
from qbench.models.parts import ShortcutA


def test_shortcut_a_subsamples_and_pads_with_zeros():
    x = torch.arange(2 * 3 * 3.0).reshape(1, 2, 3, 3)
    y = ShortcutA(2, 5, 2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()
    with pytest.raises(ValueError, match="5 -> 2"):
        ShortcutA(5, 2, 1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_of_shortcut_a_is_that_of_a_slice_in_the_layout_of_the_net(layout: torch.memory_format):
    x, g = torch.randn(2, 4, 7, 5), torch.randn(2, 8, 4, 3)
    own, usual = (x.clone().contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    ShortcutA(4, 8, 2)(own).backward(g.contiguous(memory_format=layout))
    torch.nn.functional.pad(usual[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)).backward(g)
    assert torch.equal(own.grad, usual.grad)
    assert own.grad.is_contiguous(memory_format=layout)


def test_he_initialization():
    torch.manual_seed(0)
    model = MobileNetV1(channels=3, classes=10, size=32)
    dense, depthwise = model.blocks[6].conv2.weight, model.blocks[6].conv1.weight
    assert dense.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert not LeNet5(channels=1, classes=10, size=8).conv1.bias.any()
