import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PREPROCESS
from safetensors.torch import load_file, save_file

from compress import checkpoint
from compress.errors import ModelError
from compress.models import build
from compress.models.mobilenet_v2 import MobileNetV2Settings
from compress.models.weights import read_weights
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


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_bit_that_flipped_in_the_weights_is_noticed_wherever_they_were_copied_to(network, tmp_path, share):
    checkpoint.save(network, tmp_path / "saved")
    path = tmp_path / "saved/weights.safetensors"
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flipped(path, begin + int(share * (path.stat().st_size - begin - 1)))
    with pytest.raises(ModelError, match=r"saved/weights.safetensors: was altered after it was saved"):
        checkpoint.load(tmp_path / "saved")
    elsewhere = shutil.copy(path, tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelError, match=r"elsewhere.safetensors: was altered after it was saved"):
        read_weights(Path(elsewhere))


def test_a_structure_of_another_network_of_that_shape_is_noticed(network, tmp_path):
    checkpoint.save(network, tmp_path)
    path = tmp_path / "structure.json"
    path.write_text(path.read_text().replace('"crop": 1.0', '"crop": 0.9').replace('"crop":1.0', '"crop":0.9'))
    with pytest.raises(ModelError, match=r"weights.safetensors: was saved with another structure"):
        checkpoint.load(tmp_path)


def test_what_others_saved_carries_no_hash_and_is_read(network, tmp_path):
    checkpoint.save(network, tmp_path)
    path = tmp_path / "weights.safetensors"
    save_file(load_file(path), path)
    assert same_outputs(checkpoint.load(tmp_path), network)


def test_the_same_network_is_the_same_bytes(network, tmp_path):
    for name in "abcdefgh":
        checkpoint.save(network, tmp_path / name)
    assert len({(tmp_path / name / "weights.safetensors").read_bytes() for name in "abcdefgh"}) == 1
