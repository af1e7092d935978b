"""All that reads a space, as it is found in the graph and looked at (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, fx, nn

from neuron_merging.decompose import Decomposition
from neuron_merging.graph.behind import norm_behind, sum_behind
from neuron_merging.graph.spaces import Place, Space, Survey
from neuron_merging.graph.walk import Walk
from neuron_merging.linalg import ENTRIES, POSITIONS
from neuron_merging.restore.readers import Reader, find_reader
from neuron_merging.widths.consumer import Consumer, Thinned, absorbed
from neuron_merging.widths.masked import Energy, calls

Readings = tuple["Layer | Energy", ...]


@dataclass
class Layer:
    """A plain layer, each of whose groups reads a space at the columns [N, taps] of what it sees.

    sum: where its output is added to something else. consumers: one for each group, once it has been looked at. variance: of
    what it gives, behind its BatchNorm, or of the sum; over all neurons together.
    """

    reader: Reader
    columns: Tensor
    sum: fx.Node | None
    consumers: list[Consumer] = field(default_factory=list)
    variance: float = 1.0

    @property
    def nodes(self) -> list[fx.Node]:
        """Where it is looked at."""
        return [self.reader.node]

    def variances(self, y: list[Tensor], slope: Tensor | float = 1.0) -> float:
        """The variances of y, for each batch, summed over the layer's neurons, each times its slope."""
        rows = torch.cat([part.movedim(self.reader.channel(part), -1).flatten(0, -2) for part in y])
        return float((slope**2 * rows.double().var(0, correction=0)).sum())

    def form(self, walk: Walk, k: int, part: Decomposition | None) -> tuple[Reader, tuple[Thinned, ...]]:
        """The layer when it has absorbed a decomposition (None: nothing of the space is kept)."""
        weights = self.reader.matrix(walk.tensor(self.reader.weight_node).double(), self.reader.groups)
        columns = self.columns.to(weights.device)
        made = []
        for W in weights:
            S, kept, c = absorbed(W[:, columns], columns, part)
            made.append(Thinned(k, columns.flatten(), S, kept, c))
        return self.reader, tuple(made)


def find_readings(survey: Survey, space: Space) -> Readings:
    """All that reads a space: plain layers, and parameters that are not of any.

    Where only activations are multiplied along a space, the parameters are those that write it. What both writes and reads it,
    such as a tied embedding, is among them.
    """
    layers: list[Layer] = []
    others = [] if space.readers else [*space.writers, *space.followers]
    others += [place for place in space.writers if space.readers and len(survey.calls(place)) > 1]
    for place in space.readers:
        layer = _layer(survey, space, place)
        if layer is None:
            others.append(place)
        else:
            layers.append(layer)
    others = [place for place in others if isinstance(survey.network.tensor(place.name), nn.Parameter)]
    return (*layers, *([Energy(survey, space, tuple(others))] if others else []))


def _layer(survey: Survey, space: Space, place: Place) -> Layer | None:
    """The plain layer that reads a space at a place; None for others, and where an index of what it sees is of two of them."""
    reader = next((r for node in calls(survey, place) if (r := find_reader(survey, node)) is not None), None)
    if reader is None or place.name != reader.weight or place.axis != reader.inputs:
        return None
    where = place.positions(space.leaf)
    if reader.conv is not None:  # tap by tap
        channels, taps = survey.network.tensor(place.name).shape[1], prod(reader.conv.kernel)
        where = (torch.arange(taps, device="cpu")[None, :, None] * channels + where[:, None]).flatten(1)
    if len(where.unique()) < where.numel():
        return None
    return Layer(reader, where, sum_behind(reader.node))


def look(layers: Sequence[Layer], walk: Walk, ridge: float) -> None:
    """Let consumers see what their layer sees in a walk that has come to it, at the positions that a fit uses.

    layers: one and the same, once for each space that it reads.
    """
    reader = layers[0].reader
    x, y = walk.values[reader.source], walk.values[reader.node]
    slope = torch.ones(y[0].shape[reader.channel(y[0])], dtype=torch.float64, device=y[0].device)
    norm = norm_behind(reader.node)
    if norm is not None:
        walk.measure(norm, y)
        slope = walk.slope(norm).double()
    variance = layers[0].variances(y, slope)
    weights = reader.matrix(walk.tensor(reader.weight_node).double(), reader.groups)
    chosen = _places(reader, y, weights.shape[-1])
    seen = torch.cat([reader.seen(part, places, reader.groups) for part, places in zip(x, chosen)], 1)
    for layer in layers:
        columns = layer.columns.to(y[0].device)
        groups = zip(seen, weights, slope.view(reader.groups, -1))
        layer.consumers = [Consumer(U, W, s, columns, ridge) for U, W, s in groups]
        layer.variance = variance


def _places(reader: Reader, y: list[Tensor], features: int) -> list[Tensor]:
    """For each batch the output positions that a fit uses: all, or a fixed random choice if there are very many."""
    counts = [part.numel() // part.shape[reader.channel(part)] for part in y]
    chosen = torch.arange(sum(counts), device="cpu")
    most = max(min(POSITIONS * features, ENTRIES // (features * reader.groups)), sum(map(len, y)))
    if len(chosen) > most:
        random = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(chosen), generator=random, device="cpu")[:most].sort().values
    ends = accumulate(counts)
    return [
        (chosen[(chosen >= end - count) & (chosen < end)] - (end - count)).to(part.device)
        for end, count, part in zip(ends, counts, y)
    ]
