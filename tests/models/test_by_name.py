"""Networks by name: torchvision's, timm's, and folders of transformers. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress import checkpoint, measures
from compress import recipe as recipes
from compress.errors import CompressError, ModelError, RecipeError
from compress.models import description, inputs, label_notes, packages, started
from compress.models.huggingface_models import HuggingFace
from compress.models.timm_models import Timm, timm_preprocess
from compress.models.torchvision_models import Torchvision, import_torchvision, torchvision_preprocess
from compress.product import Network, Preprocess, Structure
from compress.progress import Silent
from compress.pruning import MacGoal, Pruning, prune_network

pytestmark = pytest.mark.extras

SMALL = Preprocess(size=64)
RECIPE = """name: demo
model: {model}
data: {{use: digits}}
{preprocess}stages:
  - {{use: train, epochs: 1}}
"""


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def written(folder: Path, model: str, preprocess: str = "") -> Path:
    path = folder / "demo.yaml"
    path.write_text(RECIPE.format(model=model, preprocess=preprocess))
    return path


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("{use: torchvision, name: resnet81}", "model.name: torchvision has no classifier `resnet81`; did you mean"),
        (
            "{use: torchvision, name: resnet50, weights: IMAGENET1K_V3}",
            "model.weights: resnet50 has no weights `IMAGENET1K_V3`; did you mean `IMAGENET1K_V",
        ),
        (
            "{use: timm, name: ghostnet_10}",
            "model.name: timm has no network `ghostnet_10`; did you mean `ghostnet_1",
        ),
        ("{use: timm, name: resnet18.a1_in1}", "resnet18 has no weights `a1_in1`; did you mean `resnet18.a1_in1k`?"),
    ],
)
def test_a_wrong_name_is_a_mistake_of_its_line(tmp_path, model, line):
    with pytest.raises(RecipeError) as caught:
        recipes.load(written(tmp_path, model))
    (only,) = caught.value.lines
    assert line in only
    assert "demo.yaml:2:" in only


def test_preprocess_is_the_networks_own_where_it_is_left_out(tmp_path):
    own = recipes.load(written(tmp_path, "{use: torchvision, name: mobilenet_v2, weights: DEFAULT}")).preprocess
    assert (own.size, own.crop, own.mean[0]) == (224, 224 / 232, 0.485)
    timm = recipes.load(written(tmp_path, "{use: timm, name: mobilenetv3_small_100}")).preprocess
    assert (timm.size, timm.crop, timm.interpolation) == (224, 0.875, "bicubic")
    partly = recipes.load(written(tmp_path, "{use: timm, name: vit_tiny_patch16_224}", "preprocess: {size: 96}\n"))
    assert (partly.preprocess.size, partly.preprocess.mean) == (96, (0.5, 0.5, 0.5))
    whole = tmp_path / "whole.yaml"
    whole.write_text(recipes.dump(partly))
    assert recipes.load(whole) == partly
    assert "interpolation bicubic" in recipes.preprocess_line(partly)
    grey = recipes.load(written(tmp_path, "{use: torchvision, name: resnet18}", "preprocess: {channels: 1}\n"))
    assert (grey.preprocess.channels, grey.preprocess.mean, grey.preprocess.size) == (1, (0.449,), 224)


def test_preprocess_is_what_the_packages_do(tmp_path):
    """Their own transforms, on a picture whose sides lead to no rounding."""
    import numpy as np
    from PIL import Image

    from compress.data.pixels import pixels

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 450, 3), np.uint8))
    models = import_torchvision("here").models
    for name in ("resnet18", "mobilenet_v2", "efficientnet_b0"):
        preprocess = Preprocess(**torchvision_preprocess(Torchvision(use="torchvision", name=name)))
        ours = preprocess.normalize(pixels(image, preprocess)[None]).transpose(0, 3, 1, 2)
        theirs = models.get_model_weights(name).DEFAULT.transforms()(image)
        torch.testing.assert_close(torch.from_numpy(ours[0]), theirs, atol=1e-5, rtol=0)
    import timm

    for name in ("mobilenetv3_small_100", "mobilenetv2_100"):
        fields, notes = timm_preprocess(Timm(use="timm", name=name))
        preprocess = Preprocess(**fields)
        assert notes == []
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        theirs = timm.data.create_transform(**config)(image)
        ours = preprocess.normalize(pixels(image, preprocess)[None]).transpose(0, 3, 1, 2)
        torch.testing.assert_close(torch.from_numpy(ours[0]), theirs, atol=1e-5, rtol=0)


def test_cached_weights_of_torchvision_need_no_network_and_another_head(tmp_path, monkeypatch):
    models = import_torchvision("here").models
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    trained = models.squeezenet1_1()
    file = tmp_path / "checkpoints" / Path(models.SqueezeNet1_1_Weights.DEFAULT.url).name
    file.parent.mkdir()
    torch.save(trained.state_dict(), file)
    hashed = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = Torchvision(use="torchvision", name="squeezenet1_1", weights="DEFAULT", sha256=hashed)
    notes = Notes()
    module = started(settings, 10, SMALL, notes, tmp_path)
    assert torch.equal(module.features[0].weight, trained.features[0].weight)
    assert module(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert notes.notes == [
        "head replaced: 1000 -> 10 classes; the file's classifier.1.weight, classifier.1.bias left out"
    ]
    assert inputs(settings, tmp_path) == [file]
    assert packages(settings) == ("torchvision",)
    with pytest.raises(ModelError, match=r"is not https://.*squeezenet1_1-\w{8}\.pth: its SHA-256"):
        started(settings.model_copy(update={"sha256": None}), 10, SMALL, Silent(), tmp_path)
    grey = started(settings, 1000, Preprocess(size=64, channels=1), Silent(), tmp_path)
    image = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(grey(image), trained.eval()(image.expand(1, 3, 64, 64)), atol=1e-4, rtol=1e-4)


def hub_with(folder: Path, repository: str, content: dict[str, bytes]) -> None:
    """A cache of the hub as a download leaves it."""
    place = folder / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    for name, data in content.items():
        blob = place / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = place / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


def test_cached_weights_of_timm_need_no_network(tmp_path, monkeypatch):
    import huggingface_hub
    import timm

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    import_torchvision("here")
    trained = timm.create_model("mobilenetv3_small_050")
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    repository = timm.get_pretrained_cfg("mobilenetv3_small_050").hf_hub_id
    hub_with(tmp_path, repository, {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    settings = Timm(use="timm", name="mobilenetv3_small_050", weights="pretrained")
    notes = Notes()
    module = started(settings, 10, SMALL, notes, tmp_path)
    assert torch.equal(module.conv_stem.weight, trained.conv_stem.weight)
    assert notes.notes == ["head replaced: 1000 -> 10 classes"]
    grey = started(settings, 1000, Preprocess(size=64, channels=1), Silent(), tmp_path)
    assert grey.conv_stem.in_channels == 1
    (blob,) = (tmp_path / f"models--{repository.replace('/', '--')}" / "blobs").iterdir()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelError, match="its SHA-256 begins with"):
        started(settings, 10, SMALL, Silent(), tmp_path)


def test_weights_that_cannot_be_downloaded_are_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for settings in (
        Timm(use="timm", name="ghostnet_100", weights="pretrained"),
        HuggingFace(use="huggingface", name="nobody/nothing"),
    ):
        with pytest.raises(ModelError, match=r"cannot download .*no route to host.*fetch it where") as e:
            started(settings, 10, SMALL, Silent(), tmp_path)
        assert "\n" not in str(e.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small ResNet of transformers with 7 classes, as save_pretrained writes it."""
    import_torchvision("here")
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=7)
    place = tmp_path / "resnet"
    ResNetForImageClassification(config).eval().save_pretrained(place)
    processor = {
        "do_center_crop": True,
        "crop_size": {"height": 64, "width": 64},
        "size": {"shortest_edge": 80},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.2, 0.2],
        "resample": 3,
    }
    (place / "preprocessor_config.json").write_text(json.dumps(processor))
    return place


