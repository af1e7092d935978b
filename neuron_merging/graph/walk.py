"""A network's graph run node by node over batches of inputs: what restoration and the choice of widths have in common (ours).

On made-up inputs, every BatchNorm normalises with statistics measured there: so its output has the mean β and the variance γ²
that it was trained to have, however little the inputs look like data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from neuron_merging.graph.rules import operation

ROUNDING = 1e-12  # of a channel's squared mean: a variance below it is that of a constant
EXACT = 2 * 10**8  # multiply-accumulates that float64 does in no time
DEAD = 1e-8  # running variances below this are those of constant channels

Batch = list[Any]  # a network's inputs, one for each placeholder of its graph
Values = dict[fx.Node, list[Any]]  # by node, what it gives for each batch
Statistics = dict[fx.Node, tuple[Tensor, Tensor]]  # by BatchNorm, the mean and variance [N] that it normalises with


class Walk:
    """A graph with the values of its nodes, for each of some batches.

    precision: in what it computes; parameters are cast to it, and those in the graph stay as they are. measures: whether
    BatchNorms are measured when they are come to; else they use their running statistics, or those that are put into
    `statistics`. tensors: parameters and buffers by target, as the walk has them; a fit changes them here. values: of the nodes
    that have been computed and are still needed. statistics: of the BatchNorms that have been measured.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        batches: Sequence[Batch],
        precision: torch.dtype = torch.float32,
        measures: bool = True,
        tensors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.graph, self.measures, self.precision = graph, measures, precision
        self.batches: list[Batch] = [[self._cast(value) for value in batch] for batch in batches]
        self.nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self.places = {node: i for i, node in enumerate(n for n in self.nodes if n.op == "placeholder")}
        self.tensors: dict[str, Any] = {target: self._cast(value) for target, value in tensors.items()}
        self.values: Values = {}
        self.statistics: Statistics = {}

    def tensor(self, node: fx.Node) -> Any:
        """The parameter, buffer or constant at a get_attr node."""
        if node.target not in self.tensors:
            value = self._cast(attribute(self.graph, node.target))
            self.tensors[node.target] = value.detach() if isinstance(value, Tensor) else value
        return self.tensors[node.target]

    def _cast(self, value: Any) -> Any:
        return value.to(self.precision) if isinstance(value, Tensor) and value.is_floating_point() else value

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that the graph returns."""
        return next(node for node in self.graph.graph.nodes if node.op == "output").all_input_nodes

    def run(self, nodes: Iterable[fx.Node], keep: Iterable[fx.Node] = ()) -> Iterator[fx.Node]:
        """Compute these nodes, and yield each one when it has its values; those that no later one needs are then dropped.

        keep: whose values stay, beside those of the results.
        """
        nodes = list(nodes)
        last = last_uses(nodes, {*keep, *self.results})
        for node in nodes:
            self.values[node] = self.compute(node)
            yield node
            for source in last[node]:
                self.values.pop(source, None)

    def compute(self, node: fx.Node) -> list[Any]:
        """What a node gives for each batch, given the values of the nodes that it reads."""
        if node.op == "placeholder":
            given = [batch[self.places[node]] for batch in self.batches]
            return [value.clone() if isinstance(value, Tensor) else value for value in given]  # may be overwritten
        if node.op == "get_attr":
            return [self.tensor(node)] * len(self.batches)
        if is_batch_norm(node) and self.measures and node not in self.statistics:
            self.measure(node, self.values[node.args[0]])
        return [
            self.apply(node, {source: self.values[source][k] for source in node.all_input_nodes})
            for k in range(len(self.batches))
        ]

    def apply(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """What a node gives for these values of the nodes that it reads, for one batch; parameters need none."""

        def value(source: fx.Node) -> Any:
            return self.tensor(source) if source.op == "get_attr" and source not in values else values[source]

        if is_batch_norm(node):
            return self.normalise(node, value(node.args[0]))
        if operation(node).removesuffix("_").endswith("dropout"):  # the function drops in evaluation too
            return value(node.args[0])
        args, kwargs = tree_map(self._cast_kind, fx.map_arg((node.args, node.kwargs), value))
        if operation(node) == "view":  # values can lie in memory in another order here
            return args[0].reshape(*args[1:])
        call = self.graph.get_submodule(node.target) if node.op == "call_module" else node.target
        return call(*args, **kwargs)

    def _cast_kind(self, value: Any) -> Any:
        real = isinstance(value, torch.dtype) and value.is_floating_point
        return self.precision if real else value

    def measure(self, node: fx.Node, y: Sequence[Tensor]) -> None:
        """Let the BatchNorm at `node` normalise with the statistics of what it sees, y [B, N, …] for each batch."""
        running_mean, running_var, eps = (self._argument(node, i) for i in (3, 4, 7))
        count = sum(part.numel() for part in y)
        parts = [(part.numel() / count, *(x.double() for x in moments(part))) for part in y]
        mean = sum(share * mean for share, mean, _ in parts)
        var = sum(share * (var + (own - mean) ** 2) for share, own, var in parts)
        # Constant channels stay what they are. ε scales with the variance, so that exact multiples stay exact multiples.
        dead = (running_var < DEAD) | (var <= ROUNDING * mean.pow(2)) | (var == 0)
        scaled = var * (1 + eps / running_var.double()) - eps
        self.statistics[node] = (
            running_mean.where(dead, mean.to(running_mean)),
            running_var.where(dead, scaled.to(running_var)),
        )

    def normalise(self, node: fx.Node, y: Tensor) -> Tensor:
        """What the BatchNorm at `node` makes of y [B, N, …]."""
        mean, var = self._moments(node)
        weight, bias, eps = (self._argument(node, i) for i in (1, 2, 7))
        return F.batch_norm(y, mean, var, weight, bias, False, 0.0, eps)

    def slope(self, node: fx.Node) -> Tensor:
        """γ / √(v + ε) of the BatchNorm at `node`, [N]."""
        _, var = self._moments(node)
        weight, eps = (self._argument(node, i) for i in (1, 7))
        slope = (var + eps).rsqrt()
        return slope if weight is None else slope * weight

    def _moments(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        return self.statistics.get(node) or (self._argument(node, 3), self._argument(node, 4))

    def _argument(self, node: fx.Node, place: int) -> Any:
        value = node.args[place]
        return self.tensor(value) if isinstance(value, fx.Node) else value


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N] of y [B, N, …]."""
    mean, var = y.new_zeros(y.shape[1]), y.new_ones(y.shape[1])
    if y.numel() == y.shape[1]:
        return y.flatten().detach().clone(), torch.zeros_like(var)
    F.batch_norm(y, mean, var, training=True, momentum=1.0)  # on CPUs many times faster than torch.var_mean
    return mean, var * (1 - y.shape[1] / y.numel())  # of the values themselves, not an estimate from them


