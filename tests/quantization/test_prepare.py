"""Which values of a network lie on grids, and that the graph still computes the network."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from pydantic import ValidationError
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.quantization import (
    ActivationQuantizer,
    Frozen,
    Quantization,
    calibrate,
    fold_batchnorm,
    freeze,
    prepare,
    run_integers,
)
from compress.quantization.graph import trace
from compress.targets import open_model

CPU = torch.device("cpu")


class Branches(nn.Module):
    """Every way in which a value gets a grid, or does without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.swish, self.norm = nn.Hardswish(inplace=True), nn.BatchNorm2d(16)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)
        self.mix, self.rows = nn.Conv2d(16, 8, 1), nn.Linear(8, 12)
        self.up, self.head = nn.ConvTranspose2d(12, 6, 2, stride=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = self.swish(x)
        x = torch.cat([x, F.leaky_relu(x, 0.1)], 1)
        x = torch.relu(self.norm(x)) * self.scale
        x = F.avg_pool2d(self.mix(x), 2)
        x = F.gelu(self.rows(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        left, right = self.up(x).chunk(2, dim=3)
        return self.head((left - right).mean((2, 3)))


@pytest.fixture(autouse=True)
def _same_biases():
    torch.manual_seed(0)


def prepared(module: nn.Module, stripes: Stripes, **settings: object) -> fx.GraphModule:
    graph = prepare(module, Quantization.model_validate_json(json.dumps(settings)), PREPROCESS)
    calibrate(graph, stripes.batches("train", batch_size=16), CPU)
    return graph.eval()


def quantized(frozen: Frozen) -> set[str]:
    return {grid.layer for grid in frozen.grids()}


def through_grids_as_they_are(graph: fx.GraphModule, images: Tensor) -> Tensor:
    """The graph in float: nothing is rounded, weights but for 8 bits aside."""
    for quantizer in graph.modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.calibrating = True
    return graph(images)


def test_a_prepared_graph_computes_the_network(stripes):
    """In float64-like grids: 8-bit weights are the only difference while grids let values pass."""
    module = randomized(Branches())
    graph = prepare(module, Quantization(), PREPROCESS).eval()
    images = stripes.splits["evaluation"][0]
    error = (through_grids_as_they_are(graph, images) - module(images)).abs().max() / module(images).abs().max()
    assert error < 0.02


def test_values_that_integer_kernels_read_or_write_lie_on_grids_and_others_do_not(stripes):
    frozen = freeze(prepared(randomized(Branches()), stripes))
    names = quantized(frozen)
    assert set(frozen.integers) == {"stem", "gate", "norm", "mix", "rows", "up", "head"}
    assert {"input", "stem", "gate", "sigmoid", "mul", "norm", "mix", "rows", "up", "head", "avg_pool2d"} <= names
    assert "cat" in names, "a convolution reads it"
    assert "gelu" in names, "by way of a permutation, a convolution reads it"
    assert "swish" not in names, "no integer kernel reads it"
    assert "leaky_relu" not in names, "no integer kernel reads it"
    assert "mul_1" in names, "a product with a parameter is a float island, and a convolution reads it"
    assert next(grid for grid in frozen.grids() if grid.layer == "sigmoid").scale == 1 / 256


def test_fake_quant_frozen_float_and_integers_agree(stripes):
    graph = prepared(randomized(Branches()), stripes)
    images = stripes.splits["evaluation"][0]
    frozen = freeze(graph)
    assert frozen.output is not None
    integers = run_integers(frozen, images).logits_NK
    assert (frozen.steps(integers) - frozen.steps(graph(images))).abs().max() <= 2
    assert (frozen.steps(integers) - frozen.steps(frozen.module(images))).abs().max() <= 1


def test_a_batchnorm_of_its_own_becomes_a_depthwise_convolution(stripes):
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x)
            return self.head(torch.relu(x + self.norm(x)).mean((2, 3)))

    module = randomized(PreActivation())
    graph = prepared(module, stripes)
    norm = module.norm
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(graph.norm.weight.flatten(), factor)
    torch.testing.assert_close(graph.norm.bias, norm.bias - norm.running_mean * factor)
    assert freeze(graph).integers["norm"].weight.shape == (8, 1, 1, 1)


@pytest.mark.parametrize("pattern", ["point", "po*", "re:poi", "re:^point$"])
def test_layers_kept_float_stay_as_they_are(stripes, pattern):
    module = randomized(SmallNet())
    frozen = freeze(prepared(module, stripes, keep_float=[pattern]))
    assert set(frozen.integers) == {"stem", "depthwise", "down", "head"}
    torch.testing.assert_close(frozen.module.point.weight, module.point.weight, rtol=0, atol=0)
    images = stripes.splits["evaluation"][0]
    assert (frozen.steps(run_integers(frozen, images).logits_NK) - frozen.steps(frozen.module(images))).abs().max() <= 1


def test_logits_of_a_head_kept_float_are_float(stripes):
    frozen = freeze(prepared(randomized(SmallNet()), stripes, keep_float=["head"]))
    assert frozen.output is None
    images = stripes.splits["evaluation"][0]
    difference = run_integers(frozen, images).logits_NK - frozen.module(images)
    assert difference.abs().max() <= 0.02 * frozen.module(images).abs().max(), "a step of a layer before, at most"
    assert difference.abs().median() < 1e-5


def test_an_image_that_no_integer_layer_reads_has_no_grid(stripes):
    frozen = freeze(prepared(randomized(SmallNet()), stripes, keep_float=["stem"]))
    assert "input" not in quantized(frozen)
    assert "stem" in quantized(frozen)


def test_a_container_is_kept_float_by_its_name(stripes):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.body2, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.body2(self.body(x)).mean((2, 3)))

    assert set(freeze(prepared(randomized(Nested()), stripes, keep_float=["body"])).integers) == {"body2", "head"}


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_exist():
    with pytest.raises(ModelError, match=r"`keep_float: re:depthwide` matches no layer; some are \['depthwise'"):
        prepare(SmallNet(), Quantization(keep_float=("re:depthwide",)), PREPROCESS)
    with pytest.raises(ValidationError, match="no regular expression"):
        Quantization(keep_float=("re:(",))


def test_rewritten_activations_leave_no_float_island(stripes):
    class Swishes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.swish = nn.Conv2d(3, 8, 3), nn.Hardswish()
            self.squeeze, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            x = self.swish(self.conv(x))
            x = x * F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
            return self.head(x.mean((2, 3)))

    module = randomized(Swishes())
    graph = prepared(module, stripes, rewrite_activations=True)
    assert not any(isinstance(layer, nn.Hardswish) for layer in graph.modules())
    frozen = freeze(graph)
    assert quantized(frozen) == {
        *("input", "conv", "adaptive_avg_pool2d", "squeeze", "hardsigmoid", "mul", "mean", "head")
    }

    class Rewritten(Swishes):
        def forward(self, x):
            x = F.relu6(self.conv(x))
            x = x * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
            return self.head(x.mean((2, 3)))

    same = Rewritten()
    same.load_state_dict(module.state_dict())
    images = stripes.splits["evaluation"][0]
    error = (graph(images) - same.eval()(images)).abs().max() / same(images).abs().max()
    assert error < 0.05
    assert (module(images) - same(images)).abs().max() / same(images).abs().max() > 0.1, "another function than before"


def test_attention_of_torch_is_expanded_without_a_change():
    for batch_first in (True, False):
        attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()

        class Attends(nn.Module):
            def __init__(self, attention):
                super().__init__()
                self.attention = attention

            def forward(self, x):
                return self.attention(x, x, x, need_weights=False)[0]

        module = Attends(attention)
        tokens = torch.randn(3, 7, 16)
        graph = trace(module)
        torch.testing.assert_close(graph(tokens), module(tokens))
        assert sum(isinstance(layer, nn.Linear) for layer in graph.modules()) == 4


def test_masked_attention_is_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, attn_mask=torch.zeros(7, 7))[0]

    with pytest.raises(ModelError, match="attention with a mask"):
        trace(Masked())


