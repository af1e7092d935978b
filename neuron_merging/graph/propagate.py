"""Axes of every value in a network's graph, found by going through it once with the rules."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx

from neuron_merging.errors import reason
from neuron_merging.graph import layers, views  # noqa: F401  (they register their rules)
from neuron_merging.graph.axes import free, freeze
from neuron_merging.graph.export import Network, shape
from neuron_merging.graph.rules import Axes, Call, Rewrite, Role, Value, find_rule, fresh, operation

Sources = frozenset[str]
INPUT: Sources = frozenset()  # of a value that depends on the network's input


@dataclass
class Analysis:
    """What is known of a network's graph.

    values: the axes of every node's value. sources: the parameters that a node is computed from, where it does not depend on
    the input. parameters: the axes of every parameter and buffer that is used, by its first name. roles: which parameters are
    "writer", "reader" or "follower" along an axis. rewrites: how a node's arguments follow the widths.
    """

    network: Network
    values: dict[fx.Node, Value] = field(default_factory=dict)
    sources: dict[fx.Node, Sources] = field(default_factory=dict)
    parameters: dict[str, Axes] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    rewrites: dict[fx.Node, list[Rewrite]] = field(default_factory=dict)


def propagate(network: Network) -> Analysis:
    """Go through the graph with the rules."""
    found = Analysis(network)
    for node in network.graph.graph.nodes:
        if node.op == "get_attr" and node.users:
            _add_parameter(found, node)
        elif node.op == "placeholder":
            found.values[node] = fresh(node.meta.get("val"))
            found.sources[node] = INPUT
        elif node.op == "output":
            for source in node.all_input_nodes:
                for axes in tensors(found.values.get(source)):
                    for axis in axes:
                        freeze(axis, "it is an output of the network")
        elif node.op == "call_function":
            _add_call(found, node)
    return found


def tensors(value: Value) -> Iterator[Axes]:
    """The axes of every tensor in a value."""
    if isinstance(value, list):
        yield value
    else:
        for part in value or ():
            yield from tensors(part)


def _add_parameter(found: Analysis, node: fx.Node) -> None:
    names = found.network.names.get(node.target)
    value = node.meta.get("val")
    if names is None:  # a constant that forward() makes, or a part of the graph
        found.values[node] = fresh(value)
        return
    if names[0] not in found.parameters:
        found.parameters[names[0]] = [free(size) for size in found.network.tensor(names[0]).shape]
    found.values[node] = found.parameters[names[0]]
    found.sources[node] = frozenset([names[0]])


def _add_call(found: Analysis, node: fx.Node) -> None:
    inputs = [found.sources[source] for source in node.all_input_nodes if source in found.sources]
    if inputs:
        found.sources[node] = frozenset().union(*inputs) if all(inputs) else INPUT
    if node.target is operator.getitem:
        value = found.values.get(node.args[0])
        found.values[node] = value[node.args[1]] if isinstance(value, tuple) else fresh(node.meta.get("val"))
        return
    value = node.meta.get("val")
    if not isinstance(value, Tensor | list | tuple):
        found.sources.pop(node, None)
        return  # sizes and checks
    call = Call(node, found.values, found.sources)
    try:
        found.values[node] = checked(find_rule(node)(call), node)
        found.roles += call.roles
        found.rewrites[node] = call.rewrites
    except Exception as error:  # an operation in a form that its rule does not know
        for axes in (axes for source in node.all_input_nodes for axes in tensors(found.values.get(source))):
            for axis in axes:
                freeze(axis, f"it goes through {call.where} in a form unknown to its rule ({reason(error)})")
        found.values[node] = fresh(value)


def checked(value: Value, node: fx.Node) -> Value:
    """The value. Raises ValueError where its sizes are not those that the graph has: the rule is wrong."""
    meta = node.meta["val"]
    pairs = [(value, meta)] if isinstance(meta, Tensor) else zip(value, meta)
    for axes, expected in pairs:
        if isinstance(expected, Tensor) and [axis.size for axis in axes] != shape(expected):
            raise ValueError(f"{operation(node)}: {axes} is not {shape(expected)}")
    return value
