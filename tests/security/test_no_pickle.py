"""No pickle is ever loaded: files that would run code when unpickled are refused, and their code does not run."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress import checkpoint
from compress.data import open_data
from compress.data.cifar import Cifar
from compress.epochs import Epochs, State
from compress.errors import CompressError, DataError, ModelError
from compress.gate import answers
from compress.models.weights import load_weights, read_weights
from compress.product import Preprocess
from compress.progress import Silent
from compress.targets import agent
from compress.verification import verify_files


class Evil:
    """Unpickling one makes the file it names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path):
    """A path that no test may bring into being."""
    path = tmp_path / "code has run"
    pickle.loads(pickle.dumps(Evil(path)))  # the trap works
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


def traps(mark: Path) -> dict[str, bytes]:
    """The same pickle in every wrapping that torch, numpy and users have for one."""
    plain = pickle.dumps(Evil(mark))
    zipped, legacy, tensors, array, arrays = (io.BytesIO() for _ in range(5))
    torch.save(Evil(mark), zipped)
    torch.save({"weight": Evil(mark)}, legacy, _use_new_zipfile_serialization=False)
    torch.save({"weight": torch.zeros(2), "more": Evil(mark)}, tensors)
    np.save(array, np.array([Evil(mark)], object), allow_pickle=True)
    np.savez(arrays, weight=np.array([Evil(mark)], object))
    return {
        "plain": plain,
        "zipped": zipped.getvalue(),
        "legacy": legacy.getvalue(),
        "tensors": tensors.getvalue(),
        "array": array.getvalue(),
        "arrays": arrays.getvalue(),
    }


KINDS = ("plain", "zipped", "legacy", "tensors", "array", "arrays")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_as_initial_weights(kind, suffix, mark, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(traps(mark)[kind])
    with pytest.raises(ModelError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ModelError):
        load_weights(nn.Linear(2, 2), path, Silent())


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_weights_of_a_checkpoint(kind, mark, tmp_path, product):
    folder = tmp_path / "network"
    checkpoint.save(product.network, folder)
    structure = json.loads((folder / checkpoint.STRUCTURE).read_text())
    structure["model"] = {"use": "mobilenet_v2"}
    structure["num_classes"] = 2
    (folder / checkpoint.STRUCTURE).write_text(json.dumps(structure))
    (folder / checkpoint.WEIGHTS).write_bytes(traps(mark)[kind])
    with pytest.raises(ModelError, match=r"does not fit the structure|not whole|damaged|cut short"):
        checkpoint.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_state_of_an_epoch(kind, mark, tmp_path):
    """Even with the hash that belongs to it: the content is read as safetensors or not at all."""
    import hashlib

    training = Epochs(tmp_path).begin()
    training.save(State({"weight": torch.zeros(2)}, {"epoch": 1}))
    (header,) = tmp_path.rglob("epoch.json")
    content = traps(mark)[kind]
    facts = json.loads(header.read_text())
    (header.parent / facts["file"]).write_bytes(content)
    facts["sha256"] = hashlib.sha256(content).hexdigest()
    header.write_text(json.dumps(facts))
    again = Epochs(tmp_path).begin()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, no code has run
        again.load()
    assert "pickle" not in type(caught.value).__name__.lower()


@pytest.mark.parametrize("kind", KINDS)
def test_as_images_for_verify(kind, mark, tmp_path, exported):
    images = tmp_path / "images.npy"
    images.write_bytes(traps(mark)[kind])
    with pytest.raises(DataError, match=r"images\.npy"):
        verify_files([exported.files["int8.onnx"]], images=images, progress=Silent())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--inputs", "--labels"])
def test_as_inputs_and_labels_of_the_agent(kind, option, mark, tmp_path, exported, capsys):
    path = tmp_path / "array.npy"
    path.write_bytes(traps(mark)[kind])
    inputs = tmp_path / "inputs.npy"
    np.save(inputs, np.zeros((1, 3, 16, 16), np.float32))
    given = [f"--inputs={inputs}"] if option == "--labels" else []
    outputs = f"--outputs={tmp_path / 'outputs.npy'}"
    assert agent.main(["run", str(exported.files["int8.onnx"]), *given, f"{option}={path}", outputs]) != 0
    assert "not a .npy file" in capsys.readouterr().err


def test_as_answers_of_a_baseline():
    with pytest.raises(ValueError, match="no numbers"):
        answers.unpacked({"dtype": "O", "shape": [1], "data": ""})


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_network(kind, mark, tmp_path):
    for name in ("network.onnx", "network.tflite"):
        path = tmp_path / name
        path.write_bytes(traps(mark)[kind])
        with pytest.raises(CompressError):
            verify_files([path], progress=Silent())


def test_as_a_data_archive(mark, tmp_path):
    """The Python version of CIFAR is pickles; a stranger's archive of the same layout is refused by its hash."""
    import tarfile

    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        content = pickle.dumps(Evil(mark))
        for name in (
            "cifar-10-batches-py/data_batch_1",
            "cifar-10-batches-py/test_batch",
            "cifar-10-batches-py/batches.meta",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    from compress.models import file_sha256

    for own in (None, file_sha256(path)):
        with pytest.raises(DataError):
            open_data(Cifar(use="cifar", path=str(path), sha256=own), Preprocess(size=32), Silent(), tmp_path)


def test_what_we_write_is_no_pickle(tmp_path, product):
    checkpoint.save(product.network, tmp_path / "network")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not zipfile.is_zipfile(path)
            assert not path.read_bytes().startswith(b"\x80")
