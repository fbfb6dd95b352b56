"""Folders and zip archives of images made here, and each way in which they can be wrong."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import Notes, picture
from PIL import Image

from compress.data import Folder, open_data
from compress.data.decoding import decode
from compress.data.loader import ImageData
from compress.errors import DataError
from compress.product import Preprocess

PHOTOS = Path(__file__).resolve().parents[2].parent / "shared/data/imagenette_112px.zip"


@pytest.fixture
def root(tmp_path):
    """Two classes with four images for training and two for evaluation each."""
    for number, (split, count) in enumerate((("train", 4), ("val", 2))):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                picture(100 * number + 10 * index + image).save(folder / f"{image}.png")
    return tmp_path / "photos"


def opened(root, progress=None, checked=None, **settings) -> ImageData:
    chosen = Folder(use="folder", path=str(root), **settings)
    data = open_data(chosen, Preprocess(size=8), progress or Notes(), Path.cwd(), checked)
    assert isinstance(data, ImageData)
    return data


def packed(root, target, prefix="", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(target, "w", method) as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return target


def everything(data, split="evaluation"):
    return torch.cat([b.images_NCHW for b in data.batches(split, batch_size=3)])


def test_folder(root):
    progress = Notes()
    data = opened(root, progress)
    assert data.labels == ("cat", "dog")
    assert (data.count("train"), data.count("evaluation")) == (8, 4)
    assert progress.bars == ["checking images"]
    assert progress.notes == []
    assert everything(data).shape == (4, 3, 8, 8)
    assert data.evaluation.targets.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("prefix", ["", "photos/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_the_same_data(root, tmp_path, prefix, method):
    archive = packed(root, tmp_path / "photos.zip", prefix, method)
    before = sorted(tmp_path.rglob("*"))
    data, plain = opened(archive, workers=2), opened(root, workers=0)
    assert data.fingerprint == plain.fingerprint
    assert torch.equal(everything(data), everything(plain))
    assert sorted(tmp_path.rglob("*")) == before


def test_relative_path_starts_at_base(root):
    settings = Folder(use="folder", path=root.name)
    assert open_data(settings, Preprocess(size=8), Notes(), root.parent).count("train") == 8


def test_same_augmentation_for_any_number_of_workers(root):
    def batches(workers):
        data = opened(root, workers=workers)
        return [b.images_NCHW for b in data.batches("train", batch_size=3, augment=True, shuffle=True, epoch=1)]

    assert all(map(torch.equal, batches(0), batches(2)))


def test_a_checked_fingerprint_spares_the_decoding(root):
    first = opened(root)
    again = Notes()
    assert opened(root, again, checked=first.fingerprint).fingerprint == first.fingerprint
    assert again.bars == ["hashing images"]
    picture(77).save(root / "train/cat/new.png")
    changed = Notes()
    assert opened(root, changed, checked=first.fingerprint).fingerprint != first.fingerprint
    assert changed.bars == ["hashing images", "checking images"]


def test_no_image_is_in_both_splits(root):
    shutil.copy(root / "val/dog/1.png", root / "train/cat/copy.png")
    progress = Notes()
    data = opened(root, progress)
    assert data.count("train") == 8
    assert data.count("evaluation") == 4
    assert progress.notes == ["1 training images left out that are in the evaluation too, such as train/cat/copy.png"]


def test_holdout(root):
    shutil.rmtree(root / "val")
    shutil.copy(root / "train/cat/0.png", root / "train/cat/twin.png")
    data = opened(root, holdout=0.25)
    assert data.count("train") + data.count("evaluation") == 9
    held = {image.numpy().tobytes() for image in everything(data)}
    assert not held & {image.numpy().tobytes() for image in everything(data, "train")}
    assert set(data.evaluation.targets) == set(data.train.targets) == {0, 1}
    assert opened(root, holdout=0.25).fingerprint == data.fingerprint
    assert opened(root, holdout=0.5).fingerprint != data.fingerprint


def test_names_and_evaluation_folder(root):
    (root / "val").rename(root / "test")
    data = opened(root, evaluation="test", names={"cat": "Felis catus"})
    assert data.labels == ("Felis catus", "dog")


def test_what_systems_leave_behind_is_ignored(root):
    for name in (".DS_Store", "Thumbs.db"):
        (root / "train/cat" / name).write_bytes(b"no image")
    (root / "train/.cache").mkdir()
    assert opened(root).count("train") == 8


def test_files_beside_the_classes_are_said(root):
    (root / "train/labels.csv").write_text("a,b")
    progress = Notes()
    opened(root, progress)
    assert progress.notes == ["1 files beside the class folders left out, such as train/labels.csv"]


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda r: shutil.rmtree(r), {}, r"photos: no such folder or zip archive"),
        (lambda r: shutil.rmtree(r / "train"), {}, r"photos: has no folder `train`; expected train/<class>/<image>"),
        (lambda r: shutil.rmtree(r / "val"), {}, r"has no folder `val`; .*`holdout: 0.2`"),
        (lambda r: None, {"holdout": 0.2}, r"has a folder `val`, but `holdout` is set"),
        (lambda r: emptied(r / "val"), {}, r"photos/val: has no images"),
        (lambda r: emptied(r / "train/dog"), {}, r"photos/train/dog: has no images"),
        (lambda r: shutil.rmtree(r / "val/dog"), {}, r"the classes differ; `train` alone has dog"),
        (
            lambda r: (r / "val/dog").rename(r / "val/wolf"),
            {},
            r"`train` alone has dog and `val` alone has wolf",
        ),
        (lambda r: [shutil.rmtree(r / s / "dog") for s in ("train", "val")], {}, r"has one class, `cat`"),
        (lambda r: (r / "train/cat/9.jpg").write_text("hello"), {}, r"train/cat/9.jpg: is no readable image \(not an"),
        (lambda r: None, {"names": {"dgo": "Hund"}}, r"`names` has `dgo`, no class; did you mean `dog`\?"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line(root, change, settings, message):
    change(root)
    with pytest.raises(DataError, match=message) as caught:
        opened(root, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated_image(root, kind):
    file = root / f"val/dog/big.{kind}"
    picture(5, (64, 64)).save(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=rf"val/dog/big.{kind}: is no readable image"):
        opened(root)


def test_a_class_whose_images_are_all_held_out(root):
    shutil.rmtree(root / "train/cat")
    shutil.copytree(root / "val/cat", root / "train/cat")
    with pytest.raises(DataError, match="photos: class `cat` has no training image left"):
        opened(root)


def test_an_image_that_vanishes_is_named(root):
    data = opened(root)
    (root / "val/cat/0.png").unlink()
    with pytest.raises(DataError, match=r"val/cat/0.png: cannot be read"):
        everything(data)


def test_broken_zip(root, tmp_path):
    archive = packed(root, tmp_path / "photos.zip", method=zipfile.ZIP_STORED)
    content = archive.read_bytes()
    archive.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"photos.zip: is no whole zip archive"):
        opened(archive)
    at = content.index(b"IDAT") + 8
    archive.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(DataError, match=r"photos.zip: train/cat/0.png: is damaged \(wrong checksum\)"):
        opened(archive)


def test_zip_of_another_method(root, tmp_path):
    with pytest.raises(DataError, match="other than stored or deflated"):
        opened(packed(root, tmp_path / "photos.zip", method=zipfile.ZIP_LZMA))


def saved(image, kind, **options):
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def test_every_mode_becomes_rgb():
    base = picture(1)
    palette = base.quantize(8)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes(range(8))
    for content in (
        saved(base.convert("L"), "PNG"),
        saved(base.convert("LA"), "PNG"),
        saved(base.convert("1"), "PNG"),
        saved(base.convert("RGBA"), "PNG"),
        saved(base.convert("CMYK"), "JPEG"),
        saved(palette, "PNG"),
        saved(transparent, "PNG"),
    ):
        assert (decode(content, "here").mode, decode(content, "here").size) == ("RGB", (20, 16))


def test_sixteen_bits_are_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.array(decode(saved(deep, "PNG"), "here"))[0, :, 0].tolist() == [0, 100, 255]


def test_exif_orientation_turns_the_image():
    upright = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode(saved(upright, "PNG", exif=exif), "here")
    assert np.array_equal(np.array(turned), np.rot90(np.array(upright), -1))


def test_draft_never_gets_smaller_than_asked():
    content = saved(picture(1, (640, 480)), "JPEG")
    assert decode(content, "here").size == (640, 480)
    assert decode(content, "here", 200).size == (320, 240)
    assert decode(content, "here", 300).size == (640, 480)


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"needs {PHOTOS}")
def test_photographs():
    data = opened(PHOTOS, workers=0)
    assert (data.count("train"), data.count("evaluation"), len(data.labels)) == (9469, 3925, 10)
    labels = torch.cat([b.labels_N for b in data.batches("evaluation", batch_size=8, limit=20)])
    assert torch.bincount(labels).tolist() == [2] * 10
