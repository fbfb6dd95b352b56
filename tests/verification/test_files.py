"""`verify` on files and images as users have them: foreign, broken, of two networks, without labels."""

import json
import shutil
import zipfile

import numpy as np
import onnx
import pytest
import torch
from conftest import PREPROCESS
from PIL import Image
from torch import nn

from compress.errors import CompressError
from compress.formats.onnx import int8_onnx
from compress.formats.tflite import to_tflite
from compress.progress import Silent
from compress.quantization import Quantization, calibrate, freeze, prepare
from compress.targets import agent
from compress.verification import Tolerances, tables, verify_files
from compress.verification.onnx_file import OnnxFile
from compress.verification.tables import headline
from compress.verification.tflite_file import TFLiteFile


def verify(*paths, **how):
    return verify_files(list(paths), progress=Silent(), **how)


def refused(*paths, **how) -> str:
    with pytest.raises(CompressError) as raised:
        verify(*paths, **how)
    message = str(raised.value)
    assert message.count("\n") == 0
    assert len(message) < 400
    return message


@pytest.fixture
def pair(exported):
    return [exported.files["int8.onnx"], exported.files["int8.tflite"]]


def test_an_exported_pair_agrees_and_nothing_is_written_beside_it(pair, run):
    before = {path.name for path in run.folder.iterdir()}
    found = verify(*pair)
    assert found.passed
    assert found.verdict == "PASS"
    (agreement,) = found.agreement
    assert agreement["logits"] == found.images * 5 == sum(agreement["histogram"].values())
    assert found.static.layers == 5
    assert "synthetic" in found.inputs
    assert any("synthetic" in note for note in found.notes)
    assert {path.name for path in run.folder.iterdir()} == before


def test_all_files_of_a_run_by_kind(exported):
    found = verify(*exported.files.values(), limit=4)
    assert found.passed, found.reason
    pairs = {(pair["a"], pair["b"]) for pair in found.agreement}
    assert pairs == {("parent.onnx", "parent.tflite"), ("int8.onnx", "int8.tflite")}
    assert {(pair["a"], pair["b"]) for pair in found.quantization} == {
        ("parent.onnx", "int8.onnx"),
        ("parent.onnx", "int8.tflite"),
    }
    assert found.noise.worst
    json.dumps(found.as_dict(), allow_nan=False)
    shown = tables(found)
    assert [table.title.split(",")[0] for table in shown][:3] == ["Files", "Outputs", "Stored numbers"]
    for table in shown:
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    assert headline(found)[-1] == "PASS: within the tolerances"


def test_the_seed_makes_the_synthetic_images(pair):
    a, b, c = (verify(*pair, seed=seed, limit=3).noise.output_db for seed in (0, 0, 1))
    assert a == b != c


def test_images_from_an_array_in_either_layout(pair, run, tmp_path):
    images = run.data.splits["evaluation"][0][:7].numpy()
    np.save(tmp_path / "nchw.npy", images)
    np.save(tmp_path / "nhwc.npy", images.transpose(0, 2, 3, 1))
    a = verify(*pair, images=tmp_path / "nchw.npy")
    b = verify(*pair, images=tmp_path / "nhwc.npy")
    assert a.images == b.images == 7
    assert a.noise.as_dict() == b.noise.as_dict()
    assert verify(*pair, images=tmp_path / "nchw.npy", limit=2).images == 2


