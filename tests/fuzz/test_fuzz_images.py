"""Damaged images, archives and folders of them: data, or one clear line that names the file."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from mutation import cases, damaged
from PIL import Image
from sandboxed import Ended, Sandbox

OPEN = """
import sys
from pathlib import Path
from compress.data import open_data
from compress.data.folder import Folder
from compress.errors import CompressError
from compress.product import Preprocess
from compress.progress import Silent
import warnings
warnings.filterwarnings("ignore", module=r"PIL\\.")
warnings.filterwarnings("error", "Image size .* exceeds limit")
try:
    data = open_data(Folder(use="folder", path=sys.argv[1], workers=0), Preprocess(size=16), Silent(), Path.cwd())
    for split in ("train", "evaluation"):
        for batch in data.batches(split, batch_size=2, augment=split == "train"):
            assert batch.images_NCHW.isfinite().all()
except CompressError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
sys.exit(0)
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("images"))


def picture(rng: random.Random) -> tuple[str, bytes]:
    """An image of any kind that Pillow writes, and the end of its name."""
    pixels = np.random.default_rng(rng.randrange(1000)).integers(0, 256, (20, 24, 4), np.uint8)
    kind, mode = rng.choice(
        (
            ("jpg", "RGB"),
            ("jpg", "CMYK"),
            ("jpg", "L"),
            ("png", "RGB"),
            ("png", "RGBA"),
            ("png", "P"),
            ("png", "1"),
            ("png", "LA"),
            ("png", "I;16"),
            ("gif", "P"),
            ("gif", "frames"),
            ("bmp", "RGB"),
            ("tiff", "RGB"),
            ("tiff", "F"),
            ("tiff", "I;16"),
            ("tiff", "CMYK"),
            ("webp", "RGB"),
            ("webp", "frames"),
            ("ppm", "RGB"),
            ("ico", "RGBA"),
            ("tga", "RGB"),
            ("eps", "RGB"),
        )
    )
    stream = io.BytesIO()
    name = {"jpg": "jpeg"}.get(kind, kind)
    if mode == "frames":
        frames = [Image.fromarray(np.roll(pixels[..., :3], k, 0)) for k in range(3)]
        frames[0].save(stream, name, save_all=True, append_images=frames[1:])
    elif mode == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(stream, name)
    elif mode == "F":
        Image.fromarray(pixels[..., 0].astype(np.float32)).save(stream, name)
    elif mode == "P":
        Image.fromarray(pixels[..., :3]).quantize(16).save(stream, name)
    elif mode in ("RGBA", "LA"):
        Image.fromarray(pixels).convert(mode).save(stream, name)
    else:
        Image.fromarray(pixels[..., :3]).convert(mode).save(stream, name)
    return kind, stream.getvalue()


def bomb(rng: random.Random) -> bytes:
    """Few bytes that say they are an enormous image."""
    side = rng.choice((12_000, 60_000, 2**31 - 1))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\x00" * 1_000_000, 9)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf0\x00\x00" + b"\x00" * 6 + b";"
    bmp = b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 1000, 0, 0, 54, 40, min(side, 2**31 - 1), 30_000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    return rng.choice((png, gif, bmp))


NAMES = (
    "a.png",
    "\x1b[31mred.png",
    "né.png",
    "new\nline.png",
    "<script>.png",
    "a" * 200 + ".png",
    "-rf.png",
    "$(touch x).png",
    "%s.png",
)


def files(rng: random.Random) -> dict[str, bytes]:
    """A folder of two classes whose images are whole but for one or two."""
    found: dict[str, bytes] = {}
    for split, count in (("train", 3), ("val", 2)):
        for label in ("a", rng.choice(("b", "b", "b", "<b>", "\x1b[2Jb"))):
            for number in range(count):
                kind, content = picture(rng)
                found[f"{split}/{label}/{number}.{kind}"] = content
    classes = sorted({name.split("/")[1] for name in found})
    found = {name.replace(f"/{classes[0]}/", "/first/") if classes[0] != "a" else name: v for name, v in found.items()}
    for _ in range(rng.choice((1, 1, 2))):
        victim = rng.choice(list(found))
        folder = victim.rpartition("/")[0]
        match rng.randrange(8):
            case 0:
                found[victim] = bomb(rng)
            case 1:
                found[f"{folder}/{rng.choice(NAMES)}"] = picture(rng)[1]
            case 2:
                found[f"{folder}/{rng.choice(NAMES)}"] = rng.randbytes(rng.choice((0, 1, 50)))
            case 3:
                found = {name: content for name, content in found.items() if not name.startswith(folder)}
                if not found:
                    break
            case _:
                found[victim] = damaged(found[victim], rng)
    return found


