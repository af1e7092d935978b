"""Layers that only training calls, such as auxiliary heads: which spaces they read, so that they are cut as well (ours)."""

from __future__ import annotations

from torch import nn

from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.axes import Axis, Leaf, Product, fixed, freeze, leaves, product, resolve, side_by_side
from neuron_merging.graph.export import capture
from neuron_merging.graph.propagate import Analysis, propagate
from neuron_merging.graph.rules import Role

REASON = "training reads its output in another way than evaluation"
NEVER = "the forward pass never calls it in evaluation"


def add_training(analysis: Analysis, inputs: tuple) -> None:
    """Add the parameters that only the forward pass in training mode uses to an analysis, with their axes and roles.

    inputs: positional and keyword arguments. A space that training treats in another way is frozen. If the network cannot be
    exported in training mode, nothing changes.
    """
    network = analysis.network
    if not unused_layers(analysis):
        return
    try:
        trained = propagate(capture(network.model, inputs, training=True))
    except NeuronMergingError:
        return
    same: dict[Leaf, Leaf] = {}
    for name, axes in analysis.parameters.items():
        for own, other in zip(axes, trained.parameters.get(name, [])):
            _match(own, other, same)
    for name in trained.parameters.keys() - analysis.parameters.keys():
        analysis.parameters[name] = [_translated(axis, same) for axis in trained.parameters[name]]
    new = {name for name in trained.parameters if name in analysis.parameters}
    for role in trained.roles:
        for name in role.names & new:
            if role.dim is not None and not any(
                name in known.names for known in analysis.roles if known.dim == role.dim
            ):
                analysis.roles.append(Role(frozenset([name]), role.dim, analysis.parameters[name][role.dim], role.role))


def unused_layers(analysis: Analysis) -> list[str]:
    """The modules with weights that the graph never uses."""
    used = {alias for name in analysis.parameters for alias in analysis.network.names[name]}
    return [
        name
        for name, module in analysis.network.model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        and not any(alias.startswith(f"{name}.".lstrip(".")) for alias in used)  # parametrizations too
    ]


def _match(own: Axis, other: Axis, same: dict[Leaf, Leaf]) -> None:
    """Note which leaves of both analyses are the same; freeze those that are not."""
    ours, theirs = list(leaves(own)), list(leaves(other))
    alike = [leaf.size for leaf in ours] == [leaf.size for leaf in theirs]
    for a, b in zip(ours, theirs) if alike else ():
        if b.frozen and not a.frozen:
            a.frozen = REASON
        if same.setdefault(b, a) is not a:
            a.frozen = same[b].frozen = REASON
    if not alike:
        freeze(own, REASON)


def _translated(axis: Axis, same: dict[Leaf, Leaf]) -> Axis:
    """An axis of the analysis in training mode, of the leaves of the other one."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        known = same.get(axis)
        return fixed(axis.size, NEVER) if known is None else known
    if isinstance(axis, Product):
        return product(_translated(factor, same) for factor in axis.factors)
    return side_by_side(_translated(part, same) for part in axis.parts)
