"""Which channels are the same number for every input (dead ones), and which number: found in one pass over the graph (ours).

The graph is run in float64 on inputs of NaN, which stands for "it varies" and spreads by itself; layers are not computed: an
output of theirs varies unless its weights are all zero. Only operations of which that is right are run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from neuron_merging.graph.export import Network, shape
from neuron_merging.graph.neurons import batchnorm, numbers
from neuron_merging.graph.units import (
    ACTIVATIONS,
    DROPOUT,
    HOMOGENEOUS,
    LAYERS,
    POOLS,
    VIEWS,
    groups,
    has_numbers,
    kind,
)
from neuron_merging.graph.ways import PARTS

SPREADS = {*HOMOGENEOUS, *ACTIVATIONS, *POOLS, *VIEWS, *DROPOUT, *PARTS, "add", "sub", "mul", "div", "neg", "cat", "stack",
           "mean", "sum", "permute", "transpose", "getitem", "slice", "select", "pad", "expand"}  # fmt: skip


def find_constants(network: Network) -> dict[fx.Node, Tensor]:
    """By layer the constants among its inputs, [C], NaN for those that vary; none at all where no channel is dead."""
    nodes = [node for node in network.graph.graph.nodes if node.op != "output"]
    if not any(_has_dead(network, node) for node in nodes):
        return {}
    values: dict[fx.Node, Any] = {}
    found = {}
    last = {source: node for node in nodes for source in node.all_input_nodes}
    for node in nodes:
        if is_layer(network, node):
            x = values[node.args[0]]
            found[node] = _of_channels(x, x.ndim - 1 if kind(node) == "linear" else 1)
        values[node] = _value(network, node, values)
        for source in [source for source in node.all_input_nodes if last[source] is node]:
            values.pop(source, None)
    return found


def is_layer(network: Network, node: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer whose weight and bias are parameters."""
    if node.op != "call_function" or kind(node) not in LAYERS:
        return False
    return all(s is None or (s.op == "get_attr" and s.target in network.names) for s in node.args[1:3])


def _has_dead(network: Network, node: fx.Node) -> bool:
    if is_layer(network, node):
        return bool(_zero_rows(network, node).any())
    return _is_norm(node) and bool((batchnorm(network, node).gamma == 0).any())


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and kind(node) == "batch_norm" and has_numbers(node)


def _zero_rows(network: Network, node: fx.Node) -> Tensor:
    """Which rows of a layer's weight are zero, [M]."""
    W = network.tensor(network.names[node.args[1].target][0]).detach().flatten(1)
    zero = W[:, 0] == 0
    zero[zero.clone()] = (W[zero] == 0).all(1)  # of these few, all weights are looked at
    return zero


def _of_channels(x: Tensor, dim: int) -> Tensor:
    """The constant of every channel, [C]; NaN where it varies over the batch or positions."""
    x = x.movedim(dim, 0).flatten(1)
    return torch.where(x.amin(1) == x.amax(1), x[:, 0], torch.nan)


def _value(network: Network, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node gives; NaN where it varies."""
    if node.op == "placeholder":
        return _varying(node.meta.get("val"))
    if node.op == "get_attr":
        known = node.target in network.names
        return (
            network.tensor(network.names[node.target][0]).detach().double() if known else _varying(node.meta.get("val"))
        )
    if is_layer(network, node):
        return _layer(network, node, values[node.args[0]])
    if _is_norm(node):
        bn, x = batchnorm(network, node), values[node.args[0]]
        sizes = [1, -1, *[1] * (x.ndim - 2)]
        gain, constant = bn.gain.view(sizes), (bn.beta - bn.gain * bn.mu).view(sizes)
        return torch.where(gain == 0, constant, gain * x + constant)
    meta = node.meta.get("val")
    if not isinstance(meta, Tensor | list | tuple) or kind(node) in SPREADS:
        try:
            result = node.target(*fx.map_arg(node.args, values.get), **fx.map_arg(node.kwargs, values.get))
        except Exception:  # double numbers in the place of something else
            return _varying(meta)
        if kind(node) in ACTIVATIONS:  # of which some are made of comparisons
            result = torch.where(values[node.args[0]].isnan(), torch.nan, result)
        return result
    return _varying(meta)


def _layer(network: Network, node: fx.Node, x: Tensor) -> Tensor:
    """Rows of zeros give the bias; a depthwise convolution gives a constant for a constant, but at borders of zeros."""
    weight = numbers(network, node.args[1])
    bias = (
        weight.new_zeros(len(weight)) if len(node.args) < 3 or node.args[2] is None else numbers(network, node.args[2])
    )
    out = torch.where(_zero_rows(network, node), bias, torch.nan)
    if kind(node) != "linear" and groups(node) == weight.shape[0] == x.shape[1]:
        constant = _of_channels(x, 1)
        padded = len(node.args) > 4 and node.args[4] not in (0, [0] * (weight.ndim - 2), "valid")
        passed = bias + weight.flatten(1).sum(1) * constant
        out = torch.where(out.isnan() & ((constant == 0) | (not padded)), passed, out)
    like = _varying(node.meta["val"])
    sizes = [-1] if kind(node) == "linear" else [1, -1, *[1] * (weight.ndim - 2)]
    return out.view(sizes).expand(like.shape).contiguous()


def _varying(value: Any) -> Any:
    """NaN in the shape of a value of the graph."""
    if isinstance(value, Tensor):
        return torch.full(shape(value), torch.nan, dtype=torch.float64, device=value.device)
    return tuple(map(_varying, value)) if isinstance(value, list | tuple) else None
