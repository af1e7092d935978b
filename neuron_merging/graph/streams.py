"""Channels that several layers write or read: residual streams, concatenations, what passes depthwise convolutions (ours).

The paper prunes what one layer writes and one other reads (tracing.py). Here the graph is read as a system of channel spaces:
a convolution or linear layer opens a new one; elementwise operations, BatchNorm, pooling and depthwise convolutions stay in
it; a sum or product makes two spaces one; a concatenation puts spaces side by side. A space that is neither an input nor an
output of the network, and that nothing unknown touches, can lose channels: every writer loses rows, every follower
channels, every reader columns.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx, nn

from neuron_merging.graph.tracing import (
    ACTIVATIONS,
    ADDITIONS,
    CONVS,
    DROPOUT,
    RELU,
    Graph,
    NotAUnit,
    Unit,
    asks_no_width,
    dimension,
    flattens,
    name_of,
    next_norm,
    norms,
    obstacle,
    of_one_batch,
    pools,
)

PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
MEANS = {torch.mean, "mean"}
PASSING = {"stochastic_depth"}  # other packages' functions that act on every channel by itself, by name


@dataclass(frozen=True)
class Place:
    """A module whose channels from `offset` on are those of a stream."""

    module: str
    offset: int = 0


@dataclass(frozen=True)
class Reader(Place):
    """A layer that reads them, behind the followers `path` (BatchNorms, depthwise convolutions) since they were summed.

    channels: all that it reads. writer: whose output it reads before that is summed, None for one that reads the sum.
    """

    channels: int = 0
    path: tuple[Place, ...] = ()
    writer: str | None = None


@dataclass(frozen=True)
class Stream:
    """Channels that can only be dropped together. chains: by writer the followers between it and the sum.

    norms: by writer and reader the BatchNorm that is all that reads it, if any. obstacle: why dropped channels cannot be
    merged into kept ones (None: they can); they can be pruned and restored.
    """

    width: int
    writers: tuple[str, ...]
    followers: tuple[Place, ...]
    readers: tuple[Reader, ...]
    chains: tuple[tuple[Place, ...], ...]
    norms: dict[str, str | None]
    obstacle: str | None = None

    @property
    def layer(self) -> str:
        """What it is called: its first writer."""
        return self.writers[0]


def apart(
    units: Sequence[Unit | Stream], each: Sequence[Any]
) -> tuple[tuple[list[Unit], list[Any]], list[tuple[Stream, Any]]]:
    """The paper's units and what belongs to each, and the streams, each with its own."""
    pairs = list(zip(units, each))
    alone = [(unit, own) for unit, own in pairs if isinstance(unit, Unit)]
    coupled = [(stream, own) for stream, own in pairs if isinstance(stream, Stream)]
    return ([unit for unit, _ in alone], [own for _, own in alone]), coupled


def streams(model: nn.Module, training: bool = False) -> tuple[list[Stream], dict[str, str]]:
    """All channel spaces that can lose channels, in the order of the forward pass, and why the writers of others cannot.

    training: of the forward pass in training mode, which may call more layers. Raises NeuronMergingError where torch.fx cannot
    trace `model`.
    """
    network = Graph(model, training)
    spaces = _Spaces(network)
    for node in network.nodes:
        spaces.add(node)
    shared, left_out = [], {}
    for space in dict.fromkeys(space.root for space in spaces.opened):
        if space.frozen is None and not space.readers:
            space.frozen = "nobody reads its output"
        if space.frozen is None:
            calls = [node for node in network.nodes if node.op == "call_module"]
            writers = tuple(node.target for node in calls if node.target in space.writers)
            chains = tuple(space.writers[writer] for writer in writers)
            layers = (*writers, *(reader.module for reader in space.readers))
            norms = {node.target: next_norm(network, node) for node in calls if node.target in layers}
            places = tuple(space.followers), tuple(space.readers)
            shared.append(Stream(space.width, writers, *places, chains, norms, space.obstacle))
        else:
            left_out |= dict.fromkeys(space.writers, space.frozen)
    return shared, left_out


