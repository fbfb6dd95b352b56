"""Small networks of many families, written the way torchvision and timm write them: what users bring to the package.

`NETWORKS[name](num_classes)` builds one; each is also a factory for recipes (`use: networks:resnet18`). The caller
seeds. Where a torchvision network exists, names of modules and numerics are torchvision's at the same widths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.models.mobilenet_v2 import MobileNetV2, multiple_of_8

# ---------------------------------------------------------------------------------------------------------------------
# What every family shares


class ConvNormActivation(nn.Sequential):
    """torchvision's Conv2dNormActivation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[..., nn.Module] | None = nn.ReLU,
        norm: Callable[..., nn.Module] = nn.BatchNorm2d,
        dilation: int = 1,
    ) -> None:
        padding = (kernel - 1) // 2 * dilation
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation=dilation, groups=groups, bias=False),
            norm(outputs),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """torchvision's: average pool, two 1x1 convolutions, a gate per channel."""

    def __init__(
        self,
        channels: int,
        squeezed: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def _scale(self, input: Tensor) -> Tensor:
        scale = self.avgpool(input)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, input: Tensor) -> Tensor:
        scale = self._scale(input)
        return scale * input


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    if not training or p == 0.0:
        return input
    keep = torch.empty([input.shape[0], *[1] * (input.ndim - 1)]).bernoulli_(1 - p).div_(1 - p)
    return input * keep


fx.wrap("stochastic_depth")


