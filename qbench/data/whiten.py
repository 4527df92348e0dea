"""Global contrast normalization and ZCA whitening, which BinaryConnect and BNN use in place of mean and std."""

import torch
from torch import Tensor

SCALE = 55.0
BIAS = 0.1


def contrast(images: Tensor) -> Tensor:
    """Each image less its mean, and at length 55: uint8 [N, C, H, W] -> float32 [N, C * H * W].

    Reference: arXiv 1511.00363, Sec. 3.2; the numbers of `contrast` and `fit` are those of pylearn2, which it used
    """
    x = images.flatten(1).float()
    x -= x.mean(1, keepdim=True)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True) / SCALE
    return x.div_(torch.where(length < 1e-8, 1.0, length))


def fit(images: Tensor, chunk: int = 10_000) -> tuple[Tensor, Tensor]:
    """(mean [D], P [D, D]) of ZCA on the contrast-normalized training images uint8 [N, C, H, W], D = C * H * W.

    P = V diag((e + 0.1)^-1/2) V^T, with e and V the eigenvalues and eigenvectors of their covariance; float32. On
    50,000 images of 32 x 32 x 3 this takes some 20 s on two cores.
    """
    parts = [contrast(part) for part in images.split(chunk)]
    mean = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0) / len(images)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        part -= mean.float()
        covariance += part.t() @ part
    values, vectors = torch.linalg.eigh(covariance.div_(len(images)))
    matrix = (vectors * (values + BIAS).rsqrt()) @ vectors.t()
    return mean.float(), matrix.float()


class Whiten:
    """uint8 [B, C, H, W] -> (contrast(x) - mean) P, float32, on `device`; see `fit`."""

    def __init__(self, mean: Tensor, matrix: Tensor, device: str | torch.device, channels_last: bool) -> None:
        self.mean, self.matrix = mean.to(device), matrix.to(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, x: Tensor) -> Tensor:
        white = (contrast(x.to(self.mean.device)) - self.mean) @ self.matrix
        return white.view(x.shape).contiguous(memory_format=self.memory_format)