@dataclass(eq=False)
class _Space:
    """A channel space in the making; spaces that became one have the same `root`."""

    width: int
    writers: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    summed: dict[str, tuple[Place, ...]] = field(default_factory=dict)  # the writers that are behind a sum already
    followers: list[Place] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    frozen: str | None = None  # why it cannot lose channels
    obstacle: str | None = None  # why it cannot be merged
    parent: "_Space | None" = None

    @property
    def root(self) -> "_Space":
        space = self
        while space.parent is not None:
            space = space.parent
        return space

    def unite(self, other: "_Space") -> None:
        """Make two spaces one."""
        mine, its = self.root, other.root
        if mine is its:
            return
        its.parent = mine
        mine.writers |= its.writers
        mine.summed |= its.summed
        mine.followers += its.followers
        mine.readers += its.readers
        mine.frozen = mine.frozen or its.frozen
        mine.obstacle = mine.obstacle or its.obstacle


@dataclass(frozen=True)
class _Segment:
    """Channels of a value. writer: who wrote them, where no sum is between; path: the followers since then or since the sum."""

    space: _Space
    writer: str | None = None
    path: tuple[Place, ...] = ()


@dataclass(frozen=True)
class _Value:
    """The channels of a node's value, side by side. dimension: of the convolution (0: a linear layer); flat: flattened."""

    segments: tuple[_Segment, ...]
    dimension: int
    flat: bool = False

    @property
    def widths(self) -> list[int]:
        return [segment.space.root.width for segment in self.segments]

    def placed(self) -> list[tuple[_Segment, int]]:
        """Every segment with its first channel."""
        return list(zip(self.segments, accumulate(self.widths, initial=0)))

    def freeze(self, reason: str) -> None:
        """No channel can be lost."""
        for segment in self.segments:
            segment.space.root.frozen = segment.space.root.frozen or reason

    def bend(self, reason: str) -> None:
        """No channel can be merged into another."""
        for segment in self.segments:
            segment.space.root.obstacle = segment.space.root.obstacle or reason


