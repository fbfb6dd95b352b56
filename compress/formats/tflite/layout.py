"""In which order a tensor holds the axes of an ONNX value, as pure functions of shapes.

An order lists ONNX axes: axis i of the tensor is axis `order[i]` of the value. Axes of size 1 have no place of their
own: two orders that differ in such axes only hold the same numbers in the same sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.formats.tflite_file import Shape

Order = tuple[int, ...]

NHWC: Order = (0, 2, 3, 1)  # where NHWC takes its axes from, in NCHW


def plain(rank: int) -> Order:
    """The ONNX's own order."""
    return tuple(range(rank))


def outward(rank: int) -> Order:
    """The order in which inputs and outputs of a file lie."""
    return NHWC if rank == 4 else plain(rank)


def arranged(shape: Shape, order: Order) -> Shape:
    """The shape of the tensor that holds a value of `shape` in `order`."""
    return tuple(shape[axis] for axis in order)


def sequence(shape: Shape, order: Order) -> Order:
    """The order without axes of size 1: what decides where the numbers lie."""
    return tuple(axis for axis in order if shape[axis] != 1)


def same(shape: Shape, a: Order, b: Order) -> bool:
    return sequence(shape, a) == sequence(shape, b)


def widened(order: Order, rank: int) -> Order:
    """The order once the value is seen with leading axes of size 1, as broadcasting does."""
    extra = rank - len(order)
    return (*range(extra), *(axis + extra for axis in order))


def without(order: Order, axes: Iterable[int]) -> Order:
    """The order once `axes` are dropped from the value."""
    gone = set(axes)
    left = sorted(axis for axis in order if axis not in gone)
    return tuple(left.index(axis) for axis in order if axis not in gone)


def ending_in(order: Order, *last: int) -> Order:
    """The order with the axes `last` at its end, the others as they were."""
    return (*(axis for axis in order if axis not in last), *last)


def reshaped(old: Shape, order: Order, new: Shape) -> tuple[Order, Order]:
    """How to see a tensor, which holds a value of shape `old` in `order`, as a value of shape `new`.

    Returns the order it must lie in first (`order` itself if no number has to move), and the order in which it then
    holds the new value. Only axes that are merged with others have to lie beside these.
    """
    groups = _groups(old, new)
    group_of = {axis: index for index, (axes, _) in enumerate(groups) for axis in axes}
    lies = sequence(old, order)
    # Groups are ordered by their last axes: rows that lie together stay together.
    appearance = list(dict.fromkeys(group_of[axis] for axis in reversed(lies)))[::-1]
    wanted = tuple(axis for index in appearance for axis in groups[index][0])
    before = order if wanted == lies else _with_units(wanted, old)
    return before, _with_units(tuple(axis for index in appearance for axis in groups[index][1]), new)


def _groups(old: Shape, new: Shape) -> list[tuple[Order, Order]]:
    """The finest runs of axes with equally many elements in both shapes; axes of size 1 are left out."""
    olds = [axis for axis, size in enumerate(old) if size != 1]
    news = [axis for axis, size in enumerate(new) if size != 1]
    groups = []
    while olds or news:
        left, right = [olds.pop(0)], [news.pop(0)]
        before, after = old[left[0]], new[right[0]]
        while before != after:
            if before < after:
                left.append(olds.pop(0))
                before *= old[left[-1]]
            else:
                right.append(news.pop(0))
                after *= new[right[-1]]
        groups.append((tuple(left), tuple(right)))
    return groups


def _with_units(lies: Sequence[int], shape: Shape) -> Order:
    """An order of all axes that has the given sequence; a usual one where that is possible."""
    for usual in (outward(len(shape)), plain(len(shape))):
        if sequence(shape, usual) == tuple(lies):
            return usual
    order = list(lies)
    for axis, size in enumerate(shape):
        if size == 1:
            order.insert(order.index(axis - 1) + 1 if axis and axis - 1 in order else 0, axis)
    return tuple(order)
