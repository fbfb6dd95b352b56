"""CIFAR in its original layout, in archives made here, and archives that are something else."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from pictures import Notes

from compress.data import Cifar, open_data
from compress.data.cifar import OTHER_VERSIONS, SHA256
from compress.errors import DataError
from compress.product import Preprocess

PREPROCESS = Preprocess(size=32, crop=1.0)
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def rows(seed, count, *label_ranges):
    """Records as the authors write them: label bytes, then the planes of R, G and B."""
    rng = np.random.default_rng(seed)
    labels = [(np.arange(count) % most)[:, None] for most in label_ranges]
    return np.concatenate([*labels, rng.integers(0, 256, (count, 3072))], 1).astype(np.uint8)


def packed(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def ten():
    files = {f"cifar-10-batches-bin/data_batch_{n}.bin": rows(n, 20, 10).tobytes() for n in range(1, 6)}
    files["cifar-10-batches-bin/test_batch.bin"] = rows(6, 10, 10).tobytes()
    return files | {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*NAMES, ""]).encode()}


@pytest.fixture
def hundred():
    return {
        "cifar-100-binary/train.bin": rows(1, 200, 20, 100).tobytes(),
        "cifar-100-binary/test.bin": rows(2, 100, 20, 100).tobytes(),
        "cifar-100-binary/fine_label_names.txt": "\n".join(f"fine{n}" for n in range(100)).encode(),
        "cifar-100-binary/coarse_label_names.txt": "\n".join(f"coarse{n}" for n in range(20)).encode(),
    }


def opened(path, **settings):
    settings = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **settings}
    return open_data(Cifar(use="cifar", path=str(path), **settings), PREPROCESS, Notes(), path.parent)


def test_cifar_10(tmp_path, ten):
    data = opened(packed(tmp_path / "c.tar.gz", ten))
    assert data.labels == tuple(NAMES)
    assert (data.count("train"), data.count("evaluation")) == (100, 10)
    batch = next(iter(data.batches("evaluation", batch_size=10)))
    raw = rows(6, 10, 10)
    assert batch.labels_N.tolist() == raw[:, 0].tolist()
    expected = PREPROCESS.normalize(raw[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert np.array_equal(batch.images_NCHW.permute(0, 2, 3, 1).numpy(), expected)
    assert data.train.names[21] == "data_batch_2.bin#1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.tar.gz"]


def test_cifar_100_fine_and_coarse(tmp_path, hundred):
    path = packed(tmp_path / "c.tar.gz", hundred)
    fine, coarse = opened(path), opened(path, coarse=True)
    assert (len(fine.labels), len(coarse.labels)) == (100, 20)
    raw = rows(2, 100, 20, 100)
    assert fine.evaluation.targets.tolist() == raw[:, 1].tolist()
    assert coarse.evaluation.targets.tolist() == raw[:, 0].tolist()
    assert fine.fingerprint != coarse.fingerprint
    one, other = (next(iter(d.batches("evaluation", batch_size=100))).images_NCHW for d in (fine, coarse))
    assert torch.equal(one, other)


def test_a_holdout_leaves_the_test_images_alone(tmp_path, ten):
    data = opened(packed(tmp_path / "c.tar.gz", ten), holdout=0.2)
    assert (data.count("train"), data.count("evaluation")) == (80, 20)
    assert not any(name.startswith("test") for name in (*data.train.names, *data.evaluation.names))


def test_the_checksum_comes_first(tmp_path, ten, monkeypatch):
    path = packed(tmp_path / "c.tar.gz", ten)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("looked into an unknown archive"))
    with pytest.raises(DataError, match=f"its SHA-256 is another; .*`sha256: {found}`"):
        opened(path, sha256=None)
    with pytest.raises(DataError, match=f"has SHA-256 {found}, not {'0' * 64}"):
        opened(path, sha256="0" * 64)
    with pytest.raises(DataError, match="no such archive"):
        open_data(Cifar(use="cifar", path="nowhere.tar.gz"), PREPROCESS, Notes(), tmp_path)


def test_published_checksums_are_sha256_of_the_right_names():
    assert set(SHA256.values()) == set(OTHER_VERSIONS.values()) == {"cifar-10-binary.tar.gz", "cifar-100-binary.tar.gz"}
    assert all(len(bytes.fromhex(value)) == 32 for value in (*SHA256, *OTHER_VERSIONS))


class Boom:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda f: {"cifar-10-batches-py/data_batch_1": pickle.dumps(Boom())}, {}, "not the binary version.*pickles"),
        (lambda f: {k: v[:-1] if k.endswith("_3.bin") else v for k, v in f.items()}, {}, "_3.bin has 61459 bytes"),
        (lambda f: {k: v for k, v in f.items() if "test" not in k}, {}, "has no test_batch.bin"),
        (lambda f: {k: v for k, v in f.items() if "txt" not in k}, {}, "has no batches.meta.txt"),
        (lambda f: {k: b"a b" if "txt" in k else v for k, v in f.items()}, {}, "image of class 9, but 2 names"),
        (lambda f: f, {"coarse": True}, "is CIFAR-10, which has no superclasses"),
        (lambda f: {k: b"" if "_2.bin" in k else v for k, v in f.items()}, {}, "data_batch_2.bin has 0 bytes"),
    ],
)  # fmt: skip
def test_archives_of_something_else(tmp_path, ten, change, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(packed(tmp_path / "c.tar.gz", change(ten)), **settings)
    assert "\n" not in str(caught.value)


def test_an_archive_cut_short_and_one_that_would_escape(tmp_path, ten):
    whole = packed(tmp_path / "c.tar.gz", ten).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"is no whole \.tar\.gz archive"):
        opened(tmp_path / "cut.tar.gz")
    (tmp_path / "junk.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"is no whole \.tar\.gz archive"):
        opened(tmp_path / "junk.tar.gz")
    inside = tmp_path / "inside"
    inside.mkdir()
    names = {k: f"../../{k.rpartition('/')[2]}" if "meta" in k else f"/{k.rpartition('/')[2]}" for k in ten}
    opened(packed(inside / "c.tar.gz", {names[k]: v for k, v in ten.items()}))
    assert [path.name for path in inside.iterdir()] == ["c.tar.gz"]
    assert not (tmp_path / "batches.meta.txt").exists()