def test_a_folder_of_transformers(folder, tmp_path):
    from transformers import AutoModelForImageClassification

    settings = HuggingFace(use="huggingface", name=str(folder))
    loaded = recipes.load(written(tmp_path, f"{{use: huggingface, name: {folder}}}"))
    expected = Preprocess(size=64, crop=0.8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2), interpolation="bicubic")
    assert loaded.preprocess == expected
    original = AutoModelForImageClassification.from_pretrained(folder)
    images = torch.randn(2, 3, 64, 64)
    module = started(settings, 7, SMALL, Silent(), tmp_path)
    with torch.no_grad():
        assert torch.equal(module(images), original(images).logits)
    assert {path.name for path in inputs(settings, tmp_path)} == {"model.safetensors", "config.json"}
    labels = [f"LABEL_{index}" for index in range(7)]
    assert label_notes(settings, labels, tmp_path) == []
    assert "0 is LABEL_0, here cat" in label_notes(settings, ["cat", *labels[1:]], tmp_path)[0]
    notes = Notes()
    started(settings, 3, SMALL, notes, tmp_path)
    assert notes.notes[0].startswith("head replaced: 7 -> 3 classes; the file's network.classifier.1.weight")
    grey = started(settings, 7, Preprocess(size=64, channels=1), Silent(), tmp_path)
    image = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(grey(image), original(image.expand(2, 3, 64, 64)).logits, atol=1e-5, rtol=1e-5)


def test_no_pickle_and_no_code_of_a_repository(folder, tmp_path):
    settings = HuggingFace(use="huggingface", name=str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"the folder has no model\.safetensors"):
        started(settings, 7, SMALL, Silent(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoModelForImageClassification": "evil.Net"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="has no model_type `theirs`; its repository brings code of its own"):
        started(settings, 7, SMALL, Silent(), tmp_path)


def saved(settings, preprocess, folder, run, classes=5):
    """A pruned network in a folder, and the network."""
    module = started(settings, classes, preprocess, Silent(), Path.cwd())
    structure = Structure(model=description(settings, Path.cwd()), num_classes=classes, preprocess=preprocess)
    data = run.data
    data.preprocess = preprocess
    pruning = Pruning(batchnorm_images=0)
    pruned = prune_network(Network(module, structure), MacGoal(macs=0.6), pruning, run=run)
    assert measures.macs(pruned.module, preprocess.size) <= 0.6 * measures.macs(module, preprocess.size)
    checkpoint.save(pruned, folder)
    return pruned


def test_pruned_networks_load_again_without_what_they_came_from(folder, tmp_path, run, monkeypatch):
    for settings in (
        Torchvision(use="torchvision", name="resnet18"),
        Timm(use="timm", name="mobilenetv3_small_050"),
        HuggingFace(use="huggingface", name=str(folder)),
    ):
        place = tmp_path / settings.use
        network = saved(settings, SMALL, place, run)
        if settings.use == "huggingface":
            for path in folder.iterdir():
                path.unlink()
        again = checkpoint.load(place)
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(again.module(images), network.module.eval()(images))
        package = packages(settings)[0]
        with monkeypatch.context() as without:
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                without.delitem(sys.modules, name)
            without.setitem(sys.modules, package, None)
            with pytest.raises(CompressError, match=rf"needs the package `{package}`; pip install 'compress\[") as e:
                checkpoint.load(place)
            assert "\n" not in str(e.value)
