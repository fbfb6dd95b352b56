"""The pictures of the load stage: those of the network's input, and what is said of each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from compress.data import Digits, open_data
from compress.data.augment import AugmentPhoto
from compress.data.loader import ImageData, Images
from compress.data.samples import counts, write_samples
from compress.product import Preprocess


@pytest.fixture
def data():
    images = [picture(seed, (40, 30)) for seed in range(24)]
    train = Images(np.arange(18) % 3, lambda index, _: images[index], names=[f"t/{n}.png" for n in range(18)])
    evaluation = Images(np.arange(6) % 3, lambda index, _: images[18 + index])
    return ImageData(("a", "b", "c"), Preprocess(size=24), "0" * 64, train, evaluation, AugmentPhoto(), 0)


def test_pictures_are_what_the_network_gets(data, tmp_path):
    said = write_samples(data, tmp_path, 5)
    assert [s["split"] for s in said["samples"]] == ["train"] * 8 + ["evaluation"] * 6
    assert said["classes"] == {"train": [6, 6, 6], "evaluation": [2, 2, 2]} == counts(data)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(
        s["image"].removeprefix("samples/") for s in said["samples"]
    )
    for split, options in (
        ("train", {"augment": True, "limit": 8, "seed": 5}),
        ("evaluation", {"limit": 6, "seed": 5}),
    ):
        batch = next(iter(data.batches(split, batch_size=8, **options)))
        chosen = [s for s in said["samples"] if s["split"] == split]
        assert [s["label"] for s in chosen] == [data.labels[label] for label in batch.labels_N.tolist()]
        for sample, image_CHW in zip(chosen, batch.images_NCHW, strict=True):
            shown = np.array(Image.open(tmp_path / sample["image"]))
            assert np.array_equal(data.preprocess.normalize(shown[None])[0], image_CHW.permute(1, 2, 0).numpy())
            assert sample["mean"] == pytest.approx(image_CHW.mean((1, 2)).tolist(), abs=1e-4)
            assert sample["std"] == pytest.approx(image_CHW.std((1, 2), correction=0).tolist(), abs=1e-4)
        if split == "train":
            assert [s["name"] for s in chosen] == [f"t/{n}.png" for n in batch.indices_N.tolist()]
    assert {s["name"] for s in said["samples"] if s["split"] == "evaluation"} == {None}


def test_the_same_seed_writes_the_same_bytes(data, tmp_path):
    first, again, other = (write_samples(data, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again != other
    for sample in first["samples"]:
        assert (tmp_path / "a" / sample["image"]).read_bytes() == (tmp_path / "b" / sample["image"]).read_bytes()


def test_labels_of_other_tasks(data, tmp_path):
    bits = np.array([[1, 0, 1], [0, 0, 0]], np.float32)
    tags = replace(
        data,
        task="multi_label",
        train=replace(data.train, targets=bits),
        evaluation=replace(data.evaluation, targets=bits),
    )
    said = write_samples(tags, tmp_path, 0)
    assert [s["label"] for s in said["samples"][:2]] == ["a, c", "none"]
    assert said["classes"]["train"] == [1, 0, 1]
    numbers = np.array([[10.0, 2, 3], [20, 4, 3.5]], np.float32)
    numbers_data = replace(
        tags,
        task="regression",
        train=replace(data.train, targets=numbers),
        evaluation=replace(data.evaluation, targets=numbers),
    )
    said = write_samples(numbers_data, tmp_path / "n", 0)
    assert [s["label"] for s in said["samples"][:2]] == ["a 10, b 2, c 3", "a 20, b 4, c 3.5"]
    assert said["classes"] == {}


def test_one_channel_and_data_without_names(tmp_path):
    class Silent:
        def note(self, text):
            raise AssertionError(text)

    grey = Preprocess(size=16, crop=1.0, channels=1, mean=(0.5,), std=(0.5,))
    data = open_data(Digits(use="digits"), grey, Silent(), tmp_path)
    said = write_samples(data, tmp_path, 0)
    shown = Image.open(tmp_path / said["samples"][8]["image"])
    assert (shown.mode, shown.size) == ("L", (16, 16))
    batch = next(iter(data.batches("evaluation", batch_size=8, limit=8, seed=0)))
    assert torch.equal(
        torch.from_numpy(grey.normalize(np.array(shown)[None, ..., None]))[0, ..., 0], batch.images_NCHW[0, 0]
    )
    assert len(said["samples"][0]["mean"]) == 1
