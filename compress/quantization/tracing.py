"""Tracing of networks that ask for the size of what they read.

fx follows a forward with stand-ins for tensors. Where it branches on a size (`if x.shape[1] != self.channels`), counts
one or makes it an int, such a stand-in knows no answer. Here it is looked up: the graph so far is run on zeros of the
network's own image size, at two batch sizes, and what both agree on is taken.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

RESULT_OF = "result_of"
"""In a node's meta: names of the modules of the original network whose result this node is, containers too."""
BATCHES = (2, 3)
"""What differs between them is no constant."""
SIZES: tuple[Any, ...] = (getattr, len, "size", "dim", "ndimension", "numel", "nelement", "stride")
"""Make numbers of a tensor that its values do not change."""


class Tracer(fx.Tracer):
    """Writes down of which modules each node is the result, and answers questions on sizes.

    Without `input_shape`, (C, H, W), no question on sizes is answered.
    """

    def __init__(self, input_shape: tuple[int, ...] | None = None) -> None:
        super().__init__(autowrap_functions=(math.sqrt,))
        self.input_shape = input_shape
        self.known: tuple[dict[fx.Node, Any], ...] = tuple({} for _ in BATCHES)
        self.from_values: set[fx.Node] = set()
        """Nodes that are numbers which depend on the values of a tensor."""
        self.untraced = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            result.node.meta[RESULT_OF] = [*result.node.meta.get(RESULT_OF, ()), self.path_of_module(m)]
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Sized(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.number(obj, super().to_bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        def refuse(proxy: fx.Proxy) -> Any:
            return None

        if self.input_shape is None:
            return super().iter(obj)
        try:
            return super().iter(obj)  # `a, b = x.shape`, whose length stands in the bytecode
        except fx.proxy.TraceError:
            count = self.number(obj.tracer.create_proxy("call_function", len, (obj,), {}), refuse)
            if count is None:
                raise
            return (obj.tracer.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in range(count))

    def number(self, proxy: fx.Proxy, refuse: Callable[[fx.Proxy], Any]) -> Any:
        """The int, float or bool that the stand-in has for every batch; else what `refuse` says."""
        if self.input_shape is None:
            return refuse(proxy)
        try:
            with self._executing():
                for known, batch in zip(self.known, BATCHES, strict=True):
                    for node in self.graph.nodes:
                        if node not in known and node.op != "output":
                            known[node] = self._value(node, known, batch)
        except Exception:  # whatever a forward does with an image of this size
            return refuse(proxy)
        values = [known[proxy.node] for known in self.known]
        if proxy.node in self.from_values or not isinstance(values[0], (bool, int, float)) or values[0] != values[1]:
            return refuse(proxy)
        return values[0]

    def is_number(self, node: fx.Node) -> bool:
        """Whether it is known to be no tensor: a size, a shape, or what was computed from them."""
        return node in self.known[0] and not isinstance(self.known[0][node], Tensor)

    @contextlib.contextmanager
    def _executing(self) -> Iterator[None]:
        """Modules compute, instead of being written down, which is what fx makes them do while it traces."""
        traced = {name: getattr(nn.Module, name) for name in self.untraced}
        for name, method in self.untraced.items():
            setattr(nn.Module, name, method)
        try:
            yield
        finally:
            for name, method in traced.items():
                setattr(nn.Module, name, method)

    def _value(self, node: fx.Node, known: dict[fx.Node, Any], batch: int) -> Any:
        assert self.input_shape is not None
        if node.op == "placeholder":
            return torch.zeros(batch, *self.input_shape) if not known else (node.args[0] if node.args else None)
        if node.op == "get_attr":
            value: Any = self.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: known[used])
        with torch.no_grad():
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                found = node.target(*args, **kwargs)
        reads_tensor = any(isinstance(known[used], Tensor) for used in node.all_input_nodes)
        tainted = any(used in self.from_values for used in node.all_input_nodes)
        if not isinstance(found, Tensor) and (tainted or (reads_tensor and node.target not in SIZES)):
            self.from_values.add(node)
        return found


class Sized(fx.Proxy):
    """A stand-in that can be made a number where it is one of a size."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return SizedAttribute(self, k)

    def __len__(self) -> int:
        counted = self.tracer.create_proxy("call_function", len, (self,), {})
        assert isinstance(counted, Sized)
        return int(counted._number("a length"))

    def __index__(self) -> int:
        return int(self._number("an index"))

    def __int__(self) -> int:
        return int(self._number("an int"))

    def __float__(self) -> float:
        return float(self._number("a float"))

    def __ceil__(self) -> int:
        return math.ceil(self._number("an int"))

    def __floor__(self) -> int:
        return math.floor(self._number("an int"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._number("an int"), digits)

    def _number(self, kind: str) -> Any:
        def refuse(proxy: fx.Proxy) -> Any:
            raise fx.proxy.TraceError(f"a traced value cannot be made {kind}")

        assert isinstance(self.tracer, Tracer)
        return self.tracer.number(self, refuse)


class SizedAttribute(fx.proxy.Attribute, Sized):
    """What stands behind a dot: `x.shape`."""
