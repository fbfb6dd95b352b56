"""torch's attention layers in operators that can be traced, quantized and exported one by one.

torch.nn.MultiheadAttention is one opaque call to a tracer: its four linear layers, which do most of the work, would
stay in float.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError


class Attention(nn.Module):
    """Vaswani et al., 2017 (arXiv:1706.03762), section 3.2.2, with one linear layer each for q, k, v and the result."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        width = original.embed_dim
        self.heads, self.batch_first = original.num_heads, original.batch_first
        if original.in_proj_weight is not None:
            weights = original.in_proj_weight.detach().chunk(3)
        else:
            weights = [w.detach() for w in (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)]
        biases = [None] * 3 if original.in_proj_bias is None else original.in_proj_bias.detach().chunk(3)
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        self.out = _linear(original.out_proj.weight.detach(), original.out_proj.bias)
        self.scale = 1 / math.sqrt(width // self.heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(N, T, C), or (T, N, C) where the original was not batch_first; attention weights are never returned."""
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise NotImplementedError("attention with a mask")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        weights_NHTT = torch.softmax(torch.matmul(q * self.scale, k.transpose(2, 3)), dim=-1)
        mixed_NTC = torch.matmul(weights_NHTT, v).transpose(1, 2).flatten(2)
        result: Tensor = self.out(mixed_NTC)
        return (result if self.batch_first else result.transpose(0, 1)), None


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer with its attention taken apart."""

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.self_attn = Attention(original.self_attn)
        self.linear1, self.dropout, self.linear2 = original.linear1, original.dropout, original.linear2
        self.norm1, self.norm2 = original.norm1, original.norm2
        self.dropout1, self.dropout2 = original.dropout1, original.dropout2
        self.norm_first, self.activation = original.norm_first, original.activation

    def forward(
        self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
    ) -> Any:
        """Of the same shape as `src`."""
        if src_mask is not None or src_key_padding_mask is not None or is_causal:
            raise NotImplementedError("attention with a mask")
        if self.norm_first:
            src = src + self._attend(self.norm1(src))
            return src + self._feed(self.norm2(src))
        src = self.norm1(src + self._attend(src))
        return self.norm2(src + self._feed(src))

    def _attend(self, x: Tensor) -> Tensor:
        result: Tensor = self.dropout1(self.self_attn(x, x, x, need_weights=False)[0])
        return result

    def _feed(self, x: Tensor) -> Tensor:
        result: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return result


class Encoder(nn.Module):
    """nn.TransformerEncoder of such layers."""

    def __init__(self, original: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(layer) for layer in original.layers)
        self.norm = original.norm

    def forward(self, src: Tensor, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> Any:
        """Of the same shape as `src`."""
        if mask is not None or src_key_padding_mask is not None or is_causal:
            raise NotImplementedError("attention with a mask")
        for layer in self.layers:
            src = layer(src)
        return src if self.norm is None else self.norm(src)


def expand_attention(module: nn.Module, path: str = "") -> None:
    """Takes torch's attention and encoder layers in `module` apart, in place; decoders stay, for the tracer to refuse.

    Raises ModelError for attention with extra keys (`add_bias_kv`, `add_zero_attn`), naming it.
    """
    for name, child in list(module.named_children()):
        place = f"{path}{name}"
        for attention in child.modules():
            extra = isinstance(attention, nn.MultiheadAttention) and (
                attention.bias_k is not None or attention.add_zero_attn
            )
            if extra:
                raise ModelError(
                    f"layer {place}", "MultiheadAttention with added keys cannot be traced", "leave them out"
                )
        if isinstance(child, (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer)):
            continue
        if isinstance(child, nn.MultiheadAttention):
            setattr(module, name, Attention(child))
        elif isinstance(child, nn.TransformerEncoderLayer):
            setattr(module, name, EncoderLayer(child))
        elif isinstance(child, nn.TransformerEncoder):
            setattr(module, name, Encoder(child))
        else:
            expand_attention(child, f"{place}.")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
