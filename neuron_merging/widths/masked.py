"""Parameters that read a space, but are no plain layers (ours): recurrent ones, grouped convolutions, tied embeddings.

Nothing stands in for what is dropped there: these parameters have zeros instead. Their error is estimated as the energy of the
values that are dropped times that of the weights that read them, as if values were independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from neuron_merging.graph.axes import Axis, Leaf, leaves, positions
from neuron_merging.graph.spaces import Place, Space, Survey
from neuron_merging.graph.walk import Walk


@dataclass(frozen=True)
class Zeroed:
    """Parameters without what they have for the dropped indices of a space, of which k are kept."""

    k: int
    places: tuple[Place, ...]
    leaf: Leaf
    dropped: Tensor

    def put(self, tensor: Tensor, place: Place) -> Tensor:
        """The parameter with zeros."""
        where = place.positions(self.leaf)[self.dropped.cpu()].flatten()
        return tensor.index_fill(place.axis, where.to(tensor.device), 0)


class Energy:
    """How much of a layer's output each index of a space makes, all by itself: `energies` [N], summed over calls."""

    def __init__(self, survey: Survey, space: Space, places: tuple[Place, ...]) -> None:
        self.survey, self.space, self.places = survey, space, places
        self.energies = torch.zeros(space.size, dtype=torch.float64, device="cpu")
        self.called = [(node, place) for place in places for node in calls(survey, place)]

    @property
    def nodes(self) -> list[fx.Node]:
        """Where it is looked at."""
        return list(dict.fromkeys(node for node, _ in self.called))

    @property
    def variance(self) -> float:
        """The energy of all indices together."""
        return float(self.energies.sum())

    def look(self, walk: Walk, node: fx.Node) -> None:
        """Measure the values that a call takes, or, if it writes the space only, gives; the walk has come to it."""
        for place in (place for called, place in self.called if called is node):
            self._add(walk, node, place)

    def _add(self, walk: Walk, node: fx.Node, place: Place) -> None:
        axes = self.survey.analysis.values
        leaf = self.space.leaf
        learned = self.survey.analysis.sources
        sources = [*[source for source in node.all_input_nodes if not learned.get(source)], node]
        seen = next(((s, d) for s in sources for d in _dims(axes.get(s), leaf)), None)
        energy = torch.ones_like(self.energies) if seen is None else _energy(walk.values[seen[0]], *seen, axes, leaf)
        if place in self.space.readers or seen is None or seen[0] is not node:
            weight = self.survey.network.tensor(place.name).detach()
            rows = weight.double().movedim(place.axis, 0)[place.positions(leaf).to(weight.device)]
            energy = energy * rows.pow(2).flatten(1).sum(1).to(energy)
        self.energies += energy

    def curve(self, order: Tensor, measured: Sequence[int]) -> tuple[np.ndarray, list[Zeroed]]:
        """E(k) for all k, and the parameters at `measured`."""
        error = self.energies[order.cpu()].flip(0).cumsum(0).flip(0).numpy()
        return np.append(error, 0.0), [self.form(order, k) for k in measured]

    def form(self, order: Tensor, k: int) -> Zeroed:
        """The parameters when the first k of an order are kept."""
        return Zeroed(k, self.places, self.space.leaf, order[k:].cpu())


def calls(survey: Survey, place: Place) -> list[fx.Node]:
    """The operations that take a parameter, or a view of it that they alone take."""
    found = []
    for node in survey.calls(place):
        while node.op == "call_function" and len(node.users) == 1 and len(node.all_input_nodes) == 1:
            (node,) = node.users
        found.append(node)
    return found


def _dims(axes: object, leaf: Leaf) -> list[int]:
    """The dimensions of a value that a space is along."""
    return [d for d, axis in enumerate(axes) if leaf in set(leaves(axis))] if isinstance(axes, list) else []


def _energy(
    values: Sequence[Tensor], node: fx.Node, d: int, axes: dict[fx.Node, list[Axis]], leaf: Leaf
) -> Tensor:  # fmt: skip
    """The mean square [N] of what each index of a space has along dimension d; ones where batches are along it too."""
    axis = axes[node][d]
    if any(value.shape[d] != axis.size for value in values):
        return torch.ones(leaf.size, dtype=torch.float64, device="cpu")
    squares = [value.double().pow(2).movedim(d, 0).flatten(1) for value in values]
    mean = sum(square.sum(1) for square in squares) / sum(square.shape[1] for square in squares)
    return mean.cpu()[positions(axis, leaf)].mean(1)
