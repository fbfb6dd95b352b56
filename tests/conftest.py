"""Small networks and data that several test files use."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.product import Batch, Network, Preprocess, Product, Run, Structure
from compress.progress import Silent
from compress.stages.export import Export
from compress.stages.quantize import Quantize

PREPROCESS = Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)


class SmallNet(nn.Module):
    """Every kind of layer that int8 knows, in the ways people write them."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU6()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(24 * 2 * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_bn(self.stem(F.pad(x, (0, 1, 0, 1)))))
        y = self.relu(self.depthwise_bn(self.depthwise(x)))
        x = torch.relu(x + self.point(y))
        x = self.pool(self.down(x))
        return self.head(self.dropout(x.reshape(x.size(0), -1)))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with weights and BatchNorm statistics that leave no layer dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                child.weight.copy_(
                    torch.randn(child.weight.shape, generator=generator) / child.weight[0].numel() ** 0.5
                )
            if isinstance(child, nn.BatchNorm2d):
                child.running_mean.copy_(torch.randn(child.num_features, generator=generator) * 0.1)
                child.running_var.copy_(torch.rand(child.num_features, generator=generator) + 0.5)
                child.weight.copy_(torch.rand(child.num_features, generator=generator) + 0.5)
                child.bias.copy_(torch.randn(child.num_features, generator=generator) * 0.3)
    return module.eval()


class Stripes:
    """Data made of numbers: a class is an orientation and a colour of stripes, with noise."""

    labels = ("a", "b", "c", "d", "e")
    preprocess = PREPROCESS
    fingerprint = "stripes"
    channels_last = True
    task = "classification"
    scale = None
    label_weights = None

    def __init__(self, train: int = 64, evaluation: int = 40) -> None:
        generator = torch.Generator().manual_seed(7)
        axis = torch.linspace(0, 6.28, 16)
        self.splits = {}
        for split, count in (("train", train), ("evaluation", evaluation)):
            labels = torch.arange(count) % 5
            waves = torch.stack([(axis * (1 + k)).sin()[None].expand(16, 16) for k in range(5)])
            images = waves[labels][:, None].repeat(1, 3, 1, 1)
            images = images + 0.2 * torch.randn(images.shape, generator=generator)
            self.splits[split] = (images.clamp(-1, 1), labels)

    def count(self, split: str) -> int:
        return len(self.splits[split][1])

    def batches(
        self,
        split,
        *,
        batch_size,
        augment=False,
        shuffle=False,
        seed=0,
        epoch=0,
        limit=None,
        rank=0,
        world_size=1,
        view=None,
    ) -> Iterator[Batch]:
        images, labels = self.splits[split]
        order = torch.arange(len(labels))
        if shuffle:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        order = order[:limit][rank::world_size]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            images_NCHW = images[chosen].contiguous(memory_format=torch.channels_last)
            yield Batch(images_NCHW, labels[chosen], chosen, epoch if view is None else view)


@pytest.fixture(autouse=True, scope="module")
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Networks that tests write are often called alike: the next file of tests must not find the last one's."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if Path(file).is_relative_to(tmp_path_factory.getbasetemp()):
            del sys.modules[name]


@pytest.fixture
def stripes() -> Stripes:
    return Stripes()


@pytest.fixture
def progress() -> Silent:
    return Silent()


@pytest.fixture
def run(stripes: Stripes, tmp_path: Path) -> Run:
    return Run(
        folder=tmp_path, data=stripes, device=torch.device("cpu"), seed=3, progress=Silent(), recipe_hash="0" * 64
    )


@pytest.fixture
def product() -> Product:
    structure = Structure(model={"use": "tests:none"}, num_classes=5, preprocess=PREPROCESS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # biases are drawn; what tests before drew must not decide on them
        module = SmallNet()
    return Product(Network(randomized(module), structure))


# An int8 network exported once, and copies of its files to tamper with.
SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def once() -> dict:
    return {}


@pytest.fixture
def exported(once, product, run, tmp_path_factory):
    """parent and int8, as ONNX and TFLite, in the test's own folder."""
    if not once:
        elsewhere = replace(run, folder=tmp_path_factory.mktemp("exported"))
        quantized = Quantize(use="quantize", epochs=0, calibration_images=64).apply(product, elsewhere)
        once["product"] = Export(use="export").apply(quantized, elsewhere)
    made = once["product"]
    files = {name: run.folder / name for name in made.files}
    for name, path in files.items():
        shutil.copy(made.files[name], path)
    return replace(made, files=files)


@pytest.fixture
def mlperf() -> Path:
    """Reference models of MLPerf Tiny, which nobody here wrote."""
    folder = SHARED / "mlperf_tiny"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder
