"""What is wrong with people's images: each fault is one line, all of them are said at once, nothing hangs."""

import io
import os
import shutil
import zipfile
import zlib

import pytest
from pictures import Notes, picture
from PIL import Image

from compress.data import Folder, open_data
from compress.data.trees import open_tree
from compress.errors import DataError
from compress.product import Preprocess


@pytest.fixture
def root(tmp_path):
    """Two classes with six images for training and two for evaluation each."""
    for number, (split, count) in enumerate((("train", 6), ("val", 2))):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                picture(100 * number + 10 * index + image).save(folder / f"{image}.png")
    return tmp_path / "photos"


def opened(root, progress=None, **settings):
    return open_data(Folder(use="folder", path=str(root), **settings), Preprocess(size=8), progress or Notes(), root)


def refused(root, **settings):
    with pytest.raises(DataError) as caught:
        opened(root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_faulty_files_are_named_at_once(root):
    whole = (root / "train/cat/0.png").read_bytes()
    (root / "train/cat/0.png").write_bytes(whole[:-40])
    (root / "train/cat/1.png").write_bytes(b"")
    (root / "train/dog/2.png").write_text("<html>404</html>")
    (root / "val/dog/0.png").write_bytes(bytes(1000))
    said = refused(root)
    assert said.startswith(f"{root}: 4 images are faulty: train/cat/0.png is no readable image (")
    assert "train/cat/1.png is no readable image (it has no bytes)" in said
    assert "train/dog/2.png is no readable image (not an image)" in said
    assert "val/dog/0.png is no readable image (not an image); replace or remove them" in said


def test_the_first_ten_are_named_and_the_others_counted(root):
    for number in range(14):
        (root / f"train/cat/bad{number:02d}.png").write_text("no image")
    said = refused(root)
    assert "14 images are faulty" in said
    assert said.count("is no readable image") == 10
    assert "bad09.png is no readable image (not an image) and 4 more; replace" in said


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_no_cut_goes_unnoticed_or_raises_anything_else(root, kind):
    """An image cut anywhere is refused, or is decoded whole (what is missing was padding)."""
    target = io.BytesIO()
    image = picture(3, (48, 40))
    image.save(target, kind)
    content = target.getvalue()
    file = root / "train/cat/cut.img"
    from compress.data.decoding import decode

    expected = decode(content, "whole").tobytes()
    problems = []
    for part in range(0, 100, 7):
        try:
            assert decode(content[: len(content) * part // 100], str(file)).tobytes() == expected
        except DataError as error:
            problems.append(error.problem)
    assert len(problems) >= 14
    assert all("is no readable image" in problem for problem in problems)


def test_links_that_lead_back_are_refused_and_others_followed(root, tmp_path):
    shutil.move(root / "train/cat", tmp_path / "cats")
    (root / "train/cat").symlink_to(tmp_path / "cats")
    assert opened(root).count("train") == 12
    (tmp_path / "cats/again").symlink_to(root / "train")
    assert refused(root) == f"{root}/train/cat/again: is a link to a folder that it lies in; remove the link"
    (tmp_path / "cats/again").unlink()
    (tmp_path / "cats/itself.png").symlink_to("itself.png")
    assert "itself.png" in refused(root)
    (tmp_path / "cats/itself.png").unlink()
    (tmp_path / "cats/gone.png").symlink_to("nowhere.png")
    assert refused(root) == f"{root}/train/cat/gone.png: cannot be read (No such file or directory)"


def test_a_pipe_among_the_images_does_not_hang(root):
    os.mkfifo(root / "train/cat/pipe.png")
    assert refused(root) == f"{root}/train/cat/pipe.png: is no regular file; remove it"


def test_classes_with_one_image(root):
    for number in range(1, 6):
        (root / f"train/cat/{number}.png").unlink()
    progress = Notes()
    assert opened(root, progress).count("train") == 7
    assert progress.notes == ["one training image is all there is of class cat"]
    shutil.rmtree(root / "val")
    said = refused(root, holdout=0.3)
    assert "class `cat` has no training image left that is not for evaluation; add some, or leave it out" in said


def test_an_image_under_two_labels_is_said(root):
    shutil.copy(root / "train/cat/2.png", root / "train/dog/copy.png")
    progress = Notes()
    opened(root, progress)
    assert progress.notes == [
        "1 images are there again with another label, such as train/cat/2.png and train/dog/copy.png"
    ]


def test_a_member_that_inflates_to_more_than_it_says(tmp_path):
    """Its size in the directory is a lie: only so many bytes are ever made of it."""
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("train/a.png", bytes(50_000_000))
    content = archive.read_bytes()
    real, said = (50_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")
    assert content.count(real) == 2
    archive.write_bytes(content.replace(real, said))
    made = []
    original = zlib.decompressobj

    class Watched:
        def __init__(self, *args):
            self.inner = original(*args)

        def decompress(self, data, most):
            made.append(self.inner.decompress(data, most))
            return made[-1]

    tree = open_tree(archive)
    zlib.decompressobj = Watched
    try:
        with pytest.raises(DataError, match=r"train/a\.png: is damaged \(wrong checksum\)"):
            tree.read("train/a.png")
    finally:
        zlib.decompressobj = original
    assert [len(content) for content in made] == [100]


def test_grey_images_of_every_mode_for_one_channel_and_three(root):
    """A shade stays that shade, in 1, 8 and 16 bits, with and without transparency, for both kinds of networks."""
    import numpy as np

    from compress.data.decoding import decode
    from compress.data.pixels import pixels

    shades = (np.arange(64 * 64).reshape(64, 64) % 256).astype(np.uint8)
    for image in (
        Image.fromarray(shades),
        Image.merge("LA", [Image.fromarray(shades), Image.new("L", (64, 64), 7)]),
        Image.fromarray(shades.astype(np.uint16) * 257),
        Image.merge("RGB", [Image.fromarray(shades)] * 3),
        Image.fromarray(shades).quantize(256),
    ):
        target = io.BytesIO()
        image.save(target, "PNG")
        decoded = decode(target.getvalue(), "here")
        kept = np.array(image.convert("RGB"))[..., 0] if image.mode == "P" else shades
        colour = pixels(decoded, Preprocess(size=64, crop=1.0))
        assert (colour == kept[..., None]).all(), image.mode
        grey = pixels(decoded, Preprocess(size=64, crop=1.0, channels=1, mean=(0.5,), std=(0.5,)))
        assert grey.shape == (64, 64, 1)
        assert (grey[..., 0] == kept).all(), image.mode
    bits = Image.fromarray(shades > 99)
    target = io.BytesIO()
    bits.save(target, "PNG")
    assert bits.mode == "1"
    assert (
        pixels(decode(target.getvalue(), "here"), Preprocess(size=64, crop=1.0))[..., 0] == (shades > 99) * 255
    ).all()
