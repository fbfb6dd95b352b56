"""MobileNetV2: Sandler et al., 2018 (arXiv:1801.04381), with torchvision's parameter names and numerics.

Weights trained with torchvision load as they are. Weights that come from TensorFlow need `padding: same`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.settings import Settings

Padding = Literal["symmetric", "same"]

BLOCKS = (
    # expansion, channels, repeats, stride of the first (table 2 of the paper)
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvNormAct(nn.Sequential):
    """Convolution, BatchNorm, ReLU6. Stride 2 and padding `same`: zeros below and right, at odd sizes on all sides."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: Padding, groups: int = 1) -> None:
        # TensorFlow's SAME, stride 2 and a kernel of 3: 1 in all for an even size, at the end, and 2 for an odd one.
        self.pad_end = padding == "same" and stride == 2
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, 0 if self.pad_end else kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )

    def forward(self, input: Tensor) -> Tensor:
        x = F.pad(input, (input.shape[3] % 2, 1, input.shape[2] % 2, 1)) if self.pad_end else input
        for layer in self:
            x = layer(x)
        return x


class InvertedResidual(nn.Module):
    """Widen 1x1, filter each channel 3x3, narrow 1x1 without an activation; added to the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, padding: Padding) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [ConvNormAct(inputs, hidden, 1, 1, padding)] if expansion != 1 else []
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *widen,
            ConvNormAct(hidden, hidden, 3, stride, padding, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """Logits (N, num_classes) of images (N, colours, H, W). Freshly initialised from torch's global random state."""

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        width: float = 1.0,
        padding: Padding = "symmetric",
        stem_stride: int = 2,
        dropout: float = 0.2,
        colours: int = 3,
    ) -> None:
        super().__init__()
        channels = multiple_of_8(32 * width)
        last = multiple_of_8(1280 * max(1.0, width))
        features: list[nn.Module] = [ConvNormAct(colours, channels, 3, stem_stride, padding)]
        for expansion, base, repeats, stride in BLOCKS:
            outputs = multiple_of_8(base * width)
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                features.append(InvertedResidual(channels, outputs, step, expansion, padding))
                channels = outputs
        features.append(ConvNormAct(channels, last, 1, 1, padding))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        self.apply(_initialise)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(images_NCHW), 1).flatten(1)
        return self.classifier(x)


def multiple_of_8(channels: float) -> int:
    """The multiple of 8 nearest to `channels` (halves up), at least 8 and no more than 10 % below `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0, 0.01)
        nn.init.zeros_(layer.bias)


class MobileNetV2Settings(Settings):
    """The network of the examples: fast on ARM, and it loses little in int8."""

    use: Literal["mobilenet_v2"]
    width: float = Field(default=1.0, ge=0.1, le=4)
    """Multiplies every layer's channels, rounded to multiples of 8."""
    padding: Padding = "symmetric"
    """At stride 2: `symmetric` as in torchvision, `same` as in TensorFlow; what the weights were trained with."""
    stem_stride: Literal[1, 2] = 2
    """1 keeps the resolution of small images, such as 32x32."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Before the classifier, in training."""
    weights: str | None = None
    """A .safetensors, .pth or .pt file with torchvision's names to start from; null starts from random weights."""


def build_mobilenet_v2(settings: MobileNetV2Settings, num_classes: int, channels: int = 3) -> MobileNetV2:
    return MobileNetV2(
        num_classes,
        width=settings.width,
        padding=settings.padding,
        stem_stride=settings.stem_stride,
        dropout=settings.dropout,
        colours=channels,
    )
