"""Quantization-aware training with fake quantization and folded batch-norm (arXiv 1712.05877, 1806.08342)."""

import torch
from torch import Tensor, nn

from qbench.quant import quantizer, ranges
from qbench.quant.grid import Affine
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Quantizer, check_choice
from qbench.quant.uniform import UniformGrid


class Weight(UniformGrid):
    """Affine weight grid over the minimum and maximum of the weight as it is now; the lowest code stays unused.

    At 8 bits the codes are 1..255, that is -127..127 as int8. Nothing is clipped, so the gradient is 1 everywhere; none
    flows through minimum and maximum. Per layer as in the paper, or per channel. Shape: any.

    Reference: 1712.05877 Sec. 3.1
    """

    def __init__(self, layer: nn.Module, site: str, *, bits: int, per_channel: bool = False) -> None:
        super().__init__(layer, site, bits=bits, restricted=True, per_channel=per_channel)

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Affine:
        """That of the weight; -1..1 stands for its range where there is none."""
        if x is None:
            lo, hi = -torch.ones(self.shape), torch.ones(self.shape)
        else:
            lo, hi = ranges.minmax(self.rows(x.detach()))
        grid = ranges.grid(lo.reshape(self.shape), hi.reshape(self.shape), self.bounds, self.symmetric)
        return self._between(*grid, dynamic=x is None)


