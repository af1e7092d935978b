"""Which neurons of a network can be pruned: found by tracing it with torch.fx, never by a table of architectures.

A unit is a convolution or linear layer whose output reaches exactly one consumer, another such layer, through
operations that act on every neuron by itself and let a positive scale pass: BatchNorm right behind the layer (whose
form the paper gives for convolutions), ReLU, max and average pooling, dropout, flatten. Whatever else happens to the
output (a residual sum, a second consumer, an operation that is not in this file) leaves the layer out, with a reason.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from errors import NeuronMergingError


@dataclass(frozen=True)
class Unit:
    """Neurons that can be pruned, by module name: `layer` → `bn` → … → `next` → `next_bn`.

    `relu`: the neurons are rectified on their way. `next_bn`: the BatchNorm that reads nothing but `next`, if any.
    """

    layer: str
    bn: str | None
    relu: bool
    next: str
    next_bn: str | None


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RELU = {nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
DROPOUT = {
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    nn.Identity,
}
FLATTEN = {nn.Flatten, torch.flatten, "flatten"}
VIEW = {"view", "reshape", torch.reshape}
SHAPE = {"size", "dim", "numel"}  # questions about a tensor that do not read its values
_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
POOL = {getattr(F, f"{kind}{d}d") for kind in _POOLS for d in (1, 2, 3)} | {
    getattr(nn, f"{''.join(part.title() for part in kind.split('_'))}{d}d") for kind in _POOLS for d in (1, 2, 3)
}  # F.max_pool2d and its like, nn.MaxPool2d and its like
_TORCH_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "adaptive_avg_pool1d")
POOL |= {getattr(torch, name) for name in _TORCH_POOLS}


def units(model: nn.Module) -> list[Unit]:
    """The prunable units in the order of the forward pass. Raises NeuronMergingError where torch.fx cannot trace `model`."""
    return survey(model)[0]


def survey(model: nn.Module) -> tuple[list[Unit], dict[str, str]]:
    """The units, and for every other convolution and linear layer the reason why it is none.

    Raises NeuronMergingError where torch.fx cannot trace `model`.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward(), which can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NeuronMergingError(f"{type(model).__name__} cannot be traced by torch.fx: {reason}") from error
    network = _Graph(model, graph)
    found, left_out = [], {}
    for node in graph.nodes:
        if isinstance(network.module(node), (*CONVS, nn.Linear)):
            try:
                found.append(_unit(network, node))
            except _NotAUnit as reason:
                left_out[node.target] = str(reason)
    return found, left_out


class _NotAUnit(Exception):
    """Why a layer is left out."""


