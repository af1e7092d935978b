"""Rules for operations that only move, regroup, choose or repeat elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from neuron_merging.graph.axes import Axis, fixed, free, is_fixed, product, regroup, resolve, side_by_side, split_sum
from neuron_merging.graph.export import shape
from neuron_merging.graph.rules import Axes, Call, Count, Value, fresh, operation, rule

aten = torch.ops.aten


@rule(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"
)
def reshape(call: Call) -> Value:
    """Any new shape of the same elements in the same order."""
    (axes, *others) = call.tensors()
    out = regroup(axes, call.shape)
    if out is None:
        call.freeze(axes, "gives it a shape against its structure")
        return fresh(call.node.meta["val"])
    for other in others:  # whose shape it takes
        out = [call.unify(a, b) for a, b in zip(out, other)]
    for name in ("size", "shape"):
        if name in call.given and not others:
            call.sizes(name, out)
    if "sizes" in call.given:  # unflatten
        start = call.dim("dim", len(axes))
        call.sizes("sizes", out[start : start + len(call.given["sizes"])])
    return out


@rule(
    "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT", "adjoint", "matrix_H"
)
def permutation(call: Call) -> Value:
    """Another order of the dimensions: found by what the operation does to a small tensor."""
    (axes,) = call.tensors()
    probe = torch.empty(tuple(range(2, 2 + len(axes))), device="meta")
    args = tuple(probe if isinstance(arg, fx.Node) else arg for arg in call.node.args)
    return [axes[size - 2] for size in call.node.target(*args, **call.node.kwargs).shape]


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Value:
    """Dimensions of size one repeated: to whatever size what comes next needs."""
    (axes, *others) = call.tensors()
    sizes = call.shape
    axes = [fixed(1)] * (len(sizes) - len(axes)) + axes
    out = [axis if axis.size == size else free(size) for axis, size in zip(axes, sizes)]
    if others:
        return [call.unify(a, b) for a, b in zip(out, others[0])]
    call.sizes("size", out)
    return out


@rule("repeat", "tile")
def repeat(call: Call) -> Value:
    """Copies side by side; a dimension of size one is as good as expanded."""
    (axes,) = call.tensors()
    name = "repeats" if "repeats" in call.given else "dims"
    sizes = call.shape
    axes = [fixed(1)] * (len(sizes) - len(axes)) + axes
    copies = [
        free(size // axis.size) if axis.size == 1 else fixed(size // axis.size) for axis, size in zip(axes, sizes)
    ]
    if len(call.given[name]) == len(sizes):
        call.sizes(name, copies)
    return [product([times, axis]) for times, axis in zip(copies, axes)]


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Value:
    """Every index several times in a row."""
    axes = call.axes("self")
    if axes is None or not isinstance(call.given.get("repeats"), int) or call.given.get("dim") is None:
        for axes in call.tensors():
            call.freeze(axes)
        return fresh(call.node.meta["val"])
    d = call.dim("dim", len(axes))
    axes[d] = product([axes[d], fixed(call.given["repeats"])])
    return axes


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Value:
    """Side by side along one dimension; the others are one."""
    values = [call.values[node] for node in call.given["tensors"]]
    values = [axes for axes in values if len(axes) == len(call.shape)]  # not the empty ones that PyTorch lets pass
    d = call.dim("dim", len(call.shape))
    out = list(values[0])
    for axes in values[1:]:
        out = [a if i == d else call.unify(a, b) for i, (a, b) in enumerate(zip(out, axes))]
    out[d] = side_by_side([axes[d] if axes[d].size != 1 else fixed(1) for axes in values])
    return list(map(resolve, out))


@rule("stack")
def stack(call: Call) -> Value:
    """One tensor for each index of a new dimension."""
    values = [call.values[node] for node in call.given["tensors"]]
    out = list(values[0])
    for axes in values[1:]:
        out = [call.unify(a, b) for a, b in zip(out, axes)]
    out.insert(call.dim("dim", len(out) + 1), fixed(len(values)))
    return out


def cut(call: Call, axis: Axis, sizes: list[int]) -> list[Axis]:
    """An axis in consecutive pieces of these sizes; frozen where its structure has no boundaries there."""
    pieces: list[Axis] = []
    rest = axis
    for size in sizes[:-1]:
        halves = split_sum(rest, size)
        if halves is None:
            call.freeze(axis, "cuts it against its structure")
            return [fixed(size) for size in sizes]
        pieces.append(halves[0])
        rest = halves[1]
    return [*pieces, rest]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(call: Call) -> Value:
    """Consecutive pieces of one dimension, which may be of unlike size afterwards."""
    (axes,) = call.tensors()
    d = call.dim("dim", len(axes))
    sizes = [shape(value)[d] for value in call.node.meta["val"]]
    pieces = cut(call, axes[d], sizes)
    tensor = call.given["self"]

    def arguments(count: Count) -> dict[str, Any]:
        return {"self": tensor, "split_sizes": list(map(count, pieces)), "dim": d}

    call.rewrite(pieces, arguments, aten.split_with_sizes.default)
    return tuple([*axes[:d], piece, *axes[d + 1 :]] for piece in pieces)


@rule("slice", "narrow")
def slices(call: Call) -> Value:
    """A range of one dimension, with a step along those that are fixed only."""
    (axes,) = call.tensors()
    d = call.dim("dim", len(axes))
    axis, size = axes[d], call.shape[d]
    start, step = call.given.get("start") or 0, call.given.get("step") or 1
    if size == axis.size and step == 1:
        if operation(call.node) == "narrow":
            call.rewrite([axis], lambda count: {"length": count(axis)})
        return axes
    if step != 1 or not isinstance(start, int) or is_fixed(axis):
        call.freeze(axis)
        axes[d] = fixed(size)
        return axes
    start = max(start + axis.size, 0) if start < 0 else start
    before, piece, _ = cut(call, axis, [start, size, axis.size - start - size])
    axes[d] = piece
    if operation(call.node) == "narrow":
        call.rewrite([before, piece], lambda count: {"start": count(before), "length": count(piece)})
    else:
        call.rewrite([before, piece], lambda count: {"start": count(before), "end": count(before) + count(piece)})
    return axes


@rule("select")
def select(call: Call) -> Value:
    """One index of one dimension: that one stays, others can be dropped."""
    (axes,) = call.tensors()
    d = call.dim("dim", len(axes))
    axis, index = axes.pop(d), call.given["index"]
    if not isinstance(index, int) or is_fixed(axis):
        call.freeze(axis)
        return axes
    index %= axis.size
    before, _, _ = cut(call, axis, [index, 1, axis.size - index - 1])
    call.rewrite([before], lambda count: {"index": count(before)})
    return axes


@rule("unbind")
def unbind(call: Call) -> Value:
    """All indices of one dimension, each a tensor."""
    (axes,) = call.tensors()
    axis = axes.pop(call.dim("dim", len(axes)))
    call.freeze(axis)
    return tuple(list(axes) for _ in range(axis.size))


@rule("index", "_unsafe_index")
def index(call: Call) -> Value:
    """Tensors choose along some dimensions, which are frozen; the others stay."""
    axes = call.axes("self")
    chosen = [*call.given["indices"], *[None] * len(axes)][: len(axes)]
    at = [d for d, node in enumerate(chosen) if node is not None]
    for d in at:
        call.freeze(axes[d], "chooses along it by number")
        for axis in call.values[chosen[d]]:
            call.freeze(axis)
    rank = len(call.shape) - (len(axes) - len(at))
    together = at == list(range(at[0], at[-1] + 1)) if at else True
    place = at[0] if together and at else 0
    if any(call.node.args[1][d].meta["val"].dtype == torch.bool for d in at) or rank < 0:
        call.freeze([axis for d, axis in enumerate(axes) if d not in at])
        return fresh(call.node.meta["val"])
    rest = [axis for d, axis in enumerate(axes) if d not in at]
    return [*rest[:place], *[fixed(size) for size in call.shape[place : place + rank]], *rest[place:]]


@rule("index_select", "gather", "index_add", "index_copy", "scatter", "scatter_add", "take_along_dim", "masked_select")
def gather(call: Call) -> Value:
    """Indices choose along one dimension; of index_select the others stay as they are."""
    if operation(call.node) != "index_select":
        for axes in call.tensors():
            call.freeze(axes)
        return fresh(call.node.meta["val"])
    axes = call.axes("self")
    d = call.dim("dim", len(axes))
    call.freeze(axes[d], "chooses along it by number")
    axes[d] = fixed(call.shape[d])
    return axes


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Value:
    """More indices at the ends: a constant takes part in whatever becomes of the axis, other modes freeze it."""
    (axes,) = call.tensors()
    widths = call.given["pad"]
    constant = call.given.get("mode", "constant") == "constant"
    out: Axes = list(axes)
    ends: dict[int, Axis] = {}
    for i in range(len(widths) // 2):
        d = len(axes) - 1 - i
        before, after = widths[2 * i : 2 * i + 2]
        if call.shape[d] == axes[d].size:
            continue
        if is_fixed(axes[d]) or not constant or not all(isinstance(w, int) and w >= 0 for w in (before, after)):
            call.freeze(axes[d])
            out[d] = fixed(call.shape[d])
            continue
        ends[2 * i], ends[2 * i + 1] = (free(w) if w > 1 else fixed(w) for w in (before, after))
        out[d] = side_by_side([ends[2 * i], axes[d], ends[2 * i + 1]])

    def arguments(count: Count) -> dict[str, Any]:
        return {"pad": [count(ends[i]) if i in ends and width else width for i, width in enumerate(widths)]}

    if ends:
        call.rewrite([*ends.values()], arguments)
    return out


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Value:
    """Channels c · r² become c, at r × r positions."""
    (axes,) = call.tensors()
    r = call.given["upscale_factor"]
    channels, inside = call.split(axes[-3], axes[-3].size // r**2)
    call.freeze([inside, *axes[-2:]])
    return [*axes[:-3], channels, *[fixed(size) for size in call.shape[-2:]]]


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Value:
    """Channels c become c · r²."""
    (axes,) = call.tensors()
    call.freeze(axes[-2:])
    channels = product([axes[-3], fixed(call.given["downscale_factor"] ** 2)])
    return [*axes[:-3], channels, *[fixed(size) for size in call.shape[-2:]]]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Value:
    """g · c → c · g."""
    (axes,) = call.tensors()
    groups, inside = call.split(axes[1], call.given["groups"])
    call.freeze(groups)
    axes[1] = product([inside, groups])
    return axes


@rule("col2im")
def col2im(call: Call) -> Value:
    """Channels c · taps, at places, become c, at positions."""
    (axes,) = call.tensors()
    channels, taps = call.split(axes[-2], call.shape[-3])
    call.freeze([taps, axes[-1]])
    return [*axes[:-2], channels, *[fixed(size) for size in call.shape[-2:]]]
