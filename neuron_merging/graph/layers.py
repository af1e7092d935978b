"""Rules for operations with parameters, and for those that work on positions: contraction, normalisation, pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neuron_merging.graph.axes import ONE, Axis, fixed, note, product, resolve, side_by_side
from neuron_merging.graph.export import shape
from neuron_merging.graph.rules import Axes, Call, Value, fresh, operation, rule


@rule("linear")
def linear(call: Call) -> Value:
    """x [..., i], W [o, i] → [..., o]"""
    x, W = call.axes("input"), call.axes("weight")
    contract(call, x[-1], W[-1], -1)
    out = W[0] if len(W) == 2 else None
    if out is None:
        return x[:-1]
    call.role("weight", W[0], "writer", 0)
    call.follow(W[0], "bias")
    return [*x[:-1], resolve(W[0])]


def contract(call: Call, x: Axis, w: Axis, dim: int) -> None:
    """An axis that a weight reads along its dimension dim."""
    weight = call.axes("weight")
    if any(axis.size == 0 for axis in weight):
        call.freeze([x, *weight], "has no weights")
    call.unify(x, w)
    call.role("weight", w, "reader", dim)


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Value:
    """x [B, g · i, …], W [g · o, i, …] → [B, g · o, …]; transposed: W [g · i, o, …]. g: groups."""
    x, W = call.axes("input"), call.axes("weight")
    transposed = "transpose" in operation(call.node) or bool(call.given.get("transposed"))
    c = len(x) - len(W) + 1
    call.freeze(W[2:], "slides it over positions")
    given = call.given["groups"]
    groups, inputs = call.split(x[c], given)
    blocks, rest = call.split(W[0], given)
    groups = call.unify(groups, blocks)
    reads, writes = (rest, W[1]) if transposed else (W[1], rest)
    contract(call, inputs, reads, 0 if transposed else 1)
    call.role("weight", writes, "writer", 1 if transposed else 0)
    out = product([groups, writes])
    if given > 1:
        call.role("weight", groups, "follower", 0)
        call.rewrite([groups], lambda count: {"groups": count(groups)})
    call.follow(out, "bias")
    if all(axis.size == 1 for axis in W[2:]) and call.shape[c + 1 :] == [axis.size for axis in x[c + 1 :]]:
        return [*x[:c], resolve(out), *x[c + 1 :]]
    call.freeze(x[c + 1 :], "slides over it")
    return [*x[:c], resolve(out), *[fixed(size) for size in call.shape[c + 1 :]]]


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call) -> Value:
    """a [..., i, k], b [..., k, j] → [..., i, j], each of them without its own dimension where it is a vector."""
    left, right = ("self", "other") if "other" in call.given else ("self", "mat2" if "mat2" in call.given else "vec")
    return multiply(call, left, right)


@rule("addmm", "baddbmm")
def addmm(call: Call) -> Value:
    """c + a b"""
    left, right = ("mat1", "mat2") if "mat1" in call.given else ("batch1", "batch2")
    out = multiply(call, left, right)
    for i, axis in enumerate(reversed(call.axes("self"))):
        if axis.size > 1:
            out[-1 - i] = call.unify(out[-1 - i], axis)
    return out


def multiply(call: Call, left: str, right: str) -> Axes:
    """Contract the last axis of one argument with the last but one of the other."""
    a, b = call.axes(left), call.axes(right)
    k, k2 = a[-1], b[-2] if len(b) > 1 else b[-1]
    call.unify(k, k2)
    if not call.is_weight(left) and not call.is_weight(right):
        note(k, "product", call.where)
        for axis in [*a[-2:-1], *b[-1:]] if len(b) > 1 else a[-2:-1]:
            note(axis, "mixed", call.where)
    call.role(left, k, "reader", -1)
    call.role(right, k2, "reader", -2 if len(b) > 1 else -1)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    for name, axes, dim in ((left, rows, -2), (right, columns, -1)):
        for axis in axes:
            call.role(name, axis, "writer", dim)
    batch: Axes = [ONE] * max(len(a) - 2, len(b) - 2, 0)
    for axes in (a[:-2], b[:-2]):
        for i, axis in enumerate(axes, len(batch) - len(axes)):
            if axis.size > 1:
                batch[i] = axis if batch[i].size == 1 else call.unify(batch[i], axis)
    return list(map(resolve, [*batch, *rows, *columns]))


@rule("einsum")
def einsum(call: Call) -> Value:
    """Axes of the same letter are one; those of letters that the result lacks are contracted."""
    equation, nodes = call.given["equation"].replace(" ", ""), call.given["tensors"]
    terms, _, result = equation.partition("->")
    if "." in equation or "->" not in equation:
        for axes in call.tensors():
            call.freeze(axes)
        return fresh(call.node.meta["val"])
    letters: dict[str, Axis] = {}
    for term, node in zip(terms.split(","), nodes):
        for letter, axis in zip(term, call.values[node]):
            known = letters.get(letter, ONE)
            letters[letter] = axis if known.size == 1 else call.unify(known, axis) if axis.size > 1 else known
    for term, node in zip(terms.split(","), nodes):
        for dim, letter in enumerate(term):
            call.role(node, letters[letter], "writer" if letter in result else "reader", dim)
    if not any(map(call.is_weight, nodes)):
        for letter in letters.keys() - set(result):
            note(letters[letter], "product", call.where)
    return [resolve(letters[letter]) for letter in result]


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Value:
    """q [..., h, n, d], k [..., h, m, d], v [..., h, m, e] → [..., h, n, e]"""
    q, k, v = call.axes("query"), call.axes("key"), call.axes("value")
    out = list(q)
    copies = q[-3].size // k[-3].size if len(q) > 2 and call.given.get("enable_gqa") else 1
    for i in range(len(q) - 2):
        if i == len(q) - 3 and copies > 1:
            call.unify(k[i], v[i])
            call.unify(q[i], product([k[i], fixed(copies)]))
        else:
            for axis in (k[i], v[i]):
                out[i] = call.unify(out[i], axis) if axis.size > 1 and out[i].size > 1 else out[i]
    call.unify(q[-1], k[-1])
    call.freeze([call.unify(k[-2], v[-2]), q[-2]])
    note(q[-1], "product", call.where)
    note(v[-1], "mixed", call.where)
    if call.given.get("scale") is None:
        call.freeze(q[-1], "scales by the square root of its size")
    mask = call.axes("attn_mask")
    for i, axis in enumerate(reversed(mask or [])):
        if axis.size > 1:
            call.unify([*q[:-1], k[-2]][-1 - i], axis)
    return list(map(resolve, [*out[:-1], v[-1]]))


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm")
def batch_norm(call: Call) -> Value:
    """Every channel of dimension 1 by itself, over all else."""
    x = call.axes("input")
    call.follow(x[1], "weight", "bias", "running_mean", "running_var")
    for axis in [*x[:1], *x[2:]]:
        note(axis, "statistics", call.where)
    out = list(map(resolve, x))
    return out if isinstance(call.node.meta["val"], Tensor) else (out, [out[1]], [out[1]])


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Value:
    """Over the last dimensions, as many as `normalized_shape` has."""
    x = call.axes("input")
    over = x[len(x) - len(call.given["normalized_shape"]) :]
    for name in ("weight", "bias"):
        axes = call.axes(name)
        over = [call.unify(a, b) for a, b in zip(over, axes)] if axes else over
    for axis in over:
        note(axis, "statistics", call.where)
    call.sizes("normalized_shape", over)
    return list(map(resolve, x))


@rule("group_norm")
def group_norm(call: Call) -> Value:
    """x [B, g · c, …]: over c and all positions."""
    x = call.axes("input")
    groups, inside = call.split(x[1], call.given["num_groups"])
    for axis in [inside, *x[2:]]:
        note(axis, "statistics", call.where)
    if groups.size > 1:
        call.rewrite([groups], lambda count: {"num_groups": count(groups)})
    x[1] = product([groups, inside])
    call.follow(x[1], "weight", "bias")
    return list(map(resolve, x))


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Value:
    """One slope for every channel, or for all."""
    x, weight = call.axes("self"), call.axes("weight")
    if weight and weight[0].size > 1:
        call.unify(x[1], weight[0])
    return list(map(resolve, x))


@rule("embedding")
def embedding(call: Call) -> Value:
    """Rows of a table by number."""
    W, indices = call.axes("weight"), call.axes("indices")
    call.freeze([W[0], *indices], "chooses along it by number")
    call.role("weight", W[1], "writer", 1)
    return [*indices, W[1]]


POOLS = ["max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "max_pool{}d_with_indices"]


@rule(*[pool.format(d) for pool in POOLS for d in (1, 2, 3)], "mkldnn_max_pool2d", "lp_pool2d", "unfold", "im2col",
      *[f"_adaptive_avg_pool{d}d" for d in (2, 3)], "replication_pad1d", "replication_pad2d", "reflection_pad1d",
      "reflection_pad2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
      "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "grid_sampler", "grid_sampler_2d")  # fmt: skip
def spatial(call: Call) -> Value:
    """Every channel by itself, over positions: the last dimensions, whatever their number becomes."""
    (x, *others) = call.tensors()
    for axes in others:
        call.freeze(axes)
    if operation(call.node) in ("unfold", "im2col"):
        return patches(call, x)
    d = next((d for d in (1, 2, 3) if f"{d}d" in operation(call.node)), 2)
    front = x[: len(x) - d]
    call.freeze(x[len(x) - d :])

    def out(value: Tensor) -> Axes:
        return [*front, *[fixed(size) for size in shape(value)[len(front) :]]]

    value = call.node.meta["val"]
    return out(value) if isinstance(value, Tensor) else tuple(map(out, value))


def patches(call: Call, x: Axes) -> Value:
    """im2col: [B, c, H, W] → [B, c · taps, places]; `Tensor.unfold` adds a dimension of a window's positions."""
    out = call.shape
    if "kernel_size" in call.given:
        call.freeze(x[-2:])
        return [*x[:-3], product([x[-3], fixed(out[-2] // x[-3].size)]), fixed(out[-1])]
    d = call.dim("dimension", len(x))
    call.freeze(x[d])
    return [*x[:d], fixed(out[d]), *x[d + 1 :], fixed(out[-1])]


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*GATES)
def recurrent(call: Call) -> Value:
    """W_ih [gates · h, i], W_hh [gates · h, h] and biases, by layer and direction; one h for all, as PyTorch has it."""
    x, kind = call.axes("input"), operation(call.node)
    weights, biased = call.given["params"], call.given["has_biases"]
    directions, each = 1 + bool(call.given["bidirectional"]), 4 if biased else 2
    layers = call.given["num_layers"] * directions
    if x is None or len(weights) != layers * each:  # packed sequences, projections
        for axes in call.tensors():
            call.freeze(axes)
        return fresh(call.node.meta["val"])
    states = call.given["hx"] if isinstance(call.given["hx"], list | tuple) else [call.given["hx"]]
    hidden, source = call.values[states[0]][-1], x[-1]
    for state in states[1:]:
        hidden = call.unify(hidden, call.values[state][-1])
    for layer in range(0, layers, directions):
        for direction in range(directions):
            start = (layer + direction) * each
            W_ih, W_hh, *biases = (call.values[node] for node in weights[start : start + each])
            gates, inside = call.split(W_ih[0], GATES[kind])
            call.freeze(gates)
            hidden = call.unify(hidden, inside)
            call.unify(source, W_ih[1])
            call.unify(hidden, W_hh[1])
            for axes in (W_hh, *biases):
                call.unify(W_ih[0], axes[0])
            call.role(weights[start], hidden, "writer", 0)
            call.role(weights[start], W_ih[1], "reader", 1)
            call.role(weights[start + 1], hidden, "writer", 0)
            call.role(weights[start + 1], hidden, "reader", 1)
        source = side_by_side([hidden] * directions)
    note(hidden, "recurrent", call.where)
    sizes: Any = call.node.meta["val"]
    state = [fixed(layers), fixed(shape(sizes[1])[1]), hidden]
    return ([*x[:-1], resolve(source)], *[list(map(resolve, state)) for _ in sizes[1:]])
