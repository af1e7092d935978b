"""Which spaces are the paper's: one layer writes, one reads, and what is between lets a positive factor pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor, fx

from neuron_merging.graph.axes import Axis, Leaf, leaves, positions
from neuron_merging.graph.propagate import Analysis, tensors
from neuron_merging.graph.rules import operation

CONVS = {"conv1d", "conv2d", "conv3d"}
LAYERS = {"linear", *CONVS}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)}
VIEWS = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone", "to", "alias", "detach"}
DROPOUT = {"dropout", "feature_dropout"}
HOMOGENEOUS = {"relu", "leaky_relu"}  # activations that a positive factor passes
ACTIVATIONS = {"hardtanh", "relu6", "gelu", "silu", "mish", "hardswish", "elu", "selu", "celu", "softplus", "softsign",
               "hardsigmoid", "log_sigmoid", "sigmoid", "tanh"}  # fmt: skip


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
    """The paper's `layer` → `bn` → … → `next` → `next_bn`, by module name.

    relu: its neurons are rectified on their way. next_bn: the BatchNorm directly after the convolution `next`, if it alone
    reads that. activation: one on the way that a positive scale does not pass, by name. branch: what `next` gives is added to
    something: without neurons it would be a constant. functions: the activations on the way, ReLU too, as they are applied;
    only_relu: there are no others.
    """

    layer: str
    bn: str | None
    relu: bool
    next: str
    next_bn: str | None = None
    activation: str | None = None
    branch: bool = False
    only_relu: bool = True
    functions: tuple[Callable[[Tensor], Tensor], ...] = field(default=(), compare=False, repr=False)

    def activate(self, z: Tensor) -> Tensor:
        """What becomes of the neurons' values z [N], behind the BatchNorm, on their way to `next`."""
        for function in self.functions:
            z = function(z.clone())
        return z


def find_unit(
    analysis: Analysis, leaf: Leaf, writers: Sequence[Place], readers: Sequence[Place]
) -> tuple[Unit | None, str | None]:
    """The paper's unit that a space is, if it is one, and why it is none, or why merging cannot pass."""
    if len(writers) != 1 or len(readers) != 1:
        return None, f"it is written {len(writers)} times and read {len(readers)} times"
    start, end = plain_layer(analysis, writers[0].name), plain_layer(analysis, readers[0].name)
    if start is None or end is None:
        return None, "it is not written and read by one plain layer each"
    bn, activation, node = None, None, start
    functions: list[fx.Node] = []
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None, f"it is used {len(users)} times"
        before, node = node, users[0]
        name = kind(node)
        if node is end:
            break
        if name == "batch_norm" and before is start and operation(start) in CONVS:
            bn = owner(node.args[3]) if has_numbers(node) else None
            if bn is None:
                return None, f"{name} keeps no statistics of its own"
        elif name in HOMOGENEOUS or name in ACTIVATIONS:
            functions.append(node)
            activation = activation or (name if name in ACTIVATIONS else None)
        elif name not in POOLS and name not in VIEWS and name not in DROPOUT:
            return None, f"it goes through {name}"
        elif name.startswith("avg_pool") and len(node.args) > 6 and node.args[6] is not None:  # constants change
            return None, f"it goes through {name} with a divisor of its own"
        if [*tensors(analysis.values.get(node))] and not along_one_axis(analysis, node, leaf):
            return None, "its neurons are along several axes"
    norm = norm_behind(end)
    unit = Unit(
        owner(start.args[1]), bn, "relu" in map(kind, functions), owner(end.args[1]), norm and owner(norm.args[3]),
        activation, addition(end) is not None, {*map(kind, functions)} <= {"relu"}, tuple(map(_as_function, functions)),
    )  # fmt: skip
    return unit, f"{activation} is not positively homogeneous" if activation else None


def kind(node: fx.Node) -> str:
    """The name of what a node does, whether or not it overwrites its input."""
    return operation(node).removesuffix("_")


def plain_layer(analysis: Analysis, weight: str, grouped: bool = False, kinds: Set[str] = LAYERS) -> fx.Node | None:
    """The call of the one convolution or linear layer of these kinds with this weight. grouped: whether it may have groups."""
    calls = analysis.network.users(weight)
    if len(calls) != 1 or operation(calls[0]) not in kinds or not _is(calls[0].args[1], weight, analysis):
        return None
    return calls[0] if grouped or groups(calls[0]) == 1 else None


def _is(node: fx.Node, name: str, analysis: Analysis) -> bool:
    return node.op == "get_attr" and node.target in analysis.network.names[name]


def groups(node: fx.Node) -> int:
    """Of a convolution; 1 of a linear layer."""
    return node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)


def owner(node: fx.Node | None) -> str | None:
    """The module that a parameter belongs to."""
    return node.target.rpartition(".")[0] if isinstance(node, fx.Node) and node.op == "get_attr" else None


def along_one_axis(analysis: Analysis, node: fx.Node, leaf: Leaf) -> bool:
    """Whether a node's value is one tensor, and the leaf is on one of its axes only."""
    value = analysis.values[node]
    return isinstance(value, list) and sum(leaf in set(leaves(axis)) for axis in value) == 1


def norm_behind(node: fx.Node) -> fx.Node | None:
    """The BatchNorm that is all that reads the output of the convolution at `node`, if it has running statistics of its own."""
    users = list(node.users)
    reads = len(users) == 1 and kind(users[0]) == "batch_norm" and users[0].args[0] is node
    if not reads or operation(node) not in CONVS or not has_numbers(users[0]):
        return None
    same = node.graph.find_nodes(op="get_attr", target=users[0].args[3].target)
    return users[0] if sum(len(other.users) for other in same) == 1 else None


def has_numbers(norm: fx.Node) -> bool:
    """Whether the BatchNorm at a node has running statistics, and these, γ and β are no results of a computation."""
    plain = all(source is None or source.op == "get_attr" for source in norm.args[1:5])
    return plain and norm.args[3] is not None


def addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Where the output of the layer at `node`, behind its BatchNorm, is added to something: the summand, and the sum."""
    norm = norm_behind(node)
    while len(node.users) == 1:
        before, (node,) = node, node.users
        if node is norm or kind(node) in DROPOUT:
            continue
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if kind(node) == "add" and len(node.args) == len(operands) == 2 and not node.kwargs:
            return before, node
        break
    return None


def _as_function(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """What an elementwise node of one input does."""
    return lambda z: node.target(z, *node.args[1:], **node.kwargs)
