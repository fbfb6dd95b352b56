"""An ONNX file opened for comparison: its numbers, every tensor it computes, and each layer on its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.errors import ModelError
from compress.targets import agent, open_model
from compress.verification.facts import Facts, Grid, Parameters, Problem, bias_problems, short, trimmed

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose")
STORED = {TensorProto.UINT8: np.dtype(np.uint8), TensorProto.INT8: np.dtype(np.int8)}
SATURATING = 64
"""Two products of 255 and a weight beyond this do not fit 16 bits."""


class OnnxFile:
    """Raises CompressError for a file that is none, or that cannot be run."""

    def __init__(self, path: Path, *, name: str = "", threads: int = 1) -> None:
        self.path, self.name, self.threads = path, name or path.name, threads
        self.model = open_model(path, threads=threads)
        try:
            self.proto = onnx.load(path)
        except Exception as error:  # protobuf's DecodeError, and what onnx raises over external data
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(path.name, f"cannot be read as ONNX ({problem})", "export it again") from error
        graph = self.proto.graph
        self.metadata = {entry.key: entry.value for entry in self.proto.metadata_props}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.makers = {output: node for node in graph.node for output in node.output}
        self.grids, self.types, self._problems = self._read_grids()

    # -- what it holds

    @cached_property
    def facts(self) -> Facts:
        parameters = self._read_parameters()
        problems = [*self._problems, *bias_problems(self.name, self.grids, parameters)]
        return Facts(self.name, self.grids, parameters, problems)

    @property
    def quantized(self) -> bool:
        """Whether activations lie on grids (a file whose weights alone are integers computes in float)."""
        return bool(self.grids)

    @cached_property
    def storage(self) -> str:
        """int8, int8_weights, float16 or float: how the file holds the network."""
        if self.quantized:
            return "int8"
        kinds = {tensor.data_type for tensor in self.constants.values() if len(tensor.dims) > 1}
        if kinds & set(STORED):
            return "int8_weights"
        return "float16" if TensorProto.FLOAT16 in kinds else "float"

    @property
    def input_grid(self) -> Grid | None:
        """Of the image, if the file rounds it before anything else."""
        for node in self.proto.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] == self.model.input.name:
                return self.grids.get(node.output[0])
        return None

    @cached_property
    def output_tensor(self) -> str:
        """The value that is the output: a quantized tensor, where nothing but its DequantizeLinear is in between."""
        name = str(self.proto.graph.output[0].name)
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self.grids:
            return str(maker.input[0])
        return name

    @cached_property
    def output_grid(self) -> Grid | None:
        name = self.proto.graph.output[0].name
        while name in self.makers and self.makers[name].op_type in MOVES:
            name = self.makers[name].input[0]
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        found = self._grid(maker)
        return found[0] if found else None

    @cached_property
    def notes(self) -> list[str]:
        notes = list(self.model.notes)
        operators = sorted({node.op_type for node in self.proto.graph.node if node.op_type.startswith("QLinear")})
        if operators and not self.quantized:
            notes.append(f"{self.name} has {operators[0]} in the place of QDQ: outputs are compared, layers are not")
        if agent.saturates() and self.quantized:
            largest = max(
                (int(np.abs(p.weight.astype(np.int16)).max()) for p in self.facts.parameters.values() if p.weight.size),
                default=0,
            )
            if largest > SATURATING:
                notes.append(
                    f"{self.name} holds int8 weights up to {largest}: on x86 without VNNI, as here, programs that open"
                    " it without session.x64quantprecision=1 get saturated sums"
                )
        return notes

    def _read_grids(self) -> tuple[dict[str, Grid], dict[str, np.dtype[Any]], list[Problem]]:
        grids: dict[str, Grid] = {}
        types: dict[str, np.dtype[Any]] = {}
        problems = []
        for node in self.proto.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[0] in self.constants:
                continue
            found = self._grid(node)
            if found is None:
                continue
            grid, kind = found
            if node.op_type == "QuantizeLinear":
                grids[node.output[0]], types[node.output[0]] = grid, kind
            elif grids.get(node.input[0], grid) != grid:
                name, written = node.input[0], grids[node.input[0]]
                what = "scale" if written.scale != grid.scale else "zero point"
                text = (
                    f"{what} of layer {short(name)}: it is written with scale {written.scale:.9g} and zero point"
                    f" {written.zero_point}, and read with {grid.scale:.9g} and {grid.zero_point}"
                )
                problems.append(Problem(name, what, f"{self.name}: {text}", self.name))
        return grids, types, problems

    def _grid(self, node: onnx.NodeProto) -> tuple[Grid, np.dtype[Any]] | None:
        """The grid of a QuantizeLinear or DequantizeLinear of activations; None for one that is no 8-bit constant."""
        scale = self._value(node.input[1])
        zero_point = self._value(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype not in STORED.values():
            return None
        shift = 0 if zero_point.dtype == np.uint8 else 128
        return Grid(np.float32(scale.item()), int(zero_point.item()) + shift), zero_point.dtype

    def _value(self, name: str) -> np.ndarray | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def _read_parameters(self) -> dict[str, Parameters]:
        found: dict[str, Parameters] = {}
        for node in self.proto.graph.node:
            if node.op_type not in LAYERS or (stored := self._stored_weight(node.input[1])) is None:
                continue
            name, weight, scales = stored
            layer = name.removesuffix(".weight") if name.endswith(".weight") else self._lands(node.output[0])
            bias = bias_scale = None
            source = self.makers.get(node.input[2]) if len(node.input) > 2 else None
            if source is not None and source.op_type == "DequantizeLinear":
                bias, bias_scale = self._value(source.input[0]), self._value(source.input[1])
                bias = None if bias is None else bias.reshape(-1)
            found[layer] = Parameters(
                layer=layer,
                source=self._comes_from(node.input[0]),
                weight=_outputs_first(node, weight),
                weight_scale=np.atleast_1d(scales).astype(np.float32),
                bias=bias,
                bias_scale=None if bias_scale is None else np.atleast_1d(bias_scale).astype(np.float32),
            )
        return found

    def _stored_weight(self, value: str) -> tuple[str, np.ndarray, np.ndarray] | None:
        """Name, int8 numbers and scales of a weight that DequantizeLinear, or Cast and Mul, turn to float."""
        maker = self.makers.get(value)
        if maker is None or maker.op_type not in ("DequantizeLinear", "Mul"):
            return None
        name, scale = maker.input[:2]
        if maker.op_type == "Mul":
            if (cast := self.makers.get(name)) is None or cast.op_type != "Cast":
                return None
            name = cast.input[0]
        weight, scales = self._value(name), self._value(scale)
        if weight is None or scales is None or weight.dtype != np.int8:
            return None
        return name, weight, scales.reshape(-1)

    def _lands(self, value: str) -> str:
        """The quantized tensor that a value becomes, if there is nothing but an activation in between."""
        for _ in range(3):
            users = [node for node in self.proto.graph.node if value in node.input]
            if len(users) != 1:
                break
            value = users[0].output[0]
            if users[0].op_type == "QuantizeLinear":
                break
        return value

    def _comes_from(self, value: str) -> str:
        maker = self.makers.get(value)
        return maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else value

    # -- what it computes

    def predict(self, images_NCHW: np.ndarray) -> np.ndarray:
        """The outputs as real numbers, (N, K)."""
        return self.model.predict(images_NCHW)

    def predict_plainly(self, images_NCHW: np.ndarray) -> np.ndarray:
        """The outputs with every optimization off: no fused integer kernels."""
        session, output = OnnxSession(self.proto, threads=self.threads, optimize=False), self.model.outputs[0]
        rows = [session.run({self._input: self.model.feed(image)})[output.name][0] for image in images_NCHW]
        return output.real(np.stack(rows))

    def steps(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every quantized tensor, int32 steps from zero, (N, 1, ...), by name in the order of execution."""
        proto = copy.deepcopy(self.proto)
        present = {output.name for output in proto.graph.output}
        for name in self.grids:
            if name not in present:
                proto.graph.output.append(_untyped(name, self.types[name]))
        session = OnnxSession(proto, threads=self.threads)
        return self._stacked(session.run({self._input: self.model.feed(image)}) for image in images)

    def unfused_steps(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The same with every optimization off: float arithmetic between the grids, no integer kernels."""
        proto = copy.deepcopy(self.proto)
        proto.graph.output.extend(_untyped(name, self.types[name]) for name in self.grids)
        session = OnnxSession(proto, threads=self.threads, optimize=False)
        return self._stacked(session.run({self._input: self.model.feed(image)}) for image in images)

    def alone(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every tensor of `given` as the file computes it when all tensors before it are the given ones."""
        names = [name for name in self.grids if name in given]
        rows = self._cut(images, {name: self._stored(name, given[name]) for name in names})
        return self._stacked(rows, names)

    def _cut(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """What each image's tensors become when every operator reads the `given` (N, ...) in their place."""
        proto = copy.deepcopy(self.proto)
        graph = proto.graph
        outputs = {output.name for output in graph.output}
        names = [name for name in given if name not in outputs]
        for node in graph.node:
            for index, name in enumerate(node.output):
                if name in names:
                    node.output[index] = f"{name}/own"
        for name in names:
            kind = helper.np_dtype_to_tensor_dtype(given[name].dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, given[name].shape[1:]))
            graph.output.append(_untyped(f"{name}/own", given[name].dtype))
        for value in list(graph.value_info):
            if value.name in names:
                graph.value_info.remove(value)
        session = OnnxSession(proto, threads=self.threads)
        read = {value.name for value in session.session.get_inputs()}
        for index, image in enumerate(images):
            feeds = {name: given[name][index] for name in names} | {self._input: self.model.feed(image)}
            results = session.run({name: values for name, values in feeds.items() if name in read})
            yield {name.removesuffix("/own"): values for name, values in results.items()}

    def _stored(self, name: str, steps: np.ndarray) -> np.ndarray:
        grid = self.grids[name]
        shift = 0 if self.types[name] == np.uint8 else 128
        stored = np.clip(steps + grid.zero_point, 0, grid.steps - 1) - shift
        return stored.astype(self.types[name])

    def _stacked(
        self, results: Iterable[Mapping[str, np.ndarray]], names: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        wanted = [*(self.grids if names is None else names)]
        rows: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        for result in results:
            for name in wanted:
                if name in result:
                    shift = 0 if self.types[name] == np.uint8 else 128
                    rows[name].append(result[name].astype(np.int32) + shift - self.grids[name].zero_point)
        return {name: np.stack(row) for name, row in rows.items() if row}

    @property
    def _input(self) -> str:
        return self.model.input.name

    # -- as the float network that another file is compared with

    def float_names(self) -> list[str]:
        """Computed float values, in the order of execution."""
        return [node.output[0] for node in self.proto.graph.node if node.output and node.op_type != "Constant"]

    def floats(self, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The float values `names`, (N, 1, ...)."""
        proto = copy.deepcopy(self.proto)
        present = {output.name for output in proto.graph.output}
        proto.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in present
        )
        session = OnnxSession(proto, threads=self.threads)
        rows = [session.run({self._input: self.model.feed(image)}) for image in images]
        return {name: np.stack([row[name] for row in rows]) for name in names}

    def floats_alone(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every value of `given` as the file computes it when all values before it are the given ones."""
        rows = list(self._cut(images, {name: values.astype(np.float32) for name, values in given.items()}))
        return {name: np.stack([row[name] for row in rows]) for name in given}

    def disturbed(self, images: np.ndarray, errors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs (N, K) by name: what the file answers when the error of that one value is added to it."""
        proto = copy.deepcopy(self.proto)
        graph = proto.graph
        outputs = {output.name for output in graph.output}
        nodes = []
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name in errors:
                    node.input[index] = f"{name}/disturbed"
        for node in graph.node:
            nodes.append(copy.deepcopy(node))
            for index, name in enumerate(node.output):
                if name not in errors:
                    continue
                exact, result = (f"{name}/exact", name) if name in outputs else (name, f"{name}/disturbed")
                nodes[-1].output[index] = exact
                nodes.append(helper.make_node("Add", [exact, f"{name}/error"], [result]))
                if name in outputs:  # nothing may read an output under another name
                    nodes.append(helper.make_node("Identity", [result], [f"{name}/disturbed"]))
                shape = errors[name].shape[1:]
                graph.input.append(helper.make_tensor_value_info(f"{name}/error", TensorProto.FLOAT, shape))
        del graph.node[:]
        graph.node.extend(nodes)
        session = OnnxSession(proto, threads=self.threads)
        zeros = {name: np.zeros(error.shape[1:], np.float32) for name, error in errors.items()}
        answers: dict[str, np.ndarray] = {}
        for name, error in errors.items():
            rows = []
            for index, image in enumerate(images):
                feeds = {f"{other}/error": zero for other, zero in zeros.items()}
                feeds[f"{name}/error"] = error[index].astype(np.float32)
                feeds[self._input] = self.model.feed(image)
                rows.append(session.run(feeds)[self.model.outputs[0].name][0])
            answers[name] = np.stack(rows)
        return answers


class OnnxSession:
    """A graph with many inputs and outputs in ONNX Runtime, set up as `agent.open_model` does."""

    def __init__(self, proto: onnx.ModelProto, *, threads: int = 1, optimize: bool = True) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        if agent.saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self.session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen classes for this, none of them public
            raise not_alone(error) from error
        self.names = [value.name for value in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        try:
            return dict(zip(self.names, self.session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise not_alone(error) from error


def not_alone(error: Exception) -> ModelError:
    """For a runtime that runs a network as it is and refuses it with more inputs or outputs."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError("layers", f"the runtime refuses to run them one by one ({lines[0]})")


def _untyped(name: str, kind: np.dtype[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), None)


def _outputs_first(node: onnx.NodeProto, weight: np.ndarray) -> np.ndarray:
    """(outputs, inputs / groups, ...) of any layer's weight."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB", 0)):
        weight = weight.T if weight.ndim == 2 else weight
    elif node.op_type == "ConvTranspose":  # (inputs, outputs / groups, ...)
        groups = attributes.get("group", 1)
        inputs, outputs, *window = weight.shape
        weight = weight.reshape(groups, inputs // groups, outputs, *window).swapaxes(1, 2)
        weight = weight.reshape(groups * outputs, inputs // groups, *window)
    return trimmed(weight)