class _Graph:
    """The traced graph with what has to be known of its modules."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules())
        called = [self.modules[n.target] for n in graph.nodes if n.op == "call_module"]
        self.calls = {module: called.count(module) for module in set(called)}
        owners: dict[nn.Parameter, set[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(module)
        self.tied = {module for modules in owners.values() if len(modules) > 1 for module in modules}
        for node in graph.nodes:  # parameters that the forward pass reads by name as well
            if node.op == "get_attr" and "." in node.target:
                self.tied.add(self.modules.get(node.target.rpartition(".")[0]))

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def kind(self, node: fx.Node) -> Any:
        """What a node does: the class of its module, the function, or the name of the method."""
        return type(self.module(node)) if node.op == "call_module" else node.target

    def own(self, node: fx.Node) -> nn.Module:
        """The module of a node whose weights may be rewritten. Raises _NotAUnit where something else depends on them."""
        module = self.module(node)
        if self.calls[module] > 1:
            raise _NotAUnit(f"{node.target} is used {self.calls[module]} times")
        if module in self.tied:
            raise _NotAUnit(f"{node.target} shares its weights")
        if parametrize.is_parametrized(module) or module._forward_pre_hooks or module._forward_hooks:
            raise _NotAUnit(f"{node.target} has parametrized weights or hooks")
        return module

    def reader(self, node: fx.Node) -> fx.Node:
        """The one node that reads the values of `node`. Raises _NotAUnit where there are several."""
        readers = [user for user in node.users if not _asks_shape(user)]
        if len(readers) != 1:
            raise _NotAUnit(f"its output is read {len(readers)} times")
        return readers[0]


def _unit(network: _Graph, node: fx.Node) -> Unit:
    """Follow the output of the layer at `node` to its consumer. Raises _NotAUnit on the way."""
    layer = network.own(node)
    is_conv = isinstance(layer, CONVS)
    if is_conv and layer.groups > 1:
        raise _NotAUnit("it is a grouped convolution")
    neurons = layer.weight.shape[0]
    name, bn, relu, flat = node.target, None, False, False
    while True:
        before, node = node, network.reader(node)
        kind = network.kind(node)
        if kind in NORMS and before.target == name and is_conv:
            norm = network.own(node)
            if norm.running_mean is None:
                raise _NotAUnit(f"{node.target} keeps no running statistics")
            bn = node.target
        elif kind in RELU:
            relu = True
        elif kind in DROPOUT or (kind in POOL and is_conv and not flat and not _returns_indices(network, node)):
            pass
        elif is_conv and not flat and _flattens(network, node, kind):
            flat = True
        elif isinstance(network.module(node), (*CONVS, nn.Linear)) and node.args[:1] == (before,):
            consumer = network.own(node)
            break
        else:
            raise _NotAUnit(_obstacle(network, node))
    if isinstance(consumer, CONVS):
        if not is_conv or flat or consumer.groups > 1 or consumer.in_channels != neurons:
            raise _NotAUnit(f"{node.target} does not read its neurons as channels of a plain convolution")
    elif is_conv and not flat:
        raise _NotAUnit(f"{node.target} reads it without a flatten")
    elif consumer.in_features % neurons or (not is_conv and consumer.in_features != neurons):
        raise _NotAUnit(f"{node.target} has {consumer.in_features} inputs for {neurons} neurons")
    return Unit(name, bn, relu, node.target, _next_norm(network, node))


def _next_norm(network: _Graph, node: fx.Node) -> str | None:
    """The BatchNorm that is all that reads the consumer at `node`, and may be rewritten."""
    try:
        reader = network.reader(node)
        if network.kind(reader) in NORMS and network.own(reader).running_mean is not None:
            normalises_channels = isinstance(network.module(node), CONVS)
            return reader.target if normalises_channels else None
    except _NotAUnit:
        pass
    return None


def _flattens(network: _Graph, node: fx.Node, kind: Any) -> bool:
    """[B, N, …] → [B, N·k]: flatten from dimension 1 on, or a view whose first size is the batch's and whose second is −1."""
    if kind is nn.Flatten:
        module = network.module(node)
        return (module.start_dim, module.end_dim) == (1, -1)
    if kind in FLATTEN:
        dims = [*node.args[1:], *node.kwargs.values()]
        return dims in ([1], [1, -1])
    if kind in VIEW:
        sizes = node.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        return len(sizes) == 2 and sizes[1] == -1 and isinstance(sizes[0], fx.Node) and _is_batch_size(sizes[0])
    return False


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), x.size()[0] or x.shape[0]."""
    if node.target == "size":
        return node.args[1:] == (0,)
    return getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0 and _asks_shape(node.args[0])


def _asks_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SHAPE
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")
    )


def _returns_indices(network: _Graph, node: fx.Node) -> bool:
    return bool(getattr(network.module(node), "return_indices", node.kwargs.get("return_indices", False)))


def _obstacle(network: _Graph, node: fx.Node) -> str:
    if node.op == "output":
        return "its output is an output of the network"
    kind = network.kind(node)
    what = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return f"its output goes through {what}" + (f" ({node.target})" if node.op == "call_module" else "")