class _Spaces:
    """The values of all nodes so far."""

    def __init__(self, network: Graph) -> None:
        self.network = network
        self.values: dict[fx.Node, _Value | None] = {}
        self.opened: list[_Space] = []

    def add(self, node: fx.Node) -> None:
        """Work out the channels of a node's value from those of what it reads."""
        inputs = [self.values[n] for n in node.all_input_nodes if self.values[n] is not None]
        layer = self.network.module(node)
        self.values[node] = None
        try:
            self.network.check_hooks(node)
            self.values[node] = self._value(node, inputs)
        except NotAUnit as why:
            if isinstance(layer, (*CONVS, nn.Linear)):
                self.values[node] = self._open(node)
                inputs.append(self.values[node])
            for value in inputs:
                value.freeze(str(why))

    def _value(self, node: fx.Node, inputs: list[_Value]) -> _Value | None:
        """Raises NotAUnit where a node does something that does not leave every channel by itself."""
        network, kind, module = self.network, self.network.kind(node), self.network.module(node)
        if isinstance(module, (*CONVS, nn.Linear)):
            return self._layer(node, module, inputs)
        if not inputs or asks_no_width(node):
            return None
        if kind in ADDITIONS or kind in PRODUCTS:
            return self._united(node, kind, inputs)
        if kind is torch.cat:
            return self._concatenated(node)
        value = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if value is None or len(inputs) > 1:
            raise NotAUnit(obstacle(network, node))
        spatial = value.dimension and not value.flat
        if kind in norms(value.dimension) and not value.flat:
            norm = network.own(node, "out")
            if norm.running_mean is None:
                raise NotAUnit(f"{node.target} keeps no running statistics")
            if norm.num_features != sum(value.widths):  # of what a linear layer gives, BatchNorm1d may normalise places
                raise NotAUnit(obstacle(network, node))
            return self._followed(node, value)
        if kind in RELU or kind in DROPOUT or name_of(kind) in PASSING:
            return value
        if kind in ACTIVATIONS:
            value.bend(f"its output goes through {name_of(kind)}")
            return value
        if spatial and (pools(network, node, value.dimension) or _averages(node, kind, value.dimension) == "kept"):
            return value
        if spatial and (
            flattens(network, node, of_one_batch(node.args[0], self._understood))
            or _averages(node, kind, value.dimension)
        ):
            return replace(value, flat=True)
        raise NotAUnit(obstacle(network, node))

    def _understood(self, node: fx.Node) -> bool:
        return self.values[node] is not None

    def _open(self, node: fx.Node) -> _Value:
        """The new space that a layer writes."""
        layer = self.network.module(node)
        space = _Space(len(layer.weight), {node.target: ()})
        self.opened.append(space)
        return _Value((_Segment(space, node.target),), dimension(layer))

    def _layer(self, node: fx.Node, layer: nn.Module, inputs: list[_Value]) -> _Value:
        """A layer reads channels and opens a space; a depthwise convolution follows what it reads."""
        self.network.own(node)
        if len(node.all_input_nodes) > 1:
            raise NotAUnit(f"{node.target} reads several values")
        value = inputs[0] if inputs else None
        grouped = isinstance(layer, CONVS) and layer.groups > 1
        if grouped:
            fits = value is not None and not value.flat and value.dimension == dimension(layer)
            if not fits or not layer.groups == layer.in_channels == layer.out_channels == sum(value.widths):
                raise NotAUnit(f"{node.target} is a grouped convolution")
            self.network.check_sizes(node, "in", "out")
            return self._followed(node, value)
        opened = self._open(node)
        for side, values in (("out", [opened]), ("in", inputs)):
            try:
                self.network.check_sizes(node, side)
            except NotAUnit as why:
                for each in values:
                    each.freeze(str(why))
        if value is None:
            return opened
        total = sum(value.widths)
        if isinstance(layer, CONVS):
            reads = not value.flat and value.dimension == dimension(layer) and layer.in_channels == total
        else:
            reads = layer.in_features % total == 0 and (
                value.flat or (not value.dimension and layer.in_features == total)
            )
        if not reads:
            value.freeze(f"{node.target} does not read its channels as such")
            return opened
        for segment, offset in value.placed():
            segment.space.root.readers.append(Reader(node.target, offset, total, segment.path, segment.writer))
        return opened

    def _followed(self, node: fx.Node, value: _Value) -> _Value:
        """The value behind a module that has something for every channel."""
        segments = []
        for segment, offset in value.placed():
            place = Place(node.target, offset)
            segment.space.root.followers.append(place)
            segments.append(replace(segment, path=(*segment.path, place)))
        return replace(value, segments=tuple(segments))

    def _united(self, node: fx.Node, kind: Any, inputs: list[_Value]) -> _Value:
        """A sum or product of two values, channel by channel, or of one with a number."""
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        values = [self.values[operand] for operand in operands]
        if node.kwargs or len(node.args) != 2 or None in values:
            raise NotAUnit(obstacle(self.network, node))
        if len(operands) == 1 or kind in PRODUCTS:
            for value in values:
                value.bend(f"its output goes through {name_of(kind)}")
        if len(operands) == 1:
            return values[0]
        first, second = values
        if first.widths != second.widths or (first.dimension, first.flat) != (second.dimension, second.flat):
            raise NotAUnit(obstacle(self.network, node))
        for segment in (*first.segments, *second.segments):
            root = segment.space.root
            if segment.writer is not None:
                if root.summed.setdefault(segment.writer, segment.path) != segment.path:
                    root.obstacle = f"{segment.writer} is summed in two ways"
                root.writers[segment.writer] = segment.path
            elif segment.path:
                root.obstacle = "a BatchNorm or depthwise convolution stands between two sums"
        for mine, its in zip(first.segments, second.segments):
            mine.space.unite(its.space)
        return replace(first, segments=tuple(_Segment(segment.space) for segment in first.segments))

    def _concatenated(self, node: fx.Node) -> _Value:
        """Values side by side."""
        parts = node.args[0] if node.args and isinstance(node.args[0], list | tuple) else ()
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        values = [self.values.get(part) for part in parts]
        alike = values and None not in values and len({(v.dimension, v.flat) for v in values}) == 1
        if (
            not alike
            or values[0].flat
            or dim not in ((1, -1) if not values[0].dimension else (1, -1 - values[0].dimension))
        ):
            raise NotAUnit(obstacle(self.network, node))
        return replace(values[0], segments=tuple(segment for value in values for segment in value.segments))


def _averages(node: fx.Node, kind: Any, sides: int) -> str | None:
    """The mean over all positions: "flat" where it also takes those dimensions away, "kept" where it keeps them."""
    if kind not in MEANS:
        return None
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = sorted(d % (sides + 2) for d in (dims if isinstance(dims, list | tuple) else [dims]) if isinstance(d, int))
    if dims != list(range(2, sides + 2)):
        return None
    return "kept" if node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False) else "flat"
