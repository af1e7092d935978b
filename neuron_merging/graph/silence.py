"""Dropping whole residual blocks (ours): a branch without neurons only adds a constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.units import CONVS as NAMES
from neuron_merging.graph.units import Unit, addition, norm_behind, operation, plain_layer
from neuron_merging.running import CONVS, NORMS


class _Sized(nn.Module):
    """Replaces a convolution or linear layer; its outputs have the same spatial size."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.sides = ()  # (padding, reach of the kernel, stride) by dimension; none for a linear layer
        if isinstance(layer, CONVS):
            padding = layer._reversed_padding_repeated_twice[::-1]
            reach = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size))
            self.sides = tuple(zip(map(sum, zip(padding[::2], padding[1::2])), reach, layer.stride))

    def filled(self, value: Tensor, x: Tensor) -> Tensor:
        """`value` [M] for every sample and output position of the layer on x: [B, M, …], or [B, …, M] of a linear layer."""
        if not self.sides:
            return value + torch.zeros_like(x[..., :1])
        out = [(x.shape[i] + pad - reach) // stride + 1 for i, (pad, reach, stride) in enumerate(self.sides, start=2)]
        return value.view(1, -1, *[1] * len(out)).expand(x.shape[0], -1, *out).clone()


class Silence(_Sized):
    """Replaces a layer that has no neurons left. It gives a single channel of zeros, so that the layers behind it can run."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, …] → [B, 1, …], or [B, …, 1]"""
        return self.filled(torch.zeros(1, dtype=x.dtype, device=x.device), x)


class Constant(_Sized):
    """Replaces the consumer of a layer that has no neurons left: gives `value` [M] at every position."""

    def __init__(self, layer: nn.Module, value: Tensor) -> None:
        super().__init__(layer)
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, …] → [B, M, …], or [B, …, M]"""
        return self.filled(self.value, x)


def silent_value(survey: Survey, space: Space) -> Tensor:
    """What the branch of a unit gives when all its neurons are 0, [M]."""
    network = survey.network
    node = plain_layer(survey.analysis, space.readers[0].name)

    def tensor(source: fx.Node | None) -> Tensor | None:
        return None if source is None else network.tensor(network.names[source.target][0]).detach()

    weight, bias = tensor(node.args[1]), tensor(node.args[2] if len(node.args) > 2 else None)
    constant = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    norm = norm_behind(node)
    if norm is not None:
        gamma, beta, mean, var = map(tensor, norm.args[1:5])
        constant = F.batch_norm(constant[None], mean, var, gamma, beta, eps=norm.args[7])[0]
    return constant


def silence(model: nn.Module, unit: Unit, constant: Tensor) -> None:
    """Replace a unit's branch by a constant [M]. Changes `model`."""
    for name in filter(None, (unit.bn, unit.next_bn)):
        put_module(model, name, nn.Identity())
    consumer = model.get_submodule(unit.next)
    put_module(model, unit.layer, Silence(model.get_submodule(unit.layer)))
    put_module(model, unit.next, Constant(consumer, constant.clone()))


def silence_graph(
    graph: fx.GraphModule, survey: Survey, space: Space, copies: dict[fx.Node, fx.Node], constant: Tensor
) -> None:
    """Replace a unit's branch in a copy of the graph; what only the branch needed is erased from it and from `copies`."""
    node = plain_layer(survey.analysis, space.readers[0].name)
    branch, total = (copies[place] for place in addition(node))
    path = node.args[1].target.rpartition(".")[0]
    graph.get_submodule(path).value = nn.Parameter(constant.clone())
    sides = node.meta["val"].ndim - 2 if operation(node) in NAMES else 0
    with graph.graph.inserting_before(total):
        own = graph.graph.get_attr(f"{path}.value")
        total.replace_input_with(
            branch, graph.graph.call_function(torch.ops.aten.reshape.default, (own, [-1, *[1] * sides]))
        )
    gone = _erased(graph.graph, [branch])
    for target in {node.target for node in gone if node.op == "get_attr"}:
        if not graph.graph.find_nodes(op="get_attr", target=target):
            path, _, attribute = target.rpartition(".")
            delattr(graph.get_submodule(path), attribute)
    for old in [old for old, new in copies.items() if new in gone]:
        del copies[old]


def _erased(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Erase nodes that nobody reads, and those that are not read then."""
    waiting, gone = list(nodes), set()
    while waiting:
        node = waiting.pop()
        if not node.users and node.op != "placeholder" and node not in gone:
            sources = node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)
            waiting += sources
    return gone


def leave_out(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace the branches that a file with these weights has as constants, `<layer>.value`. Changes `model`."""
    for name, module in list(model.named_modules()):
        if not name or not isinstance(module, (*CONVS, *NORMS, nn.Linear)):
            continue
        if f"{name}.value" in weights:
            put_module(model, name, Constant(module, weights[f"{name}.value"].clone()))
        elif module.state_dict() and not any(f"{name}.{own}" in weights for own in module.state_dict()):
            put_module(model, name, nn.Identity() if isinstance(module, NORMS) else Silence(module))


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`, under every other name that it has in `model` too."""
    old = model.get_submodule(name)
    for known_as, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(known_as, new)
