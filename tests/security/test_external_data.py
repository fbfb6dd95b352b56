"""An ONNX file names the files of its weights: none outside its folder is read."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import CompressError
from compress.progress import Silent
from compress.targets import agent
from compress.verification import verify_files


def outside(location: str, size: int) -> onnx.ModelProto:
    """A network whose one weight lies in the file `location`."""
    weight = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[size, 3 * 8 * 8], data_location=TensorProto.EXTERNAL
    )
    weight.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"], transB=1)],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, size])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def places(tmp_path):
    """A secret, and a folder beside it for the network."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.full((2, 192), 7, "<f4").tobytes())
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    return secret, folder


@pytest.mark.parametrize("form", ["../secret.bin", "inner/../../secret.bin", "ABSOLUTE", "LINK", "/etc/passwd", ""])
def test_weights_outside_of_the_folder_are_refused(form, places):
    secret, folder = places
    if form == "LINK":
        (folder / "link.bin").symlink_to(secret)
    location = {"ABSOLUTE": str(secret), "LINK": "link.bin"}.get(form, form)
    path = folder / "network.onnx"
    path.write_bytes(outside(location, 2).SerializeToString())
    with pytest.raises(CompressError) as caught:
        verify_files([path], progress=Silent())
    assert "network.onnx" in str(caught.value)
    with pytest.raises(agent.AgentError):
        agent.open_model(path)


def test_weights_in_the_folder_are_read(places):
    secret, folder = places
    shutil.copyfile(secret, folder / "weights.bin")
    path = folder / "network.onnx"
    path.write_bytes(outside("weights.bin", 2).SerializeToString())
    answers = agent.open_model(path).predict(np.ones((1, 3, 8, 8), np.float32))
    assert answers.tolist() == [[7 * 192] * 2]