class StochasticDepth(nn.Module):
    """torchvision's: one call of a wrapped function in a traced graph."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, input: Tensor) -> Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training)


# ---------------------------------------------------------------------------------------------------------------------
# ResNet, ResNeXt


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None, groups: int, base: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None, groups: int, base: int):
        super().__init__()
        width = planes if groups == 1 else base * groups * planes // 8
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision's, with `width` channels in the stem (64 there)."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int,
        width: int,
        groups: int = 1,
        base: int = 4,
    ) -> None:
        super().__init__()
        self.inplanes, self.groups, self.base = width, groups, base
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, width, layers[0], 1)
        self.layer2 = self._make_layer(block, width * 2, layers[1], 2)
        self.layer3 = self._make_layer(block, width * 4, layers[2], 2)
        self.layer4 = self._make_layer(block, width * 8, layers[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width * 8 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int):
        downsample = None
        outputs = planes * block.expansion
        if stride != 1 or self.inplanes != outputs:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        made = [block(self.inplanes, planes, stride, downsample, self.groups, self.base)]
        self.inplanes = outputs
        made += [block(outputs, planes, 1, None, self.groups, self.base) for _ in range(1, blocks)]
        return nn.Sequential(*made)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def resnet18(num_classes: int = 10, *, width: int = 16) -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, width)


def resnet50(num_classes: int = 10, *, width: int = 8, layers: tuple[int, int, int, int] = (2, 2, 2, 2)) -> nn.Module:
    return ResNet(Bottleneck, layers, num_classes, width)


def resnext50(num_classes: int = 10, *, width: int = 8) -> nn.Module:
    return ResNet(Bottleneck, (1, 2, 1, 1), num_classes, width, groups=4, base=4)


# ---------------------------------------------------------------------------------------------------------------------
# MobileNetV2, MobileNetV3


def mobilenet_v2(num_classes: int = 10, *, width: float = 0.35) -> nn.Module:
    return MobileNetV2(num_classes, width=width, stem_stride=1)


class MobileNetV3Block(nn.Module):
    """torchvision's InvertedResidual of mobilenetv3.py."""

    def __init__(
        self, inputs: int, kernel: int, expanded: int, outputs: int, se: bool, hs: bool, stride: int, dilation: int
    ) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        activation = nn.Hardswish if hs else nn.ReLU
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(ConvNormActivation(inputs, expanded, 1, norm=norm, activation=activation))
        stride = 1 if dilation > 1 else stride
        layers.append(
            ConvNormActivation(
                expanded, expanded, kernel, stride, expanded, norm=norm, activation=activation, dilation=dilation
            )
        )
        if se:
            squeezed = multiple_of_8(expanded // 4)
            layers.append(SqueezeExcitation(expanded, squeezed, scale_activation=nn.Hardsigmoid))
        layers.append(ConvNormActivation(expanded, outputs, 1, norm=norm, activation=None))
        self.block = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            result += input
        return result


MOBILENET_V3_SMALL = (
    # inputs, kernel, expanded, outputs, squeeze-and-excite, hard-swish, stride
    (16, 3, 16, 16, True, False, 2),
    (16, 3, 72, 24, False, False, 2),
    (24, 3, 88, 24, False, False, 1),
    (24, 5, 96, 40, True, True, 2),
    (40, 5, 240, 40, True, True, 1),
    (40, 5, 240, 40, True, True, 1),
    (40, 5, 120, 48, True, True, 1),
    (48, 5, 144, 48, True, True, 1),
    (48, 5, 288, 96, True, True, 2),
    (96, 5, 576, 96, True, True, 1),
    (96, 5, 576, 96, True, True, 1),
)
MOBILENET_V3_LARGE = (
    (16, 3, 16, 16, False, False, 1),
    (16, 3, 64, 24, False, False, 2),
    (24, 3, 72, 24, False, False, 1),
    (24, 5, 72, 40, True, False, 2),
    (40, 5, 120, 40, True, False, 1),
    (40, 5, 120, 40, True, False, 1),
    (40, 3, 240, 80, False, True, 2),
    (80, 3, 200, 80, False, True, 1),
    (80, 3, 184, 80, False, True, 1),
    (80, 3, 184, 80, False, True, 1),
    (80, 3, 480, 112, True, True, 1),
    (112, 3, 672, 112, True, True, 1),
    (112, 5, 672, 160, True, True, 2),
    (160, 5, 960, 160, True, True, 1),
    (160, 5, 960, 160, True, True, 1),
)


class MobileNetV3(nn.Module):
    """torchvision's."""

    def __init__(self, blocks: tuple, last: int, num_classes: int, width: float, dropout: float = 0.2) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)

        def adjusted(channels: int) -> int:
            return multiple_of_8(channels * width)

        layers: list[nn.Module] = [
            ConvNormActivation(3, adjusted(16), 3, 2, norm=norm, activation=nn.Hardswish),
        ]
        for inputs, kernel, expanded, outputs, se, hs, stride in blocks:
            layers.append(
                MobileNetV3Block(
                    adjusted(inputs), kernel, adjusted(expanded), adjusted(outputs), se, hs, stride, dilation=1
                )
            )
        inputs = adjusted(blocks[-1][3])
        layers.append(ConvNormActivation(inputs, 6 * inputs, 1, norm=norm, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(6 * inputs, adjusted(last)),
            nn.Hardswish(inplace=True),
            nn.Dropout(p=dropout, inplace=True),
            nn.Linear(adjusted(last), num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)

        return self.classifier(x)


def mobilenet_v3_small(num_classes: int = 10, *, width: float = 0.5) -> nn.Module:
    return MobileNetV3(MOBILENET_V3_SMALL, 1024, num_classes, width)


def mobilenet_v3_large(num_classes: int = 10, *, width: float = 0.35) -> nn.Module:
    return MobileNetV3(MOBILENET_V3_LARGE, 1280, num_classes, width)


# ---------------------------------------------------------------------------------------------------------------------
# EfficientNet, EfficientNet-Lite


class MBConv(nn.Module):
    """torchvision's MBConv; without squeeze-and-excite and with ReLU6 it is the block of EfficientNet-Lite."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        expansion: int,
        kernel: int,
        stride: int,
        activation: Callable[..., nn.Module],
        se: bool,
        drop: float,
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        expanded = multiple_of_8(inputs * expansion)
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(ConvNormActivation(inputs, expanded, 1, activation=activation))
        layers.append(ConvNormActivation(expanded, expanded, kernel, stride, expanded, activation=activation))
        if se:
            squeezed = max(1, inputs // 4)
            layers.append(SqueezeExcitation(expanded, squeezed, activation=partial(nn.SiLU, inplace=True)))
        layers.append(ConvNormActivation(expanded, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop, "row") if drop else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result


EFFICIENTNET = (
    # expansion, kernel, stride, inputs, outputs, layers
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


class EfficientNet(nn.Module):
    def __init__(
        self, num_classes: int, width: float, depth: float, activation: Callable[..., nn.Module], se: bool, drop: float
    ) -> None:
        super().__init__()
        channels = multiple_of_8(32 * width)
        layers: list[nn.Module] = [ConvNormActivation(3, channels, 3, 2, activation=activation)]
        for expansion, kernel, stride, _, base, repeats in EFFICIENTNET:
            stage = []
            outputs = multiple_of_8(base * width)
            for repeat in range(max(1, round(repeats * depth))):
                step = stride if repeat == 0 else 1
                stage.append(MBConv(channels, outputs, expansion, kernel, step, activation, se, drop))
                channels = outputs
            layers.append(nn.Sequential(*stage))
        layers.append(ConvNormActivation(channels, 4 * channels, 1, activation=activation))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(4 * channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def efficientnet_lite(num_classes: int = 10, *, width: float = 0.35, depth: float = 0.5) -> nn.Module:
    return EfficientNet(num_classes, width, depth, nn.ReLU6, se=False, drop=0.0)


def efficientnet_b0(
    num_classes: int = 10, *, width: float = 0.35, depth: float = 0.5, stochastic_depth: float = 0.2
) -> nn.Module:
    return EfficientNet(num_classes, width, depth, nn.SiLU, se=True, drop=stochastic_depth)


# ---------------------------------------------------------------------------------------------------------------------
# RegNet


class BottleneckTransform(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int, se_ratio: float) -> None:
        super().__init__()
        self.add_module("a", ConvNormActivation(inputs, outputs, 1))
        self.add_module("b", ConvNormActivation(outputs, outputs, 3, stride, outputs // group_width))
        if se_ratio:
            self.add_module("se", SqueezeExcitation(outputs, round(se_ratio * inputs)))
        self.add_module("c", ConvNormActivation(outputs, outputs, 1, activation=None))


class ResBottleneckBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int, se_ratio: float) -> None:
        super().__init__()
        self.proj = None
        if inputs != outputs or stride != 1:
            self.proj = ConvNormActivation(inputs, outputs, 1, stride, activation=None)
        self.f = BottleneckTransform(inputs, outputs, stride, group_width, se_ratio)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


class RegNet(nn.Module):
    """torchvision's, by widths and depths."""

    def __init__(
        self, num_classes: int, widths: tuple[int, ...], depths: tuple[int, ...], group_width: int, se_ratio: float
    ) -> None:
        super().__init__()
        self.stem = ConvNormActivation(3, 16, 3, 2)
        inputs = 16
        stages = []
        for width, depth in zip(widths, depths, strict=True):
            blocks = [
                ResBottleneckBlock(inputs if i == 0 else width, width, 2 if i == 0 else 1, group_width, se_ratio)
                for i in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            inputs = width
        self.trunk_output = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, mean=0.0, std=(2.0 / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.trunk_output(x)

        x = self.avgpool(x)
        x = x.flatten(start_dim=1)
        return self.fc(x)


def regnet_y(num_classes: int = 10) -> nn.Module:
    return RegNet(num_classes, (16, 32, 48, 64), (1, 1, 2, 1), group_width=8, se_ratio=0.25)


def regnet_x(num_classes: int = 10) -> nn.Module:
    return RegNet(num_classes, (16, 32, 48, 64), (1, 1, 2, 1), group_width=16, se_ratio=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# DenseNet


class DenseLayer(nn.Module):
    """torchvision's: BatchNorm and ReLU come before the convolution, behind a concatenation."""

    def __init__(self, inputs: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        concatenated = torch.cat(inputs, 1)
        return self.conv1(self.relu1(self.norm1(concatenated)))

    def forward(self, input: list[Tensor]) -> Tensor:
        return self.conv2(self.relu2(self.norm2(self.bn_function(input))))


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, inputs: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        for index in range(layers):
            self.add_module(f"denselayer{index + 1}", DenseLayer(inputs + index * growth, growth, bottleneck))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class DenseNet(nn.Module):
    def __init__(self, num_classes: int, growth: int, layers: tuple[int, ...], initial: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, initial, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(initial))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        channels = initial
        for index, count in enumerate(layers):
            self.features.add_module(f"denseblock{index + 1}", DenseBlock(count, channels, growth, 4))
            channels += count * growth
            if index != len(layers) - 1:
                self.features.add_module(f"transition{index + 1}", Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


def densenet(num_classes: int = 10, *, growth: int = 8, layers: tuple[int, ...] = (2, 3, 2)) -> nn.Module:
    return DenseNet(num_classes, growth, layers, 2 * growth)


# ---------------------------------------------------------------------------------------------------------------------
# GoogLeNet, Inception v3, SqueezeNet


class BasicConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, **how) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **how)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class GoogLeNetBlock(nn.Module):
    def __init__(self, inputs: int, one: int, three_in: int, three: int, five_in: int, five: int, pooled: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(inputs, one, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(inputs, three_in, kernel_size=1), BasicConv2d(three_in, three, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(inputs, five_in, kernel_size=1), BasicConv2d(five_in, five, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(inputs, pooled, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class GoogLeNet(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(16, 16, kernel_size=1)
        self.conv3 = BasicConv2d(16, 32, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = GoogLeNetBlock(32, 16, 16, 24, 8, 8, 8)
        self.inception3b = GoogLeNetBlock(56, 16, 16, 24, 8, 16, 8)
        self.maxpool3 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception4a = GoogLeNetBlock(64, 16, 16, 32, 8, 16, 16)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.2)
        self.fc = nn.Linear(80, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.inception3b(self.inception3a(x))
        x = self.inception4a(self.maxpool3(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.dropout(x)
        return self.fc(x)


class InceptionA(nn.Module):
    """The pool branch averages over its padding too."""

    def __init__(self, inputs: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 16, kernel_size=1)
        self.branch5x5_1 = BasicConv2d(inputs, 12, kernel_size=1)
        self.branch5x5_2 = BasicConv2d(12, 16, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 16, kernel_size=1)
        self.branch3x3dbl_2 = BasicConv2d(16, 24, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(24, 24, kernel_size=3, padding=1)
        self.branch_pool = BasicConv2d(inputs, pool_features, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        outputs = [branch1x1, branch5x5, branch3x3dbl, branch_pool]
        return torch.cat(outputs, 1)


class InceptionB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(inputs, 32, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 16, kernel_size=1)
        self.branch3x3dbl_2 = BasicConv2d(16, 24, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(24, 24, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.max_pool2d(x, kernel_size=3, stride=2)
        return torch.cat([self.branch3x3(x), branch3x3dbl, branch_pool], 1)


class InceptionC(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 24, kernel_size=1)
        self.branch7x7_1 = BasicConv2d(inputs, channels, kernel_size=1)
        self.branch7x7_2 = BasicConv2d(channels, channels, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(channels, 24, kernel_size=(7, 1), padding=(3, 0))
        self.branch_pool = BasicConv2d(inputs, 24, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch_pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.branch1x1(x), branch7x7, branch_pool], 1)


class InceptionV3(nn.Module):
    """The stem and one block of each kind, at a quarter of the width."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 16, kernel_size=3, stride=2)
        self.Conv2d_2b_3x3 = BasicConv2d(16, 24, kernel_size=3, padding=1)
        self.maxpool1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = InceptionA(24, pool_features=8)
        self.Mixed_6a = InceptionB(64)
        self.Mixed_6b = InceptionC(120, channels=24)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.5)
        self.fc = nn.Linear(72, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_1a_3x3(x)
        x = self.Conv2d_2b_3x3(x)
        x = self.maxpool1(x)
        x = self.Mixed_5b(x)
        x = self.Mixed_6a(x)
        x = self.Mixed_6b(x)
        x = self.avgpool(x)
        x = self.dropout(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand1x1: int, expand3x3: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand1x1, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand3x3, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    """torchvision's 1.1 with fewer blocks: the classifier is a convolution."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(32, 16, 32, 32),
            Fire(64, 16, 32, 32),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(64, 16, 48, 48),
        )
        final_conv = nn.Conv2d(96, num_classes, kernel_size=1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5), final_conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.classifier(x)
        return torch.flatten(x, 1)


def googlenet(num_classes: int = 10) -> nn.Module:
    return GoogLeNet(num_classes)


def inception_v3(num_classes: int = 10) -> nn.Module:
    return InceptionV3(num_classes)


def squeezenet(num_classes: int = 10) -> nn.Module:
    return SqueezeNet(num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# U-Net


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Resized(nn.Module):
    """To the size of the skip connection, as feature pyramids write it."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.interpolate(x, size=skip.shape[-2:], mode=self.mode)


class Up(nn.Module):
    def __init__(self, inputs: int, skipped: int, outputs: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "nearest":
            self.up: nn.Module = Resized("nearest")
        elif how == "bilinear":
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        elif how == "bilinear_corners":
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(inputs, inputs // 2, kernel_size=2, stride=2)
            inputs //= 2
        self.conv = DoubleConv(inputs + skipped, outputs)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1, x2) if self.how == "nearest" else self.up(x1)
        x = torch.cat([x2, x1], dim=1)
        return self.conv(x)


class UNet(nn.Module):
    """A classifier, or with `dense` a class per pixel (N, K, H, W)."""

    def __init__(self, num_classes: int, how: str, width: int, dense: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, width * 2))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width * 2, width * 4))
        self.up1 = Up(width * 4, width * 2, width * 2, how)
        self.up2 = Up(width * 2, width, width, how)
        self.dense = dense
        if dense:
            self.outc = nn.Conv2d(width, num_classes, kernel_size=1)
        else:
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        if self.dense:
            return self.outc(x)
        return self.head(torch.flatten(self.pool(x), 1))


def unet_nearest(num_classes: int = 10, *, width: int = 8, dense: bool = False) -> nn.Module:
    return UNet(num_classes, "nearest", width, dense)


def unet_bilinear(num_classes: int = 10, *, width: int = 8, dense: bool = False) -> nn.Module:
    return UNet(num_classes, "bilinear", width, dense)


def unet_bilinear_corners(num_classes: int = 10, *, width: int = 8, dense: bool = False) -> nn.Module:
    return UNet(num_classes, "bilinear_corners", width, dense)


def unet_transposed(num_classes: int = 10, *, width: int = 8, dense: bool = False) -> nn.Module:
    return UNet(num_classes, "transposed", width, dense)


# ---------------------------------------------------------------------------------------------------------------------
# Vision transformers


class MLP(nn.Sequential):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, channels), nn.Dropout(0.0)
        )


class EncoderBlock(nn.Module):
    def __init__(self, heads: int, hidden_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.ln_1 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(hidden_dim, heads, dropout=0.0, batch_first=True)
        self.dropout = nn.Dropout(0.0)
        self.ln_2 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.mlp = MLP(hidden_dim, mlp_dim)

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x)
        x = x + input

        y = self.ln_2(x)
        y = self.mlp(y)
        return x + y


class Encoder(nn.Module):
    def __init__(self, seq_length: int, layers: int, heads: int, hidden_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, seq_length, hidden_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(0.0)
        self.layers = nn.Sequential()
        for index in range(layers):
            self.layers.add_module(f"encoder_layer_{index}", EncoderBlock(heads, hidden_dim, mlp_dim))
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        input = input + self.pos_embedding
        return self.ln(self.layers(self.dropout(input)))


class VisionTransformer(nn.Module):
    """torchvision's."""

    def __init__(
        self, num_classes: int, image_size: int, patch_size: int, layers: int, heads: int, hidden_dim: int, mlp_dim: int
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.hidden_dim = image_size, patch_size, hidden_dim
        self.conv_proj = nn.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)
        seq_length = (image_size // patch_size) ** 2
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        seq_length += 1
        self.encoder = Encoder(seq_length, layers, heads, hidden_dim, mlp_dim)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(hidden_dim, num_classes))

    def _process_input(self, x: Tensor) -> Tensor:
        n, _c, h, w = x.shape
        p = self.patch_size
        torch._assert(h == self.image_size, f"Wrong image height! Expected {self.image_size} but got {h}!")
        torch._assert(w == self.image_size, f"Wrong image width! Expected {self.image_size} but got {w}!")
        n_h = h // p
        n_w = w // p
        x = self.conv_proj(x)
        x = x.reshape(n, self.hidden_dim, n_h * n_w)
        return x.permute(0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        n = x.shape[0]
        batch_class_token = self.class_token.expand(n, -1, -1)
        x = torch.cat([batch_class_token, x], dim=1)
        x = self.encoder(x)
        x = x[:, 0]
        return self.heads(x)


class PatchEmbed(nn.Module):
    """timm's."""

    def __init__(self, patch_size: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        _B, _C, _H, _W = x.shape
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2)
        return self.norm(x)


class Attention(nn.Module):
    """timm's, fused or written out."""

    def __init__(self, dim: int, num_heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)
        x = self.proj(x)
        return self.proj_drop(x)


class DropPath(nn.Module):
    """timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(1 - self.drop_prob)
        return x * keep.div_(1 - self.drop_prob)


class Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int, act: Callable[..., nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = act()
        self.drop1 = nn.Dropout(0.0)
        self.fc2 = nn.Linear(hidden, channels)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class TimmBlock(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, fused)
        self.ls1 = nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, dim * 4)
        self.ls2 = nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TimmViT(nn.Module):
    def __init__(
        self, num_classes: int, image_size: int, patch_size: int, depth: int, heads: int, dim: int, fused: bool
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim) * 0.02)
        self.pos_drop = nn.Dropout(0.0)
        self.norm_pre = nn.Identity()
        self.blocks = nn.Sequential(*(TimmBlock(dim, heads, fused, 0.1) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.Identity()
        self.head_drop = nn.Dropout(0.0)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        x = self.norm_pre(x)
        x = self.blocks(x)
        x = self.norm(x)
        x = x[:, 0]
        x = self.fc_norm(x)
        x = self.head_drop(x)
        return self.head(x)


def vit(num_classes: int = 10, *, image_size: int = 32, patch_size: int = 8, hidden_dim: int = 48) -> nn.Module:
    return VisionTransformer(num_classes, image_size, patch_size, 2, 3, hidden_dim, hidden_dim * 2)


def vit_timm(num_classes: int = 10, *, image_size: int = 32, patch_size: int = 8, dim: int = 48) -> nn.Module:
    return TimmViT(num_classes, image_size, patch_size, 2, 3, dim, fused=True)


def vit_explicit(num_classes: int = 10, *, image_size: int = 32, patch_size: int = 8, dim: int = 48) -> nn.Module:
    return TimmViT(num_classes, image_size, patch_size, 2, 3, dim, fused=False)


# ---------------------------------------------------------------------------------------------------------------------
# ConvNeXt, Swin


class Permute(nn.Module):
    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class CNBlock(nn.Module):
    """torchvision's. The layer scale starts at 1e-6 there; here it is large enough to matter."""

    def __init__(self, dim: int, drop: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, bias=True),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(in_features=dim, out_features=4 * dim, bias=True),
            nn.GELU(),
            nn.Linear(in_features=4 * dim, out_features=dim, bias=True),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.rand(dim, 1, 1) + 0.5)
        self.stochastic_depth = StochasticDepth(drop, "row")

    def forward(self, input: Tensor) -> Tensor:
        result = self.layer_scale * self.block(input)
        result = self.stochastic_depth(result)
        result += input
        return result


class ConvNeXt(nn.Module):
    def __init__(self, num_classes: int, dims: tuple[int, ...], depths: tuple[int, ...]) -> None:
        super().__init__()
        norm = partial(LayerNorm2d, eps=1e-6)
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=4, bias=True), norm(dims[0]))
        ]
        for index, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            layers.append(nn.Sequential(*(CNBlock(dim, 0.1) for _ in range(depth))))
            if index + 1 < len(dims):
                layers.append(nn.Sequential(norm(dim), nn.Conv2d(dim, dims[index + 1], kernel_size=2, stride=2)))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(norm(dims[-1]), nn.Flatten(1), nn.Linear(dims[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        return self.classifier(x)


class WindowAttention(nn.Module):
    """Shifted windows with a relative position bias and, where shifted, a mask."""

    def __init__(self, dim: int, size: int, window: int, shift: int, heads: int) -> None:
        super().__init__()
        self.size, self.window, self.shift, self.heads = size, window, shift, heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.5)
        axis = torch.arange(window)
        coordinates = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        relative = (coordinates[:, :, None] - coordinates[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        regions = torch.zeros(size, size)
        edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else (slice(None),)
        for count, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
            regions[rows, columns] = count
        parts = regions.view(size // window, window, size // window, window).permute(0, 2, 1, 3).reshape(-1, window**2)
        mask = (parts[:, None, :] != parts[:, :, None]).float() * -100.0
        self.register_buffer("attn_mask", mask[None, :, None])

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = (H // w) * (W // w)
        x = x.view(B, H // w, w, W // w, w, C)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B * windows, w * w, C)
        qkv = self.qkv(x).reshape(B * windows, w * w, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * (C // self.heads) ** -0.5
        attn = q.matmul(k.transpose(-2, -1))
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        attn = attn + bias.view(w * w, w * w, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.shift:
            attn = attn.view(B, windows, self.heads, w * w, w * w) + self.attn_mask
            attn = attn.view(-1, self.heads, w * w, w * w)
        attn = F.softmax(attn, dim=-1)
        x = attn.matmul(v).transpose(1, 2).reshape(B * windows, w * w, C)
        x = self.proj(x)
        x = x.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x


class SwinBlock(nn.Module):
    def __init__(self, dim: int, size: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = WindowAttention(dim, size, 4, shift, 2)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = MLP(dim, dim * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x0 = x[..., 0::2, 0::2, :]
        x1 = x[..., 1::2, 0::2, :]
        x2 = x[..., 0::2, 1::2, :]
        x3 = x[..., 1::2, 1::2, :]
        x = torch.cat([x0, x1, x2, x3], -1)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    def __init__(self, num_classes: int, dim: int, shift: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, dim, kernel_size=4, stride=4), Permute([0, 2, 3, 1]), nn.LayerNorm(dim)),
            SwinBlock(dim, 8, 0),
            SwinBlock(dim, 8, shift),
            PatchMerging(dim),
            SwinBlock(dim * 2, 4, 0),
        )
        self.norm = nn.LayerNorm(dim * 2)
        self.permute = Permute([0, 3, 1, 2])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.head = nn.Linear(dim * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.norm(x)
        x = self.permute(x)
        x = self.avgpool(x)
        x = self.flatten(x)
        return self.head(x)


def convnext(num_classes: int = 10, *, dims: tuple[int, ...] = (16, 32), depths: tuple[int, ...] = (1, 1)) -> nn.Module:
    return ConvNeXt(num_classes, dims, depths)


def swin(num_classes: int = 10, *, dim: int = 16, shift: int = 2) -> nn.Module:
    """For images of 32 px."""
    return Swin(num_classes, dim, shift)


def swin_unshifted(num_classes: int = 10) -> nn.Module:
    """For images of 32 px: every block sees the same windows, so nothing is rolled."""
    return Swin(num_classes, 16, 0)


# ---------------------------------------------------------------------------------------------------------------------
# ShuffleNetV2, GhostNet, VGG


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups

    x = x.view(batchsize, groups, channels_per_group, height, width)

    x = torch.transpose(x, 1, 2).contiguous()

    return x.view(batchsize, num_channels, height, width)


class ShuffleUnit(nn.Module):
    """torchvision's InvertedResidual of shufflenetv2.py."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = outputs // 2
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        else:
            self.branch1 = nn.Sequential()
        self.branch2 = nn.Sequential(
            nn.Conv2d(inputs if stride > 1 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)

        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self, num_classes: int, channels: tuple[int, int, int, int], repeats: tuple[int, int]) -> None:
        super().__init__()
        inputs, *stages, last = channels
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, inputs, 3, 2, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for index, (outputs, repeat) in enumerate(zip(stages, repeats, strict=True)):
            units = [ShuffleUnit(inputs if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(repeat)]
            setattr(self, f"stage{index + 2}", nn.Sequential(*units))
            inputs = outputs
        self.conv5 = nn.Sequential(nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU(inplace=True))
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.maxpool(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.conv5(x)
        x = x.mean([2, 3])
        return self.fc(x)


class GhostModule(nn.Module):
    """timm's: half of the channels are cheap copies; the result is sliced to the wanted number."""

    def __init__(self, inputs: int, outputs: int, activation: bool = True) -> None:
        super().__init__()
        self.out_chs = outputs
        primary = (outputs + 1) // 2
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inputs, primary, 1, bias=False),
            nn.BatchNorm2d(primary),
            nn.ReLU(inplace=True) if activation else nn.Identity(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(primary, primary, 3, 1, 1, groups=primary, bias=False),
            nn.BatchNorm2d(primary),
            nn.ReLU(inplace=True) if activation else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        out = torch.cat([x1, x2], dim=1)
        return out[:, : self.out_chs, :, :]


class GhostBottleneck(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, se: bool) -> None:
        super().__init__()
        self.stride, self.se = stride, se
        self.ghost1 = GhostModule(inputs, middle)
        if stride > 1:
            self.conv_dw = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
            self.bn_dw = nn.BatchNorm2d(middle)
        if se:
            self.conv_reduce = nn.Conv2d(middle, 8, 1)
            self.conv_expand = nn.Conv2d(8, middle, 1)
        self.ghost2 = GhostModule(middle, outputs, activation=False)
        self.shortcut = nn.Sequential()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.ghost1(x)
        if self.stride > 1:
            x = self.bn_dw(self.conv_dw(x))
        if self.se:
            x_se = x.mean((2, 3), keepdim=True)
            x_se = self.conv_expand(F.relu(self.conv_reduce(x_se)))
            x = x * F.hardsigmoid(x_se)
        x = self.ghost2(x)
        x += self.shortcut(shortcut)
        return x


class GhostNet(nn.Module):
    """Middle widths that are odd, so that a slice drops a channel."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(
            GhostBottleneck(16, 24, 16, 1, False),
            GhostBottleneck(16, 37, 24, 2, True),
            GhostBottleneck(24, 48, 24, 1, True),
        )
        self.conv_head = nn.Conv2d(24, 64, 1)
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = F.adaptive_avg_pool2d(x, 1)
        x = F.relu(self.conv_head(x))
        x = x.view(x.size(0), -1)
        x = F.dropout(x, p=0.2, training=self.training)
        return self.classifier(x)


class VGG(nn.Module):
    def __init__(self, num_classes: int, channels: tuple[int | str, ...], pooled: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in channels:
            if isinstance(outputs, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((pooled, pooled))
        self.classifier = nn.Sequential(
            nn.Linear(inputs * pooled * pooled, hidden),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def shufflenet_v2(num_classes: int = 10) -> nn.Module:
    return ShuffleNetV2(num_classes, (16, 32, 64, 96), (2, 2))


def ghostnet(num_classes: int = 10) -> nn.Module:
    return GhostNet(num_classes)


def vgg_bn(num_classes: int = 10) -> nn.Module:
    return VGG(num_classes, (16, "M", 24, "M", 32, 32, "M"), 2, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Activations and normalisations that are none of the above, dilation, a MobileViT block


class Mixed(nn.Module):
    """One layer of each activation that int8 kernels do not know, GroupNorm, and a pooling to 2x2."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        activations: list[nn.Module] = [
            nn.LeakyReLU(0.1, inplace=True),
            nn.PReLU(16),
            nn.ELU(inplace=True),
            nn.SiLU(),
            nn.Mish(),
            nn.Tanh(),
            nn.GELU(approximate="tanh"),
        ]
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()]
        for index, activation in enumerate(activations):
            layers += [
                nn.Conv2d(16, 16, 3, padding=2 if index % 2 else 1, dilation=2 if index % 2 else 1, bias=False),
                nn.BatchNorm2d(16),
                activation,
                nn.Dropout2d(0.1),
            ]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        return self.head(self.drop(x.flatten(1)))


class MobileViTBlock(nn.Module):
    """timm's: local convolutions, a transformer over unfolded patches, fusion with the input."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv_kxk = ConvNormActivation(channels, channels, 3, activation=nn.SiLU)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(TimmBlock(dim, 2, True, 0.0))
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = ConvNormActivation(dim, channels, 1, activation=nn.SiLU)
        self.conv_fusion = ConvNormActivation(2 * channels, channels, 3, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv_1x1(self.conv_kxk(x))
        p = self.patch
        B, C, H, W = x.shape
        rows, columns = H // p, W // p
        x = x.reshape(B * C * rows, p, columns, p).transpose(1, 2)
        x = x.reshape(B, C, rows * columns, p * p).transpose(1, 3).reshape(B * p * p, rows * columns, -1)
        x = self.norm(self.transformer(x))
        x = x.contiguous().view(B, p * p, rows * columns, -1)
        x = x.transpose(1, 3).reshape(B * C * rows, columns, p, p)
        x = x.transpose(1, 2).reshape(B, C, rows * p, columns * p)
        x = self.conv_proj(x)
        return self.conv_fusion(torch.cat((shortcut, x), dim=1))


class MobileViT(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = ConvNormActivation(3, 16, 3, 2, activation=nn.SiLU)
        self.stages = nn.Sequential(MBConv(16, 24, 2, 3, 2, nn.SiLU, False, 0.0), MobileViTBlock(24, 32, 2))
        self.fc = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def mixed(num_classes: int = 10) -> nn.Module:
    return Mixed(num_classes)


def mobilevit(num_classes: int = 10) -> nn.Module:
    return MobileViT(num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# The registry


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    factory.__name__: factory
    for factory in (
        resnet18,
        resnet50,
        resnext50,
        mobilenet_v2,
        mobilenet_v3_small,
        mobilenet_v3_large,
        efficientnet_lite,
        efficientnet_b0,
        regnet_x,
        regnet_y,
        densenet,
        googlenet,
        inception_v3,
        squeezenet,
        unet_nearest,
        unet_bilinear,
        unet_bilinear_corners,
        unet_transposed,
        vit,
        vit_timm,
        vit_explicit,
        convnext,
        swin,
        swin_unshifted,
        shufflenet_v2,
        ghostnet,
        vgg_bn,
        mixed,
        mobilevit,
    )
}
"""From the number of classes to a network for images of `size_of(name)` pixels."""

DENSE: dict[str, Callable[[int], nn.Module]] = {
    "unet_nearest": partial(unet_nearest, dense=True),
    "unet_bilinear": partial(unet_bilinear, dense=True),
    "unet_transposed": partial(unet_transposed, dense=True),
}
"""Networks whose output is a map of classes (N, K, H, W)."""

_SIZES = {
    # Below 64 px their last maps are a single pixel.
    "resnet18": 64,
    "resnet50": 64,
    "resnext50": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "efficientnet_lite": 64,
    "efficientnet_b0": 64,
    "regnet_x": 64,
    "regnet_y": 64,
    "densenet": 64,
    "inception_v3": 48,
}


def size_of(name: str) -> int:
    """The side in pixels of the images that the network of the registry is meant for."""
    return _SIZES.get(name, 32)


def images_of(count: int, size: int, seed: int = 0) -> Tensor:
    """Images (count, 3, size, size) in [-1, 1]: waves of many directions and colours with noise; no two alike."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, size)
    angle, frequency, phase = torch.rand(3, count, 1, 1, generator=generator) * torch.tensor(
        [6.28, 12.0, 6.28]
    ).reshape(3, 1, 1, 1)
    waves = torch.sin((axis[:, None] * angle.cos() + axis * angle.sin()) * frequency + phase)
    colours = torch.randn(count, 3, 1, 1, generator=generator) * 0.5
    noise = torch.randn(count, 3, size, size, generator=generator) * 0.2
    return (waves[:, None] * colours + noise + 0.3 * colours.flip(0)).clamp(-1, 1)


def settle(module: nn.Module, images_NCHW: Tensor, *, seed: int = 0, batch_size: int = 16) -> nn.Module:
    """The module in eval mode, with no layer dead: normalisations get random gains and offsets, zero parameters get
    values, BatchNorm the statistics of the images, and logits a spread of about 1 around 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, mean: float, std: float) -> Tensor:
        return mean + std * torch.randn(like.shape, generator=generator)

    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, norms):
                layer.weight.copy_(draw(layer.weight, 1.0, 0.2).abs() + 0.1)
                layer.bias.copy_(draw(layer.bias, 0.0, 0.2))
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(draw(parameter, 0.0, 0.1))
        module.eval()
        batchnorms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
        momenta = [layer.momentum for layer in batchnorms]
        for layer in batchnorms:
            layer.reset_running_stats()
            layer.momentum = None  # the average over all batches
            layer.train()
        for batch in images_NCHW.split(batch_size):
            module(batch)
        for layer, momentum in zip(batchnorms, momenta, strict=True):
            layer.momentum = momentum
        module.eval()

        # A fresh head answers nearly the same for all images: spread the logits, and give each class its share.
        head = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))][-1]
        head.weight.div_(module(images_NCHW).std(0).mean())
        if isinstance(head, nn.Linear):
            head.bias.sub_(module(images_NCHW).mean(0))
    return module