def is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a BatchNorm with running statistics that are parameters of the graph."""
    if node.op != "call_function" or operation(node) != "batch_norm":
        return False
    return all(isinstance(node.args[i], fx.Node) and node.args[i].op == "get_attr" for i in (3, 4))


def last_uses(nodes: Sequence[fx.Node], keep: Iterable[fx.Node] = ()) -> dict[fx.Node, list[fx.Node]]:
    """By node, what no later one of these nodes needs, and is not to be kept."""
    seen: set[fx.Node] = set(keep)
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        uses[node] = [source for source in dict.fromkeys((node, *node.all_input_nodes)) if source not in seen]
        seen.update(uses[node])
    return uses


def attribute(model: nn.Module, target: str) -> Any:
    """What a get_attr node gives."""
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value


def precision(graph: fx.GraphModule, batches: Sequence[Batch], macs: int | None) -> torch.dtype:
    """In what a walk computes: float64 if there is little to do, `macs` for all batches; else float32.

    In float64 the order of sums, and so the number of threads, is not felt.
    """
    if macs is None or macs > EXACT:
        return torch.float32
    walk = Walk(graph, batches[:1], torch.float64)
    with contextlib.suppress(Exception), torch.no_grad():  # a forward pass can insist on its own precision
        for _ in walk.run(walk.nodes):
            pass
        return torch.float64
    return torch.float32
