"""Networks put together from parts at random: a factory for recipes, and what hypothesis draws its arguments from.

`build(num_classes, parts)`; a part is (kind, width, stride). Widths are multiples of 4.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 16


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Plain(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs, self.layer = width, conv(inputs, width, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class Residual(nn.Module):
    """ResNet's: a projection only where the shape changes, and a ReLU behind the sum."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs = width
        self.one, self.two = conv(inputs, width, 3, stride), conv(width, width)
        self.projection = conv(inputs, width, 1, stride) if inputs != width or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + self.projection(x))


class Grouped(nn.Module):
    """A bottleneck with four groups."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs = inputs
        self.one, self.two, self.three = conv(inputs, width, 1), conv(width, width, 3, 1, 4), conv(width, inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(F.relu6(self.two(F.relu6(self.one(x)))))


class Inverted(nn.Module):
    """MobileNet's, with a skip connection where the shape allows one."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs, hidden = width, inputs * 2
        self.skip = stride == 1 and inputs == width
        self.layers = nn.Sequential(
            conv(inputs, hidden, 1),
            nn.ReLU6(),
            conv(hidden, hidden, 3, stride, hidden),
            nn.ReLU6(),
            conv(hidden, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skip else self.layers(x)


class Squeezed(nn.Module):
    """A gated branch beside an identity: squeeze-and-excite."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs = inputs
        self.one, self.two = conv(inputs, width), conv(width, inputs, 1)
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x))
        return x + self.two(y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1))))))


class Concatenated(nn.Module):
    """DenseNet's: BatchNorm and ReLU come first, and the input stays beside what is made of it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs = inputs + width
        self.norm, self.layer = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(F.relu(self.norm(x)))], 1)


class Branched(nn.Module):
    """Inception's: branches of different kernels, side by side."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.outputs = width + 4
        self.one, self.three = conv(inputs, 4, 1, stride), conv(inputs, width, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.one(x), self.three(x)], 1))


KINDS = {kind.__name__.lower(): kind for kind in (Plain, Residual, Grouped, Inverted, Squeezed, Concatenated, Branched)}


class Drawn(nn.Module):
    def __init__(self, num_classes: int, parts: list[list[object]]) -> None:
        super().__init__()
        made, width = [Plain(3, 8, 2)], 8
        for kind, outputs, stride in parts:
            made.append(KINDS[kind](width, outputs, stride))
            width = made[-1].outputs
        self.parts = nn.Sequential(*made)
        self.hidden, self.head = nn.Linear(width, 12), nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.adaptive_avg_pool2d(self.parts(x), 1).flatten(1))))


def build(num_classes: int, parts: list[list[object]]) -> nn.Module:
    return Drawn(num_classes, parts)


PARTS = st.lists(
    st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from([8, 12, 16]), st.sampled_from([1, 1, 2])).map(list),
    min_size=1,
    max_size=5,
)
