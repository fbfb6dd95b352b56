"""Each operator of the TFLite writer on random shapes: float and int8 files compute what ONNX Runtime computes."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx_nets import (
    F32,
    Net,
    check,
    check_float,
    nhwc,
    ops_of,
    quantized,
    run_onnx,
    run_tflite,
    written_ops,
)

from compress.formats.tflite import to_tflite

some = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)

seeds = st.integers(0, 999)
sizes = st.integers(1, 5)


def shapes(least: int, most: int, size: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, size), min_size=least, max_size=most).map(tuple)


def value(net: Net, shape: tuple[int, ...], skip: int = 0) -> str:
    """A value of any shape, made of numbers of the image without computing."""
    flat = net.op("Reshape", "images", net.ints(-1))
    count = math.prod(shape)
    assert skip + count <= math.prod(net.shape)
    part = net.op("Slice", flat, net.ints(skip), net.ints(skip + count), net.ints(0))
    return net.op("Reshape", part, net.ints(*shape))


def kernels(net: Net, output: str, **how: object) -> list[str]:
    """What computes in the int8 file, without what moves numbers."""
    moves = ("RESHAPE", "TRANSPOSE", "SLICE")
    return [op for op in ops_of(net, output, **how)[1] if op not in moves]


def check_moves(net: Net, output: str) -> None:
    """Numbers arrive untouched in float, and in int8 without being dequantized."""
    model, images = net.model(output), net.images()
    [expected], [got] = run_onnx(model, images), run_tflite(to_tflite(model, {}), images)
    np.testing.assert_array_equal(got, nhwc(expected))
    twin = quantized(model, images)
    assert not {"DEQUANTIZE", "QUANTIZE"} & set(written_ops(to_tflite(twin, {})))
    [expected], [got] = run_onnx(twin, images), run_tflite(to_tflite(twin, {}), images)
    scale, zero = grid_of(twin)
    np.testing.assert_array_equal(np.round(nhwc(expected) / scale) + zero - 128, got)


def grid_of(twin: onnx.ModelProto) -> tuple[float, int]:
    node = [node for node in twin.graph.node if node.op_type == "QuantizeLinear"][-1]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in twin.graph.initializer}
    return stored[node.input[1]].item(), stored[node.input[2]].item()


# ---- layers with weights -----------------------------------------------------------------------------------


@some
@given(
    seed=seeds,
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    more=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    group=st.sampled_from([1, 1, 2, 4]),
    dilation=st.sampled_from([1, 1, 2]),
    bias=st.booleans(),
    after=st.sampled_from(["", "relu", "relu6"]),
)
def test_transposed_convolution(seed, kernel, stride, pads, more, group, dilation, bias, after):
    image = (5, 4)
    for axis in (0, 1):
        reach = (image[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation + 1
        assume(more[axis] < stride[axis] and reach - pads[axis] - pads[axis + 2] + more[axis] > 0)
    net = Net((2, 4, *image), seed)
    parameters = [net.weight(4, 8 // group, *kernel), *([net.weight(8)] if bias else [])]
    walk = {"strides": stride, "pads": pads, "output_padding": more, "group": group, "dilations": [dilation] * 2}
    x = net.op("ConvTranspose", "images", *parameters, kernel_shape=kernel, **walk)
    output = getattr(net, after)(x) if after else x
    assert kernels(net, output) == ["TRANSPOSE_CONV"]
    check(net, output)


@pytest.mark.parametrize(
    ("kernel", "pads", "more", "ops"),
    [
        (2, 0, 0, ["TRANSPOSE_CONV"]),  # a U-Net's
        (4, 1, 0, ["TRANSPOSE_CONV"]),  # a GAN's: TFLite's SAME
        (3, 1, 1, ["TRANSPOSE_CONV", "SLICE"]),
    ],
)
def test_a_transposed_convolution_is_cut_only_where_tflite_has_no_word_for_its_pads(kernel, pads, more, ops):
    net = Net((1, 3, 5, 6))
    walk = {"strides": [2, 2], "pads": [pads] * 4, "output_padding": [more] * 2}
    output = net.op("ConvTranspose", "images", net.weight(3, 4, kernel, kernel), net.weight(4), **walk)
    assert ops_of(net, output) == (ops, ops)
    check(net, output)


@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution_in_float_keeps_its_weights_in_int8(group):
    net = Net((1, 4, 5, 6))
    weights = [net.weight(4, 6 // group, 3, 3), net.weight(6)]
    inner = net.op("ConvTranspose", "images", *weights, strides=[2, 2], group=group)
    output = net.op("Sigmoid", inner)
    written = ["DEQUANTIZE", "DEQUANTIZE", "TRANSPOSE_CONV", "LOGISTIC", "QUANTIZE"]  # of image and weights
    assert sorted(ops_of(net, output, bare=(inner,))[1]) == sorted(written)
    check(net, output, bare=(inner,))


@some
@given(seed=seeds, shape=shapes(2, 4), inputs=st.integers(2, 9), outputs=st.integers(4, 7), bias=st.booleans())
def test_linear_over_any_number_of_axes(seed, shape, inputs, outputs, bias):
    net = Net((*shape, inputs), seed)
    x = value(net, (*shape, inputs))
    output = net.op("MatMul", x, net.weight(inputs, outputs))
    assert kernels(net, output) == ["FULLY_CONNECTED"]
    check(net, output)
    if bias:
        output = net.relu(net.op("Add", net.weight(outputs), output))
        assert [op for op in ops_of(net, output)[0] if op not in ("RESHAPE", "TRANSPOSE")] == ["FULLY_CONNECTED"]
        check_float(net, output)


@some
@given(
    seed=seeds,
    left=shapes(0, 2, 3),
    right=shapes(0, 2, 3),
    rows=st.integers(1, 5),
    inner=st.integers(2, 5),
    columns=st.integers(2, 5),
    flips=st.tuples(st.booleans(), st.booleans()),
    constant=st.booleans(),
)
def test_product_of_two_values(seed, left, right, rows, inner, columns, flips, constant):
    common = min(len(left), len(right))
    assume(all(a == b or 1 in (a, b) for a, b in zip(left[::-1][:common], right[::-1][:common], strict=True)))
    net = Net((1, 3, 20, 20), seed)

    def matrices(batch: tuple[int, ...], height: int, width: int, flip: bool, skip: int) -> str:
        if not flip:
            return value(net, (*batch, height, width), skip)
        rank = len(batch) + 2
        return net.op(
            "Transpose", value(net, (*batch, width, height), skip), perm=[*range(rank - 2), rank - 1, rank - 2]
        )

    x = matrices(left, rows, inner, flips[0], 0)
    y = net.weight(*right, inner, columns) if constant and right else matrices(right, inner, columns, flips[1], 500)
    output = net.op("MatMul", x, y)
    assert "BATCH_MATMUL" in ops_of(net, output)[0]
    check(net, output)


# ---- element by element ------------------------------------------------------------------------------------


@some
@given(
    seed=seeds,
    kind=st.sampled_from(["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"]),
    shape=shapes(1, 5, 4),
    ranks=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    ones=st.lists(st.booleans(), min_size=10, max_size=10),
    constant=st.booleans(),
)
def test_broadcasting_across_ranks(seed, kind, shape, ranks, ones, constant):
    net = Net((2, 5, 12, 11), seed)

    def part(rank: int, single: list[bool]) -> tuple[int, ...]:
        rank = min(rank, len(shape))
        tail = shape[len(shape) - rank :]
        return tuple(1 if one else size for one, size in zip(single, tail, strict=False))

    first, second = part(ranks[0], ones[:5]), part(ranks[1], ones[5:])
    x = value(net, first)
    y = net.constant(net.random.uniform(1, 2, second).astype(F32)) if constant else value(net, second, 600)
    if kind in ("Div", "Pow") and not constant:
        y = net.op("Add", net.op("Abs", y), net.floats(1))
    if kind == "Pow":
        x = net.op("Add", net.op("Abs", x), net.floats(0.5))
    check(net, net.op(kind, *([y, x] if seed % 2 and kind in ("Add", "Sub", "Mul", "Max") else [x, y])))


ACTIVATIONS = {
    "Abs": {},
    "Celu": {"alpha": 0.7},
    "Elu": {"alpha": 0.6},
    "Exp": {},
    "Floor": {},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4},
    "HardSwish": {},
    "LeakyRelu": {"alpha": 0.1},
    "LogSoftmax": {"axis": 1},
    "Mish": {},
    "Neg": {},
    "Relu": {},
    "Selu": {},
    "Sigmoid": {},
    "Sin": {},
    "Softmax": {"axis": 0},
    "Softplus": {},
    "Tanh": {},
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@settings(some, max_examples=4)
@given(seed=seeds, shape=shapes(2, 5, 6))
def test_functions_of_one_value(kind, seed, shape):
    assume(math.prod(shape) >= 8)
    net = Net(shape, seed)
    output = net.op(kind, value(net, shape), **ACTIVATIONS[kind])
    check_float(net, output)
    if kind not in ("Floor", "LogSoftmax", "Softmax"):  # steps, and those whose grid onnxruntime mishandles
        check(net, output)


@pytest.mark.parametrize("kind", ["Log", "Sqrt", "Reciprocal"])
@settings(some, max_examples=4)
@given(seed=seeds, shape=shapes(2, 5, 6))
def test_functions_of_positive_values(kind, seed, shape):
    net = Net(shape, seed)
    check(net, net.op(kind, net.op("Add", net.op("Abs", "images"), net.floats(0.3))))


def test_int8_kernels_that_are_exact_are_used():
    net = Net((1, 4, 6, 6))
    output = net.op("Elu", "images")
    assert ops_of(net, output)[1] == ["ELU"]
    check(net, output)
    output = net.op("Tanh", "images")
    grid = {output: (1 / 128, 128)}
    assert ops_of(net, output, grids=grid)[1] == ["TANH"]
    check(net, output, grids=grid)
    output = net.op("Mul", "images", net.op("Sigmoid", net.op("GlobalAveragePool", "images")))
    assert ops_of(net, output, grids={net.nodes[-2].output[0]: (1 / 256, 0)})[1] == ["MEAN", "LOGISTIC", "MUL"]


@some
@given(seed=seeds, low=st.none() | st.floats(-2, 0.5), span=st.none() | st.floats(0.5, 3), usual=st.integers(0, 3))
def test_clip_of_any_bounds(seed, low, span, usual):
    net = Net((1, 3, 4, 5), seed)
    bounds = [low, None if span is None else (low or 0) + span]
    if usual:
        bounds = [[0, 1], [-1, 1], [0, 6]][usual - 1]
    names = ["" if bound is None else net.constant(np.asarray(bound, F32)) for bound in bounds]
    x = net.op("Mul", "images", net.floats(2.5))
    output = net.op("Clip", net.op("Transpose", x, perm=[0, 2, 1, 3]), *names)
    check(net, output)


@some
@given(seed=seeds, shape=shapes(2, 4), axis=st.integers(0, 3), scalar=st.booleans())
def test_prelu(seed, shape, axis, scalar):
    net = Net(shape, seed)
    slopes = [1] * len(shape)
    if not scalar:
        slopes[axis % len(shape)] = shape[axis % len(shape)]
    output = net.op("PRelu", "images", net.constant(net.random.uniform(-0.5, 0.9, slopes).astype(F32)))
    check(net, output)


@some
@given(seed=seeds, shape=shapes(2, 5), axis=st.integers(-5, 4), log=st.booleans())
def test_softmax_along_any_axis(seed, shape, axis, log):
    assume(-len(shape) <= axis < len(shape))
    net = Net(shape, seed)
    output = net.op("LogSoftmax" if log else "Softmax", value(net, shape), axis=axis)
    check_float(net, output)


@pytest.mark.parametrize("exponent", [2.0, 0.5, -0.5, 3.0, 1.7])
def test_powers(exponent):
    net = Net((1, 3, 4, 5))
    base = net.op("Add", net.op("Abs", "images"), net.floats(0.5))
    output = net.op("Pow", base, net.constant(np.asarray(exponent, F32)))
    usual = {2.0: "SQUARE", 0.5: "SQRT", -0.5: "RSQRT"}
    assert ops_of(net, output)[0] == ["ABS", "ADD", usual.get(exponent, "POW")]
    check(net, output)


def test_the_larger_of_values_on_one_grid_is_selected_in_int8():
    net = Net((1, 4, 5, 5))
    output = net.op("Max", "images", net.op("Transpose", "images", perm=[0, 1, 3, 2]))
    one = dict.fromkeys(["images", net.nodes[0].output[0], output], (0.03, 120))
    assert kernels(net, output, grids=one) == ["MAXIMUM"]
    check(net, output, grids=one)


# ---- normalizations ----------------------------------------------------------------------------------------


@some
@given(seed=seeds, shape=shapes(2, 5, 6), axis=st.integers(1, 4), bias=st.booleans())
def test_layer_norm(seed, shape, axis, bias):
    assume(axis < len(shape) and math.prod(shape[axis:]) > 1)
    net = Net(shape, seed)
    parameters = [net.weight(*shape[axis:]) for _ in range(1 + bias)]
    check_norm(net, net.op("LayerNormalization", value(net, shape), *parameters, axis=axis - len(shape), epsilon=1e-3))


@some
@given(seed=seeds, image=shapes(1, 3, 5), channels=st.integers(1, 5))
def test_instance_norm(seed, image, channels):
    assume(math.prod(image) > 1)
    net = Net((2, channels, *image), seed)
    check_norm(net, net.op("InstanceNormalization", "images", net.weight(channels), net.weight(channels), epsilon=1e-3))


@some
@given(seed=seeds, groups=st.integers(1, 3), each=st.integers(1, 3), side=st.integers(2, 5), affine=st.booleans())
def test_group_norm_as_torch_writes_it(seed, groups, each, side, affine):
    net = Net((2, groups * each, side, side + 1), seed)
    grouped = net.op("Reshape", "images", net.ints(0, groups, -1))
    ones, zeros = net.floats(*[1] * groups), net.floats(*[0] * groups)
    normal = net.op("InstanceNormalization", grouped, ones, zeros, epsilon=1e-3)
    output = net.op("Reshape", normal, net.ints(*net.shape))
    if affine:
        weight, bias = (net.constant(net.random.normal(size=(groups * each, 1, 1)).astype(F32)) for _ in range(2))
        output = net.op("Add", net.op("Mul", output, weight), bias)
    assert "TRANSPOSE" not in written_ops(to_tflite(net.model(output), {}))
    check_norm(net, output)


def check_norm(net: Net, output: str) -> None:
    """Float32 statistics of a handful of values in one runtime's sequence or another's."""
    model, images = net.model(output), net.images()
    [expected], [got] = run_onnx(model, images), run_tflite(to_tflite(model, {}), images)
    np.testing.assert_allclose(got, nhwc(expected), rtol=1e-4, atol=2e-5)


def test_a_batch_norm_that_was_not_folded():
    net = Net((2, 5, 4, 3))
    statistics = [net.weight(5), net.weight(5), net.weight(5), net.constant(net.random.uniform(0.5, 2, 5).astype(F32))]
    output = net.relu(net.op("BatchNormalization", net.op("Sigmoid", "images"), *statistics))
    assert ops_of(net, output)[0] == ["LOGISTIC", "MUL", "ADD"]
    check(net, output)


# ---- reductions and pooling --------------------------------------------------------------------------------


@some
@given(
    seed=seeds,
    kind=st.sampled_from(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"]),
    shape=shapes(2, 5, 5),
    axes=st.sets(st.integers(0, 4), min_size=1, max_size=3),
    keepdims=st.booleans(),
)
def test_reductions_over_any_axes(seed, kind, shape, axes, keepdims):
    axes = [axis - len(shape) for axis in axes if axis < len(shape)]
    assume(axes)
    net = Net(shape, seed)
    output = net.op(kind, "images", net.ints(*axes), keepdims=int(keepdims))
    if kind != "ReduceL2":
        assert not {"DEQUANTIZE", "QUANTIZE"} & set(ops_of(net, output)[1])
    check(net, output)


@some
@given(
    seed=seeds, size=st.integers(5, 9), kernel=st.integers(2, 3), stride=st.integers(1, 3), ceil_mode=st.integers(0, 1)
)
def test_average_pool_that_leaves_its_pads_uncounted(seed, size, kernel, stride, ceil_mode):
    last_windows = [math.ceil((n + 2 - kernel) / stride) * stride for n in (size, size + 1)]
    assume(not ceil_mode or (last_windows[0] < size + 1 and last_windows[1] < size + 2))
    net = Net((1, 4, size, size + 1), seed)
    walk = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [1] * 4, "ceil_mode": ceil_mode}
    check(net, net.op("AveragePool", "images", **walk))


def test_global_max_pool_stays_in_int8():
    net = Net((2, 4, 5, 6))
    check_moves(net, net.op("Flatten", net.op("GlobalMaxPool", "images")))


# ---- resizing ----------------------------------------------------------------------------------------------


@some
@given(
    seed=seeds,
    result=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    kind=st.sampled_from(["asymmetric floor", "half_pixel round_prefer_floor", "align_corners round_prefer_ceil"]),
    factor=st.none() | st.integers(2, 3),
)
def test_nearest_neighbours_are_the_same_pixels(seed, result, kind, factor):
    net = Net((2, 3, 4, 6), seed)
    coordinates, rounding = kind.split()
    size = ["", net.ints(2, 3, *result)] if factor is None else [net.floats(1, 1, factor, factor)]
    how = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding, "mode": "nearest"}
    output = net.op("Resize", "images", "", *size, **how)
    if kind == "asymmetric floor":
        assert ops_of(net, output)[1] == ["RESIZE_NEAREST_NEIGHBOR"]
    check_moves(net, output)


@some
@given(
    seed=seeds,
    result=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    coordinates=st.sampled_from(["asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners"]),
)
def test_bilinear_resizing(seed, result, coordinates):
    assume(coordinates != "pytorch_half_pixel" or min(result) > 1)
    net = Net((2, 3, 4, 6), seed)
    size = net.ints(2, 3, *result)
    output = net.op("Resize", "images", "", "", size, mode="linear", coordinate_transformation_mode=coordinates)
    assert ops_of(net, output)[0] == ["RESIZE_BILINEAR"]
    check(net, output)


# ---- moving numbers ----------------------------------------------------------------------------------------


@some
@given(seed=seeds, shape=shapes(1, 5, 6), data=st.data())
def test_slices_and_gathered_indices(seed, shape, data):
    net = Net((1, 2, 8, 9), seed)
    shape = tuple(min(size, 3) for size in shape) if math.prod(shape) > 144 else shape
    assume(math.prod(shape) <= 144)
    x = value(net, shape)
    rank = len(shape)
    axis = data.draw(st.integers(0, rank - 1))
    size = shape[axis]
    start, stop = sorted(data.draw(st.tuples(st.integers(0, size - 1), st.integers(1, size))))
    assume(start < stop)
    step = data.draw(st.sampled_from([1, 1, 2, -1]))
    limits = (stop - 1, start - 1 - size if start == 0 else start - 1, -1) if step < 0 else (start, stop, step)
    if step < 0 and start == 0:
        limits = (stop - 1, -size - 1, -1)
    part = net.op("Slice", x, *[net.ints(number) for number in limits[:2]], net.ints(axis), net.ints(limits[2]))
    check_moves(net, part)
    indices = data.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=4))
    check_moves(net, net.op("Gather", x, net.ints(*indices), axis=axis))
    if rank > 1:
        check_moves(net, net.op("Gather", x, net.constant(np.asarray(indices[0], np.int64)), axis=axis))


@some
@given(seed=seeds, shape=shapes(1, 4, 4), data=st.data())
def test_split_and_concat(seed, shape, data):
    net = Net((1, 2, 12, 12), seed)
    axis = data.draw(st.integers(0, len(shape) - 1))
    lengths = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    whole = tuple(sum(lengths) if at == axis else size for at, size in enumerate(shape))
    assume(math.prod(whole) <= 288)
    parts = net.split("Split", value(net, whole), net.ints(*lengths), outputs=len(lengths), axis=axis)
    check_moves(net, parts[-1])
    output = net.op("Concat", *parts[::-1], net.constant(np.full(shape, 0.5, F32)), axis=axis - len(shape))
    check(net, output)


@some
@given(
    seed=seeds,
    shape=shapes(1, 5, 4),
    pads=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=5, max_size=5),
    mode=st.sampled_from(["zeros", "constant", "reflect", "crop"]),
)
def test_pads(seed, shape, pads, mode):
    if mode == "reflect":
        assume(len(shape) > 1)
    net = Net(shape, seed)
    pads = pads[: len(shape)]
    if mode == "reflect":
        pads = [(min(a, n - 1), min(b, n - 1)) for (a, b), n in zip(pads, shape, strict=True)]
    if mode == "crop":
        pads = [(-a if a + b < n else 0, -b if a + b < n else 0) for (a, b), n in zip(pads, shape, strict=True)]
    flat = net.ints(*[a for a, _ in pads], *[b for _, b in pads])
    if mode == "constant":
        output = net.op("Pad", value(net, shape), flat, net.floats(1.25))
        check_float(net, output)
        return
    check_moves(net, net.op("Pad", "images", flat, mode="reflect" if mode == "reflect" else "constant"))


@pytest.mark.parametrize(("fill", "kernels_"), [(0.5, ["PADV2"]), (0.51, ["DEQUANTIZE", "PADV2", "QUANTIZE"])])
def test_a_pad_stays_in_int8_if_its_number_lies_on_the_grid(fill, kernels_):
    net = Net((1, 2, 4, 5))
    output = net.op("Pad", "images", net.ints(0, 0, 1, 1, 0, 0, 1, 1), net.constant(np.asarray(fill, F32)))
    grids = dict.fromkeys(["images", output], (0.05, 100))
    assert kernels(net, output, grids=grids) == kernels_
    check(net, output, grids=grids)


@some
@given(seed=seeds, block=st.integers(2, 3), channels=st.integers(1, 3), mode=st.sampled_from(["CRD", "DCR", "back"]))
def test_depth_and_space(seed, block, channels, mode):
    if mode == "back":
        net = Net((2, channels, 2 * block, 3 * block), seed)
        check_moves(net, net.op("SpaceToDepth", "images", blocksize=block))
    else:
        net = Net((2, channels * block**2, 3, 2), seed)
        check_moves(net, net.op("DepthToSpace", "images", blocksize=block, mode=mode))


@some
@given(seed=seeds, shape=shapes(1, 4, 3), front=shapes(0, 1, 3), data=st.data())
def test_broadcast_values_and_tiles(seed, shape, front, data):
    net = Net((1, 2, 8, 8), seed)
    single = tuple(1 if data.draw(st.booleans()) else size for size in shape)
    check_moves(net, net.op("Expand", value(net, single), net.ints(*front, *shape)))
    check_moves(net, net.op("Tile", value(net, shape), net.ints(*[data.draw(st.integers(1, 2)) for _ in shape])))


@some
@given(seed=seeds, data=st.data())
def test_any_sequence_of_reshapes_and_transpositions(seed, data):
    net = Net((2, 4, 3, 6), seed)
    x, shape = "images", net.shape
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            perm = data.draw(st.permutations(range(len(shape))))
            x, shape = net.op("Transpose", x, perm=perm), tuple(shape[axis] for axis in perm)
        else:
            shape = data.draw(st.sampled_from(sorted(factorizations(shape))))
            x = net.op("Reshape", x, net.ints(*shape))
        if data.draw(st.booleans()):
            x = net.op("MaxPool", x, kernel_shape=[1, 1]) if len(shape) == 4 else x
    check_moves(net, net.op("Reshape", x, net.ints(*shape)))


def factorizations(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Shapes that merge or split axes of `shape`, with up to 6 axes."""
    found = {shape}
    for axis, size in enumerate(shape):
        if axis + 1 < len(shape):
            found.add((*shape[:axis], size * shape[axis + 1], *shape[axis + 2 :]))
        for part in (1, 2, 3):
            if size % part == 0 and len(shape) < 6:
                found.add((*shape[:axis], part, size // part, *shape[axis + 1 :]))
    return found


# ---- no needless transposition -----------------------------------------------------------------------------


def tokens(net: Net, x: str) -> str:
    """(N, C, H, W) to (N, H W, C), as a ViT does."""
    channels = net.shape[1]
    return net.op("Transpose", net.op("Reshape", x, net.ints(1, channels, -1)), perm=[0, 2, 1])


def shuffled(net: Net, x: str) -> str:
    batch, channels, height, width = net.shape
    grouped = net.op("Reshape", x, net.ints(batch, 2, channels // 2, height, width))
    return net.op("Reshape", net.op("Transpose", grouped, perm=[0, 2, 1, 3, 4]), net.ints(*net.shape))


@pytest.mark.parametrize(
    ("build", "ops"),
    [
        (tokens, ["RESHAPE"]),
        (lambda net, x: net.op("LayerNormalization", tokens(net, x), net.weight(4)), ["RESHAPE"]),
        (lambda net, x: net.op("Transpose", net.op("Transpose", x, perm=[0, 3, 1, 2]), perm=[0, 2, 3, 1]), []),
        (lambda net, x: net.op("MatMul", net.op("Transpose", x, perm=[0, 2, 3, 1]), net.weight(4, 3)), ["TRANSPOSE"]),
        (lambda net, x: net.op("ReduceMean", x, net.ints(2, 3), keepdims=0), []),
        (lambda net, x: net.op("Flatten", net.op("GlobalAveragePool", x)), ["RESHAPE"]),
        (lambda net, x: net.conv(net.op("Softmax", x, axis=1), 4, 4), []),
        (shuffled, ["RESHAPE", "TRANSPOSE", "RESHAPE"]),
    ],
)
def test_a_transpose_is_written_only_where_numbers_have_to_move(build, ops):
    net = Net((1, 4, 6, 5))
    output = build(net, net.conv("images", 4, 4))
    moves = [op for op in ops_of(net, output)[0] if op in ("RESHAPE", "TRANSPOSE")]
    assert moves == ops  # the linear layer of rank 4 is an output, which lies as NHWC: that is its one TRANSPOSE
    check_float(net, output)


def test_a_transposition_and_its_inverse_around_a_layer_norm_cost_nothing():
    net = Net((1, 4, 6, 5))
    x = net.conv("images", 4, 4)
    y = net.op("LayerNormalization", net.op("Transpose", x, perm=[0, 2, 3, 1]), net.weight(4), net.weight(4))
    y = net.op("MatMul", y, net.weight(4, 4))
    output = net.op("Add", x, net.op("Transpose", y, perm=[0, 3, 1, 2]))
    assert not {"TRANSPOSE", "RESHAPE"} & set(ops_of(net, output)[0])
    check_float(net, output)
