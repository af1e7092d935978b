"""Everything of a network that can be dropped, as spaces: which parameters write, follow and read them, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from neuron_merging.graph.axes import Axis, Leaf, Product, Sum, is_fixed, leaves, resolve, why
from neuron_merging.graph.export import Inputs, Network, capture
from neuron_merging.graph.propagate import Analysis, propagate
from neuron_merging.graph.training import NEVER, add_training, unused_layers
from neuron_merging.graph.units import Place, Unit, find_unit
from neuron_merging.graph.ways import Blocked, Ways, by_leaf, find_ways

FEW = 4  # blocks fewer than these are no good to drop: what is inside of them is dropped


@dataclass(frozen=True, eq=False)
class Space:
    """Indices that can be dropped, by all that write, follow and read them at once.

    notes: what else happens to them: "statistics" (a normalisation or reduction is over them), "product" (activations are
    multiplied and summed along them), "mixed" (they come out of such a product), "recurrent". unit: the paper's layer → next,
    where it is one; not_unit: else why it is none. obstacle: why kept ones cannot take over from dropped ones by merging (None:
    they can). ways: from writers to readers, where it is no unit and has no obstacle. modules: the layers that write it, and
    those that follow with more than a number for each index.
    """

    name: str
    size: int
    leaf: Leaf
    writers: tuple[Place, ...]
    followers: tuple[Place, ...]
    readers: tuple[Place, ...]
    notes: dict[str, str]
    unit: Unit | None
    not_unit: str | None
    ways: Ways | None
    obstacle: str | None
    modules: tuple[str, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """All of them."""
        return self.writers + self.followers + self.readers

    @property
    def layer(self) -> str:
        """The module that it is called after."""
        return self.name


@dataclass(frozen=True)
class Survey:
    """The spaces of a network, in the order in which it writes them.

    left_out: other layers, by module name, and why nothing of them can be dropped. unused: parameters that the graph lacks.
    """

    spaces: tuple[Space, ...]
    left_out: dict[str, str]
    unused: tuple[str, ...]
    network: Network
    analysis: Analysis

    def calls(self, place: Place) -> list[fx.Node]:
        """The operations of the graph that take this parameter, as it is."""
        return self.network.users(place.name)


def find_spaces(model: nn.Module, example_inputs: Inputs) -> Survey:
    """The spaces of a network that is called with these inputs; the network itself is left as it is.

    Raises NeuronMergingError where it cannot be exported.
    """
    network = capture(model, example_inputs)
    analysis = propagate(network)
    add_training(analysis, network.args or network.kwargs)
    _choose_among_nested(analysis)
    roles = _roles(analysis)
    found: dict[Leaf, list[tuple[str, Place]]] = {}
    for name, axes in analysis.parameters.items():
        for d, axis in enumerate(axes):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf.frozen is None and leaf.size > 1:
                    role = roles.get((name, leaf), {}).get(d, "follower")
                    found.setdefault(leaf, []).append((role, Place(name, d, resolve(axis))))
    nodes = by_leaf(analysis)
    order = _order(analysis)
    spaces = [
        _space(analysis, leaf, places, nodes[leaf])
        for leaf, places in found.items()
        if {r for r, _ in places} != {"follower"}
    ]
    spaces.sort(key=lambda space: order.get(space.leaf, 0))
    unused = tuple(dict.fromkeys(n[0] for n in network.names.values() if n[0] not in analysis.parameters))
    return Survey(tuple(spaces), _left_out(analysis, spaces), unused, network, analysis)


def _roles(analysis: Analysis) -> dict[tuple[str, Leaf], dict[int, str]]:
    """By parameter and leaf the role of each axis; what both writes and reads along an axis writes."""
    roles: dict[tuple[str, Leaf], dict[int, str]] = {}
    for role in analysis.roles:
        touched = set(leaves(role.axis))
        for name in role.names:
            axes = analysis.parameters[name]
            for d in range(len(axes)) if role.dim is None else [role.dim]:
                for leaf in touched.intersection(leaves(axes[d])):
                    known = roles.setdefault((name, leaf), {})
                    known[d] = min(role.role, known.get(d, role.role), key=("writer", "reader", "follower").index)
    return roles


def _products(axis: Axis) -> Iterator[Product]:
    axis = resolve(axis)
    if isinstance(axis, Product):
        yield axis
    for part in axis.factors if isinstance(axis, Product) else axis.parts if isinstance(axis, Sum) else ():
        yield from _products(part)


def _choose_among_nested(analysis: Analysis) -> None:
    """Of spaces inside one another (heads · what is in a head, groups · channels of one) one is dropped, the others stay."""
    for axes in analysis.parameters.values():
        for whole in (product for axis in axes for product in _products(axis)):
            nested = [[leaf for leaf in leaves(f) if leaf.frozen is None and leaf.size > 1] for f in whole.factors]
            nested = [(place, inside) for place, inside in enumerate(nested) if inside]
            if len(nested) > 1:
                _, best = min(nested, key=lambda item: _preference(*item))
                for leaf in (leaf for _, inside in nested if inside is not best for leaf in inside):
                    leaf.frozen = "it is inside of, or around, what is dropped instead"


def _preference(place: int, inside: list[Leaf]) -> tuple[bool, bool, int]:
    """Whole heads and groups rather than what is in them, unless they are few; nothing that a normalisation is over."""
    noted = any(leaf.notes.keys() & {"statistics", "product", "mixed"} for leaf in inside)
    return noted, sum(leaf.size for leaf in inside) < FEW, place


def _order(analysis: Analysis) -> dict[Leaf, int]:
    """When the graph first gives a value along a leaf."""
    order: dict[Leaf, int] = {}
    for i, (node, value) in enumerate(analysis.values.items()):
        if isinstance(value, list) and node.op == "call_function":
            for leaf in (leaf for axis in value for leaf in leaves(axis)):
                order.setdefault(leaf, i)
    return order


def _space(analysis: Analysis, leaf: Leaf, places: list[tuple[str, Place]], nodes: list[fx.Node]) -> Space:
    writers, followers, readers = (
        tuple(place for role, place in places if role == kind) for kind in ("writer", "follower", "reader")
    )
    unit, why = find_unit(analysis, leaf, writers, readers)
    ways, not_unit, obstacle = None, None, why
    if unit is None:
        not_unit, obstacle = why, None
        try:
            ways = find_ways(analysis, leaf, nodes, writers, readers)
        except Blocked as blocked:
            obstacle = str(blocked)
    first = (writers or followers or readers)[0]
    name = first.name.rpartition(".")[0] or first.name
    own = [place for place in writers + followers if place in writers or analysis.network.tensor(place.name).ndim > 1]
    modules = tuple(dict.fromkeys(place.name.rpartition(".")[0] or place.name for place in own))
    return Space(
        name, leaf.size, leaf, writers, followers, readers, leaf.notes, unit, not_unit, ways, obstacle, modules
    )


def _left_out(analysis: Analysis, spaces: list[Space]) -> dict[str, str]:
    used = {place.name for space in spaces for place in space.writers}
    left_out: dict[str, str] = {}
    for role in analysis.roles:
        for name in role.names - used if role.role == "writer" and is_fixed(role.axis) else ():
            if role.axis.size > 1:
                left_out.setdefault(name.rpartition(".")[0] or name, why(role.axis))
            elif role.dim is not None and analysis.network.tensor(name).shape[role.dim] == 1:
                left_out.setdefault(name.rpartition(".")[0] or name, "it has one neuron only")
    return left_out | dict.fromkeys(unused_layers(analysis), NEVER)
