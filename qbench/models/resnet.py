"""ResNets for CIFAR, post-activation and pre-activation."""

from torch import Tensor, nn

from qbench.models.parts import Add, ShortcutA, check, conv, he_init, named, scaled


def _shortcut(kind: str, before: int, after: int, stride: int) -> nn.Module:
    if stride == 1 and before == after:
        return nn.Sequential()  # identity that leaves no node in a traced graph
    if kind == "A":
        return ShortcutA(before, after, stride)
    return nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))


class Block(nn.Module):
    """Two 3x3 convs: relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)). (N, before, H, W) -> (N, after, H/s, W/s).

    With `per_conv` the shortcut ends behind the first conv, and a second, plain one leads around the other conv:
    a = relu(bn(conv(x)) + shortcut(x)), then relu(bn(conv(a)) + a).

    Reference: 1512.03385, figure 2; 1808.00278, figure 3 for one shortcut per conv
    """

    def __init__(self, before: int, after: int, stride: int, shortcut: str, per_conv: bool) -> None:
        super().__init__()
        self.per_conv = per_conv
        self.conv1 = conv(before, after, 3, stride)
        self.bn1 = nn.BatchNorm2d(after)
        if per_conv:
            self.shortcut = _shortcut(shortcut, before, after, stride)
            self.add1 = Add()
        self.relu1 = nn.ReLU()
        self.conv2 = conv(after, after, 3)
        self.bn2 = nn.BatchNorm2d(after)
        if not per_conv:
            self.shortcut = _shortcut(shortcut, before, after, stride)
        self.add = Add()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        if self.per_conv:
            x = self.relu1(self.add1(y, self.shortcut(x)))
            return self.relu2(self.add(self.bn2(self.conv2(x)), x))  # type: ignore[no-any-return]
        y = self.bn2(self.conv2(self.relu1(y)))
        return self.relu2(self.add(y, self.shortcut(x)))  # type: ignore[no-any-return]


class PreactivationBlock(nn.Module):
    """Two 3x3 convs behind their activations: conv(relu(bn(conv(a)))) + shortcut(x), with a = relu(bn(x)).

    The shortcut starts at x, and at a where `share` is set: in the first block of the net, "right after conv1 and
    before splitting into two paths", and where the shape changes, as in the authors' code (tensorpack's ResNet, from
    which the TTQ authors' comes, does the former alone). With `per_conv` it ends
    behind the first conv, and a plain one leads around the other: y = conv(a) + shortcut, then conv(relu(bn(y))) + y.

    Reference: 1603.05027, figure 4(e) and appendix
    """

    def __init__(self, before: int, after: int, stride: int, shortcut: str, per_conv: bool, share: bool) -> None:
        super().__init__()
        self.per_conv, self.share = per_conv, share
        self.bn1 = nn.BatchNorm2d(before)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(before, after, 3, stride)
        if per_conv:
            self.shortcut = _shortcut(shortcut, before, after, stride)
            self.add1 = Add()
        self.bn2 = nn.BatchNorm2d(after)
        self.relu2 = nn.ReLU()
        self.conv2 = conv(after, after, 3)
        if not per_conv:
            self.shortcut = _shortcut(shortcut, before, after, stride)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(x))
        x = a if self.share else x
        y = self.conv1(a)
        if self.per_conv:
            x = y = self.add1(y, self.shortcut(x))
            return self.add(self.conv2(self.relu2(self.bn2(y))), x)  # type: ignore[no-any-return]
        return self.add(self.conv2(self.relu2(self.bn2(y))), self.shortcut(x))  # type: ignore[no-any-return]


def _stage(
    before: int,
    after: int,
    stride: int,
    blocks: int,
    shortcut: str,
    preactivation: bool,
    per_conv: bool,
    raw_shortcut: bool = False,
) -> nn.Sequential:
    """`blocks` blocks, the first of which strides, changes the channels and, pre-activation, shares its activation.

    With `raw_shortcut` it shares it only where no shape changes: at the start of the net.
    """
    share = stride == 1 or not raw_shortcut
    stage: list[nn.Module] = []
    for i in range(blocks):
        options = (*((before, after, stride) if i == 0 else (after, after, 1)), shortcut, per_conv)
        stage.append(PreactivationBlock(*options, share=i == 0 and share) if preactivation else Block(*options))
    return nn.Sequential(*stage)


class ResNetCIFAR(nn.Sequential):
    """A 3x3 stem and three stages of 16, 32, 64 channels at full, half and quarter size; depth = 6n + 2 layers.

    (N, channels, size, size) -> (N, classes). The `state_dict` keys of the post-activation net are the usual ones:
    conv1, bn1, layer1.0.conv1, ..., fc.

    Args:
        channels: channels of an image
        classes: classes to tell apart
        size: side of an image in pixels, at least 8
        depth: layers with weights: 20, 32, 44, 56, 110; any 6n + 2
        width: multiplier of all channels
        shortcut: where the shape changes, A: subsample and pad with zeros; B: 1x1 conv and batch-norm
        preactivation: batch-norm and ReLU before each conv (and after the last block) instead of behind it; None is no
        shortcut_per_conv: a shortcut around every conv instead of every two, for binary nets; None is no
        raw_shortcut: in the pre-activation net, a shortcut where the shape changes starts at the block's input instead
            of at its first activation, as in the TTQ authors' code; None is no
        final_norm: batch-norm of the pooled features before the classifier, as in the IR-Net and ReCU authors' code;
            None is no

    Raises:
        ValueError: an argument out of its range, or raw_shortcut without preactivation

    Reference: 1512.03385, section 4.2; 1603.05027 for the pre-activation form; 1808.00278 for a shortcut per conv
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        size: int,
        depth: int = 20,
        width: float = 1.0,
        shortcut: str = "A",
        preactivation: bool | None = None,
        shortcut_per_conv: bool | None = None,
        raw_shortcut: bool | None = None,
        final_norm: bool | None = None,
    ) -> None:
        check(channels, classes, size, width, smallest=8)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be A or B, got {shortcut!r}")
        if raw_shortcut and not preactivation:
            raise ValueError("raw_shortcut=true asks for preactivation=true: no other shortcut starts behind a ReLU")
        one, two, three = (scaled(c, width) for c in (16, 32, 64))
        options = (depth - 2) // 6, shortcut, bool(preactivation), bool(shortcut_per_conv), bool(raw_shortcut)
        stages = named(
            layer1=_stage(one, one, 1, *options),
            layer2=_stage(one, two, 2, *options),
            layer3=_stage(two, three, 2, *options),
        )
        stem = named(conv1=conv(channels, one, 3))
        if preactivation:
            body = {**stem, **stages, **named(bn=nn.BatchNorm2d(three), relu=nn.ReLU())}
        else:
            body = {**stem, **named(bn1=nn.BatchNorm2d(one), relu1=nn.ReLU()), **stages}
        norm = named(final_norm=nn.BatchNorm1d(three)) if final_norm else {}
        pool = named(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        super().__init__(named(**body, **pool, **norm, fc=nn.Linear(three, classes)))
        he_init(self)