@pytest.mark.parametrize("packed", [False, True])
def test_images_from_class_folders_give_accuracy(exported, pair, tmp_path, packed):
    """The labels in the file's metadata are a, b, c, d, e; only two of them have images here."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for name in ("b", "d"):
        (root / "val" / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
                root / "val" / name / f"{index}.png"
            )
    if packed:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for path in sorted(root.rglob("*.png")):
                archive.write(path, path.relative_to(root))
        root = tmp_path / "photos.zip"
    found = verify(*pair, images=root)
    assert found.images == 8
    from compress.data.pixels import pixels

    preprocess = exported.network.structure.preprocess
    folder = tmp_path / "photos" / "val"
    files = sorted(folder.rglob("*.png"))
    rows = np.stack([pixels(Image.open(path).convert("RGB"), preprocess) for path in files])
    images = preprocess.normalize(rows).transpose(0, 3, 1, 2)
    predicted = agent.open_model(pair[0]).predict(np.ascontiguousarray(images)).argmax(1)
    expected = np.array(["abcde".index(path.parent.name) for path in files])
    assert found.files["int8.onnx"]["accuracy"] == (predicted == expected).mean()


def test_images_without_classes_give_no_accuracy(pair, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "one.png")
    found = verify(*pair, images=tmp_path)
    assert "accuracy" not in found.files["int8.onnx"]
    assert any("no class folders" in note for note in found.notes)


def test_what_cannot_be_verified_is_refused_in_one_line(exported, pair, mlperf, tmp_path):
    onnx_file, tflite_file = pair
    assert "no such file" in refused(tmp_path / "missing.onnx")
    text = tmp_path / "model.pt"
    text.write_text("weights")
    assert "no runtime reads this kind of file" in refused(text)
    for suffix in (".onnx", ".tflite"):
        empty = tmp_path / f"empty{suffix}"
        empty.write_bytes(b"")
        assert f"empty{suffix}" in refused(empty)
        words = tmp_path / f"words{suffix}"
        words.write_text("this is no network, only words " * 40)
        assert f"words{suffix}" in refused(words)
    for path in pair:
        whole = path.read_bytes()
        for part in (0.1, 0.5, 0.9, 0.999):
            cut = tmp_path / f"cut{path.suffix}"
            cut.write_bytes(whole[: int(len(whole) * part)])
            assert f"cut{path.suffix}" in refused(cut)
    swapped = tmp_path / "swapped.tflite"
    shutil.copy(onnx_file, swapped)
    assert "swapped.tflite" in refused(swapped)
    assert "given twice" in refused(onnx_file, onnx_file)
    message = refused(tflite_file, mlperf / "vww_96_int8.tflite")
    assert "inputs of shape" in message
    assert "vww_96_int8.tflite" in message


def test_images_that_do_not_fit_are_refused_in_one_line(pair, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((2, 3, 8, 8), np.float32))
    assert "(3, 8, 8)" in refused(*pair, images=tmp_path / "small.npy")
    np.save(tmp_path / "none.npy", np.zeros((0, 3, 16, 16), np.float32))
    assert "none.npy" in refused(*pair, images=tmp_path / "none.npy")
    (tmp_path / "bad.npy").write_text("no array")
    assert "not a .npy file" in refused(*pair, images=tmp_path / "bad.npy")
    assert "no such folder" in refused(*pair, images=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "has no images" in refused(*pair, images=tmp_path / "empty")
    (tmp_path / "empty" / "broken.png").write_bytes(b"\x89PNG and then nothing")
    assert "is no readable image" in refused(*pair, images=tmp_path / "empty")


def test_a_foreign_float_and_int8_pair(mlperf):
    found = verify(mlperf / "pretrainedResnet.tflite", mlperf / "pretrainedResnet_quant.tflite", limit=4)
    assert found.passed, found.reason
    (quantized,) = found.quantization
    assert quantized["b"] == "pretrainedResnet_quant.tflite"
    assert 0 <= quantized["top1_agreement"] <= 1
    assert found.noise.exact == "pretrainedResnet.tflite"
    assert any("0 and 255" in note for note in found.notes)  # the range of its input grid


def test_an_int8_file_without_a_float_one_gets_a_twin(mlperf):
    found = verify(mlperf / "pretrainedResnet_quant.tflite", limit=4)
    assert found.noise.exact == "the float twin of pretrainedResnet_quant.tflite"
    assert len(found.noise.worst) == 3


def test_a_float_file_alone(mlperf, exported):
    for path in (mlperf / "vww_96_float.tflite", exported.files["parent.onnx"]):
        found = verify(path, limit=2)
        assert found.passed
        assert found.static is None
        assert found.agreement[0]["max_relative"] < 1e-3


def test_a_machine_that_saturates_is_said(exported, pair, monkeypatch):
    """Weights reach 127 here, far beyond what pairs of 16-bit sums hold."""
    monkeypatch.setattr(agent, "saturates", lambda: True)
    found = verify(*pair, limit=2)
    assert any("no VNNI" in note for note in found.notes)
    assert any("int8 weights up to 127" in note and "int8.onnx" in note for note in found.notes)
    assert found.passed, found.reason  # computed by the exact kernels


def test_litert_without_xnnpack_is_said(pair, monkeypatch):
    from compress.verification.tflite_file import LiteSession

    assert not any("XNNPACK" in note for note in verify(*pair, limit=2).notes)
    plain = LiteSession.__init__

    def without(self, content, **how):
        plain(self, content, **(how | {"kernels": "reference"}))

    monkeypatch.setattr(LiteSession, "__init__", without)
    assert any("did not apply XNNPACK" in note for note in verify(*pair, limit=2).notes)


def test_tolerances_decide(exported, pair):
    model = onnx.load(pair[0])
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            values = onnx.numpy_helper.to_array(tensor)
            step = 2 * agent.open_model(pair[1]).outputs[0].scale
            scale = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "head.bias_scale")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values + np.rint(step / scale).astype(np.int32), tensor.name))
    onnx.save(model, pair[0])
    strict = verify(*pair)
    assert not strict.passed
    assert strict.agreement[0]["max_lsb"] in (2, 3)
    assert "differ by" in strict.reason
    assert "first at layer head" in strict.reason
    loose = verify(*pair, tolerances=Tolerances(lsb=3, layer_lsb=3))
    assert loose.agreement[0]["verdict"] == "PASS"
    assert loose.reason.startswith("bias of layer head")  # stored numbers are compared exactly all the same


def test_outputs_for_each_pixel_are_compared_pixel_by_pixel(stripes, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1))
    graph = prepare(module, Quantization(), PREPROCESS)
    calibrate(graph, stripes.batches("train", batch_size=16), torch.device("cpu"))
    model = int8_onnx(freeze(graph.eval()), 16, {})
    paths = [tmp_path / "int8.onnx", tmp_path / "int8.tflite"]
    paths[0].write_bytes(model.SerializeToString())
    paths[1].write_bytes(to_tflite(model, {}))
    found = verify(*paths, limit=4)
    assert found.passed, found.reason
    assert found.agreement[0]["logits"] == 4 * 6 * 16 * 16


@pytest.mark.parametrize(("images", "verdict"), [(1, "PASS"), (2, "FAIL")])
def test_rounding_that_grew_from_right_layers_is_accepted_on_few_images(pair, monkeypatch, images, verdict):
    """The sums of one file are moved by three steps behind layers that are all right: what grows looks like that."""
    right, lsb = OnnxFile.predict, TFLiteFile(pair[1]).output_grid.scale

    def moved(self, images_NCHW):
        logits = right(self, images_NCHW).copy()
        logits[:images, 0] += 3 * lsb
        return logits

    monkeypatch.setattr(OnnxFile, "predict", moved)
    found = verify(*pair, limit=8)
    assert found.verdict == verdict
    assert found.agreement[0]["images_beyond"] == images
    assert any("rounding that grows" in note for note in found.notes) == (verdict == "PASS")
    assert not verify(*pair, limit=8, tolerances=Tolerances(grown=0)).passed
