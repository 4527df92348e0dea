"""Contrast normalization and ZCA against their definitions and scikit-learn's PCA."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from qbench.data import batches, load, whiten
from qbench.errors import UserError


@pytest.fixture
def images() -> Tensor:
    """uint8 [400, 2, 3, 3] with neighbours that resemble each other."""
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(400, 2, 3, 3, generator=random)
    smooth = noise + noise.roll(1, 2) + noise.roll(1, 3)
    return (255 * smooth / smooth.max()).to(torch.uint8)


def test_contrast_by_hand() -> None:
    flat = whiten.contrast(torch.tensor([[[[0, 2], [4, 6]]], [[[7, 7], [7, 7]]]], dtype=torch.uint8))
    # less the mean 3: -3 -1 1 3, of length sqrt(20); an image of one colour stays at 0
    expected = torch.tensor([-3.0, -1.0, 1.0, 3.0]) * 55 / 20**0.5
    torch.testing.assert_close(flat, torch.stack([expected, torch.zeros(4)]))


def test_whitening_is_pca_scaled_and_turned_back(images: Tensor) -> None:
    mean, matrix = whiten.fit(images, chunk=150)
    x = whiten.contrast(images).double().numpy()
    pca = PCA().fit(x)
    variance = pca.explained_variance_ * (len(x) - 1) / len(x)  # scikit-learn divides by N - 1
    scores = pca.transform(x) / np.sqrt(variance + 0.1)
    white = whiten.Whiten(mean, matrix, "cpu", channels_last=True)(images)
    np.testing.assert_allclose(white.flatten(1).numpy(), scores @ pca.components_, atol=2e-4)
    torch.testing.assert_close(matrix, matrix.t(), atol=1e-5, rtol=0)  # zero phase: the pixels stay in place
    assert white.is_contiguous(memory_format=torch.channels_last)


def test_a_data_set_is_whitened_by_its_training_images() -> None:
    config = {"name": "digits", "mean": [0.3], "std": [0.37]}
    data, plain = load({**config, "preprocess": "gcn_zca"}), load(config)
    assert plain.whitening is None
    made = batches(data.test, batch_size=899, mean=data.mean, std=data.std, whitening=data.whitening, shuffle=False)
    ((x, _),) = made.epoch(0)
    assert data.whitening is not None
    torch.testing.assert_close(x, whiten.Whiten(*whiten.fit(data.train.images), "cpu", True)(data.test.images))


def test_an_unknown_preprocessing_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"dataset\.preprocess must be one of standard, gcn_zca, or null, got 'zca'"):
        load({"name": "digits", "mean": [0.3], "std": [0.37], "preprocess": "zca"})