def zipped(found: dict[str, bytes], rng: random.Random) -> bytes:
    """An archive of the files, some with names that would escape, some with sizes that are not true."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in found.items():
            archive.writestr(zipfile.ZipInfo(name.replace("\n", "_")), content)
        if rng.random() < 0.4:
            archive.writestr(
                rng.choice(
                    (
                        "../../evil.png",
                        "/etc/evil.png",
                        "train/a/../../../../evil.png",
                        "train\\a\\x.png",
                        "C:\\evil.png",
                    )
                ),
                b"evil",
            )
        if rng.random() < 0.2:
            link = zipfile.ZipInfo("train/a/link.png")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
    data = bytearray(stream.getvalue())
    if rng.random() < 0.3:  # the directory's sizes and methods
        where = data.rfind(b"PK\x01\x02")
        struct.pack_into("<I", data, where + rng.choice((10, 16, 20, 24, 42)), rng.choice((0, 5, 2**31, 2**32 - 1, 9)))
    return damaged(bytes(data), rng) if rng.random() < 0.5 else bytes(data)


def examine(box: Sandbox, ended: Ended, before: dict[str, str]) -> None:
    wrong = ended.wrong()
    after = box.listing()
    if not wrong and after != before:
        wrong = f"changed what lies around: {sorted(set(after) ^ set(before)) or 'another content'}"
    if not wrong and ended.status and "evil" not in ended.err and ended.err.count(": ") < 1:
        wrong = "names no file"
    assert not wrong, f"{wrong}\n{ended.err[-2500:]}"


def link_into(folder: Path, rng: random.Random) -> None:
    """A link to itself, to a folder around, to nowhere, to a device, or a pipe, where an image should be."""
    place = folder / rng.choice(("train/a", "val/a", "train", "."))
    if not place.is_dir():
        return
    match rng.randrange(6):
        case 0:
            (place / "link.png").symlink_to("link.png")
        case 1:
            (place / "around").symlink_to(folder, target_is_directory=True)
        case 2:
            (place / "nowhere.png").symlink_to("/nonexistent/x.png")
        case 3:
            (place / "endless.png").symlink_to("/dev/zero")
        case 4:
            os.mkfifo(place / "pipe.png")
        case _:
            (place / "secret.png").symlink_to("/etc/passwd")


@pytest.mark.parametrize("case", cases("folder", 20, 600) + cases("zip", 20, 600))
def test_damaged_images(case: str, box: Sandbox) -> None:
    kind, _, number = case.partition("-")
    rng = random.Random(int(number))
    box.empty()
    found = files(rng)
    place = box.cwd / ("photos.zip" if kind == "zip" else "photos")
    if kind == "zip":
        place.write_bytes(zipped(found, rng))
    else:
        for name, content in found.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if rng.random() < 0.3 and place.is_dir():
            link_into(place, rng)
    before = box.listing()
    examine(box, box.run(place.name, before=OPEN), before)


def test_undamaged_ones_open(box: Sandbox) -> None:
    rng = random.Random(1)
    box.empty()
    for split in ("train", "val"):
        for label in ("a", "b"):
            for number in range(3):
                kind, content = "tiff", b""
                while kind in ("tiff", "eps"):  # floating-point pixels, and what Pillow gives to another program
                    kind, content = picture(rng)
                path = box.cwd / "photos" / split / label / f"{number}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    ended = box.run("photos", before=OPEN)
    assert ended.status == 0, ended.err
