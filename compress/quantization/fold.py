"""BatchNorm folded into the layer before it: Jacob et al., 2018 (arXiv:1712.05877), section 3.2."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from compress.quantization.graph import RESULT_OF, hand_over_results, set_module, trace


def fold_batchnorm(module: nn.Module) -> fx.GraphModule:
    """An eval-mode graph that computes the same with each `conv -> bn` and `linear -> bn` as one layer with a bias.

    A BatchNorm whose input is used elsewhere, or comes from a layer that runs twice, stays where it is.
    """
    graph_module = trace(module)
    modules = dict(graph_module.named_modules())
    calls: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph_module.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or norm.running_mean is None:
            continue
        before = node.args[0]
        layer = modules.get(before.target) if before.op == "call_module" else None
        if len(before.users) > 1 or calls.get(str(before.target), 0) > 1 or calls[node.target] > 1:
            continue
        fused: nn.Module
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            fused = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            if norm.num_features != layer.out_features:
                continue  # over tokens, its channels are the tokens
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        set_module(graph_module, before.target, fused)
        modules[before.target] = fused
        before.meta.pop(RESULT_OF, None)  # what the layer returned before BatchNorm is nowhere in the graph any more
        hand_over_results(node, before)
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module