class Activation(UniformGrid):
    """Affine activation grid over moving averages of the smallest and largest value of each training batch.

    lo <- decay * lo + (1 - decay) * min(x), likewise hi; the first batch sets them. They move in training mode only,
    also while quantization is still off, and stand still at evaluation. Calibration images count as training batches.
    Each of n micro-batches (train.accumulate) moves them with the n-th root of `decay`: a step weighs the same.
    Gradient: 1 within the range, else 0; none to lo and hi. Shape: any, one step per tensor.

    Args:
        bits: 2..16
        decay: "close to 1" in the paper; in 0..1

    Raises:
        ValueError: an argument out of range

    Reference: 1712.05877 Sec. 3.1
    """

    watches = True
    lo: Tensor
    hi: Tensor

    def __init__(self, layer: nn.Module, site: str, *, bits: int, decay: float = 0.99) -> None:
        super().__init__(layer, site, bits=bits)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.register_buffer("lo", torch.tensor(torch.inf))  # infinite: no batch seen yet
        self.register_buffer("hi", torch.tensor(-torch.inf))

    def grid(self, x: Tensor | None = None) -> Affine:
        """The grid of the averages; before any batch it is that of -1..1."""
        lo, hi = torch.where(self.lo.isinf(), -1.0, self.lo), torch.where(self.hi.isinf(), 1.0, self.hi)
        return self._between(*ranges.grid(lo, hi, self.bounds, self.symmetric))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Move the averages by one batch."""
        self._move(x, self.decay)

    def _train(self, x: Tensor) -> None:
        """Move the averages by one micro-batch."""
        self._move(x, self.decay ** (1 / self.pieces[0]))

    @torch.no_grad()
    def _move(self, x: Tensor, decay: float) -> None:
        for average, now in zip((self.lo, self.hi), (x.amin(), x.amax()), strict=True):
            now = now.float()
            average.copy_(torch.where(average.isinf(), now, average * decay + now * (1 - decay)))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.enabled:
            self._train(x)
        return super().forward(x)

    def bypass(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():  # without gradients it is calibration, which counts by itself
            self._train(x)
        return x


class Quantized(nn.Module):
    """`module` with its output quantized: conv -> batch-norm -> ReLU -> here, or addition -> here.

    Reference: 1712.05877 Sec. 3 and Fig. 1.1, C.3, C.4
    """

    def __init__(self, module: nn.Module, site: str, *, bits: int, decay: float = 0.99) -> None:
        super().__init__()
        self.module = module
        self.quantizer = Activation(module, site, bits=bits, decay=decay)

    def forward(self, *x: Tensor) -> Tensor:
        return self.quantizer(self.module(*x))  # type: ignore[no-any-return]


class FoldedLayer(QuantLayer):
    """A conv or linear layer whose batch-norm is multiplied into its weight before the weight is quantized.

    With sigma = sqrt(max(var, floor) + eps), B for the batch and no index for the running statistics:
    evaluation and frozen: y = op(x, Q(gamma w / sigma)) + beta + gamma (b - mu) / sigma.
    training, fold 'jacob': y = op(x, Q(gamma w / sigma_B)) + beta + gamma (b - mu_B) / sigma_B.
    training, fold 'krishnamoorthi': y = op(x, Q(gamma w / sigma)) / c + beta + gamma (b - mu_B) / sigma_B with
    c = sigma_B / sigma: the weight that is quantized does not jitter with the batch.
    mu_B and var_B come from one more, float op(x, w) + b, and gradients flow through them; running statistics are
    updated as nn.BatchNorm does, and here used as they stood before this batch. While `frozen` they stand still.

    Departure: the variance is at least `floor` times the median of the layer's variances, so that a dead channel of a
    depthwise conv does not set the range of the whole layer; torch's eps of 1e-5 (TensorFlow: 1e-3) does not see to
    it. A share, since an absolute one would fold a layer of small outputs into another function.

    Args:
        layer: the conv or linear layer
        site: 'replace'
        pair: its batch-norm
        fold: jacob | krishnamoorthi
        floor: the smallest variance, as a share of the layer's median; 0 is none

    Raises:
        ValueError: an unknown fold, a negative floor, or a batch-norm without running statistics

    Reference: 1712.05877 Sec. 3.2, Eq. 14, Fig. C.8; 1806.08342 Sec. 3.2.1, Fig. 8
    """

    alone = True  # the weight to quantize depends on the batch

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        site: str,
        *,
        pair: nn.modules.batchnorm._BatchNorm,
        fold: str = "jacob",
        floor: float = 1e-4,
    ) -> None:
        super().__init__(layer)
        if not isinstance(pair, nn.modules.batchnorm._BatchNorm) or pair.running_var is None:
            raise ValueError(f"only a batch-norm with running statistics can be folded, got {type(pair).__name__}")
        if floor < 0:
            raise ValueError(f"floor must be at least 0, got {floor}")
        self.fold = check_choice("fold", fold, ("jacob", "krishnamoorthi"))
        self.bn, self.floor, self.frozen = pair, floor, False

    @property
    def folded_norm(self) -> nn.Module:  # type: ignore[override]
        return self.bn

    def set_weight_quantizer(self, quantizer: Quantizer) -> None:
        """Attach a weight quantizer; its range is that of the folded weight, its latent the weight itself."""
        with torch.no_grad():
            quantizer.calibrate(self.folded()[0])
            quantizer.finish_calibration()
        self.weight_quantizer = quantizer

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance, one per channel."""
        mean, var = self.bn.running_mean, self.bn.running_var
        assert mean is not None, "the constructor refuses a batch-norm without running statistics"
        assert var is not None, "likewise"
        return mean, var

    def folded(self) -> tuple[Tensor, Tensor]:
        """The float weight and bias that inference has, from the running statistics."""
        mean, var = self.statistics
        return self._weight(self._inverse(var)), self._bias(self._inverse(var), mean)

    def source(self) -> Tensor:
        """The float weight that inference quantizes."""
        return self.folded()[0]

    def inference_bias(self) -> Tensor:
        return self.folded()[1]

    def quantized_weight(self) -> Tensor:
        """The folded weight of inference on its grid."""
        return self._quantize(self.folded()[0])

    def compute(self, x: Tensor) -> Tensor:
        if self.training and not self.frozen:
            return self._train(x)
        weight, bias = self.folded()
        return self.apply_op(x, self._quantize(weight), bias)

    def _train(self, x: Tensor) -> Tensor:
        plain = self.apply_op(x, self.weight, self.bias)
        if quantizer.fast is not None and quantizer.fast.takes(plain):
            mean, var = quantizer.fast.moments(plain)
        else:
            plain = plain.float()
            var, mean = torch.var_mean(plain, [0, *range(2, plain.dim())], correction=0)
        long_term = self._inverse(self.statistics[1])
        self._update(mean.detach(), var.detach(), plain.numel() // len(mean))
        inverse = self._inverse(var)
        bias = self._bias(inverse, mean)
        if self.fold == "jacob":
            return self.apply_op(x, self._quantize(self._weight(inverse)), bias)
        y = self.apply_op(x, self._quantize(self._weight(long_term)), None)
        shape = [1, -1, *[1] * (y.dim() - 2)]
        return y * (inverse / long_term).reshape(shape) + bias.reshape(shape)  # 1 / c = sigma / sigma_B

    def _inverse(self, var: Tensor) -> Tensor:
        """1 / sigma."""
        least = var.detach().median() * self.floor
        return torch.rsqrt(torch.where(var < least, least, var) + self.bn.eps)

    def _weight(self, inverse: Tensor) -> Tensor:
        """gamma w / sigma."""
        scale = inverse if self.bn.weight is None else inverse * self.bn.weight
        return self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1))

    def _bias(self, inverse: Tensor, mean: Tensor) -> Tensor:
        """beta + gamma (b - mu) / sigma."""
        bias = (-mean if self.bias is None else self.bias - mean) * inverse
        bias = bias if self.bn.weight is None else bias * self.bn.weight
        return bias if self.bn.bias is None else bias + self.bn.bias

    def _quantize(self, weight: Tensor) -> Tensor:
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics as nn.BatchNorm does: the variance there is the unbiased one."""
        assert self.bn.num_batches_tracked is not None, "it is there whenever running statistics are"
        self.bn.num_batches_tracked.add_(1)
        running_mean, running_var = self.statistics
        count_so_far = self.bn.num_batches_tracked.to(running_mean.dtype)
        share = 1 / count_so_far if self.bn.momentum is None else self.bn.momentum
        running_mean.lerp_(mean, share)
        running_var.lerp_(var * (count / max(count - 1, 1)), share)


class FreezeStatistics(Hook):
    """From a share of the training on, folded layers use and keep their running statistics.

    Args:
        share: 0..1 of the training steps; 1 is never

    Raises:
        ValueError: share out of range

    Reference: 1806.08342 Sec. 3.2.1 ("freeze"), after 200 000 to 300 000 steps there
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"the share of the training after which statistics freeze must be in 0..1, got {share}")
        self.share = share

    def phase(self, state: State) -> bool:
        return state.step >= self.share * state.steps

    def before_step(self, state: State) -> None:
        for _, layer in quant_layers(state.model):
            if isinstance(layer, FoldedLayer):
                layer.frozen = self.phase(state)
