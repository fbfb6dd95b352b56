"""Which operators fall out of integer kernels: asked of the runtimes themselves, for a file they have opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from compress.doctor.program import Operator, Program


@dataclass(frozen=True)
class Fallen:
    """Operators of one kind that a runtime does not compute as they were meant."""

    op: str
    count: int
    layers: tuple[str, ...]
    macs: int
    moved_bytes: int


@dataclass(frozen=True)
class Kernels:
    """How a runtime computes the int8 file."""

    runtime: str
    operators: int
    """All but conversions."""
    in_float: tuple[Fallen, ...]
    """Operators that compute with floats, those that move most memory first."""
    not_delegated: tuple[Fallen, ...]
    """LiteRT: operators that XNNPACK leaves to the slower built-in kernels."""
    partitions: int
    """LiteRT: stretches that XNNPACK got; more than one means that results go back and forth. 0: no XNNPACK."""
    conversions: int
    """QuantizeLinear and DequantizeLinear between the first operator and the last."""
    float_macs: float
    """Fraction of the multiply-adds that is computed in float."""
    float_bytes: float
    """Fraction of the activation bytes read and written that belongs to float operators and conversions."""


def kernels(program: Program) -> Kernels:
    """What the runtime's own plan says of an int8 file."""
    computing = [operator for operator in program.operators if not operator.is_boundary]
    ends = {value.name for value in (*program.inputs, *program.outputs)}
    conversions = [
        operator
        for operator in program.operators
        if operator.is_boundary and not ends & {value.name for value in (*operator.reads, *operator.outputs)}
    ]
    in_float = [operator for operator in computing if operator.in_float]
    moved = sum(operator.moved_bytes for operator in program.operators)
    return Kernels(
        runtime=program.runtime,
        operators=len(computing),
        in_float=_by_op(in_float),
        not_delegated=_by_op(op for op in program.operators if not op.delegated),
        partitions=program.partitions,
        conversions=len(conversions),
        float_macs=_part(sum(operator.macs for operator in in_float), program.macs),
        float_bytes=_part(sum(operator.moved_bytes for operator in (*in_float, *conversions)), moved),
    )


def _by_op(operators: Iterable[Operator]) -> tuple[Fallen, ...]:
    operators = list(operators)
    found = []
    for op, count in Counter(operator.op for operator in operators).items():
        of_kind = [operator for operator in operators if operator.op == op]
        layers = tuple(dict.fromkeys(operator.layer for operator in of_kind))
        macs, moved = (sum(getattr(operator, key) for operator in of_kind) for key in ("macs", "moved_bytes"))
        found.append(Fallen(op, count, layers, macs, moved))
    return tuple(sorted(found, key=lambda fallen: -fallen.moved_bytes))


def _part(some: int, of_all: int) -> float:
    return some / of_all if of_all else 0.0