def test_convolutions_with_paddings_of_their_own_are_layers(stripes):
    class Same(nn.Conv2d):
        """TensorFlow's padding, from the sizes at hand."""

        def forward(self, x):
            height, width = x.size()[-2:]
            x = F.pad(x, (0, 1 - width % 2, 0, 1 - height % 2))
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = Same(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    module = randomized(Net())
    graph = prepared(module, stripes)
    assert set(freeze(graph).integers) == {"conv", "head"}
    images = stripes.splits["evaluation"][0]
    assert (graph(images) - module(images)).abs().max() / module(images).abs().max() < 0.05


class Overwrites(nn.Module):
    """Tensors that are overwritten under a second name and read again under the first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.relu, self.same = how, nn.ReLU(inplace=True), nn.Identity()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x
        if self.how == "sum":
            x += 1.0
        elif self.how == "identity":
            x = self.relu(self.same(x))
        else:
            x = F.relu(x.view(x.size(0), -1), inplace=True).view(-1, 8, 16, 16)
        return self.head((x + y).mean((2, 3)))


@pytest.mark.parametrize("how", ["sum", "identity", "view"])
def test_what_is_overwritten_and_read_again_is_refused(how):
    with pytest.raises(ModelError, match="computes something else as a traced graph"):
        prepare(randomized(Overwrites(how)), Quantization(), PREPROCESS)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers_of_torch_are_taken_apart(norm_first, activation, stripes):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 5)
            layer = nn.TransformerEncoderLayer(
                16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation
            )
            self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)

        def forward(self, x):
            return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    module = randomized(Tokens())
    images = stripes.splits["evaluation"][0]
    torch.testing.assert_close(trace(module)(images), module(images), rtol=1e-4, atol=1e-5)
    frozen = freeze(prepared(module, stripes))
    assert len(frozen.integers) == 1 + 2 * (4 + 2) + 1, "all linear layers"


def test_a_decoder_is_refused_by_name():
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.TransformerDecoderLayer(48, 2, 32, batch_first=True)
            self.head = nn.Linear(48, 5)

        def forward(self, x):
            x = x.flatten(2)[:, :, :48]
            return self.head(self.decoder(x, x).mean(1))

    with pytest.raises(ModelError, match="layer decoder: operator TransformerDecoderLayer has no int8 counterpart"):
        prepare(Decodes(), Quantization(), PREPROCESS)


def test_batchnorm_over_tokens_is_not_folded_into_the_layer_before(stripes):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm, self.head = nn.Linear(256, 12), nn.BatchNorm1d(3), nn.Linear(12, 5)

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.mix(x.flatten(2)))).mean(1))

    module = randomized(Tokens())
    images = stripes.splits["evaluation"][0]
    torch.testing.assert_close(fold_batchnorm(module)(images), module(images))


def test_parts_that_nobody_reads_are_left_out(stripes):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

        def forward(self, x):
            left, right = self.conv(x).relu().chunk(2, 1)
            self.unused(right)
            return self.head(left.mean((2, 3)))

    frozen = freeze(prepared(randomized(Half()), stripes))
    assert set(frozen.integers) == {"conv", "head"}
    assert int8_onnx(frozen, 16, {}).graph.output[0].name == "logits"


def test_layers_may_be_called_as_the_files_ends_are(stripes, tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.logits = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 5)

        def forward(self, x):
            return self.logits(self.image(x).relu().mean((2, 3)))

    module = randomized(Named())
    images = stripes.splits["evaluation"][0][:4]
    frozen = freeze(prepared(module, stripes))
    for model, expected in (
        (int8_onnx(frozen, 16, {}), run_integers(frozen, images).logits_NK),
        (float_onnx(fold_batchnorm(module), 16, {}), module(images)),
    ):
        (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
        (tmp_path / "a.tflite").write_bytes(to_tflite(model, {}))
        for name in ("a.onnx", "a.tflite"):
            found = open_model(tmp_path / name).predict(images.numpy())
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_two_results_are_no_network():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ModelError, match="Two: returns tuple; a network returns one tensor"):
        prepare(Two(), Quantization(), PREPROCESS)


@pytest.mark.parametrize(("pattern", "words"), [("relu", "matches no operator that"), ("*", "leaves no layer")])
def test_patterns_that_keep_nothing_or_everything_float_are_refused(pattern, words):
    with pytest.raises(ModelError, match=words):
        prepare(SmallNet(), Quantization(keep_float=(pattern,)), PREPROCESS)


def test_gradients_pass_through_grids_in_place_of_rectifiers(stripes):
    module = randomized(SmallNet())
    graph = prepare(module, Quantization(), PREPROCESS)
    assert not any(isinstance(layer, nn.ReLU6) for layer in graph.modules()), "grids clip instead"
    calibrate(graph, stripes.batches("train", batch_size=16), CPU)
    images, labels = stripes.splits["train"]
    F.cross_entropy(graph.train()(images[:8]), labels[:8]).backward()
    assert all(p.grad is not None for p in graph.parameters() if p.requires_grad)


def test_fewer_bits_are_never_frozen(stripes):
    graph = prepared(randomized(SmallNet()), stripes, weight_bits=4)
    with pytest.raises(ModelError, match="simulated only"):
        freeze(graph)
    steps = graph.down.fake_weight() / graph.down.weight_scale.view(-1, 1, 1, 1)
    assert steps.abs().max() <= 7.001


def test_values_of_the_float_file_have_the_names_of_the_int8_file(stripes):
    module = randomized(Branches())
    frozen = freeze(prepared(module, stripes))
    model = float_onnx(fold_batchnorm(module), 16, {})
    values = {name for node in model.graph.node for name in node.output}
    missing = quantized(frozen) - values
    only_int8 = {"flatten", "reshape", "getitem", "getitem_1"}
    assert missing <= {"input", "head"} | only_int8, "the image, the logits, and what only the int8 graph does"
    assert {"norm", "norm/linear", "swish", "gelu"} <= values
