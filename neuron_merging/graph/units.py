"""Which spaces are the paper's: one layer writes, one reads, and what is between lets a positive factor pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from neuron_merging.graph.axes import Axis, Leaf, leaves, positions
from neuron_merging.graph.propagate import Analysis, tensors
from neuron_merging.graph.rules import operation

LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)}
VIEWS = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone", "to", "alias", "detach"}
DROPOUT = {"dropout", "feature_dropout"}
HOMOGENEOUS = {"relu", "leaky_relu", *POOLS, *VIEWS, *DROPOUT}
ACTIVATIONS = {"leaky_relu", "hardtanh", "relu6", "gelu", "silu", "mish", "hardswish", "elu", "selu", "celu", "softplus",
               "softsign", "hardsigmoid", "log_sigmoid", "sigmoid", "tanh"}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """An axis of a parameter or buffer, and how it is made up of spaces."""

    name: str
    axis: int
    layout: Axis

    def positions(self, leaf: Leaf) -> Tensor:
        """Where each index of a space, by its leaf, is on this axis: int64 [size, n]."""
        return positions(self.layout, leaf)


@dataclass(frozen=True)
class Unit:
    """The paper's `layer` → `bn` → … → `next`, by module name.

    relu: its neurons are rectified on their way. activation: one on the way that a positive scale does not pass, by name.
    """

    layer: str
    bn: str | None
    next: str
    relu: bool
    activation: str | None


def find_unit(
    analysis: Analysis, leaf: Leaf, writers: Sequence[Place], followers: Sequence[Place], readers: Sequence[Place]
) -> tuple[Unit | None, str | None]:
    """The paper's unit that a space is, if it is one, and why merging cannot pass, if it cannot."""
    if len(writers) != 1 or len(readers) != 1:
        return None, f"it is written {len(writers)} times and read {len(readers)} times"
    start, end = _layer(analysis, writers[0].name), _layer(analysis, readers[0].name)
    if start is None or end is None:
        return None, "it is not written and read by one plain layer each"
    bn, relu, activation, node = None, False, None, start
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None, f"it is used {len(users)} times"
        before, node = node, users[0]
        name = operation(node).removesuffix("_")
        if node is end:
            break
        if name == "batch_norm" and before is start and operation(start) != "linear":
            bn = _owner(analysis, node.args[3] or node.args[1])
            if bn is None:
                return None, f"{name} keeps no statistics of its own"
        elif name == "relu":
            relu = True
        elif name in ACTIVATIONS:
            activation = activation or name
        elif name not in HOMOGENEOUS:
            return None, f"it goes through {name}"
        if [*tensors(analysis.values.get(node))] and not _along_one_axis(analysis, node, leaf):
            return None, "its neurons are along several axes"
    unit = Unit(_owner(analysis, start.args[1]), bn, _owner(analysis, end.args[1]), relu, activation)
    return unit, f"{activation} is not positively homogeneous" if activation else None


def _layer(analysis: Analysis, weight: str) -> fx.Node | None:
    """The one plain convolution or linear layer with this weight."""
    nodes = [n for n in analysis.values if n.op == "get_attr" and n.target in analysis.network.names[weight]]
    calls = [user for node in nodes for user in node.users]
    if len(calls) != 1 or operation(calls[0]) not in LAYERS or calls[0].args[1] not in nodes:
        return None
    groups = calls[0].args[6] if len(calls[0].args) > 6 else calls[0].kwargs.get("groups", 1)
    return calls[0] if groups == 1 else None


def _owner(analysis: Analysis, node: fx.Node | None) -> str | None:
    """The module that a parameter belongs to."""
    return node.target.rpartition(".")[0] if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _along_one_axis(analysis: Analysis, node: fx.Node, leaf: Leaf) -> bool:
    value = analysis.values[node]
    return isinstance(value, list) and sum(leaf in set(leaves(axis)) for axis in value) == 1
