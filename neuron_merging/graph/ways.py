"""How the indices of a space get from the layers that write it to those that read it, where a positive factor passes (ours).

That is what merging asks for: if channel n is s times channel m at every writer, it is a multiple of it at every reader too, by
a factor that the BatchNorms and depthwise convolutions between them decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from neuron_merging.graph.axes import Leaf, leaves, occurrences
from neuron_merging.graph.propagate import Analysis, tensors
from neuron_merging.graph.units import (
    ACTIVATIONS,
    DROPOUT,
    HOMOGENEOUS,
    LAYERS,
    POOLS,
    TRANSPOSED,
    VIEWS,
    Place,
    groups,
    has_numbers,
    kind,
    owner,
    plain_layer,
)

PASSING = {*HOMOGENEOUS, *POOLS, *VIEWS, *DROPOUT, "mean", "permute", "transpose", "neg", "pixel_unshuffle"}
PASSING |= {f"upsample_{how}" for how in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")}
PARTS = {"chunk", "split", "split_with_sizes"}


@dataclass(frozen=True)
class Step:
    """A BatchNorm or depthwise convolution on a way. channels: which of its own are those of the space, [N].

    weight: of the depthwise convolution. time: which of the times it is that the space is on its axis.
    """

    node: fx.Node
    time: int
    channels: Tensor = field(compare=False)
    weight: str | None = None


Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Way:
    """The steps from a writer, or from a sum (None), to a reader. channels: where the reader has them on its axis, [N, k]."""

    writer: Place | None
    steps: Steps
    reader: Place
    channels: Tensor


@dataclass(frozen=True)
class Ways:
    """All ways to readers. chains: by writer, the steps between it and the sum; none where it is in no sum."""

    chains: dict[Place, Steps]
    to_readers: tuple[Way, ...]


class Blocked(Exception):
    """Why merging cannot pass."""


@dataclass(frozen=True)
class _Segment:
    """Indices of the space in a value. writer: who wrote them, where no sum is between. steps: since then, or since the sum."""

    writer: Place | None
    steps: Steps = ()


Segments = tuple[_Segment, ...]


def by_leaf(analysis: Analysis) -> dict[Leaf, list[fx.Node]]:
    """By leaf the nodes that give or take a value along it, in their order."""
    own: dict[fx.Node, set[Leaf]] = {}
    found: dict[Leaf, list[fx.Node]] = {}
    for node, value in analysis.values.items():
        own[node] = {leaf for axes in tensors(value) for axis in axes for leaf in leaves(axis) if leaf.frozen is None}
        for leaf in own[node].union(*(own.get(source, ()) for source in node.all_input_nodes)):
            found.setdefault(leaf, []).append(node)
    return found


def find_ways(
    analysis: Analysis, leaf: Leaf, nodes: Sequence[fx.Node], writers: Sequence[Place], readers: Sequence[Place]
) -> Ways:
    """The ways of a space. nodes: those that have to do with it. Raises Blocked where a positive factor does not pass."""
    walk = _Walk(analysis, leaf, writers, readers)
    for node in nodes:
        walk.visit(node)
    silent = [place for place in (*writers, *readers) if place not in walk.seen]
    if silent:
        raise Blocked(f"{silent[0].name} is used in a way that merging does not know")
    return Ways({place: walk.summed.get(place, ()) for place in writers}, tuple(walk.ways))


class _Walk:
    """One pass over the nodes that have to do with a leaf."""

    def __init__(self, analysis: Analysis, leaf: Leaf, writers: Sequence[Place], readers: Sequence[Place]) -> None:
        self.analysis, self.leaf = analysis, leaf
        self.writers, self.readers = self._by_call(writers), self._by_call(readers)
        self.values: dict[fx.Node, Segments] = {}
        self.summed: dict[Place, Steps] = {}
        self.ways: list[Way] = []
        self.seen: set[Place] = set()

    def _by_call(self, places: Sequence[Place]) -> dict[fx.Node, Place]:
        calls = {}
        for place in places:
            node = plain_layer(self.analysis, place.name, grouped=True, kinds=LAYERS | TRANSPOSED)
            if node is None:
                raise Blocked(f"{place.name} is not the weight of one plain layer alone")
            calls[node] = place
        return calls

    def visit(self, node: fx.Node) -> None:
        """Work out the segments of a node's value."""
        if node.op != "call_function" or self.analysis.sources.get(node):  # parameters, and what is made of them alone
            return
        name = kind(node)
        if name in LAYERS | TRANSPOSED:
            self._layer(node)
        elif name == "getitem":
            self._part(node)
        elif name == "cat":
            self._concatenated(node)
        elif name == "add":
            self._summed(node)
        elif any(source in self.values for source in node.all_input_nodes):
            self._passed(node, name)

    def _layer(self, node: fx.Node) -> None:
        """A layer reads, follows or writes."""
        place, given = self.readers.get(node), self.values.get(node.args[0])
        if place is not None and given is not None:
            channels = occurrences(place.layout, self.leaf)
            if given == given[: len(channels)] * groups(node):  # the same in every group
                given = given[: len(channels)]
            if len(channels) != len(given):
                raise Blocked(f"{place.name} reads it in a way that merging does not know")
            self.ways += [Way(part.writer, part.steps, place, where) for part, where in zip(given, channels)]
            self.seen.add(place)
        elif given is not None:
            self.values[node] = self._followed(node, given, node.args[1])
        if node in self.writers:
            if self._times(node) != 1:
                raise Blocked(f"{owner(node.args[1])} writes it several times")
            self.values[node] = (_Segment(self.writers[node]),)
            self.seen.add(self.writers[node])

    def _followed(self, node: fx.Node, given: Segments, weight: fx.Node) -> Segments:
        """Behind a BatchNorm or a depthwise convolution, of which each channel has its own numbers."""
        val = weight.meta["val"]
        if kind(node) != "batch_norm" and not (
            kind(node) != "linear" and groups(node) == len(val) and val.shape[1] == 1
        ):
            raise Blocked(f"{owner(weight)} is a grouped convolution")
        name = self.analysis.network.names[weight.target][0]
        channels = occurrences(self.analysis.parameters[name][0], self.leaf)
        if len(channels) != len(given) or any(where.shape[1] != 1 for where in channels):
            raise Blocked(f"{owner(weight)} has several channels for each")
        of_layer = name if kind(node) != "batch_norm" else None
        steps = [Step(node, time, where.flatten(), of_layer) for time, where in enumerate(channels)]
        return tuple(replace(part, steps=(*part.steps, step)) for part, step in zip(given, steps))

    def _passed(self, node: fx.Node, name: str) -> None:
        """An operation on one value, which a positive factor passes."""
        given = [source for source in node.all_input_nodes if source in self.values]
        before = self.values[given[0]]
        if name == "batch_norm" and given == [node.args[0]] and has_numbers(node):
            self.values[node] = self._followed(node, before, node.args[3])
            return
        scaled = name in ("mul", "div") and not isinstance(node.args[1], fx.Node)
        cut_out = name in ("slice", "pad") and (name == "slice" or not any(node.args[3:]))
        if name in ACTIVATIONS:
            raise Blocked(f"{name} is not positively homogeneous")
        if len(given) != 1 or not (name in PASSING or name in PARTS or scaled or cut_out):
            raise Blocked(f"it goes through {name}")
        times = sum(self._counts(node)) if name in PARTS else self._times(node)
        if times != len(before):
            raise Blocked(f"it is divided by {name}")
        self.values[node] = before

    def _part(self, node: fx.Node) -> None:
        """One of the values that an operation gives."""
        source, number = node.args
        if source in self.values:
            counts = self._counts(source)
            start = sum(counts[:number])
            self.values[node] = self.values[source][start : start + counts[number]]

    def _concatenated(self, node: fx.Node) -> None:
        parts = node.args[0]
        together = tuple(part for source in parts for part in self.values.get(source, ()))
        if together and self._times(node) != len(together):
            raise Blocked("it goes through cat")
        self.values[node] = together

    def _summed(self, node: fx.Node) -> None:
        """A sum of two values that both have the space."""
        operands = node.args[:2]
        if not any(source in self.values for source in node.all_input_nodes):
            return
        if len(node.args) != 2 or node.kwargs or not all(source in self.values for source in operands):
            raise Blocked("it goes through add")
        first, second = (self.values[source] for source in operands)
        if not len(first) == len(second) == self._times(node):
            raise Blocked("it goes through add")
        for part in (*first, *second):
            if part.writer is None and part.steps:
                raise Blocked("a BatchNorm or depthwise convolution stands between two sums")
            if part.writer is not None and self.summed.setdefault(part.writer, part.steps) != part.steps:
                raise Blocked(f"{part.writer.name} is summed in two ways")
        self.values[node] = (_Segment(None),) * len(first)

    def _times(self, node: fx.Node) -> int:
        """How often the leaf is on the one axis of a node's value that it is on; 0 where it is on several."""
        return self._counts(node)[0]

    def _counts(self, node: fx.Node) -> list[int]:
        """`_times` of every tensor that a node gives."""
        counts = []
        for axes in tensors(self.analysis.values[node]):
            times = [sum(part is self.leaf for part in leaves(axis)) for axis in axes]
            counts.append(sum(times) if sum(map(bool, times)) == 1 else 0)
        return counts
