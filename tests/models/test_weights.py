"""Weights from files, good and bad."""

import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.errors import ModelError
from compress.models import Factory, MobileNetV2Settings, file_sha256, inputs, load_weights
from compress.models.head import replace_head
from compress.models.weights import read_weights


class Notes:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def network(classes=10, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights},
        lambda weights: {"module." + name: tensor for name, tensor in weights.items()},
        lambda weights: {"model." + name: tensor for name, tensor in weights.items()},
        lambda weights: {"module._orig_mod.net." + name: tensor for name, tensor in weights.items()},
        lambda weights: {"model_state": weights, "optimizer": {"lr": 0.1}},
        lambda weights: {"state_dict": {"model": weights}},
        lambda weights: {"ema": {"module": torch.zeros(1)}, "state_dict": weights},
        lambda weights: {"model_ema": weights, "epoch": 3},
        lambda weights: {"n_averaged": torch.tensor(5), **{"module." + n: t for n, t in weights.items()}},
        lambda weights: {n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")},
    ],
)
def test_torch_files(tmp_path, wrap):
    progress, target = Notes(), network(seed=1)
    torch.save(wrap(network().state_dict()), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth", progress)
    assert same(target, network())
    assert progress.notes == []


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32])
def test_safetensors_become_float32(tmp_path, precision):
    stored = network().to(precision)
    save_file(stored.state_dict(), tmp_path / "weights.safetensors")
    target = network(seed=1)
    load_weights(target, tmp_path / "weights.safetensors", Notes())
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert same(target, stored.float())


def test_another_number_of_classes_keeps_the_fresh_head(tmp_path):
    torch.save(network(1000).state_dict(), tmp_path / "weights.pt")
    progress, target = Notes(), network(10, seed=1)
    fresh = target[3].weight.clone()
    load_weights(target, tmp_path / "weights.pt", progress)
    assert progress.notes == ["head replaced: 1000 -> 10 classes; the file's 3.weight, 3.bias left out"]
    assert torch.equal(target[3].weight, fresh)
    assert torch.equal(target[0].weight, network(1000)[0].weight)


class Mapped(nn.Module):
    """Averages a map of each class, as SqueezeNet does; without a linear layer."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, classes, 1)

    def forward(self, x):
        return self.head(self.stem(x)).mean((2, 3))


def test_a_head_that_is_a_convolution_and_is_replaced_or_left_out(tmp_path):
    torch.save(Mapped(1000).state_dict(), tmp_path / "weights.pt")
    progress, target = Notes(), Mapped(10)
    fresh = target.head.weight.clone()
    load_weights(target, tmp_path / "weights.pt", progress)
    assert progress.notes == ["head replaced: 1000 -> 10 classes; the file's head.weight, head.bias left out"]
    assert torch.equal(target.head.weight, fresh)
    assert replace_head(target, 7, "here") == "head replaced: 10 -> 7 classes"
    assert target(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def test_two_heads_are_left_out_together_and_a_hidden_layer_is_not(tmp_path):
    class Distilled(nn.Module):
        def __init__(self, classes, hidden=6):
            super().__init__()
            self.body, self.head, self.head_dist = nn.Linear(4, hidden), nn.Linear(6, classes), nn.Linear(6, classes)

    torch.save(Distilled(1000).state_dict(), tmp_path / "weights.pt")
    progress, target = Notes(), Distilled(10)
    load_weights(target, tmp_path / "weights.pt", progress)
    assert torch.equal(target.body.weight, Distilled(10).body.weight) is False
    assert "head.weight, head.bias, head_dist.weight, head_dist.bias" in progress.notes[0]
    torch.save(Distilled(10, hidden=8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"2 of another shape: body.bias \(\[8\] for \[6\]\), body.weight"):
        load_weights(Distilled(10), tmp_path / "other.pt", Notes())


def test_weights_for_colour_read_grey_as_three_equal_channels(tmp_path):
    def conv(channels):
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 10)).eval()

    coloured, grey, progress = conv(3), conv(1), Notes()
    torch.save(coloured.state_dict(), tmp_path / "weights.pt")
    load_weights(grey, tmp_path / "weights.pt", progress)
    image = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(grey(image), coloured(image.expand(2, 3, 5, 5)))
    assert progress.notes == ["0.weight: the weights of the three colours are added up for grey images"]


def test_every_difference_is_counted_and_named_and_nothing_loaded(tmp_path):
    weights = network().state_dict()
    del weights["1.running_mean"]
    weights["5.weight"] = torch.zeros(1)
    weights["0.bias"] = torch.zeros(8)
    torch.save(weights, tmp_path / "weights.pth")
    target = network(seed=1)
    with pytest.raises(ModelError) as caught:
        load_weights(target, tmp_path / "weights.pth", Notes())
    assert str(caught.value) == (
        f"{tmp_path / 'weights.pth'}: does not fit the network: 1 missing: 1.running_mean; "
        "1 not in the network: 5.weight; 1 of another shape: 0.bias ([8] for [4])"
    )
    assert same(target, network(seed=1))


def test_a_missing_head_is_not_a_foreign_head(tmp_path):
    weights = {name: tensor for name, tensor in network().state_dict().items() if not name.startswith("3.")}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"2 missing: 3.bias, 3.weight"):
        load_weights(network(), tmp_path / "weights.pth", Notes())


def whole(path):
    torch.save(network(1000).state_dict(), path)


def truncated(path):
    whole(path)
    path.write_bytes(path.read_bytes()[:3000])


def old_truncated(path):
    torch.save(network(1000).state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:3000])


def safe_truncated(path):
    save_file(network(1000).state_dict(), path)
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pth", lambda path: None, "no such file"),
        ("a.pth", truncated, "is no whole weights file"),
        ("a.pth", old_truncated, "is no whole weights file"),
        ("a.safetensors", safe_truncated, "is no whole weights file"),
        ("a.safetensors", whole, "is no whole weights file"),
        ("a.pth", lambda path: path.write_bytes(b""), "is no whole weights file"),
        ("a.pth", lambda path: path.write_text("hello"), "is no whole weights file"),
        ("a.pth", lambda path: torch.save(network(), path), "holds Python objects, which could run code"),
        ("a.pth", lambda path: path.write_bytes(pickle.dumps(pytest.raises)), "is no whole|Python objects"),
        ("a.pth", lambda path: torch.save({"epoch": 3}, path), "holds no weights"),
        ("a.pth", lambda path: torch.save({}, path), "holds no weights"),
        ("a.pth", lambda path: torch.save([torch.zeros(1)], path), "holds no weights"),
    ],
)
def test_files_without_weights(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ModelError, match=message) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("use", ["mobilenet_v2", "torchvision.models:resnet18"])
def test_a_file_in_the_users_home_is_part_of_the_key(tmp_path, monkeypatch, use):
    monkeypatch.setenv("HOME", str(tmp_path))
    kind = MobileNetV2Settings if use == "mobilenet_v2" else Factory
    assert inputs(kind(use=use, weights="~/w.pth"), tmp_path / "elsewhere")[0] == tmp_path / "w.pth"


class Versioned(nn.Linear):
    """Refuses weights of an unknown version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_files_of_tensors_are_of_the_version_that_is_installed(tmp_path):
    saved, loaded = nn.Sequential(Versioned(3, 4)), nn.Sequential(Versioned(3, 4))
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    load_weights(loaded, tmp_path / "weights.safetensors", Notes())
    assert same(saved, loaded)
