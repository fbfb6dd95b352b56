"""The student's tail behind a layer, as often as wanted: branches that share the student's first layers."""

from __future__ import annotations

import copy
import math
from difflib import get_close_matches

import torch
from torch import Tensor, fx, nn

from compress.errors import ModelError
from compress.observation import stage_ends
from compress.product import Preprocess, Structure
from compress.quantization.graph import RESULT_OF, trace


def split(module: nn.Module, after: str, preprocess: Preprocess) -> tuple[str, fx.GraphModule]:
    """The layer behind which branches begin, and what is behind it: see `tail_after`.

    `auto` is the end of the last stage but one, or the last before it where the network can be cut.
    Raises ModelError where it cannot.
    """
    if after != "auto":
        return after, tail_after(module, after)
    ends = stage_ends(module, preprocess.size, preprocess.channels)
    if len(ends) < 2:
        raise ModelError(
            f"layer {ends[-1]}", "`after: auto` needs two stages, and the image never gets smaller", "name a layer"
        )
    refused: ModelError | None = None
    for end in reversed(ends[:-1]):
        try:
            return end, tail_after(module, end)
        except ModelError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def tail_after(module: nn.Module, after: str) -> fx.GraphModule:
    """What `module` computes from the result of its layer `after`, as a network of its own with copied weights.

    In eval mode; its layers keep their names. It never writes to what it is given. Functional dropout and stochastic
    depth are traced as at inference, where they do nothing; dropout layers stay.
    Raises ModelError where something else than that one result reaches the output, or where nothing is left to train.
    """
    graph_module = trace(module)
    place = f"layer {after}"
    cuts = [node for node in graph_module.graph.nodes if after in node.meta.get(RESULT_OF, ())]
    if len(cuts) != 1:
        names = [name for node in graph_module.graph.nodes for name in node.meta.get(RESULT_OF, ())]
        near = ", ".join(get_close_matches(after, names, 4, 0.3) or names[-4:])
        problem = "runs more than once" if cuts else "is no layer that the network's graph runs"
        raise ModelError(place, f"`after` {problem}", f"some are {near}")
    cut = cuts[0]

    # Values by where they come from: computed from the cut, from the image without it, or from constants alone.
    behind, before = {cut}, set[fx.Node]()
    for node in graph_module.graph.nodes:
        if node is cut:
            continue
        if behind.intersection(node.all_input_nodes):
            behind.add(node)
        elif node.op == "placeholder" or before.intersection(node.all_input_nodes):
            before.add(node)
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    astray = sorted({source.name for node in behind - {cut} for source in node.all_input_nodes if source in before})
    if output not in behind or astray:
        others = f" ({', '.join(astray)})" if astray else ""
        raise ModelError(
            place,
            f"the network cannot be cut here: other values pass by this layer{others}",
            "name the end of a whole block, such as the end of a stage",
        )

    needed = set(behind)
    for node in reversed(graph_module.graph.nodes):
        if node in needed and node is not cut:
            needed.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {cut: graph.call_method("clone", (graph.placeholder("map"),))}
    for node in graph_module.graph.nodes:
        if node is not cut and node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    tail = fx.GraphModule(graph_module, graph, f"{type(module).__name__}Tail")
    if not any(True for _ in tail.parameters()):
        raise ModelError(place, "no layer with parameters is behind it", "name an earlier layer")
    return tail


def with_features(tail: fx.GraphModule) -> fx.GraphModule:
    """A tail that returns (what its last layer reads, logits); the weights are shared with `tail`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(tail.graph, copies)
    output = next(node for node in tail.graph.nodes if node.op == "output")
    node = output.args[0]
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if node.op == "call_module" and isinstance(tail.get_submodule(str(node.target)), (nn.Linear, nn.Conv2d)):
            graph.output((copies[node.args[0]], result))  # type: ignore[index]
            return fx.GraphModule(tail, graph, f"{type(tail).__name__}Features")
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    raise ModelError("branches", "no linear layer or convolution leads to the logits", "name an earlier layer")


def copies_of(tail: nn.Module, count: int, *, noise: float, generator: torch.Generator) -> nn.ModuleList:
    """`count` copies whose weights differ by normal noise of `noise` times each weight tensor's standard deviation.

    Equal copies would get equal gradients but for the gate and stay equal. Parameters with one dimension (biases,
    BatchNorm) stay as they are.
    """
    branches = nn.ModuleList(copy.deepcopy(tail) for _ in range(count))
    with torch.no_grad():
        for parameter in branches.parameters():
            if parameter.ndim > 1:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(drawn * (noise * parameter.std(correction=0)))
    return branches.train()


def pooled(features: Tensor) -> Tensor:
    """(N, C): maps (N, C, H, W) averaged over the image, (N, tokens, C) over tokens, (N, C) as they are."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features.flatten(1)


def refuse_quantized(structure: Structure, scheme: str) -> None:
    """Raises ModelError for a fake-quantized student."""
    if structure.quantize is not None:
        raise ModelError(
            f"scheme {scheme}",
            "the network is already quantized, and branches would be float",
            f"put `distill` with `scheme: {{use: {scheme}}}` before `quantize`",
        )


def ramp(progress: float, length: float) -> float:
    """exp(-5 (1 - t)^2) with t = progress / length: from 0.007 to 1 after the part `length` of the training.

    How the reference implementations of ONE and OKDDip bring in what branches teach each other (Laine & Aila, 2017,
    arXiv:1610.02242); `length` 0 gives 1.
    """
    left = 0.0 if length == 0 else max(0.0, 1 - progress / length)
    return math.exp(-5 * left**2)
