"""Images kept decoded: the same batches with and without, and files that are cut, altered, old or in the way."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pictures import Notes, picture
from PIL import Image

from compress.data import Folder, open_data
from compress.data.decoded import Decoded, default_folder
from compress.errors import DataError
from compress.product import Preprocess

SHA = "ab" * 32


@pytest.fixture
def root(tmp_path, monkeypatch):
    """JPEGs so large that augmentation reads them at a fraction of their size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, place in enumerate(("train/a", "train/b", "train/a", "train/b", "val/a", "val/b")):
        folder = tmp_path / "photos" / place
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, (200, 150)).save(folder / f"{number}.jpg")
    return tmp_path / "photos"


def opened(root, **settings):
    return open_data(Folder(use="folder", path=str(root), **settings), Preprocess(size=16), Notes(), root)


def batches(data):
    options = {"batch_size": 3, "shuffle": True, "augment": True, "seed": 3}
    train = [b for epoch in range(2) for b in data.batches("train", epoch=epoch, **options)]
    return torch.cat([b.images_NCHW for b in (*train, *data.batches("evaluation", batch_size=1))])


def kept(root):
    return sorted(path for path in (root.parent / "cache/compress/decoded").rglob("*") if path.is_file())


def test_batches_are_the_same_with_and_without(root):
    plain = opened(root)
    expected = batches(plain)
    first = opened(root, cache="decoded", workers=2)
    assert torch.equal(batches(first), expected)
    files = kept(root)
    # enough for a crop: 16 / sqrt(0.35 * 3 / 4) = 31 pixels; the evaluation sees whole images
    assert sorted({path.name[64:] for path in files}) == ["-32", "-all"]
    assert len(files) == 6
    assert first.fingerprint == plain.fingerprint
    again = opened(root, cache="decoded")
    for path in root.rglob("*.jpg"):
        path.unlink()  # nothing but the cache is read any more
    assert torch.equal(batches(again), expected)


def test_a_damaged_file_is_decoded_anew(root):
    data = opened(root, cache="decoded")
    expected = batches(data)
    files = kept(root)
    for number, path in enumerate(files):
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content[: len(content) // (1, 2, 1000)[number % 3]]))
    assert torch.equal(batches(opened(root, cache="decoded")), expected)
    assert torch.equal(batches(opened(root, cache="decoded")), expected)


def test_no_more_than_the_bound_and_the_oldest_go_first(tmp_path):
    size = 20 + 30 * 20 * 3
    folder = Decoded(tmp_path, 3 * size)
    image = picture(1, (30, 20))
    for number in range(5):
        assert folder.image(f"{number}" * 64, None, lambda: image).tobytes() == image.tobytes()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) <= 3 * size
    for age, path in enumerate(files):
        os.utime(path, (time.time() - 100 * age,) * 2)
    Decoded(tmp_path, 2 * size)
    assert [path for path in files if path.exists()] == files[:1]


def test_a_folder_that_cannot_be_written_stops_nothing(root, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert torch.equal(batches(opened(root, cache="decoded")), batches(opened(root)))


def test_programs_that_write_the_same_image_at_once(tmp_path):
    """A reader finds no image or a whole one, never a part."""
    image = picture(1, (300, 200))
    stop = threading.Event()
    seen = []

    def write(_):
        for _ in range(20):
            Decoded(tmp_path, 10**9).image(SHA, 7, lambda: image)
            for path in tmp_path.rglob(f"{SHA}-7"):
                path.unlink(missing_ok=True)

    def read():
        while not stop.is_set():
            seen.append(Decoded(tmp_path, 10**9).image(SHA, 7, lambda: Image.new("RGB", (1, 1))))

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    stop.set()
    reader.join()
    assert {found.tobytes() for found in seen} <= {image.tobytes(), bytes(3)}
    assert not list(tmp_path.rglob(".*"))


def test_the_same_bytes_under_another_error(root):
    """What cannot be decoded is not kept, and says so."""
    folder = Decoded(default_folder(), 10**9)

    def fails():
        raise DataError("here", "is no readable image")

    with pytest.raises(DataError, match="here: is no readable image"):
        folder.image(SHA, None, fails)
    assert kept(root) == []
