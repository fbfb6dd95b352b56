"""A TFLite file opened for comparison: its numbers, every tensor it computes, and each layer on its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.errors import ModelError
from compress.formats.tflite import ORDERS_KEY, pack
from compress.targets import open_model
from compress.verification.facts import Facts, Grid, Parameters, Problem, bias_problems, short, trimmed
from compress.verification.onnx_file import not_alone

Kernels = Literal["default", "reference"]
"""What a board runs (XNNPACK), or LiteRT's own plain kernels."""

LAYERS = {
    "CONV_2D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}
"""Where the input, the weights and the biases of a layer stand among its inputs."""
MOVES = ("RESHAPE", "PAD", "PADV2", "MAX_POOL_2D", "AVERAGE_POOL_2D", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS")
"""Operators whose int8 kernels write onto the grid of their input."""
FIXED = {"LOGISTIC": (np.float32(1 / 256), 0), "SOFTMAX": (np.float32(1 / 256), 0), "TANH": (np.float32(1 / 128), 128)}
"""Operators whose int8 kernels have one output grid; zero points counted from 0."""
NHWC = (0, 2, 3, 1)
SHIFTS = {"int8": 128, "uint8": 0, "int16": 32768}


class TFLiteFile:
    """Raises CompressError for a file that is none, or that cannot be run."""

    def __init__(self, path: Path, *, name: str = "", threads: int = 1, runs: bool = True) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.path, self.name, self.threads = path, name or path.name, threads
        # LiteRT checks the bytes, which the reader below does not. A file that it read but cannot run has numbers only.
        self.model: Any = open_model(path, threads=threads) if runs else None
        self.content, self.schema = path.read_bytes(), schema
        self.proto = schema.ModelT.InitFromPackedBuf(self.content, 0)
        if len(self.proto.subgraphs) != 1:
            raise ModelError(path.name, f"has {len(self.proto.subgraphs)} graphs", "only networks of one can be read")
        graph = self.graph = self.proto.subgraphs[0]
        self.metadata = {
            _text(entry.name): self._bytes(entry.buffer).decode(errors="replace") for entry in self.proto.metadata or []
        }
        orders = json.loads(self.metadata.pop(ORDERS_KEY, "{}"))
        self.orders = {name: tuple(int(axis) for axis in order) for name, order in orders.items()}
        """Axes of tensors that do not lie as NHWC, or as the ONNX has them: axis i is axis `order[i]` of the value."""
        names: dict[str, int] = {}
        self.names = [_unique(_text(tensor.name), names) for tensor in graph.tensors]
        self.index = {name: index for index, name in enumerate(self.names)}
        codes = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
        self.ops = [
            codes[max(c.builtinCode, c.deprecatedBuiltinCode)]
            for c in (self.proto.operatorCodes[operator.opcodeIndex] for operator in graph.operators)
        ]
        kinds = {code: name.lower() for name, code in vars(schema.TensorType).items() if isinstance(code, int)}
        self.types = {name: kinds[tensor.type] for name, tensor in zip(self.names, graph.tensors, strict=True)}
        self.order = [index for operator in graph.operators for index in operator.outputs]
        computed = [*graph.inputs, *self.order]
        self.grids = {
            self.names[i]: grid for i in computed if (grid := _grid(graph.tensors[i], self.types[self.names[i]]))
        }

    def unpacked(self) -> Any:
        """A copy in the object API whose tensors, operators and lists can be changed (half the time of unpacking)."""
        model, graph = copy.copy(self.proto), copy.copy(self.graph)
        graph.tensors = [copy.copy(tensor) for tensor in graph.tensors]
        graph.operators = [copy.copy(operator) for operator in graph.operators]
        for operator in graph.operators:
            operator.builtinOptions = copy.copy(operator.builtinOptions)
        model.subgraphs = [graph]
        model.buffers = list(model.buffers)
        model.operatorCodes = [copy.copy(code) for code in model.operatorCodes]
        return model

    def _bytes(self, buffer: int) -> bytes:
        data = self.proto.buffers[buffer].data
        return b"" if data is None else bytes(data)

    # -- what it holds

    @cached_property
    def facts(self) -> Facts:
        parameters = self._read_parameters()
        problems = [*self._grid_problems(), *bias_problems(self.name, self.grids, parameters)]
        return Facts(self.name, self.grids, parameters, problems)

    @property
    def quantized(self) -> bool:
        """Whether activations lie on grids (a file whose weights alone are integers computes in float)."""
        return any(self.names[index] in self.grids for index in self.order)

    @cached_property
    def storage(self) -> str:
        """int8, int8_weights, float16 or float: how the file holds the network."""
        if self.quantized:
            return "int8"
        kinds = {
            self.types[name]
            for name, tensor in zip(self.names, self.graph.tensors, strict=True)
            if self._constant(tensor) is not None and len(tensor.shape if tensor.shape is not None else ()) > 1
        }
        if "int8" in kinds:
            return "int8_weights"
        return "float16" if "float16" in kinds else "float"

    @property
    def input_grid(self) -> Grid | None:
        return self.grids.get(self.names[self.graph.inputs[0]])

    @property
    def output_tensor(self) -> str:
        return self.names[self.graph.outputs[0]]

    @property
    def output_grid(self) -> Grid | None:
        return self.grids.get(self.names[self.graph.outputs[0]])

    @cached_property
    def notes(self) -> list[str]:
        notes = list(self.model.notes)
        if not self._delegated():
            notes.append(
                f"LiteRT did not apply XNNPACK to {self.name}: its built-in kernels are 1 to 3 LSB off on their own"
            )
        return notes

    def _delegated(self) -> bool:
        session = LiteSession(self.content, threads=1)
        details = getattr(session.interpreter, "_get_ops_details", None)
        return details is None or any(detail["op_name"] == "DELEGATE" for detail in details())

    def _constant(self, tensor: Any) -> Any:
        return self.proto.buffers[tensor.buffer].data

    def _values(self, index: int) -> np.ndarray | None:
        """The numbers of a constant; None for a computed tensor."""
        if index < 0:
            return None
        tensor = self.graph.tensors[index]
        data = self._constant(tensor)
        if data is None or not len(data):
            return None
        return np.frombuffer(bytes(data), np.dtype(self.types[self.names[index]])).reshape(tuple(tensor.shape))

    def real_constant(self, index: int) -> np.ndarray | None:
        """The float32 numbers that a quantized constant stands for; None for all other tensors."""
        values, scales = self._values(index), _scales(self.graph.tensors[index])
        if values is None or scales is None:
            return None
        quantization = self.graph.tensors[index].quantization
        zero_points = np.asarray(quantization.zeroPoint if quantization.zeroPoint is not None else [0], np.int64)
        shape = [1] * values.ndim
        if len(scales) > 1:
            shape[quantization.quantizedDimension] = -1
        zero_points = np.broadcast_to(zero_points if len(zero_points) else 0, scales.shape)
        return ((values - zero_points.reshape(shape)) * scales.reshape(shape)).astype(np.float32)

    def _read_parameters(self) -> dict[str, Parameters]:
        found: dict[str, Parameters] = {}
        widened: dict[int, int] = {}
        """Constants that are turned to float before a layer reads them, by the float tensor."""
        for op, operator in zip(self.ops, self.graph.operators, strict=True):
            if op == "DEQUANTIZE":
                widened[int(operator.outputs[0])] = int(operator.inputs[0])
            if op not in LAYERS:
                continue
            x, weights, biases = (int(operator.inputs[i]) if i < len(operator.inputs) else -1 for i in LAYERS[op])
            weights = widened.get(weights, weights)
            weight = self._values(weights)
            scales = _scales(self.graph.tensors[weights])
            if weight is None or weight.dtype != np.int8 or scales is None:
                continue
            name, output = self.names[weights], self.names[operator.outputs[0]]
            layer = name.removesuffix(".weight") if name.endswith(".weight") else output
            if ":" in name:  # the writer's own filters, which the ONNX does not have (an average as a convolution)
                continue
            bias = self._values(biases)
            if bias is not None and bias.dtype.kind != "i":
                bias = None
            found[layer] = Parameters(
                layer=layer,
                source=self.names[x],
                weight=_outputs_first(op, weight),
                weight_scale=scales,
                bias=bias,
                bias_scale=None if bias is None else _scales(self.graph.tensors[biases]),
            )
        return found

    def _grid_problems(self) -> list[Problem]:
        """Grids that the operators between them do not allow."""
        problems = []
        for op, operator in zip(self.ops, self.graph.operators, strict=True):
            output = self.names[operator.outputs[0]]
            source = self.names[operator.inputs[0]] if len(operator.inputs) else ""
            before, after = self.grids.get(source), self.grids.get(output)
            if before is None or after is None:
                continue
            if op in MOVES and (before.scale, before.zero_point) != (after.scale, after.zero_point):
                what = "scale" if before.scale != after.scale else "zero point"
                ours, theirs = (f"{grid.scale:.9g} and {grid.zero_point}" for grid in (before, after))
                # A tensor with a colon is the writer's own helper, so the layer is the one that it is made of.
                layer = source if ":" in output else output
                text = (
                    f"scale and zero point of layer {short(source)} are {ours}, of {short(output)}, its {op}, {theirs}"
                )
                problems.append(Problem(layer, what, f"{self.name}: {text}", self.name))
            elif op in FIXED and FIXED[op] != (after.scale, after.zero_point):
                what = "scale" if FIXED[op][0] != after.scale else "zero point"
                text = (
                    f"{what} of layer {short(output)}: {op} writes scale {FIXED[op][0]:.9g} and zero point"
                    f" {FIXED[op][1]}, the file says {after.scale:.9g} and {after.zero_point}"
                )
                problems.append(Problem(output, what, f"{self.name}: {text}", self.name))
        return problems

    # -- what it computes

    def predict(self, images_NCHW: np.ndarray) -> np.ndarray:
        """The outputs as real numbers, (N, K), or (N, K, H, W) of a network that answers for each pixel."""
        return _as_nchw(self.model.predict(images_NCHW))

    def predict_plainly(self, images_NCHW: np.ndarray) -> np.ndarray:
        """The outputs by LiteRT's reference kernels."""
        session, output = LiteSession(self.content, threads=self.threads, kernels="reference"), self.model.outputs[0]
        rows = np.stack([session.run([self.model.feed(image)])[0][0] for image in images_NCHW])
        return _as_nchw(output.real(rows))

    def steps(self, images: np.ndarray, kernels: Kernels = "default") -> dict[str, np.ndarray]:
        """Every quantized tensor, int32 steps from zero, (N, 1, ...) in NCHW, by name in the order of execution."""
        names = [self.names[index] for index in self.order if self.names[index] in self.grids]
        session = self._session({}, names, kernels)
        return self._stacked((session.run([self.model.feed(image)]) for image in images), names)

    def alone(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every tensor of `given` as the file computes it when all tensors before it are the given ones."""
        names = [self.names[i] for i in self.order if self.names[i] in self.grids and self.names[i] in given]
        return self._stacked(self._cut(images, {name: self._stored(name, given[name]) for name in names}), names)

    def _cut(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> Iterator[list[np.ndarray]]:
        """What each image's tensors become when every operator reads the `given` (N, ...) in their place."""
        read = {int(i) for operator in self.graph.operators for i in operator.inputs}
        replaced = {name: f"{name}/given" for name in given if self.index[name] in read}
        session = self._session(replaced, [*given], "default")
        for index, image in enumerate(images):
            yield session.run([self.model.feed(image), *(given[name][index] for name in replaced)])

    def _session(self, replaced: Mapping[str, str], outputs: Sequence[str], kernels: Kernels) -> LiteSession:
        """The network with `outputs`, in which operators read new inputs in the place of `replaced` tensors."""
        model = self.unpacked()
        graph = model.subgraphs[0]
        copies = {}
        for name, new in replaced.items():
            tensor = graph.tensors[self.index[name]]
            other = self.schema.TensorT(
                name=new,
                shape=tensor.shape,
                type=tensor.type,
                buffer=0,
                quantization=tensor.quantization,
                shapeSignature=tensor.shapeSignature,
                hasRank=tensor.hasRank,
            )
            copies[self.index[name]] = len(graph.tensors)
            graph.tensors.append(other)
        for operator in graph.operators:
            operator.inputs = [copies.get(int(index), int(index)) for index in operator.inputs]
        graph.inputs = [*graph.inputs, *copies.values()]
        graph.outputs = [self.index[name] for name in outputs]
        model.signatureDefs = None
        return LiteSession(pack(model), threads=self.threads, kernels=kernels, graph=graph)

    def _stored(self, name: str, steps: np.ndarray) -> np.ndarray:
        """Steps in NCHW as the tensor stores them."""
        grid, kind = self.grids[name], self.types[name]
        stored = np.clip(steps + grid.zero_point, 0, grid.steps - 1) - SHIFTS[kind]
        return self._stored_order(name, stored.astype(kind))

    def _value_order(self, name: str, stored: np.ndarray) -> np.ndarray:
        """A tensor's numbers with the axes of the ONNX value: images NCHW."""
        order = self.orders.get(name, NHWC if stored.ndim == 4 else ())
        return stored.transpose(np.argsort(order)) if order else stored

    def _stored_order(self, name: str, value: np.ndarray) -> np.ndarray:
        """The opposite of `_value_order`, for several images (N, ...)."""
        order = self.orders.get(name, NHWC if value.ndim == 5 else ())
        return np.ascontiguousarray(value.transpose(0, *(axis + 1 for axis in order))) if order else value

    def _stacked(self, results: Iterable[Sequence[np.ndarray]], names: Sequence[str]) -> dict[str, np.ndarray]:
        rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for result in results:
            for name, values in zip(names, result, strict=True):
                steps = values.astype(np.int32) + SHIFTS[self.types[name]] - self.grids[name].zero_point
                rows[name].append(self._value_order(name, steps))
        return {name: np.stack(row) for name, row in rows.items()}

    # -- as the float network that another file is compared with

    def float_names(self) -> list[str]:
        """Computed float values, in the order of execution."""
        return [self.names[index] for index in self.order if self.types[self.names[index]] == "float32"]

    def floats(self, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The float values `names`, (N, 1, ...), NCHW."""
        session = self._session({}, names, "default")
        rows = [session.run([self.model.feed(image)]) for image in images]
        return {name: np.stack([self._value_order(name, row[i]) for row in rows]) for i, name in enumerate(names)}

    def floats_alone(self, images: np.ndarray, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every value of `given` as the file computes it when all values before it are the given ones."""
        rows = list(
            self._cut(images, {name: self._stored_order(name, v.astype(np.float32)) for name, v in given.items()})
        )
        return {name: np.stack([self._value_order(name, row[i]) for row in rows]) for i, name in enumerate(given)}

    def disturbed(self, images: np.ndarray, errors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs (N, K) by name: what the file answers when the error of that one value is added to it."""
        schema = self.schema
        model = self.unpacked()
        graph = model.subgraphs[0]
        model.operatorCodes.append(
            schema.OperatorCodeT(
                deprecatedBuiltinCode=schema.BuiltinOperator.ADD, builtinCode=schema.BuiltinOperator.ADD, version=1
            )
        )
        operators = []
        inputs = []
        for operator in graph.operators:
            operators.append(operator)
            for position, index in enumerate(operator.outputs):
                name = self.names[index]
                if name not in errors:
                    continue
                old = graph.tensors[index]
                inputs.append(name)
                exact, error = len(graph.tensors), len(graph.tensors) + 1
                for suffix in ("exact", "error"):
                    graph.tensors.append(
                        schema.TensorT(
                            name=f"{name}/{suffix}", shape=old.shape, type=old.type, buffer=0, hasRank=old.hasRank
                        )
                    )
                operator.outputs = [exact if i == position else int(o) for i, o in enumerate(operator.outputs)]
                options = schema.AddOptionsT()
                add = schema.OperatorT(
                    opcodeIndex=len(model.operatorCodes) - 1,
                    inputs=[exact, error],
                    outputs=[int(index)],
                    builtinOptionsType=schema.BuiltinOptions.AddOptions,
                    builtinOptions=options,
                )
                graph.inputs = [*graph.inputs, error]
                operators.append(add)
        graph.operators = operators
        model.signatureDefs = None
        session = LiteSession(pack(model), threads=self.threads, graph=graph)
        zeros = {name: np.zeros(tuple(self.graph.tensors[self.index[name]].shape), np.float32) for name in inputs}
        result = {}
        for name, error_values in errors.items():
            rows = []
            for index, image in enumerate(images):
                own = self._stored_order(name, error_values.astype(np.float32))[index]
                feeds = [own if other == name else zeros[other] for other in inputs]
                rows.append(session.run([self.model.feed(image), *feeds])[0][0])
            result[name] = np.stack(rows)
        return result


class LiteSession:
    """A graph with many inputs and outputs in LiteRT; arrays go in and come out in the order of the graph's."""

    def __init__(self, content: bytes, *, threads: int = 1, kernels: Kernels = "default", graph: Any = None) -> None:
        from ai_edge_litert import interpreter as litert

        options = {}
        if kernels == "reference":
            options["experimental_op_resolver_type"] = litert.OpResolverType.BUILTIN_REF
        try:
            self.interpreter = litert.Interpreter(model_content=content, num_threads=threads, **options)
            self.interpreter.allocate_tensors()
        except Exception as error:
            raise not_alone(error) from error
        self.inputs = [detail["index"] for detail in self.interpreter.get_input_details()]
        self.outputs = [detail["index"] for detail in self.interpreter.get_output_details()]
        if graph is not None:
            assert self.inputs == [int(index) for index in graph.inputs]
            assert self.outputs == [int(index) for index in graph.outputs]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        for index, array in zip(self.inputs, arrays, strict=True):
            self.interpreter.set_tensor(index, array)
        try:
            self.interpreter.invoke()
        except RuntimeError as error:
            raise not_alone(error) from error
        return [self.interpreter.get_tensor(index) for index in self.outputs]


def _grid(tensor: Any, kind: str) -> Grid | None:
    """The grid of an activation; None for a float tensor and for integers that stand for themselves."""
    scales = _scales(tensor)
    if scales is None or len(scales) != 1 or kind not in SHIFTS:
        return None
    zero_points = tensor.quantization.zeroPoint
    zero_point = int(zero_points[0]) if zero_points is not None and len(zero_points) else 0
    return Grid(np.float32(scales[0]), zero_point + SHIFTS[kind], 2**16 if kind == "int16" else 256)


def _scales(tensor: Any) -> np.ndarray | None:
    quantization = tensor.quantization
    if quantization is None or quantization.scale is None or not len(quantization.scale):
        return None
    return np.asarray(quantization.scale, np.float32)


def _outputs_first(op: str, weight: np.ndarray) -> np.ndarray:
    if op == "DEPTHWISE_CONV_2D":  # (1, height, width, outputs)
        weight = weight.transpose(3, 0, 1, 2)
    elif weight.ndim == 4:  # (outputs, height, width, inputs)
        weight = weight.transpose(0, 3, 1, 2)
    return trimmed(weight)


def _as_nchw(outputs: np.ndarray) -> np.ndarray:
    return outputs.transpose(0, 3, 1, 2) if outputs.ndim == 4 else outputs


def _unique(name: str, seen: dict[str, int]) -> str:
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name or "")
