"""Archives, links and images of strangers: nothing is written, nothing outside is reached, nothing inflates."""

import contextlib
import io
import os
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from compress.data import open_data
from compress.data.cifar import Cifar
from compress.data.decoding import decode
from compress.data.folder import Folder
from compress.data.trees import FolderTree, ZipTree
from compress.errors import DataError
from compress.models import file_sha256
from compress.product import Preprocess
from compress.progress import Silent


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 12), colour).save(stream, "png")
    return stream.getvalue()


def good() -> dict[str, bytes]:
    colours = ("red", "green", "blue", "white", "black", "yellow", "pink", "grey")
    names = [f"{split}/{label}/{n}.png" for split in ("train", "val") for label in "ab" for n in range(2)]
    return {name: png(colour) for name, colour in zip(names, colours, strict=True)}


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return path


def opened(path: Path):
    return open_data(Folder(use="folder", path=str(path), workers=0), Preprocess(size=8), Silent(), path.parent)


ESCAPES = (
    "../../evil.png",
    "/tmp/evil.png",
    "train/a/../../../evil.png",
    "..\\..\\evil.png",
    "C:\\evil.png",
    "train/a/\x00.png",
)


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_of_a_zip_archive_leaves_it(name, tmp_path):
    """Members are read in memory by their place in the archive: their names never reach the file system."""
    folder = tmp_path / "inner" / "most"
    folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    path = pack(folder / "photos.zip", good() | {name: png()})
    with contextlib.suppress(DataError):
        opened(path)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_a_link_in_a_zip_archive_is_no_link(tmp_path):
    link = zipfile.ZipInfo("train/a/link.png")
    link.external_attr = 0o120777 << 16
    path = pack(tmp_path / "photos.zip", good())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"link\.png.*no readable image"):
        opened(path)


def test_a_zip_bomb_never_inflates(tmp_path):
    """A member of 300 MB of zeros in 300 kB, whose directory entry says 1,000 bytes; and one that says what it is."""
    lie = bytearray(pack(tmp_path / "a.zip", good() | {"train/a/bomb.png": bytes(300_000_000)}).read_bytes())
    where = lie.rfind(b"PK\x01\x02")
    struct.pack_into("<I", lie, where + 24, 1000)
    (tmp_path / "lie.zip").write_bytes(lie)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match="bomb"):
        ZipTree(tmp_path / "lie.zip").read("train/a/bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50e3  # KiB
    assert time.process_time() - began < 5
    struct.pack_into("<I", lie, where + 24, 2**32 - 10)
    (tmp_path / "huge.zip").write_bytes(lie)
    with pytest.raises(DataError, match="more than an image"):
        ZipTree(tmp_path / "huge.zip").read("train/a/bomb.png")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.REGTYPE])
@pytest.mark.parametrize("name", ["../../evil.bin", "/tmp/evil.bin", "cifar/train.bin"])
def test_no_member_of_a_tar_archive_leaves_it(kind, name, tmp_path):
    path = tmp_path / "in" / "cifar.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError):
        open_data(Cifar(use="cifar", path=str(path), sha256=file_sha256(path)), Preprocess(size=32), Silent(), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_nobody_vouched_for_is_not_opened(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"not even an archive")
    with pytest.raises(DataError, match="SHA-256"):
        open_data(Cifar(use="cifar", path=str(path)), Preprocess(size=32), Silent(), tmp_path)


@pytest.mark.parametrize("place", [".", "train", "train/a", "val/b"])
def test_links_in_a_circle_end(place, tmp_path):
    for name, content in good().items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "photos" / place / "round").symlink_to(tmp_path / "photos", target_is_directory=True)
    with pytest.raises(DataError, match="is a link to a folder that it lies in"):
        FolderTree(tmp_path / "photos")


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "nowhere", "itself"])
def test_what_is_no_file_among_the_images_is_named(what, tmp_path):
    for name, content in good().items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    strange = tmp_path / "photos" / "train" / "a" / "strange.png"
    if what == "pipe":
        os.mkfifo(strange)
    else:
        strange.symlink_to({"itself": strange, "nowhere": tmp_path / "nowhere"}.get(what, what))
    with pytest.raises(DataError, match=r"strange\.png"):
        opened(tmp_path / "photos")


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_an_image_bomb_is_an_error(side, tmp_path):
    """Between one and two times Pillow's limit, where Pillow itself only warns, and beyond."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"bomb\.png: is no readable image"):
        decode(bomb(side), "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50e3  # KiB


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "eps")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DataError, match="not an image"):
        decode(stream.getvalue(), "picture.eps")
    assert not (tmp_path / "started").exists()
