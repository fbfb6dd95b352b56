import json
from pathlib import Path

import pytest
import torch
from conftest import PREPROCESS

from compress import checkpoint
from compress.errors import ModelError
from compress.models import build
from compress.models.mobilenet_v2 import MobileNetV2Settings
from compress.product import Network, Product, Structure
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize

MODEL = {"use": "mobilenet_v2", "width": 0.35, "stem_stride": 1, "dropout": 0.0}


@pytest.fixture
def network():
    torch.manual_seed(0)
    structure = Structure(model=MODEL, num_classes=5, preprocess=PREPROCESS)
    return Network(build(MobileNetV2Settings(**MODEL), 5, 16), structure)


def same_outputs(a: Network, b: Network) -> bool:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a.module(images), b.module(images))


def test_pruned_and_quantized_networks_come_back_bit_for_bit(network, run, tmp_path):
    pruned = Prune(use="prune", goal={"macs": 0.5}).apply(Product(network), run)
    quantized = Quantize(use="quantize", epochs=1, batch_size=32).apply(pruned, run)
    for name, saved in (("whole", network), ("pruned", pruned.network), ("quantized", quantized.network)):
        checkpoint.save(saved, tmp_path / name)
        loaded = checkpoint.load(tmp_path / name)
        assert same_outputs(saved, loaded), name
        assert loaded.structure == saved.structure
        assert not loaded.module.training
    assert pruned.network.structure.kept


def test_no_pickle_is_written(network, tmp_path):
    checkpoint.save(network, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["structure.json", "weights.safetensors"]
    json.loads((tmp_path / "structure.json").read_text())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "structure.json").unlink(), "no structure.json here"),
        (lambda folder: (folder / "structure.json").write_text("{"), "structure.json: not readable"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors: does not fit"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"\0" * 100), "weights.safetensors: does not fit"),
    ],
)
def test_a_broken_folder_is_one_error(network, tmp_path: Path, spoil, message):
    checkpoint.save(network, tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)
