"""What the layers of a graph have for each index of a space, as decompose.py wants it: rows of weights, and BatchNorms."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from neuron_merging.decompose import BatchNorm, Neurons
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.axes import Leaf
from neuron_merging.graph.export import Network
from neuron_merging.graph.spaces import Space
from neuron_merging.graph.units import LAYERS, TRANSPOSED, Place, norm_behind, operation

BIASES = dict.fromkeys(LAYERS, (0, 1, 2)) | dict.fromkeys(TRANSPOSED, (1, 1, 2)) | {"addmm": (1, 2, 0)}
"""By operation the axis of its weight along which its bias is, and which arguments the two are."""
ROUNDING = torch.finfo(torch.float32).eps  # a γ below this share of the largest in its layer counts as 0


def read(network: Network, space: Space) -> Neurons:
    """The neurons of a space that is a unit, in float64. Raises NeuronMergingError if a weight is NaN or infinite."""
    unit, (writer,) = space.unit, space.writers
    norm = None if unit.bn is None else norm_behind(network.users(writer.name)[0])
    layer = neurons(network, writer, space.leaf, norm, relu=unit.relu)
    return layer if unit.only_relu else replace(layer, activation=unit.activate)


def neurons(
    network: Network,
    writer: Place,
    leaf: Leaf,
    norm: fx.Node | None = None,
    channels: Tensor | None = None,
    relu: bool = False,
) -> Neurons:
    """All that a writer has for each index of a space, in float64; without a BatchNorm behind it, the bias is the last column.

    norm: that BatchNorm. channels: which of it are those of the space, if not all. Raises as `read`.
    """
    module = writer.name.rpartition(".")[0]
    where = writer.positions(leaf)
    rows = network.tensor(writer.name).detach().movedim(writer.axis, 0)
    node = bias_of(network, writer)
    bias = None if node is None else network.tensor(network.names[node.target][0]).detach()
    check_finite(module, rows, *([] if bias is None else [bias]))
    if where.shape[1] > 1 or not torch.equal(where.flatten(), torch.arange(len(rows), device="cpu")):
        rows = rows[where.to(rows.device)]
        bias = None if bias is None else bias[where.to(bias.device)]
    W = rows.reshape(len(rows), -1).double()
    if norm is not None:
        bn = batchnorm(network, norm, channels)
        check_finite(norm.args[3].target.rpartition(".")[0], bn.gamma, bn.beta, bn.mu, bn.var)
        return Neurons(W, bn if bias is None else replace(bn, mu=bn.mu - bias.double()), relu)
    if bias is None:
        return Neurons(W, None, relu)
    return Neurons(torch.cat([W, bias.reshape(len(W), -1).double()], 1), None, relu, biased=True)


def rows(network: Network, place: Place, leaf: Leaf) -> Tensor:
    """What a parameter or buffer has for each index of a space, in float64: [N, numbers]."""
    tensor = network.tensor(place.name).detach().movedim(place.axis, 0)
    return tensor[place.positions(leaf).to(tensor.device)].flatten(1).double()


def bias_of(network: Network, writer: Place) -> fx.Node | None:
    """Where the graph gets the bias that goes with a writer's weight; None if there is none."""
    for call in network.users(writer.name):
        axis, weight, bias = BIASES.get(operation(call), (None, 0, 0))
        if axis != writer.axis or call.args[weight].target not in network.names[writer.name]:
            continue
        node = call.args[bias] if bias < len(call.args) else None
        if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in network.names:
            return node
    return None


def batchnorm(network: Network, node: fx.Node, channels: Tensor | None = None) -> BatchNorm:
    """The numbers of the BatchNorm at `node`, for some channels or all, in float64.

    A γ below float32's rounding of the largest counts as 0: weight decay leaves such values in dead neurons, and dividing by
    them makes no sense.
    """
    part = slice(None) if channels is None else channels.to(network.tensor(node.args[3].target).device)
    weight, bias, mean, var = (None if s is None else numbers(network, s)[part] for s in node.args[1:5])
    gamma = torch.ones_like(mean) if weight is None else weight
    gamma = gamma.where(gamma.abs() > ROUNDING * gamma.abs().amax(), 0)
    return BatchNorm(gamma, torch.zeros_like(mean) if bias is None else bias, mean, var, node.args[7])


def numbers(network: Network, node: fx.Node) -> Tensor:
    """A parameter or buffer at a get_attr node, in float64."""
    return network.tensor(network.names[node.target][0]).detach().double()


def check_finite(name: str, *values: Tensor) -> None:
    """Raises NeuronMergingError where a value of the layer `name` is NaN or infinite."""
    if not sum(x.sum() for x in values).isfinite() and not all(x.isfinite().all() for x in values):  # sums are quick
        raise NeuronMergingError(f"{name} has weights that are NaN or infinite")
